"""How a plan is read off the rows that were made of one conversation as ever.

Refused is all that another conversation of the shape might have otherwise although the template writes the same pieces.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count, pairwise

import numpy as np

from chatloss.encoding import Problem
from chatloss.fields import Field, Missing, locate
from chatloss.lazy import Values
from chatloss.places import Seen, end_in, place_in
from chatloss.plans.pieces import Pieces, Unlike
from chatloss.plans.placed import Cut
from chatloss.plans.rows import Aside, Place, Row, RowPlan, wishes
from chatloss.reference import Rendering, Turn
from chatloss.sample import Reason, Sample
from chatloss.shapes.shapes import Recording
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
        self._turns = {turn.index: turn for turn in turns}
        self._told: dict[tuple[int, bool], set[int]] = {}
        self._pieces = Pieces(recording, texts)
        self._space_stops = any(stop[:1].isspace() for stop in rendering.stops.texts)  # a stop may begin in space

    def of(self, rows: Sequence[Sample], apart: bool, problems: tuple[Problem, ...]) -> RowPlan:
        messages = self._rendering.conversation.messages
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
        made = [self._row(row, members) for row, members in zip(rows, inside, strict=True)]
        longer = [] if apart else [pair for k in range(len(rows)) for pair in self._longer(rows, inside, k)]
        first = max(range(len(rows)), key=lambda i: len(rows[i]))
        asides: dict[int, Aside] = {}
        rest: list[int] = []
        for i in range(len(rows)):
            if i != first:
                aside = self._aside(made[first], made[i], len(asides))
                rest += [] if aside else [i]
                asides.update({i: aside} if aside else {})
        trunk = self._with_cuts(made[first], [made[i] for i in asides])
        order = [first, *asides, *rest]
        told = tuple((*text, tuple(sorted(pieces))) for text, pieces in self._told.items())
        back = tuple(order.index(i) for i in range(len(rows)))
        unlike = tuple(sorted(self._pieces.unlike))
        outcomes, untrained = dict(rows[0].outcomes), dict(rows[0].untrained)
        return RowPlan(
            trunk, tuple(asides.values()), tuple(made[i] for i in rest), back,
            tuple((order.index(i), order.index(k)) for i, k in longer), told, unlike, outcomes, untrained, problems,
        )

    def _longer(
        self, rows: Sequence[Sample], inside: Sequence[Sequence[int]], k: int
    ) -> Iterator[tuple[int, int]]:
        """Rows that must be longer than row `k`, because they have turns that may share it: the longest has them."""
        base = self._turns[inside[k][-1]]
        whole = self._pieces.own(base)
        for i, members in enumerate(inside):
            others = [self._turns[one] for one in members if one < base.index and i != k]
            if any(self._pieces.begins(self._pieces.own(other), whole) is not False for other in others):
                if len(rows[i]) <= len(rows[k]):
                    raise Unlike("a turn that may share the row")
                yield i, k

    def _row(self, row: Sample, inside: Sequence[int]) -> Row:
        base = self._turns[inside[-1]]
        text = base.prompt + base.target
        world = self._pieces.world(base.index + 1)
        starts = self._pieces.starts(world)
        cut, offset = self._pieces.place(world, starts, len(text))
        pieces, ends = world[:cut], starts[: cut + 1]
        tail = self._texts[world[cut]][:offset] if offset else ""
        if any(not self._texts[i] for i in pieces):
            raise Unlike("an empty piece")
        encoded, _ = self._tokens.encode_pair(base.prompt, base.target)
        if encoded.starts is None or not np.array_equal(encoded.ids, row.input_ids):
            raise Unlike("a target that is encoded apart")
        seen, begins = Seen(base.prompt), [0]
        for k in range(base.index):
            begins.append(end_in(seen, self._rendering, k, begins[-1])[0])
        found, ended, called, shown = [], [], [], []
        whole: list[int | str] = [*pieces, tail]
        moved: list[int] = []  # characters that `shown` messages are found at
        # Where the fields of earlier messages begin and end, and where a scaffold begins that stands before each.
        texts: list[tuple[int, int, int | None]] = []
        trained: list[tuple[int, int]] = []  # and those of turns
        for k in range(base.index + 1):
            own = self._turns[k] if k in inside else None
            begin = len(own.prompt) if own is not None else begins[k]
            if k < base.index:
                self._decided(k, base, whole)
            asked = self._pieces.world(k + 1), self._pieces.world(base.index, True)
            by_text = k < base.index and not self._pieces.begins(*asked)
            calls = bool(self._rendering.conversation.messages[k].tool_calls)
            more = calls or (by_text and (len(self._rendering.fields[k]) > 1 or not self._goes_on(
                k + 1, pieces, ends, text, begins)))
            if own is None and (more or not self._is_plain(k, pieces, ends, text, begin)):
                end = begins[k + 1]
                _, fields, supplied = place_in(Seen(base.prompt), self._rendering, k, begin, end, text)
                befores = [begin if supplied is None else supplied[1], *(b for _, b, _ in fields)]
                texts += [(a, b, before) for (a, b, _), before in zip(fields, befores, strict=False)]
                moved += [char for a, b, _ in fields for char in (a, b)]
                places = self._pieces.place(world, starts, begin), self._pieces.place(world, starts, end)
                shown.append((k, *places, tuple(self._within(ends, a, b) for a, b, _ in fields), by_text))
                continue
            fields_of_k = self._fields(k, pieces, ends, text, begin)
            lasts = [piece for _, piece in fields_of_k]
            if own is not None:
                if lasts and not (calls or self._space_stops):
                    lasts[-1] += self._has_space(pieces, lasts[-1] + 1)  # behind a turn's text it is the turn's too
                self._only_constants(pieces, ends, lasts, own, calls)
            for (field, piece), last in zip(fields_of_k, lasts, strict=True):
                found.append((piece, pieces[piece], self._pieces.place(world, starts, begin)))
                a, b = ends[piece], ends[last + 1]
                if own is None:
                    texts.append((a, b, None))
                else:
                    trained.append((a, b))
                if by_text:
                    ended.append(self._ended(k, field, pieces, piece, text[ends[-1] :]))
            if own is not None and calls:
                last = len(own.prompt) + len(own.target)
                called.append((k, self._pieces.place(world, starts, begin), last, self._called(k, text, own)))
                if by_text:
                    raise Unlike("a turn that is written otherwise behind its stop")
        chars, loose = self._chars(row, encoded, texts, trained)
        self._all_there(row, encoded, [a for a, *_ in texts], {
            *begins, *(b for _, b, _ in texts), *self._edges(base, inside, text)})
        edges = [len(base.prompt)]
        for i in inside[:-1]:
            turn = self._turns[i]
            edges += len(turn.prompt), len(turn.prompt) + len(turn.target)
        if not {*edges, *(last for *_, last, _ in called)} <= set(chars):
            raise Unlike("a turn that does not begin or end with a span")
        cuts = [self._cut(text, encoded, pieces, ends, char) for char in edges]
        if any(end != until for _, end, until, *_ in cuts[2::2]):
            raise Unlike("a turn that does not end with a control token")
        place = partial(self._pieces.place, world, starts)
        return Row(
            tuple(pieces), tail,
            tuple((-1, moved.index(char)) if char in moved else place(char) for char in chars)
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

    def _edges(self, base: Turn, inside: Sequence[int], text: str) -> set[int]:
        """Where generation prompts of earlier messages and the parts of turns begin and end."""
        edges: set[int] = set()
        for k in range(base.index + 1):
            turn = self._turns[k] if k in inside else None
            if turn is not None:
                reasons = [None, *(reason for *_, reason in turn.spans)]
                parts = zip(turn.spans, pairwise(reasons), strict=True)
                edges |= {len(turn.prompt) + a for (a, *_), (before, reason) in parts if before != reason}
            elif self._rendering.conversation.messages[k].role == "assistant":
                before, plain = self._rendering.prompt(k), self._rendering.text(k)
                if before is not None and plain is not None and before != plain and text.startswith(before):
                    edges |= {len(plain), len(before)}
        return edges

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

    def _within(self, ends: Sequence[int], a: int, b: int) -> tuple[Place, int, bool]:
        """Where a field begins, in characters from the beginning of its piece, the piece in which it ends, and whether
        it ends with that.
        """
        at = bisect_right(ends, a) - 1
        return (at, a - ends[at]), bisect_left(ends, b) - 1, b in ends

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
        except Unlike:
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
            raise Unlike("a message of more than a text")
        at, found = begin, []
        told = {reasoning: self._told.setdefault((k, reasoning), set()) for reasoning in (True, False)}
        for field in fields:
            place = text.find(field.text, at)
            piece = ends.index(place) if place in ends[:-1] else -1
            if piece < 0 or self._texts[pieces[piece]] != field.text:
                raise Unlike("a text that is not written as it stands")
            if pieces[piece] < self._recording.constants:
                raise Unlike("a text that the template writes too")
            told[field.reason == Reason.REASONING].add(pieces[piece])
            at = place + len(field.text)
            found.append((field, piece))
        return found

    def _ended(
        self, k: int, field: Field, pieces: Sequence[int], piece: int, tail: str
    ) -> tuple[int, tuple[int, ...], str]:
        """What decides where a message ends that its own rendering ends in another way."""
        texts, own, before = self._texts, self._pieces.world(k + 1), self._rendering.prompt(k)
        starts = self._pieces.starts(own)
        at = "".join(texts[i] for i in own).find(field.text, len(before or ""))
        if at not in starts or texts[own[starts.index(at)]] != field.text:
            raise Unlike("an answer that is not written as it stands")
        self._told[k, field.reason == Reason.REASONING].add(own[starts.index(at)])
        rest, following = own[starts.index(at) + 1 :], pieces[piece + 1 :]
        spaces: tuple[int, ...] = ()
        if self._has_space(rest, 0) and self._has_space(following, 0) and texts[rest[0]] == texts[following[0]]:
            spaces, rest, following = (rest[0], following[0]), rest[1:], following[1:]
        behind, here = "".join(texts[i] for i in rest), texts[following[0]] if following else tail
        same = next((i for i, (a, b) in enumerate(zip(behind, here, strict=False)) if a != b), len(behind))
        if any(i >= self._recording.constants for i in rest) or same >= len(here):
            raise Unlike("an answer with more behind it")
        return pieces[piece], spaces, behind

    def _has_space(self, pieces: Sequence[int], at: int) -> bool:
        """Whether the piece there is the space at an end of a text."""
        return at < len(pieces) and pieces[at] >= self._recording.constants and self._texts[pieces[at]].isspace()

    def _decided(self, k: int, base: Turn, row: Sequence[int | str]) -> None:
        """Raise if another conversation's message `k` may begin or end in another way in the row of `base`."""
        asked: list[tuple[Sequence[int | str], Sequence[int | str]]] = [
            (self._pieces.world(k + 1), self._pieces.world(base.index, True))
        ]
        if self._rendering.conversation.messages[k].role == "assistant":
            asked += [(self._pieces.world(k, True), row), (self._pieces.world(k), self._pieces.world(k, True))]
        if any(self._pieces.begins(*both) is None for both in asked):
            raise Unlike("whether a rendering begins another depends on the texts")

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
