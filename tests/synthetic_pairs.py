"""Hand-made pairs and judged answers: what the tests of preference objectives share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from chatloss.answers import plain_logp
from chatloss.pairs import Answer, Judged, Pair, mismatched
from chatloss.sample import Reason
from tests.synthetic import FAMILIES, VOCAB, row
from tests.torch_reference import tiny


def answer(prompt: np.ndarray, lengths: Sequence[int], seed: int, **of_answer: Any) -> Answer:
    """Turns of `lengths` trained tokens behind a prompt, an untrained token between and behind them."""
    random = np.random.default_rng(seed)
    ids = np.concatenate([prompt, random.integers(0, VOCAB, sum(lengths) + len(lengths))])
    parts: list[tuple[int, int, float, Reason]] = [(len(prompt), 0, 0.0, Reason.OTHER_ROLE)]
    for k, n in enumerate(lengths):
        parts += [(n, 2 * k + 1, 1.0, Reason.CONTENT), (1, 2 * k + 1, 0.0, Reason.SCAFFOLD)]
    return Answer((row(parts, ids, f"pairs.jsonl:{seed}"),), **of_answer)


def pairs(n: int, seed: int = 0, most: int = 12, references: bool = True) -> list[Pair]:
    """n pairs of uneven lengths, with reference log-probabilities around those of a random model."""
    random = np.random.default_rng(seed)
    made = []
    for i in range(n):
        prompt = random.integers(0, VOCAB, random.integers(2, most))
        both = []
        for side in range(2):
            turns = [int(random.integers(1, most)) for _ in range(random.integers(1, 3))]
            reference = float(-4.1 * sum(turns) + random.normal(scale=3)) if references else None
            both.append(answer(prompt, turns, 10_000 * seed + 2 * i + side, reference=reference))
        made.append(Pair(*both, source=f"pairs.jsonl:{i + 1}"))
    return made


def judged(n: int, seed: int = 0, references: bool = True) -> list[Judged]:
    flat = [replace(side, desirable=good) for pair in pairs(n, seed, references=references)
            for side, good in ((pair.chosen, True), (pair.rejected, False))]
    made = mismatched(flat[:-1])
    if not references:
        return made
    model = tiny(FAMILIES["llama"])
    with torch.no_grad():
        return [replace(one, mismatched=replace(one.mismatched, reference=plain_logp(model, one.mismatched).item() - 2))
                for one in made]
