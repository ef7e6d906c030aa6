"""The rows of conversations of one shape: where each token's span ends, counted in the pieces of a recording.

A plan says of which pieces the rows are and where in them spans begin, and what must be found where: what the template
wrote decided all else when the plan was read off the rows of one conversation (`reading`). Rows of others are then the
plan's pieces, encoded. Where anything is found elsewhere, or a token reaches across a place at which that matters,
there is no row, and the conversation goes the usual way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from operator import lt

import numpy as np

from chatloss.fields import SHORT, Missing, locate
from chatloss.places import Seen, end_in, place_in
from chatloss.reference import Rendering
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.shapes.shapes import Recording
from chatloss.tokens import Encoded, FastTokens, Ids

__all__ = ["Aside", "Place", "Row", "RowPlan", "Values", "alike"]

# A place in a row: the piece, and how many characters behind its beginning (0 in what is not the template's own text);
# or -1 and which of the places that `shown` messages are found at.
Place = tuple[int, int]
# The message, weight and reason of each span.
Values = tuple[tuple[int, ...], tuple[float, ...], tuple[Reason, ...]]
_span = partial(tuple.__new__, Span)


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its `pieces`, then `tail`; from each of `places` on, the last of which is its end, one of `values`.

    `loose`: the indices of places that a token may reach across, and whether it then belongs to what begins there.
    `context` is the index of the place where the last turn begins, `others` are those where the earlier turns of the
    row begin and end. `found`: (piece, its text, where one begins to look for it): it must be found there. `ended`:
    (text, what follows it where it is the last answer), whose end must not be found again in that. `called`: (turn with
    calls, where it begins, the index of the place where it ends, the reasons of its fields). `shown`: (earlier message
    that is not written as it stands, where it begins and ends, where each of its fields begins and the piece that it
    ends in, whether the message's end is found by its text).
    """

    pieces: tuple[int, ...]
    tail: str
    places: tuple[Place, ...]
    values: Values
    loose: Mapping[int, bool]
    context: int
    others: tuple[tuple[int, int], ...]
    found: tuple[tuple[int, int, Place], ...]
    ended: tuple[tuple[int, str], ...]
    called: tuple[tuple[int, Place, int, tuple[Reason, ...]], ...]
    shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int], ...], bool], ...]


@dataclass(frozen=True, slots=True)
class Aside:
    """A row of one turn, which up to `begin`, where the turn begins, is the longest row, with the same `shared` places.

    What the turn has of its own is in its `pieces`, the first of which begins before it, and `tail`; `places`,
    `values`, `loose`, `found` and `called` are as in `Row`, of these alone.
    """

    begin: Place
    shared: int
    pieces: tuple[int, ...]
    tail: str
    places: tuple[Place, ...]
    values: Values
    loose: Mapping[int, bool]
    found: tuple[tuple[int, int], ...]
    called: tuple[int, int, tuple[Reason, ...]] | None


@dataclass(slots=True)
class RowPlan:
    """The rows of a shape: the longest, those beside it, and others; `order` is theirs in the conversation.

    `told`: (message, whether it is its reasoning, the pieces that must be that; none where there must be none).
    `unlike`: (piece, text), neither of which may begin the other.
    """

    trunk: Row
    asides: tuple[Aside, ...]
    rest: tuple[Row, ...]
    order: tuple[int, ...]
    told: tuple[tuple[int, bool, tuple[int, ...]], ...]
    unlike: tuple[tuple[int, str], ...]
    outcomes: Mapping[int, str]
    untrained: Mapping[int, str]

    def samples(
        self, recording: Recording, texts: Sequence[str], rendering: Rendering, tokens: FastTokens, decode: Decode
    ) -> list[Sample] | None:
        """The rows of a conversation, whose recording gave `texts`; None where they may be others."""
        conversation = rendering.conversation
        messages = conversation.messages
        if any(m.train is not None or m.weight is not None for m in messages):
            return None
        for k, reasoning, pieces in self.told:
            text = messages[k].reasoning if reasoning else messages[k].content
            if not isinstance(text, str | None) or not _is(text or "", texts, pieces):
                return None
        if any(alike(texts[piece], text) for piece, text in self.unlike):
            return None
        if self.trunk.shown or any(row.shown for row in self.rest):
            rendering.give({world: "".join([texts[i] for i in pieces]) for world, pieces in recording.worlds.items()
                            if isinstance(pieces, tuple)})
        made = _encoded(self.trunk, self.asides, texts, rendering, tokens)
        for row in self.rest:
            more = _encoded(row, (), texts, rendering, tokens)
            made = made + more if made is not None and more is not None else None
        if made is None:
            return None
        outcomes, untrained, source = dict(self.outcomes), dict(self.untrained), conversation.source
        return [Sample.whole(*made[i], outcomes, source, untrained, decode) for i in self.order]


def _is(text: str, texts: Sequence[str], pieces: Sequence[int]) -> bool:
    """Whether a text of a message is written as it stands in each of `pieces`, and is none where there are none."""
    text = text.strip()
    if not pieces:
        return not text
    return bool(text) and not text.startswith("<think>") and all(texts[piece] == text for piece in pieces)


