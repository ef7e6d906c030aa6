"""Files where they lie: paths of this machine, and URIs (s3://, gs://, hdfs://, file:// ...) through `pyarrow.fs`.

What pyarrow does not know is asked of fsspec, where that is installed. Paths and URIs are read and written in one way.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from chatloss.errors import DataError, UsageError

__all__ = ["Folder", "file_size", "is_uri", "opened"]

CHUNK = 2**20
OBJECT_STORES = ("s3", "gcs", "abfs")  # where a file is there when it is whole, and nothing can be renamed
URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters: C:// is a drive


def is_uri(name: str) -> bool:
    """Whether `name` names a file system too.

    >>> is_uri("s3://bucket/chats.jsonl"), is_uri("chats.jsonl"), is_uri("org/name:train")
    (True, False, False)
    """
    return URI.match(name) is not None


def opened(place: str) -> Any:
    """The file at a path or URI, to read any part of: a `pyarrow.NativeFile`. Raises `OSError` where it cannot be."""
    filesystem, path = _located(place)
    return filesystem.open_input_file(path)


def file_size(place: str) -> int | None:
    """The bytes of the file at a path or URI; None where there is none."""
    filesystem, path = _located(place)
    info = filesystem.get_file_info(path)
    return int(info.size) if info.is_file else None


def _located(place: str) -> tuple[Any, str]:
    """(file system, path in it)."""
    if is_uri(place):
        return _of_uri(place.rstrip("/"))
    from pyarrow import fs

    return fs.LocalFileSystem(), Path(place).absolute().as_posix()


@lru_cache(maxsize=256)  # finding out where a bucket is takes requests
def _of_uri(uri: str) -> tuple[Any, str]:
    import pyarrow as pa
    from pyarrow import fs

    if urlsplit(uri).password is not None:
        what = "the URI holds a password, which the manifest and every error would tell"
        hint = "give credentials by the environment, as the file system's package asks for them"
        raise UsageError(what, where=uri.partition("://")[0] + "://", hint=hint)
    hint = "is the URI right, and is the package for its file system installed?"
    try:
        with suppress(pa.ArrowInvalid):  # a scheme that it does not know
            found: tuple[Any, str] = fs.FileSystem.from_uri(uri)
            return found
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(uri)
    except (ImportError, OSError, ValueError) as error:
        what = f"the file system cannot be reached: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
        raise DataError(what, where=uri, hint=hint, kind="source") from None
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder, by its path or URI, of files that appear under their names when they are whole.

    >>> with TemporaryDirectory() as path:
    ...     folder = Folder(path)
    ...     folder.write("a.txt", b"abc")
    ...     folder.read("a.txt"), folder.read("b.txt"), folder.files()
    (b'abc', None, {'a.txt': 3})
    """

    name: str

    def place(self, file: str) -> str:
        """The path or URI of a file in it."""
        return f"{self.name.rstrip('/')}/{file}"

    def absolute(self) -> Folder:
        """The same folder, wherever a process works."""
        return self if is_uri(self.name) else Folder(str(Path(self.name).absolute()))

    def make(self, *folders: str) -> None:
        """Make the folder, and these in it, where they are missing."""
        filesystem, path = _located(self.name)
        if filesystem.type_name not in OBJECT_STORES:  # they have none
            for folder in ("", *folders):
                filesystem.create_dir(f"{path}/{folder}".rstrip("/"), recursive=True)

    def names(self) -> set[str]:
        """The names of what lies in it, folders too. Raises `DataError` where the name is that of a file."""
        if file_size(self.name) is not None:
            raise DataError("the output is no directory", where=self.name, hint="name another with -o")
        return {info.base_name for info in self._listed(recursive=False)}

    def files(self, under: str = "") -> dict[str, int]:
        """The bytes of all files in it, or in its folder `under`, whatever the depth, by path from here."""
        base = _located(self.name)[1]
        listed = self._listed(under, recursive=True)
        return {info.path[len(base) :].lstrip("/"): info.size for info in listed if info.is_file}

    def _listed(self, under: str = "", *, recursive: bool) -> Any:
        from pyarrow import fs

        filesystem, path = _located(self.name)
        base = f"{path}/{under}".rstrip("/")
        return filesystem.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=recursive))

    def read(self, file: str) -> bytes | None:
        """All of a file; None where there is none."""
        try:
            with opened(self.place(file)) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, file: str, data: bytes) -> None:
        """Write a file in one step: a reader sees the old one or the new one."""
        with self.new(file) as path:
            path.write_bytes(data)

    @contextmanager
    def new(self, file: str) -> Iterator[Path]:
        """A path of this machine to write to: it becomes `file` when the block ends, nothing if it raises."""
        filesystem, path = _located(self.place(file))
        folder, _, name = path.rpartition("/")
        hidden = f".{name}.{uuid4().hex}.tmp"
        if filesystem.type_name == "local":
            partial = Path(folder, hidden)
            try:
                yield partial
                with partial.open("rb") as written:
                    os.fsync(written.fileno())
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
            return
        with TemporaryDirectory() as spool:
            partial = Path(spool, name)
            yield partial
            target = path if filesystem.type_name in OBJECT_STORES else f"{folder}/{hidden}"
            with partial.open("rb") as source, filesystem.open_output_stream(target, compression=None) as stream:
                shutil.copyfileobj(source, stream, CHUNK)
            if target != path:
                self.delete(file)  # some cannot rename over what is there
                filesystem.move(target, path)

    def delete(self, file: str) -> None:
        """Delete a file, if it is there."""
        filesystem, path = _located(self.place(file))
        with suppress(FileNotFoundError):
            filesystem.delete_file(path)

    def delete_folder(self, folder: str) -> None:
        """Delete a folder in it with all that it holds, if it is there."""
        filesystem, path = _located(self.place(folder))
        with suppress(FileNotFoundError):
            filesystem.delete_dir(path)
