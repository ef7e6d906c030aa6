"""Input files -> shards: the pieces of work of `prepare`. Where a shard ends is a function of the input alone.

A file of plain JSON Lines is cut into byte ranges that workers read themselves. Everything else (arrays, compressed
files, tables) can only be read from its beginning: the main process reads it and hands on the raw records.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from chatloss.errors import DataError
from chatloss.formats import Row
from chatloss.reader import Reader, path_records, told_format, until_unreadable
from chatloss.streams import READ_ERRORS, RawStream, Record, decompressed, json_lines, text_kind
from chatloss.tables import TABLE_MAGIC

__all__ = ["Input", "Shard", "ShardReader", "check_unchanged", "inputs_of", "shard_bytes", "shards_of"]

CHUNK = 2**20
LEAST_BYTES, MOST_BYTES = 2**20, 32 * 2**20
MOST_RECORDS = 2**16


@dataclass(frozen=True, slots=True)
class Input:
    """One input as it was found: `name` is what the user called it, `path` where it is read, `sha256` of its bytes.

    `input_format` was told from `asked_format`. `lines`: it is plain JSON Lines, so that any part can be read alone.
    """

    name: str
    path: str
    size: int
    sha256: str
    input_format: str
    lines: bool
    asked_format: str

    def to_dict(self) -> dict[str, Any]:
        """What identifies the input, wherever it lies."""
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256, "format": self.input_format}


@dataclass(frozen=True, slots=True)
class Shard:
    """The records of one shard: bytes [start, end) of the JSON Lines file `path`, or pickled `records`.

    `before` is the number of lines before `start`.
    """

    index: int
    name: str
    input_format: str
    path: str = ""
    start: int = 0
    end: int = 0
    before: int = 0
    payload: tuple[bytes, ...] = ()

    def records(self) -> Iterator[Record]:
        """(row, value) of every record, as the whole file would give them."""
        if not self.path:
            yield from map(pickle.loads, self.payload)
            return
        with Path(self.path).open("rb", buffering=0) as file:
            file.seek(self.start)
            part = RawStream(lambda size: file.read(min(size, self.end - file.tell())))
            yield from until_unreadable(json_lines(io.BufferedReader(part, CHUNK), self.before))


class ShardReader(Reader):
    """A reader of one shard. Whether too many rows are bad is told when all shards are done."""

    def __init__(self, shard: Shard) -> None:
        super().__init__([], shard.input_format, max_rejects=1.0)
        self._shard = shard

    def __iter__(self) -> Iterator[Row]:
        self._reset()
        return self.parsed(self._shard.name, self._shard.records(), self._shard.input_format)


def inputs_of(data: Sequence[str], input_format: str, spool: Path) -> list[Input]:
    """The inputs with their sizes, hashes and formats. What is no local file is first copied into the folder `spool`.

    Raises `DataError` for a path that cannot be read, and for one that is given twice.
    """
    twice = next((name for i, name in enumerate(data) if name in data[:i]), None)
    if twice is not None:
        raise DataError("the same data is given twice", where=twice, hint="give it once", kind="source")
    found = []
    for i, name in enumerate(data):
        shown = "<stdin>" if name == "-" else name
        try:
            found.append(_input(shown, input_format, _local(name, spool / f"input-{i}")))
        except DataError as error:
            raise (error if error.where else error.at(shown)) from None
        except READ_ERRORS as error:
            what = f"cannot be read: {error}"
            raise DataError(what, where=shown, kind="source", hint="check its permissions") from None
    return found


def _local(name: str, copy: Path) -> Path:
    path = Path(name)
    if name == "-":
        with copy.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, CHUNK)
        return copy
    if path.exists():
        return path
    import json

    # Raises for what is no file either; only a hub data set gives records.
    with copy.with_suffix(".jsonl").open("w", encoding="utf-8") as lines:
        for row, value in path_records(name, "auto"):
            if isinstance(value, DataError):
                raise value.at(f"{name}:{row}")
            lines.write(json.dumps(value, default=str) + "\n")
    return copy.with_suffix(".jsonl")


def _input(name: str, input_format: str, path: Path) -> Input:
    size, digest = _fingerprint(path)
    lines = path.is_file() and _is_json_lines(path, input_format)
    told, _ = told_format(name, until_unreadable(path_records(str(path), input_format)), input_format)
    return Input(name, str(path), size, digest, told, lines, input_format)


def _fingerprint(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file, or of all files of a directory."""
    digest, size = hashlib.sha256(), 0
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        if file is not path:
            digest.update(f"\0{file.relative_to(path).as_posix()}\0".encode())
        with file.open("rb", buffering=0) as stream:
            while block := stream.read(CHUNK):
                digest.update(block)
                size += len(block)
    return size, digest.hexdigest()


