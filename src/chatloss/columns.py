"""The columns of a shard, made from buffers: no Python object for any token, and no import of pandas by `pa.array`.

Rows of one conversation often begin alike: a row per turn, each with all that was said before. So a row says how many
ids and spans at its beginning are those of the last row of its conversation, which is whole, and holds the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.lazy import LazySample, Strip, first_of, strip_of
from chatloss.manifest import Counts
from chatloss.sample import Reason, Sample
from chatloss.tokens import Ids

__all__ = ["SPANS", "Part", "compressed", "parts_of", "schema", "table"]

SPANS = ("rest_span_ends", "rest_span_messages", "rest_span_weights", "rest_span_reasons")
_REASONS = {int(reason): reason.name.lower() for reason in Reason}


def schema(export: str) -> Any:
    """The Arrow schema of a shard: all that a `Sample` holds ("rows"), or what other trainers read ("labels").

    `conversation` numbers the conversations (pairs, judged answers) of a shard, `conversation_trained` counts the
    trained tokens of all its rows, `side` is that of `pipeline.Encoded`. A row begins with the first `shared_ids` ids
    and `shared_spans` spans of the last row of its conversation; where `turns` (`Sample.outcomes`, `Sample.untrained`)
    is null, it has those of that row too. A span starts where the one before it ends.
    """
    import pyarrow as pa

    ids = pa.list_(pa.field("element", pa.int32(), nullable=False))
    if export == "labels":
        mask = pa.list_(pa.field("element", pa.int8(), nullable=False))  # axolotl asks for one
        return pa.schema([
            pa.field("input_ids", ids, False), pa.field("attention_mask", mask, False), pa.field("labels", ids, False)
        ])
    turn = pa.struct([
        pa.field("message", pa.int32(), nullable=False), pa.field("outcome", pa.string()),
        pa.field("untrained", pa.string()),
    ])
    types = {
        "file": pa.string(), "row": pa.int64(), "side": pa.string(),
        "conversation": pa.int32(), "conversation_trained": pa.int64(),
        "shared_ids": pa.int32(), "rest_ids": ids,
        "shared_spans": pa.int32(), "rest_span_ends": ids, "rest_span_messages": ids,
        "rest_span_weights": pa.list_(pa.field("element", pa.float32(), nullable=False)),
        "rest_span_reasons": pa.list_(pa.field("element", pa.uint8(), nullable=False)),
        "turns": pa.list_(pa.field("element", turn, nullable=False)),
    }
    return pa.schema([pa.field(name, kind, nullable=name == "turns") for name, kind in types.items()])


def compressed(schema: Any) -> dict[str, Any]:
    """How a Parquet writer is to compress the columns of `schema`: those that hold ids well, the rest cheaply.

    A row group begins each of its columns anew, which takes zstd longer than to compress a few kilobytes.
    """
    best = {f"{name}.list.element" for name in ("rest_ids", "input_ids", "attention_mask", "labels")}
    leaves = [leaf for field in schema for leaf in _leaves(field.name, field.type)]
    codecs = {leaf: "zstd" if leaf in best else "snappy" for leaf in leaves}
    return {"compression": codecs, "compression_level": {leaf: 1 for leaf in leaves if leaf in best}}


def _leaves(path: str, kind: Any) -> list[str]:
    """The columns that Parquet makes of a field."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return _leaves(f"{path}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{path}.{field.name}", field.type)]
    return [path]


class Part(NamedTuple):
    """A row as it is stored. `turns` are its outcomes and untrained, None where they are those of the last row."""

    conversation: int
    side: str
    source: str
    shared_ids: int
    ids: Ids
    shared_spans: int
    spans: Strip
    turns: tuple[Mapping[int, str], Mapping[int, str]] | None


_part = partial(tuple.__new__, Part)  # twice as fast as calling it


