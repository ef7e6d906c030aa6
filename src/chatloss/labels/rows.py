"""Rows that another tool prepared: ids and what it trains of them, from Parquet, Arrow, JSON Lines or any iterable."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.errors import ChatlossError, DataError
from chatloss.reader import KEPT_REJECTS, Reject, saved_parts, until_unreadable
from chatloss.streams import RawStream, decompressed, text_records
from chatloss.tables import TABLE_MAGIC

__all__ = ["IGNORED", "MASKS", "LabelReader", "LabelRow", "read_labels"]

Array = npt.NDArray[Any]
Record = tuple[int, Any]

IGNORED = -100
MASKS = ("loss_mask", "assistant_masks", "assistant_mask", "completion_mask", "loss_scale", "weights")
_LAYOUT = ("attention_mask", "position_ids", "seq_lengths")
COLUMNS = ("input_ids", "labels", *MASKS, *_LAYOUT)
BATCH_ROWS = 64
MOST_ODD = 0.25  # of the labels of a row may be other tokens, as where EOS is written in place of the next header


@dataclass(frozen=True, slots=True, eq=False)
class LabelRow:
    """One row: `ids` int32 [n], `weights` float32 [n] (weight of predicting ids[t] from what stands before it).

    `starts` are the tokens at which its documents begin; `said` tells whether position_ids or seq_lengths say so.
    `padding` bool [n]. `column` names what was read. `shifted`: the labels were those of the next token, and `weights`
    have been moved back. `odd` are positions whose label is another id than the row's; their weight is 0.
    """

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    padding: npt.NDArray[np.bool_]
    source: str
    column: str
    said: bool = False
    shifted: bool = False
    odd: tuple[int, ...] = ()


class LabelReader:
    """Rows as `LabelRow`, read anew by each iteration; what is no such row is in `rejects`, as with `reader.Reader`."""

    def __init__(self, records: Iterable[tuple[str, Callable[[], Iterator[Record]]]], vocabulary: int) -> None:
        self._records, self._vocabulary = list(records), vocabulary
        self._reset()

    def _reset(self) -> None:
        self.n_rows = self.n_rejected = 0
        self.rejects: list[Reject] = []
        self.reject_counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[LabelRow]:
        self._reset()
        for name, records in self._records:
            for row, value in _readable(records()):
                self.n_rows += 1
                source = f"{name}:{row}" if row else name
                try:
                    if isinstance(value, DataError):
                        raise value
                    made = _row(value, source, self._vocabulary)
                except DataError as error:
                    self.reject(source, error)
                else:
                    yield made
            if not self.n_rows:
                raise DataError("there are no rows", where=name, hint="is it the right file?", kind="source")

    def reject(self, source: str, error: ChatlossError) -> None:
        self.n_rejected += 1
        self.reject_counts[error.kind] += 1
        if len(self.rejects) < KEPT_REJECTS:
            where = f"{source} {error.where}".strip()
            self.rejects.append(Reject(source, error.kind, error.what, where, error.hint))


def read_labels(data: Any, *, vocabulary: int = 0) -> LabelReader:
    """The rows in `data`: a path, an iterable of mappings, a `datasets.Dataset`, or a list of paths.

    A row holds `input_ids` and `labels`, or a mask of one of the names in `MASKS`; packed rows say where documents
    begin by `position_ids`, `seq_lengths` or numbers in `attention_mask`. `vocabulary`: ids from there on are rejected.

    >>> rows = read_labels([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5], "labels": [6, 7]}])
    >>> [(row.source, row.column, row.weights.tolist()) for row in rows]
    [('<list>:1', 'labels', [0.0, 1.0, 1.0])]
    >>> rows.rejects[0].what
    'labels has 2 values for 1 ids'
    """
    if isinstance(data, str | os.PathLike):
        path = Path(os.fsdecode(data))
        return LabelReader([(str(data), partial(_path_records, path))], vocabulary)
    if isinstance(data, list | tuple) and data and isinstance(data[0], str | os.PathLike):
        return LabelReader([(str(path), partial(_path_records, Path(path))) for path in data], vocabulary)
    if isinstance(data, Mapping):
        hint = "pass one of its values, or [row]"
        raise DataError("a mapping, not rows", where=f"<{type(data).__name__}>", hint=hint, kind="source")
    return LabelReader([(f"<{type(data).__name__}>", lambda: enumerate(data, 1))], vocabulary)


# -- one row -----------------------------------------------------------------------------------------------------------


def _row(value: Any, source: str, vocabulary: int) -> LabelRow:
    if not isinstance(value, Mapping):
        raise DataError("a row must be an object", hint='expected {"input_ids": [...], "labels": [...]}', kind="field")
    given = {name: value[name] for name in COLUMNS if value.get(name) is not None}
    if "input_ids" not in given:
        keys = ", ".join(map(repr, list(value)[:6])) or "nothing"
        raise DataError(f"there are no input_ids, only {keys}", hint="dump the rows after tokenization", kind="field")
    ids = _integers(given["input_ids"], "input_ids")
    _check_ids(ids, vocabulary)
    n = len(ids)
    for name in ("labels", *MASKS, "attention_mask", "position_ids"):
        if name in given and (size := len(_array(given[name], name))) != n:
            what = f"{name} has {size} values for {n} ids"
            raise DataError(what, where=name, hint="dump both before collation, or both after", kind="length")
    masks = [name for name in MASKS if name in given]
    shifted, odd = False, tuple[int, ...]()
    if "labels" in given:
        column = "labels"
        weights, shifted, odd = _from_labels(ids, _integers(given["labels"], "labels"))
        if "loss_scale" in given:  # ms-swift weighs its labels
            column, weights = "labels x loss_scale", weights * _mask(given["loss_scale"], "loss_scale")
    elif masks:
        column, weights = " x ".join(masks), np.ones(n, np.float32)
        for name in masks:  # TRL trains where all of its masks are 1
            weights = weights * _mask(given[name], name)
    else:
        hint = f"a row needs labels, or one of {', '.join(MASKS)}"
        raise DataError("nothing says which ids are trained", hint=hint, kind="field")
    padding, starts, said = _layout(given, n)
    return LabelRow(ids.astype(np.int32), weights, starts, padding, source, column, said, shifted, odd)


def _integers(values: Any, name: str) -> npt.NDArray[np.int64]:
    array = _array(values, name)
    if array.dtype.kind not in "iub":
        raise DataError(f"{name} holds {array.dtype} values, not integers", where=name, kind="field",
                        hint="dump the ids themselves")
    return array.astype(np.int64)


def _array(values: Any, name: str) -> Array:
    try:
        array = np.asarray(values)
    except (ValueError, TypeError):
        array = np.empty((0, 0))
    if array.ndim != 1:
        hint = "one row of the file is one row of training; unpack batches"
        raise DataError(f"{name} must be one flat list of numbers", where=name, hint=hint, kind="field")
    return array if len(array) else array.astype(np.int64)


def _check_ids(ids: npt.NDArray[np.int64], vocabulary: int) -> None:
    bad = np.flatnonzero((ids < 0) | (ids >= vocabulary if vocabulary else ids > np.iinfo(np.int32).max))
    if len(bad):
        at = int(bad[0])
        limit = f", and the tokenizer has {vocabulary:,}" if vocabulary and ids[at] >= 0 else ""
        hint = "is this the tokenizer that made the rows? Placeholders of images are not read"
        raise DataError(f"id {ids[at]} is no token{limit}", where=f"input_ids[{at}]", hint=hint, kind="ids")


def _from_labels(
    ids: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], bool, tuple[int, ...]]:
    """(weights, whether the labels were those of the next token, where a few of them are other tokens)."""
    trained = labels != IGNORED
    wrong = np.flatnonzero(trained & (labels != ids))
    if not len(wrong):
        return trained.astype(np.float32), False, ()
    ahead = trained[:-1] & (labels[:-1] != ids[1:])
    if len(ids) > 1 and not ahead.any():
        weights = np.zeros(len(ids), np.float32)
        weights[1:] = trained[:-1]
        return weights, True, ()
    if len(wrong) <= MOST_ODD * trained.sum() and (labels[wrong] >= 0).all():
        return (trained & (labels == ids)).astype(np.float32), False, tuple(wrong.tolist())
    at = int(wrong[0])
    ignored = set(labels[wrong].tolist())
    hint = f"labels are input_ids where trained, and {IGNORED} elsewhere"
    if len(ignored) == 1 and len(wrong) > 1:
        hint += f"; if {labels[at]} means not trained, write {IGNORED}"
    raise DataError(f"label {labels[at]} is neither {IGNORED} nor the id {ids[at]}", where=f"labels[{at}]", hint=hint,
                    kind="labels")


def _mask(values: Any, name: str) -> npt.NDArray[np.float32]:
    mask = _array(values, name)
    if mask.dtype.kind not in "iubf":
        raise DataError(f"{name} holds {mask.dtype} values, not numbers", where=name, hint="write 0 and 1", kind="mask")
    mask = mask.astype(np.float32)
    scaled = name in ("loss_scale", "weights")
    bad = np.flatnonzero(~np.isfinite(mask) | (mask < 0) if scaled else (mask != 0) & (mask != 1))
    if len(bad):
        at = int(bad[0])
        hint = "write 0 and 1; float weights are read from loss_scale or weights"
        raise DataError(f"{name} is {mask[at]:g}", where=f"{name}[{at}]", hint=hint, kind="mask")
    return mask


def _layout(
    given: Mapping[str, Any], n: int
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], bool]:
    """(padding, where documents start, whether anything says so)."""
    padding = np.zeros(n, np.bool_)
    if "attention_mask" in given:
        attended = _integers(given["attention_mask"], "attention_mask")
        padding = attended == 0
        if attended.max(initial=0) > 1:  # axolotl numbers the documents of a pack
            return padding, _changes(attended), True
    if "seq_lengths" in given:
        lengths = _integers(given["seq_lengths"], "seq_lengths")
        total = int(lengths.sum())
        if (lengths <= 0).any() or total > n:
            what = f"seq_lengths add up to {total} for {n} ids"
            raise DataError(what, where="seq_lengths", hint="every length is positive", kind="length")
        padding[total:] = True
        return padding, np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64), True
    if "position_ids" in given:
        positions = _integers(given["position_ids"], "position_ids")
        inside = ~padding[1:] & ~padding[:-1]
        step = np.diff(positions)
        jump = np.flatnonzero(inside & (step != 1) & (positions[1:] != 0))
        if len(jump):
            at = int(jump[0]) + 1
            what = f"position {positions[at]} follows {positions[at - 1]}"
            raise DataError(what, where=f"position_ids[{at}]", hint="positions go up by 1 or begin anew at 0",
                            kind="position_ids")
        starts = np.flatnonzero((positions == 0) & ~padding)
        return padding, np.union1d(np.flatnonzero(~padding)[:1], starts).astype(np.int64), True
    return padding, np.flatnonzero(~padding)[:1].astype(np.int64), False


def _changes(values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where a new value other than 0 begins."""
    before = np.concatenate([[0], values[:-1]])
    return np.flatnonzero((values != before) & (values != 0)).astype(np.int64)


