"""What happens to rows longer than `max_length`: nothing is cut that the user did not say, and every cut is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from chatloss.encoding import Problem
from chatloss.reference import Rendering, Turn
from chatloss.rows import TurnIds, turn_ids
from chatloss.sample import Sample, Span

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder

__all__ = ["fit"]


def fit(
    encoder: ChatEncoder, rendering: Rendering, members: list[TurnIds], outcomes: Mapping[int, str],
    untrained: Mapping[int, str], unlawful: Sequence[int],
) -> tuple[list[Sample], list[int], Problem | None]:
    """(rows made of `members`, turns that were cut, problem) under the policy's `max_length` and `overflow`."""
    limit, overflow = encoder.policy.max_length, encoder.policy.overflow
    if not limit or len(members[-1].ids) <= limit:
        return [encoder.sample(rendering, members, outcomes, untrained, unlawful=unlawful)], [], None
    longest = len(members[-1].ids)
    whole = [t for t in members if len(t.ids) <= limit]
    over = [t.turn.index for t in members if len(t.ids) > limit]
    everything = sorted([*unlawful, *(t.turn.index for t in members)])
    if overflow == "error":
        remedy = "--overflow whole_turns|window|right|drop"
        return [], everything, _problem(over[0], longest, limit, remedy, True)
    if overflow == "drop":
        return [], everything, _problem(over[0], longest, limit, "a longer --max-length", False)
    if overflow == "right":
        row = encoder.sample(rendering, members, outcomes, untrained, length=limit, unlawful=unlawful)
        cut = [*over, *_left_out(unlawful, [row])]
        return [row], cut, _problem(over[0], longest, limit, "a longer --max-length, or --overflow whole_turns", False)
    rows: list[Sample] = []
    if whole:
        status = {**untrained, **dict.fromkeys(over, "truncated")}
        rows.append(encoder.sample(rendering, whole, outcomes, status, unlawful=unlawful))
    cut = [*over, *_left_out(unlawful, rows)]
    if overflow == "window":
        left = [t for t in members if len(t.ids) > limit]
        windowed, over = _windows(encoder, rendering, left, outcomes, untrained)
        rows += windowed
        cut = [*over, *_left_out(unlawful, rows)]
    problem = _problem(cut[0], longest, limit, "a longer --max-length, or --overflow window", False) if cut else None
    return rows, cut, problem


def _left_out(turns: Sequence[int], rows: Sequence[Sample]) -> list[int]:
    """Those of `turns` that have no trained token in any of the rows."""
    return [i for i in turns if not any(span.message == i and span.weight for row in rows for span in row.spans)]


def _problem(index: int, length: int, limit: int, remedy: str, fatal: bool) -> Problem:
    return Problem("too_long", index, f"the row has {length} tokens, and max_length is {limit}", remedy, fatal)


def _windows(
    encoder: ChatEncoder, rendering: Rendering, turns: list[TurnIds], outcomes: Mapping[int, str],
    untrained: Mapping[int, str],
) -> tuple[list[Sample], list[int]]:
    """Rows for turns that are too long with their whole history: the oldest messages after the system message go."""
    rows: list[Sample] = []
    cut: list[int] = []
    left = list(turns)
    while left:
        last = left.pop().turn.index
        found = _smallest_window(encoder, rendering, last)
        if found is None:
            cut.append(last)
            continue
        window, kept, base = found
        members = [base]
        for t in list(left):
            if t.turn.index in kept:
                shorter = _lawful(encoder, window, kept.index(t.turn.index))
                if shorter is not None and base.ids[: len(shorter.ids)].tolist() == shorter.ids.tolist():
                    members.insert(len(members) - 1, shorter)
                    left.remove(t)
        row = encoder.sample(
            window, members, {kept.index(i): o for i, o in outcomes.items() if i in kept},
            {kept.index(i): o for i, o in untrained.items() if i in kept},
        )
        rows.insert(0, _renumbered(row, kept, outcomes, untrained))
    return rows, sorted(cut)


def _smallest_window(
    encoder: ChatEncoder, rendering: Rendering, last: int
) -> tuple[Rendering, list[int], TurnIds] | None:
    """The longest window before turn `last` that fits, beginning at a user message; None if even one does not."""
    messages = rendering.conversation.messages
    head = [i for i in range(min(2, last)) if messages[i].role in ("system", "developer")][:1]
    for start in (i for i in range(len(head), last) if messages[i].role == "user"):
        kept = [*head, *range(start, last + 1)]
        conversation = replace(rendering.conversation, messages=tuple(messages[i] for i in kept))
        window = encoder.rendering(conversation)
        base = _lawful(encoder, window, len(kept) - 1)
        if base is not None and len(base.ids) <= encoder.policy.max_length:
            return window, kept, base
    return None


def _lawful(encoder: ChatEncoder, window: Rendering, index: int) -> TurnIds | None:
    turn: Turn = window.turn(index)
    return turn_ids(encoder.loaded.tokens, turn) if turn.outcome == "reachable" else None


def _renumbered(
    row: Sample, kept: Sequence[int], outcomes: Mapping[int, str], untrained: Mapping[int, str]
) -> Sample:
    """The row with the message indices of the whole conversation."""
    spans = tuple(
        Span(s.start, s.end, kept[s.message] if s.message >= 0 else -1, s.weight, s.reason) for s in row.spans
    )
    return replace(row, spans=spans, outcomes=dict(outcomes), untrained=dict(untrained))
