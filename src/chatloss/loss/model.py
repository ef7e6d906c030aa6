"""One wrapped module: a causal language model whose forward pass returns sums of losses over a micro-batch."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from chatloss.batch import IGNORE
from chatloss.loss.nll import logits_nll, token_nll, weighted_nll

__all__ = ["TokenLoss"]


class TokenLoss(nn.Module):
    """A model and its token loss in one module, so that DDP and FSDP2 see head and loss inside the wrapped forward.

    With `own_logits` the model computes its logits itself (soft-capping, scaling, an unusual head); otherwise hidden
    states are selected first and logits exist for wanted tokens only, a chunk at a time. `moe_aux` is the coefficient
    of the load-balancing loss of a mixture of experts, 0 for none. With `per_token` the nll of every token carries the
    gradient, for losses that are no weighted sum of them.
    """

    def __init__(
        self, model: nn.Module, own_logits: bool = False, moe_aux: float = 0.0, per_token: bool = False
    ) -> None:
        super().__init__()
        self.model = model
        self.own_logits = own_logits
        self.moe_aux = moe_aux
        self.per_token = per_token

    @property
    def inner(self) -> Any:
        """The transformers model itself, also where peft has wrapped it."""
        model: Any = self.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, target_ids: Tensor, weights: Tensor, real: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Sums [1 or 2] (token loss; load balancing, times its tokens) and nll [wanted targets] without a gradient.

        With `per_token` it is the nll that has the gradient, and the token loss that has none.

        `input_ids`, `position_ids`, `target_ids` int64 [B, T], `weights` [B, T]; `real` bool [B, T] is False at padding
        (only load balancing asks). No attention mask: rows are right-padded, and documents are told apart by positions.
        """
        wanted = target_ids != IGNORE
        targets, weights = target_ids[wanted], weights[wanted]
        kwargs: dict[str, Any] = {"input_ids": input_ids, "position_ids": position_ids, "use_cache": False}
        if self.moe_aux:
            kwargs["output_router_logits"] = True
        if self.own_logits:
            columns = wanted.any(0).nonzero()[:, 0]
            if "logits_to_keep" in inspect.signature(type(self.inner).forward).parameters:
                out = self.inner(**kwargs, logits_to_keep=columns)
                logits = out.logits
            else:
                out = self.inner(**kwargs)
                logits = out.logits[:, columns]
            total, nll = logits_nll(logits[wanted[:, columns]], targets, weights, self.per_token)
        else:
            out = self.inner.base_model(**kwargs)
            head, hidden = self.inner.get_output_embeddings(), out.last_hidden_state[wanted]
            if self.per_token:
                nll = token_nll(hidden, head.weight, head.bias, targets)
                total = (nll.detach() * weights).sum()
            else:
                total, nll = weighted_nll(hidden, head.weight, head.bias, targets, weights)
        if not self.moe_aux:
            return torch.stack([total]), nll
        aux = self._balance(out.router_logits, input_ids, real)
        return torch.stack([total, aux.to(total.dtype)]), nll

    def _balance(self, router_logits: Any, input_ids: Tensor, real: Tensor | None) -> Tensor:
        config = self.inner.config
        balance = sys.modules[type(self.inner).__module__].load_balancing_loss_func
        mask = torch.ones_like(input_ids) if real is None else real.to(input_ids.dtype)
        tokens = mask.sum()
        if tokens == 0:  # a dummy: balanced over its padding, which is finite, and weighed by no token
            mask = torch.ones_like(mask)
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        loss: Tensor = balance(router_logits, experts, config.num_experts_per_tok, mask)
        return self.moe_aux * loss * tokens
