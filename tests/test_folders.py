"""Paths and URIs are the same to `prepare`: inputs, output, going on; and a change of the input is noticed."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatloss import folders, shards
from chatloss import prepare as preparing
from chatloss.dataset import Prepared, is_prepared
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.errors import DataError, UsageError
from chatloss.folders import Folder
from chatloss.prepare import Job, prepare
from chatloss.reader import read
from chatloss.shards import Input, Shard, ShardReader, blocks_of, hashed, inputs_of, shards_of, with_blocks

JOB = Job(str(tokenizer_directory()))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Shards of about eight chats; a file system in memory that is empty."""
    monkeypatch.setattr(preparing, "shard_bytes", lambda inputs: 4096)
    monkeypatch.chdir(tmp_path)
    shutil.copy(chats_file(), "chats.jsonl")
    yield
    fsspec.filesystem("memory").rm("/", recursive=True)


def contents(place: str) -> dict[str, bytes]:
    folder = Folder(place)
    return {name: folder.read(name) or b"" for name in folder.files()}


def inputs(place: str, names: tuple[str, ...] = ("chats.jsonl",)) -> list[str]:
    for name in names:
        data = chats_file().read_bytes()
        Folder(place).write(name, gzip.compress(data, mtime=0) if name.endswith("gz") else data)
    return [Folder(place).place(name) for name in names]


def without_names(directory: dict[str, bytes]) -> dict[str, Any]:
    """All but what the inputs are called."""
    manifest = json.loads(directory.pop("manifest.json"))
    for one in manifest["job"]["inputs"]:
        del one["name"]
    return {**directory, "manifest.json": manifest}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_uri_of_this_machine_gives_the_bytes_of_its_path(tmp_path: Path, workers: int) -> None:
    prepare(["chats.jsonl"], "path", JOB)
    prepare(["chats.jsonl"], (tmp_path / "uri").as_uri(), JOB, workers=workers)
    assert contents("path") == contents("uri")
    prepare([(tmp_path / "chats.jsonl").as_uri()], "from-uri", JOB, workers=workers)
    assert [row.to_dict() for rows in Prepared("path") for row in rows] == [
        {**row.to_dict(), "source": row.source.replace(tmp_path.as_uri() + "/", "")}
        for rows in Prepared("from-uri") for row in rows
    ]


@pytest.mark.parametrize("renames", [True, False])
def test_another_file_system_is_read_and_written(renames: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not renames:  # as an object store, where what is written is there when it is whole
        monkeypatch.setattr(folders, "OBJECT_STORES", ("py::fsspec+memory",))
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "mv", None)
    data = inputs("memory://bucket/data", ("a.jsonl", "b.jsonl.gz"))
    prepare(data, "memory://bucket/out", JOB)
    prepare(data, "here", JOB)
    assert contents("memory://bucket/out") == contents("here")
    assert prepare(data, "memory://bucket/out", JOB)["counts"]["records"] == 530


@pytest.mark.parametrize("name", ["array.json", "table.parquet", "text.txt"])
def test_what_is_no_json_lines_is_read_from_a_uri_too(name: str) -> None:
    rows = [{"text": f"Q: {i}"} for i in range(50)]
    if name.endswith("parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), name)
    else:
        Path(name).write_text(json.dumps(rows) if name.endswith("json") else "plain")
    Folder("memory://bucket").write(name, Path(name).read_bytes())
    [one] = inputs_of([f"memory://bucket/{name}"], "auto", Folder("spool"))
    [two] = inputs_of([name], "auto", Folder("spool"))
    records = [[record for shard in shards_of([found], 500) for record in shard.records()] for found in (one, two)]
    assert records[0] == records[1] and not one.lines
    assert len(records[0]) == (1 if name.endswith("txt") else 50)


def test_what_is_done_in_another_file_system_is_not_done_again(interrupted: list[int]) -> None:
    out = "memory://bucket/out"
    with pytest.raises(KeyboardInterrupt):
        prepare(["chats.jsonl"], out, JOB)
    assert len(Folder(out).files(preparing.WORK)) == 5 and Folder(out).read("manifest.json") is None
    Folder(out).write("shards/.000009.parquet.0.tmp", b"left by a kill")
    prepare(["chats.jsonl"], out, JOB)
    assert len(interrupted) == len(set(interrupted)) + 1
    prepare(["chats.jsonl"], "here", JOB)
    assert contents(out) == contents("here")
    prepare(["chats.jsonl"], out, JOB, fresh=True)
    assert contents(out) == contents("here")


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    for place in (str(tmp_path / "out"), "memory://bucket/out"):
        folder = Folder(place)
        folder.make("shards")
        with pytest.raises(ZeroDivisionError), folder.new("shards/a") as path:
            path.write_bytes(b"half")
            1 / 0  # noqa: B018
        assert not folder.files()
        folder.delete("shards/a")
        folder.delete_folder("shards")
        folder.delete_folder("shards")
        assert folder.names() == set()


def test_rows_are_read_from_this_machine_only(tmp_path: Path) -> None:
    prepare(["chats.jsonl"], "out", JOB)
    assert is_prepared((tmp_path / "out").as_uri()) and not is_prepared((tmp_path / "chats.jsonl").as_uri())
    with pytest.raises(DataError, match="from this machine") as caught:
        Prepared((tmp_path / "out").as_uri())
    assert "copy" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "what"),
    [("memory://bucket/missing.jsonl", "no such file"), ("nowhere://bucket/x", "cannot be reached"),
     ("memory://bucket/data", "cannot be read|no such file")],
)
def test_a_uri_that_cannot_be_read_is_named(data: str, what: str) -> None:
    inputs("memory://bucket/data")
    with pytest.raises(DataError, match=what) as caught:
        prepare([data], "out", JOB)
    assert caught.value.where.startswith(data)


