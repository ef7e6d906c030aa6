"""Turns to rows: the ids of each turn's context and target, who may share a row, and a reason for every token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatloss.chat import Message
from chatloss.errors import DataError
from chatloss.fields import Missing, fields_of, locate, present
from chatloss.places import regions, standing
from chatloss.policy import Policy
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.tokens import Ids, Tokens, boundary_is_clean

__all__ = ["TurnIds", "group", "sample", "turn_ids"]

_FIELDS = (Reason.CONTENT, Reason.REASONING, Reason.CALL)
# No token is longer, in characters (where a tokenizer tells no offsets).
_REACH = 256


@dataclass(frozen=True, slots=True, eq=False)
class TurnIds:
    """One turn as ids: `ids[:context]` is what the engine holds, the rest what the model must emit.

    `starts` and `ends` are character positions in `text` (prompt + target), or None. `joined`: the ids are those of the
    whole text; else a token would have straddled the boundary, and the target is encoded on its own.
    """

    turn: Turn
    text: str
    ids: Ids
    context: int
    starts: npt.NDArray[np.int32] | None
    ends: npt.NDArray[np.int32] | None
    joined: bool
    tokens: Tokens

    def token_at(self, char: int) -> int:
        """The index of the first token that starts at or after character `char` of `text`."""
        if self.starts is not None:
            return int(self.starts.searchsorted(char))
        return self._search(char)[0]

    def token_over(self, char: int) -> int:
        """The index of the first token that holds any of character `char` of `text`."""
        if self.ends is not None:
            return int(self.ends.searchsorted(char, "right"))
        token, start = self._search(char)
        return token if start == char else max(token - 1, 0)

    def _search(self, char: int) -> tuple[int, int]:
        """(first token that starts at or after `char`, where it starts), without offsets.

        A token starts where the text before it, or the text from it on, has the same ids alone.
        """
        prompt = len(self.turn.prompt)
        for at in range(char, min(char + _REACH, len(self.text))):
            if self.joined or at <= prompt:
                before = self.tokens.encode(self.text[:at]).ids
            else:
                segment = self.tokens.encode_segment(self.text[prompt:at]).ids
                before = np.concatenate([self.ids[: self.context], segment])
            if np.array_equal(self.ids[: len(before)], before):
                return len(before), at
            behind = self.tokens.encode_segment(self.text[at:]).ids
            if len(behind) and np.array_equal(self.ids[-len(behind) :], behind):
                return len(self.ids) - len(behind), at
        return len(self.ids), len(self.text)


def turn_ids(tokens: Tokens, turn: Turn, *, apart: bool = False) -> TurnIds:
    """The ids of a turn; `apart` encodes the target on its own in any case (spliced targets).

    Raises `DataError` where the ids taken apart do not decode to the text, although the joint ids do.
    """
    text = turn.prompt + turn.target
    context, joint = tokens.encode(turn.prompt), tokens.encode(text)
    n = len(context.ids)
    if not apart and boundary_is_clean(context.ids, joint, len(turn.prompt)):
        return TurnIds(turn, text, joint.ids, n, joint.starts, joint.ends, True, tokens)
    target = tokens.encode_segment(turn.target)
    ids = np.concatenate([context.ids, target.ids])
    starts = _joined(context.starts, target.starts, len(turn.prompt))
    ends = _joined(context.ends, target.ends, len(turn.prompt))
    if tokens.decode(joint.ids.tolist()) == text != tokens.decode(ids.tolist()):
        raise DataError(
            "the tokenizer cannot encode this answer apart from its prompt", where=f"messages[{turn.index}]",
            hint="please report this tokenizer; leave the turn out with train: false", kind="boundary",
        )
    return TurnIds(turn, text, ids, n, starts, ends, False, tokens)


def _joined(
    before: npt.NDArray[np.int32] | None, behind: npt.NDArray[np.int32] | None, length: int
) -> npt.NDArray[np.int32] | None:
    return None if before is None or behind is None else np.concatenate([before, behind + np.int32(length)])


def group(turns: Sequence[TurnIds], row_format: str) -> list[list[TurnIds]]:
    """Rows as lists of turns, the last of each being its base: the fewest in which every turn is lawful.

    A turn may share a row exactly if the row begins with its context ids and its target ids.
    """
    rows: list[list[TurnIds]] = []
    left = sorted(turns, key=lambda t: (len(t.ids), t.turn.index))
    while left:
        base = left.pop()
        members = [base]
        if row_format != "per_turn":
            members += [t for t in left if len(t.ids) <= base.context and _begins_with(base.ids, t)]
            taken = {id(t) for t in members}
            left = [t for t in left if id(t) not in taken]
        rows.append(sorted(members, key=lambda t: t.turn.index))
    return sorted(rows, key=lambda row: row[-1].turn.index)


def _begins_with(ids: Ids, turn: TurnIds) -> bool:
    n = len(turn.ids)
    # Where rows differ they mostly do at once, in the first target.
    target = slice(turn.context, min(turn.context + 8, n))
    return np.array_equal(ids[target], turn.ids[target]) and np.array_equal(ids[:n], turn.ids)


def sample(
    rendering: Rendering, members: Sequence[TurnIds], policy: Policy, outcomes: Mapping[int, str],
    untrained: Mapping[int, str], decode: Decode, *, length: int = 0, unlawful: Iterable[int] = (),
) -> Sample:
    """The row of `members`; `length` cuts it; turns in `unlawful` are trained where they happen to stand in it."""
    base = members[-1]
    n = len(base.ids)
    message, reason, weight = np.full(n, -1, np.int32), np.full(n, Reason.SCAFFOLD, np.uint8), np.zeros(n, np.float32)
    messages = rendering.conversation.messages
    status = {**outcomes, **untrained}

    for start, end, i in regions(rendering, base.turn.prompt, base.turn.index):
        message[base.token_at(start) : base.token_at(end)] = i
        found = locate(base.text[:end], fields_of(messages[i]), start)
        if isinstance(found, Missing):
            found = present(base.text[:end], fields_of(messages[i]), start)
        for a, b, _ in found:
            reason[base.token_over(a) : base.token_at(b)] = _why_not(messages[i], i, status, policy)
        prompt, plain = rendering.prompt(i), rendering.text(i)
        if prompt is not None and plain is not None and prompt != plain and base.text.startswith(prompt):
            reason[base.token_at(len(plain)) : base.token_at(len(prompt))] = Reason.GENERATION_PROMPT
    history = rendering.text(base.turn.index)
    if history is not None and base.turn.prompt.startswith(history):
        at = base.token_at(len(history))
        message[at : base.context], reason[at : base.context] = base.turn.index, Reason.GENERATION_PROMPT

    for member in members:
        _paint(member, messages[member.turn.index], policy, len(member.turn.prompt), message, reason, weight)
    for i in (i for i in unlawful if i < base.turn.index):
        _paint_where_it_stands(rendering, base, i, policy, message, reason, weight)
    if n:
        weight[0] = 0.0  # nothing predicts the first token
        reason[0] = Reason.SCAFFOLD if reason[0] < Reason.GENERATION_PROMPT else reason[0]
    keep = min(length, n) if length else n
    return Sample(
        base.ids[:keep], _spans(message[:keep], reason[:keep], weight[:keep]), dict(outcomes),
        rendering.conversation.source, dict(untrained), decode,
    )


def _why_not(message: Message, index: int, status: Mapping[int, str], policy: Policy) -> Reason:
    if message.role not in policy.roles:
        return Reason.OTHER_ROLE
    return _STATUS.get(status.get(index, "split"), Reason.SPLIT)


_STATUS = {
    "exact": Reason.SPLIT, "split": Reason.SPLIT, "off_prompt": Reason.OFF_PROMPT, "altered": Reason.ALTERED,
    "unrenderable": Reason.UNRENDERABLE, "switched_off": Reason.SWITCHED_OFF, "truncated": Reason.TRUNCATED,
}


def _paint(
    member: TurnIds, data: Message, policy: Policy, at: int, message: npt.NDArray[np.int32],
    reason: npt.NDArray[np.uint8], weight: npt.NDArray[np.float32],
) -> None:
    """Write a turn's targets into the row. `at`: where its target begins in its text."""
    end = len(member.ids)
    message[member.context : end] = member.turn.index
    # A token that holds any of a field is the field's, and of two fields the first one's.
    for a, b, why in sorted(member.turn.spans, key=lambda span: (span[2] in _FIELDS, -span[0])):
        first = member.token_over(at + a) if why in _FIELDS else member.token_at(at + a)
        first, last = max(first, member.context), member.token_at(at + b)
        reason[first:last] = why
        weight[first:last] = _weight(why, data, policy)
    if policy.spans:
        _paint_patterns(member, policy, at, weight)
    off = weight[member.context : end] == 0
    reason[member.context : end][off] = Reason.SWITCHED_OFF


