"""Ranks: who we are, what we sum over them, and how a module is spread over them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chatloss.errors import RecipeError

__all__ = ["World", "gradient_scale", "inspecting", "join_world", "unsynchronised"]


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`. `device` is where it computes, `cpu_group` a gloo group for exact float64 sums."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    cpu_group: Any = None

    def sum(self, values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Elementwise float64 sum over all ranks, reduced on the CPU: the same bits on every rank."""
        total = torch.as_tensor(np.asarray(values, np.float64).copy())
        if self.size > 1:
            torch.distributed.all_reduce(total, group=self.cpu_group)
        return total.numpy()

    def gather(self, value: Any) -> list[Any]:
        """The Python values of all ranks, for messages and counts."""
        if self.size == 1:
            return [value]
        out: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(out, value, group=self.cpu_group)
        return out

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier(group=self.cpu_group)

    def wrap(self, module: nn.Module, parallel: str, layers: Sequence[nn.Module] = ()) -> nn.Module:
        """The module on this world's device: replicated (DDP), sharded by layer (FSDP2), or, alone, as it is."""
        if self.size == 1:
            return module.to(self.device)
        if parallel == "ddp":
            module.to(self.device)
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=ids, forward_sync_buffers=False)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        for part in [*layers, module]:
            fully_shard(part, mesh=mesh)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                # Gradients are summed, not averaged. On the root alone this would leave nested layers divided. The
                # plain sum is asked for because gloo has no scaled one, which is what a factor means for float32.
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
        return module


def gradient_scale(module: nn.Module, world: World) -> float:
    """What makes a synchronised gradient the sum over ranks when a loss is multiplied by it: W under DDP, else 1."""
    return float(world.size) if isinstance(module, nn.parallel.DistributedDataParallel) else 1.0


def unsynchronised(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """The context of one micro-batch's forward and backward: DDP exchanges gradients in the last one only."""
    if not last and isinstance(module, nn.parallel.DistributedDataParallel):
        return module.no_sync()
    return nullcontext()


@contextmanager
def inspecting(module: nn.Module) -> Iterator[None]:
    """No gradients, no dropout; afterwards the module is as it was, and sharded again if it was sharded.

    FSDP2 leaves the root's parameters gathered after a forward pass without a backward pass. Whoever then asks for
    `parameters()` gets the gathered copies: an optimiser made of them would never move the model.
    """
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)
        parts: list[Any] = [part for part in module.modules() if hasattr(part, "reshard")]
        for part in parts:
            part.reshard()


@contextmanager
def join_world() -> Iterator[World]:
    """The world that ``torchrun`` describes in the environment (RANK, WORLD_SIZE, LOCAL_RANK), or a world of one."""
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise RecipeError(
            f"local rank {local} has no GPU of its own ({torch.cuda.device_count()} found)",
            hint="start as many processes per node as there are GPUs: torchrun --nproc-per-node",
        )
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if size == 1:
        yield World(device=device)
        return
    if torch.distributed.is_initialized():
        yield World(rank, size, device, torch.distributed.new_group(backend="gloo"))
        return
    if cuda:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=size)
    try:
        yield World(rank, size, device, torch.distributed.new_group(backend="gloo"))
    finally:
        torch.distributed.destroy_process_group()
