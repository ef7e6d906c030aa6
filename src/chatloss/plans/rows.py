"""The rows of conversations of one shape: where each token's span ends, counted in the pieces of a recording.

A plan says of which pieces the rows are and where in them spans begin, and what must be found where: what the template
wrote decided all else when the plan was read off the rows of one conversation (`reading`). Rows of others are then the
plan's pieces, encoded. Where anything is found elsewhere, or a token reaches across a place at which that matters,
there is no row, and the conversation goes the usual way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from chatloss.fields import SHORT, Missing, locate
from chatloss.paint import Value
from chatloss.places import Seen, end_in, place_in
from chatloss.reference import Rendering
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.shapes.shapes import Recording
from chatloss.tokens import FastTokens

__all__ = ["Place", "Row", "RowPlan", "alike"]

# A place in a row: the piece, and how many characters behind its beginning (0 in what is not the template's own text);
# or -1 and which of the places that `shown` messages are found at.
Place = tuple[int, int]


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
    values: tuple[Value, ...]
    loose: Mapping[int, bool]
    context: int
    others: tuple[tuple[int, int], ...]
    found: tuple[tuple[int, int, Place], ...]
    ended: tuple[tuple[int, str], ...]
    called: tuple[tuple[int, Place, int, tuple[Reason, ...]], ...]
    shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int], ...], bool], ...]


@dataclass(slots=True)
class RowPlan:
    """The rows of a shape, the longest first; `order` is theirs in the conversation.

    `told`: (message, whether it is its reasoning, the pieces that must be that; none where there must be none).
    `unlike`: (piece, text), neither of which may begin the other.
    """

    rows: tuple[Row, ...]
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
        if any(row.shown for row in self.rows):
            rendering.give({world: "".join([texts[i] for i in pieces]) for world, pieces in recording.worlds.items()
                            if isinstance(pieces, tuple)})
        made: list[Sample] = []
        for row in self.rows:
            encoded = _encoded(row, texts, rendering, tokens)
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


def alike(text: str, other: str) -> bool:
    """Whether one of two texts begins the other."""
    return text.startswith(other) or other.startswith(text)


def _encoded(
    row: Row, texts: Sequence[str], rendering: Rendering, tokens: FastTokens
) -> tuple[Any, tuple[Span, ...]] | None:
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
        found = locate(text, rendering.fields[k], ends[at] + offset, chars[last])
        if isinstance(found, Missing) or tuple([reason for *_, reason in found]) != reasons:
            return None
        if rendering.stops.end(text, found[-1][1]) != chars[last]:
            return None
    encoded, context = tokens.encode_pair(prompt, text[begin:])
    starts, over = encoded.tokens_at(chars)
    if starts != over:
        for i, (a, b) in enumerate(zip(starts, over, strict=True)):
            if a != b:
                if i not in row.loose:
                    return None
                starts[i] = b if row.loose[i] else a
    if context != starts[row.context]:
        return None
    if row.others:
        branches = tokens.branches(encoded, prompt, [(chars[a], text[chars[a] : chars[b]]) for a, b in row.others])
        known = [(starts[a], starts[b]) for a, b in row.others]
        if branches is None or [(one.context, one.size) for one in branches[0]] != known:
            return None
    spans = tuple([Span(a, b, *value) for a, b, value in zip(starts, starts[1:], row.values, strict=False)])
    if any(a >= b for a, b, *_ in spans):
        return None
    return encoded.ids.copy(), spans


def _shown(row: Row, rendering: Rendering, prompt: str, text: str, ends: Sequence[int]) -> list[int] | None:
    """Where the fields of earlier messages with calls begin and end, which may be spelled in several ways."""
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
