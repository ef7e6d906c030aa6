"""The rows of conversations of one shape: where each token's span ends, counted in the pieces of a recording.

A plan is read off the rows of one conversation that were made as ever. What decided there is the template's pieces, and
so the same for all conversations of the shape, but for what is looked for by its text: a plan holds what must be found
where. Rows of others are then the plan's pieces, encoded; where anything is found elsewhere, or a token reaches across
a place at which a span ends, there is no row, and the conversation goes the usual way.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from chatloss.chat import Conversation
from chatloss.fields import SHORT, Field
from chatloss.paint import Value
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.shapes.shapes import RECORDED, Recording
from chatloss.tokens import FastTokens

__all__ = ["RowPlan", "RowPlans", "row_plan", "same_rows"]

# A plan that has failed more often than served is made anew; a shape that gives none is tried so often.
FIRST_WORTH, MOST_WORTH, MOST_TRIES = 8, 32, 16

# A place in a row: the piece, and how many characters behind its beginning (0 in what is not the template's own text).
_Place = tuple[int, int]


class _Unlike(Exception):
    """Something that rows of other conversations of the shape may not have in common."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One row: its `pieces`, then `tail`; from each of `places` on, the last of which is its end, one of `values`.

    `context` is the index of the place where the last turn begins, `others` are those where the earlier turns of the
    row begin and end. `found`: (piece, its text, where one begins to look for it): it must be found there. `ended`:
    (text, what follows it where it is the last answer), whose end must not be found again in that.
    """

    pieces: tuple[int, ...]
    tail: str
    places: tuple[_Place, ...]
    values: tuple[Value, ...]
    context: int
    others: tuple[tuple[int, int], ...]
    found: tuple[tuple[int, int, _Place], ...]
    ended: tuple[tuple[int, str], ...]


@dataclass(slots=True)
class RowPlan:
    """The rows of a shape, the longest first; `order` is theirs in the conversation.

    `told`: (message, whether it is its reasoning, the pieces that must be that; none where there must be none).
    """

    rows: tuple[_Row, ...]
    order: tuple[int, ...]
    told: tuple[tuple[int, bool, tuple[int, ...]], ...]
    outcomes: Mapping[int, str]
    untrained: Mapping[int, str]

    def samples(
        self, conversation: Conversation, texts: Sequence[str], tokens: FastTokens, decode: Decode
    ) -> list[Sample] | None:
        """The rows of `conversation`, whose recording gave `texts`; None where they may be others."""
        messages = conversation.messages
        if any(m.train is not None or m.weight is not None for m in messages):
            return None
        for k, reasoning, pieces in self.told:
            text = messages[k].reasoning if reasoning else messages[k].content
            if not isinstance(text, str | None) or not _is(text or "", texts, pieces):
                return None
        made: list[Sample] = []
        for row in self.rows:
            encoded = _encoded(row, texts, tokens)
            if encoded is None:
                return None
            made.append(Sample(*encoded, dict(self.outcomes), conversation.source, dict(self.untrained), decode))
        return [made[i] for i in self.order]


def _is(text: str, texts: Sequence[str], pieces: Sequence[int]) -> bool:
    """Whether a text of a message is written as it stands in each of `pieces`, and is none where there are none."""
    text = text.strip()
    if not pieces:
        return not text
    return bool(text) and not text.startswith("<think>") and all(texts[piece] == text for piece in pieces)


def _encoded(row: _Row, texts: Sequence[str], tokens: FastTokens) -> tuple[Any, tuple[Span, ...]] | None:
    parts = [texts[i] for i in row.pieces]
    text = "".join(parts) + row.tail
    ends = [0, *accumulate(map(len, parts)), len(text)]
    for piece, wanted, (at, offset) in row.found:
        if text.find(texts[wanted], ends[at] + offset) != ends[piece]:
            return None
    for wanted, behind in row.ended:
        words = texts[wanted][-SHORT:]
        if (words + behind).rfind(words):
            return None
    chars = [ends[at] + offset for at, offset in row.places]
    begin = chars[row.context]
    prompt = text[:begin]
    encoded, context = tokens.encode_pair(prompt, text[begin:])
    starts, over = encoded.tokens_at(chars)
    if starts != over or context != starts[row.context]:
        return None
    if row.others:
        found = tokens.branches(encoded, prompt, [(chars[a], text[chars[a] : chars[b]]) for a, b in row.others])
        known = [(starts[a], starts[b]) for a, b in row.others]
        if found is None or [(one.context, one.size) for one in found[0]] != known:
            return None
    spans = tuple([Span(a, b, *value) for a, b, value in zip(starts, starts[1:], row.values, strict=False)])
    if any(a >= b for a, b, *_ in spans):
        return None
    return encoded.ids.copy(), spans


def same_rows(some: Sequence[Sample], others: Sequence[Sample]) -> bool:
    """Whether two encodings have the same rows."""
    return len(some) == len(others) and all(
        np.array_equal(a.input_ids, b.input_ids) and a.spans == b.spans
        and (a.outcomes, a.untrained, a.source) == (b.outcomes, b.untrained, b.source)
        for a, b in zip(some, others, strict=True)
    )


def row_plan(
    recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn], rows: Sequence[Sample],
    tokens: FastTokens, *, apart: bool,
) -> RowPlan | None:
    """The plan of `rows`, all that were made of a conversation and its `turns`; None if others may differ.

    `apart`: every turn has a row of its own by the policy.
    """
    try:
        return _Plan(recording, texts, rendering, turns, tokens).of(rows, apart)
    except _Unlike:
        return None


_NOTHING: tuple[RowPlan | None, int] = None, 0


class RowPlans:
    """The plans of an encoder, for the recordings of its template. `planned` counts conversations whose rows they gave.

    `apart`: every turn has a row of its own by the policy.
    """

    def __init__(self, tokens: FastTokens, decode: Decode, *, apart: bool) -> None:
        self._tokens, self._decode, self._apart = tokens, decode, apart
        self._plans: OrderedDict[Recording, tuple[RowPlan | None, int]] = OrderedDict()  # and what it is worth
        self.planned = 0

    def rows(
        self, recording: Recording, texts: Sequence[str], conversation: Conversation
    ) -> list[Sample] | None:
        """The rows of a conversation, or None."""
        plan, worth = self._plans.get(recording, _NOTHING)
        if plan is None:
            return None
        made = plan.samples(conversation, texts, self._tokens, self._decode)
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


class _Plan:
    """Makes the plan of one conversation's rows."""

    def __init__(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn],
        tokens: FastTokens,
    ) -> None:
        self._recording, self._texts, self._rendering, self._tokens = recording, texts, rendering, tokens
        self._turns = {turn.index: turn for turn in turns}
        self._told: dict[tuple[int, bool], set[int]] = {}

    def of(self, rows: Sequence[Sample], apart: bool) -> RowPlan:
        messages = self._rendering.conversation.messages
        if not rows or messages[0].role == "assistant":
            raise _Unlike("what is rendered before the first message is somebody else's")
        for turn in self._turns.values():
            if turn.outcome != "reachable" or turn.stop != "rendered" or turn.trimmed:
                raise _Unlike("a turn that is not plainly trained")
            plain, prompt = self._world(turn.index), self._world(turn.index, True)
            if self._begins(prompt, self._world(turn.index + 1)) is not True or not self._begins(plain, prompt):
                raise _Unlike("a prompt that rewrites history")
        made, members = [], []
        for row in rows:
            inside = sorted({span.message for span in row.spans if span.weight})
            if not inside or any(self._turns.get(i) is None for i in inside):
                raise _Unlike("a row without turns")
            members += inside
            made.append(self._row(row, inside, apart))
        if sorted(members) != sorted(self._turns):
            raise _Unlike("a turn that is not trained in one row")
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        told = tuple((*text, tuple(sorted(pieces))) for text, pieces in self._told.items())
        back = tuple(order.index(i) for i in range(len(rows)))
        return RowPlan(tuple(made[i] for i in order), back, told, dict(rows[0].outcomes), dict(rows[0].untrained))

    def _row(self, row: Sample, inside: Sequence[int], apart: bool) -> _Row:
        base = self._turns[inside[-1]]
        text = base.prompt + base.target
        world = self._world(base.index + 1)
        starts = [0, *accumulate(len(self._texts[i]) for i in world)]
        cut, offset = self._place(world, starts, len(text))
        pieces, ends = world[:cut], starts[: cut + 1]
        tail = self._texts[world[cut]][:offset] if offset else ""
        if any(not self._texts[i] for i in pieces):
            raise _Unlike("an empty piece")
        encoded, _ = self._tokens.encode_pair(base.prompt, base.target)
        assert encoded.starts is not None
        chars = [int(encoded.starts[span.start]) for span in row.spans] + [len(text)]
        at, over = encoded.tokens_at(chars)
        if at != over or at != [*(span.start for span in row.spans), len(row)] or chars[0]:
            raise _Unlike("a token reaches across the end of a span")
        edges = [len(base.prompt)]
        for i in inside[:-1]:
            turn = self._turns[i]
            edges += len(turn.prompt), len(turn.prompt) + len(turn.target)
        if not set(edges) <= set(chars):
            raise _Unlike("a turn that does not begin or end with a span")
        regions: dict[int, int] = {}
        for span, char in zip(row.spans, chars, strict=False):
            regions.setdefault(span.message, char)
        found, ended = [], []
        whole: list[int | str] = [*pieces, tail]
        for k in range(base.index + 1):
            begin = len(self._turns[k].prompt) if k in inside else regions.get(k, -1)
            for field, piece in self._fields(k, pieces, ends, text, begin, k in inside):
                found.append((piece, pieces[piece], self._place(world, starts, begin)))
                if k < base.index:
                    ended += self._ended(k, field, pieces, piece, ends, text, base)
            if k < base.index:
                self._decided(k, base, whole)
        for turn in self._turns.values():
            if turn.index < base.index and turn.index not in inside and not apart:
                if self._begins(self._own(turn), whole) is not False:
                    raise _Unlike("a turn that may share the row")
        return _Row(
            tuple(pieces), tail, tuple(self._place(world, starts, char) for char in chars),
            tuple((span.message, span.weight, span.reason) for span in row.spans), chars.index(edges[0]),
            tuple((chars.index(a), chars.index(b)) for a, b in zip(edges[1::2], edges[2::2], strict=True)),
            tuple(found), tuple(ended),
        )

    def _fields(
        self, k: int, pieces: Sequence[int], ends: Sequence[int], text: str, begin: int, own: bool
    ) -> list[tuple[Field, int]]:
        """The texts of message `k`, each with the piece of the row that it is."""
        message, fields = self._rendering.conversation.messages[k], self._rendering.fields[k]
        if message.tool_calls or not isinstance(message.content, str | None) or message.train is not None:
            raise _Unlike("a message of more than a text")
        if message.reasoning is not None and not own:
            raise _Unlike("reasoning in history")
        at, found = begin, []
        told = {reasoning: self._told.setdefault((k, reasoning), set()) for reasoning in (True, False)}
        for field in fields:
            place = text.find(field.text, at) if begin >= 0 else -1
            piece = ends.index(place) if place in ends[:-1] else -1
            if piece < 0 or self._texts[pieces[piece]] != field.text:
                raise _Unlike("a text that is not written as it stands")
            if pieces[piece] < self._recording.constants:
                raise _Unlike("a text that the template writes too")
            told[field.reason == Reason.REASONING].add(pieces[piece])
            at = place + len(field.text)
            found.append((field, piece))
        if len({field.reason for field in fields}) < len(fields):
            raise _Unlike("a text that is two")
        return found

    def _ended(
        self, k: int, field: Field, pieces: Sequence[int], piece: int, ends: Sequence[int], text: str, base: Turn
    ) -> list[tuple[int, str]]:
        """What decides where a message ends that its own rendering ends in another way."""
        own = self._world(k + 1)
        if self._begins(own, self._world(base.index, True)):
            return []
        starts, before = [0, *accumulate(len(self._texts[i]) for i in own)], self._rendering.prompt(k)
        at = "".join(self._texts[i] for i in own).find(field.text, len(before or ""))
        if at not in starts or self._texts[own[starts.index(at)]] != field.text:
            raise _Unlike("an answer that is not written as it stands")
        self._told[k, field.reason == Reason.REASONING].add(own[starts.index(at)])
        rest = own[starts.index(at) + 1 :]
        behind = "".join(self._texts[i] for i in rest)
        following = self._texts[pieces[piece + 1]] if piece + 1 < len(pieces) else text[ends[-1] :]
        same = next((i for i, (a, b) in enumerate(zip(behind, following, strict=False)) if a != b), len(behind))
        if any(i >= self._recording.constants for i in rest) or same >= len(following):
            raise _Unlike("an answer with more behind it")
        return [(pieces[piece], behind)]

    def _decided(self, k: int, base: Turn, row: Sequence[int | str]) -> None:
        """Raise if another conversation's message `k` may begin or end in another way in the row of `base`."""
        asked: list[tuple[Sequence[int | str], Sequence[int | str]]] = [
            (self._world(k + 1), self._world(base.index, True))
        ]
        if self._rendering.conversation.messages[k].role == "assistant":
            asked += [(self._world(k, True), row), (self._world(k), self._world(k, True))]
        if any(self._begins(*both) is None for both in asked):
            raise _Unlike("whether a rendering begins another depends on the texts")

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _world(self, count: int, prompt: bool = False) -> Sequence[int]:
        found = self._recording.worlds.get((count, prompt))
        if not isinstance(found, tuple):
            raise _Unlike("a rendering that is refused")
        return found

    def _own(self, turn: Turn) -> list[int | str]:
        """The pieces of a turn's prompt and target, the last of them cut."""
        world = self._world(turn.index + 1)
        starts = [0, *accumulate(len(self._texts[i]) for i in world)]
        cut, offset = self._place(world, starts, len(turn.prompt) + len(turn.target))
        return [*world[:cut], *([self._texts[world[cut]][:offset]] if offset else [])]

    def _place(self, world: Sequence[int], starts: Sequence[int], char: int) -> _Place:
        """The place of a character in the pieces of a rendering."""
        if char in starts:
            return starts.index(char), 0
        at = next(i for i, start in enumerate(starts) if start > char) - 1
        if world[at] >= self._recording.constants:
            raise _Unlike("a place inside of a text")
        return at, char - starts[at]

    def _begins(self, a: Sequence[int | str], b: Sequence[int | str]) -> bool | None:
        """Whether the text of pieces `a` begins that of `b`; None if that depends on the texts."""
        for i, one in enumerate(a):
            if i >= len(b):
                return None if not isinstance(self._told_text(one), str) else (False if self._told_text(one) else None)
            if one == b[i]:
                continue
            mine, other = self._told_text(one), self._told_text(b[i])
            if mine is None or other is None:
                return None
            if not mine.startswith(other) and not other.startswith(mine):
                return False
            if i == len(a) - 1 and other.startswith(mine):
                return True
            return False if i == len(b) - 1 and len(mine) > len(other) else None
        return True

    def _told_text(self, piece: int | str) -> str | None:
        """What the template writes there of itself."""
        if isinstance(piece, str):
            return piece
        return self._texts[piece] if piece < self._recording.constants else None
