"""How a plan is read off the rows that were made of one conversation as ever.

Refused is all that another conversation of the shape might have otherwise although the template writes the same pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain, count, pairwise
from operator import itemgetter
from typing import Any

import numpy as np

from chatloss.encoding import Problem
from chatloss.fields import Missing, locate
from chatloss.lazy import Values
from chatloss.plans.messages import Held, Reading
from chatloss.plans.pieces import Pieces, Unlike
from chatloss.plans.placed import Cut
from chatloss.plans.rows import CLOSED, Aside, Place, Row, RowPlan, wishes
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
        self._first: _Read | None = None
        self._ids: dict[str, Ids] = {}  # of texts that stand before turns, which are few
        self._open: dict[str, bool] = {}
        self._stiff: set[int] = set()
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
        texts = [self._turns[members[-1]].prompt + self._turns[members[-1]].target for members in inside]
        last = inside[first][-1]
        known = [self._alike(members[-1], last) for members in inside]
        encoded = self._tokens.encode_like(texts[first], texts, known)
        longest = self._row(rows[first], inside[first], encoded[first])
        self._of_trunk = {*longest.row.found}, {*longest.row.ended}, {*longest.row.shown}
        made = [longest if i == first else self._row(row, inside[i], encoded[i]) for i, row in enumerate(rows)]
        longer = [] if apart else [*self._longer(rows, inside)]
        asides: dict[int, Aside] = {}
        rest: list[int] = []
        for i in range(len(rows)):
            if i != first:
                aside = self._aside(longest.row, made[i], len(asides))
                rest += [] if aside else [i]
                asides.update({i: aside} if aside else {})
        trunk = self._with_cuts(longest.row, [made[i].row for i in asides])
        order = [first, *asides, *rest]
        told = tuple((*text, tuple(sorted(pieces))) for text, pieces in self._held.told.items())
        back = tuple(order.index(i) for i in range(len(rows)))
        unlike = tuple(sorted(self._pieces.unlike))
        outcomes, untrained = dict(rows[0].outcomes), dict(rows[0].untrained)
        return RowPlan(
            trunk, tuple(asides.values()), tuple(made[i].row for i in rest), back,
            tuple((order.index(i), order.index(k)) for i, k in longer), told, unlike, outcomes, untrained, problems,
            frozenset(i for i in self._stiff if i >= self._recording.constants),
        )

    def _alike(self, one: int, other: int) -> int:
        """How many characters the prompts of two turns are known to have in common."""
        prompt, another = self._pieces.world(one, True), self._pieces.world(other, True)
        return sum(map(len, map(self._texts.__getitem__, prompt[: shared(prompt, another)])))

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

    def _row(self, row: Sample, inside: Sequence[int], encoded: Encoded) -> _Read:
        before = self._first.reading if self._first is not None else None
        reading = Reading(self._held, self._turns[inside[-1]], inside, before)
        base, text, pieces, ends = reading.base, reading.text, reading.pieces, reading.ends
        if encoded.starts is None or not np.array_equal(encoded.ids, row.input_ids):
            raise Unlike("a target that is encoded apart")
        made = _Read(reading, row, encoded, self._first)
        found, ended, shown, called = made.found, made.ended, made.shown, list[Any]()
        trained: list[tuple[int, int]] = []  # where the fields of turns begin and end
        parts: set[int] = set()  # where generation prompts of earlier messages and the parts of turns begin and end
        for k in range(made.begun, base.index + 1):
            made.marks.append((len(found), len(ended), len(shown), len(made.texts), len(made.moved)))
            if k not in inside:
                said = reading.said(k)
                found += said.found
                ended += said.ended
                made.texts += said.texts
                parts.update(said.edges)
                if said.shown:
                    shown += said.shown
                    made.moved += [char for a, b, _ in said.texts for char in (a, b)]
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
            elif lasts and not self._space_stops:
                made.supple.add(lasts[-1])
            reasons = [None, *(reason for *_, reason in own.spans)]
            spans = zip(own.spans, pairwise(reasons), strict=True)
            parts |= {begin + a for (a, *_), (before, reason) in spans if before != reason}
        texts = made.texts[made.marks[0][3] :]
        chars = self._chars(made, texts, trained)
        there = {*reading.begins[made.begun :], *(b for _, b, _ in texts), *parts}
        self._all_there(made, [a for a, *_ in texts], there)
        edges = [len(base.prompt)]
        for i in inside[:-1]:
            turn = self._turns[i]
            edges += len(turn.prompt), len(turn.prompt) + len(turn.target)
        if not {*edges, *(last for *_, last, _ in called)} <= set(chars):
            raise Unlike("a turn that does not begin or end with a span")
        cuts = [self._cut(text, encoded, pieces, ends, char) for char in edges]
        if any(end != until for _, end, until, *_ in cuts[2::2]):
            raise Unlike("a turn that does not end with a control token")
        places = (*made.places, *map(made.place, chars))
        where = {char: i for i, char in reversed([*enumerate(chars, made.spans)])}
        made.row = Row(
            tuple(pieces), reading.tail,
            (*places, *(reading.place(char) for cut in cuts for char in cut[:3])),
            made.values(), made.loose,
            tuple(Cut(i, i + 1, i + 2, *cut[3:]) for i, cut in zip(count(len(places), 3), cuts, strict=False)),
            where[edges[0]], tuple(found), tuple(ended),
            tuple((k, place, where[last], reasons) for k, place, last, reasons in called), tuple(shown),
        )
        supple = made.supple | {at for at, more in places if more == CLOSED}
        first = bisect_left(ends, reading.begins[made.begun])
        self._stiff |= {pieces[at] for at in range(first, len(pieces)) if at not in supple}
        self._first = self._first or made
        return made

    def _all_there(self, made: _Read, held: Sequence[int], chars: set[int]) -> None:
        """Raise if something that begins at one of `chars`, or a text that begins at one of `held`, has no span: its
        characters are all in a token of what stands before it, as they need not be in another conversation.
        """
        starts = {span.start for span in made.sample.spans}
        where = [*held, *(chars - {*held})]
        at, over = made.encoded.tokens_at(where)
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
        rest = text[end:char]
        if rest not in self._ids:
            self._ids[rest] = self._tokens.encode(rest).ids if rest else NOTHING.ids
        return begin, end, char, token, self._ids[rest]

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
        self, made: _Read, texts: Sequence[tuple[int, int, int | None]], trained: Sequence[tuple[int, int]],
    ) -> list[int]:
        """Where the spans of a row begin, from number `made.spans` on, and where it ends; `made.loose` gets those that
        are the ends of texts.
        """
        encoded, spans = made.encoded, made.sample.spans[made.spans :]
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
        of_begins, of_texts, chars = {*begins}, {*begins, *ends}, list[int]()
        plain = {b for _, b, before in texts if before is None} - {*(b for _, b in trained), *made.reading.begins}
        starts = encoded.starts[[span.start for span in spans]].tolist()
        clean = zip(*encoded.tokens_at(starts), strict=True)
        for i, (span, start, tokens) in enumerate(zip(spans, starts, clean, strict=True), made.spans):
            char = first.get(span.start, behind.get(span.start, start))
            if char != start and char not in of_begins and span.reason not in (Reason.SCAFFOLD, Reason.CALL):
                raise Unlike("a text with nothing behind it")
            if char in of_texts:
                made.loose[i] = char in of_begins
                last = made.sample.spans[i - 1]
                if char in plain and (span.message, span.reason) == (last.message, Reason.SCAFFOLD):
                    made.closed.add(char)  # what is behind a text is the message's too
            elif tokens != (span.start, span.start):
                raise Unlike("a token reaches across the end of a span")
            chars.append(char)
        chars.append(int(encoded.ends[-1]))
        if not made.spans and (chars[0] or 0 in made.loose):
            raise Unlike("a row that begins with a text")
        return chars

    def _called(self, k: int, text: str, turn: Turn) -> tuple[Reason, ...]:
        """The reasons of the fields of a turn with calls."""
        found = locate(text, self._rendering.fields[k], len(turn.prompt), len(turn.prompt) + len(turn.target))
        if isinstance(found, Missing):
            raise Unlike("a call that is not written within its turn")
        reasons = tuple(reason for *_, reason in found)
        if any(a == Reason.REASONING and b == Reason.CALL for a, b in pairwise(reasons)):
            raise Unlike("a call right behind reasoning, whose closing tag is told by where the call begins")
        return reasons

    def _aside(self, trunk: Row, read: _Read, before: int) -> Aside | None:
        """A row as one beside the trunk; None where it differs in more than its last turn.

        `before`: how many rows are beside it already.
        """
        row, reading = read.row, read.reading
        (at, offset), context = row.places[row.context], row.context
        alone = len(row.cuts) == 1 and context and len(row.called) <= 1
        if not alone or at >= min(len(row.pieces), len(trunk.pieces)):
            return None
        skipped = self._texts[row.pieces[at]][:offset]
        if row.pieces[:at] != trunk.pieces[:at] or not self._texts[trunk.pieces[at]].startswith(skipped):
            return None
        places = row.places[context : len(row.values.messages) + 1]
        if (at, offset) > trunk.places[trunk.context] or any(a < at or more == CLOSED for a, more in places):
            return None
        # What was taken over from the trunk need not be compared.
        of_found, of_ended, of_shown, *_ = read.taken
        loose = {i - context: row.loose[i] for i in range(context, len(row.values.messages)) if i in row.loose}
        found = [one for one in row.found[of_found:] if one[0] >= at]
        begins = {place for *_, place in found} | {place for _, place, *_ in row.called}
        same = (
            row.places[:context] == trunk.places[:context]
            and row.values.part(0, context - 1).alike(trunk.values) == context - 1
            and all(trunk.loose.get(i) == row.loose.get(i) for i in range(read.spans, context))
            and {*row.found[of_found:]} - {*found} <= self._of_trunk[0] and {*row.ended[of_ended:]} <= self._of_trunk[1]
            and {*row.shown[of_shown:]} <= self._of_trunk[2] and begins <= {(at, offset)}
        )
        if not same:
            return None
        called = next(((k, last - context, reasons) for k, _, last, reasons in row.called), None)
        cut = row.cuts[0]
        begin, end, edge = (reading.ends[piece] + more for piece, more in (row.places[i] for i in cut[:3]))
        head = reading.text[begin:edge]
        if head not in self._open:
            self._open[head] = self._tokens.may_go_on(head)
        if self._open[head]:
            return None  # an added token that is open there
        own, others = row.values.part(context - 1).copy(), trunk.values.part(context - 1)
        return Aside(
            reading.text[end:edge], cut.rest, offset, len(trunk.places) + 3 * before + 1, context, row.pieces[at:],
            row.tail, tuple((a - at, more) for a, more in places), own, own.alike(others), loose,
            tuple((piece - at, wanted) for piece, wanted, _ in found), called,
        )


class _Read:
    """What is found out about a row while it is read; what it begins with that is another's is taken over from `first`.

    `found`, `ended` and `shown` are as in `Row`, `texts` as in `Said`; `moved`: characters that `shown` messages are
    found at. Of these and of `loose` and `places`, what is of the messages before `begun` and of the first `spans`
    spans is taken over, `taken` of each. `marks`: how many there are before each message.
    """

    row: Row

    def __init__(self, reading: Reading, sample: Sample, encoded: Encoded, first: _Read | None) -> None:
        self.reading, self.sample, self.encoded = reading, sample, encoded
        # What is between two messages is told by both.
        self.begun = max(reading.alike - 2, 0) if first is not None and reading.alike > 2 else 0
        self.taken, self.spans = (0, 0, 0, 0, 0), 0
        if first is not None and self.begun:
            _, (token,) = encoded.tokens_at([reading.begins[self.begun + 1]])
            spans = bisect_left(sample.spans, token, key=itemgetter(0))
            if sample.spans[:spans] == first.sample.spans[:spans]:
                self.taken, self.spans = first.marks[self.begun], spans
            else:
                self.begun = 0
        self.found: list[Any] = []
        self.ended: list[Any] = []
        self.shown: list[Any] = []
        self.texts: list[tuple[int, int, int | None]] = []
        self.moved: list[int] = []
        self.places: Sequence[Place] = ()
        self.loose: dict[int, bool] = {}
        self.supple: set[int] = set()  # pieces with which turns end
        self.closed: set[int] = set()  # characters at which texts end that may end with space elsewhere
        self.marks: list[tuple[int, int, int, int, int]] = []
        self._before = first if self.begun else None
        if first is not None and self.begun:
            for name, count in zip(("found", "ended", "shown", "texts", "moved"), self.taken, strict=True):
                getattr(self, name).extend(getattr(first, name)[:count])
            self.places = first.row.places[: self.spans]
            self.loose = {i: first.loose[i] for i in range(self.spans) if i in first.loose}

    def place(self, char: int) -> Place:
        """The place of a character, or which of those it is that `shown` messages are found at."""
        if char in self.closed:
            return bisect_left(self.reading.ends, char) - 1, CLOSED
        return (-1, self._where[char]) if char in self._where else self.reading.place(char)

    def values(self) -> Values:
        """Those of all spans."""
        own = Values.of([span[2:] for span in self.sample.spans[self.spans :]])
        return own if self._before is None else own.behind(self._before.row.values.part(0, self.spans))

    @cached_property
    def _where(self) -> dict[int, int]:
        return {char: i for i, char in reversed([*enumerate(self.moved)])}
