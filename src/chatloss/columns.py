"""The columns of a shard, made from buffers: no Python object for any token, and no import of pandas by `pa.array`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.sample import Sample, Span

__all__ = ["SPANS", "schema", "table"]

SPANS = ("span_ends", "span_messages", "span_weights", "span_reasons")


def schema(export: str) -> Any:
    """The Arrow schema of a shard: all that a `Sample` holds ("rows"), or what other trainers read ("labels").

    `conversation` numbers the conversations (pairs, judged answers) of a shard, `conversation_trained` counts the
    trained tokens of all its rows, `side` is that of `pipeline.Encoded`. A span starts where the one before it ends.
    `turns` holds `Sample.outcomes` and `Sample.untrained`.
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
        "input_ids": ids, "span_ends": ids, "span_messages": ids,
        "span_weights": pa.list_(pa.field("element", pa.float32(), nullable=False)),
        "span_reasons": pa.list_(pa.field("element", pa.uint8(), nullable=False)),
        "turns": pa.list_(pa.field("element", turn, nullable=False)),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in types.items()])


def table(rows: Sequence[tuple[int, str, Sample]], schema: Any, export: str) -> Any:
    """The Arrow table of (number of the conversation, side, row)."""
    import pyarrow as pa

    columns = _label_columns([row for *_, row in rows], schema) if export == "labels" else _columns(rows, schema)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _label_columns(rows: Sequence[Sample], schema: Any) -> dict[str, Any]:
    lengths = [len(row) for row in rows]
    spans = [span for row in rows for span in row.spans]
    ids = np.concatenate([row.input_ids for row in rows])
    trained = np.repeat([span.weight != 0 for span in spans], [span.end - span.start for span in spans])
    values = {
        "input_ids": ids, "attention_mask": np.ones(len(ids), np.int8),
        "labels": np.where(trained, ids, np.int32(-100)),
    }
    return {name: _lists(flat, lengths, schema.field(name).type) for name, flat in values.items()}


def _columns(rows: Sequence[tuple[int, str, Sample]], schema: Any) -> dict[str, Any]:
    numbers, sides, samples = zip(*rows, strict=True)
    places = [row.source.removesuffix(f" {side}").rpartition(":") for _, side, row in rows]
    spans = [span for row in samples for span in row.spans]
    sizes = [len(row.spans) for row in samples]
    flat: dict[str, npt.NDArray[Any]] = {
        "row": np.array([int(row) for *_, row in places], np.int64),
        "conversation": np.array(numbers, np.int32),
        "conversation_trained": _trained(numbers, sizes, spans),
    }
    lists: dict[str, npt.NDArray[Any]] = {
        "span_ends": np.array([span.end for span in spans], np.int32),
        "span_messages": np.array([span.message for span in spans], np.int32),
        "span_weights": np.array([span.weight for span in spans], np.float32),
        "span_reasons": np.frombuffer(bytes([span.reason for span in spans]), np.uint8),
    }
    ids, lengths = np.concatenate([row.input_ids for row in samples]), [len(row) for row in samples]
    return {
        "file": _texts([file for file, *_ in places]), "side": _texts(sides),
        **{name: _flat(values, schema.field(name).type) for name, values in flat.items()},
        "input_ids": _lists(ids, lengths, schema.field("input_ids").type),
        **{name: _lists(values, sizes, schema.field(name).type) for name, values in lists.items()},
        "turns": _turns(samples, schema.field("turns").type),
    }


def _trained(numbers: Sequence[int], sizes: Sequence[int], spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """For every row the trained tokens of its whole conversation."""
    _, places = np.unique(numbers, return_inverse=True)
    totals = np.zeros(len(numbers), np.int64)
    np.add.at(totals, np.repeat(places, sizes), [span.end - span.start if span.weight else 0 for span in spans])
    return totals[places]


def _flat(values: npt.NDArray[Any], kind: Any) -> Any:
    import pyarrow as pa

    assert values.dtype.itemsize * 8 == kind.bit_width
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _ends(sizes: Sequence[int]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.cumsum([0, *sizes], dtype=np.int32))


def _lists(values: npt.NDArray[Any], sizes: Sequence[int], kind: Any) -> Any:
    """A column of lists of these sizes, one after the other in `values`."""
    import pyarrow as pa

    return pa.Array.from_buffers(kind, len(sizes), [None, _ends(sizes)], children=[_flat(values, kind.value_type)])


def _texts(texts: Sequence[str | None]) -> Any:
    """A column of texts; None is null."""
    import pyarrow as pa

    there = np.packbits([text is not None for text in texts], bitorder="little")
    data = [(text or "").encode() for text in texts]
    buffers = [pa.py_buffer(there), _ends([len(text) for text in data]), pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _turns(rows: Sequence[Sample], kind: Any) -> Any:
    import pyarrow as pa

    messages = [sorted({*row.outcomes, *row.untrained}) for row in rows]
    turns = [(row, message) for row, of_row in zip(rows, messages, strict=True) for message in of_row]
    inner = [
        _flat(np.array([message for _, message in turns], np.int32), pa.int32()),
        _texts([row.outcomes.get(message) for row, message in turns]),
        _texts([row.untrained.get(message) for row, message in turns]),
    ]
    flat = pa.Array.from_buffers(kind.value_type, len(turns), [None], children=inner)
    return pa.Array.from_buffers(kind, len(rows), [None, _ends([len(of_row) for of_row in messages])], children=[flat])
