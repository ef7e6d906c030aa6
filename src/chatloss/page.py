"""One offline HTML page of rows: every token with its reason, filters, findings and rejects, nothing loaded."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from chatloss.reduction import Reduction
from chatloss.runs import Pieces, cut
from chatloss.sample import Decode, Reason, Sample
from chatloss.view import OUTCOMES, visible

__all__ = ["Section", "page", "write_page"]

Floats = npt.NDArray[np.float64]

_ASSETS = Path(__file__).parent / "assets"
_SCRIPTS = tuple(f"page{part}.js" for part in ("_rows", "_peer", "_filters", "_link", "_plots", "_panels", ""))
_LONGEST = 2000
_LISTED = 1000


@dataclass(frozen=True, slots=True)
class Section:
    """Something to read above the rows: text, a table whose first row is its head, a curve of (x, y) points."""

    title: str
    text: str = ""
    table: Sequence[Sequence[str]] = ()
    curve: Sequence[tuple[float, float]] = ()


def page(
    samples: Iterable[Sample], *, title: str = "chatloss", decode: Decode | None = None,
    roles: Mapping[str, Sequence[str]] | None = None, summary: Mapping[str, object] | None = None,
    findings: Iterable[object] = (), rejects: Iterable[object] = (), sections: Iterable[Section] = (),
    untrained: Mapping[str, Mapping[int, str]] | None = None,
    weights_by_reduction: Mapping[str, Sequence[npt.ArrayLike]] | None = None,
    peer_weights: Mapping[int, npt.ArrayLike] | None = None, peer_name: str = "labels",
) -> str:
    """The rows as one self-contained HTML document that makes no network request and runs only its own script.

    `decode` defaults to each sample's own; without either ids are shown. `roles` maps a sample's source to the roles of
    its conversation's messages. `summary` adds words to the line under the title. A finding is an object or mapping
    with severity, cause, count, example, remedy and, if it can say so, rows (sources); a reject one with where, what
    and hint, as errors have them. `untrained` maps a source to `Sample.untrained` for conversations that have no row.
    `weights_by_reduction[name][i]` are the weights [n] of row i; by default those of token, turn and conversation over
    these rows, in units of what `token` gives a token.
    `peer_weights[i]` are the weights [n] that another tool gives the tokens of row i (0 = not trained): both masks are
    shown, and where they differ; `peer_name` is what that tool is called. Rows it has nothing for are left alone.
    Raises `ValueError` where weights do not fit the rows.

    >>> from chatloss.sample import Span
    >>> row = Sample(np.array([7, 8], np.int32), (Span(0, 2, 0, 1.0, Reason.CONTENT),), {0: "exact"}, "a.jsonl:1")
    >>> html = page([row], decode=lambda ids: "</script>" * len(ids), title="<b>")
    >>> html.count("</script>"), "&lt;b&gt;" in html
    (2, True)
    """
    rows = list(samples)
    by_source: dict[str, list[int]] = {}
    for i, sample in enumerate(rows):
        by_source.setdefault(sample.source, []).append(i)
    weights = _usual_weights(rows, by_source) if weights_by_reduction is None else weights_by_reduction
    data = {
        **_rows(rows, decode, roles or {}, weights, peer_weights or {}),
        "peer": None if peer_weights is None else _text(peer_name),
        "reductions": [_text(name) for name in weights],
        "reasons": {str(int(r)): [r.name.lower(), r.explanation, r.trained] for r in Reason},
        "outcomes": OUTCOMES,
        "summary": [[_text(name), _text(value)] for name, value in (summary or {}).items()],
        "findings": [_finding(finding, by_source) for finding in findings],
        "untrained": _untrained(rows, by_source, untrained or {}, roles or {}),
        "rejects": _rejects(list(rejects)),
        "sections": [
            {
                "title": _text(part.title), "text": _text(part.text, 20_000),
                "table": [[_text(cell) for cell in line] for line in part.table],
                "curve": [(float(x), float(y)) for x, y in part.curve],
            }
            for part in sections
        ],
    }
    css = (_ASSETS / "page.css").read_text("utf-8")
    js = "".join((_ASSETS / name).read_text("utf-8") for name in _SCRIPTS)
    policy = (
        f"default-src 'none'; script-src '{_hash(js)}'; style-src '{_hash(css)}'; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )
    name = html.escape(visible(" ".join(_text(title).split()), whitespace=False))
    filled = {"title": name, "csp": policy, "css": css, "js": js, "data": _embedded(data)}
    # One pass: a placeholder that stands in the data is data.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], (_ASSETS / "page.html").read_text("utf-8"))


def write_page(path: str | os.PathLike[str], samples: Iterable[Sample], **options: Any) -> None:
    """Write `page(samples, **options)` to `path`, which holds the old page or the whole new one, never a part."""
    text = page(samples, **options)
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        Path(name).chmod(0o644)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _rows(
    samples: Sequence[Sample], decode: Decode | None, roles: Mapping[str, Sequence[str]],
    weights: Mapping[str, Sequence[npt.ArrayLike]], peer: Mapping[int, npt.ArrayLike],
) -> dict[str, Any]:
    """Rows as ranks into one table of tokens, most frequent first, and what in a row differs from that table."""
    for name, lines in weights.items():
        if len(lines) != len(samples):
            raise ValueError(f"weights_by_reduction[{name!r}] has {len(lines)} rows, but there are {len(samples)}")
    if beyond := sorted(set(peer) - set(range(len(samples)))):
        raise ValueError(f"peer_weights has a row {beyond[0]}, but there are {len(samples)}")
    ids = np.concatenate([np.empty(0, np.int32), *(sample.input_ids for sample in samples)])
    unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    rank = np.empty(len(unique), np.int64)
    rank[order] = np.arange(len(unique))
    ranks = rank[inverse.reshape(-1)]
    texts: dict[int, str] = {}
    known: dict[Decode, Pieces] = {}
    out, first = [], 0
    for i, sample in enumerate(samples):
        reader = decode or sample.decode
        pieces = known.setdefault(reader, Pieces(reader)) if reader else None
        tokens: list[int] = ranks[first : first + len(sample)].tolist()
        first += len(sample)
        odd: list[int | str] = []
        for _, start, end, text in cut(sample, pieces):
            if end > start + 1 or texts.setdefault(tokens[start], text) != text:
                odd += [start, end, _text(text, None)]
        row = {
            "s": _text(sample.source), "k": tokens, "x": odd,
            "p": [value for s in sample.spans for value in (s.end, s.message, s.weight, int(s.reason))],
            "o": [[turn, _text(outcome)] for turn, outcome in {**sample.outcomes, **_why(sample.untrained)}.items()],
            "w": [_steps(lines[i], sample, f"weights_by_reduction[{name!r}]") for name, lines in weights.items()],
        }
        if i in peer:
            row["l"] = _steps(peer[i], sample, f"peer_weights[{i}]")
        if sample.source in roles:
            row["m"] = [_text(role) for role in roles[sample.source]]
        out.append(row)
    table = [_text(texts.get(i, ""), None) for i in range(len(unique))]
    return {"texts": table, "ids": unique[order].tolist(), "rows": out}


def _usual_weights(rows: Sequence[Sample], by_source: Mapping[str, Sequence[int]]) -> dict[str, list[Floats]]:
    """What the usual reductions give each token; one that gives the same as an earlier one is left out."""
    chats = [chat for source, chat in by_source.items() if source] + [[i] for i in by_source.get("", ())]
    out: dict[str, list[Floats]] = {}
    for name in ("token", "turn", "conversation"):
        reduction = Reduction.parse(name)
        lines: list[Floats] = [np.empty(0)] * len(rows)
        tokens, z = 0, 0.0
        for chat in chats:
            example = reduction.of_example([rows[i] for i in chat])
            tokens, z = tokens + example.tokens, z + example.denominator
            for i, weights in zip(chat, example.weights, strict=True):
                lines[i] = weights
        lines = [weights * (tokens / z if z else 0.0) for weights in lines]
        if not any(all(map(np.allclose, lines, other)) for other in out.values()):
            out[name] = lines
    return out


def _steps(weights: npt.ArrayLike, sample: Sample, name: str) -> list[float]:
    """Run-length coded: end, value, end, value ..."""
    values = np.asarray(weights, np.float64)
    if values.shape != (len(sample),):
        where = f"{len(sample)} tokens ({sample.source})"
        raise ValueError(f"{name} has shape {values.shape} for a row of {where}")
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has a weight that is not a finite number ({sample.source})")
    ends = [*(np.flatnonzero(np.diff(values)) + 1).tolist(), *([len(values)] if len(values) else [])]
    return [number for end in ends for number in (end, float(values[end - 1]))]


def _get(item: object, name: str, default: object = "") -> Any:
    value = item.get(name, default) if isinstance(item, Mapping) else getattr(item, name, default)
    return default if value is None else value


def _finding(item: object, by_source: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    example, count = str(_get(item, "example")), _get(item, "count", None)
    # An example is ``file:row``, perhaps followed by the path of a field.
    guesses = (example, example.split(" messages[")[0], example.split(" ")[0])
    sources = _get(item, "rows", ()) or [next((guess for guess in guesses if guess in by_source), "")]
    return {
        "severity": _text(_get(item, "severity", "info")), "cause": _text(_get(item, "cause")),
        "remedy": _text(_get(item, "remedy")), "example": _text(example),
        "count": None if count is None else int(count),
        "rows": sorted({i for source in sources for i in by_source.get(source, ())}),
    }


def _why(untrained: Mapping[int, str]) -> dict[int, str]:
    # A turn that is split and trained in no row at all is one that the row format leaves out.
    return {turn: "unlawful" if why == "split" else why for turn, why in untrained.items()}


def _untrained(
    rows: Sequence[Sample], by_source: Mapping[str, Sequence[int]], more: Mapping[str, Mapping[int, str]],
    roles: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """Turns that are trained nowhere, counted by cause; those the user switched off are counted only."""
    said = {**more, **{source: rows[places[0]].untrained for source, places in by_source.items() if source}}
    found = [(source, by_source[source][0] if source in by_source else -1, turns) for source, turns in said.items()]
    found += [("", i, rows[i].untrained) for i in by_source.get("", ())]
    turns = [
        [_text(source), turn, why, i, _text(roles[source][turn]) if turn < len(roles.get(source, ())) else ""]
        for source, i, untrained in found for turn, why in sorted(_why(untrained).items())
    ]
    counts = Counter(str(turn[2]) for turn in turns)
    listed = [turn for turn in turns if turn[2] != "switched_off"]
    return {"counts": counts.most_common(), "total": len(listed), "list": listed[:_LISTED]}


def _rejects(items: Sequence[object]) -> dict[str, Any]:
    lines = [[_text(_get(item, name)) for name in ("where", "what", "hint")] for item in items[:_LISTED]]
    return {"total": len(items), "list": lines}


def _text(value: object, longest: int | None = _LONGEST) -> str:
    """`value` as text that JSON can hold: no lone surrogates, and no longer than a reader would read."""
    text = str(value)
    if longest and len(text) > longest:
        text = f"{text[:longest]} … ({len(text):,} characters)"
    return text if text.isprintable() else re.sub(r"[\ud800-\udfff]", lambda match: visible(match[0]), text)


_RISKY = re.compile("[^ -~\u00a1-\u00ac\u00ae-\u02ff\u0370-\u04ff\u3040-\u30ff\u4e00-\u9fff\uac00-\ud7a3]|[<>&]")


def _embedded(data: object) -> str:
    """JSON that is inert inside a script element, whatever the data: no markup, no separators, no direction marks."""
    return _RISKY.sub(_escape, orjson.dumps(data).decode())


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    if char not in "<>&" and unicodedata.category(char)[0] not in "CZ":
        return char
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
