"""Runs a function on several gloo ranks, each a spawned process, and returns what rank 0 returns."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def on_ranks(size: int, function: Callable[..., Any], *args: Any) -> Any:
    """``function(world, *args)`` on every rank; an exception on any rank is raised here."""
    with tempfile.TemporaryDirectory() as directory:
        torch.multiprocessing.spawn(_rank, (size, directory, function, args), nprocs=size)
        return pickle.loads(Path(directory, "result").read_bytes())


def _rank(rank: int, size: int, directory: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    from chatloss.parallel import World

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size
    )
    try:
        result = function(World(rank, size, torch.device("cpu"), torch.distributed.group.WORLD), *args)
        if rank == 0:
            Path(directory, "result").write_bytes(pickle.dumps(result))
    finally:
        torch.distributed.destroy_process_group()