def _paint_patterns(member: TurnIds, policy: Policy, at: int, weight: npt.NDArray[np.float32]) -> None:
    for a, b, why in member.turn.spans:
        if why not in _FIELDS:
            continue
        part = member.text[at + a : at + b]
        for pattern, factor in policy.spans:
            for match in (m for m in re.finditer(pattern, part) if m.end() > m.start()):
                first, last = member.token_over(at + a + match.start()), member.token_at(at + a + match.end())
                weight[max(first, member.context) : last] = factor


def _weight(why: Reason, data: Message, policy: Policy) -> float:
    part = {Reason.REASONING: "reasoning", Reason.CONTENT: "content", Reason.CALL: "calls"}.get(why)
    if part is not None and part not in policy.parts:
        return 0.0
    return 1.0 if data.weight is None else data.weight


def _paint_where_it_stands(
    rendering: Rendering, base: TurnIds, index: int, policy: Policy, message: npt.NDArray[np.int32],
    reason: npt.NDArray[np.uint8], weight: npt.NDArray[np.float32],
) -> None:
    """`unlawful = "keep"`: train what the row has of a turn, through its stop, although inference never shows it so."""
    data = rendering.conversation.messages[index]
    for a, b, why in standing(rendering, index, base.turn):
        first, last = base.token_over(a) if why in _FIELDS else base.token_at(a), base.token_at(b)
        value = _weight(why, data, policy)
        message[first:last], weight[first:last] = index, value
        reason[first:last] = why if value else Reason.SWITCHED_OFF


def _spans(
    message: npt.NDArray[np.int32], reason: npt.NDArray[np.uint8], weight: npt.NDArray[np.float32]
) -> tuple[Span, ...]:
    if not len(message):
        return ()
    changes = (message[1:] != message[:-1]) | (reason[1:] != reason[:-1]) | (weight[1:] != weight[:-1])
    starts = np.concatenate([[0], np.flatnonzero(changes) + 1])
    ends = [*starts[1:].tolist(), len(message)]
    values = zip(message[starts].tolist(), weight[starts].tolist(), map(Reason, reason[starts].tolist()), strict=True)
    return tuple(Span(a, b, *value) for a, b, value in zip(starts.tolist(), ends, values, strict=True))
