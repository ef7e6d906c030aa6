"""Rows with a reason and a weight for every token: the history painted once, the turns of the row over it."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from chatloss.chat import Message
from chatloss.places import Places, standing
from chatloss.policy import Policy
from chatloss.reference import Rendering
from chatloss.rows import TurnIds
from chatloss.sample import Decode, Reason, Sample, Span

__all__ = ["FIELDS", "Painting", "Value", "left_out", "sample", "weight_in", "why_not"]

# What a token has: message, weight, reason; and a run of such tokens by its first.
Value = tuple[int, float, Reason]
Run = tuple[int, Value]
FIELDS = (Reason.CONTENT, Reason.REASONING, Reason.CALL)


def sample(
    rendering: Rendering, members: Sequence[TurnIds], policy: Policy, outcomes: Mapping[int, str],
    untrained: Mapping[int, str], decode: Decode, *, length: int = 0, unlawful: Iterable[int] = (),
) -> Sample:
    """The row of `members`; `length` cuts it; turns in `unlawful` are trained where they happen to stand in it."""
    base, messages = members[-1], rendering.conversation.messages
    row = rendering.once(_Trunk).row(base, {**outcomes, **untrained}, policy)
    history = rendering.text(base.turn.index)
    known = history is not None and base.turn.prompt.startswith(history)
    begun = len(history or "") if known else len(base.turn.prompt)
    strokes = [(member, _strokes(member, messages[member.turn.index], policy)) for member in members]
    shown = [(i, standing(rendering, i, base.turn)) for i in unlawful if i < base.turn.index]
    # Where a member's offsets are those of the base, one look tells the tokens of all their characters.
    apart = {id(member) for member in members if not _same_target(member, base)}
    chars = [begun, *(char for _, found in shown for place in found for char in place[:2])]
    for member, made in strokes:
        if id(member) not in apart:
            chars += _edges(made)
    at, over = base.tokens_at(chars)
    if known:
        row.paint(at[0], base.context, message=base.turn.index, weight=0.0, reason=Reason.GENERATION_PROMPT)
    k = 1 + sum(2 * len(found) for _, found in shown)
    for member, made in strokes:
        if id(member) in apart:
            _paint(row, member, made, *member.tokens_at(_edges(made)))
        else:
            _paint(row, member, made, at[k : k + 2 * len(made)], over[k : k + 2 * len(made)])
            k += 2 * len(made)
    k = 1
    for i, found in shown:  # unlawful = "keep": trained as it stands here, although inference never shows it so
        for _, _, why in found:
            weight = _weight_of(why, messages[i], policy)
            row.paint(
                over[k] if why in FIELDS else at[k], at[k + 1], message=i, weight=weight,
                reason=why if weight else Reason.SWITCHED_OFF,
            )
            k += 2
    row.leave_first()
    n = min(length, len(base.ids)) if length else len(base.ids)
    return Sample(
        base.ids[:n].copy(), row.spans(n), dict(outcomes), rendering.conversation.source, dict(untrained), decode,
    )


class _Trunk:
    """The history that rows of one conversation begin with, painted once for all of them as far as it is the same."""

    def __init__(self, rendering: Rendering) -> None:
        self._messages = rendering.conversation.messages
        self._places = Places(rendering)
        self._status: Mapping[int, str] = {}
        self._base: TurnIds | None = None
        self._start_again()

    def _start_again(self) -> None:
        self._painting, self._painted, self._reach = Painting(), 0, 0

    def row(self, base: TurnIds, status: Mapping[int, str], policy: Policy) -> Painting:
        """A painting of the messages before `base`, each with the reason why it is not trained."""
        places, kept = self._places.of(base.turn, base.text)
        if kept < self._painted or status != self._status or not self._same_tokens(base):
            self._start_again()
        elif self._painted:  # there is another row: what is painted by now is worth keeping as spans
            self._painting.close()
        new = places[self._painted :]
        chars = [places[self._painted - 1].end if self._painted else 0]
        for end, fields, supplied in new:
            chars.append(end)
            for a, b, _ in fields:
                chars += a, b
            if supplied is not None:
                chars += supplied
        at, over = base.tokens_at(chars)
        self._reach = max(self._reach, max(at), max(over))
        first, k = at[0], 1
        for i, (_, fields, supplied) in enumerate(new, self._painted):
            last, k = at[k], k + 1
            value = i, 0.0, why_not(self._messages[i], i, status, policy)
            parts = []
            for _ in fields:
                parts.append((over[k], at[k + 1], value))
                k += 2
            if supplied is not None:
                parts.append((at[k], at[k + 1], (i, 0.0, Reason.GENERATION_PROMPT)))
                k += 2
            self._painting.put_behind(first, last, (i, 0.0, Reason.SCAFFOLD), parts)
            first = last
        self._painted, self._status, self._base = len(places), status, base
        return self._painting.copy()

    def _same_tokens(self, base: TurnIds) -> bool:
        """Whether the tokens that were painted are those of another row too: where they start and end decides."""
        last, end = self._base, self._reach + 1
        return not self._painted or (
            last is not None and end <= min(len(last.ids), len(base.ids)) and _same_offsets(last, base, 0, end)
        )


def _same_offsets(a: TurnIds, b: TurnIds, first: int, last: int) -> bool:
    if a.starts is None or b.starts is None or a.ends is None or b.ends is None:
        return False
    part = slice(first, last)
    return a.starts[part].tobytes() == b.starts[part].tobytes() and a.ends[part].tobytes() == b.ends[part].tobytes()


def _same_target(member: TurnIds, base: TurnIds) -> bool:
    """Whether the offsets of a member's target are the same in its row."""
    return member is base or _same_offsets(member, base, max(member.context - 1, 0), len(member.ids))


