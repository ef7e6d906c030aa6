"""How a plan is read off the rows that were made of one conversation as ever.

Refused is all that another conversation of the shape might have otherwise although the template writes the same pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from chatloss.fields import Field, Missing, locate
from chatloss.places import Seen, end_in, place_in
from chatloss.plans.rows import Aside, Place, Row, RowPlan, Values, alike
from chatloss.reference import Rendering, Turn
from chatloss.sample import Reason, Sample, Span
from chatloss.shapes.shapes import Recording
from chatloss.tokens import Encoded, FastTokens

__all__ = ["row_plan"]


class _Unlike(Exception):
    """Something that rows of other conversations of the shape may not have in common."""


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


def _values(spans: Sequence[Span]) -> Values:
    return tuple(s.message for s in spans), tuple(s.weight for s in spans), tuple(s.reason for s in spans)


def _part(values: Values, first: int, last: int | None) -> Values:
    messages, weights, reasons = values
    return messages[first:last], weights[first:last], reasons[first:last]


class _Plan:
    """Makes the plan of one conversation's rows."""

    def __init__(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn],
        tokens: FastTokens,
    ) -> None:
        self._recording, self._texts, self._rendering, self._tokens = recording, texts, rendering, tokens
        self._turns = {turn.index: turn for turn in turns}
        self._told: dict[tuple[int, bool], set[int]] = {}
        self._unlike: set[tuple[int, str]] = set()

    def of(self, rows: Sequence[Sample], apart: bool) -> RowPlan:
        messages = self._rendering.conversation.messages
        if not rows or messages[0].role == "assistant":
            raise _Unlike("what is rendered before the first message is somebody else's")
        if any(message.train is not None or message.weight is not None for message in messages):
            raise _Unlike("a wish of the data, which others do not have")
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
        first = max(range(len(rows)), key=lambda i: len(rows[i]))
        others = {i: self._aside(made[first], made[i]) for i in range(len(rows)) if i != first}
        asides, rest = {i: one for i, one in others.items() if one}, [i for i, one in others.items() if not one]
        order = [first, *asides, *rest]
        told = tuple((*text, tuple(sorted(pieces))) for text, pieces in self._told.items())
        back = tuple(order.index(i) for i in range(len(rows)))
        unlike = tuple(sorted(self._unlike))
        outcomes, untrained = dict(rows[0].outcomes), dict(rows[0].untrained)
        return RowPlan(
            made[first], tuple(asides.values()), tuple(made[i] for i in rest), back, told, unlike, outcomes, untrained
        )

    def _row(self, row: Sample, inside: Sequence[int], apart: bool) -> Row:
        base = self._turns[inside[-1]]
        text = base.prompt + base.target
        world = self._world(base.index + 1)
        starts = self._starts(world)
        cut, offset = self._place(world, starts, len(text))
        pieces, ends = world[:cut], starts[: cut + 1]
        tail = self._texts[world[cut]][:offset] if offset else ""
        if any(not self._texts[i] for i in pieces):
            raise _Unlike("an empty piece")
        encoded, _ = self._tokens.encode_pair(base.prompt, base.target)
        if encoded.starts is None or not np.array_equal(encoded.ids, row.input_ids):
            raise _Unlike("a target that is encoded apart")
        seen, begins = Seen(base.prompt), [0]
        for k in range(base.index):
            begins.append(end_in(seen, self._rendering, k, begins[-1])[0])
        found, ended, called, shown = [], [], [], []
        whole: list[int | str] = [*pieces, tail]
        moved: list[int] = []  # characters that `shown` messages are found at
        texts: list[tuple[int, int]] = []  # where the fields of earlier messages begin and end
        trained: list[tuple[int, int]] = []  # and those of turns
        for k in range(base.index + 1):
            own = self._turns[k] if k in inside else None
            begin = len(own.prompt) if own is not None else begins[k]
            if k < base.index:
                self._decided(k, base, whole)
            by_text = k < base.index and not self._begins(self._world(k + 1), self._world(base.index, True))
            calls = bool(self._rendering.conversation.messages[k].tool_calls)
            more = calls or (by_text and (len(self._rendering.fields[k]) > 1 or not self._goes_on(
                k + 1, pieces, ends, text, begins)))
            if own is None and (more or not self._is_plain(k, pieces, ends, text, begin)):
                end = begins[k + 1]
                fields = place_in(Seen(base.prompt), self._rendering, k, begin, end, text).fields
                texts += [(a, b) for a, b, _ in fields]
                moved += [char for a, b, _ in fields for char in (a, b)]
                places = self._place(world, starts, begin), self._place(world, starts, end)
                shown.append((k, *places, tuple(self._within(ends, a, b) for a, b, _ in fields), by_text))
                continue
            fields_of_k = self._fields(k, pieces, ends, text, begin)
            if own is not None:
                self._only_constants(pieces, ends, [piece for _, piece in fields_of_k], own, calls)
            for field, piece in fields_of_k:
                found.append((piece, pieces[piece], self._place(world, starts, begin)))
                (texts if own is None else trained).append((ends[piece], ends[piece] + len(field.text)))
                if by_text:
                    ended.append(self._ended(k, field, pieces, piece, text[ends[-1] :]))
            if own is not None and calls:
                last = len(own.prompt) + len(own.target)
                called.append((k, self._place(world, starts, begin), last, self._called(k, text, own)))
                if by_text:
                    raise _Unlike("a turn that is written otherwise behind its stop")
        chars, loose = self._chars(row, encoded, texts, trained)
        edges = [len(base.prompt)]
        for i in inside[:-1]:
            turn = self._turns[i]
            edges += len(turn.prompt), len(turn.prompt) + len(turn.target)
        if not {*edges, *(last for *_, last, _ in called)} <= set(chars):
            raise _Unlike("a turn that does not begin or end with a span")
        for other in self._turns.values():
            aside = other.index < base.index and other.index not in inside and not apart
            if aside and self._begins(self._own(other), whole) is not False:
                raise _Unlike("a turn that may share the row")
        return Row(
            tuple(pieces), tail,
            tuple((-1, moved.index(char)) if char in moved else self._place(world, starts, char) for char in chars),
            _values(row.spans), loose, chars.index(edges[0]),
            tuple((chars.index(a), chars.index(b)) for a, b in zip(edges[1::2], edges[2::2], strict=True)),
            tuple(found), tuple(ended),
            tuple((k, place, chars.index(last), reasons) for k, place, last, reasons in called), tuple(shown),
        )

    def _only_constants(
        self, pieces: Sequence[int], ends: Sequence[int], fields: Sequence[int], own: Turn, calls: bool
    ) -> None:
        """Raise if what stands between a turn's texts, or between the last one and its stop, is not the template's."""
        stop = len(own.prompt) + len(own.target)
        edges = [*fields, *([] if calls else [bisect_left(ends, stop)])]
        inner = [i for a, b in pairwise(edges) for i in range(a + 1, min(b, len(pieces)))]
        if any(pieces[i] >= self._recording.constants for i in inner):
            raise _Unlike("a text of something else within a turn")

    def _within(self, ends: Sequence[int], a: int, b: int) -> tuple[Place, int]:
        """Where a field begins, in characters from the beginning of its piece, and the piece in which it ends."""
        at = bisect_right(ends, a) - 1
        return (at, a - ends[at]), bisect_left(ends, b) - 1

    def _chars(
        self, row: Sample, encoded: Encoded, texts: Sequence[tuple[int, int]], trained: Sequence[tuple[int, int]]
    ) -> tuple[list[int], dict[int, bool]]:
        """Where the spans of a row begin, and where it ends; which of that are the ends of texts, as `Row.loose`."""
        assert encoded.starts is not None and encoded.ends is not None
        begins, ends = [a for a, _ in texts], [b for _, b in (*texts, *trained)]
        if {*begins, *(a for a, _ in trained)} & {*ends}:
            raise _Unlike("texts with nothing between them")
        at, over = encoded.tokens_at([*(a for a, _ in trained), *begins, *ends])
        if at[: -len(ends)] != over[: -len(ends)]:  # what stands before it may have lost its only token
            raise _Unlike("a token reaches across the beginning of a text")
        at, over = at[len(trained) :], over[len(trained) :]
        first = dict(zip(over[: len(begins)], begins, strict=True))
        behind = dict(zip(at[len(begins) :], ends, strict=True))
        chars: list[int] = []
        loose: dict[int, bool] = {}
        for i, span in enumerate(row.spans):
            start = int(encoded.starts[span.start])
            char = first.get(span.start, behind.get(span.start, start))
            if char != start and span.reason not in (Reason.SCAFFOLD, Reason.CALL):
                raise _Unlike("a text with nothing behind it")
            if char in begins or char in ends:
                loose[i] = char in begins
            elif encoded.tokens_at([start]) != ([span.start], [span.start]):
                raise _Unlike("a token reaches across the end of a span")
            chars.append(char)
        chars.append(int(encoded.ends[-1]))
        if chars[0] or 0 in loose:
            raise _Unlike("a row that begins with a text")
        return chars, loose

    def _called(self, k: int, text: str, turn: Turn) -> tuple[Reason, ...]:
        """The reasons of the fields of a turn with calls."""
        found = locate(text, self._rendering.fields[k], len(turn.prompt), len(turn.prompt) + len(turn.target))
        if isinstance(found, Missing):
            raise _Unlike("a call that is not written within its turn")
        reasons = tuple(reason for *_, reason in found)
        if any(a == Reason.REASONING and b == Reason.CALL for a, b in pairwise(reasons)):
            raise _Unlike("a call right behind reasoning, whose closing tag is told by where the call begins")
        return reasons

    def _goes_on(
        self, k: int, pieces: Sequence[int], ends: Sequence[int], text: str, begins: Sequence[int]
    ) -> bool:
        """Whether message `k` plainly follows: it is looked for where the one before is written otherwise."""
        return self._rendering.conversation.messages[k].role == "assistant" or (
            k < len(begins) and self._is_plain(k, pieces, ends, text, begins[k]))

    def _is_plain(self, k: int, pieces: Sequence[int], ends: Sequence[int], text: str, begin: int) -> bool:
        """Whether the text of message `k` is a piece of the row."""
        told = {key: set(found) for key, found in self._told.items()}
        try:
            self._fields(k, pieces, ends, text, begin)
        except _Unlike:
            return False
        finally:
            self._told = told
        return True

    def _fields(
        self, k: int, pieces: Sequence[int], ends: Sequence[int], text: str, begin: int
    ) -> list[tuple[Field, int]]:
        """The texts of message `k`, each with the piece of the row that it is."""
        message = self._rendering.conversation.messages[k]
        fields = [field for field in self._rendering.fields[k] if field.reason != Reason.CALL]
        if not isinstance(message.content, str | None) or len({field.reason for field in fields}) < len(fields):
            raise _Unlike("a message of more than a text")
        at, found = begin, []
        told = {reasoning: self._told.setdefault((k, reasoning), set()) for reasoning in (True, False)}
        for field in fields:
            place = text.find(field.text, at)
            piece = ends.index(place) if place in ends[:-1] else -1
            if piece < 0 or self._texts[pieces[piece]] != field.text:
                raise _Unlike("a text that is not written as it stands")
            if pieces[piece] < self._recording.constants:
                raise _Unlike("a text that the template writes too")
            told[field.reason == Reason.REASONING].add(pieces[piece])
            at = place + len(field.text)
            found.append((field, piece))
        return found

    def _ended(self, k: int, field: Field, pieces: Sequence[int], piece: int, tail: str) -> tuple[int, str]:
        """What decides where a message ends that its own rendering ends in another way."""
        own, before = self._world(k + 1), self._rendering.prompt(k)
        starts = self._starts(own)
        at = "".join(self._texts[i] for i in own).find(field.text, len(before or ""))
        if at not in starts or self._texts[own[starts.index(at)]] != field.text:
            raise _Unlike("an answer that is not written as it stands")
        self._told[k, field.reason == Reason.REASONING].add(own[starts.index(at)])
        rest = own[starts.index(at) + 1 :]
        behind = "".join(self._texts[i] for i in rest)
        following = self._texts[pieces[piece + 1]] if piece + 1 < len(pieces) else tail
        same = next((i for i, (a, b) in enumerate(zip(behind, following, strict=False)) if a != b), len(behind))
        if any(i >= self._recording.constants for i in rest) or same >= len(following):
            raise _Unlike("an answer with more behind it")
        return pieces[piece], behind

    def _decided(self, k: int, base: Turn, row: Sequence[int | str]) -> None:
        """Raise if another conversation's message `k` may begin or end in another way in the row of `base`."""
        asked: list[tuple[Sequence[int | str], Sequence[int | str]]] = [
            (self._world(k + 1), self._world(base.index, True))
        ]
        if self._rendering.conversation.messages[k].role == "assistant":
            asked += [(self._world(k, True), row), (self._world(k), self._world(k, True))]
        if any(self._begins(*both) is None for both in asked):
            raise _Unlike("whether a rendering begins another depends on the texts")

    def _aside(self, trunk: Row, row: Row) -> Aside | None:
        """A row as one beside the trunk; None where it differs in more than its last turn."""
        (at, offset), context = row.places[row.context], row.context
        if not context or row.others or len(row.called) > 1 or at >= min(len(row.pieces), len(trunk.pieces)):
            return None
        before = self._texts[row.pieces[at]][:offset]
        if row.pieces[:at] != trunk.pieces[:at] or not self._texts[trunk.pieces[at]].startswith(before):
            return None
        if (at, offset) > trunk.places[trunk.context] or any(a < at for a, _ in row.places[context:]):
            return None
        loose = {i - context: begins for i, begins in row.loose.items() if i >= context}
        own = [one for one in row.found if one[0] >= at]
        begins = {place for *_, place in own} | {place for _, place, *_ in row.called}
        same = (
            row.places[:context] == trunk.places[:context]
            and _part(row.values, 0, context - 1) == _part(trunk.values, 0, context - 1)
            and all(trunk.loose.get(i) == row.loose.get(i) for i in range(context))
            and {*row.found} - {*own} <= {*trunk.found} and {*row.ended} <= {*trunk.ended}
            and {*row.shown} <= {*trunk.shown} and begins <= {(at, offset)}
        )
        if not same:
            return None
        called = next(((k, last - context, reasons) for k, _, last, reasons in row.called), None)
        return Aside(
            (at, offset), context, row.pieces[at:], row.tail,
            tuple((a - at, more) for a, more in row.places[context:]), _part(row.values, context - 1, None), loose,
            tuple((piece - at, wanted) for piece, wanted, _ in own), called,
        )

    # -- pieces ----------------------------------------------------------------------------------------------------

    def _world(self, count: int, prompt: bool = False) -> Sequence[int]:
        found = self._recording.worlds.get((count, prompt))
        if not isinstance(found, tuple):
            raise _Unlike("a rendering that is refused")
        return found

    def _starts(self, world: Sequence[int]) -> list[int]:
        """Where the pieces of a rendering begin, and where the last one ends."""
        return [0, *accumulate(len(self._texts[i]) for i in world)]

    def _own(self, turn: Turn) -> list[int | str]:
        """The pieces of a turn's prompt and target, the last of them cut."""
        world = self._world(turn.index + 1)
        starts = self._starts(world)
        cut, offset = self._place(world, starts, len(turn.prompt) + len(turn.target))
        return [*world[:cut], *([self._texts[world[cut]][:offset]] if offset else [])]

    def _place(self, world: Sequence[int], starts: Sequence[int], char: int) -> Place:
        """The place of a character in the pieces of a rendering."""
        if char in starts:
            return starts.index(char), 0
        at = next(i for i, start in enumerate(starts) if start > char) - 1
        if world[at] >= self._recording.constants:
            raise _Unlike("a place inside of a text")
        return at, char - starts[at]

    def _begins(self, a: Sequence[int | str], b: Sequence[int | str]) -> bool | None:
        """Whether the text of pieces `a` begins that of `b`; None if other texts may decide that otherwise."""
        mine, other = [*map(self._told_text, reversed(a))], [*map(self._told_text, reversed(b))]
        while mine and other:
            one, two = mine.pop(), other.pop()
            if isinstance(one, str) and isinstance(two, str):
                size = min(len(one), len(two))
                if one[:size] != two[:size]:
                    return False
                mine += [one[size:]] if one[size:] else []
                other += [two[size:]] if two[size:] else []
            elif one != two:
                piece, text = (one, two) if isinstance(one, int) else (two, one)
                if not isinstance(piece, int) or not isinstance(text, str) or alike(self._texts[piece], text):
                    return None
                self._unlike.add((piece, text))
                return False
        return not mine or (False if any(isinstance(one, str) for one in mine) else None)

    def _told_text(self, piece: int | str) -> int | str:
        """What the template writes there of itself; the number of what it does not."""
        return self._texts[piece] if isinstance(piece, int) and piece < self._recording.constants else piece
