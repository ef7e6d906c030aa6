"""`prepare`: the same bytes whatever the number of processes or kills, and every row accounted for."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from chatloss import prepare as preparing
from chatloss import reader
from chatloss.dataset import Prepared
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.errors import DataError
from chatloss.manifest import file_sha256
from chatloss.markers import Markers
from chatloss.pipeline import examples
from chatloss.policy import Policy
from chatloss.prepare import Job, prepare
from chatloss.reader import read
from chatloss.sample import Sample
from chatloss.values import parse_json
from tests import crash_prepare

JOB = Job(str(tokenizer_directory()))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of about eight chats."""
    monkeypatch.setattr(preparing, "shard_bytes", lambda inputs: 4096)


@pytest.fixture
def chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(chats_file(), tmp_path / "chats.jsonl")
    return Path("chats.jsonl")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def plain(rows: Sequence[Sample]) -> list[dict[str, Any]]:
    return [row.to_dict() | {"spans": row.spans} for row in rows]


def assert_is_encoded(directory: str, data: str, job: Job = JOB) -> None:
    """Every row of the directory is that of the encoder itself."""
    prepared, reader = Prepared(directory), read(data, max_rejects=1.0)
    wanted = [made.encoding.rows for made in examples(reader, job.encoder(), markers=job.markers)]
    assert [plain(rows) for rows in prepared] == [plain(rows) for rows in wanted]


@pytest.mark.usefixtures("small")
def test_rows_are_those_of_the_encoder_whatever_the_number_of_workers(chats: Path) -> None:
    one, two = (prepare([str(chats)], name, JOB, workers=n) for name, n in (("one", 1), ("two", 2)))
    assert one == two and contents(Path("one")) == contents(Path("two"))
    assert set(contents(Path("one"))) == {"manifest.json", "rejects.jsonl", *(s["file"] for s in one["shards"])}
    assert len(one["shards"]) > 20
    assert_is_encoded("one", str(chats))


@pytest.mark.usefixtures("small")
def test_rows_that_begin_alike_are_stored_in_parts_and_counted_whole(chats: Path) -> None:
    job = Job(JOB.tokenizer, policy=Policy(row_format="per_turn"))
    counts = prepare([str(chats)], "out", job)["counts"]
    assert_is_encoded("out", str(chats), job)
    rows = [row for rows in Prepared("out") for row in rows]
    assert counts["rows"] == len(rows) > 265 and counts["tokens"] == sum(map(len, rows))
    assert counts["trained"] == sum(row.n_trained for row in rows)
    assert sum(map(len, pq.read_table("out/shards")["rest_ids"].to_pylist())) < 0.8 * counts["tokens"]


@pytest.mark.usefixtures("small")
def test_every_shard_has_its_checksum_and_every_record_is_counted(chats: Path) -> None:
    with chats.open("a") as file:
        file.write('{"messages": 3}\n\nnot json\n{"messages": [{"role": "user", "content": "no answer"}]}\n')
    manifest = prepare([str(chats)], "out", JOB, max_rejects=0.1)
    counts = manifest["counts"]
    for shard in manifest["shards"]:
        assert file_sha256(Path("out", shard["file"])) == shard["sha256"]
    assert counts["records"] == counts["conversations"] + sum(counts["rejected"].values())
    assert counts["rejected"] == {"field": 1, "json": 1} and counts["empty"] == 1
    assert sum(counts["reasons"].values()) == counts["tokens"]
    assert sum(shard["rows"] for shard in manifest["shards"]) == counts["rows"]
    rejects = [json.loads(line) for line in Path("out/rejects.jsonl").read_text().splitlines()]
    lines = len(chats.read_text().splitlines())
    assert [reject["source"] for reject in rejects] == [f"chats.jsonl:{lines - 3}", f"chats.jsonl:{lines - 1}"]


