"""Preference rows in prepared directories: pairs and judged answers come back as they were, and train the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatloss import dataset as datasets
from chatloss import prepare as preparing
from chatloss.chat import Label, Preference
from chatloss.config import Recipe
from chatloss.dataset import Prepared, PreparedPairs, prepared_answers
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.errors import DataError
from chatloss.pairs import Answer
from chatloss.pipeline import answers, pairs
from chatloss.prepare import Job, prepare
from chatloss.reader import read
from chatloss.sft import encode_files, encode_preferences, recipe_encoder, run_recipe

JOB = Job(str(tokenizer_directory()))
PAIRS = chats_file().parent / "preferences.jsonl"
MODEL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
         "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several shards of several row groups."""
    monkeypatch.setattr(preparing, "shard_bytes", lambda inputs: 5_000)
    monkeypatch.setattr(datasets, "GROUP_TOKENS", 500)


def same(one: Answer, other: Answer) -> bool:
    rows = [[row.to_dict() | {"spans": row.spans} for row in answer.rows] for answer in (one, other)]
    return rows[0] == rows[1] and one.desirable == other.desirable and one.source == other.source


def judged_file(path: Path) -> Path:
    rows = []
    for i, row in enumerate(read(str(PAIRS))):
        assert isinstance(row, Preference)
        chat = row.chosen if i % 3 else row.rejected
        rows.append({"messages": [message.to_dict() for message in chat.messages], "label": bool(i % 3)})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def recipe(data: Path, output: Path, objective: str) -> Recipe:
    return Recipe.from_dict({
        "objective": objective, "model": MODEL, "init": "random", "tokenizer": JOB.tokenizer, "output": str(output),
        "data": {"train": [str(data)]}, "batch": {"examples": 8}, "run": {"steps": 3},
    })


def test_pairs_come_back_as_they_were_in_any_order(tmp_path: Path) -> None:
    manifest = prepare([str(PAIRS)], tmp_path / "out", JOB)
    made = PreparedPairs(Prepared(tmp_path / "out"))
    want = list(pairs(read(str(PAIRS)), JOB.encoder()))
    assert len(made) == len(want) == manifest["counts"]["pairs"] == 64 and len(manifest["shards"]) > 2
    assert manifest["counts"]["conversations"] == manifest["counts"]["judged"] == 0
    for i in reversed(range(len(want))):
        assert same(made[i].chosen, want[i].chosen) and same(made[i].rejected, want[i].rejected)
        assert made[i].source == want[i].source
    assert len(made[2:5]) == 3 and same(made[-1].chosen, want[-1].chosen)
    assert Prepared(tmp_path / "out")[0][0].source == want[0].chosen.source == f"{PAIRS}:1 chosen"


def test_judged_answers_come_back_as_they_were_and_pairs_give_two(tmp_path: Path) -> None:
    path = judged_file(tmp_path / "judged.jsonl")
    assert all(isinstance(row, Label) for row in read(str(path)))
    for name, data in (("judged", path), ("pairs", PAIRS)):
        counts = prepare([str(data)], tmp_path / name, JOB)["counts"]
        made = list(prepared_answers(Prepared(tmp_path / name)))
        want = list(answers(read(str(data)), JOB.encoder()))
        assert counts[name] == 64 and len(made) == len(want) == (64 if name == "judged" else 128)
        assert all(same(one, other) for one, other in zip(made, want, strict=True))


@pytest.mark.parametrize("objective", ["simpo", "kto"])
def test_training_on_prepared_preferences_is_training_on_the_rows(objective: str, tmp_path: Path) -> None:
    prepare([str(PAIRS)], tmp_path / "prepared", JOB)
    for name, data in (("rows", PAIRS), ("ready", tmp_path / "prepared")):
        run_recipe(recipe(data, tmp_path / name, objective), quiet=True)
    [one], [two] = ((tmp_path / name / "model").glob("*.safetensors") for name in ("rows", "ready"))
    assert one.read_bytes() == two.read_bytes()


def test_a_directory_of_another_kind_is_refused(tmp_path: Path) -> None:
    prepare([str(PAIRS)], tmp_path / "pairs", JOB)
    prepare([str(chats_file())], tmp_path / "chats", JOB)
    for objective, data, held in (("sft", "pairs", "64 pairs"), ("dpo", "chats", r"\d+ conversations"),
                                  ("kto", "chats", r"\d+ conversations")):
        asked = recipe(tmp_path / data, tmp_path / "out", objective)
        encode: Any = encode_files if objective == "sft" else encode_preferences
        with pytest.raises(DataError, match=f"holds {held}, not") as caught:
            encode(asked, recipe_encoder(asked), asked.data.train)
        assert caught.value.where == str(tmp_path / data) and caught.value.hint


def test_what_is_no_pair_is_a_reject_with_its_reason_and_the_sums_match(tmp_path: Path) -> None:
    lines = PAIRS.read_text().splitlines()
    tie = json.loads(lines[0])
    tie["rejected"] = tie["chosen"]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:9], json.dumps(tie)]))
    counts = prepare([str(tmp_path / "data.jsonl")], tmp_path / "out", JOB, max_rejects=0.5)["counts"]
    assert counts["records"] == 10 == counts["pairs"] + sum(counts["rejected"].values()) and counts["pairs"] == 9
    [reject] = map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())
    assert reject["kind"] == "tie" and "data.jsonl:10" in reject["where"]


def test_labels_cannot_hold_a_preference(tmp_path: Path) -> None:
    job = Job(JOB.tokenizer, export="labels")
    with pytest.raises(DataError, match="preference row has no place"):
        prepare([str(PAIRS)], tmp_path / "out", job)
