"""Chats in: files, standard input, datasets and lists of rows -> conversations, and a reason for every row rejected.

JSON Lines, JSON arrays, Parquet, Arrow (file, stream, `datasets` directory) and plain text, with gzip or zstd or
without, are told by their first bytes and streamed. What a row means is told in `formats`.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from chatloss.errors import ChatlossError, DataError, UsageError
from chatloss.folders import is_uri, opened
from chatloss.formats import INPUT_FORMATS, Row, detect, parse
from chatloss.streams import READ_ERRORS, RawStream, Record, decompressed, text_records
from chatloss.tables import TABLE_MAGIC, cleaner, table_values
from chatloss.values import parse_json

__all__ = ["INPUT_FORMATS", "Reader", "Reject", "path_records", "read", "saved_parts", "told_format",
           "until_unreadable"]

KEPT_REJECTS = 100_000
HEAD_ROWS, HEAD_RECORDS = 10, 1000  # a format is told by the first rows among the first records
Source = tuple[str, Callable[[str], Iterator[Record]]]

HUB_ID = re.compile(r"(\w[\w.-]*)/\w[\w.-]*(:[\w.-]+)?")
DATA_SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow", ".txt", ".gz", ".zst")


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that is not used: `source` is ``file:row``, `kind` a word to count by, `where` the path of the field."""

    source: str
    kind: str
    what: str
    where: str
    hint: str


class Reader:
    """The rows of some data, made by `read`; iterating reads them, and again from the start each time.

    `n_rows` counts all rows met so far, `n_rejected` those not used. `rejects` holds the first 100,000 of these,
    `reject_counts` counts all by kind, and `input_formats` maps each file to its format. A later stage that cannot use
    a row calls `reject`. When the iteration ends, `check_share` decides whether too many rows were bad.
    """

    def __init__(self, sources: Sequence[Source], input_format: str, max_rejects: float) -> None:
        self.input_format = input_format
        self.max_rejects = max_rejects
        self._sources = sources
        self._reset()

    def _reset(self) -> None:
        self.n_rows = self.n_rejected = 0
        self.rejects: list[Reject] = []
        self.reject_counts: Counter[str] = Counter()
        self.input_formats: dict[str, str] = {}

    def __iter__(self) -> Iterator[Row]:
        self._reset()
        for name, records in self._sources:
            yield from self._rows(name, until_unreadable(records(self.input_format)))
        self.check_share()

    def _rows(self, name: str, records: Iterator[Record]) -> Iterator[Row]:
        input_format, records = told_format(name, records, self.input_format)
        self.input_formats[name] = input_format
        return self.parsed(name, records, input_format)

    def parsed(self, name: str, records: Iterable[Record], input_format: str) -> Iterator[Row]:
        """The rows that `records` of the file `name` are; those that are none join the rejects."""
        for row, value in records:
            self.n_rows += 1
            source = f"{name}:{row}"
            try:
                if isinstance(value, DataError):
                    raise value
                item = parse(value, input_format, source)
            except DataError as error:
                self.reject(source, error)
            else:
                yield item

    def reject(self, source: str, error: ChatlossError) -> None:
        """Put a row that has been read aside, with the error as its reason."""
        where = error.where if error.where.startswith(source) else f"{source} {error.where}".strip()
        told = [text.encode("utf-8", "backslashreplace").decode() for text in (source, error.what, where, error.hint)]
        self.n_rejected += 1
        self.reject_counts[error.kind] += 1
        if len(self.rejects) < KEPT_REJECTS:
            self.rejects.append(Reject(told[0], error.kind, *told[1:]))

    def check_share(self) -> None:
        """Raise `DataError` if more than `max_rejects` of the rows were rejected."""
        if self.n_rejected <= self.max_rejects * self.n_rows:
            return
        first = self.rejects[0]
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.reject_counts.most_common(5))
        share = math.ceil(min(1.0, self.n_rejected / max(self.n_rows, 1)) * 1000) / 1000
        what = f"{self.n_rejected} of {self.n_rows} rows are bad ({kinds}); the first: {first.what}"
        hint = f"{first.hint}; or go on without such rows: --max-rejects {share:g}"
        raise DataError(what, where=first.where, hint=hint, kind="rejects")

    def write_rejects(self, path: str | os.PathLike[str]) -> None:
        """Write `rejects` as JSON Lines; a last line says how many more there were, if any."""
        target = Path(path)
        partial_file = target.with_name(f".{target.name}.{os.getpid()}")
        with partial_file.open("wb") as file:
            for reject in self.rejects:
                file.write(orjson.dumps(asdict(reject), option=orjson.OPT_APPEND_NEWLINE))
            if self.n_rejected > len(self.rejects):
                more = {"kind": "more", "what": f"{self.n_rejected - len(self.rejects)} further rejects"}
                file.write(orjson.dumps(more, option=orjson.OPT_APPEND_NEWLINE))
        partial_file.replace(target)