@pytest.mark.parametrize("output", ["chats.jsonl/out", "nowhere://bucket/out"])
def test_an_output_that_cannot_be_written_is_named(output: str) -> None:
    with pytest.raises(DataError, match=r"cannot be (written|reached)") as caught:
        prepare(["chats.jsonl"], output, JOB)
    assert caught.value.where == output


# -- changes while it runs --


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.jsonl.gz", "chats.json"])
@pytest.mark.parametrize("size", ["same", "other"])
def test_an_input_that_changes_during_the_run_is_refused(name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = chats_file().read_text()

    def save(text: str) -> None:
        if name == "chats.json":
            text = json.dumps([json.loads(line) for line in text.splitlines()])
        data = text.encode()
        Path(name).write_bytes(gzip.compress(data, 0, mtime=0) if name.endswith("gz") else data)

    save(text)
    run = preparing.run_shard

    def changed(*args: Any) -> Any:
        if args[2].index == 5:
            save(text[:-5000] + text[-5000:].replace("e", "a") + (text if size == "other" else ""))
        return run(*args)

    monkeypatch.setattr(preparing, "run_shard", changed)
    with pytest.raises(DataError, match="changed while it was read") as caught:
        prepare([name], "out", JOB)
    assert caught.value.where == name and not Path("out/manifest.json").exists()
    monkeypatch.setattr(preparing, "run_shard", run)
    with pytest.raises(DataError, match="begun with something else"):
        prepare([name], "out", JOB)
    save(text)
    prepare([name], "out", JOB)
    prepare([name], "wanted", JOB)
    assert contents("out") == contents("wanted")


def test_markers_whose_job_is_gone_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "_finish", lambda *_: {})
        prepare(["chats.jsonl"], "out", JOB)
    Path("out/.prepare/job.json").unlink()  # as a run that is killed while it clears leaves it
    other = Job(JOB.tokenizer, export="labels")
    prepare(["chats.jsonl"], "out", other, max_rejects=0.1)
    prepare(["chats.jsonl"], "wanted", other, max_rejects=0.1)
    assert contents("out") == contents("wanted")


def test_a_shard_that_vanishes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = preparing.run_shard

    def stolen(*args: Any) -> Any:
        Path("out/shards/000002.parquet").unlink(missing_ok=True)
        return run(*args)

    monkeypatch.setattr(preparing, "run_shard", stolen)
    with pytest.raises(Exception, match="shards are gone"):
        prepare(["chats.jsonl"], "out", JOB)


def test_a_value_that_json_cannot_hold_is_named_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(1, {"text": "a"}), (2, {"text": "b", "when": datetime(2026, 1, 2)})]
    monkeypatch.setattr(shards, "path_records", lambda *_: iter(rows))
    Folder("spool").make()
    with pytest.raises(DataError, match="datetime") as caught:
        inputs_of(["org/data"], "auto", Folder("spool"))
    assert caught.value.where == "org/data:2"


# -- cutting --


@given(
    lines=st.lists(st.integers(0, 60), max_size=30), size=st.integers(1, 80), last=st.booleans(),
    chunk=st.integers(1, 50),
)
def test_shards_hold_every_line_once_with_its_number(lines: list[int], size: int, last: bool, chunk: int) -> None:
    data = "\n".join(json.dumps("x" * n) for n in lines) + ("\n" if last else "")
    Folder("memory://cut").write("chats.jsonl", data.encode())
    place = "memory://cut/chats.jsonl"
    one = Input("chats", place, len(data), "text", True, "text")
    before, shards.CHUNK = shards.CHUNK, chunk
    try:
        [one] = with_blocks([one], ((block, hashed(block)) for block in reversed(list(blocks_of([one], size)))))
        made = list(shards_of([one], size))
    finally:
        shards.CHUNK = before
    ends = [0, *(shard.end for shard in made)]
    assert ends[-1] == len(data) and [shard.start for shard in made] == ends[:-1]
    assert [record for shard in made for record in shard.records()] == list(enumerate(("x" * n for n in lines), 1))
    assert all(data[shard.end - 1] == "\n" for shard in made[:-1])


def test_every_change_of_a_byte_is_seen_by_the_shard_that_reads_it() -> None:
    data = chats_file().read_bytes()[:6000]
    Path("some.jsonl").write_bytes(data)
    [one] = with_blocks(found := inputs_of(["some.jsonl"], "auto", Folder("spool")),
                        ((block, hashed(block)) for block in blocks_of(found, 1000)))
    made = list(shards_of([one], 1000))
    for at in range(0, len(data), 97):
        Path("some.jsonl").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert [shard.index for shard in made if differs(shard)] == [s.index for s in made if s.start <= at < s.end]


def differs(shard: Shard) -> bool:
    try:
        list(ShardReader(shard))
    except DataError as error:
        return "changed" in error.what
    return False


def test_a_password_in_a_uri_is_refused_and_not_told() -> None:
    for data, out in ((["s3://key:hush@bucket/chats.jsonl"], "here"), (["chats.jsonl"], "s3://key:hush@bucket/out")):
        with pytest.raises(UsageError, match="holds a password") as caught:
            prepare(data, out, JOB)
        assert "hush" not in str(caught.value)
    with pytest.raises(UsageError, match="holds a password") as caught:
        list(read("s3://key:hush@bucket/chats.jsonl"))
    assert "hush" not in str(caught.value)
