"""Input files -> shards: the pieces of work of `prepare`. Where a shard ends is a function of the input alone.

A file of plain JSON Lines is cut into byte ranges that workers read themselves. Everything else (arrays, compressed
files, tables) can only be read from its beginning: the main process reads it and hands on the raw records.

Inputs are read twice. The first time all their bytes are hashed, in blocks that can be read at the same time; the
second time every worker compares what it reads with these hashes, so that no shard holds anything else.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatloss.errors import DataError
from chatloss.folders import Folder, file_size, is_uri, opened
from chatloss.formats import Row
from chatloss.reader import Reader, path_records, told_format, until_unreadable
from chatloss.streams import READ_ERRORS, RawStream, Record, decompressed, json_lines, text_kind
from chatloss.tables import TABLE_MAGIC

__all__ = ["Block", "Input", "Shard", "ShardReader", "blocks_of", "changed", "check_unchanged", "hashed", "inputs_of",
           "shard_bytes", "shards_of", "with_blocks"]

CHUNK = 2**20
LEAST_BYTES, MOST_BYTES = 2**20, 32 * 2**20
MOST_RECORDS = 2**16


@dataclass(frozen=True, slots=True)
class Block:
    """What is known of a block of an input: SHA-256 up to and with its first line end, and of the rest.

    `begins` is where that rest begins in the file, `lines` counts the line ends. Without any, `begins` is the end.
    """

    head: bytes
    rest: bytes
    begins: int
    end: int
    lines: int


@dataclass(frozen=True, slots=True)
class Input:
    """One input as it was found: `name` is what the user called it, `path` (or URI) where it is read.

    `input_format` was told from `asked_format`. `lines`: it is plain JSON Lines, so that any part can be read alone.
    `blocks` are those of all its files, when they have been hashed.
    """

    name: str
    path: str
    size: int
    input_format: str
    lines: bool
    asked_format: str
    blocks: tuple[Block, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What identifies the input, wherever it lies. Its digest is the SHA-256 of those of its blocks."""
        digest = hashlib.sha256(b"".join(block.head + block.rest for block in self.blocks)).hexdigest()
        return {"name": self.name, "bytes": self.size, "digest": digest, "format": self.input_format}


@dataclass(frozen=True, slots=True)
class Shard:
    """The records of one shard: bytes [start, end) of the JSON Lines file `path`, or pickled `records`.

    `before` is the number of lines before `start`. `parts` are (end, SHA-256) of consecutive parts of the range.
    """

    index: int
    name: str
    input_format: str
    path: str = ""
    start: int = 0
    end: int = 0
    before: int = 0
    parts: tuple[tuple[int, bytes], ...] = ()
    payload: tuple[bytes, ...] = ()

    @property
    def digest(self) -> str:
        """What tells its records from others: the SHA-256 of its parts' hashes, or of its payload."""
        found = hashlib.sha256()
        for data in [part for _, part in self.parts] or self.payload:
            found.update(data)
        return found.hexdigest()

    def records(self) -> Iterator[Record]:
        """(row, value) of every record, as the whole file would give them.

        Raises `DataError` at the end where the bytes were not those that were hashed.
        """
        if not self.path:
            yield from map(pickle.loads, self.payload)
            return
        with opened(self.path) as file:
            checked = _Checked(file, self)
            stream = RawStream(checked.read)
            yield from until_unreadable(json_lines(io.BufferedReader(stream, CHUNK), self.before))
        if checked.differs:
            raise changed(self.name)


class _Checked:
    """Reads the parts of a shard and compares their hashes."""

    def __init__(self, file: Any, shard: Shard) -> None:
        file.seek(shard.start)
        self._file, self._at, self._parts = file, shard.start, list(shard.parts)
        self._hash = hashlib.sha256()
        self.differs = False  # told by the shard: what a stream raises would be taken for the end of a damaged file

    def read(self, size: int) -> bytes:
        if not self._parts:
            return b""
        end, wanted = self._parts[0]
        data: bytes = self._file.read(min(size, end - self._at))
        self._hash.update(data)
        self._at += len(data)
        if self._at == end or not data:
            self.differs |= self._hash.digest() != wanted
            self._parts.pop(0)
            self._hash = hashlib.sha256()
        return data


