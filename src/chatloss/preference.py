"""Preference objectives: a loss per pair, and beside it the NLL of chosen answers, each with its own denominator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chatloss.answers import answer_documents, answer_logps, nll_term, plain_logp
from chatloss.batch import Document, Layout, MicroBatch
from chatloss.loss.preference import LossOptions, PreferenceLoss
from chatloss.loss.sequence import PairLogps
from chatloss.objective import Survey, Surveyor, Work, full_nll, widened
from chatloss.pairs import Answer, Pair
from chatloss.parallel import World, inspecting
from chatloss.reduction import ExampleWeights, Reduction
from chatloss.references import Reference
from chatloss.sample import Reason, Sample, Span
from chatloss.step import autocast_to, mean, tensors

__all__ = ["NLLTerm", "Paired"]

Floats = npt.NDArray[np.float64]
MEASURES = ("pairs", "reward/chosen", "reward/rejected", "accuracy", "logp/chosen", "logp/rejected", "tokens/chosen",
            "tokens/rejected", "log_ratio/chosen", "log_ratio/rejected")


@dataclass(frozen=True, slots=True)
class NLLTerm:
    """``coefficient * sum_t w_t nll_t / Z`` over chosen answers, w and Z by a reduction over the global batch.

    `tokens` names the tokens: "trained" ones (the answer), or "all" (the prompt too).
    """

    coefficient: float
    reduction: Reduction
    tokens: str = "trained"

    def of(self, answer: Answer) -> ExampleWeights:
        """Weights per row and the share of Z of one chosen answer."""
        rows = answer.rows if self.tokens == "trained" else [_all_weighed(row) for row in answer.rows]
        return self.reduction.of_example(rows)


def _all_weighed(row: Sample) -> Sample:
    """The row with weight 1 on everything up to its last trained token."""
    end = int(np.flatnonzero(row.weights)[-1]) + 1
    rest = [Span(end, len(row), -1, 0.0, Reason.SCAFFOLD)] if end < len(row) else []
    return Sample(row.input_ids, (Span(0, end, 0, 1.0, Reason.CONTENT), *rest), row.outcomes, row.source)


@dataclass(frozen=True, slots=True)
class Paired:
    """``sum over pairs of loss / P``, P pairs in the global batch, and an NLL term if one is wanted.

    Both answers of a pair share a micro-batch, so that one forward pass gives both log-probabilities before the loss is
    taken. `reference` is asked where answers do not know their reference log-probability.
    """

    loss: PreferenceLoss
    options: LossOptions
    nll: NLLTerm | None = None
    reference: Reference | None = None
    per_token: bool = True

    def survey(self, examples: Sequence[Pair]) -> Survey:
        surveyor = Surveyor()
        for pair in examples:
            answers = (pair.chosen, pair.rejected)
            rows = [row for answer in answers for row in answer.rows]
            surveyor.add(sum(answer.n_trained for answer in answers), self.documents(pair), rows)
            surveyor.hash.update(f"pair {[len(answer.rows) for answer in answers]}".encode())
            for row in rows:
                surveyor.hash.update(row.input_ids.tobytes() + row.weights.tobytes())
        return surveyor.survey()

    def answers(self, example: Pair) -> list[Answer]:
        return [example.chosen, example.rejected]

    def referred(self, example: Pair, references: Sequence[float]) -> Pair:
        chosen, rejected = (replace(answer, reference=value)
                            for answer, value in zip(self.answers(example), references, strict=True))
        return replace(example, chosen=chosen, rejected=rejected)

    def documents(self, example: Pair, unit: int = 0) -> list[Document]:
        weights = None if self.nll is None else self.nll.of(example.chosen).weights
        return [*answer_documents(example.chosen, unit, 0, weights), *answer_documents(example.rejected, unit, 1)]

    def work(
        self, examples: Sequence[Pair], layout: Layout, module: nn.Module, world: World,
        autocast: torch.dtype | None = None,
    ) -> Work:
        documents = [d for unit, pair in enumerate(examples) for d in self.documents(pair, unit)]
        documents = self._compared(examples, documents)
        mine = examples[world.rank :: world.size]
        shares = [float(len(mine))]
        if self.nll is not None:
            shares.append(math.fsum(self.nll.of(pair.chosen).denominator for pair in mine))
        return Work(layout.micro_batches(documents, world.rank), tuple(shares), self.terms)

    def _compared(self, examples: Sequence[Pair], documents: list[Any]) -> list[Any]:
        """The documents with their reference log-probabilities, computed now unless the pairs know them."""
        known = all(answer.reference is not None for pair in examples for answer in (pair.chosen, pair.rejected))
        if known or not self.loss.reference:
            return documents
        assert self.reference is not None, "neither the pairs nor anybody else knows the reference"
        values = self.reference(documents)
        return [replace(d, reference=float(value)) for d, value in zip(documents, values, strict=True)]

    def terms(self, batch: MicroBatch, sums: Tensor, nll: Tensor) -> tuple[Tensor, Floats]:
        """The numerators of a micro-batch, and what `metrics` is made of, summed over its pairs."""
        found = answer_logps(batch, nll, 2)
        pairs = PairLogps(found.logps[0::2], found.logps[1::2], found.references[0::2], found.references[1::2],
                          found.tokens[0::2], found.tokens[1::2])
        numerators = [self.loss.function(pairs, self.options).sum()]
        if self.nll is not None:
            numerators.append(self.nll.coefficient * nll_term(batch, nll))
        return torch.stack(numerators), self._measures(pairs)

    def _measures(self, pairs: PairLogps) -> Floats:
        with torch.no_grad():
            seen = pairs.mean() if self.loss.mean else pairs
            chosen, rejected = self.options.beta * seen.ratio_chosen, self.options.beta * seen.ratio_rejected
            values = (torch.ones_like(chosen), chosen, rejected, (chosen > rejected).double(), pairs.chosen,
                      pairs.rejected, pairs.n_chosen, pairs.n_rejected, pairs.ratio_chosen, pairs.ratio_rejected)
            return torch.stack([value.double().sum() for value in values]).cpu().numpy()

    def metrics(self, measures: Sequence[float]) -> dict[str, float]:
        """Rewards (beta times log-ratio, or log-probability without a reference), their margin, how often it is
        positive, and log-probabilities and log-ratios in nats per trained token."""
        sums = dict(zip(MEASURES, measures, strict=True))
        out = {key: mean(sums[key], sums["pairs"]) for key in ("reward/chosen", "reward/rejected")}
        out["margin"] = out["reward/chosen"] - out["reward/rejected"]
        out["accuracy"] = mean(sums["accuracy"], sums["pairs"])
        kinds = ("logp", "log_ratio") if self.loss.reference else ("logp",)
        return out | {f"{kind}/{side}": mean(sums[f"{kind}/{side}"], sums[f"tokens/{side}"])
                      for kind in kinds for side in ("chosen", "rejected")}

    def evaluate(
        self, module: nn.Module, examples: Sequence[Pair], layout: Layout, world: World,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Loss and metrics over held-out pairs."""
        survey = self.survey(examples)
        layout = widened(layout, survey.longest if layout.packing == "best_fit" else survey.widest)
        totals: Any = 0.0
        for at in range(0, len(examples), 256):
            work = self.work(examples[at : at + 256], layout, module, world, autocast)
            totals = totals + measured(work, module, world, autocast)
        return evaluation(totals, 1 if self.nll is None else 2, self.metrics)

    def definition(self, model: Any, examples: Sequence[Pair]) -> None:
        z = math.fsum(self.nll.of(pair.chosen).denominator for pair in examples) if self.nll else 1.0
        for pair in examples:
            both = self.answers(pair)
            references = [torch.tensor([answer.reference or 0.0], dtype=torch.float64) for answer in both]
            tokens = [torch.tensor([answer.n_trained], dtype=torch.float64) for answer in both]
            logps = PairLogps(*(plain_logp(model, answer) for answer in both), *references, *tokens)
            loss = self.loss.function(logps, self.options).sum() / len(examples)
            if self.nll is not None:
                for row, w in zip(pair.chosen.rows, self.nll.of(pair.chosen).weights, strict=True):
                    nll = full_nll(model, row)
                    loss = loss + self.nll.coefficient * (nll @ torch.from_numpy(w[1:]).to(nll)) / z
            loss.backward()  # type: ignore[no-untyped-call]


def measured(work: Work, module: nn.Module, world: World, autocast: torch.dtype | None) -> Floats:
    """Numerators, denominators and measures of `work`, summed over micro-batches and ranks, without a gradient."""
    assert work.terms is not None
    totals: list[Floats] = []
    tokens = 0
    with inspecting(module):
        for batch in work.micro_batches:
            with autocast_to(world.device, autocast):
                sums, nll = module(*tensors(batch, module, world.device))
            numerators, measures = work.terms(batch, sums, nll)
            totals.append(np.concatenate([numerators.double().cpu().numpy(), measures]))
            tokens += int((batch.weights != 0).sum())
    return world.sum([tokens, *work.denominators, *sum(totals)])  # type: ignore[misc]


def evaluation(
    totals: Sequence[float], terms: int, metrics: Callable[[Sequence[float]], dict[str, float]]
) -> dict[str, Any]:
    """What an evaluation reports, from sums as `measured` gives them."""
    tokens, z, numerators = totals[0], totals[1 : 1 + terms], totals[1 + terms : 1 + 2 * terms]
    loss = math.fsum(mean(n, d) for n, d in zip(numerators, z, strict=True))
    return {"loss": loss, **metrics(totals[1 + 2 * terms :]), "tokens": int(tokens)}
