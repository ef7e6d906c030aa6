"""Runs the trainer in processes that are killed with SIGKILL at a chosen moment."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "init": "random", "seed": 3, "batch": {"examples": 3, "micro_tokens": 100}, "loss": {"reduction": "turn"},
    "optim": {"lr": 0.01, "warmup": 2, "weight_decay": 0.1}, "run": {"epochs": 2, "save_every": 1, "eval_every": 3},
}


def run(output: Path, kill_at: int = 0, ranks: int = 1, **changes: Any) -> int:
    """Trains on `ranks` ranks into `output`; rank 0 kills itself at its `kill_at`-th event (0: never).

    Returns 0, or a non-zero exit code if any rank died. Processes come from a fork server, so that torch is imported
    once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatloss.trainer", "tests.synthetic", "transformers.models.llama.modeling_llama"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_train, args=(output, rank, ranks, port, kill_at if rank == 0 else 0, changes))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            for other in processes:
                other.kill()
    return max(abs(process.exitcode or 0) for process in processes)


def kill_at_event(kill_at: int, watched: Iterable[tuple[Any, str]]) -> Callable[[], int]:
    """Has this process kill itself at its `kill_at`-th event (0: never): before or after a call of a watched function.

    Returns a function that counts the events so far.
    """
    events = 0

    def event() -> None:
        nonlocal events
        events += 1
        if events == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            event()
            out = function(*args, **kwargs)
            event()
            return out

        return called

    for owner, name in watched:
        setattr(owner, name, watch(getattr(owner, name)))
    return lambda: events


def _train(output: Path, rank: int, ranks: int, port: int, kill_at: int, changes: dict[str, Any]) -> None:
    import torch

    from chatloss import checkpoint, log
    from chatloss.config import Recipe
    from chatloss.trainer import train
    from tests.synthetic import FAMILIES, chats, decode, tokenizer_files

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    events = kill_at_event(kill_at, (
        (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (shutil, "rmtree"), (checkpoint, "_flush"),
        (checkpoint, "_save_tensors"), (log.Logger, "write"), (torch.optim.AdamW, "step"),
    ))
    if changes.get("objective", "sft") != "sft":
        changes = {"loss": {}, **changes}
    recipe = Recipe.from_dict({**RECIPE, "model": {**FAMILIES["llama"], "attention_dropout": 0.1},
                               "output": str(output), **changes})
    examples, held_out = (chats(10), chats(3, seed=9)) if recipe.objective == "sft" else _pairs(recipe.objective)
    train(recipe, examples, held_out, tokenizer_files=tokenizer_files, decode=decode, quiet=True)
    (output / f"events.{rank}").write_text(str(events()))


def _pairs(objective: str) -> tuple[Any, Any]:
    from tests.synthetic_pairs import judged, pairs

    if objective == "kto":
        return judged(5, references=False), judged(2, seed=9, references=False)
    return pairs(10, references=False), pairs(3, seed=9, references=False)


def outcome(output: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """The final weights' bytes, and every metric but time."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    [weights] = (output / "model").glob("*model.safetensors")
    return weights.read_bytes(), [r for r in records if r["kind"] != "notice"]
