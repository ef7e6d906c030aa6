"""Answers as documents, and the log-probability of each: what pairs, judged answers and their references share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chatloss.batch import IGNORE, Document, Layout, MicroBatch
from chatloss.loss.sequence import sequence_logps
from chatloss.objective import full_nll
from chatloss.pairs import Answer
from chatloss.parallel import World, inspecting
from chatloss.step import autocast_to, tensors

__all__ = ["AnswerDocument", "AnswerLogps", "answer_documents", "answer_logps", "document_logps", "nll_term",
           "plain_logp"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class AnswerDocument(Document):
    """A row of an answer. `weights` are the user's: those of the tokens in the answer's log-probability.

    `answer` numbers the answers of a unit (0 chosen, 1 rejected). `reference` is this row's part of the answer's
    log-probability under the reference, in nats. `nll_weights` float64 [n] weighs what the row adds to an NLL term, or
    is None.
    """

    answer: int = 0
    reference: float = 0.0
    nll_weights: Floats | None = None


def answer_documents(
    answer: Answer, unit: int, number: int = 0, nll_weights: Sequence[Floats] | None = None
) -> list[AnswerDocument]:
    """The documents of an answer, cut after their last wanted target; `nll_weights` are per row and token.

    The whole of ``answer.reference`` stands on the first one; what is summed up is the answer.
    """
    documents: list[AnswerDocument] = []
    for i, row in enumerate(answer.rows):
        weights = row.weights.astype(np.float64)
        weights[:1] = 0.0
        nll = None if nll_weights is None else nll_weights[i]
        wanted = (weights != 0) if nll is None else (weights != 0) | (nll != 0)
        if not wanted.any():
            continue
        n = int(np.flatnonzero(wanted)[-1])
        target_ids = np.where(wanted, row.input_ids, IGNORE).astype(np.int64)[1 : n + 1]
        documents.append(AnswerDocument(
            row.input_ids[:n], target_ids, weights[1 : n + 1], row, unit, number,
            0.0 if documents else answer.reference or 0.0, None if nll is None else nll[1 : n + 1],
        ))
    return documents


@dataclass(frozen=True, slots=True, eq=False)
class AnswerLogps:
    """Answers of one micro-batch, by unit and then by number: K units of `answers` answers each.

    `logps` is float64 [K * answers] with a gradient, `references` and `tokens` (trained ones) float64 without; `units`
    [K] are the numbers of the units.
    """

    logps: Tensor
    references: Tensor
    tokens: Tensor
    units: npt.NDArray[np.int64]


def answer_logps(batch: MicroBatch, nll: Tensor, answers: int) -> AnswerLogps:
    """Log-probabilities of all answers of a micro-batch whose documents are `AnswerDocument`; `nll` [wanted]."""
    documents = list(_documents(batch))
    units, unit = np.unique(np.array([d.unit for d in documents], np.int64), return_inverse=True)
    owner = unit * answers + np.array([d.answer for d in documents], np.int64)
    count = len(units) * answers
    wanted = batch.target_ids != IGNORE
    of_token = batch.document_ids[wanted]
    real = of_token >= 0  # a dummy's one prediction is nobody's
    owners = owner[of_token[real]]
    weights = batch.weights[wanted][real]
    logps = sequence_logps(nll[_like(nll, real)], _like(nll, weights), _like(nll, owners), count)
    references = np.bincount(owner, [d.reference for d in documents], minlength=count)
    tokens = np.bincount(owners, weights != 0, minlength=count)
    return AnswerLogps(logps, _like(nll, references), _like(nll, tokens), units)


def nll_term(batch: MicroBatch, nll: Tensor) -> Tensor:
    """``sum_t w_t nll_t`` [] by the documents' `nll_weights`."""
    weights = np.zeros(batch.target_ids.shape)
    for document, (_, b, start) in zip(_documents(batch), batch.placed, strict=True):
        if document.nll_weights is not None:
            weights[b, start : start + len(document)] = document.nll_weights
    return (nll.double() * _like(nll, weights[batch.target_ids != IGNORE])).sum()


def plain_logp(model: Any, answer: Answer) -> Tensor:
    """The log-probability [1] of an answer by the definition: row by row, from all logits."""
    total = torch.zeros(1, dtype=torch.float64)
    for row in answer.rows:
        nll = full_nll(model, row)
        total = total - (nll @ torch.from_numpy(row.weights[1:]).to(nll)).double()
    return total


def document_logps(
    module: nn.Module, documents: Sequence[AnswerDocument], layout: Layout, world: World,
    autocast: torch.dtype | None = None,
) -> Floats:
    """The log-probability of every document's trained tokens, float64 [D], the same on every rank; no gradient.

    The documents are packed anew, each for itself. `module` is a `TokenLoss`, whole, replicated or sharded.
    """
    apart = [replace(document, unit=i, answer=0, nll_weights=None) for i, document in enumerate(documents)]
    out = np.zeros(len(documents))
    with inspecting(module):
        for batch in layout.micro_batches(apart, world.rank):
            with autocast_to(world.device, autocast):
                _, nll = module(*tensors(batch, module, world.device))
            found = answer_logps(batch, nll, 1)
            out[found.units] = found.logps.cpu().numpy()
    return world.sum(out)


def _documents(batch: MicroBatch) -> Iterator[AnswerDocument]:
    for document, _, _ in batch.placed:
        assert isinstance(document, AnswerDocument)
        yield document


def _like(nll: Tensor, array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(nll.device)
