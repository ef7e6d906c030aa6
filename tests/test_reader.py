"""reader.py, streams.py, tables.py: every container, nothing lost in silence, and garbage of every kind."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from chatloss import streams
from chatloss.chat import Conversation, Text
from chatloss.errors import ChatlossError, DataError, UsageError
from chatloss.reader import Reader, read
from tests.assets import chats

Write = Callable[[str, bytes], Path]
ROWS = [{"messages": [{"role": "user", "content": f"q{i} \\\" ,]}} é🙂"}], "id": i} for i in range(300)]
GOOD = b'{"messages": [{"role": "user", "content": "q"}]}\n'


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def lines(rows: list[Any]) -> bytes:
    return b"".join(orjson.dumps(row) + b"\n" for row in rows)


def texts(reader: Reader) -> list[str]:
    return [row.messages[0].text if isinstance(row, Conversation) else row.text for row in reader]  # type: ignore[union-attr]


def as_table(rows: list[Any]) -> pa.Table:
    return pa.Table.from_pylist(rows)


def arrow(rows: list[Any], kind: str) -> bytes:
    sink, table = io.BytesIO(), as_table(rows)
    if kind == "parquet":
        pq.write_table(table, sink, row_group_size=100)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    return sink.getvalue()


CONTAINERS: dict[str, Callable[[list[Any]], bytes]] = {
    "jsonl": lines,
    "jsonl with a BOM, CRLF and blank lines": lambda rows: b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\r\n"),
    "jsonl without a last newline": lambda rows: lines(rows)[:-1],
    "array": orjson.dumps,
    "pretty array": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows, indent=2).encode(),
    "parquet": lambda rows: arrow(rows, "parquet"),
    "arrow file": lambda rows: arrow(rows, "file"),
    "arrow stream": lambda rows: arrow(rows, "stream"),
}
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "gz of two members": lambda data: gzip.compress(data[:999]) + gzip.compress(data[999:]),
    "zst": zstandard.ZstdCompressor().compress,
    "zst of two frames": lambda data: b"".join(map(zstandard.ZstdCompressor().compress, (data[:999], data[999:]))),
}


# What is read.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_rows_whatever_the_file_is_called(
    container: str, compression: str, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = COMPRESSIONS[compression](CONTAINERS[container](ROWS))
    path = write("data.bin", data)
    reader = read(path, max_rejects=0)
    expected = [row["messages"][0]["content"] for row in ROWS]  # type: ignore[index]
    assert texts(reader) == expected and reader.n_rows == 300 and not reader.rejects
    assert reader.input_formats == {str(path): "messages"}
    assert texts(reader) == expected, "a reader starts again each time"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert texts(read("-", max_rejects=0)) == expected


def test_sources_are_the_name_as_given_and_the_line_or_record(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.jsonl", GOOD + b"\n" + GOOD)
    monkeypatch.chdir(path.parent)
    write("b.json", b"[" + GOOD + b"," + GOOD + b"]")
    found = [row.source for row in read(["a.jsonl", Path("b.json")])]
    assert found == ["a.jsonl:1", "a.jsonl:3", "b.json:1", "b.json:2"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(GOOD)))
    assert [row.source for row in read("-")] == ["<stdin>:1"]


def test_plain_text_is_one_row_per_file(write: Write) -> None:
    text = "[INST] hi [/INST]\nhello\n{"
    for name, data in {"a.txt": text.encode(), "a.txt.gz": gzip.compress(text.encode())}.items():
        assert list(read(write(name, data))) == [Text(text, f"{write(name, data)}:1")]
    assert texts(read(write("dump", text.encode()), input_format="text")) == [text]
    assert texts(read(write("rows.txt", b'{"text": "a"}\n{"text": "b"}'))) == ["a", "b"]


def test_one_object_over_several_lines_is_one_row(write: Write) -> None:
    assert texts(read(write("a.json", json.dumps(ROWS[7], indent=1).encode()))) == [ROWS[7]["messages"][0]["content"]]  # type: ignore[index]


def test_rows_in_memory_are_read_from_lists_iterators_and_datasets() -> None:
    expected = [row["messages"][0]["content"] for row in ROWS]  # type: ignore[index]
    dataset = datasets.Dataset.from_list(ROWS)
    for data in (ROWS, tuple(ROWS), iter(ROWS), dataset, dataset.to_iterable_dataset(), [dataset]):
        reader = read(data, max_rejects=0)
        assert texts(reader) == expected
    assert [row.source for row in read(dataset)][:2] == ["<Dataset>:1", "<Dataset>:2"]
    assert texts(read([ROWS, dataset])) == expected * 2


def test_a_directory_that_datasets_saved_is_read_in_order(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "saved", num_shards=3)
    rows = list(read(tmp_path / "saved"))
    assert rows[-1].source == f"{tmp_path / 'saved'}:300"
    assert texts(read(tmp_path / "saved")) == [row["messages"][0]["content"] for row in ROWS]  # type: ignore[index]
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "dict")
    assert "dict/train" in error_of(tmp_path / "dict").hint


def test_null_fields_that_arrow_adds_are_removed_but_nulls_in_json_are_kept(tmp_path: Path) -> None:
    def row(**arguments: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        tool = {"type": "function", "function": {"name": "f", "parameters": {k: {"type": "x"} for k in arguments}}}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return {"messages": [{"role": "user", "content": "q"}, answer], "tools": [tool], "images": None}

    rows = [row(a=1, b={"c": "x"}), row(d=["y", None])]
    files = {kind: tmp_path / kind for kind in ("parquet", "file", "stream")}
    for kind, path in files.items():
        path.write_bytes(arrow(rows, kind))
    plain = datasets.Dataset(as_table(rows))
    assert plain[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["a"] is None
    for data in (*files.values(), plain, plain.to_iterable_dataset(), plain.to_iterable_dataset().map(lambda r: r)):
        first, second = read(data, max_rejects=0)
        assert isinstance(first, Conversation) and isinstance(second, Conversation)
        assert first.messages[1].tool_calls[0].arguments == {"a": 1, "b": {"c": "x"}}
        assert second.messages[1].tool_calls[0].arguments == {"d": ["y", None]} and second.messages[1].extra == {}
    (kept,) = read([row(a=None)])
    assert isinstance(kept, Conversation) and kept.messages[1].tool_calls[0].arguments == {"a": None}
    (tmp_path / "mixed.jsonl").write_bytes(lines([row(a=None), row(a="x", b=None)]))
    options: dict[str, Any] = {"data_files": str(tmp_path / "mixed.jsonl"), "cache_dir": tmp_path / "cache"}
    mixed = datasets.load_dataset("json", split="train", **options)
    mixed.save_to_disk(tmp_path / "mixed")
    for data in (tmp_path / "mixed.jsonl", mixed, mixed.to_iterable_dataset(), tmp_path / "mixed"):
        (got, _) = read(data, max_rejects=0)
        assert isinstance(got, Conversation) and got.messages[1].tool_calls[0].arguments == {"a": None}, data


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = {"train": datasets.Dataset.from_list(ROWS[:2]), "test": datasets.Dataset.from_list(ROWS[2:3])}
    asked = []

    def load_dataset(name: str, **options: Any) -> dict[str, Any]:
        asked.append((name, options))
        return splits

    fake = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [row.source for row in read("org/name")] == ["org/name:1", "org/name:2"]
    assert len(list(read("org/name:test"))) == 1
    assert asked == [("org/name", {"streaming": True})] * 2
    assert "test" in error_of("org/name:dev").hint
    fake.load_dataset = lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline\nlong story"))
    assert "ConnectionError: offline" in error_of("org/name").what
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert error_of("org/name").hint == "pip install datasets"
    assert "no such file" in error_of("org/name.jsonl").what


# What is refused.


def error_of(data: Any, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read(data, **options))
    assert caught.value.hint and caught.value.where
    return caught.value


def test_bad_rows_are_put_aside_with_their_reason_and_the_rest_goes_on(write: Write, tmp_path: Path) -> None:
    bad = [
        *(GOOD.strip().replace(b"q", text) for text in (b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\0")),
        b'{"messages": NaN}', b'{"messages": [], "messages": []}', b"[" * 99_999, b"not json", b"3", b"[]", b"null",
        b'{"messages": [{"role": "user", "content": 3}]}', GOOD.strip() + b",", b'{"messages": ', "é".encode("utf-16"),
    ]  # fmt: skip
    path = write("a.jsonl", GOOD + b"\n".join(line + b"\n" + GOOD.strip() for line in bad))
    reader = read(path, max_rejects=1)
    assert len(list(reader)) == len(bad) + 1 == reader.n_rows - len(reader.rejects)
    assert [reject.source for reject in reader.rejects] == [f"{path}:{2 * i}" for i in range(1, len(bad) + 1)]
    assert all(r.what and r.hint and r.where.startswith(r.source) for r in reader.rejects)
    assert reader.rejects[11].where == f"{path}:24 messages[0].content"
    reader.write_rejects(tmp_path / "rejects.jsonl")
    written = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert len(written) == len(bad) and set(written[0]) == {"source", "kind", "what", "where", "hint"}
    error = error_of(path)
    assert f"{len(bad)} of {2 * len(bad) + 1} rows are bad" in error.what and "--max-rejects" in error.hint


def test_the_share_of_bad_rows_is_judged_at_the_end_and_counts_later_stages(write: Write) -> None:
    path = write("a.jsonl", b"{}\n" + GOOD * 99)
    reader = read(path)
    rows = iter(reader)
    source = next(rows).source
    reader.reject(source, DataError("too long", where=f"{source} messages[0]", hint="cut it", kind="length"))
    with pytest.raises(DataError, match=r"2 of 100 rows are bad \(1 field, 1 length\)"):
        list(rows)
    assert [reject.where for reject in reader.rejects] == [f"{path}:1 messages", f"{path}:2 messages[0]"]
    assert len(list(reader)) == 99, "one bad row in a hundred is no more than the default share"


def test_rejects_beyond_the_kept_ones_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatloss.reader.KEPT_REJECTS", 2)
    reader = read([*ROWS[:1], *[{"messages": {"\ud800": 1}}] * 5], max_rejects=1)
    assert len(list(reader)) == 1 and len(reader.rejects) == 2
    assert reader.n_rejected == 5 == reader.reject_counts["field"]
    reader.write_rejects(tmp_path / "r")
    assert "3 further rejects" in (tmp_path / "r").read_text()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("container", ["jsonl", "array", "arrow stream"])
def test_the_rows_before_a_truncation_are_kept_and_the_cut_is_a_reject(
    compress: Callable[[bytes], bytes], container: str, write: Write
) -> None:
    data = compress(CONTAINERS[container](chats("tools_en") * 3))
    path = write("a.gz", data[: len(data) // 2])
    reader = read(path, max_rejects=1)
    rows = list(reader)
    assert 60 < len(rows) < 900 and [reject.kind for reject in reader.rejects][-1] == "unreadable"
    assert reader.rejects[-1].source == f"{path}:{len(rows) + 1}" and reader.n_rows == len(rows) + 1
    assert "rows are bad" in error_of(path, max_rejects=0).what


def test_a_cut_parquet_or_arrow_file_is_an_error(write: Write) -> None:
    for kind in ("parquet", "file", "stream"):
        data = arrow(ROWS, kind)
        for cut in (12, len(data) // 2, len(data) - 9):
            reader = read(write("a", data[:cut]), max_rejects=0)
            with pytest.raises(DataError):
                list(reader)


def test_records_beyond_the_bound_are_skipped_without_being_held(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_RECORD", 1000)
    monkeypatch.setattr(streams, "MAX_SKIP", 10**7)
    long = GOOD.replace(b"q", b"q" * 5_000_000)
    for data in (GOOD + long + GOOD, b"[" + GOOD + b"," + long + b"," + GOOD + b"]"):
        reader = read(write("a", data), max_rejects=1)
        assert texts(reader) == ["q", "q"] and [reject.kind for reject in reader.rejects] == ["too_long"]
        assert reader.rejects[0].source.endswith(":2")
    bomb = gzip.compress(GOOD + b" " * 10**8)
    reader = read(write("a.gz", bomb), max_rejects=1)
    assert texts(reader) == ["q"] and reader.n_rejected == 1
    assert error_of(write("a.txt", b"x" * 2000)).kind == "too_long"


NESTED = st.recursive(st.text('[]{},"\\\n é'), st.lists, max_leaves=6)


@given(rows=st.lists(NESTED.map(lambda value: {"text": value})), size=st.integers(1, 9))
def test_an_array_is_cut_at_its_own_commas_wherever_its_chunks_end(rows: list[Any], size: int) -> None:
    data = json.dumps(rows, ensure_ascii=False, indent=size % 3 or None).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", size)
        records = streams.text_records(streams.RawStream(io.BytesIO(data).read), "a.json", "auto")
        assert list(records) == list(enumerate(rows, 1))


def test_a_line_of_fifty_megabytes_is_read(write: Write) -> None:
    (row,) = read(write("a", GOOD.replace(b"q", b"\\n" * 25_000_000)))
    assert isinstance(row, Conversation) and len(row.messages[0].text) == 25_000_000


@pytest.mark.parametrize(
    ("name", "data", "what"),
    [
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "no rows"),
        ("a.jsonl", b" \n\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.json", b"[", "cut off"),
        ("a.json", b"[1, 2]", "must be an object"),
        ("a.txt", b"\xff", "not UTF-8"),
        ("a.txt", "é".encode("utf-16"), "UTF-16"),
        ("a.jsonl", GOOD.decode().encode("utf-16-le"), "UTF-16"),
        ("a.jsonl", b"\0" * 99, "UTF-16 or binary"),
        ("a.gz", gzip.compress(gzip.compress(GOOD, mtime=0), mtime=0), "compressed twice"),
        ("a.gz", b"\x1f\x8b" + b"x" * 50, "cannot be read"),
        ("a.zst", b"\x28\xb5\x2f\xfd" + b"x" * 50, "cannot be read"),
        ("a.zip", b"PK\3\4", "zip"),
        ("a.parquet", b"PAR1" + b"x" * 50, "damaged"),
        ("a.arrow", b"ARROW1\0\0" + b"x" * 50, "damaged"),
        ("a.arrow", b"\xff" * 50, "damaged"),
        ("a.json", b'{\n"messages": [}', "over several lines"),
        ("a.jsonl", b"garbage\n" * 3000, "none of its first 1000 rows"),
        ("a.jsonl", b'{"question": "?"}', "fit no format: question"),
    ],
)
def test_a_file_of_which_nothing_can_be_read_is_an_error(name: str, data: bytes, what: str, write: Write) -> None:
    path = write(name, data)
    error = error_of(path, max_rejects=1)
    assert what in error.what and error.where.startswith(str(path))


def test_missing_files_directories_and_other_objects_are_errors(tmp_path: Path, write: Write) -> None:
    assert "train.jsonl" in error_of(write("train.jsonl", GOOD).with_name("trian.jsonl")).hint
    assert "train.jsonl" in error_of(tmp_path).hint
    assert error_of("a\0b").where == "a\0b"
    assert error_of("x" * 9999).kind == "unreadable"
    assert error_of(tmp_path / "train.jsonl" / "x").kind == "unreadable"
    (tmp_path / "state.json").write_text('{"_data_files": [3]}')
    assert "state.json" in error_of(tmp_path).what
    for name in ("../secret.arrow", "/etc/passwd", "..", ".", "", "a/b.arrow"):
        (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
        assert "is not in it" in error_of(tmp_path).what
    for data in (3, None, ROWS[0], [3], b"x", [[], 3]):
        with pytest.raises(DataError):
            list(read(data))
    with pytest.raises(UsageError, match="sharegpt"):
        read([], input_format="share-gpt")
    with pytest.raises(UsageError):
        read([], max_rejects=2)


def test_a_dataset_that_fails_half_way_keeps_what_it_gave() -> None:
    def rows() -> Iterator[Any]:
        yield from ROWS
        raise RuntimeError("network")

    reader = read(datasets.IterableDataset.from_generator(rows))
    assert len(list(reader)) == 300 and "RuntimeError: network" in reader.rejects[0].what


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=200) | st.text("[]{}\",:\\ \nnull1messages").map(str.encode), draw=st.data())
@example(data=b"\x50\x2a\x4d\x18", draw=None)
def test_any_bytes_are_rows_rejects_or_a_chatloss_error(data: bytes, draw: Any, tmp_path: Path) -> None:
    whole = [container(ROWS[:3]) for container in CONTAINERS.values()]
    whole += [compress(GOOD * 5) for compress in COMPRESSIONS.values()] + [b"", b"[" + GOOD + b",", GOOD]
    if draw is not None:
        base = draw.draw(st.sampled_from(whole))
        at = draw.draw(st.integers(0, len(base)))
        data = base[:at] + data + base[at + draw.draw(st.integers(0, 50)) :]
    path = tmp_path / "fuzz.txt"
    path.write_bytes(data)
    for input_format in ("auto", "sharegpt", "text"):
        reader = read(path, max_rejects=1, input_format=input_format)
        try:
            n_good = len(list(reader))
        except ChatlossError as error:
            assert error.what and error.where and error.hint
        else:
            assert n_good + reader.n_rejected == reader.n_rows and all(r.what and r.hint for r in reader.rejects)


def test_reading_imports_neither_torch_nor_transformers_nor_datasets() -> None:
    code = "import sys, chatloss.reader as r; list(r.read([{'text': 'a'}])); print({'torch', 'transformers', "
    code += "'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
