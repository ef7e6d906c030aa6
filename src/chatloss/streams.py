"""Bytes -> records: decompression, JSON Lines, JSON arrays and plain text, streamed, each record bounded.

A record is a row number and its value, or the `DataError` that says why it has none. What ends a file early is raised.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import PurePath
from typing import Any

from chatloss.errors import DataError
from chatloss.values import parse_json

__all__ = ["MAX_RECORD", "READ_ERRORS", "RawStream", "Record", "decompressed", "json_lines", "text_kind",
           "text_records"]

Record = tuple[int, Any]

MAX_RECORD = 64 * 2**20  # bytes of one line, one element of an array, or one text file
MAX_SKIP = 16 * MAX_RECORD  # a longer record ends its file: nobody waits for the end of a decompression bomb
CHUNK = 2**20
LOOK = 4096  # bytes that tell what a file is
READ_ERRORS = (OSError, EOFError, zlib.error)

BOM = b"\xef\xbb\xbf"
FOREIGN = {
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"\0\0\xfe\xff": "UTF-32",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PK\3\4": "zip",
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
}
JSON_START = re.compile(rb'(\[\s*)?\{\s*["}]|\[\s*\]')
# Up to the next byte that matters: between the elements of an array, deeper (whole strings included), inside a string.
BETWEEN = re.compile(rb'[^"\[\]{},]*+')
DEEPER = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+', re.DOTALL)
INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class RawStream(io.RawIOBase):
    """What `read(size)` gives, and a look at its beginning that consumes nothing."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read
        self._ahead = b""
        self._error: Exception | None = None

    def look(self, size: int = LOOK) -> bytes:
        """The first bytes, at least `size` of them if there are as many."""
        try:
            while len(self._ahead) < size and (more := self._read(size)):
                self._ahead += more
        except READ_ERRORS as error:
            self._error = error  # raised when the bytes before it have been read
        return self._ahead

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._ahead:
            if self._error is not None:
                raise self._error
            self._ahead = self._read(len(buffer))
        part = self._ahead[: len(buffer)]
        self._ahead = self._ahead[len(part) :]
        buffer[: len(part)] = part
        return len(part)


def decompressed(stream: RawStream) -> RawStream:
    """The stream without its gzip or zstd layer, if its first bytes say that it has one."""
    head = stream.look(4)
    if head.startswith(b"\x1f\x8b"):
        return RawStream(gzip.GzipFile(fileobj=io.BufferedReader(stream, CHUNK)).read1)
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50
    if skippable or head.startswith(b"\x28\xb5\x2f\xfd"):
        chunks = _zstd_chunks(io.BufferedReader(stream, CHUNK))
        return RawStream(lambda _: next(chunks, b""))
    return stream


def _zstd_chunks(stream: io.BufferedReader) -> Iterator[bytes]:
    # `stream_reader` takes a truncated frame for the end of the file, so frames are followed by hand. 1 KiB in gives at
    # most 32 MiB out.
    import zstandard

    frame = None
    try:
        while piece := stream.read(1024):
            while piece:
                if frame is None or frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                out = frame.decompress(piece)
                piece = frame.unused_data if frame.eof else b""
                if out:
                    yield out
    except zstandard.ZstdError as error:
        raise OSError(f"damaged zstd data ({error})") from None
    if frame is not None and not frame.eof:
        raise EOFError("the compressed data is cut off")


def text_records(stream: RawStream, name: str, input_format: str) -> Iterator[Record]:
    """The records of a stream that is JSON Lines, a JSON array, one JSON object over several lines, or plain text.

    Plain text, one record {"text": ...} for the whole file, is what has `input_format` "text", or "auto" and a name in
    .txt, and does not begin like JSON. Raises `DataError` for what is no UTF-8 text at all.
    """
    kind = text_kind(stream.look(), name, input_format)
    buffered: io.BufferedReader[Any] = io.BufferedReader(stream, CHUNK)
    if kind == "text":
        return _whole(buffered, lambda data: {"text": _utf8(data)})
    if kind == "array":
        return _array(buffered)
    return _whole(buffered, _one_object) if kind == "object" else json_lines(buffered)


def text_kind(head: bytes, name: str, input_format: str) -> str:
    """What `text_records` takes a file for by its first bytes: "text", "array", "object" or "lines"."""
    foreign = next((what for magic, what in FOREIGN.items() if head.startswith(magic)), None)
    if foreign is None and 0 in head[:2]:
        foreign = "UTF-16 or binary"
    if foreign:
        hint = "give UTF-8 text, JSON, Parquet or Arrow, with one layer of gzip or zstd at most"
        raise DataError(f"the file is {foreign}, which is not read", kind="encoding", hint=hint)
    body = head.removeprefix(BOM).lstrip()
    suffixes = [suffix for suffix in PurePath(name).suffixes if suffix.lower() not in (".gz", ".zst")]
    texty = input_format == "text" or (input_format == "auto" and [s.lower() for s in suffixes[-1:]] == [".txt"])
    if texty and not JSON_START.match(body):
        return "text"
    if body.startswith(b"["):
        return "array"
    return "object" if re.match(rb"\{[ \t\r]*\n", body) else "lines"