def parts_of(conversation: int, rows: Sequence[tuple[str, Sample]], export: str) -> list[Part]:
    """All (side, row) of one conversation, pair or judged answer. Labels share nothing: others read them."""
    last = rows[-1][1]
    whole = _ids(last), _strip(last)
    found = []
    for i, (side, row) in enumerate(rows, 1):
        turns = (row.outcomes, row.untrained)
        if i == len(rows) or export != "rows":
            found.append(_part((conversation, side, row.source, 0, _ids(row), 0, _strip(row), turns)))
            continue
        alike = turns == (last.outcomes, last.untrained)
        found.append(_part((conversation, side, row.source, *_rest(row, last, *whole), None if alike else turns)))
    return found


def _ids(row: Sample) -> Ids:
    return row.ids if isinstance(row, LazySample) and row.base is None else row.input_ids


def _strip(row: Sample) -> Strip:
    return row.strip if isinstance(row, LazySample) and row.base is None else strip_of(row.spans)


def _rest(row: Sample, last: Sample, ids: Ids, spans: Strip) -> tuple[int, Ids, int, Strip]:
    """How many ids are the same at the beginning of a row and the last one, and how many spans of these; and the rest.
    """
    if isinstance(row, LazySample):
        if row.base is last:
            return row.n_ids, row.ids, row.n_spans, row.strip
        if isinstance(last, LazySample) and last.base is not None:
            if row.base is last.base and row.n_ids < last.n_ids and row.n_spans < last.n_spans:
                return row.n_ids, row.ids, row.n_spans, row.strip
            if row is last.base:
                return last.n_ids, row.ids[last.n_ids :], last.n_spans, row.strip.behind(last.n_spans)
    own, strip = row.input_ids, _strip(row)
    shared = _same(own, ids)
    more = strip.alike(spans, 0, shared)
    return shared, own[shared:].copy(), more, strip.behind(more)  # a copy, to let go of the whole


def _same(one: Ids, other: Ids) -> int:
    """How many ids at the beginning of two rows are the same."""
    size = min(len(one), len(other))
    return first_of(one[:size] != other[:size])


def table(parts: Sequence[Part], schema: Any, export: str) -> tuple[Any, Counts]:
    """The Arrow table of all parts of some conversations, and how many rows and tokens that is."""
    import pyarrow as pa

    spans = _Spans(parts)
    columns = _label_columns(parts, spans, schema) if export == "labels" else _columns(parts, spans, schema)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema), spans.counts


