"""The trainer end to end on tiny models: it learns, it says what it does, and it refuses what does not fit."""

from __future__ import annotations

import errno
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatloss import checkpoint
from chatloss.config import Optim, Recipe
from chatloss.errors import ChatlossError, RecipeError
from chatloss.sample import Sample
from chatloss.trainer import TrainResult, learning_rate, train
from tests.synthetic import FAMILIES, chat, chats, decode, tokenizer_files


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(output: Path, examples: Any = None, evals: Any = None, fresh: bool = False, prompts: Any = (),
        **changes: Any) -> TrainResult:
    recipe = Recipe.from_dict({
        "model": FAMILIES["llama"], "init": "random", "output": str(output), "batch": {"examples": 4},
        "optim": {"lr": 0.01, "schedule": "constant"}, "run": {"steps": 3, "save_every": 2}, **changes,
    })
    return train(recipe, chats(10) if examples is None else examples, evals, tokenizer_files=tokenizer_files,
                 decode=decode, prompts=prompts, stop_ids=[5], quiet=True, fresh=fresh)


def records(result: TrainResult, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, result.metrics.read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def repeating() -> list[list[Sample]]:
    """Chats in which every answer is its question again."""
    out = []
    for rows in chats(24, most=9):
        [row] = rows
        ids = row.input_ids.copy()
        ids[:] = int(ids[0])
        out.append([Sample(ids, row.spans, row.outcomes, row.source)])
    return out


def test_it_learns_and_the_model_that_it_saves_has_learned(tmp_path: Path) -> None:
    known = int(repeating()[0][0].input_ids[0])
    result = run(tmp_path / "a", repeating(), repeating()[:4], prompts=[[known] * 3],
                 run={"steps": 50, "samples": 1}, optim={"lr": 0.02})
    evals = records(result, "eval")
    assert evals[0]["loss"] > 4
    assert evals[-1]["loss"] < 0.7
    assert result.eval["loss"] == evals[-1]["loss"]
    assert result.samples[0].split()[:3] == [str(known)] * 3
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(result.model)
    ids = torch.full((1, 6), known)
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss) < 1.5
    assert json.loads((result.model / "generation_config.json").read_text())["eos_token_id"][0] == 5
    assert (result.model / "tokenizer.json").exists()


def test_the_loss_it_logs_is_the_evaluated_loss_of_the_same_rows(tmp_path: Path) -> None:
    # trl#6668; FIELD: 7.23 logged, 5.69 true.
    examples = chats(4)
    result = run(tmp_path / "a", examples, examples, run={"steps": 1, "eval_every": 1}, loss={"reduction": "turn"})
    before = records(result, "eval")[0]["loss"]
    assert records(result, "step")[0]["loss"] == pytest.approx(before, rel=1e-6)


def test_evaluation_tells_reasons_roles_and_turns_apart(tmp_path: Path) -> None:
    result = run(tmp_path / "a", None, chats(5), run={"steps": 1})
    values = result.eval
    assert {"loss", "trained", "untrained", "reason/content", "reason/stop", "reason/other_role", "role/assistant",
            "role/others", "turn/1", "turn/2"} <= values.keys()
    assert values["loss"] == pytest.approx(values["trained"])
    rows = [row for rows in chats(5) for row in rows]
    assert values["tokens"] == sum(row.n_trained for row in rows)
    assert all(math.isfinite(value) for value in values.values())


def test_each_step_reports_what_it_cost(tmp_path: Path) -> None:
    for step in records(run(tmp_path / "a", batch={"examples": 4, "micro_rows": 2, "packing": "none"}), "step"):
        assert step["tokens"] == step["denominator"]
        assert step["inputs"] <= step["computed"]
        assert step["seconds"] > 0