def _is_json_lines(path: Path, input_format: str) -> bool:
    with path.open("rb", buffering=0) as file:
        raw = RawStream(file.read)
        if decompressed(raw) is not raw or raw.look().startswith(tuple(TABLE_MAGIC)):
            return False
        return text_kind(raw.look(), path.name, input_format) == "lines"


def shard_bytes(inputs: Sequence[Input]) -> int:
    """How much input a shard takes: small inputs still give every worker something to do."""
    return min(MOST_BYTES, max(LEAST_BYTES, sum(one.size for one in inputs) // 256))


def shards_of(inputs: Sequence[Input], size: int) -> Iterator[Shard]:
    """The shards of all inputs in order, each of about `size` bytes of one input; in memory one at a time."""
    index = 0
    for one in inputs:
        for shard in _ranges(one, size) if one.lines else _pieces(one, size):
            yield Shard(index, one.name, one.input_format, *shard)
            index += 1


def _ranges(one: Input, size: int) -> Iterator[tuple[str, int, int, int]]:
    """(path, start, end, lines before) of ranges that end behind a line, the first end beyond `size` bytes."""
    with Path(one.path).open("rb", buffering=0) as file:
        start = before = 0
        while start < one.size:
            end, lines = _line_end(file, start, start + size, one.size)
            yield one.path, start, end, before
            start, before = end, before + lines


def _line_end(file: IO[bytes], start: int, wanted: int, size: int) -> tuple[int, int]:
    """(where the line ends that holds byte `wanted` - 1, the number of line ends from `start` to there)."""
    file.seek(start)
    at, lines = start, 0
    while at < size and (block := file.read(min(CHUNK, size - at))):
        cut = block.find(b"\n", max(wanted - 1 - at, 0))
        if cut >= 0:
            return at + cut + 1, lines + block.count(b"\n", 0, cut + 1)
        lines += block.count(b"\n")
        at += len(block)
    return size, lines


def _pieces(one: Input, size: int) -> Iterator[tuple[str, int, int, int, tuple[bytes, ...]]]:
    """Records one after the other, pickled, until they hold `size` bytes."""
    payload: list[bytes] = []
    held = 0
    for record in until_unreadable(path_records(one.path, one.asked_format)):
        payload.append(_pickled(record))
        held += len(payload[-1])
        if held >= size or len(payload) >= MOST_RECORDS:
            yield "", 0, 0, 0, tuple(payload)
            payload, held = [], 0
    if payload:
        yield "", 0, 0, 0, tuple(payload)


def _pickled(record: Record) -> bytes:
    # Without its memo a pickle's length depends on the values only, not on which of them happen to be one object.
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, 5)
    pickler.fast = True
    pickler.dump(record)
    return buffer.getvalue()


def check_unchanged(inputs: Sequence[Input]) -> None:
    """Raise `DataError` where an input has another size than when it was hashed."""
    for one in inputs:
        path = Path(one.path)
        if path.is_file() and path.stat().st_size != one.size:
            raise DataError("the input changed while it was read", where=one.name, hint="start again with --fresh")
