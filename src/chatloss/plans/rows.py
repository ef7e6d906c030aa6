"""The rows of conversations of one shape: where each token's span ends, counted in the pieces of a recording.

A plan says of which pieces the rows are and where in them spans begin, and what must be found where: what the template
wrote decided all else when the plan was read off the rows of one conversation (`reading`). Rows of others are then the
plan's pieces, encoded (`placed`). Where anything is found elsewhere, or a token reaches across a place at which that
matters, there is no row, and the conversation goes the usual way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

from chatloss.chat import Message
from chatloss.encoding import Problem
from chatloss.fields import SHORT, Missing, locate
from chatloss.lazy import LazySample, Strip, Values
from chatloss.places import Seen, end_in, fields_in
from chatloss.plans.placed import Cut, Draft, Layout, Placed
from chatloss.reference import Rendering
from chatloss.sample import Decode, Reason, Sample
from chatloss.shapes.recording import Recording
from chatloss.tokens import Ids

__all__ = ["CLOSED", "Aside", "Place", "Row", "RowPlan", "alike", "wishes"]

# A place in a row: the piece, and how many characters behind its beginning (0 in what is not the template's own text),
# or CLOSED, where the text that the piece is ends, before any space; or -1 and which of the places that `shown`
# messages are found at.
Place = tuple[int, int]
CLOSED = -1
_draft = partial(tuple.__new__, Draft)  # twice as fast as calling it


@dataclass
class Row:
    """One row: its `pieces`, then `tail`; from each of the first of `places` on, up to the next, one of `values`.

    Behind those are the places of `cuts`: what must stand where a turn of the row begins or ends. `loose` is as in
    `Layout`. `context` is the number of the place where the last turn begins. `found`: (piece, its text, where one
    begins to look for it): it must be found there. `ended`: (text, and that of the last answer; the space behind it
    there and here, if any; what follows the last answer), whose end must not be found again in that. `called`: (turn
    with calls, where it begins, the number of the place where it ends, the reasons of its fields). `shown`: (earlier
    message that is not written as it stands, where it begins and ends, where each of its fields begins, the piece that
    it ends in and whether with that, whether its end is found by its text).
    """

    pieces: tuple[int, ...]
    tail: str
    places: tuple[Place, ...]
    values: Values
    loose: Mapping[int, bool]
    cuts: tuple[Cut, ...]
    context: int
    found: tuple[tuple[int, int, Place], ...]
    ended: tuple[tuple[int, int, tuple[int, ...], str], ...]
    called: tuple[tuple[int, Place, int, tuple[Reason, ...]], ...]
    shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int, bool], ...], bool], ...]

    @cached_property
    def closed(self) -> tuple[int, ...]:
        """The pieces that are closed."""
        return tuple(dict.fromkeys(at for at, more in self.places if more == CLOSED))

    @cached_property
    def layout(self) -> Layout:
        # Where `shown` messages are found is marked behind the pieces, the tail and the end; then where texts end.
        shown = len(self.pieces) + 2
        closed = shown + 2 * sum(len(places) for *_, places, _ in self.shown)
        where = {at: (closed + i, 0) for i, at in enumerate(self.closed)}
        places = [where[at] if more == CLOSED else (at, more) if at >= 0 else (shown + more, 0)
                  for at, more in self.places]
        return Layout(len(self.values.messages), places, self.loose, self.cuts)


@dataclass(slots=True)
class Aside:
    """A row of one turn, which is the longest row up to a cut not far before the turn.

    Of the turn's own text, which begins in the first of its `pieces` behind `skipped` characters and ends with `tail`,
    are the first of `places`; before it stands `head`, which is all from the cut on. `cut` is the number of the longest
    row's place where that cut ends, `shared` how many of its places are before the turn. `values`, `loose`, `found`
    and `called` are as in `Row`, of the turn alone. `alike`: how many of its spans are like the longest
    row's there, but for where they end.
    """

    head: str
    rest: Ids
    skipped: int
    cut: int
    shared: int
    pieces: tuple[int, ...]
    tail: str
    places: tuple[Place, ...]
    values: Values
    alike: int
    loose: Mapping[int, bool]
    found: tuple[tuple[int, int], ...]
    called: tuple[int, int, tuple[Reason, ...]] | None
    layout: Layout = field(init=False)
    rests: tuple[Values, ...] = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.places)
        self.places = (*self.places, (0, self.skipped - len(self.head)))
        cut = Cut(count, count, 0, -1, self.rest)
        self.rests = tuple(self.values.part(k) for k in range(self.alike + 1))
        self.layout = Layout(count - 1, self.places, self.loose, [cut], zero=count)


@dataclass(slots=True)
class RowPlan:
    """The rows of a shape: the longest, those beside it, and others; `order` is theirs in the conversation.

    `longer`: (a row, another), of which the first must be longer, because it has turns that may share the other.
    `told`: (message, whether it is its reasoning, the pieces that must be that; none where there must be none).
    `unlike`: (piece, text), neither of which may begin the other. `problems` are of turns that the template refuses.
    `stiff`: pieces that must not end with space, as others may where none did in the conversation it was read off.
    """

    trunk: Row
    asides: tuple[Aside, ...]
    rest: tuple[Row, ...]
    order: tuple[int, ...]
    longer: tuple[tuple[int, int], ...]
    told: tuple[tuple[int, bool, tuple[int, ...]], ...]
    unlike: tuple[tuple[int, str], ...]
    outcomes: Mapping[int, str]
    untrained: Mapping[int, str]
    problems: tuple[Problem, ...]
    stiff: frozenset[int]

    @property
    def _all(self) -> tuple[Row | Aside, ...]:
        return self.trunk, *self.asides, *self.rest

    def drafts(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, bare: Sequence[str] | None = None
    ) -> list[Draft] | None:
        """What is to be encoded of a conversation, whose recording gave `texts`; None where its rows may be others.

        `bare`: these without the space that they end with, if any of them does.
        """
        messages, bare = rendering.conversation.messages, bare or texts
        if wishes(messages):
            return None
        if not _as_told(self.told, messages, bare):
            return None
        for piece, text in self.unlike:
            if alike(texts[piece], text):
                return None
        if self.trunk.shown or any(row.shown for row in self.rest):
            written = recording.worlds.written(texts)

            def known(count: int, prompt: bool) -> str | None:
                found = written((count, prompt))
                return found[0] if isinstance(found, tuple) else None

            rendering.give(known)
        made: list[Draft] = []
        for one in self._all:
            draft = _drafted(one, texts, bare, rendering) if isinstance(one, Row) else \
                _beside(one, texts, bare, rendering)
            if draft is None:
                return None
            made.append(draft)
        return made

    def samples(self, found: Sequence[Placed | None], rendering: Rendering, decode: Decode) -> list[Sample] | None:
        """The rows of a conversation, of whose drafts this was found; None where they may be others."""
        outcomes, untrained, source = dict(self.outcomes), dict(self.untrained), rendering.conversation.source
        told = outcomes, source, untrained, decode
        made: list[LazySample] = []
        known = [one for one in found if one is not None]
        if len(known) < len(found):
            return None
        for one, (ids, places, shared, begin) in zip(self._all, known, strict=True):
            count = len(one.values.messages)
            if isinstance(one, Row):
                made.append(LazySample.of(ids.copy(), Strip(0, places[1 : count + 1], one.values), *told))
                continue
            more, before, others = 0, one.shared - 1, made[0].strip.ends
            while more < one.alike and places[more] <= shared and places[more] == others[before + more]:
                more += 1
            strip = Strip(int(places[more - 1]) if more else begin, places[more:count], one.rests[more])
            made.append(LazySample.of(ids.copy(), strip, *told, (made[0], shared, before + more)))
        if not all(len(made[i]) > len(made[k]) for i, k in self.longer):
            return None
        return [made[i] for i in self.order]


def _as_told(
    told: Sequence[tuple[int, bool, tuple[int, ...]]], messages: Sequence[Message], texts: Sequence[str]
) -> bool:
    """Whether texts of messages are written as they stand in each of the pieces, and none are where there are none."""
    for k, reasoning, pieces in told:
        text = messages[k].reasoning if reasoning else messages[k].content
        if type(text) is str:
            text = text.strip()
        elif text is not None:
            return False
        if not text or not pieces or text.startswith("<think>"):
            if text or pieces:
                return False
            continue
        for piece in pieces:
            if texts[piece] != text:
                return False
    return True


def wishes(messages: Sequence[Message]) -> bool:
    """Whether the data says of a message whether it is trained, or what it weighs: others of the shape do not."""
    return any(message.train is not None or message.weight is not None for message in messages)


def alike(text: str, other: str) -> bool:
    """Whether one of two texts begins the other."""
    return text.startswith(other) or other.startswith(text)


def _drafted(row: Row, texts: Sequence[str], bare: Sequence[str], rendering: Rendering) -> Draft | None:
    """A row of a conversation with its places, if all is found where it must be."""
    parts = [*[texts[i] for i in row.pieces], row.tail]
    text = "".join(parts)
    ends = [*accumulate(map(len, parts), initial=0)]
    for piece, wanted, (at, offset) in row.found:
        if text.find(bare[wanted], ends[at] + offset) != ends[piece]:
            return None
    for wanted, own, spaces, behind in row.ended:
        words = bare[wanted][-SHORT:]
        if bare is not texts:
            closing = texts[wanted][len(bare[wanted]) :]
            if texts[own] != bare[own] + closing:
                return None
            behind = closing + behind
        if spaces:
            space, other = spaces
            if texts[space] != texts[other]:
                return None
            behind = texts[space] + behind
        if (words + behind).rfind(words):
            return None
    if row.shown:
        at, offset = row.places[row.context]
        shown = _shown(row, rendering, text[: ends[at] + offset], ends)
        if shown is None:
            return None
        ends += shown
    ends += [ends[at] + len(bare[row.pieces[at]]) for at in row.closed]
    for k, (at, offset), last, reasons in row.called:
        mark, more = row.layout.places[last]
        if not _calls(rendering, k, text, ends[at] + offset, ends[mark] + more, reasons):
            return None
    return _draft((row.layout, text, ends, None))


def _beside(one: Aside, texts: Sequence[str], bare: Sequence[str], rendering: Rendering) -> Draft | None:
    """What the turn of a row beside the longest has of its own, and what stands before it."""
    parts, head = [texts[i] for i in one.pieces], one.head
    text = head + ("".join(parts) + one.tail)[one.skipped :]
    ends = [*accumulate(map(len, parts), initial=len(head) - one.skipped), len(text)]
    for piece, wanted in one.found:
        if text.find(bare[wanted], len(head)) != ends[piece]:
            return None
    if one.called is not None:
        k, last, reasons = one.called
        at, offset = one.places[last]
        if not _calls(rendering, k, text, len(head), ends[at] + offset, reasons):
            return None
    return _draft((one.layout, text, ends, (one.cut, one.shared - 1)))


def _calls(rendering: Rendering, k: int, text: str, begin: int, end: int, reasons: tuple[Reason, ...]) -> bool:
    """Whether a turn with calls holds its fields, and ends where it must."""
    found = locate(text, rendering.fields[k], begin, end)
    if isinstance(found, Missing) or tuple([reason for *_, reason in found]) != reasons:
        return False
    return rendering.stops.end(text, found[-1][1]) == end


def _shown(row: Row, rendering: Rendering, prompt: str, ends: Sequence[int]) -> list[int] | None:
    """Where the fields of earlier messages begin and end that are not written as they stand."""
    found: list[int] = []
    for k, (at, offset), (last, more), places, by_text in row.shown:
        begin, end, seen = ends[at] + offset, ends[last] + more, Seen(prompt)
        fields = None
        if by_text:
            ended, _, fields = end_in(seen, rendering, k, begin)
            if ended != end:
                return None
        if fields is None:
            fields = fields_in(prompt, rendering.fields[k], begin, end)
        if len(fields) != len(places):
            return None
        for (a, b, _), ((at, offset), within, whole) in zip(fields, places, strict=True):
            if a != ends[at] + offset or not ends[within] < b <= ends[within + 1] or whole != (b == ends[within + 1]):
                return None
            found += a, b
    return found
