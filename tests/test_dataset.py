"""Prepared directories as training data: read lazily, checked against the recipe, trained like the chats themselves."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from chatloss import dataset as datasets
from chatloss import prepare as preparing
from chatloss.config import Recipe
from chatloss.dataset import Joined, Prepared
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.errors import DataError, RecipeError
from chatloss.manifest import FORMAT
from chatloss.pipeline import examples
from chatloss.policy import Policy
from chatloss.prepare import Job, prepare
from chatloss.reader import read
from chatloss.sample import Sample

JOB = Job(str(tokenizer_directory()))
DEMO = chats_file().parent


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration's chats in many shards of several row groups each."""
    output = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparing, "shard_bytes", lambda inputs: 20_000)
        patch.setattr(datasets, "GROUP_TOKENS", 500)
        prepare([str(chats_file())], output, JOB)
    return output


@pytest.fixture(scope="module")
def encoded() -> list[list[Sample]]:
    return [made.encoding.rows for made in examples(read(str(chats_file())), JOB.encoder())]


def same(a: list[Sample], b: list[Sample]) -> bool:
    return [row.to_dict() | {"spans": row.spans} for row in a] == [row.to_dict() | {"spans": row.spans} for row in b]


def test_any_example_is_read_alone(
    directory: Path, encoded: list[list[Sample]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "KEPT_GROUPS", 2)
    monkeypatch.setattr(datasets, "KEPT_FILES", 2)
    prepared = Prepared(directory)
    assert len(prepared) == len(encoded) and len(prepared.manifest["shards"]) > 3
    for i in np.random.default_rng(0).permutation(len(encoded)).tolist():
        assert same(prepared[i], encoded[i])
    assert len(prepared._files) <= 2 and len(prepared._groups) <= 2
    assert same(prepared[-1], encoded[-1]) and [len(rows) for rows in prepared[3:5]] == [1, 1]
    with pytest.raises(IndexError):
        prepared[len(encoded)]


@pytest.mark.parametrize("export", ["rows", "labels"])
def test_every_column_is_compressed_and_ids_best(export: str, directory: Path, tmp_path: Path) -> None:
    if export == "labels":
        prepare([str(chats_file())], directory := tmp_path / "out", replace(JOB, export="labels"), max_rejects=0.1)
    group = pq.ParquetFile(next(directory.glob("shards/*.parquet"))).metadata.row_group(0)
    codecs = {column.path_in_schema: column.compression for column in map(group.column, range(group.num_columns))}
    assert set(codecs.values()) <= {"ZSTD", "SNAPPY"}
    best = {name for name, codec in codecs.items() if codec == "ZSTD"}
    assert best == ({"rest_ids.list.element"} if export == "rows" else set(codecs))


def test_rows_know_their_decoder_and_survive_pickling(directory: Path) -> None:
    prepared = Prepared(directory, JOB.encoder().decode)
    row = prepared[0][0]
    assert row.decode is not None and row.decode(row.input_ids.tolist()).startswith("<|im_start|>")
    assert len(pickle.loads(pickle.dumps(prepared))) == len(prepared)


def test_directories_are_joined(directory: Path, encoded: list[list[Sample]]) -> None:
    both = Joined([Prepared(directory), Prepared(directory)])
    assert len(both) == 2 * len(encoded)
    for i in (0, len(encoded) - 1, len(encoded), -1):
        assert same(both[i], encoded[i % len(encoded)])
    assert len(both[:3]) == 3
    with pytest.raises(IndexError):
        both[len(both)]


def test_the_totals_of_a_conversation_stand_in_each_of_its_rows(directory: Path, encoded: list[list[Sample]]) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(directory / "shards")
    totals = [sum(row.n_trained for row in rows) for rows in encoded for _ in rows]
    assert table["conversation_trained"].to_pylist() == totals


# -- training --


def recipe(train: Any, output: Path, **data: Any) -> Recipe:
    settings = {"train": train, "eval": [], **data}
    loaded = Recipe.load(DEMO / "recipe.toml", []).to_dict()
    loaded["data"] = {"train": settings.pop("train"), **settings}
    loaded["run"] |= {"steps": 3, "epochs": None, "save_every": 1, "eval_every": 0, "samples": 2}
    loaded["batch"] |= {"examples": 4}
    return Recipe.from_dict({**loaded, "output": str(output), "tokenizer": str(tokenizer_directory())})


def losses(output: Path) -> list[float]:
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_training_on_prepared_rows_is_training_on_the_chats(directory: Path, tmp_path: Path) -> None:
    from chatloss.sft import run_recipe

    run_recipe(recipe([str(chats_file())], tmp_path / "chats"), quiet=True)
    run_recipe(recipe([str(directory)], tmp_path / "rows"), quiet=True)
    assert losses(tmp_path / "chats") == losses(tmp_path / "rows") and len(losses(tmp_path / "rows")) == 3
    [one], [two] = ((tmp_path / name / "model").glob("*.safetensors") for name in ("chats", "rows"))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("data", "named"),
    [({"turns": "last"}, "policy.turns was 'all' and is 'last'"),
     ({"template_kwargs": {"enable_thinking": False}}, "template_kwargs.enable_thinking")],
)
def test_choices_that_the_rows_were_not_made_with_are_refused(
    directory: Path, data: Any, named: str, tmp_path: Path
) -> None:
    from chatloss.sft import encode_files, recipe_encoder

    asked = recipe([str(directory)], tmp_path, **data)
    with pytest.raises(DataError, match=named) as caught:
        encode_files(asked, recipe_encoder(asked), asked.data.train)
    assert caught.value.where == str(directory)


