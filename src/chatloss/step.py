"""Micro-batches on all ranks -> one exact gradient. The only division in the package is here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chatloss.batch import IGNORE, MicroBatch
from chatloss.errors import RecipeError
from chatloss.parallel import World, gradient_scale, unsynchronised

__all__ = ["StepResult", "Terms", "autocast_to", "blame", "clip_gradient", "gradient", "mean", "tensors"]

# (micro-batch, sums and nll that `TokenLoss` returned) -> the numerator of every term of the loss, with a gradient, and
# float64 values that are only summed up and reported.
Terms = Callable[[MicroBatch, Tensor, Tensor], tuple[Tensor, npt.NDArray[np.float64]]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one optimiser step optimised, summed over micro-batches and ranks.

    `loss` is the value whose gradient was taken, `terms` its parts (token loss, load balancing), `denominators` what
    each was divided by, `tokens` the trained tokens, `inputs` the input tokens without padding and `computed` with it.
    `skipped` says that the first denominator is 0: there is no gradient, and no step must be taken. `measures` is what
    the objective reports of itself.
    """

    loss: float
    terms: tuple[float, ...]
    denominators: tuple[float, ...]
    tokens: int
    inputs: int
    computed: int
    skipped: bool = False
    measures: tuple[float, ...] = ()


def gradient(
    module: nn.Module, micro_batches: Sequence[MicroBatch], denominators: float | Sequence[float],
    world: World | None = None, *, autocast: torch.dtype | None = None, moe_aux: bool = False,
    terms: Terms | None = None,
) -> StepResult:
    """Adds the gradient of ``sum_t u_t w_t nll_t / Z`` to the parameters' `.grad`, over all micro-batches and ranks.

    `module` is a `TokenLoss`, wrapped by `World.wrap` on several ranks. `micro_batches` are this rank's (each rank has
    equally many) and `denominators` is this rank's share of `Z`: the shares are summed before the first backward.
    Another objective than token losses gives its `terms`, and a share of the denominator of each. Load balancing
    (`moe_aux`) is divided by the number of input tokens. Raises `RecipeError` naming the rows if a loss is not finite.
    """
    world, terms = world or World(), terms or _token_loss
    inputs = sum(batch.tokens for batch in micro_batches)
    shares = [denominators] if isinstance(denominators, int | float) else list(denominators)
    z = world.sum([*shares, inputs])[: len(shares) + moe_aux]
    if z[0] == 0.0:
        return StepResult(0.0, (0.0,) * len(z), tuple(z.tolist()), 0, 0, 0, skipped=True)
    scale = gradient_scale(module, world) / z
    numerators = np.zeros(len(z))
    reported: list[npt.NDArray[np.float64]] = []
    nlls: list[Tensor] = []
    for i, batch in enumerate(micro_batches):
        with unsynchronised(module, last=i == len(micro_batches) - 1):
            with autocast_to(world.device, autocast):
                sums, nll = module(*tensors(batch, module, world.device))
            own, measures = terms(batch, sums, nll)
            parts = torch.cat([own, sums[1:]]) if moe_aux else own
            loss: Tensor = (parts * torch.as_tensor(scale).to(parts)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        numerators += parts.detach().double().cpu().numpy()
        reported.append(measures)
        nlls.append(nll.detach())
    tokens = sum(int((batch.weights != 0).sum()) for batch in micro_batches)
    computed = sum(batch.input_ids.size for batch in micro_batches)
    everything = world.sum([*numerators, tokens, inputs, computed, *sum(reported)])  # type: ignore[misc]
    values = everything[: len(z)] / z
    if not np.isfinite(values).all():
        raise _not_finite("loss", [row for b, n in zip(micro_batches, nlls, strict=True) for row in _bad(b, n)], world)
    tokens, inputs, computed = (int(value) for value in everything[len(z) : len(z) + 3])
    return StepResult(math.fsum(values), tuple(values.tolist()), tuple(z.tolist()), tokens, inputs, computed,
                      measures=tuple(everything[len(z) + 3 :].tolist()))


def _token_loss(batch: MicroBatch, sums: Tensor, nll: Tensor) -> tuple[Tensor, npt.NDArray[np.float64]]:
    return sums[:1], np.zeros(0)


def clip_gradient(module: nn.Module, max_norm: float) -> float:
    """The 2-norm of the gradient; if it exceeds `max_norm` (0: off), the gradient is scaled down to it.

    To be called when all micro-batches and ranks are summed: the norm is that of the true gradient.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
    >>> clip_gradient(layer, 1.0), layer.weight.grad
    (5.0, tensor([[0.6000, 0.8000]]))
    """
    grads = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    total: Any = torch.nn.utils.get_total_norm(grads)
    norm = float(total.full_tensor() if hasattr(total, "full_tensor") else total)
    if max_norm and math.isfinite(norm) and norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def tensors(batch: MicroBatch, module: nn.Module, device: torch.device) -> tuple[Tensor, ...]:
    """The arguments of `TokenLoss.forward`. Weights are float32, or float64 for a float64 model."""
    double = next(module.parameters()).dtype == torch.float64
    arrays = (batch.input_ids, batch.position_ids, batch.target_ids,
              batch.weights.astype(np.float64 if double else np.float32), batch.document_ids >= 0)
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)


def blame(
    module: nn.Module, micro_batches: Sequence[MicroBatch], world: World, autocast: torch.dtype | None = None
) -> RecipeError:
    """The error for a gradient that is not finite although the loss is: replays the micro-batches one by one.

    All ranks replay together, so the rows named are those of the first micro-batch, on every rank, that does it.
    """
    rows: list[str] = []
    for batch in micro_batches:
        module.zero_grad(set_to_none=True)
        with autocast_to(world.device, autocast):
            sums, _ = module(*tensors(batch, module, world.device))
        sums.sum().backward()
        if not math.isfinite(clip_gradient(module, 0.0)):
            rows = [document.row.source for document, _, _ in batch.placed]
            break
    module.zero_grad(set_to_none=True)
    return _not_finite("gradient", rows, world)


def _bad(batch: MicroBatch, nll: Tensor) -> list[str]:
    """Sources of the documents in which some wanted target's nll is not finite."""
    owners = batch.document_ids[batch.target_ids != IGNORE]
    bad = np.unique(owners[~torch.isfinite(nll).cpu().numpy()])
    return [batch.placed[i][0].row.source for i in bad if i >= 0]


def _not_finite(what: str, rows: Sequence[str], world: World) -> RecipeError:
    names = sorted({row for part in world.gather(list(rows)) for row in part})
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return RecipeError(
        f"the {what} is not finite", where=shown or "no single row", kind="not finite",
        hint="look at these rows with `chatloss view`, or lower optim.lr; the last checkpoint is intact",
    )


def autocast_to(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Matrix products in `dtype` (None: as the parameters are)."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def mean(total: float, count: float) -> float:
    """``total / count`` of sums over all ranks; NaN where nothing was counted, which is not a loss of 0."""
    return float(total) / float(count) if count else math.nan
