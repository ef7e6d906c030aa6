"""How a plan is read off the rows that were made of one conversation as ever.

Refused is all that another conversation of the shape might have otherwise although the template writes the same pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, count, pairwise
from typing import Any

import numpy as np

from chatloss.encoding import Problem
from chatloss.fields import Missing, locate
from chatloss.lazy import Values
from chatloss.plans.messages import Held, Reading
from chatloss.plans.pieces import Pieces, Unlike
from chatloss.plans.placed import Cut
from chatloss.plans.rows import Aside, Row, RowPlan, wishes
from chatloss.reference import Rendering, Turn
from chatloss.sample import Reason, Sample
from chatloss.shapes.recording import Recording
from chatloss.shapes.renderings import shared
from chatloss.tokens import NOTHING, Encoded, FastTokens, Ids

__all__ = ["row_plan"]


def row_plan(
    recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn], rows: Sequence[Sample],
    tokens: FastTokens, *, apart: bool, problems: Sequence[Problem] = (),
) -> RowPlan | None:
    """The plan of `rows`, all that were made of a conversation and its `turns`; None if others may differ.

    `apart`: every turn has a row of its own by the policy. `problems`: of turns that the recording refuses, which are
    not among `turns`.
    """
    try:
        return _Plan(recording, texts, rendering, turns, tokens).of(rows, apart, tuple(problems))
    except Unlike:
        return None


class _Plan:
    """Makes the plan of one conversation's rows."""

    def __init__(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, turns: Sequence[Turn],
        tokens: FastTokens,
    ) -> None:
        self._recording, self._texts, self._rendering, self._tokens = recording, texts, rendering, tokens
        self._turns, self._messages = {turn.index: turn for turn in turns}, rendering.conversation.messages
        self._pieces = Pieces(recording, texts)
        self._held = Held(rendering, self._pieces, texts, recording.constants)
        self._first: Reading | None = None
        self._space_stops = any(stop[:1].isspace() for stop in rendering.stops.texts)  # a stop may begin in space

    def of(self, rows: Sequence[Sample], apart: bool, problems: tuple[Problem, ...]) -> RowPlan:
        messages = self._messages
        if not rows or messages[0].role == "assistant":
            raise Unlike("what is rendered before the first message is somebody else's")
        if wishes(messages):
            raise Unlike("a wish of the data, which others do not have")
        for turn in self._turns.values():
            if turn.outcome != "reachable" or turn.stop != "rendered":
                raise Unlike("a turn that is not plainly trained")
            world, begins = self._pieces.world, self._pieces.begins
            plain, prompt = world(turn.index), world(turn.index, True)
            if begins(prompt, world(turn.index + 1)) is not True or not begins(plain, prompt):
                raise Unlike("a prompt that rewrites history")
        inside = [sorted({span.message for span in row.spans if span.weight}) for row in rows]
        if not all(inside) or sorted(chain.from_iterable(inside)) != sorted(self._turns):
            raise Unlike("a turn that is not trained in one row")
        first = max(range(len(rows)), key=lambda i: len(rows[i]))
        longest = self._row(rows[first], inside[first])
        made = [longest if i == first else self._row(row, inside[i]) for i, row in enumerate(rows)]
        longer = [] if apart else [*self._longer(rows, inside)]
        asides: dict[int, Aside] = {}
        rest: list[int] = []
        for i in range(len(rows)):
            if i != first:
                aside = self._aside(made[first], made[i], len(asides))
                rest += [] if aside else [i]
                asides.update({i: aside} if aside else {})
        trunk = self._with_cuts(made[first], [made[i] for i in asides])
        order = [first, *asides, *rest]
        told = tuple((*text, tuple(sorted(pieces))) for text, pieces in self._held.told.items())
        back = tuple(order.index(i) for i in range(len(rows)))
        unlike = tuple(sorted(self._pieces.unlike))
        outcomes, untrained = dict(rows[0].outcomes), dict(rows[0].untrained)
        return RowPlan(
            trunk, tuple(asides.values()), tuple(made[i] for i in rest), back,
            tuple((order.index(i), order.index(k)) for i, k in longer), told, unlike, outcomes, untrained, problems,
        )

    def _longer(self, rows: Sequence[Sample], inside: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
        """(row, another) of which the first must be longer, because it has turns that may share the other: the longest
        has them.
        """
        begins, last = self._pieces.begins, self._pieces.own(self._turns[max(self._turns)])
        own = {index: self._pieces.own(turn) for index, turn in self._turns.items()}
        # What one turn's text and the last one's have in common before they differ decides for others like the last.
        known = {index: (begins(one, last) is not False, self._pieces.reach) for index, one in own.items()}
        for k, members in enumerate(inside):
            whole = own[members[-1]]
            alike = shared(whole, last)
            for i, others in enumerate(inside):
                if i != k and any(
                    known[one][0] if known[one][1] <= alike else begins(own[one], whole) is not False
                    for one in others if one < members[-1]
                ):
                    if len(rows[i]) <= len(rows[k]):
                        raise Unlike("a turn that may share the row")
                    yield i, k

    def _row(self, row: Sample, inside: Sequence[int]) -> Row:
        reading = Reading(self._held, self._turns[inside[-1]], self._first)
        self._first = self._first or reading
        base, text, pieces, ends = reading.base, reading.text, reading.pieces, reading.ends
        encoded, _ = self._tokens.encode_pair(base.prompt, base.target)
        if encoded.starts is None or not np.array_equal(encoded.ids, row.input_ids):
            raise Unlike("a target that is encoded apart")
        found: list[Any] = []
        ended: list[Any] = []
        called: list[Any] = []
        shown: list[Any] = []
        moved: list[int] = []  # characters that `shown` messages are found at
        # Where the fields of earlier messages begin and end, and where a scaffold begins that stands before each.
        texts: list[tuple[int, int, int | None]] = []
        trained: list[tuple[int, int]] = []  # and those of turns
        parts: set[int] = set()  # where generation prompts of earlier messages and the parts of turns begin and end
        for k in range(base.index + 1):
            if k not in inside:
                said = reading.said(k)
                found += said.found
                ended += said.ended
                texts += said.texts
                parts.update(said.edges)
                if said.shown:
                    shown += said.shown
                    moved += [char for a, b, _ in said.texts for char in (a, b)]
                continue
            own, begin = self._turns[k], len(self._turns[k].prompt)
            by_text, calls = k < base.index and not reading.goes_on_from(k), bool(self._messages[k].tool_calls)
            fields_of_k = reading.fields(k, begin)
            lasts = [piece for _, piece in fields_of_k]
            if lasts and not (calls or self._space_stops):
                lasts[-1] += self._held.has_space(pieces, lasts[-1] + 1)  # behind a turn's text it is the turn's too
            self._only_constants(pieces, ends, lasts, own, calls)
            for (field, piece), last in zip(fields_of_k, lasts, strict=True):
                found.append((piece, pieces[piece], reading.place(begin)))
                trained.append((ends[piece], ends[last + 1]))
                if by_text:
                    ended.append(reading.ended(k, field, piece))
            if calls:
                end = begin + len(own.target)
                called.append((k, reading.place(begin), end, self._called(k, text, own)))
                if by_text:
                    raise Unlike("a turn that is written otherwise behind its stop")
            reasons = [None, *(reason for *_, reason in own.spans)]
            spans = zip(own.spans, pairwise(reasons), strict=True)
            parts |= {begin + a for (a, *_), (before, reason) in spans if before != reason}
        chars, loose = self._chars(row, encoded, texts, trained)
        there = {*reading.begins, *(b for _, b, _ in texts), *parts}
        self._all_there(row, encoded, [a for a, *_ in texts], there)
        edges = [len(base.prompt)]
        for i in inside[:-1]:
            turn = self._turns[i]
            edges += len(turn.prompt), len(turn.prompt) + len(turn.target)
        if not {*edges, *(last for *_, last, _ in called)} <= set(chars):
            raise Unlike("a turn that does not begin or end with a span")
        cuts = [self._cut(text, encoded, pieces, ends, char) for char in edges]
        if any(end != until for _, end, until, *_ in cuts[2::2]):
            raise Unlike("a turn that does not end with a control token")
        place, where = reading.place, {char: i for i, char in reversed([*enumerate(moved)])}
        return Row(
            tuple(pieces), reading.tail,
            tuple((-1, where[char]) if char in where else place(char) for char in chars)
            + tuple(place(char) for cut in cuts for char in cut[:3]),
            Values.of([span[2:] for span in row.spans]), loose,
            tuple(Cut(i, i + 1, i + 2, *cut[3:]) for i, cut in zip(count(len(chars), 3), cuts, strict=False)),
            chars.index(edges[0]), tuple(found), tuple(ended),
            tuple((k, place, chars.index(last), reasons) for k, place, last, reasons in called), tuple(shown),
        )

    def _all_there(self, row: Sample, encoded: Encoded, held: Sequence[int], chars: set[int]) -> None:
        """Raise if something that begins at one of `chars`, or a text that begins at one of `held`, has no span: its
        characters are all in a token of what stands before it, as they need not be in another conversation.
        """
        starts = {span.start for span in row.spans}
        where = [*held, *(chars - {*held})]
        at, over = encoded.tokens_at(where)
        found = {*over[: len(held)], *at[len(held) :]}
        if len(found) < len(where) or not found <= starts:
            raise Unlike("a span that has no token here, and may have one elsewhere")

    def _cut(
        self, text: str, encoded: Encoded, pieces: Sequence[int], ends: Sequence[int], char: int
    ) -> tuple[int, int, int, int, Ids]:
        """As `Cut`, in characters: the last token before a turn's edge at which any text is cut, and the rest."""
        found = self._tokens.last_cut(text, encoded, char)
        if found is None:
            raise Unlike("an edge without a control token before it")
        begin, end, token = found
        if any(i >= self._recording.constants for i in pieces[bisect_right(ends, begin) - 1 : bisect_left(ends, char)]):
            raise Unlike("a text between a control token and a turn's edge")
        return begin, end, char, token, self._tokens.encode(text[end:char]).ids if end < char else NOTHING.ids

    def _with_cuts(self, trunk: Row, others: Sequence[Row]) -> Row:
        """The longest row with the cuts of the rows beside it."""
        places, cuts = [*trunk.places], [*trunk.cuts]
        for row in others:
            cut = row.cuts[0]
            at = len(places)
            cuts.append(Cut(at, at + 1, at + 2, cut.token, cut.rest))
            places += [row.places[i] for i in cut[:3]]
        return replace(trunk, places=tuple(places), cuts=tuple(cuts))

    def _only_constants(
        self, pieces: Sequence[int], ends: Sequence[int], fields: Sequence[int], own: Turn, calls: bool
    ) -> None:
        """Raise if what stands between a turn's texts, or between the last one and its stop, is not the template's."""
        stop = len(own.prompt) + len(own.target)
        edges = [*fields, *([] if calls else [bisect_left(ends, stop)])]
        inner = [i for a, b in pairwise(edges) for i in range(a + 1, min(b, len(pieces)))]
        if any(pieces[i] >= self._recording.constants for i in inner):
            raise Unlike("a text of something else within a turn")

    def _chars(
        self, row: Sample, encoded: Encoded, texts: Sequence[tuple[int, int, int | None]],
        trained: Sequence[tuple[int, int]],
    ) -> tuple[list[int], dict[int, bool]]:
        """Where the spans of a row begin, and where it ends; which of that are the ends of texts, as `Row.loose`."""
        assert encoded.starts is not None and encoded.ends is not None
        begins, ends = [a for a, *_ in texts], [*(b for _, b, _ in texts), *(b for _, b in trained)]
        if {*begins, *(a for a, _ in trained)} & {*ends}:
            raise Unlike("texts with nothing between them")
        at, over = encoded.tokens_at([*(a for a, _ in trained), *begins, *ends])
        scaffolds = [None] * len(trained) + [before for *_, before in texts]
        for one, other, before in zip(at, over, scaffolds, strict=False):
            if one != other and (before is None or encoded.tokens_at([before])[0][0] >= other):
                raise Unlike("a token reaches across the beginning of a text, which may be all that stands before it")
        at, over = at[len(trained) :], over[len(trained) :]
        first = dict(zip(over[: len(begins)], begins, strict=True))
        behind = dict(zip(at[len(begins) :], ends, strict=True))
        chars: list[int] = []
        loose: dict[int, bool] = {}
        for i, span in enumerate(row.spans):
            start = int(encoded.starts[span.start])
            char = first.get(span.start, behind.get(span.start, start))
            if char != start and char not in begins and span.reason not in (Reason.SCAFFOLD, Reason.CALL):
                raise Unlike("a text with nothing behind it")
            if char in begins or char in ends:
                loose[i] = char in begins
            elif encoded.tokens_at([start]) != ([span.start], [span.start]):
                raise Unlike("a token reaches across the end of a span")
            chars.append(char)
        chars.append(int(encoded.ends[-1]))
        if chars[0] or 0 in loose:
            raise Unlike("a row that begins with a text")
        return chars, loose

    def _called(self, k: int, text: str, turn: Turn) -> tuple[Reason, ...]:
        """The reasons of the fields of a turn with calls."""
        found = locate(text, self._rendering.fields[k], len(turn.prompt), len(turn.prompt) + len(turn.target))
        if isinstance(found, Missing):
            raise Unlike("a call that is not written within its turn")
        reasons = tuple(reason for *_, reason in found)
        if any(a == Reason.REASONING and b == Reason.CALL for a, b in pairwise(reasons)):
            raise Unlike("a call right behind reasoning, whose closing tag is told by where the call begins")
        return reasons

    def _aside(self, trunk: Row, row: Row, before: int) -> Aside | None:
        """A row as one beside the trunk; None where it differs in more than its last turn.

        `before`: how many rows are beside it already.
        """
        (at, offset), context = row.places[row.context], row.context
        alone = len(row.cuts) == 1 and context and len(row.called) <= 1
        if not alone or at >= min(len(row.pieces), len(trunk.pieces)):
            return None
        skipped = self._texts[row.pieces[at]][:offset]
        if row.pieces[:at] != trunk.pieces[:at] or not self._texts[trunk.pieces[at]].startswith(skipped):
            return None
        places = row.places[context : len(row.values.messages) + 1]
        if (at, offset) > trunk.places[trunk.context] or any(a < at for a, _ in places):
            return None
        loose = {i - context: begins for i, begins in row.loose.items() if i >= context}
        found = [one for one in row.found if one[0] >= at]
        begins = {place for *_, place in found} | {place for _, place, *_ in row.called}
        same = (
            row.places[:context] == trunk.places[:context]
            and row.values.part(0, context - 1).alike(trunk.values) == context - 1
            and all(trunk.loose.get(i) == row.loose.get(i) for i in range(context))
            and {*row.found} - {*found} <= {*trunk.found} and {*row.ended} <= {*trunk.ended}
            and {*row.shown} <= {*trunk.shown} and begins <= {(at, offset)}
        )
        if not same:
            return None
        called = next(((k, last - context, reasons) for k, _, last, reasons in row.called), None)
        cut, starts = row.cuts[0], self._pieces.starts(row.pieces)
        begin, end, edge = (starts[piece] + more for piece, more in (row.places[i] for i in cut[:3]))
        text = "".join(self._texts[i] for i in row.pieces[: at + 1])
        if self._tokens.may_go_on(text[begin:edge]):
            return None  # an added token that is open there
        own, others = row.values.part(context - 1), trunk.values.part(context - 1)
        return Aside(
            text[end:edge], cut.rest, offset, len(trunk.places) + 3 * before + 1, context, row.pieces[at:], row.tail,
            tuple((a - at, more) for a, more in places), own, own.alike(others), loose,
            tuple((piece - at, wanted) for piece, wanted, _ in found), called,
        )