def why_not(message: Message, index: int, status: Mapping[int, str], policy: Policy) -> Reason:
    if message.role not in policy.roles:
        return Reason.OTHER_ROLE
    return _STATUS.get(status.get(index, "split"), Reason.SPLIT)


_STATUS = {
    "exact": Reason.SPLIT, "split": Reason.SPLIT, "off_prompt": Reason.OFF_PROMPT, "altered": Reason.ALTERED,
    "unrenderable": Reason.UNRENDERABLE, "switched_off": Reason.SWITCHED_OFF, "truncated": Reason.TRUNCATED,
}


# (start, end, reason or None, weight) in characters of a turn's text
_Stroke = tuple[int, int, Reason | None, float]


def _strokes(member: TurnIds, data: Message, policy: Policy) -> list[_Stroke]:
    """What to paint over a turn's target: its spans, then what patterns match in its fields."""
    at = len(member.turn.prompt)
    strokes: list[_Stroke] = [(at + a, at + b, why, _weight_of(why, data, policy)) for a, b, why in member.turn.spans]
    for pattern, factor in policy.spans:
        for a, b, why, _ in strokes[: len(member.turn.spans)]:
            if why in FIELDS:
                found, weight = re.finditer(pattern, member.written[a:b]), _float32(factor)
                strokes += [(a + m.start(), a + m.end(), None, weight) for m in found if m[0]]
    return strokes


def _edges(strokes: Sequence[_Stroke]) -> list[int]:
    """Where strokes begin, and where they end."""
    return [stroke[0] for stroke in strokes] + [stroke[1] for stroke in strokes]


def _paint(row: Painting, member: TurnIds, strokes: Sequence[_Stroke], at: list[int], over: list[int]) -> None:
    """Write a turn's targets into the row. `at`, `over`: the tokens of the strokes' edges, as `tokens_at` says."""
    first, end, index = member.context, len(member.ids), member.turn.index
    runs = _in_line(member, strokes, at, over)
    if runs is not None:
        row.put(runs, end)
        return
    row.paint(first, end, message=index)
    placed = list(zip(strokes, at, over, at[len(strokes) :], strict=False))
    rest = [one for one in placed if one[0][2] is not None and one[0][2] not in FIELDS]
    # A token that holds any of a field is the field's, and of two fields the first one's.
    fields = [one for one in reversed(placed) if one[0][2] in FIELDS]
    matched = [one for one in placed if one[0][2] is None]
    for (_, _, why, weight), begins, holds, last in (*rest, *fields, *matched):
        start = max(begins if why is not None and why not in FIELDS else holds, first)
        row.paint(start, min(last, end), message=index, weight=weight, reason=why)
    row.switch_off(first, end)


def _in_line(member: TurnIds, strokes: Sequence[_Stroke], at: list[int], over: list[int]) -> list[Run] | None:
    """The runs that painting the strokes of a turn gives, where each begins behind the one before; else None."""
    runs: list[Run] = []
    edge, end, token, within = len(member.turn.prompt), len(member.ids), member.context, False
    for (a, b, why, weight), begins, holds in zip(strokes, at, over, strict=False):
        field = why in FIELDS
        start = holds if field and not within else begins
        if why is None or a != edge or not token <= start <= begins or start > end:
            return None
        if runs and runs[-1][0] == start:
            runs.pop()
        runs.append((start, (member.turn.index, weight, why if weight else Reason.SWITCHED_OFF)))
        edge, token, within = b, start, field
    return runs if runs and runs[0][0] == member.context and token < end <= at[-1] else None


_PARTS = ((Reason.REASONING, "reasoning"), (Reason.CONTENT, "content"), (Reason.CALL, "calls"))


def left_out(policy: Policy) -> tuple[Reason, ...]:
    """The reasons that a policy does not train."""
    return tuple(reason for reason, part in _PARTS if part not in policy.parts)


def weight_in(message: Message) -> float:
    """What the tokens of a message weigh that are trained."""
    return 1.0 if message.weight is None else _float32(message.weight)


def _weight_of(why: Reason, data: Message, policy: Policy) -> float:
    return 0.0 if why in left_out(policy) else weight_in(data)


