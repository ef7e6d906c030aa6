"""The plans of an encoder: made where a shape is known, used, and now and then made anew."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from chatloss.plans.reading import row_plan
from chatloss.plans.rows import RowPlan
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Sample
from chatloss.shapes.shapes import RECORDED, Recording
from chatloss.tokens import FastTokens

__all__ = ["RowPlans", "same_rows"]

# A plan that has failed more often than served is made anew; a shape that gives none is tried so often.
FIRST_WORTH, MOST_WORTH, MOST_TRIES = 8, 32, 16


_NOTHING: tuple[RowPlan | None, int] = None, 0


class RowPlans:
    """The plans of an encoder, for the recordings of its template. `planned` counts conversations whose rows they gave.

    `apart`: every turn has a row of its own by the policy.
    """

    def __init__(self, tokens: FastTokens, decode: Decode, *, apart: bool) -> None:
        self._tokens, self._decode, self._apart = tokens, decode, apart
        self._plans: OrderedDict[Recording, tuple[RowPlan | None, int]] = OrderedDict()  # and what it is worth
        self.planned = 0

    def rows(self, recording: Recording, texts: Sequence[str], rendering: Rendering) -> list[Sample] | None:
        """The rows of a conversation, or None."""
        plan, worth = self._plans.get(recording, _NOTHING)
        if plan is None:
            return None
        made = plan.samples(recording, texts, rendering, self._tokens, self._decode)
        self.planned += made is not None
        self._plans[recording] = plan, min(worth + 1, MOST_WORTH) if made is not None else worth - 1
        return made

    def learn(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn],
        rows: Sequence[Sample],
    ) -> None:
        """Make a plan of a conversation's rows, where there is none, or none that serves."""
        plan, worth = self._plans.get(recording, _NOTHING)
        if (plan is None and worth > -MOST_TRIES) or (plan is not None and worth < 0):
            plan = row_plan(recording, texts, rendering, turns, rows, self._tokens, apart=self._apart)
            self._plans[recording] = plan, FIRST_WORTH if plan is not None else worth - 1
            if len(self._plans) > RECORDED:
                self._plans.popitem(last=False)


def same_rows(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    """Whether two encodings have the same rows."""
    return len(some) == len(others) and all(
        np.array_equal(a.input_ids, b.input_ids) and a.spans == b.spans
        and (a.outcomes, a.untrained, a.source) == (b.outcomes, b.untrained, b.source)
        for a, b in zip(some, others, strict=True)
    )