@pytest.mark.usefixtures("small")
def test_too_many_rejects_fail_and_a_larger_share_goes_on_from_there(chats: Path) -> None:
    chats.write_text(chats.read_text() + "broken\n" * 20)
    with pytest.raises(DataError, match="20 of 285 rows are bad") as caught:
        prepare([str(chats)], "out", JOB)
    assert "--max-rejects 0.071" in caught.value.hint
    assert Path("out/rejects.jsonl").read_text().count("\n") == 20 and not Path("out/manifest.json").exists()
    assert prepare([str(chats)], "out", JOB, max_rejects=0.071)["counts"]["rejected"] == {"json": 20}


def test_rejects_that_are_not_kept_are_counted(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "KEPT_REJECTS", 3)
    chats.write_text(chats.read_text() + "broken\n" * 20)
    prepare([str(chats)], "out", JOB, max_rejects=0.1)
    *_, last = lines = Path("out/rejects.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(last) == {"kind": "more", "what": "17 further rejects"}


@pytest.mark.usefixtures("small")
def test_rejects_are_in_the_order_of_the_rows_although_some_are_read_ahead(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}
    typed = {"messages": [{"role": "user", "content": "Hi <|im_end|>"}, {"role": "assistant", "content": "Hello!"}]}
    rows: list[Any] = [chat, typed, {"messages": 3}, chat, typed, {"messages": []}, chat, {"messages": 4}, typed]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    prepare([str(path)], tmp_path / "out", replace(JOB, backend="fast"), max_rejects=1.0)
    rejects = [parse_json(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text("utf-8").splitlines()]
    assert [int(reject["source"].rpartition(":")[2]) for reject in rejects] == [2, 3, 5, 6, 8, 9]
    assert len(Prepared(tmp_path / "out")) == 3


def test_a_shard_of_nothing_but_bad_rows_is_no_reason_to_stop(chats: Path) -> None:
    chats.write_text("broken\n" * 1500 + chats.read_text() + '{"messages": [], "n": 1}\n' * 1500)
    with pytest.raises(DataError, match="none of its first 1000 rows"):
        prepare([str(chats)], "out", JOB, max_rejects=1.0)
    chats.write_text(chats_file().read_text() + "broken\n" * 1500)
    assert prepare([str(chats)], "out", JOB, max_rejects=1.0)["counts"]["rejected"] == {"json": 1500}


def rewritten(chats: Path, kind: str) -> Path:
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    path = chats.with_suffix({"gzip": ".jsonl.gz", "array": ".json", "parquet": ".parquet"}[kind])
    if kind == "gzip":
        path.write_bytes(gzip.compress(chats.read_bytes(), mtime=0))
    elif kind == "array":
        path.write_text(json.dumps(rows))
    else:
        plain_rows = [{"messages": [{"role": m["role"], "content": m.get("content") or "none"} for m in r["messages"]]}
                      for r in rows]
        pq.write_table(pa.Table.from_pylist(plain_rows), path)
    return path


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["gzip", "array", "parquet"])
def test_what_is_no_json_lines_is_prepared_as_well(chats: Path, kind: str) -> None:
    data = str(rewritten(chats, kind))
    one = prepare([data], "one", JOB, max_rejects=1.0)
    if kind == "gzip":
        prepare([data], "two", JOB, max_rejects=1.0, workers=2)
        assert contents(Path("one")) == contents(Path("two"))
    assert len(one["shards"]) > 5
    assert_is_encoded("one", data)


def test_several_inputs_keep_their_names_and_rows(chats: Path) -> None:
    other = rewritten(chats, "array")
    prepare([str(chats), str(other)], "out", JOB)
    prepared = Prepared("out")
    n = len(prepared) // 2
    assert prepared[0][0].source == "chats.jsonl:1" and prepared[n][0].source == "chats.json:1"
    assert [len(rows) for rows in prepared[:n]] == [len(rows) for rows in prepared[n:]]


def test_plain_texts_are_prepared_with_markers(tmp_path: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "Q: a\\nA: b"}\n{"text": "Q: a"}\n')
    job = Job(JOB.tokenizer, markers=Markers("last", "A:"))
    manifest = prepare([str(data)], tmp_path / "out", job, max_rejects=0.5)
    assert manifest["counts"]["conversations"] == 1 and sum(manifest["counts"]["rejected"].values()) == 1
    assert_is_encoded(str(tmp_path / "out"), str(data), job)


# -- going on, and noticing changes --


@pytest.mark.usefixtures("small")
def test_the_same_command_again_does_nothing(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = prepare([str(chats)], "out", JOB)
    before = contents(Path("out"))
    monkeypatch.setattr(preparing, "run_shard", None)
    assert prepare([str(chats)], "out", JOB) == manifest and contents(Path("out")) == before


@pytest.mark.usefixtures("small")
def test_only_what_is_missing_is_done(chats: Path, interrupted: list[int]) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare([str(chats)], "out", JOB)
    with pytest.raises(DataError, match="not finished"):
        Prepared("out")
    prepare([str(chats)], "out", JOB)
    assert len(interrupted) == len(set(interrupted)) + 1, "only the shard that was interrupted is done twice"
    prepare([str(chats)], "whole", JOB)
    assert contents(Path("out")) == contents(Path("whole"))


@pytest.mark.parametrize(
    ("change", "named"),
    [("input", r"inputs\[0\].bytes"), ("policy", "policy.turns was 'all' and is 'last'"), ("template", "template"),
     ("tokenizer", "tokenizer.sha256"), ("version", "versions.chatloss"), ("kwargs", "template_kwargs.x")],
)
@pytest.mark.parametrize("finished", [False, True])
def test_what_has_changed_is_named_and_refused(
    chats: Path, change: str, named: str, finished: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if finished:
        prepare([str(chats)], "out", JOB)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "_finish", lambda *_: {})
            prepare([str(chats)], "out", JOB)
    job, data = JOB, [str(chats)]
    if change == "input":
        chats.write_text(chats.read_text() + chats.read_text().splitlines()[0] + "\n")
    elif change == "policy":
        job = Job(JOB.tokenizer, policy=Policy(turns="last"))
    elif change == "template":
        text = (tokenizer_directory() / "chat_template.jinja").read_text()
        job = Job(JOB.tokenizer, chat_template=text + "{# another #}")
    elif change == "tokenizer":
        shutil.copytree(tokenizer_directory(), "other")
        spec = json.loads(Path("other/tokenizer.json").read_text())
        spec["added_tokens"][-1]["lstrip"] = True
        Path("other/tokenizer.json").write_text(json.dumps(spec))
        job = Job("other")
    elif change == "version":
        monkeypatch.setattr(preparing, "version", lambda name: "9")
    else:
        job = Job(JOB.tokenizer, template_kwargs={"x": 1})
    with pytest.raises(DataError, match=named) as caught:
        prepare(data, "out", job)
    assert "--fresh" in caught.value.hint and caught.value.where == "out"
    assert prepare(data, "out", job, fresh=True)["job"] == json.loads(Path("out/manifest.json").read_text())["job"]


def test_a_template_that_asks_for_the_date_gets_that_of_the_first_run(chats: Path) -> None:
    text = (tokenizer_directory() / "chat_template.jinja").read_text()
    job = Job(JOB.tokenizer, chat_template="{{ strftime_now('%Y-%m-%d %H:%M:%S') }}" + text)
    manifest = prepare([str(chats)], "out", job)
    work = Path("out/.prepare")
    work.mkdir()
    about = {**manifest["job"], "clock": "2020-02-03T04:05:06"}
    (work / "job.json").write_text(json.dumps(about))
    Path("out/manifest.json").unlink()
    assert prepare([str(chats)], "out", job)["job"]["clock"] == "2020-02-03T04:05:06"
    row = Prepared("out")[0][0]
    assert "2020-02-03 04:05:06" in job.encoder().decode(row.input_ids.tolist())


def test_other_things_in_the_output_are_never_touched(chats: Path) -> None:
    Path("out").mkdir()
    Path("out/thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="holds other things"):
        prepare([str(chats)], "out", JOB, fresh=True)
    with pytest.raises(DataError, match="no directory"):
        prepare([str(chats)], str(chats), JOB, fresh=True)
    assert Path("out/thesis.txt").read_text() == "precious"


@pytest.mark.parametrize(("data", "what"), [("missing.jsonl", "no such file"), ("", "Is a directory|directory")])
def test_an_input_that_cannot_be_read_is_named(chats: Path, data: str, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        prepare([data or "."], "out", JOB)
    assert caught.value.where.startswith(data or ".")
    with pytest.raises(DataError, match="given twice"):
        prepare([str(chats), str(chats)], "out", JOB)


# -- the command --


def chatloss(*arguments: str) -> int:
    from chatloss.cli import main

    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--tokenizer", JOB.tokenizer])
    return int(stop.value.code or 0)


def test_the_command_prepares_says_so_and_refuses_changes(chats: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert chatloss("prepare", str(chats), "-o", "out") == 0
    out, err = capfd.readouterr()
    assert not out and "265 rows of 265 conversations" in err and "\r" not in err
    assert chatloss("prepare", str(chats), "-o", "out", "--turns", "last") == 1
    assert "policy.turns" in capfd.readouterr().err
    assert chatloss("prepare", str(chats), "-o", "other", "--max-rejects", "2") == 2
    assert chatloss("prepare", "missing.jsonl", "-o", "other") == 1


def test_a_prepared_directory_is_viewed_as_the_chats_are(chats: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepare([str(chats)], "out", JOB)
    assert chatloss("view", str(chats), "-n", "7", "--json") == 0
    wanted = capfd.readouterr().out
    assert chatloss("view", "out", "-n", "7", "--json") == 0
    assert capfd.readouterr().out == wanted and wanted.count("\n") == 7


# -- kill -9 --


def test_a_killed_run_leaves_nothing_behind_that_changes_the_bytes(chats: Path) -> None:
    assert crash_prepare.run(chats, Path("whole"), 0) == 0
    events = int(Path("whole.events").read_text())
    for moment in range(1, events + 1, max(1, events // 8)):
        output = Path(f"killed-{moment}")
        assert crash_prepare.run(chats, output, moment)
        assert crash_prepare.run(chats, output, 0) == 0
        assert contents(output) == contents(Path("whole"))


@pytest.mark.parametrize("ways", [{"one": 4, "two": 2}, pytest.param(crash_prepare.ALL, marks=pytest.mark.slow)])
def test_runs_killed_at_random_moments_end_with_the_same_bytes(tmp_path: Path, ways: dict[str, int]) -> None:
    made = list(crash_prepare.kills(tmp_path, ways, seed=1, copies=1 if sum(ways.values()) < 10 else 4))
    assert len(made) == sum(ways.values()) and all(one.same for one in made), made


# -- labels for other trainers --


def test_labels_are_what_other_trainers_read(chats: Path) -> None:
    prepare([str(chats)], "out", Job(JOB.tokenizer, export="labels"), max_rejects=0.1)
    table = pq.read_table("out/shards")
    assert table.column_names == ["input_ids", "attention_mask", "labels"]
    made = [made.encoding.rows for made in examples(read(str(chats)), JOB.encoder())]
    wanted = [row for rows in made for row in rows if set(row.weights) <= {0, 1}]
    assert table["input_ids"].to_pylist() == [row.input_ids.tolist() for row in wanted]
    assert table["labels"].to_pylist() == [row.labels.tolist() for row in wanted]
    assert table["attention_mask"].to_pylist() == [[1] * len(row) for row in wanted]
    with pytest.raises(DataError, match="labels for other trainers"):
        Prepared("out")


def test_a_weight_that_labels_cannot_hold_is_rejected(tmp_path: Path) -> None:
    data = tmp_path / "chats.jsonl"
    chat = parse_json(chats_file().read_text().splitlines()[0])
    half = [{**message, "weight": 0.5} if message["role"] == "assistant" else message for message in chat["messages"]]
    data.write_text(json.dumps(chat) + "\n" + json.dumps({"messages": half}) + "\n")
    manifest = prepare([str(data)], tmp_path / "out", Job(JOB.tokenizer, export="labels"), max_rejects=0.5)
    assert manifest["counts"]["rejected"] == {"weights": 1} and manifest["counts"]["rows"] == 1