class _Spans:
    """The spans that are stored in parts, in arrays; and what they count for, shared ones in each row that has them."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.of_row = [len(part.spans.ends) for part in parts]
        self.ends = np.concatenate([part.spans.ends for part in parts])
        values = [part.spans.values for part in parts]
        self.messages, weights, self.reasons = (np.concatenate([one[i] for one in values]) for i in range(3))
        self.weights = weights.astype(np.float32)
        starts = np.concatenate(([0], self.ends[:-1]))
        first = np.array([0, *accumulate(self.of_row)])
        some = np.flatnonzero(self.of_row)
        starts[first[some]] = np.array([part.spans.start for part in parts])[some]
        self.lengths = self.ends - starts
        _, which, rows = np.unique([part.conversation for part in parts], return_inverse=True, return_counts=True)
        begins = first[np.cumsum(rows) - 1][which]  # of the last row of each row's conversation
        ends = begins + [part.shared_spans for part in parts]
        more = np.bincount(begins, minlength=len(starts) + 1) - np.bincount(ends, minlength=len(starts) + 1)
        times = 1 + np.cumsum(more[:-1])  # how many rows have each of the spans
        trained = np.where(self.weights != 0, self.lengths, 0)
        before = np.concatenate([[0], np.cumsum(trained)])
        of_row = np.diff(before[first]) + before[ends] - before[begins]
        self.conversation_trained = np.bincount(which, of_row).astype(np.int64)[which]
        tokens = np.bincount(self.reasons, self.lengths * times)
        self.counts = Counts(
            rows=len(parts), tokens=int(tokens.sum()), trained=int(of_row.sum()),
            reasons=Counter({_REASONS[i]: int(tokens[i]) for i in np.flatnonzero(tokens).tolist()}),
        )


def _label_columns(parts: Sequence[Part], spans: _Spans, schema: Any) -> dict[str, Any]:
    lengths = [len(part.ids) for part in parts]
    ids = np.concatenate([part.ids for part in parts])
    trained = np.repeat(spans.weights != 0, spans.lengths)
    values = {
        "input_ids": ids, "attention_mask": np.ones(len(ids), np.int8),
        "labels": np.where(trained, ids, np.int32(-100)),
    }
    return {name: _lists(flat, lengths, schema.field(name).type) for name, flat in values.items()}


def _columns(parts: Sequence[Part], spans: _Spans, schema: Any) -> dict[str, Any]:
    sources = [part.source.removesuffix(f" {part.side}") if part.side else part.source for part in parts]
    places = [source.rpartition(":") for source in sources]
    flat: dict[str, npt.NDArray[Any]] = {
        "row": np.array([int(row) for *_, row in places], np.int64),
        "conversation": np.array([part.conversation for part in parts], np.int32),
        "conversation_trained": spans.conversation_trained,
        "shared_ids": np.array([part.shared_ids for part in parts], np.int32),
        "shared_spans": np.array([part.shared_spans for part in parts], np.int32),
    }
    of_spans: tuple[npt.NDArray[Any], ...] = (spans.ends, spans.messages, spans.weights, spans.reasons)
    ids, lengths = np.concatenate([part.ids for part in parts]), [len(part.ids) for part in parts]
    return {
        "file": _texts([file for file, *_ in places]), "side": _texts([part.side for part in parts]),
        **{name: _flat(values, schema.field(name).type) for name, values in flat.items()},
        "rest_ids": _lists(ids, lengths, schema.field("rest_ids").type),
        **{name: _lists(values, spans.of_row, schema.field(name).type)
           for name, values in zip(SPANS, of_spans, strict=True)},
        "turns": _turns([part.turns for part in parts], schema.field("turns").type),
    }


def _flat(values: npt.NDArray[Any], kind: Any) -> Any:
    import pyarrow as pa

    assert values.dtype.itemsize * 8 == kind.bit_width
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _ends(sizes: Iterable[int]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.cumsum([0, *sizes], dtype=np.int32))


def _there(known: Sequence[bool]) -> Any:
    """Which values are not null."""
    import pyarrow as pa

    return pa.py_buffer(np.packbits(np.array(known, bool), bitorder="little"))


def _lists(values: npt.NDArray[Any], sizes: Sequence[int], kind: Any) -> Any:
    """A column of lists of these sizes, one after the other in `values`."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(sizes), [None, _ends(sizes)], children=[_flat(values, kind.value_type)])


def _texts(texts: Sequence[str | None]) -> Any:
    """A column of texts; None is null."""
    import pyarrow as pa

    encoded = {text: (text or "").encode() for text in set(texts)}  # few, each many times
    data = [encoded[text] for text in texts]
    there = _there([text is not None for text in texts]) if None in encoded else None
    return pa.Array.from_buffers(pa.string(), len(texts), [there, _ends(map(len, data)), pa.py_buffer(b"".join(data))])


def _turns(rows: Sequence[tuple[Mapping[int, str], Mapping[int, str]] | None], kind: Any) -> Any:
    import pyarrow as pa

    sizes: list[int] = []
    messages: list[int] = []
    outcomes: list[str | None] = []
    untrained: list[str | None] = []
    for one, other in (row or ({}, {}) for row in rows):
        of_row = sorted({*one, *other} if other else one)
        sizes.append(len(of_row))
        messages += of_row
        outcomes += map(one.get, of_row)
        untrained += map(other.get, of_row)
    inner = [_flat(np.array(messages, np.int32), pa.int32()), _texts(outcomes), _texts(untrained)]
    flat = pa.Array.from_buffers(kind.value_type, len(messages), [None], children=inner)
    there = _there([row is not None for row in rows])
    return pa.Array.from_buffers(kind, len(rows), [there, _ends(sizes)], children=[flat])
