"""Metrics out: JSON lines always, the console for people, and other loggers when installed and asked for."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from chatloss.errors import RecipeError

__all__ = ["Logger"]


class Logger:
    """Takes one record per event; `kind` is "step", "eval", "sample" or "notice". Only rank 0 should hold one.

    `path` is the JSONL file: opened for appending, after records beyond `step` (from a run that was killed later than
    its last checkpoint) are removed. `extra` names tensorboard, wandb or trackio. Nothing is filtered: a value that is
    not finite is written as a string, since JSON has no word for it.
    """

    def __init__(
        self, path: Path, total: int, *, step: int = 0, extra: Sequence[str] = (), console: TextIO | None = None,
        quiet: bool = False,
    ) -> None:
        self.path, self.total, self.first = path, total, step
        self.console = console or sys.stderr
        self.tty = self.console.isatty() and not quiet
        self.quiet = quiet
        self.began = time.monotonic()
        self.sinks = [_sink(name, path.parent) for name in extra]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _truncate(path, step)
            self.file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(path, error) from None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Writes one record everywhere."""
        record = {"kind": kind, "step": step, **values}
        try:
            self.file.write(json.dumps(_plain(record)) + "\n")
            self.file.flush()
        except OSError as error:
            raise _unwritable(self.path, error) from None
        numbers = {f"{kind}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
        for sink in self.sinks:
            sink(numbers, step)
        if kind == "step":
            self._progress(step, values)
        elif kind == "notice":
            self._line(f"note: {values['text']}")
        elif kind == "eval":
            self._line(f"step {step}: eval loss {values['loss']:.4f}")
        elif kind == "sample":
            self._line(f"step {step}: {values['text']!r}")

    def close(self) -> None:
        if self.tty:
            self.console.write("\n")
        self.file.close()
        for sink in self.sinks:
            sink({}, -1)

    def _progress(self, step: int, values: dict[str, Any]) -> None:
        if not self.tty:
            return
        seconds = (time.monotonic() - self.began) / max(step - self.first, 1) * (self.total - step)
        left = f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"
        text = f"step {step}/{self.total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  {left} left"
        self.console.write(f"\r\x1b[K{text}")
        self.console.flush()

    def _line(self, text: str) -> None:
        if self.quiet:
            return
        self.console.write(f"\r\x1b[K{text}\n" if self.tty else f"{text}\n")
        self.console.flush()


def _unwritable(path: Path, error: OSError) -> RecipeError:
    return RecipeError(
        f"cannot write the metrics: {error.strerror}", where=str(path),
        hint="make room or choose another output, then run the same command again",
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _truncate(path: Path, step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step] if step else []
    new = path.with_name(f".{path.name}.new")
    new.write_text("".join(kept), encoding="utf-8")
    new.replace(path)


def _sink(name: str, directory: Path) -> Any:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(directory / "tensorboard"))

            def tensorboard(numbers: dict[str, float], step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                if step < 0:
                    writer.close()

            return tensorboard
        if name in ("wandb", "trackio"):
            import importlib

            module = importlib.import_module(name)
            run = module.init(project="chatloss", name=directory.name)
            return lambda numbers, step: run.log(numbers, step=step) if step >= 0 else run.finish()
    except ImportError as error:
        raise RecipeError(
            f"logger {name!r} is not installed ({error})", where="run.log", hint=f"pip install {name}"
        ) from None
    raise RecipeError(f"unknown logger {name!r}", where="run.log", hint="use tensorboard, wandb or trackio")
