"""Weighted sum of token negative log-likelihoods from hidden states and a linear head, a chunk of logits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["logits_nll", "token_nll", "weighted_nll"]

# Elements of the logits that exist at once: 32 MiB in float32 on CPU; GPUs want larger products.
CHUNK_ELEMENTS = {"cpu": 2**23, "cuda": 2**26}


def weighted_nll(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, weights: Tensor, chunk: int = 0
) -> tuple[Tensor, Tensor]:
    """``sum_t weights_t * nll_t`` and ``nll``, where ``nll_t = logsumexp(W h_t + b) - (W h_t + b)[target_t]``.

    `hidden` [N, H], `weight` [V, H], `bias` [V] or None, `target_ids` int64 [N], `weights` [N]. Returns a scalar with a
    gradient and nll [N] without one: float64 for float64 inputs, else float32, in which softmax and sums are computed.
    At most `chunk` rows of logits (0: chosen by size) exist at a time. The gradient is computed in the forward pass, as
    the weights are known then, so that no product is done twice (Liger kernel, Hsu et al. 2024, section 3.2); it can be
    used once.

    >>> h, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    >>> target, u = torch.tensor([0, 6, 3, 2, 2]), torch.tensor([1.0, 0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    >>> total, nll = weighted_nll(h, w, None, target, u, chunk=2)
    >>> expected = (torch.nn.functional.cross_entropy(h @ w.T, target, reduction="none") * u).sum()
    >>> torch.testing.assert_close(total, expected)
    >>> torch.testing.assert_close(torch.autograd.grad(total, w), torch.autograd.grad(expected, w))
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    rows = chunk or _chunk_rows(weight)
    out: tuple[Tensor, Tensor] = _WeightedNLL.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target_ids, weights, rows, torch.is_grad_enabled()
    )
    return out


def token_nll(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, chunk: int = 0) -> Tensor:
    """``nll_t = logsumexp(W h_t + b) - (W h_t + b)[target_t]`` of every token, [N], each with a gradient of its own.

    Shapes, dtypes and `chunk` as in `weighted_nll`, for losses whose token weights follow from the values themselves.
    Logits are computed twice, a chunk at a time: nothing of their size is kept for the backward pass.

    >>> h, w = torch.randn(5, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    >>> target = torch.tensor([0, 6, 3, 2, 2])
    >>> nll = token_nll(h, w, None, target, chunk=2)
    >>> expected = torch.nn.functional.cross_entropy(h @ w.T, target, reduction="none")
    >>> torch.testing.assert_close(nll, expected)
    >>> got, want = torch.autograd.grad((nll**2).sum(), w), torch.autograd.grad((expected**2).sum(), w)
    >>> torch.testing.assert_close(got, want)
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    out: Tensor = _TokenNLL.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, target_ids, chunk or _chunk_rows(weight)
    )
    return out


def logits_nll(
    logits: Tensor, target_ids: Tensor, weights: Tensor, per_token: bool = False
) -> tuple[Tensor, Tensor]:
    """The same sum and nll from logits [N, V] that a model computed itself; `per_token`: the nll has the gradient."""
    nll = torch.nn.functional.cross_entropy(logits.to(_at_least_float32(logits)), target_ids, reduction="none")
    if per_token:
        return (nll.detach() * weights).sum(), nll
    return (nll * weights).sum(), nll.detach()


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _chunk_rows(weight: Tensor) -> int:
    return max(16, CHUNK_ELEMENTS.get(weight.device.type, 2**24) // weight.shape[0])


class _HeadGradient:
    """The gradient of a head, summed chunk by chunk: of `hidden` in its own precision, of the rest in float32 at least.

    `parts`: of hidden, weight and bias, None where not wanted.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, wants: Sequence[bool]) -> None:
        acc = _at_least_float32(hidden)
        self.hidden, self.weight = hidden, weight
        self.parts = (
            torch.empty_like(hidden) if wants[0] else None,
            torch.zeros_like(weight, dtype=acc) if wants[1] else None,
            torch.zeros_like(bias, dtype=acc) if wants[2] and bias is not None else None,
        )

    def add(self, at: slice, d_logits: Tensor) -> None:
        """`d_logits` [chunk, vocabulary] is the gradient of the logits of ``hidden[at]``."""
        d_hidden, d_weight, d_bias = self.parts
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        low = d_logits.to(self.hidden.dtype)
        if d_hidden is not None:
            torch.mm(low, self.weight, out=d_hidden[at])
        if d_weight is not None and low.dtype == d_weight.dtype:
            d_weight.addmm_(low.T, self.hidden[at])
        elif d_weight is not None:
            d_weight += low.T @ self.hidden[at]


class _TokenNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, rows: int
    ) -> Tensor:
        nll = torch.empty(len(hidden), dtype=_at_least_float32(hidden), device=hidden.device)
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            logits = torch.nn.functional.linear(hidden[at], weight, bias).to(nll.dtype)
            logits -= logits.max(-1, keepdim=True).values
            chosen = logits.gather(1, target_ids[at, None])
            nll[at] = (logits.exp_().sum(-1, keepdim=True).log() - chosen).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, target_ids)
        ctx.rows = rows
        return nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids = ctx.saved_tensors
        wants, acc = ctx.needs_input_grad, _at_least_float32(hidden)
        sums = _HeadGradient(hidden, weight, bias, wants)
        for start in range(0, len(hidden), ctx.rows):
            at = slice(start, start + ctx.rows)
            g = grads[0][at, None].to(acc)
            # g * (softmax - one_hot), in the logits' own memory.
            logits = torch.nn.functional.linear(hidden[at], weight, bias).to(acc)
            logits -= logits.max(-1, keepdim=True).values
            z = logits.exp_().sum(-1, keepdim=True)
            d_logits = logits.mul_(g / z)
            d_logits.scatter_add_(1, target_ids[at, None], -g)
            sums.add(at, d_logits)
        parts = zip(sums.parts, (hidden, weight, bias), strict=True)
        return (*(None if d is None else d.to(given.dtype) for d, given in parts), None, None)


class _WeightedNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, weights: Tensor, rows: int,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        acc = _at_least_float32(hidden)
        wants = [grad and needed for needed in ctx.needs_input_grad[:3]]
        sums = _HeadGradient(hidden, weight, bias, wants)
        nll = torch.empty(len(hidden), dtype=acc, device=hidden.device)
        for start in range(0, len(hidden), rows):
            at = slice(start, start + rows)
            target = target_ids[at, None]
            logits = torch.nn.functional.linear(hidden[at], weight, bias).to(acc)
            logits -= logits.max(-1, keepdim=True).values
            chosen = logits.gather(1, target)
            z = logits.exp_().sum(-1, keepdim=True)
            nll[at] = (z.log() - chosen).squeeze(1)
            if not any(wants):
                continue
            # d(w * nll)/d logits = w * (softmax - one_hot), in the logits' own memory.
            d_logits = logits.mul_(weights[at, None] / z)
            d_logits.scatter_add_(1, target, -weights[at, None].to(acc))
            sums.add(at, d_logits)
        ctx.gradients = sums.parts
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of weighted_nll was computed in its forward pass and has been used")
        scaled = [None if d is None else d.mul_(grads[0]).to(dtype)
                  for d, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None
        return (*scaled, None, None, None, None)
