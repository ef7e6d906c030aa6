"""Objectives: what one optimiser step optimises, as the trainer and `verify` see it. Token losses are the first."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from chatloss.batch import Document, Layout, MicroBatch, documents_of
from chatloss.evaluate import evaluate
from chatloss.parallel import World
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.step import Terms

__all__ = ["Objective", "Supervised", "Survey", "Surveyor", "Work", "first_documents", "full_nll",
           "widened"]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass over all examples finds.

    `trained`: trained tokens per example. Of what must stay in one micro-batch, the most `rows`, `longest` (tokens in a
    pack) and `widest` (tokens in padded rows); for plain rows the last two are the longest row. `largest_id`: the
    largest token id. `digest`: a fingerprint of ids and weights.
    """

    trained: tuple[int, ...]
    longest: int
    widest: int
    rows: int
    largest_id: int
    digest: str


@dataclass(frozen=True, slots=True)
class Work:
    """One rank's part of an optimiser step: what `step.gradient` takes."""

    micro_batches: list[MicroBatch]
    denominators: tuple[float, ...]
    terms: Terms | None = None


class Objective(Protocol):
    """What the trainer asks of an objective. An example is what the batch size counts: a conversation, a pair ...

    `per_token` says that it needs the nll of every token with a gradient (see `TokenLoss`).
    """

    @property
    def per_token(self) -> bool: ...

    def survey(self, examples: Sequence[Any]) -> Survey:
        """One pass over all examples, before anything else."""

    def documents(self, example: Any, unit: int = 0) -> list[Document]:
        """The rows of one example as documents; `unit` is its number in the batch."""

    def answers(self, example: Any) -> Sequence[Any]:
        """The answers of an example whose log-probabilities under a reference model are wanted; maybe none."""

    def referred(self, example: Any, references: Sequence[float]) -> Any:
        """The example with these log-probabilities of its answers."""

    def work(
        self, examples: Sequence[Any], layout: Layout, module: nn.Module, world: World,
        autocast: torch.dtype | None = None,
    ) -> Work:
        """This rank's part of a global batch. `module` may be asked for values without a gradient."""

    def metrics(self, measures: Sequence[float]) -> dict[str, float]:
        """The values to report, from what `terms` measured, summed over micro-batches and ranks."""

    def evaluate(
        self, module: nn.Module, examples: Sequence[Any], layout: Layout, world: World,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        """The loss, and what else is worth knowing, over held-out examples; the same on every rank."""

    def definition(self, model: Any, examples: Sequence[Any]) -> None:
        """Adds the gradient as the definition says it: row by row, all logits, plain sums."""


class Surveyor:
    """Collects a `Survey`, example by example."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.longest = self.widest = self.rows = 1
        self.largest = 0
        self.hash = hashlib.blake2b(digest_size=16)

    def add(self, tokens: int, documents: Sequence[Document], rows: Sequence[Sample]) -> None:
        """One example: its trained tokens, its documents, which stay together if they have units, and all its rows."""
        self.trained.append(tokens)
        self.look(documents)
        self.largest = max([self.largest, *(int(row.input_ids.max(initial=0)) for row in rows)])

    def look(self, documents: Sequence[Document]) -> None:
        """How much room these documents take."""
        lengths = [len(document) for document in documents]
        together = any(document.unit >= 0 for document in documents)
        for group in [lengths] if together else [[length] for length in lengths]:
            self.longest = max(self.longest, sum(group))
            self.widest = max(self.widest, len(group) * max(group, default=0))
            self.rows = max(self.rows, len(group))

    def survey(self) -> Survey:
        return Survey(tuple(self.trained), self.longest, self.widest, self.rows, self.largest, self.hash.hexdigest())


@dataclass(frozen=True, slots=True)
class Supervised:
    """``sum_t u_t w_t nll_t / Z`` of a reduction; an example is all rows of one conversation."""

    reduction: Reduction
    per_token: bool = False

    def survey(self, examples: Sequence[Sequence[Sample]]) -> Survey:
        surveyor = Surveyor()
        for rows in examples:
            weights = self.reduction.of_example(rows)
            surveyor.add(weights.tokens, documents_of(rows, weights), rows)
            surveyor.hash.update(f"example {len(rows)}".encode())
            for row, weight in zip(rows, weights.weights, strict=True):
                surveyor.hash.update(row.input_ids.tobytes() + weight.tobytes())
        return surveyor.survey()

    def documents(self, example: Sequence[Sample], unit: int = 0) -> list[Document]:
        return documents_of(example, self.reduction.of_example(example))

    def answers(self, example: Sequence[Sample]) -> Sequence[Any]:
        return ()

    def referred(self, example: Sequence[Sample], references: Sequence[float]) -> Sequence[Sample]:
        return example

    def work(
        self, examples: Sequence[Sequence[Sample]], layout: Layout, module: nn.Module, world: World,
        autocast: torch.dtype | None = None,
    ) -> Work:
        weights = [self.reduction.of_example(rows) for rows in examples]
        documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
        share = math.fsum(w.denominator for w in weights[world.rank :: world.size])
        return Work(layout.micro_batches(documents, world.rank), (share,))

    def metrics(self, measures: Sequence[float]) -> dict[str, float]:
        return {}

    def evaluate(
        self, module: nn.Module, examples: Sequence[Sequence[Sample]], layout: Layout, world: World,
        autocast: torch.dtype | None = None,
    ) -> dict[str, Any]:
        width = max((len(row) for rows in examples for row in rows), default=1)
        return evaluate(module, examples, self.reduction, widened(layout, width), world, autocast)

    def definition(self, model: Any, examples: Sequence[Sequence[Sample]]) -> None:
        weights = [self.reduction.of_example(rows) for rows in examples]
        z = math.fsum(weight.denominator for weight in weights)
        for rows, weight in zip(examples, weights, strict=True):
            for row, w in zip(rows, weight.weights, strict=True):
                if w.any():
                    nll = full_nll(model, row)
                    (nll @ torch.from_numpy(w[1:]).to(nll) / z).backward()  # type: ignore[no-untyped-call]


def full_nll(model: Any, row: Sample) -> torch.Tensor:
    """nll [n-1] of every token of a row but the first, from all logits of a forward pass of its own."""
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    logp = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
    nll: torch.Tensor = -logp.gather(1, ids[0, 1:, None])[:, 0]
    return nll


def widened(layout: Layout, tokens: int) -> Layout:
    """A layout for evaluations, whose micro-batches have room for `tokens` in any case."""
    return replace(layout, micro_tokens=max(layout.micro_tokens or tokens, tokens), micro_rows=None)


def first_documents(objective: Objective, examples: Sequence[Any], count: int = 3) -> list[Document]:
    """The first few documents of the data, for a look at what a model does with them."""
    return list(islice((d for example in examples for d in objective.documents(example)), count))
