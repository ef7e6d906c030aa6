"""Prepared rows on disk: the columns of a shard, writing them, and reading examples back one at a time.

A shard is a Parquet file. The rows of a conversation lie together, in one row group, so that any example can be read
without what is beside it; what they begin with alike is there once, and joined when they are read.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
import numpy.typing as npt

from chatloss.columns import SPANS, Part, compressed, parts_of, schema, table
from chatloss.errors import DataError
from chatloss.folders import Folder, file_size, is_uri
from chatloss.manifest import MANIFEST, Counts, differences, fingerprints, read_manifest
from chatloss.pairs import Answer, Pair
from chatloss.sample import Decode, Reason, Sample, Span

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder

__all__ = ["MANIFEST", "Joined", "Prepared", "PreparedPairs", "ShardWriter", "is_prepared", "prepared_answers"]

GROUP_TOKENS = 2**16  # of a row group, as stored: what is decoded to read one example
KEPT_GROUPS, KEPT_FILES = 16, 64
_REASONS = {int(reason): reason for reason in Reason}
_KINDS, _SIDES = ("conversations", "pairs", "judged"), ("chosen", "rejected")
T = TypeVar("T")


class ShardWriter:
    """Writes the rows of a shard, a conversation at a time. Close it; it is a context manager."""

    def __init__(self, path: Path, export: str = "rows") -> None:
        import pyarrow.parquet as pq

        self.export = export
        self.schema = schema(export)
        self.conversations = 0
        self.counts = Counts()  # rows and tokens, when all is written
        self._waiting: list[Part] = []
        self._tokens = 0
        self._file = pq.ParquetWriter(
            path, self.schema, **compressed(self.schema),
            use_dictionary=["file", "side", "outcome", "untrained"],
            write_page_checksum=True, write_statistics=["conversation"] if export == "rows" else False,
        )

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, rows: Sequence[tuple[str, Sample]]) -> None:
        """All (side, row) of one conversation, pair or judged answer."""
        parts = parts_of(self.conversations, rows, self.export)
        self._waiting += parts
        self.conversations += 1
        self._tokens += sum(len(part.ids) for part in parts)
        if self._tokens >= GROUP_TOKENS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        if self._waiting:
            made, counts = table(self._waiting, self.schema, self.export)
            self.counts.merge(counts)
            self._file.write_table(made, row_group_size=len(self._waiting))
            self._waiting, self._tokens = [], 0


def is_prepared(path: str | Path) -> bool:
    """Whether `path` is a directory that `chatloss prepare` has made, or is making."""
    if is_uri(str(path)):
        return file_size(Folder(str(path)).place(MANIFEST)) is not None
    directory = Path(path)
    return (directory / MANIFEST).is_file() or (directory / ".prepare").is_dir()


class Prepared(Sequence[list[Sample]]):
    """The examples of a prepared directory: ``prepared[i]`` is all rows of conversation i. Only what is asked is read.

    Files are mapped into memory; the row group of an example is decoded when asked for, and the last few are kept.
    Raises `DataError` where the directory is unfinished, or holds labels for other trainers.
    """

    def __init__(self, directory: str | Path, decode: Decode | None = None) -> None:
        if is_uri(str(directory)):
            raise DataError("rows are read from this machine, by memory map", where=str(directory), kind="source",
                            hint="copy the prepared directory here first, and name the copy")
        self.directory = Path(directory)
        self.manifest = read_manifest(Folder(str(directory)))
        if self.manifest["job"]["export"] != "rows":
            raise DataError("the directory holds labels for other trainers", where=str(directory),
                            hint="prepare again without --export labels")
        self._decode = decode
        self._ends = list(accumulate(shard["conversations"] for shard in self.manifest["shards"]))
        self._files: OrderedDict[int, tuple[Any, list[int]]] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> list[Sample]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Sample]]: ...
    def __getitem__(self, index: int | slice) -> list[Sample] | list[list[Sample]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [row for _, row in self.sided(index)]

    def sided(self, index: int) -> list[tuple[str, Sample]]:
        """(side, row) of all rows of example `index`; sides as in `pipeline.Encoded`."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        shard = bisect_right(self._ends, index)
        number = index - (self._ends[shard - 1] if shard else 0)
        firsts = self._file(shard)[1]
        group = self._group(shard, bisect_right(firsts, number) - 1)
        try:
            return group.rows(number, self._decode)
        except (ValueError, IndexError, AssertionError) as error:
            raise self._damaged(shard, error) from None

    def _damaged(self, shard: int, error: Exception) -> DataError:
        path = self.directory / self.manifest["shards"][shard]["file"]
        what = (str(error).splitlines() or ["its rows are none"])[0][:200]
        return DataError(f"the shard cannot be read: {what}", where=str(path), kind="damaged",
                         hint="prepare the chats again with --fresh")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.directory,)

    def holding(self, *kinds: str) -> Prepared:
        """This directory, if all its examples are of these kinds: "conversations", "pairs" or "judged" answers.

        Raises `DataError` else.
        """
        counts = self.manifest["counts"]
        others = [f"{counts[kind]} {kind}" for kind in _KINDS if kind not in kinds and counts[kind]]
        if others:
            wanted = " or ".join(kinds)
            raise DataError(f"the directory holds {' and '.join(others)}, not {wanted} alone", kind="objective",
                            where=str(self.directory), hint="prepare the rows for this objective apart")
        return self

    def check_made_with(self, encoder: ChatEncoder, **chosen: Mapping[str, Any]) -> None:
        """Raise `DataError` where the rows were made with another tokenizer or template, or with other choices.

        `chosen`: parts of a job, such as ``policy={"turns": "last"}``; what they do not name may be anything.
        """
        now = {**fingerprints(encoder), **chosen}
        job = self.manifest["job"]
        before = {part: {name: job[part].get(name) for name in names} for part, names in now.items()}
        changed = differences(before, json.loads(json.dumps(now)))
        if changed:
            raise DataError(
                f"the rows were prepared with something else: {'; '.join(changed[:3])}", where=str(self.directory),
                hint="train with what they were prepared with, or prepare the chats again", kind="changed",
            )

    def _file(self, shard: int) -> tuple[Any, list[int]]:
        """(the open Parquet file, the first conversation of each of its row groups)."""
        if shard not in self._files:
            import pyarrow.parquet as pq

            about = self.manifest["shards"][shard]
            path = self.directory / about["file"]
            try:
                if path.stat().st_size != about["bytes"]:
                    raise ValueError(f"it has {path.stat().st_size:,} bytes, and had {about['bytes']:,}")
                file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
                if not file.schema_arrow.equals(schema("rows")):
                    raise ValueError("its columns are others")
                column = file.schema_arrow.names.index("conversation")
                groups = [file.metadata.row_group(g).column(column).statistics for g in range(file.num_row_groups)]
                self._files[shard] = file, [int(statistics.min) for statistics in groups]
            except (OSError, ValueError, AttributeError) as error:
                raise self._damaged(shard, error) from None
            while len(self._files) > KEPT_FILES:
                self._files.popitem(last=False)[1][0].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _group(self, shard: int, group: int) -> _Group:
        key = shard, group
        if key not in self._groups:
            try:
                self._groups[key] = _Group(self._file(shard)[0].read_row_group(group))
            except (OSError, ValueError) as error:  # pyarrow's own errors are one or the other
                raise self._damaged(shard, error) from None
            while len(self._groups) > KEPT_GROUPS:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        found: _Group = self._groups[key]
        return found