def test_another_tokenizer_is_refused(directory: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tokenizer_directory(), other)
    spec = json.loads((other / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["rstrip"] = True
    (other / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(DataError, match=r"tokenizer.sha256"):
        Prepared(directory).check_made_with(Job(str(other)).encoder())


def test_chats_beside_prepared_rows_are_refused(directory: Path, tmp_path: Path) -> None:
    from chatloss.sft import encode_files, recipe_encoder

    asked = recipe([str(directory), str(chats_file())], tmp_path)
    with pytest.raises(RecipeError, match="chats beside prepared"):
        encode_files(asked, recipe_encoder(asked), asked.data.train)


def test_a_policy_that_the_rows_were_made_with_is_fine(tmp_path: Path) -> None:
    job = Job(JOB.tokenizer, policy=Policy(turns="last"))
    prepare([str(chats_file())], tmp_path / "out", job)
    Prepared(tmp_path / "out").check_made_with(JOB.encoder(), policy={"turns": "last"})


# -- directories of strangers --


def edited(directory: Path, copy: Path, **changes: Any) -> Path:
    """A copy with another manifest."""
    shutil.copytree(directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return copy


def test_a_damaged_shard_is_named(directory: Path, tmp_path: Path) -> None:
    copy = edited(directory, tmp_path / "copy")
    shard = copy / "shards" / "000000.parquet"
    whole = shard.read_bytes()
    for at in range(8, len(whole) - 8, len(whole) // 40):
        shard.write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
        try:
            rows = [row.to_dict() for i in range(8) for row in Prepared(copy)[i]]
        except DataError as error:
            assert error.where == str(shard) and error.hint
        else:  # a byte that nothing reads, such as one of the statistics of another column
            assert rows == [row.to_dict() for i in range(8) for row in Prepared(directory)[i]]
    for damage in (b"", whole[:-1], whole + b"x", b"PAR1" * (len(whole) // 4)):
        shard.write_bytes(damage)
        with pytest.raises(DataError, match="cannot be read") as caught:
            Prepared(copy)[0]
        assert caught.value.where == str(shard)


def test_a_row_that_is_none_is_refused(directory: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for column, value in (("rest_span_ends", 10_000), ("rest_span_ends", 0), ("rest_span_reasons", 99),
                          ("rest_ids", -5)):
        copy = edited(directory, tmp_path / f"{column} {value}")
        shard = copy / "shards" / "000000.parquet"
        table = pq.read_table(shard)
        at = table.schema.get_field_index(column)
        values = table[column].to_pylist()
        values[0][-1] = value
        field = table.schema.field(at)
        pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), shard)
        shards = json.loads((copy / "manifest.json").read_text())["shards"]
        shards[0]["bytes"] = shard.stat().st_size
        copy = edited(copy, tmp_path / f"{column} {value} sized", shards=shards)
        with pytest.raises(DataError, match="cannot be read"):
            Prepared(copy)[0]


def test_a_manifest_reaches_nothing_outside_its_directory(directory: Path, tmp_path: Path) -> None:
    shards = Prepared(directory).manifest["shards"]
    for i, name in enumerate(("../secret.parquet", str(directory / shards[0]["file"]), "shards/../x", 3, None)):
        copy = edited(directory, tmp_path / str(i), shards=[{**shards[0], "file": name}, *shards[1:]])
        with pytest.raises(DataError, match="no manifest"):
            Prepared(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"job": 3}', '{"job": {}, "shards": [], "counts": {}}'])
def test_what_is_no_manifest_is_told(directory: Path, tmp_path: Path, text: str) -> None:
    copy = edited(directory, tmp_path / "copy")
    (copy / "manifest.json").write_text(text)
    with pytest.raises(DataError, match="no manifest") as caught:
        Prepared(copy)
    assert caught.value.where == str(copy / "manifest.json")


@pytest.mark.parametrize("version", [1, FORMAT - 1, FORMAT + 1])
def test_rows_of_another_format_are_to_be_prepared_again(directory: Path, tmp_path: Path, version: int) -> None:
    job = {**Prepared(directory).manifest["job"], "format": version}
    with pytest.raises(DataError, match=f"have format {version}, and this version reads {FORMAT}") as caught:
        Prepared(edited(directory, tmp_path / "copy", job=job, counts={}))
    assert "--fresh" in caught.value.hint
