"""Parquet and Arrow -> row values, with what Arrow adds to chats taken away again.

Arrow gives every object of a column the union of all fields, null where it had none (which leaks the tool parameters of
other rows: ms-swift#10125). A null field of a struct is therefore no field. Nulls in JSON text are the data's own.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from chatloss.errors import DataError
from chatloss.formats import COLUMNS, KEYING
from chatloss.values import parse_json

__all__ = ["TABLE_MAGIC", "cleaner", "table_values"]

Clean = Callable[[Any], Any]
TABLE_MAGIC = {b"PAR1": "parquet", b"ARROW1\0\0": "file", b"\xff\xff\xff\xff": "stream"}
BATCH_ROWS = 64


def table_values(path: Path | None, stream: IO[bytes] | None, kind: str) -> Iterator[Any]:
    """The rows of a file, or of a stream that is not on disk, as dicts or as the `DataError` of a row.

    `kind` is a value of `TABLE_MAGIC`. Only columns that some format knows are read. Raises `DataError` when no further
    row can be read.
    """
    import pyarrow as pa

    with ExitStack() as stack:
        try:
            file: Any = stream
            if path is not None:
                file = stack.enter_context(path.open("rb") if kind == "parquet" else pa.memory_map(str(path)))
            elif kind != "stream":  # the other two begin to be read at their end
                assert stream is not None
                file = stack.enter_context(tempfile.TemporaryFile())
                shutil.copyfileobj(stream, file, 2**20)
                file.seek(0)
            yield from _values(file, kind)
        except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError) as error:
            what = f"the file is damaged, or no {kind if kind == 'parquet' else f'Arrow {kind}'}: {_line(error)}"
            raise DataError(what, kind="unreadable", hint="write or download the file again") from None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _values(file: Any, kind: str) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any
    if kind == "parquet":
        source = pq.ParquetFile(file)
        schema, columns = source.schema_arrow, _columns(source.schema_arrow)
        batches = source.iter_batches(BATCH_ROWS, columns=columns)
    else:
        source = pa.ipc.open_file(file) if kind == "file" else pa.ipc.open_stream(file)
        schema, columns = source.schema, _columns(source.schema)
        found = (source.get_batch(i) for i in range(source.num_record_batches)) if kind == "file" else iter(source)
        batches = (batch if columns is None else batch.select(columns) for batch in found)
    clean = cleaner(schema)
    for batch in batches:
        damage = None
        if kind != "parquet":
            # Arrow trusts the offsets in an IPC file, and bad ones would crash the process.
            batch.validate()
            try:
                batch.validate(full=True)
            except pa.ArrowException as error:
                what = f"its record batch is damaged: {_line(error)}"
                damage = DataError(what, kind="unreadable", hint="write the file again")
        for start in range(0, batch.num_rows, BATCH_ROWS):
            piece = batch.slice(start, BATCH_ROWS)
            yield from [damage] * piece.num_rows if damage else _decoded(piece, clean)


def _columns(schema: Any) -> list[str] | None:
    if len(set(schema.names)) < len(schema.names):
        raise DataError("two columns have the same name", kind="format", hint="rename one of them")
    return [name for name in schema.names if name in COLUMNS] if set(schema.names) & set(KEYING) else None


def _decoded(piece: Any, clean: Clean) -> list[Any]:
    try:
        return [clean(row) for row in piece.to_pylist()]
    except DataError as error:
        problem = error
    except (ValueError, TypeError, KeyError, OverflowError, ArithmeticError) as error:
        problem = DataError(f"cannot be decoded: {_line(error)}", kind="encoding", hint="convert the data to UTF-8")
    if piece.num_rows == 1:
        return [problem]
    return [value for i in range(piece.num_rows) for value in _decoded(piece.slice(i, 1), clean)]


def cleaner(kind: Any, parsed: bool = False) -> Clean:
    """A function that makes plain rows of what Arrow gives for a schema or type: no null fields, JSON columns parsed.

    `parsed` says that JSON columns are parsed already. Without a schema (None) every null in every object goes.

    >>> cleaner(None)({"messages": [{"role": "user", "content": "hi", "tool_calls": None}]})
    {'messages': [{'role': 'user', 'content': 'hi'}]}
    """
    if kind is None:
        return _without_nulls
    import pyarrow as pa

    types = pa.types
    if isinstance(kind, pa.Schema) or types.is_struct(kind):
        return _struct_cleaner({field.name: cleaner(field.type, parsed) for field in kind})
    if getattr(kind, "extension_name", "") == "arrow.json":
        return _same if parsed else parse_json
    if isinstance(kind, pa.BaseExtensionType):
        return cleaner(kind.storage_type, parsed)
    if types.is_map(kind):
        item = cleaner(kind.item_type, parsed)
        return lambda value: {k: item(v) for k, v in value} if isinstance(value, list) else value
    if hasattr(kind, "value_type") and not types.is_dictionary(kind):
        item = cleaner(kind.value_type, parsed)
        return lambda value: [None if v is None else item(v) for v in value] if isinstance(value, list) else value
    return _same


def _struct_cleaner(fields: dict[str, Clean]) -> Clean:
    def clean(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: fields.get(k, _same)(v) for k, v in value.items() if v is not None}

    return clean


def _same(value: Any) -> Any:
    return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