def _whole(stream: io.BufferedReader, value: Callable[[bytes], Any]) -> Iterator[Record]:
    data = stream.read(MAX_RECORD + 1).removeprefix(BOM)
    if len(data) > MAX_RECORD:
        raise DataError(_TOO_LONG.format("file"), kind="too_long", hint="split it, or write JSON Lines")
    if data:
        yield 1, value(data)


def _utf8(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{data[error.start]:02X} at offset {error.start}"
        raise DataError(what, kind="encoding", hint="convert the file to UTF-8") from None


def _one_object(data: bytes) -> Any:
    try:
        return parse_json(data)
    except DataError as error:
        hint = "write one object per line (JSON Lines), or one array"
        raise DataError(f"the file is JSON over several lines, {error.what}", kind=error.kind, hint=hint) from None


def _parsed(data: bytes) -> Any:
    try:
        return parse_json(data)
    except DataError as error:
        return error


_TOO_LONG = f"the {{}} is longer than {MAX_RECORD // 2**20} MiB"


def _too_long(what: str) -> DataError:
    return DataError(_TOO_LONG.format(what), kind="too_long", hint="split it into several rows")


def json_lines(stream: io.BufferedReader, row: int = 0) -> Iterator[Record]:
    """The records of JSON Lines; `row` is the number of lines before them."""
    while line := stream.readline(MAX_RECORD + 1):
        row += 1
        if len(line) > MAX_RECORD and not line.endswith(b"\n"):
            size = len(line)
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
                size += len(line)
                if size > MAX_SKIP:
                    raise _too_long("line")
            yield row, _too_long("line")
        elif line := line.removeprefix(BOM).strip():
            yield row, _parsed(line)


def _array(stream: io.BufferedReader) -> Iterator[Record]:
    for row, element in enumerate(_elements(stream), 1):
        if element is None:
            yield row, _too_long("element")
        elif not element:
            yield row, DataError("an element is empty", kind="json", hint="there is a comma too many")
        else:
            yield row, _parsed(element)


def _elements(stream: io.BufferedReader) -> Iterator[bytes | None]:
    """The elements of a JSON array, cut at its own commas; None for one that is too long."""
    depth, quoted, escaped, some = 0, False, False, False
    parts: list[bytes] = []
    size = 0

    def taken() -> bytes | None:
        element = b"".join(parts).strip() if size <= MAX_RECORD else None
        parts.clear()
        return element

    while chunk := stream.read1(CHUNK):
        start = at = 0
        while at < len(chunk):
            if escaped:
                escaped, at = False, at + 1
            elif quoted:
                at = _end(INSIDE, chunk, at)
                byte = chunk[at : at + 1]
                # A backslash here is the last byte of the chunk: the byte it escapes is in the next.
                quoted, escaped, at = byte != b'"', byte == b"\\", at + 1
            else:
                at = _end(DEEPER if depth > 1 else BETWEEN, chunk, at) + 1
                byte = chunk[at - 1 : at]
                quoted = byte == b'"'
                opened, closed = byte in (b"[", b"{"), byte in (b"]", b"}")
                depth += opened - closed
                if opened and depth == 1:
                    start = at
                elif (closed and depth == 0) or (byte == b"," and depth == 1):
                    parts.append(chunk[start : at - 1])
                    size += at - 1 - start
                    element = taken()
                    if element != b"" or some or not closed:
                        yield element
                    some, start, size = True, at, 0
                    if closed:
                        _nothing_after(chunk[at:], stream)
                        return
        parts.append(chunk[start:])
        size += len(chunk) - start
        if size > MAX_RECORD:
            parts.clear()
        if size > MAX_SKIP:
            raise _too_long("element")
    raise DataError("the array is cut off: it has no closing ]", kind="unreadable", hint="write the file again")


def _end(pattern: re.Pattern[bytes], chunk: bytes, at: int) -> int:
    found = pattern.match(chunk, at)
    assert found is not None, "every pattern matches the empty string"
    return found.end()


def _nothing_after(rest: bytes, stream: io.BufferedReader) -> None:
    for chunk in chain([rest], iter(lambda: stream.read1(CHUNK), b"")):
        if chunk.strip():
            raise DataError("more text after the end of the array", kind="json", hint="one array is one file")
