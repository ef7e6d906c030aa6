"""Marker mode, for text with no message structure: responses found by text offset, never by token ids.

Three behaviours in use, by name: "last" trains what follows the last response marker (what completion-only collators do
without an instruction template), "all" every response up to the next instruction marker (what they do with one), and
"minimind" every stretch from an assistant header through its stop.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from chatloss.errors import DataError, UsageError
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.tokens import Encoded, Tokens

__all__ = ["MODES", "Markers", "encode_text", "responses"]

MODES = ("last", "all", "minimind")
_EDIT = "edit the row, or give it as messages"


@dataclass(frozen=True, slots=True)
class Markers:
    """The texts around a response. `instruction` is needed for "all"; `stop` ends a response if it is found.

    Markers are compared as text, so a marker with and without its trailing newline means the same.
    """

    mode: str
    response: str
    instruction: str = ""
    stop: str = ""

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UsageError(f"there is no marker mode {self.mode!r}", hint=f"one of {', '.join(MODES)}")
        if not self.response.strip():
            raise UsageError("the response marker is empty", hint="for example --response-template '### Response:'")
        if self.mode == "all" and not self.instruction.strip():
            raise UsageError("marker mode 'all' needs an instruction marker", hint="--instruction-template TEXT")
        if self.mode == "minimind" and not self.stop.strip():
            raise UsageError("marker mode 'minimind' needs a stop marker", hint="for example the tokenizer's EOS")


def responses(text: str, markers: Markers, where: str = "") -> list[tuple[int, int]]:
    """(start, end) of every trained stretch of `text`, in characters.

    Raises `DataError` where a marker never occurs, or where a quoted marker makes the structure ambiguous: one that
    begins a line here and stands inside a line there (a marker given with a newline before it only counts at line
    starts), two response markers without an instruction between them, a response without the stop that others have, a
    stop without a header.

    >>> responses("### Q: a\\n### A: b\\n### Q: c\\n### A: d", Markers("all", "### A:", "### Q:"))
    [(15, 18), (33, 35)]
    """
    if markers.mode == "minimind":
        return _headers_through_stops(text, markers, where)
    found = _structural(text, markers.response, where)
    if not found:
        raise DataError(
            f"the response marker {markers.response!r} does not occur", where=where,
            hint="check its spelling against `chatloss view`; every row needs one", kind="marker",
        )
    starts = [at + len(markers.response.strip("\n")) for at in found]
    if markers.mode == "last":
        return [_ended(text, _line_begun(text, starts[-1]), len(text), markers)]
    return _between(text, markers, found, starts, where)


def _between(text: str, markers: Markers, found: list[int], starts: list[int], where: str) -> list[tuple[int, int]]:
    lines = any(text[at - 1] == "\n" for at in found if at)
    questions = _structural(text, markers.instruction, where, lines)
    if not questions:
        what = f"the instruction marker {markers.instruction!r} does not occur"
        raise DataError(what, where=where, hint="check its spelling; every row needs one", kind="marker")
    order = sorted([(at, "instruction") for at in questions] + [(at, "response") for at in found])
    for (_, kind), (at, following) in pairwise(order):
        if kind == following:
            _ambiguous(f"the {kind} marker stands twice in a row", at, where)
    spans = []
    for at, start in zip(found, starts, strict=True):
        end = next((q for q in questions if q > at), len(text))
        spans.append(_ended(text, _line_begun(text, start), end, markers))
    stop = markers.stop.rstrip("\n")
    asked = [text[at:behind] for (at, kind), (behind, _) in pairwise(order) if kind == "instruction"]
    answered = [text[a:b] for a, b in spans]
    for kind, stretches in (("instruction", asked), ("response", answered if stop in answered[-1] else answered[:-1])):
        if stop and len({stop in stretch for stretch in stretches}) > 1:  # the last response alone may be cut off
            _ambiguous(f"one {kind} holds {stop!r} and another does not: somebody quotes the markers", found[0], where)
    return spans


def _headers_through_stops(text: str, markers: Markers, where: str) -> list[tuple[int, int]]:
    header, stop = markers.response.rstrip("\n"), markers.stop.rstrip("\n")
    opening = header[: -len("assistant")] if header.endswith("assistant") else ""
    spans: list[tuple[int, int]] = []
    at = 0
    while (found := text.find(header, at)) >= 0:
        before = text[:found].rstrip()
        if before and not before.endswith(stop):
            at = found + len(header)  # inside another message: somebody quotes a header
            continue
        start = _line_begun(text, found + len(header))
        end = text.find(stop, start)
        if end < 0:
            spans.append((start, len(text)))  # cut off: what there is of the answer is still an answer
            break
        if opening and opening in text[start:end]:
            _ambiguous("a header stands inside an answer", start + text[start:end].find(opening), where)
        at = end + len(stop)
        spans.append((start, at))
    if not spans:
        what = f"the response marker {markers.response!r} does not occur at the start of a message"
        raise DataError(what, where=where, hint="check its spelling against `chatloss view`", kind="marker")
    if opening and text.count(stop) > text.count(opening):
        _ambiguous(f"there are more stops {stop!r} than headers: somebody quotes the template", text.rfind(stop), where)
    return spans


def _ambiguous(what: str, at: int, where: str) -> NoReturn:
    raise DataError(f"{what} (character {at})", where=where, hint=_EDIT, kind="marker")


def _structural(text: str, marker: str, where: str, lines: bool = False) -> list[int]:
    """Where `marker` stands as structure: at line starts if it is given with a newline in front, else anywhere.

    A marker that begins a line here and stands in the middle of one there is quoted in one of the two places; which,
    only the user can say. Where the text begins, a line begins too, but that only tells something if other markers
    begin `lines`.
    """
    bare = marker.strip("\n")
    found, at = [], text.find(bare)
    while at >= 0:
        found.append(at)
        at = text.find(bare, at + len(bare))
    begin, inside = ([at for at in found if (not at or text[at - 1] == "\n") == wanted] for wanted in (True, False))
    if marker.startswith("\n"):
        return begin
    if inside and any(lines or at > 0 for at in begin):
        what = f"the marker {bare!r} begins a line in one place and stands inside a line in another ({inside[0]})"
        hint = f"give it as {chr(92)}n{bare} if it always begins a line, or edit the row"
        raise DataError(what, where=where, hint=hint, kind="marker")
    return found


def _line_begun(text: str, at: int) -> int:
    """The newline behind a marker belongs to the marker, whether or not it was given with one."""
    return at + 1 if text.startswith("\n", at) else at


def _ended(text: str, start: int, end: int, markers: Markers) -> tuple[int, int]:
    stop = markers.stop.rstrip("\n")
    at = text.find(stop, start, end) if stop else -1
    return start, end if at < 0 else at + len(stop)


def encode_text(
    tokens: Tokens, text: str, markers: Markers, *, source: str = "", decode: Decode | None = None
) -> Sample:
    """One row of `text` as it stands (nothing is added), its responses trained.

    A token that would straddle the start of a response is avoided by encoding the response apart, so that the ids
    before it are those of the text before it.
    """
    spans = responses(text, markers, source)
    ids, starts = _pieces(tokens, text, [start for start, _ in spans])
    n = len(ids)
    reason, weight = np.full(n, Reason.OTHER_ROLE, np.uint8), np.zeros(n, np.float32)
    for start, end in spans:
        stop = markers.stop.rstrip("\n")
        body = end - len(stop) if stop and text.endswith(stop, start, end) else end
        a, b, c = (int(np.searchsorted(starts, char)) for char in (start, body, end))
        reason[a:b], reason[b:c], weight[a:c] = Reason.CONTENT, Reason.STOP, 1.0
    if n:
        weight[0] = 0.0
        reason[0] = Reason.OTHER_ROLE
    changes = (np.diff(reason) != 0) | (np.diff(weight) != 0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), n] if n else []
    owner = {i: k for k, (start, _) in enumerate(spans) for i in [int(np.searchsorted(starts, start))]}
    made, turn = [], -1
    for a, b in pairwise(edges):
        turn = owner.get(a, turn)
        made.append(Span(a, b, turn if weight[a] else -1, float(weight[a]), Reason(int(reason[a]))))
    return Sample(ids, tuple(made), dict.fromkeys(range(len(spans)), "exact"), source, {}, decode)


def _pieces(tokens: Tokens, text: str, boundaries: list[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """(ids, character where each token starts), split at those boundaries that a token would straddle."""
    joint = tokens.encode(text)
    cuts = [at for at in boundaries if at and tokens.encode_pair(text[:at], text[at:])[1] is None]
    ids: list[npt.NDArray[np.int32]] = []
    starts: list[npt.NDArray[np.int64]] = []
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        piece = joint if not cuts else (tokens.encode_segment if start else tokens.encode)(text[start:end])
        ids.append(piece.ids)
        starts.append(_starts(tokens, text[start:end], piece, start) + start)
    return np.concatenate(ids), np.concatenate(starts)


def _starts(tokens: Tokens, text: str, piece: Encoded, offset: int) -> npt.NDArray[np.int64]:
    if piece.starts is not None:
        return piece.starts.astype(np.int64)
    # Without offsets: how many tokens each prefix has, by encoding it.
    encode = tokens.encode_segment if offset else tokens.encode
    counts = np.array([len(encode(text[:i]).ids) for i in range(len(text) + 1)])
    return np.asarray(np.searchsorted(counts, np.arange(len(piece.ids)) + 1, side="left") - 1, np.int64)