class PreparedPairs(Sequence[Pair]):
    """The preference pairs of a prepared directory, read when asked for. Raises `DataError` where it holds others."""

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared.holding("pairs")

    def __len__(self) -> int:
        return len(self._prepared)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        rows = self._prepared.sided(index)
        chosen, rejected = (Answer(tuple(row for side, row in rows if side == wanted)) for wanted in _SIDES)
        return Pair(chosen, rejected, chosen.source.removesuffix(" chosen"))


def prepared_answers(prepared: Prepared) -> Iterator[Answer]:
    """All judged answers of a prepared directory; a pair gives one of each kind."""
    prepared.holding("judged", "pairs")
    for index in range(len(prepared)):
        rows = prepared.sided(index)
        for side in dict.fromkeys(side for side, _ in rows):
            yield Answer(tuple(row for own, row in rows if own == side), side in ("chosen", "desirable"))


class Joined(Sequence[T]):
    """Several sequences of examples as one."""

    def __init__(self, parts: Sequence[Sequence[T]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class _Group:
    """The decoded columns of one row group."""

    def __init__(self, table: Any) -> None:
        table = table.combine_chunks()
        self._columns = {name: table[name].chunk(0) for name in table.schema.names}
        self._conversations = self._flat("conversation")

    def rows(self, number: int, decode: Decode | None) -> list[tuple[str, Sample]]:
        """(side, row) of all rows of a conversation. Raises `ValueError` for what no writer has written."""
        first, end = np.searchsorted(self._conversations, [number, number + 1])
        if first == end:
            raise ValueError(f"conversation {number} is not there")
        last = self._sample(end - 1, None, decode)
        found = [*(self._sample(row, last, decode) for row in range(first, end - 1)), last]
        return list(zip(map(self._side, range(first, end)), found, strict=True))

    def _flat(self, name: str) -> npt.NDArray[Any]:
        values: npt.NDArray[Any] = self._columns[name].to_numpy()
        return values

    @cached_property
    def _shared(self) -> list[tuple[int, int]]:
        return list(zip(self._flat("shared_ids").tolist(), self._flat("shared_spans").tolist(), strict=True))

    @cached_property
    def _lists(self) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
        """(offsets, values) of the list columns."""
        columns = {name: self._columns[name] for name in ("rest_ids", *SPANS)}
        return {name: (column.offsets.to_numpy(), column.values.to_numpy()) for name, column in columns.items()}

    def _values(self, name: str, row: int) -> npt.NDArray[Any]:
        offsets, values = self._lists[name]
        return values[offsets[row] : offsets[row + 1]]

    def _side(self, row: int) -> str:
        return str(self._columns["side"][row].as_py())

    def _sample(self, row: int, last: Sample | None, decode: Decode | None) -> Sample:
        """One row; `last` is the last one of its conversation, None for itself."""
        ids, turns = self._values("rest_ids", row), self._columns["turns"][row].as_py()
        spans: tuple[Span, ...] = ()
        shared_ids, shared_spans = self._shared[row]
        if last is None:
            if shared_ids or shared_spans or turns is None:
                raise ValueError("the last row of a conversation is not there")
        else:
            if not (0 <= shared_ids <= len(last) and 0 <= shared_spans <= len(last.spans)):
                raise ValueError("a row shares more than there is")
            ids = np.concatenate([last.input_ids[:shared_ids], ids])
            spans = last.spans[:shared_spans]
        if not len(ids) or ids.min() < 0:
            raise ValueError("ids are numbers from 0 on")
        ends, messages, weights, reasons = (self._values(name, row).tolist() for name in SPANS)
        starts = [spans[-1].end if spans else 0, *ends][: len(ends)]
        named = [_REASONS.get(reason) or Reason(reason) for reason in reasons]  # the latter raises
        spans += tuple(starmap(Span, zip(starts, ends, messages, weights, named, strict=True)))
        if turns is None and last is not None:
            outcomes, untrained = dict(last.outcomes), dict(last.untrained)
        else:
            outcomes = {turn["message"]: turn["outcome"] for turn in turns if turn["outcome"] is not None}
            untrained = {turn["message"]: turn["untrained"] for turn in turns if turn["untrained"] is not None}
        return Sample(ids, spans, outcomes, self._source(row), untrained, decode)

    def _source(self, row: int) -> str:
        place = f"{self._columns['file'][row].as_py()}:{self._columns['row'][row].as_py()}"
        side = self._side(row)
        return f"{place} {side}" if side in ("chosen", "rejected") else place
