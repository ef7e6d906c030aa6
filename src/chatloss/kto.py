"""KTO: judged single answers, compared with a baseline that belongs to the whole global batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from chatloss.answers import answer_documents, answer_logps, document_logps, plain_logp
from chatloss.batch import Document, Layout, MicroBatch
from chatloss.loss.preference import kto
from chatloss.objective import Survey, Surveyor, Work, widened
from chatloss.pairs import Answer, Judged
from chatloss.parallel import World
from chatloss.preference import evaluation, measured
from chatloss.references import Reference
from chatloss.step import mean

__all__ = ["Unpaired"]

Floats = npt.NDArray[np.float64]
MEASURES = ("desirable", "undesirable", "reward/desirable", "reward/undesirable", "logp/desirable", "logp/undesirable",
            "tokens/desirable", "tokens/undesirable", "log_ratio/desirable", "log_ratio/undesirable", "kl")


@dataclass(frozen=True, slots=True)
class Unpaired:
    """``sum over answers of loss / A``, A answers in the global batch (Ethayarajh et al. 2024).

    The baseline z0 is the mean log-ratio of mismatched answers over the same global batch, over all micro-batches and
    ranks, and at least 0. It needs a forward pass of its own before the first backward, so no cut of the batch can
    change it.
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference: Reference | None = None
    per_token: bool = True

    def survey(self, examples: Sequence[Judged]) -> Survey:
        surveyor = Surveyor()
        for example in examples:
            for answer in (example.mismatched, example.answer):
                documents = answer_documents(answer, 0)
                if answer is example.answer:
                    surveyor.add(answer.n_trained, documents, answer.rows)
                else:
                    surveyor.look(documents)
                surveyor.hash.update(f"answer {answer.desirable} {len(answer.rows)}".encode())
                for row in answer.rows:
                    surveyor.hash.update(row.input_ids.tobytes() + row.weights.tobytes())
        return surveyor.survey()

    def answers(self, example: Judged) -> list[Answer]:
        return [example.answer, example.mismatched]

    def referred(self, example: Judged, references: Sequence[float]) -> Judged:
        return Judged(replace(example.answer, reference=references[0]),
                      replace(example.mismatched, reference=references[1]))

    def documents(self, example: Judged, unit: int = 0) -> list[Document]:
        return list(answer_documents(example.answer, unit))

    def work(
        self, examples: Sequence[Judged], layout: Layout, module: nn.Module, world: World,
        autocast: torch.dtype | None = None,
    ) -> Work:
        own = [d for unit, example in enumerate(examples) for d in answer_documents(example.answer, unit)]
        other = [d for unit, example in enumerate(examples) for d in answer_documents(example.mismatched, unit)]
        if any(answer.reference is None for example in examples for answer in self.answers(example)):
            assert self.reference is not None, "neither the answers nor anybody else knows the reference"
            values = self.reference([*own, *other])
            own, other = (
                [replace(d, reference=float(v)) for d, v in zip(documents, found, strict=True)]
                for documents, found in ((own, values[: len(own)]), (other, values[len(own) :]))
            )
        ratios = document_logps(module, other, layout, world, autocast) - [d.reference for d in other]
        baseline = max(0.0, math.fsum(ratios) / len(examples))
        desirable = np.array([bool(example.answer.desirable) for example in examples])
        share = float(len(examples[world.rank :: world.size]))
        terms = partial(self.terms, desirable=desirable, baseline=baseline)
        return Work(layout.micro_batches(own, world.rank), (share,), terms)

    def terms(
        self, batch: MicroBatch, sums: Tensor, nll: Tensor, *, desirable: npt.NDArray[np.bool_], baseline: float
    ) -> tuple[Tensor, Floats]:
        """The numerator of a micro-batch, and what `metrics` is made of, summed over its answers."""
        found = answer_logps(batch, nll, 1)
        good = torch.from_numpy(desirable[found.units]).to(nll.device)
        ratios = found.logps - found.references
        loss = kto(ratios, good, baseline, self.beta, self.desirable_weight, self.undesirable_weight)
        with torch.no_grad():
            ones = torch.ones_like(ratios)
            values = [(value * mask).sum() for value in (ones, self.beta * ratios, found.logps, found.tokens, ratios)
                      for mask in (good, ~good)]
            measures = torch.stack([*values, baseline * ones.sum()]).cpu().numpy()
        return loss.sum()[None], measures

    def metrics(self, measures: Sequence[float]) -> dict[str, float]:
        """Mean rewards (beta times log-ratio) of both kinds, their margin, log-probabilities and log-ratios in nats per
        trained token, and ``kl``, the baseline; a kind that does not occur is left out."""
        sums = dict(zip(MEASURES, measures, strict=True))
        out = {"kl": mean(sums["kl"], sums["desirable"] + sums["undesirable"])}
        for kind in ("desirable", "undesirable"):
            if sums[kind]:
                out[f"reward/{kind}"] = sums[f"reward/{kind}"] / sums[kind]
                for name in ("logp", "log_ratio"):
                    out[f"{name}/{kind}"] = sums[f"{name}/{kind}"] / sums[f"tokens/{kind}"]
        if sums["desirable"] and sums["undesirable"]:
            out["margin"] = out["reward/desirable"] - out["reward/undesirable"]
        return out

    def evaluate(
        self, module: nn.Module, examples: Sequence[Judged], layout: Layout, world: World,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """Loss and metrics over held-out answers, with one baseline for all of them."""
        survey = self.survey(examples)
        layout = widened(layout, survey.longest if layout.packing == "best_fit" else survey.widest)
        work = self.work(examples, layout, module, world, autocast)
        return evaluation(measured(work, module, world, autocast).tolist(), 1, self.metrics)

    def definition(self, model: Any, examples: Sequence[Judged]) -> None:
        with torch.no_grad():
            others = [float(plain_logp(model, other := example.mismatched)) - (other.reference or 0.0)
                      for example in examples]
        baseline = max(0.0, math.fsum(others) / len(examples))
        for example in examples:
            ratio = plain_logp(model, example.answer) - (example.answer.reference or 0.0)
            good = torch.tensor([bool(example.answer.desirable)])
            loss = kto(ratio, good, baseline, self.beta, self.desirable_weight, self.undesirable_weight).sum()
            (loss / len(examples)).backward()  # type: ignore[no-untyped-call]