def changed(name: str) -> DataError:
    """The error for an input that is no longer what was hashed."""
    return DataError("the input changed while it was read", where=name, hint="start again with --fresh", kind="changed")


class ShardReader(Reader):
    """A reader of one shard. Whether too many rows are bad is told when all shards are done."""

    def __init__(self, shard: Shard) -> None:
        super().__init__([], shard.input_format, max_rejects=1.0)
        self._shard = shard

    def __iter__(self) -> Iterator[Row]:
        self._reset()
        return self.parsed(self._shard.name, self._shard.records(), self._shard.input_format)


def inputs_of(data: Sequence[str], input_format: str, spool: Folder, prefix: str = "") -> list[Input]:
    """The inputs with their sizes and formats, not yet hashed. Standard input and data sets of the hub are copied.

    The copies are `spool`'s files ``<prefix>input-0`` and so on. Raises `DataError` for a path that cannot be read, and
    for one that is given twice.
    """
    twice = next((name for i, name in enumerate(data) if name in data[:i]), None)
    if twice is not None:
        raise DataError("the same data is given twice", where=twice, hint="give it once", kind="source")
    found = []
    for i, name in enumerate(data):
        shown = "<stdin>" if name == "-" else name
        try:
            found.append(_input(shown, input_format, _readable(name, spool, f"{prefix}input-{i}")))
        except DataError as error:
            raise (error if error.where else error.at(shown)) from None
        except READ_ERRORS as error:
            what = f"cannot be read: {error}"
            raise DataError(what, where=shown, kind="source", hint="check its permissions") from None
    return found


def _readable(name: str, spool: Folder, copy: str) -> str:
    """The path or URI where the data can be read again and again."""
    if name == "-":
        with spool.new(copy) as path, path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, CHUNK)
    elif is_uri(name):
        return name
    elif Path(name).exists():
        return str(Path(name).absolute())
    else:  # raises for what is no file either; only a hub data set gives records
        with spool.new(copy) as path, path.open("w", encoding="utf-8") as lines:
            for row, value in path_records(name, "auto"):
                lines.write(_line(value, f"{name}:{row}"))
    return spool.place(copy)