def read(data: Any, *, input_format: str = "auto", max_rejects: float = 0.01) -> Reader:
    """The conversations in `data`, lazily and in order.

    `data` is a path, "-" for standard input, the id of a dataset on the Hugging Face hub ("org/name" or
    "org/name:split"), a `datasets` object, any iterable of rows, or a list of these. `input_format` is one of
    `INPUT_FORMATS`; "auto" tells it from the keys of each file's first rows. Rows that cannot be read are kept in
    `Reader.rejects`; more than `max_rejects` of all rows raises `DataError` at the end, as does a file of which
    nothing can be read, when its turn comes.

    >>> chats = read([{"messages": [{"role": "user", "content": "hi"}]}, {"messages": 3}], max_rejects=0.5)
    >>> [chat.source for chat in chats]
    ['<list>:1']
    >>> print(chats.rejects[0].where, "-", chats.rejects[0].what)
    <list>:2 messages - messages must be a list, not an integer
    """
    if input_format not in INPUT_FORMATS:
        hint = f"use one of {', '.join(INPUT_FORMATS)}"
        raise UsageError(f"unknown input format {input_format!r}", where="--input-format", hint=hint)
    if not 0 <= max_rejects <= 1:
        what = f"a share is between 0 and 1, not {max_rejects}"
        raise UsageError(what, where="--max-rejects", hint="for example 0.01")
    return Reader(_sources(data), input_format, max_rejects)


def _sources(data: Any) -> list[Source]:
    if isinstance(data, str | os.PathLike):
        path = os.fsdecode(data)
        return [("<stdin>" if path == "-" else path, partial(path_records, path))]
    name = f"<{type(data).__name__}>"
    if isinstance(data, Mapping):
        keys = ", ".join(repr(key) for key in list(data)[:5])
        raise _unusable("a mapping, not rows", f"pass one of its values ({keys}), or [row]", name)
    try:
        rows = iter(data)
    except TypeError:
        raise _unusable("neither a path nor rows", "pass a path or a list of rows", name) from None
    if type(data).__module__.split(".")[0] == "datasets":
        return [(name, lambda _: _dataset_records(data))]
    first = next(rows, None)
    nested = isinstance(data, list | tuple) and first is not None and not isinstance(first, Mapping)
    if nested or isinstance(first, str | os.PathLike):
        return [source for item in chain([first], rows) for source in _sources(item)]
    once = chain([first], rows) if rows is data and first is not None else data
    return [(name, lambda _: enumerate(once, 1))]


def _unusable(what: str, hint: str, where: str = "") -> DataError:
    return DataError(what, where=where, hint=hint, kind="source")


def told_format(name: str, records: Iterator[Record], input_format: str) -> tuple[str, Iterator[Record]]:
    """(format, the same records) for a file: "auto" is told by the first rows. Raises `DataError` where there are none.
    """
    head: list[Record] = []
    found: list[Mapping[str, Any]] = []
    for record in records:
        head.append(record)
        found += [record[1]] if isinstance(record[1], Mapping) else []
        if len(found) == HEAD_ROWS or len(head) == HEAD_RECORDS:
            break
    if not found:
        raise _nothing(name, head)
    try:
        return (detect(found) if input_format == "auto" else input_format), chain(head, records)
    except DataError as error:
        raise error.at(name) from None


def until_unreadable(records: Iterator[Record]) -> Iterator[Record]:
    """The records, and what ended them early, if anything, as a last one."""
    row = 0
    try:
        for record in records:
            row = record[0]
            yield record
    except DataError as error:
        yield (row + 1 if row else 0), error
    except READ_ERRORS as error:
        what = f"the {'rest of the file' if row else 'file'} cannot be read: {error}"
        hint = "check its permissions, or copy it again"
        yield (row + 1 if row else 0), DataError(what, kind="unreadable", hint=hint)


def _nothing(name: str, head: Sequence[Record]) -> DataError:
    if not head:
        return _unusable("there are no rows", "is it the right file? An iterator is read only once", name)
    row, error = head[0]
    if not isinstance(error, DataError):
        error = DataError("a row must be an object", hint='expected {"messages": [...]} or the like', kind="field")
    if row == 0:
        return DataError(error.what, where=name, hint=error.hint, kind=error.kind)
    what = f"{f'none of its first {len(head)} rows' if head[1:] else 'no row'} can be read: {error.what}"
    return DataError(what, where=f"{name}:{row} {error.where}".strip(), hint=error.hint, kind=error.kind)


