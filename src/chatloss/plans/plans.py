"""The plans of an encoder: made where a shape is known, used, and now and then made anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np

from chatloss.chat import Message
from chatloss.encoding import Encoding
from chatloss.fast_tokens import FlatTokens
from chatloss.frozen import made_quickly
from chatloss.plans.placed import Draft, Placed, placed
from chatloss.plans.reading import row_plan
from chatloss.plans.rows import RowPlan, wishes
from chatloss.plans.spaced import Spaced
from chatloss.reference import Rendering
from chatloss.sample import Decode, Sample
from chatloss.shapes.recording import Recording
from chatloss.shapes.shapes import SMALL

__all__ = ["Planned", "RowPlans", "same_encodings", "same_rows"]

# A plan that has failed more often than served is made anew; a shape that gives none is tried so often.
FIRST_WORTH, MOST_WORTH, MOST_TRIES = 8, 32, 16
LONG_TRIES = 3  # of more than `SMALL` messages, where a try takes as long as several conversations
SAMPLE = 256  # of so many conversations with rows by plan, one is to be compared


@made_quickly
@dataclass(frozen=True, slots=True)
class Planned:
    """A conversation of which a plan has said what is to be encoded.

    `spaced`: some of its texts end with space, as none did in the conversation that the plan was read off.
    """

    recording: Recording
    texts: Sequence[str]
    plan: RowPlan
    rendering: Rendering
    drafts: list[Draft]
    spaced: bool = False


@dataclass(frozen=True, slots=True)
class Refused:
    """What is found out about every conversation of a shape, in each turn of which the template refuses it."""

    encoding: Encoding

    @classmethod
    def read(cls, messages: Sequence[Message], encoding: Encoding) -> Refused | None:
        """That of a conversation, all turns of which the recording refuses."""
        return None if wishes(messages) or encoding.rows else cls(replace(encoding, turns=()))

    def of(self, messages: Sequence[Message]) -> Encoding | None:
        """What another conversation of the shape gives."""
        if wishes(messages):
            return None
        outcomes, untrained = dict(self.encoding.outcomes), dict(self.encoding.untrained)
        return Encoding([], outcomes, untrained, self.encoding.problems)


@dataclass(slots=True)
class _Tried:
    """What is known of a recording's plan: how often it served more than not, and whether it is still to be compared.
    """

    plan: RowPlan | Refused | None = None
    worth: int = 0
    new: bool = False


class RowPlans:
    """The plans of an encoder, for the recordings of its template. `planned` counts conversations whose rows they gave.

    `apart`: every turn has a row of its own by the policy. `longest`: of a conversation with a row of more tokens it
    gives none (0: of all).
    """

    def __init__(self, tokens: FlatTokens, decode: Decode, *, apart: bool, longest: int = 0) -> None:
        self._spaced = Spaced()
        self._tokens, self._decode, self._apart, self._longest = tokens, decode, apart, longest
        self._tried: WeakKeyDictionary[Recording, _Tried] = WeakKeyDictionary()
        self.planned = 0

    def known(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering
    ) -> Planned | tuple[Recording, Sequence[str]] | None:
        """The recording and texts that have a plan, or may have one; None for those hardly seen yet.

        If some texts end with space, and the plan for texts without it serves: what is to be encoded.
        """
        values = [*texts[recording.constants :]]
        if [value.strip() for value in values] == values:
            return recording, texts
        tried = self._tried.get(recording)
        plan = tried and tried.plan
        if isinstance(plan, RowPlan) and any(value[-1:].isspace() for value in values):
            bare = [*texts[: recording.constants], *[value.rstrip() for value in values]]
            supple = all(text and i not in plan.stiff for i, text in enumerate(bare) if len(text) < len(texts[i]))
            if supple and not any(value[:1].isspace() for value in values):
                drafts = plan.drafts(recording, texts, rendering, bare)
                if drafts is not None:
                    return Planned(recording, texts, plan, rendering, drafts, True)
        return self._spaced.of(recording, texts)

    def begun(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering
    ) -> Planned | tuple[Encoding, bool] | None:
        """What is to be encoded of a conversation; or what is found out about it, and whether that is to be compared
        with what is as ever; None where neither is known.
        """
        tried = self._tried.get(recording)
        if tried is None or tried.plan is None:
            return None
        plan = tried.plan
        if isinstance(plan, Refused):
            refused = plan.of(rendering.conversation.messages)
            return None if refused is None else (refused, self._served(tried))
        drafts = plan.drafts(recording, texts, rendering)
        if drafts is None:
            tried.worth -= 1
            return None
        return Planned(recording, texts, plan, rendering, drafts)

    def rows(self, begun: Sequence[Planned]) -> list[tuple[list[Sample], bool] | None]:
        """The rows of conversations, all encoded at once, or None; and whether they are to be compared with those made
        as ever: the first of each plan, and one in `SAMPLE`.
        """
        found = placed([draft for one in begun for draft in one.drafts], self._tokens)
        at, all_rows = 0, []
        for one in begun:
            rows = one.plan.samples(found[at : at + len(one.drafts)], one.rendering, self._decode)
            tried = self._tried[one.recording]
            if rows is None:
                tried.worth -= 1
            elif self._longest and max(map(len, rows)) > self._longest:
                rows = None  # what is cut depends on more than the shape
            all_rows.append(None if rows is None else (rows, self._served(tried)))
            at += len(one.drafts)
        return all_rows

    def _served(self, tried: _Tried) -> bool:
        self.planned += 1
        compared = tried.new or self.planned % SAMPLE == 0
        tried.new = False
        tried.worth = min(tried.worth + 1, MOST_WORTH)
        return compared

    def learn(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, encoding: Encoding
    ) -> None:
        """Make a plan of a conversation's encoding, where there is none, or none that serves."""
        tried = self._tried.setdefault(recording, _Tried())
        rows, messages = encoding.rows, rendering.conversation.messages
        tries = LONG_TRIES if len(messages) > SMALL else MOST_TRIES
        if tried.worth >= 0 if tried.plan is not None else tried.worth <= -tries:
            return
        refused = {turn.index for turn in encoding.turns if _is_refused(recording, turn.index, messages)}
        turns = [turn for turn in encoding.turns if turn.index not in refused]
        plan: RowPlan | Refused | None
        if not {problem.message for problem in encoding.problems} <= refused:
            return
        if refused and not turns:
            plan = Refused.read(messages, encoding)
            if plan is None:
                return
        else:
            plan = row_plan(
                recording, texts, rendering, turns, rows, self._tokens, apart=self._apart, problems=encoding.problems
            )
            # What must hold for others must have held here, where luck may have decided too.
            if plan is not None and not same_rows(self._by(plan, recording, texts, rendering) or (), rows):
                plan = None
        if plan is not None:
            tried.plan, tried.worth, tried.new = plan, FIRST_WORTH, True
        else:
            tried.plan = None
            tried.worth -= 1

    def _by(
        self, plan: RowPlan, recording: Recording, texts: Sequence[str], rendering: Rendering
    ) -> list[Sample] | None:
        drafts = plan.drafts(recording, texts, rendering)
        found: list[Placed | None] = placed(drafts or (), self._tokens)
        return plan.samples(found, rendering, self._decode) if drafts else None


def _is_refused(recording: Recording, index: int, messages: Sequence[Message]) -> bool:
    """Whether the template refuses a turn in every conversation of the shape: its prompt, or its own rendering."""
    asked = (index, messages[index].role == "assistant"), (index + 1, False)
    return any(isinstance(recording.worlds.get(world), Exception) for world in asked)


def same_encodings(one: Encoding, other: Encoding) -> bool:
    """Whether two encodings are the same but for their turns."""
    return same_rows(one.rows, other.rows) and (
        (one.outcomes, one.untrained, one.problems) == (other.outcomes, other.untrained, other.problems)
    )


def same_rows(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    """Whether two encodings have the same rows."""
    return len(some) == len(others) and all(
        np.array_equal(a.input_ids, b.input_ids) and a.spans == b.spans
        and (a.outcomes, a.untrained, a.source) == (b.outcomes, b.untrained, b.source)
        for a, b in zip(some, others, strict=True)
    )