# -- files -------------------------------------------------------------------------------------------------------------


def _readable(records: Iterator[Record]) -> Iterator[Record]:
    """The records, and what ended them early as a last one; nothing read at all is an error."""
    for row, value in until_unreadable(records):
        if not row:
            raise value
        yield row, value


def _path_records(path: Path) -> Iterator[Record]:
    if path.is_dir():
        yield from enumerate(chain.from_iterable(_table(part, "stream") for part in saved_parts(path)), 1)
        return
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        where, hint = str(path), "give a Parquet, Arrow or JSON Lines file, or a directory of `save_to_disk`"
        raise DataError(error.strerror or str(error), where=where, hint=hint, kind="source") from None
    with file:
        raw = RawStream(file.read)
        stream = decompressed(raw)
        head = stream.look()
        kind = next((kind for magic, kind in TABLE_MAGIC.items() if head.startswith(magic)), None)
        if kind is None:
            yield from text_records(stream, path.name, "messages")
        elif stream is raw:
            yield from enumerate(_table(path, kind), 1)
        else:
            yield from enumerate(_table(io.BytesIO(io.BufferedReader(stream).read()), kind), 1)


def _table(file: Any, kind: str) -> Iterator[Any]:
    """Rows as mappings of NumPy arrays."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet":
            source: Any = pq.ParquetFile(file)
            names = [name for name in source.schema_arrow.names if name in COLUMNS]
            batches: Iterable[Any] = source.iter_batches(BATCH_ROWS, columns=names or None)
        else:
            opened = pa.memory_map(str(file)) if isinstance(file, Path) else file
            source = pa.ipc.open_file(opened) if kind == "file" else pa.ipc.open_stream(opened)
            names = [name for name in source.schema.names if name in COLUMNS]
            batches = (source.get_batch(i) for i in range(source.num_record_batches)) if kind == "file" else source
        names = names or source.schema_arrow.names if kind == "parquet" else names or source.schema.names
        for batch in batches:
            if kind != "parquet":
                batch.validate(full=True)  # Arrow trusts the offsets in an IPC file, and bad ones crash the process
            columns = {name: batch.column(name) for name in names}
            for i in range(batch.num_rows):
                yield {name: _plain(column[i]) for name, column in columns.items()}
    except (pa.ArrowException, OSError, EOFError) as error:
        line = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"the file is damaged: {line}", kind="unreadable", hint="write it again") from None


def _plain(scalar: Any) -> Any:
    values = getattr(scalar, "values", None)
    if values is None:
        return scalar.as_py()
    return values.to_numpy(zero_copy_only=False)