# Paths.


def path_records(name: str, input_format: str) -> Iterator[Record]:
    """The records of a path or URI, of standard input ("-") or of a data set on the hub, as they are."""
    path = Path(name)
    if is_uri(name):
        try:
            remote = opened(name)
        except FileNotFoundError:
            raise _unusable("no such file", "check the URI") from None
        with remote:
            yield from _stream_records(RawStream(remote.read), None, input_format, path.name)
        return
    try:
        directory = name != "-" and path.is_dir()
        file = None if directory or name == "-" else path.open("rb", buffering=0)
    except FileNotFoundError:
        hub = HUB_ID.fullmatch(name)
        if hub and path.suffix.lower() not in DATA_SUFFIXES and not Path(hub[1]).exists():
            yield from _hub_records(name)
            return
        others = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, others, 1)
        hint = f"did you mean {path.parent / near[0]}?" if near else "check the path"
        raise _unusable("no such file", hint) from None
    except ValueError as error:
        raise _unusable(f"not a path: {error}", "check the path") from None
    if directory:
        yield from _directory_records(path)
    elif file is not None:
        with file:
            yield from _stream_records(RawStream(file.read), path, input_format, path.name)
    else:
        stdin: Any = sys.stdin  # None in a process without a console
        if stdin is None:
            raise _unusable("there is no standard input", "give a file")
        yield from _stream_records(RawStream(stdin.buffer.read1), None, input_format)


def _stream_records(raw: RawStream, path: Path | None, input_format: str, name: str = "") -> Iterator[Record]:
    stream = decompressed(raw)
    head = stream.look()
    kind = next((kind for magic, kind in TABLE_MAGIC.items() if head.startswith(magic)), None)
    if kind is None:
        yield from text_records(stream, name, input_format)
    elif stream is raw and path is not None:
        yield from enumerate(table_values(path, None, kind), 1)
    else:
        yield from enumerate(table_values(None, io.BufferedReader(stream), kind), 1)


def _directory_records(path: Path) -> Iterator[Record]:
    """A directory that `datasets.Dataset.save_to_disk` wrote."""
    yield from enumerate(chain.from_iterable(table_values(part, None, "stream") for part in saved_parts(path)), 1)


def saved_parts(path: Path) -> list[Path]:
    """The Arrow streams of such a directory, in the order its state.json names; none of them is anywhere else."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(str(item) for item in path.iterdir() if item.is_dir()))
        raise _unusable("a directory of several splits", f"give one of them: {splits}")
    if not (path / "state.json").is_file():
        files = sorted(str(item) for item in path.iterdir() if item.suffix.lower() in DATA_SUFFIXES)
        hint = f"give its files: {' '.join(files[:5])}" if files else "it has no data files"
        raise _unusable("a directory, not a file", hint)
    try:
        names = [str(file["filename"]) for file in parse_json((path / "state.json").read_bytes())["_data_files"]]
    except (DataError, KeyError, TypeError):
        raise _unusable("its state.json names no data files", "save the dataset again") from None
    outside = next((name for name in names if Path(name).name != name or name in ("", "..")), None)
    if outside is not None:
        raise _unusable(f"its state.json names a file that is not in it: {outside!r}", "save the dataset again")
    return [path / name for name in names]


def _hub_records(name: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        raise _unusable("no such file, and the hub needs `datasets`", "pip install datasets") from None
    repository, _, split = name.partition(":")
    try:
        splits = datasets.load_dataset(repository, streaming=True)
    except Exception as error:
        what = f"no such file, and the hub did not give it: {type(error).__name__}: {_line(error)}"
        raise _unusable(what, "check the name and the network") from None
    chosen = split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
    if chosen not in splits:
        raise _unusable(f"there is no split {chosen!r}", f"give {repository}:SPLIT, one of {', '.join(splits)}")
    yield from _dataset_records(splits[chosen])


def _dataset_records(data: Any) -> Iterator[Record]:
    features = getattr(data, "features", None)
    clean = cleaner(features.arrow_schema if features else None, parsed=True)
    try:
        for row, value in enumerate(data, 1):
            yield row, clean(value)
    except Exception as error:
        what = f"the dataset cannot be read further: {type(error).__name__}: {_line(error)}"
        raise DataError(what, kind="unreadable", hint="iterate it without chatloss to see the whole error") from error


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:200]