def _float32(weight: float) -> float:
    """The weight that a row can hold."""
    return float(np.float32(weight))


class Painting:
    """Runs of tokens from 0 on without end, at first all scaffold of no message. What is painted last, stays.

    Work and memory grow with the number of runs, not of tokens; a copy shares the spans that are not painted over.

    >>> painting = Painting()
    >>> painting.paint(2, 5, message=1, reason=Reason.CONTENT, weight=1.0)
    >>> painting.paint(4, 9, message=2)
    >>> [(s.start, s.end, s.message, s.weight, s.reason.name) for s in painting.spans(8)]
    [(0, 2, -1, 0.0, 'SCAFFOLD'), (2, 4, 1, 1.0, 'CONTENT'), (4, 5, 2, 1.0, 'CONTENT'), (5, 8, 2, 0.0, 'SCAFFOLD')]
    """

    __slots__ = ("_spans", "_starts", "_values")

    def __init__(self) -> None:
        self._starts = [0]
        self._values: list[Value] = [(-1, 0.0, Reason.SCAFFOLD)]
        self._spans: list[Span] = []  # those of the first runs, as far as they are final

    def copy(self) -> Painting:
        made = Painting.__new__(Painting)
        made._starts, made._values, made._spans = self._starts[:], self._values[:], self._spans[:]
        return made

    def paint(
        self, first: int, last: int, *, message: int | None = None, reason: Reason | None = None,
        weight: float | None = None,
    ) -> None:
        """Set what is given, and only that, for tokens [first, last)."""
        if first >= last:
            return
        a, b = self._cut(first), self._cut(last)
        del self._spans[max(a - 1, 0) :]
        for k in range(a, b):
            value = self._values[k]
            self._values[k] = (
                value[0] if message is None else message, value[1] if weight is None else weight,
                value[2] if reason is None else reason,
            )

    def put(self, runs: Sequence[Run], last: int) -> None:
        """Set everything for the tokens of `runs`, the last of which ends before token `last`."""
        a, b = self._cut(runs[0][0]), self._cut(last)
        del self._spans[max(a - 1, 0) :]
        self._starts[a:b], self._values[a:b] = [start for start, _ in runs], [value for _, value in runs]

    def put_behind(self, first: int, last: int, value: Value, parts: Sequence[tuple[int, int, Value]]) -> None:
        """Set the message for tokens [first, last), and then the reason for each of `parts`, (first, last, value)."""
        runs, at = [(first, value)], first
        for a, b, part in sorted(parts):
            if a < b:
                if a < at or b > last:
                    break
                if a == runs[-1][0]:
                    runs.pop()
                runs += (a, part), (b, value)
                at = b
        else:  # the usual: nothing is painted twice, and nothing has been before
            if first >= self._starts[-1]:
                if first < last:
                    self.put(runs if runs[-1][0] < last else runs[:-1], last)
                return
        self.paint(first, last, message=value[0])
        for a, b, part in parts:
            self.paint(a, b, reason=part[2])

    def switch_off(self, first: int, last: int) -> None:
        """Tokens of [first, last) that weigh nothing get the reason for that."""
        if first >= last:
            return
        a, b = self._cut(first), self._cut(last)
        del self._spans[max(a - 1, 0) :]
        for k, (message, weight, _) in enumerate(self._values[a:b], a):
            if not weight:
                self._values[k] = message, weight, Reason.SWITCHED_OFF

    def leave_first(self) -> None:
        """Token 0 is never trained: nothing predicts it."""
        _, weight, reason = self._values[0]
        if weight or reason.trained:
            self.paint(0, 1, weight=0.0, reason=Reason.SCAFFOLD if reason.trained else None)

    def spans(self, length: int) -> tuple[Span, ...]:
        """The spans of the first `length` tokens; the painting ends there."""
        size = bisect_left(self._starts, length)
        del self._starts[size:], self._values[size:], self._spans[max(size - 1, 0) :]
        self.close()
        if self._starts:
            self._spans.append(Span(self._starts[-1], length, *self._values[-1]))
        return tuple(self._spans)

    def _cut(self, at: int) -> int:
        """The index of the run that starts at `at`."""
        starts = self._starts
        k = bisect_left(starts, at) if at < starts[-1] else len(starts) - (at == starts[-1])
        if k == len(starts) or starts[k] != at:
            starts.insert(k, at)
            self._values.insert(k, self._values[k - 1])
        return k

    def close(self) -> None:
        """Join equal runs, and make the spans of all runs but the last, whose end is open."""
        done = len(self._spans)
        starts, values = self._starts[done:done + 1], self._values[done:done + 1]
        for start, value in zip(self._starts[done + 1 :], self._values[done + 1 :], strict=True):
            if value != values[-1]:
                starts.append(start)
                values.append(value)
        self._starts[done:], self._values[done:] = starts, values
        self._spans += [Span(a, b, *value) for a, b, value in zip(starts, starts[1:], values, strict=False)]
