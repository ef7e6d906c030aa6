"""Where a template ends an answer, told by the control tokens that it writes around one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["MARKER", "Stop", "control_texts", "first_stop", "last_stop", "next_header"]

# What looks like a control token where a template writes it: <|x|>, </s>, [INST], <start_of_turn>, and full-width bars.
MARKER = re.compile(r"<[|｜]?[^<>|｜\s]{1,48}[|｜]?>|<[|｜][^<>]{1,48}[|｜]>|\[/?[A-Z][A-Z_]{1,30}\]")
# Tags inside an answer look the same and end nothing.
_INNER = re.compile(r"think|tool|reason|answer|arg|param|function|invoke|escape|^<.{0,2}>$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Stop:
    """`text` ends a turn. `append` is written where it is missing, with `flush` behind trailing space too."""

    text: str = ""
    append: str = ""
    flush: bool = False


def control_texts(text: str, known: Iterable[str] = (), *, inner: bool = False) -> list[tuple[int, int]]:
    """(start, end) of each control token in a template's own text, in order: special tokens, and markers like them.

    Tags that stand inside answers (``</think>``) look the same; they only count with `inner`.

    >>> control_texts("</think> <|im_end|>", [])
    [(9, 19)]
    """
    special = sorted((re.escape(token) for token in known if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join([*special, MARKER.pattern]))
    spans = [(match.start(), match.end()) for match in pattern.finditer(text)]
    kept = set(known)
    return [
        (a, b) for a, b in spans
        if text[a:b] in kept or ((inner or not _INNER.search(text[a:b])) and any(c.isalnum() for c in text[a:b]))
    ]


def first_stop(
    text: str | None, known: Iterable[str], engine_stops: Sequence[str], headers: Collection[str] = ()
) -> str:
    """The first run of control tokens in what a template writes after an answer, or, without any, its plain text.

    The run ends at a token that an engine stops at, and before one that headers are made of.

    >>> first_stop("<|im_end|>\\n", [], []), first_stop("\\n### End\\n", [], [])
    ('<|im_end|>', '### End')
    """
    spans = control_texts(text or "", known)
    if text is None or not spans:
        return (text or "").strip()
    start, end = last = spans[0]
    for a, b in spans[1:]:
        if text[slice(*last)] in engine_stops or a != end or text[a:b] in headers:
            break
        end, last = b, (a, b)
    return text[start:end]


def last_stop(
    text: str | None, known: Iterable[str], stops: Sequence[str], headers: Collection[str] = ()
) -> str:
    """The stop behind a tool call: the first of `stops`, or else the last control token, for tags close before it."""
    if not text:
        return ""
    found = [(at, stop) for stop in stops if stop and (at := text.find(stop)) >= 0]
    if found:
        return min(found)[1]
    found_texts = [text[a:b] for a, b in control_texts(text, known) if text[a:b] not in headers]
    return found_texts[-1] if found_texts else ""


def next_header(tail: str | None, text: str | None, known: Iterable[str]) -> Stop:
    """The first control token of the next message's header, for a template that ends an answer with nothing.

    `tail` is what it writes after the last answer, `text` what it writes between an answer and the next message.

    >>> next_header("", "\\n<|user|>\\n", [])
    Stop(text='<|user|>', append='\\n<|user|>', flush=True)
    """
    if not text:
        return Stop()
    behind = text[len(tail) :] if tail is not None and text.startswith(tail) else text
    spans = control_texts(behind, known, inner=True)  # a header's first token is no tag inside an answer
    if not spans:
        return Stop()
    stop = behind[slice(*spans[0])]
    return Stop(stop, behind[: spans[0][1]], True) if behind is not text or not tail else Stop(stop, stop)
