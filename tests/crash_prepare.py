"""Runs `prepare` in processes that are killed with SIGKILL at a chosen moment."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path

from tests.crash import kill_at_event


def run(data: Path, output: Path, kill_at: int, workers: int = 1) -> int:
    """Prepares `data` into `output`, killed at the `kill_at`-th event (0: never); 0, or a non-zero exit code.

    A run that is not killed writes the number of its events to `<output>.events`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatloss.prepare", "tokenizers"])
    process = context.Process(target=_prepare, args=(data, output, kill_at, workers))
    process.start()
    process.join()
    return abs(process.exitcode or 0)


def _prepare(data: Path, output: Path, kill_at: int, workers: int) -> None:
    from chatloss import prepare as preparing
    from chatloss.demo import tokenizer_directory

    watched = ((Path, "replace"), (Path, "mkdir"), (Path, "unlink"), (os, "fsync"), (shutil, "rmtree"))
    events = kill_at_event(kill_at, watched)
    preparing.shard_bytes = lambda inputs: 16384
    preparing.prepare([str(data)], output, preparing.Job(str(tokenizer_directory())), workers=workers)
    if not kill_at:
        Path(f"{output}.events").write_text(str(events()))
