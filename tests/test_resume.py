"""A run that is killed at any moment and started again ends in the same bytes as one that was never killed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.crash import RECIPE, outcome, run
from tests.synthetic import FAMILIES


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run(output) == 0
    return output


def killed_and_continued(output: Path, kill_at: int, ranks: int = 1) -> None:
    assert run(output, kill_at, ranks) == signal.SIGKILL
    assert run(output, 0, ranks) == 0


@pytest.mark.parametrize("share", [0.02, 0.2, 0.35, 0.5, 0.68, 0.83, 0.97])
def test_kill_9_and_the_same_command_again_give_the_same_bytes(whole: Path, tmp_path: Path, share: float) -> None:
    events = int((whole / "events.0").read_text())
    assert events > 100
    killed_and_continued(tmp_path / "run", max(1, round(share * events)))
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.slow
def test_kill_9_at_every_event_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    for kill_at in range(1, int((whole / "events.0").read_text()) + 1):
        killed_and_continued(tmp_path / f"run{kill_at}", kill_at)
        assert outcome(tmp_path / f"run{kill_at}") == outcome(whole), kill_at


def test_kill_9_again_and_again_gives_the_same_bytes(whole: Path, tmp_path: Path) -> None:
    for _ in range(3):
        assert run(tmp_path / "run", 47) == signal.SIGKILL
    assert run(tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(whole)


def test_kill_9_of_a_rank_of_two_gives_the_same_bytes(tmp_path: Path) -> None:
    assert run(tmp_path / "whole", ranks=2) == 0
    killed_and_continued(tmp_path / "run", 70, ranks=2)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_sharded_ranks_train_the_model_of_one_rank_and_survive_kill_9(tmp_path: Path) -> None:
    # An optimiser made after a forward pass, or moments saved after one, would hold gathered copies of parameters.
    settings = {**RECIPE["run"], "eval_every": 1}
    model = FAMILIES["llama"]
    assert run(tmp_path / "one", model=model, run=settings) == 0
    settings["parallel"] = "fsdp"
    assert run(tmp_path / "whole", ranks=2, model=model, run=settings) == 0
    one, two = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "whole"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=2e-5, err_msg=name)
    assert run(tmp_path / "run", 70, ranks=2, model=model, run=settings) == signal.SIGKILL
    assert run(tmp_path / "run", ranks=2, model=model, run=settings) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_finished_run_started_again_changes_nothing(whole: Path) -> None:
    before = outcome(whole)
    assert run(whole) == 0
    assert outcome(whole) == before


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"lora": {"rank": 4}}, {"model": FAMILIES["gemma2"]}, {"model": FAMILIES["qwen3"]},
    {"model": FAMILIES["mixtral"], "loss": {"moe_aux": 0.01}},
    {"run": {**RECIPE["run"], "dtype": "bfloat16", "gradient_checkpointing": True}},
])
def test_every_kind_of_model_survives_kill_9_on_two_sharded_ranks(tmp_path: Path, change: dict[str, Any]) -> None:
    change = {"model": FAMILIES["llama"], **change, "run": {**change.get("run", RECIPE["run"]), "parallel": "fsdp"}}
    assert run(tmp_path / "whole", ranks=2, **change) == 0
    assert run(tmp_path / "run", 70, ranks=2, **change) == signal.SIGKILL
    assert run(tmp_path / "run", ranks=2, **change) == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
