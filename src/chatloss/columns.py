"""The columns of a shard, made from buffers: no Python object for any token, and no import of pandas by `pa.array`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.sample import Sample

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
    kind = schema.field("labels").type
    return {
        "input_ids": _lists([row.input_ids for row in rows], kind),
        "attention_mask": _lists([np.ones(len(row), np.int8) for row in rows], schema.field("attention_mask").type),
        "labels": _lists([row.labels.astype(np.int32) for row in rows], kind),
    }


def _columns(rows: Sequence[tuple[int, str, Sample]], schema: Any) -> dict[str, Any]:
    samples = [row for *_, row in rows]
    trained: dict[int, int] = {}
    for number, _, row in rows:
        trained[number] = trained.get(number, 0) + row.n_trained
    places = [row.source.removesuffix(f" {side}").rpartition(":") for _, side, row in rows]
    lists: dict[str, list[npt.NDArray[Any]]] = {
        "input_ids": [row.input_ids for row in samples],
        "span_ends": [np.array([s.end for s in row.spans], np.int32) for row in samples],
        "span_messages": [np.array([s.message for s in row.spans], np.int32) for row in samples],
        "span_weights": [np.array([s.weight for s in row.spans], np.float32) for row in samples],
        "span_reasons": [np.array([s.reason for s in row.spans], np.uint8) for row in samples],
    }
    return {
        "file": _texts([file for file, _, _ in places]),
        "row": _flat(np.array([int(row) for _, _, row in places], np.int64), schema.field("row").type),
        "side": _texts([side for _, side, _ in rows]),
        "conversation": _flat(np.array([number for number, *_ in rows], np.int32), schema.field("conversation").type),
        "conversation_trained": _flat(np.array([trained[number] for number, *_ in rows], np.int64),
                                      schema.field("conversation_trained").type),
        **{name: _lists(arrays, schema.field(name).type) for name, arrays in lists.items()},
        "turns": _turns(samples, schema.field("turns").type),
    }


def _flat(values: npt.NDArray[Any], kind: Any) -> Any:
    import pyarrow as pa

    assert values.dtype.itemsize * 8 == kind.bit_width
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def _ends(sizes: Sequence[int]) -> Any:
    import pyarrow as pa

    return pa.py_buffer(np.cumsum([0, *sizes], dtype=np.int32))


def _lists(arrays: Sequence[npt.NDArray[Any]], kind: Any) -> Any:
    import pyarrow as pa

    flat = _flat(np.concatenate(arrays), kind.value_type)
    return pa.Array.from_buffers(kind, len(arrays), [None, _ends([len(array) for array in arrays])], children=[flat])


def _texts(texts: Sequence[str | None]) -> Any:
    """A column of texts; None is null."""
    import pyarrow as pa

    there = np.packbits([text is not None for text in texts], bitorder="little")
    data = [(text or "").encode() for text in texts]
    buffers = [pa.py_buffer(there), _ends([len(text) for text in data]), pa.py_buffer(b"".join(data))]
    return pa.Array.from_buffers(pa.string(), len(texts), buffers)


def _turns(rows: Sequence[Sample], kind: Any) -> Any:
    import pyarrow as pa

    turns = [(row, message) for row in rows for message in sorted({*row.outcomes, *row.untrained})]
    inner = [
        _flat(np.array([message for _, message in turns], np.int32), pa.int32()),
        _texts([row.outcomes.get(message) for row, message in turns]),
        _texts([row.untrained.get(message) for row, message in turns]),
    ]
    flat = pa.Array.from_buffers(kind.value_type, len(turns), [None], children=inner)
    sizes = [len({*row.outcomes, *row.untrained}) for row in rows]
    return pa.Array.from_buffers(kind, len(rows), [None, _ends(sizes)], children=[flat])