def _line(value: Any, where: str) -> str:
    if isinstance(value, DataError):
        raise value.at(where)
    try:
        return json.dumps(value, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        hint = "take its column out of the data set, or save its rows as JSON Lines yourself"
        raise DataError(f"a value that JSON cannot hold: {error}", where=where, hint=hint, kind="format") from None


def _input(name: str, input_format: str, path: str) -> Input:
    told, _ = told_format(name, until_unreadable(path_records(path, input_format)), input_format)
    size = sum(file_size(file) or 0 for file in _files(path))
    lines = [path] == _files(path) and _is_json_lines(path, input_format)
    return Input(name, path, size, told, lines, input_format)


def _files(path: str) -> list[str]:
    """The file, or all files of a directory."""
    if is_uri(path) or not Path(path).is_dir():
        return [path]
    return [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file()]


def _is_json_lines(path: str, input_format: str) -> bool:
    with opened(path) as file:
        raw = RawStream(file.read)
        if decompressed(raw) is not raw or raw.look().startswith(tuple(TABLE_MAGIC)):
            return False
        return text_kind(raw.look(), path.rpartition("/")[2], input_format) == "lines"


def shard_bytes(inputs: Sequence[Input]) -> int:
    """How much input a shard takes: small inputs still give every worker something to do."""
    return min(MOST_BYTES, max(LEAST_BYTES, sum(one.size for one in inputs) // 256))


# -- hashing -----------------------------------------------------------------------------------------------------------


def blocks_of(inputs: Sequence[Input], size: int) -> Iterator[Shard]:
    """What there is to hash, `size` bytes at a time: `index` is that of the input."""
    for index, one in enumerate(inputs):
        for file in _files(one.path):
            whole = file_size(file) or 0
            for start in range(0, whole, size):
                yield Shard(index, one.name, one.input_format, file, start, min(start + size, whole))


def hashed(block: Shard) -> Block:
    """Read one of `blocks_of`: a pure function, to be called anywhere. Raises `DataError` where the file ends early."""
    head, rest = hashlib.sha256(), hashlib.sha256()
    at, begins, lines = block.start, 0, 0
    with opened(block.path) as file:
        file.seek(at)
        while at < block.end:
            data = file.read(min(CHUNK, block.end - at))
            if not data:
                raise changed(block.name)
            ends = data.count(b"\n")
            cut = 0 if begins else data.find(b"\n") + 1 or len(data)
            head.update(data[:cut])
            rest.update(data[cut:])
            begins = begins or (at + cut if ends else 0)
            lines, at = lines + ends, at + len(data)
    return Block(head.digest(), rest.digest(), begins or block.end, block.end, lines)


def with_blocks(inputs: Sequence[Input], found: Iterator[tuple[Shard, Block]]) -> list[Input]:
    """The inputs with what `hashed` has found, in any order."""
    blocks: list[list[tuple[str, int, Block]]] = [[] for _ in inputs]
    for shard, block in found:
        blocks[shard.index].append((shard.path, shard.start, block))
    ordered = [tuple(block for *_, block in sorted(some, key=lambda one: one[:2])) for some in blocks]
    return [replace(one, blocks=some) for one, some in zip(inputs, ordered, strict=True)]


def check_unchanged(inputs: Sequence[Input], again: Callable[[Sequence[Input]], Sequence[Input]]) -> None:
    """Raise `DataError` where an input is not what it was. What workers have compared themselves is not read again."""
    for one in inputs:
        if sum(file_size(file) or 0 for file in _files(one.path)) != one.size:
            raise changed(one.name)
    others = [one for one in inputs if not one.lines]
    for before, now in zip(others, again(others), strict=True):
        if before.blocks != now.blocks:
            raise changed(before.name)


# -- cutting -----------------------------------------------------------------------------------------------------------


def shards_of(inputs: Sequence[Input], size: int) -> Iterator[Shard]:
    """The shards of all inputs in order, each of about `size` bytes of one input; in memory one at a time."""
    index = 0
    for one in inputs:
        for shard in _ranges(one) if one.lines else _pieces(one, size):
            yield replace(shard, index=index)
            index += 1


def _ranges(one: Input) -> Iterator[Shard]:
    """Ranges of lines: each block's first line end is where the shard of the block before it ends."""
    range_ = Shard(0, one.name, one.input_format, one.path)
    lines = 0
    for k, block in enumerate(one.blocks):
        range_ = replace(range_, end=block.begins, parts=(*range_.parts, (block.begins, block.head)))
        if k and block.lines:
            yield range_
            range_ = replace(range_, start=block.begins, before=lines + 1, parts=())
        if block.begins < block.end:
            range_ = replace(range_, end=block.end, parts=(*range_.parts, (block.end, block.rest)))
        lines += block.lines
    if range_.parts:
        yield range_


def _pieces(one: Input, size: int) -> Iterator[Shard]:
    """Records one after the other, pickled, until they hold `size` bytes."""
    shard = Shard(0, one.name, one.input_format)
    payload: list[bytes] = []
    held = 0
    for record in until_unreadable(path_records(one.path, one.asked_format)):
        payload.append(_pickled(record))
        held += len(payload[-1])
        if held >= size or len(payload) >= MOST_RECORDS:
            yield replace(shard, payload=tuple(payload))
            payload, held = [], 0
    if payload:
        yield replace(shard, payload=tuple(payload))


def _pickled(record: Record) -> bytes:
    # Without its memo a pickle's length depends on the values only, not on which of them happen to be one object.
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.fast = True
    pickler.dump(record)
    return buffer.getvalue()
