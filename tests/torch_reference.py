"""The gradient as the definition says it: one row at a time, all logits, plain sums; nothing of the code under test."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from chatloss.models import plain_experts
from chatloss.sample import Sample
from tests.test_reduction import expected

Gradient = dict[str, torch.Tensor]


def tiny(config: Mapping[str, Any], dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    values = dict(config)
    made = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=dtype)
    plain_experts(model)
    return model


def shares(name: str, examples: Sequence[Sequence[Sample]]) -> list[dict[int, float]]:
    """For every example: message index -> weight of each of its tokens, over Z; by the formulas in test_reduction."""
    keys, counts = [], []
    for rows in examples:
        n: dict[int, int] = {}
        for row in rows:
            for message in row.messages[1:][row.weights[1:] != 0].tolist():
                n[message] = n.get(message, 0) + 1
        keys.append(list(n))
        counts.append(list(n.values()))
    weights = expected(name, [c for c in counts if c])
    filled = iter(weights)
    return [dict(zip(k, next(filled), strict=True)) if k else {} for k in keys]


def reference_gradient(model: Any, examples: Sequence[Sequence[Sample]], name: str = "token") -> tuple[float, Gradient]:
    """Loss and gradient of ``sum_t u_t w_t nll_t / Z`` in float64, accumulated row by row."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    total = 0.0
    for rows, share in zip(examples, shares(name, examples), strict=True):
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype("int64"))[None]
            logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            nll = -logp.gather(1, ids[0, 1:, None])[:, 0]
            weight = [float(u) * share.get(m, 0.0) for u, m in zip(row.weights, row.messages.tolist(), strict=True)]
            loss = (nll * torch.tensor(weight[1:], dtype=torch.float64)).sum()
            loss.backward()
            total += loss.item()
    return total, gradient_of(model)


def gradient_of(model: Any) -> Gradient:
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            out[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).detach().clone().double()
    return out


def difference(got: Gradient, want: Gradient) -> float:
    """max over parameters of max abs(dg) / max abs(g)."""
    assert got.keys() == want.keys()
    return max(float((got[k] - want[k]).abs().max() / want[k].abs().max()) for k in want)
