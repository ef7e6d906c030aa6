"""Metrics: every record is written, in order, also after a crash; people see a line, and loggers get numbers."""

from __future__ import annotations

import io
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from chatloss.log import Logger


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_nothing_is_filtered_and_every_line_is_json(tmp_path: Path) -> None:
    # trl#6668, transformers' logging_nan_inf_filter: a loss that is not a number is no 0.0 and is not left out.
    logger = Logger(tmp_path / "m.jsonl", 3, console=io.StringIO())
    logger.write("step", 1, {"loss": float("nan"), "lr": 1.0, "deep": {"x": float("inf")}})
    logger.close()
    assert lines(tmp_path / "m.jsonl") == [{"kind": "step", "step": 1, "loss": "nan", "lr": 1.0, "deep": {"x": "inf"}}]


def test_records_beyond_the_checkpoint_and_half_lines_are_removed_on_continuing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "ki')
    Logger(path, 9, step=2, console=io.StringIO()).close()
    assert lines(path) == [{"step": 1}, {"step": 2}]
    Logger(path, 9, step=0, console=io.StringIO()).close()
    assert lines(path) == []


def test_progress_is_for_terminals_only_and_messages_are_for_all(tmp_path: Path) -> None:
    for console in (Terminal(), io.StringIO()):
        logger = Logger(tmp_path / "m.jsonl", 7300, console=console)
        logger.write("notice", 0, {"text": "packing is off"})
        logger.write("step", 1, {"loss": 2.5, "lr": 0.001})
        logger.write("eval", 1, {"loss": 3.25})
        logger.write("sample", 1, {"text": "an\nanswer"})
        logger.close()
        text = console.getvalue()
        assert "note: packing is off" in text
        assert "eval loss 3.2500" in text
        assert repr("an\nanswer") in text
        assert ("step 1/7300  loss 2.5000" in text) == console.isatty()
        assert ("left" in text) == console.isatty()
        assert ("\x1b" in text) == console.isatty()
    quiet = Terminal()
    logger = Logger(tmp_path / "m.jsonl", 3, console=quiet, quiet=True)
    logger.write("notice", 0, {"text": "x"})
    logger.close()
    assert quiet.getvalue() == ""


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_loggers_get_the_numbers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda numbers, step: seen.append((step, numbers)), finish=lambda: seen.append("end")
    )
    fake = types.SimpleNamespace(init=lambda project, name: run)
    monkeypatch.setitem(sys.modules, name, fake)  # type: ignore[arg-type]
    logger = Logger(tmp_path / "run" / "m.jsonl", 3, extra=[name], console=io.StringIO())
    logger.write("step", 1, {"loss": 2.5, "note": "text"})
    logger.close()
    assert seen == [(1, {"step/loss": 2.5}), "end"]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    logger = Logger(tmp_path / "m.jsonl", 3, extra=["tensorboard"], console=io.StringIO())
    logger.write("step", 1, {"loss": 2.5})
    logger.close()
    assert list((tmp_path / "tensorboard").glob("events*"))