def alike(text: str, other: str) -> bool:
    """Whether one of two texts begins the other."""
    return text.startswith(other) or other.startswith(text)


_Made = tuple[Ids, tuple[Span, ...]]


def _encoded(
    row: Row, asides: Sequence[Aside], texts: Sequence[str], rendering: Rendering, tokens: FastTokens
) -> list[_Made] | None:
    """The ids and spans of a row, and of those beside it."""
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
    at, offset = row.places[row.context]
    begin = ends[at] + offset
    prompt = text[:begin]
    shown = _shown(row, rendering, prompt, text, ends)
    if shown is None:
        return None
    chars = [ends[at] + offset if at >= 0 else shown[offset] for at, offset in row.places]
    for k, (at, offset), last, reasons in row.called:
        if not _calls(rendering, k, text, ends[at] + offset, chars[last], reasons):
            return None
    encoded, context = tokens.encode_pair(prompt, text[begin:])
    starts = _tokens(encoded, chars, row.loose)
    if starts is None or context != starts[row.context]:
        return None
    spans = _spans(starts, row.values)
    if spans is None:
        return None
    made = [(encoded.ids.copy(), spans)]
    if not row.others and not asides:
        return made
    others = [(chars[a], text[chars[a] : chars[b]]) for a, b in row.others]
    places: list[list[int]] = []
    for one in asides:
        own = _target(one, texts, rendering)
        if own is None:
            return None
        others.append((ends[one.begin[0]] + one.begin[1], own[0]))
        places.append(own[1])
    known = tokens.branches(encoded, prompt, others)
    if known is None:
        return None
    branches, tails = known
    for (a, b), branch in zip(row.others, branches, strict=False):
        if branch.first or branch.cut != chars[b] or (branch.context, branch.size) != (starts[a], starts[b]):
            return None
    first = len(row.others)
    for one, place, (end, _), branch in zip(asides, places, others[first:], branches[first:], strict=True):
        more, there = branch.shared - branch.first, end - branch.cut + branch.begin
        at_tokens = _tokens(tails, [there + char for char in place], one.loose)
        if at_tokens is None or at_tokens[0] + more != branch.context or at_tokens[-1] + more != branch.size:
            return None
        own_spans = _spans([starts[one.shared - 1], *(token + more for token in at_tokens)], one.values)
        if own_spans is None:
            return None
        ids = np.concatenate((encoded.ids[: branch.shared], tails.ids[branch.first : branch.size - more]))
        made.append((ids, spans[: one.shared - 1] + own_spans))
    return made


def _target(one: Aside, texts: Sequence[str], rendering: Rendering) -> tuple[str, list[int]] | None:
    """The target of the turn of a row beside the trunk, and the characters of its places."""
    parts, skipped = [texts[i] for i in one.pieces], one.begin[1]
    text = ("".join(parts) + one.tail)[skipped:]
    ends = [*accumulate(map(len, parts), initial=-skipped), len(text)]
    for piece, wanted in one.found:
        if text.find(texts[wanted]) != ends[piece]:
            return None
    chars = [ends[at] + offset for at, offset in one.places]
    if one.called is not None and not _calls(rendering, one.called[0], text, 0, chars[one.called[1]], one.called[2]):
        return None
    return text, chars


def _calls(rendering: Rendering, k: int, text: str, begin: int, end: int, reasons: tuple[Reason, ...]) -> bool:
    """Whether a turn with calls holds its fields, and ends where it must."""
    found = locate(text, rendering.fields[k], begin, end)
    if isinstance(found, Missing) or tuple([reason for *_, reason in found]) != reasons:
        return False
    return rendering.stops.end(text, found[-1][1]) == end


def _tokens(encoded: Encoded, chars: Sequence[int], loose: Mapping[int, bool]) -> list[int] | None:
    """The tokens that begin at `chars`; None where one reaches across a place that is not `loose`."""
    starts, over = encoded.tokens_at(chars)
    if starts != over:
        for i, (a, b) in enumerate(zip(starts, over, strict=True)):
            if a != b:
                if i not in loose:
                    return None
                starts[i] = b if loose[i] else a
    return starts


def _spans(starts: Sequence[int], values: Values) -> tuple[Span, ...] | None:
    """The spans from each of `starts` to the next; None where one is empty."""
    ends = starts[1:]
    if not all(map(lt, starts, ends)):
        return None
    return tuple(map(_span, zip(starts, ends, *values, strict=False)))


def _shown(row: Row, rendering: Rendering, prompt: str, text: str, ends: Sequence[int]) -> list[int] | None:
    """Where the fields of earlier messages begin and end that are not written as they stand."""
    found: list[int] = []
    for k, (at, offset), (last, more), places, by_text in row.shown:
        begin, end, seen = ends[at] + offset, ends[last] + more, Seen(prompt)
        if by_text and end_in(seen, rendering, k, begin)[0] != end:
            return None
        fields = place_in(seen, rendering, k, begin, end, text).fields
        if len(fields) != len(places):
            return None
        for (a, b, _), ((at, offset), within) in zip(fields, places, strict=True):
            if a != ends[at] + offset or not ends[within] < b <= ends[within + 1]:
                return None
            found += a, b
    return found