def test_the_shape_of_execution_changes_parameters_by_float_noise_only(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    shapes: list[dict[str, Any]] = [
        {"batch": {"examples": 5, "micro_tokens": 4000}}, {"batch": {"examples": 5, "micro_tokens": 90}},
        {"batch": {"examples": 5, "micro_rows": 1, "packing": "none"}},
    ]
    common: dict[str, Any] = {"optim": {"name": "sgd", "lr": 0.5, "schedule": "constant"}}
    models = [load_file(run(tmp_path / str(i), **common, **shape).model / "model.safetensors")
              for i, shape in enumerate(shapes)]
    for other in models[1:]:
        for name, value in models[0].items():
            np.testing.assert_allclose(other[name], value, atol=2e-6)


def test_rows_are_padded_and_it_is_said_where_packing_is_not_isolated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatloss.trainer.isolation_difference", lambda *_: "a neighbour's content changes it")
    result = run(tmp_path / "a")
    assert any("padded" in note and "neighbour" in note for note in result.notes)
    assert any("padded" in record["text"] for record in records(result, "notice"))


def test_a_model_with_soft_capping_uses_its_own_logits_and_says_so(tmp_path: Path) -> None:
    result = run(tmp_path / "a", model=FAMILIES["gemma2"])
    assert any("own logits" in note for note in result.notes)


def test_a_changed_recipe_or_changed_data_is_refused_unless_fresh(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(RecipeError, match=r"optim.lr: 0.01 -> 0.5") as error:
        run(tmp_path / "a", optim={"lr": 0.5, "schedule": "constant"})
    assert "--fresh" in error.value.hint
    with pytest.raises(RecipeError, match="encoded training data"):
        run(tmp_path / "a", chats(10, seed=4))
    result = run(tmp_path / "a", chats(10, seed=4), fresh=True)
    assert [r["step"] for r in records(result, "step")] == [1, 2, 3]


def test_a_longer_log_or_another_save_interval_is_no_other_recipe(tmp_path: Path) -> None:
    first = run(tmp_path / "a").model.joinpath("model.safetensors").read_bytes()
    again = run(tmp_path / "a", run={"steps": 3, "save_every": 1, "log": ["tensorboard"]})
    assert again.model.joinpath("model.safetensors").read_bytes() == first


def test_ids_that_the_model_does_not_have_are_refused_before_the_first_step(tmp_path: Path) -> None:
    small = {**FAMILIES["llama"], "vocab_size": 20}
    with pytest.raises(RecipeError, match="20 embeddings") as error:
        run(tmp_path / "a", model=small)
    assert "tokenizer" in error.value.hint
    assert not (tmp_path / "a").exists()


def test_data_that_trains_nothing_and_rows_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    untrained = [chat([(3, 4)], seed=1, weights=[0.0])]
    with pytest.raises(RecipeError, match="no token of the data is trained"):
        run(tmp_path / "a", untrained)
    with pytest.raises(RecipeError, match="no token of the data is trained"):
        run(tmp_path / "a", [])
    with pytest.raises(RecipeError, match="does not fit a bin of 16"):
        run(tmp_path / "a", batch={"examples": 4, "micro_tokens": 16})


def test_what_is_missing_from_a_recipe_is_told(tmp_path: Path) -> None:
    for change, what in (({"objective": "dpoo"}, "is not known"),
                         ({"run": {"log": ["w&b"]}}, "unknown logger"), ({"run": {"log": ["wandb"]}}, "not installed")):
        with pytest.raises(RecipeError, match=what):
            run(tmp_path / "a", **change)
    with pytest.raises(RecipeError, match="no output"):
        train(Recipe(), chats(2), tokenizer_files=tokenizer_files, decode=decode)


def test_a_step_that_trains_nothing_is_skipped_and_counted(tmp_path: Path) -> None:
    examples = [*chats(2), *[chat([(3, 4)], seed=100 + i, weights=[0.0]) for i in range(4)]]
    result = run(tmp_path / "a", examples, batch={"examples": 1}, run={"epochs": 1})
    assert (result.steps, result.skipped) == (6, 4)
    assert result.notes == ("4 of 6 conversations train nothing and count in no mean",)
    assert sum(r["skipped"] for r in records(result, "step")) == 4


def test_a_non_finite_loss_stops_with_the_last_checkpoint_intact(tmp_path: Path) -> None:
    with pytest.raises(ChatlossError, match="not finite") as error:
        run(tmp_path / "a", optim={"name": "sgd", "lr": 1e30, "schedule": "constant", "max_grad_norm": 0},
            run={"steps": 5, "save_every": 1})
    assert error.value.kind == "not finite"
    found = checkpoint.latest(tmp_path / "a" / "checkpoints")
    assert found is not None
    assert checkpoint.state_of(found)["step"] >= 1


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = checkpoint._save_tensors, iter(range(100))

    def full(*args: Any) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "_save_tensors", full)
    with pytest.raises(RecipeError, match="No space left") as error:
        run(tmp_path / "a", run={"steps": 3, "save_every": 1})
    assert "continues" in error.value.hint
    kept = [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()]
    assert kept == ["step-00000001"]
    monkeypatch.undo()
    again = run(tmp_path / "a", run={"steps": 3, "save_every": 1})
    whole = run(tmp_path / "b", run={"steps": 3, "save_every": 1})
    assert (again.model / "model.safetensors").read_bytes() == (whole.model / "model.safetensors").read_bytes()


def test_fresh_removes_nothing_before_everything_that_could_be_refused_has_been(tmp_path: Path) -> None:
    before = run(tmp_path / "a").model.joinpath("model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="embeddings"):
        run(tmp_path / "a", model={**FAMILIES["llama"], "vocab_size": 20}, fresh=True)
    assert (tmp_path / "a" / "model" / "model.safetensors").read_bytes() == before
    assert checkpoint.latest(tmp_path / "a" / "checkpoints") is not None


def test_an_output_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file")
    with pytest.raises(RecipeError, match="cannot write the metrics"):
        run(tmp_path / "a")


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    run(tmp_path / "a", run={"steps": 6, "save_every": 1, "keep": 2})
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_a_checkpoint_holds_nothing_pickled(tmp_path: Path) -> None:
    result = run(tmp_path / "a")
    suffixes = {p.suffix for p in result.model.parent.rglob("*") if p.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors"}


def test_adapters_are_trained_saved_and_continued(tmp_path: Path) -> None:
    base = run(tmp_path / "base").model
    common: dict[str, Any] = {"model": str(base), "init": "pretrained", "lora": {"rank": 4}}
    whole = run(tmp_path / "whole", **common, run={"steps": 4, "save_every": 1})
    assert (whole.model / "adapter_model.safetensors").exists()
    assert not (whole.model / "model.safetensors").exists()
    import shutil

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for gone in ("model", "checkpoints/step-00000004"):
        shutil.rmtree(tmp_path / "cut" / gone)
    cut = run(tmp_path / "cut", **common, run={"steps": 4, "save_every": 1})
    name = "adapter_model.safetensors"
    assert (cut.model / name).read_bytes() == (whole.model / name).read_bytes()


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_schedules_warm_up_reach_the_rate_and_end_where_they_say(schedule: Any) -> None:
    optim = Optim(lr=2.0, schedule=schedule, warmup=0.1, min_lr=0.1, decay=0.2)
    rates = [learning_rate(step, 100, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * k for k in range(1, 11)])
    assert max(rates) == 2.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert min(rates[10:]) >= 0.2
    if schedule == "constant":
        assert set(rates[10:]) == {2.0}
    else:
        assert rates[-1] < 0.4
    if schedule == "wsd":
        assert set(rates[10:80]) == {2.0}
        assert rates[81] < 2.0


def test_bf16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    result = run(tmp_path / "a", run={"steps": 2, "dtype": "bfloat16"})
    assert {v.dtype for v in load_file(result.model / "model.safetensors").values()} == {np.dtype("float32")}
