"""Evaluation: the loss by reason, by role and by turn; and greedy answers to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chatloss.batch import IGNORE, Layout, MicroBatch, documents_of
from chatloss.loss.model import TokenLoss
from chatloss.parallel import World, inspecting
from chatloss.reduction import Reduction
from chatloss.sample import Reason, Sample
from chatloss.step import autocast_to, mean, tensors

__all__ = ["evaluate", "greedy"]

ROLES = ("assistant", "others", "template")
TURNS = 16  # turns beyond the last are counted with it


def evaluate(
    module: nn.Module, examples: Sequence[Sequence[Sample]], reduction: Reduction, layout: Layout, world: World,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Losses over all examples, each token counted once, the same on every rank.

    ``loss`` is the reduction's; ``trained`` and ``untrained`` are mean nll (nats per token) of tokens that are, or are
    not, trained; ``reason/NAME``, ``role/NAME`` (assistant messages, others, template) and ``turn/K`` (K-th assistant
    message, trained tokens only) are mean nll of those groups, and absent where a group is empty.
    """
    names = [*(f"reason/{reason.name.lower()}" for reason in Reason), *(f"role/{role}" for role in ROLES),
             *(f"turn/{k + 1}" for k in range(TURNS)), "trained", "untrained"]
    sums, counts = np.zeros(len(names)), np.zeros(len(names))
    numerator = denominator = 0.0
    with inspecting(module):
        for at in range(0, len(examples), 256):
            weights = [reduction.of_example(rows) for rows in examples[at : at + 256]]
            denominator += math.fsum(w.denominator for w in weights[world.rank :: world.size])
            documents = [document for rows, w in zip(examples[at : at + 256], weights, strict=True)
                         for document in documents_of(rows, w, every_token=True)]
            for batch in layout.micro_batches(documents, world.rank):
                with autocast_to(world.device, autocast):
                    _, nll = module(*tensors(batch, module, world.device))
                values = nll.double().cpu().numpy()
                wanted = batch.target_ids != IGNORE
                numerator += float(values @ batch.weights[wanted])
                for group in _groups(batch, wanted):
                    valid = group >= 0
                    sums += np.bincount(group[valid], values[valid], minlength=len(names))
                    counts += np.bincount(group[valid], minlength=len(names))
    total = world.sum([numerator, denominator, *sums, *counts])
    out: dict[str, Any] = {"loss": mean(total[0], total[1])}
    sums, counts = total[2 : 2 + len(names)], total[2 + len(names) :]
    out |= {name: mean(s, n) for name, s, n in zip(names, sums, counts, strict=True) if n}
    return {**out, "tokens": int(counts[-2])}


def _groups(batch: MicroBatch, wanted: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.int64]]:
    """For every wanted target four group numbers: its reason, role, turn, and trained or not; -1 for none."""
    reasons, roles, turns = (np.full(batch.target_ids.shape, -1, np.int64) for _ in range(3))
    index = {int(reason): k for k, reason in enumerate(Reason)}
    lookup = np.array([index.get(value, -1) for value in range(256)])
    for document, b, start in batch.placed:
        at, row = (b, slice(start, start + len(document))), document.row
        shifted = slice(1, len(document) + 1)
        messages = row.messages[shifted]
        assistants = np.array(sorted(row.outcomes), np.int64)
        reasons[at] = lookup[row.reasons[shifted]]
        is_assistant = np.isin(messages, assistants)
        roles[at] = np.where(messages < 0, 2, np.where(is_assistant, 0, 1))
        turn = np.minimum(np.searchsorted(assistants, messages), TURNS - 1)
        turns[at] = np.where(is_assistant & (document.weights != 0), turn, -1)
    first_role, first_turn = len(Reason), len(Reason) + len(ROLES)
    turns = np.where(turns >= 0, turns + first_turn, -1)
    roles = np.where(roles >= 0, roles + first_role, -1)
    trained = np.where(batch.weights != 0, 0, 1) + first_turn + TURNS
    trained[batch.document_ids < 0] = -1
    return [array[wanted] for array in (reasons, roles, turns, trained)]


def greedy(
    loss: TokenLoss, prompts: Sequence[Sequence[int]], stop_ids: Sequence[int],
    decode: Callable[[Sequence[int]], str], length: int = 64,
) -> list[str]:
    """The most likely answer to each prompt (ids), up to a stop or `length` tokens, as text."""
    device = next(loss.parameters()).device
    out = []
    with inspecting(loss):
        for prompt in prompts:
            ids = torch.tensor([list(prompt)], device=device)
            made = loss.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False,
                eos_token_id=list(stop_ids) or None, pad_token_id=0,
            )
            out.append(decode(made[0, ids.shape[1] :].tolist()))
    return out
