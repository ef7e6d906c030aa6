"""The plans of an encoder: made where a shape is known, used, and now and then made anew."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from chatloss.plans.reading import row_plan
from chatloss.plans.rows import RowPlan
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Sample
from chatloss.shapes.shapes import Recording
from chatloss.tokens import FastTokens

__all__ = ["RowPlans", "same_rows"]

# A plan that has failed more often than served is made anew; a shape that gives none is tried so often.
FIRST_WORTH, MOST_WORTH, MOST_TRIES = 8, 32, 16
SAMPLE = 256  # of so many conversations with rows by plan, one is to be compared


class RowPlans:
    """The plans of an encoder, for the recordings of its template. `planned` counts conversations whose rows they gave.

    `compared`: whether the rows that were given last are to be compared with those made as ever: the first of each
    plan, and one in `SAMPLE`. `apart`: every turn has a row of its own by the policy.
    """

    def __init__(self, tokens: FastTokens, decode: Decode, *, apart: bool) -> None:
        self._tokens, self._decode, self._apart = tokens, decode, apart
        self._plans: WeakKeyDictionary[Recording, RowPlan] = WeakKeyDictionary()
        self._worth: WeakKeyDictionary[Recording, int] = WeakKeyDictionary()
        self._new: WeakSet[Recording] = WeakSet()
        self.planned = 0
        self.compared = False

    def rows(self, recording: Recording, texts: Sequence[str], rendering: Rendering) -> list[Sample] | None:
        """The rows of a conversation, or None."""
        plan = self._plans.get(recording)
        if plan is None:
            return None
        made, worth = plan.samples(recording, texts, rendering, self._tokens, self._decode), self._worth[recording]
        self._worth[recording] = min(worth + 1, MOST_WORTH) if made is not None else worth - 1
        if made is not None:
            self.planned += 1
            self.compared = recording in self._new or self.planned % SAMPLE == 0
            self._new.discard(recording)
        return made

    def learn(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn],
        rows: Sequence[Sample],
    ) -> None:
        """Make a plan of a conversation's rows, where there is none, or none that serves."""
        worth, there = self._worth.get(recording, 0), recording in self._plans
        if worth >= 0 if there else worth <= -MOST_TRIES:
            return
        plan = row_plan(recording, texts, rendering, turns, rows, self._tokens, apart=self._apart)
        # What must hold for others must have held here, where luck may have decided too.
        made = plan.samples(recording, texts, rendering, self._tokens, self._decode) if plan is not None else None
        if plan is not None and made is not None and same_rows(made, rows):
            self._plans[recording], self._worth[recording] = plan, FIRST_WORTH
            self._new.add(recording)
        else:
            self._plans.pop(recording, None)
            self._worth[recording] = worth - 1


def same_rows(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    """Whether two encodings have the same rows."""
    return len(some) == len(others) and all(
        np.array_equal(a.input_ids, b.input_ids) and a.spans == b.spans
        and (a.outcomes, a.untrained, a.source) == (b.outcomes, b.untrained, b.source)
        for a, b in zip(some, others, strict=True)
    )
