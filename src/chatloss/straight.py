"""The rows of a conversation whose last prompt begins with all the others, read off in one look.

That is what most conversations are under most templates: every turn is reachable, and its prompt is a part of the last
one's, even where its answer is written otherwise once it is history. The last turn is the trunk: it is encoded, and the
history in it placed, once. A turn that is a part of the trunk may share its row; of any other only the target is new.
What the rows are, `group` and `sample` say, which ask for none of this. Whatever is not plainly so gives None.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from chatloss.fields import Located
from chatloss.paint import FIELDS, Value, left_out, weight_in, why_not
from chatloss.places import Place, Seen, end_in, place_in
from chatloss.policy import Policy
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.tokens import Branch, Encoded, FastTokens, Ids

__all__ = ["straight"]

_span = partial(tuple.__new__, Span)
# What tokens are, from each of the first on until the next.
_Strip = tuple[list[int], list[Value]]


@dataclass(frozen=True, slots=True)
class _Trunk:
    """The turns of a conversation as branches of the last one, which is the trunk.

    In that message i begins at character `begins[i]`, as any prompt does that is like it through `reaches[i]`, and has
    its `fields` there, where they had to be found to tell where it ends.
    """

    rendering: Rendering
    turns: Sequence[Turn]
    branches: list[Branch]
    encoded: Encoded
    tails: Encoded
    begins: list[int]
    reaches: list[int]
    fields: list[Located | None]

    def ids(self, k: int) -> Ids:
        _, size, shared, _, first, _ = branch = self.branches[k]
        if branch.along:
            return self.encoded.ids[:size].copy()
        return np.concatenate((self.encoded.ids[:shared], self.tails.ids[first : first + size - shared]))


def straight(
    rendering: Rendering, turns: Sequence[Turn], policy: Policy, untrained: Mapping[int, str], tokens: FastTokens,
    decode: Decode,
) -> list[Sample] | None:
    """The rows of all `turns`, or None."""
    if policy.spans or not turns or not turns[0].index or rendering.conversation.messages[0].role == "assistant":
        return None  # what is rendered before the first message is somebody else's
    trunk = _trunk(rendering, turns, tokens)
    if trunk is None or (policy.max_length and any(branch.size > policy.max_length for branch in trunk.branches)):
        return None
    rows = _grouped(trunk.branches) if policy.row_format != "per_turn" else [[k] for k in range(len(turns))]
    if policy.row_format == "multi_turn" and len(rows) > 1:
        return None
    spans = _spans(trunk, rows, policy, untrained)
    if spans is None:
        return None
    outcomes = dict.fromkeys([turn.index for turn in turns], "exact")
    for row in rows[:-1]:
        outcomes.update(dict.fromkeys([turns[k].index for k in row], "split"))
    source = rendering.conversation.source
    return [
        Sample.whole(trunk.ids(row[-1]), found, dict(outcomes), source, dict(untrained), decode)
        for row, found in zip(rows, spans, strict=True)
    ]


def _trunk(rendering: Rendering, turns: Sequence[Turn], tokens: FastTokens) -> _Trunk | None:
    """The last turn as the trunk of all others, if it plainly is."""
    base = turns[-1]
    prompt, prompts = base.prompt, {turn.index: len(turn.prompt) for turn in turns}
    key, asked = _key(rendering, base.index), rendering.alike
    for turn in turns:
        known = asked(key, _key(rendering, turn.index))
        if turn.outcome != "reachable" or turn.stop != "rendered":
            return None
        if not prompt.startswith(turn.prompt[known:], known):
            return None
    seen, begins, reaches, begin, whole = Seen(prompt), [], [], 0, False
    fields: list[Located | None] = []
    for i in range(base.index + 1):
        begins.append(begin)
        reaches.append(seen.reach)
        if i in prompts and not (whole and begin <= prompts[i]):
            return None  # its prompt does not go on from the history alone
        if i < base.index:
            known = max(prompts.get(i, 0), asked(key, (i + 1, False)))
            begin, whole, found_there = end_in(seen, rendering, i, begin, known)
            fields.append(found_there)
    encoded, context = tokens.encode_pair(prompt, base.target)
    others = [(prompts[turn.index], turn.target) for turn in turns[:-1]]
    found = tokens.branches(encoded, prompt, others) if context is not None else None
    if found is None or context is None:
        return None
    size = len(encoded.ids)
    branches = [*found[0], Branch(context, size, size, len(prompt))]
    for turn, branch in zip(turns[:-1], branches, strict=False):
        if branch.cut > begins[turn.index + 1] if branch.along else branch.cut < begins[turn.index]:
            return None
    return _Trunk(rendering, turns, branches, encoded, found[1], begins, reaches, fields)


def _key(rendering: Rendering, index: int) -> tuple[int, bool]:
    """Which rendering the prompt of a message is."""
    return index, rendering.conversation.messages[index].role == "assistant"


def _grouped(branches: Sequence[Branch]) -> list[list[int]]:
    """The rows as `group` makes them: each is the longest turn left, and what of the trunk ends within its prompt."""
    rest = [k for k, branch in enumerate(branches) if branch.along]
    rows: list[list[int]] = []
    taken: set[int] = set()
    for base in sorted(range(len(branches)), key=lambda k: (branches[k].size, k), reverse=True):
        if base not in taken:
            context = branches[base].context
            row = [*(k for k in rest if branches[k].size <= context), base]
            taken.update(row)
            rest = [k for k in rest if k not in taken]
            rows.append(row)
    return sorted(rows, key=lambda row: row[-1])


def _spans(
    trunk: _Trunk, rows: Sequence[Sequence[int]], policy: Policy, untrained: Mapping[int, str]
) -> list[tuple[Span, ...]] | None:
    """The spans of each row."""
    rendering, many, off = trunk.rendering, len(rows) > 1, left_out(policy)
    messages, base = rendering.conversation.messages, trunk.turns[-1]
    trained = {turn.index: (turn, branch) for turn, branch in zip(trunk.turns, trunk.branches, strict=True)}
    along, aside, seen = _Events(), _Events(), Seen(base.prompt)
    history: list[slice] = []
    own: list[slice] = []
    for i, (begin, reach) in enumerate(zip(trunk.begins, trunk.reaches, strict=True)):
        message, first = messages[i], len(along.chars)
        turn, branch = trained.get(i, (None, None))
        if turn is not base and (many or turn is None or message.tool_calls):
            same = rendering.alike(_key(rendering, base.index), _key(rendering, i))
            end, there = trunk.begins[i + 1], trunk.fields[i]
            place = place_in(seen, rendering, i, begin, end, seen.text, same, found=there)
            if many or turn is None:
                along.history(i, begin, place, why_not(message, i, untrained, policy))
            # A call may be spelled in several ways, of which history need not show the same first.
            if branch is not None and branch.along and place.fields and place.fields[-1][1] > branch.cut:
                return None
        if many:
            history.append(slice(first, len(along.chars)))
        if turn is None or branch is None:
            continue
        if reach > len(turn.prompt) or seen.reach > len(turn.prompt):
            return None
        events = along if branch.along else aside
        start = len(events.chars)
        if branch.along:
            along.begin(i, begin)
        else:
            along.clean.append(first)
        if not events.target(turn, branch, weight_in(message), off):
            return None
        own.append(slice(start, len(events.chars)))
    known, others = along.tokens(trunk.encoded), aside.tokens(trunk.tails)
    if known is None or others is None:
        return None
    if not many:
        whole = _joined(known, along.values)
        return None if whole is None or not _leaves_first(whole) else [whole]
    strips: dict[int, _Strip] = {}
    for turn, branch, at in zip(trunk.turns, trunk.branches, own, strict=True):
        i = turn.index
        if branch.along:
            strips[i] = known[at], along.values[at]
        else:
            more = branch.shared - branch.first
            tokens = [known[history[i].start], *[token + more for token in others[at]]]
            strips[i] = tokens, [(i, 0.0, Reason.GENERATION_PROMPT), *aside.values[at]]
    return _rows(trunk.turns, rows, [(known[at], along.values[at]) for at in history], strips)


def _rows(
    turns: Sequence[Turn], rows: Sequence[Sequence[int]], history: Sequence[_Strip], own: Mapping[int, _Strip]
) -> list[tuple[Span, ...]] | None:
    """The spans of rows, of which those with a single turn share the history. Strips are by message."""
    strips = [*history[:-1], ([own[turns[-1].index][0][0]], [])]
    before = _joined(*_chained(strips))
    if before is None:
        return None
    starts = [span.start for span in before]
    made: list[tuple[Span, ...]] = []
    for row in rows:
        last = turns[row[-1]].index
        if len(row) > 1:
            members = {turns[k].index for k in row}
            strips = [own[i] if i in members else history[i] for i in range(last + 1)]
            found = _joined(*_chained(strips))
        else:
            found = _joined(*own[last])
            if found is not None:
                found = before[: bisect_left(starts, found[0].start)] + found
        if found is None or not _leaves_first(found):
            return None
        made.append(found)
    return made


def _chained(strips: Sequence[_Strip]) -> _Strip:
    """Strips as one: each ends where the next one begins."""
    return (
        [token for tokens, _ in strips for token in tokens],
        [value for _, values in strips for value in values],
    )


def _joined(tokens: Sequence[int], values: Sequence[Value]) -> tuple[Span, ...] | None:
    """The spans of a strip, the last of whose tokens ends them; None where the tokens step back."""
    made: list[Span] = []
    start, held = 0, None
    for token, following, value in zip(tokens, tokens[1:], values, strict=False):
        if token > following:
            return None
        if token < following and value != held:
            if held is not None:
                made.append(_span((start, token, *held)))
            start, held = token, value
    if held is None:
        return None
    made.append(_span((start, tokens[-1], *held)))
    return tuple(made)


def _leaves_first(spans: Sequence[Span]) -> bool:
    """Whether a row begins with what is not trained: nothing predicts its first token."""
    return spans[0].start == 0 and not spans[0].weight and not spans[0].reason.trained


class _Events:
    """What the tokens are from a character on, each until the next: `values` from the first token that starts at or
    after `chars`, or that holds any of it for those of `held`.
    """

    def __init__(self) -> None:
        self.chars: list[int] = []
        self.values: list[Value] = []
        self.held: list[int] = []
        self.known: list[tuple[int, int]] = []  # (event, its token)
        self.clean: list[int] = []  # events at which no token may reach across

    def history(self, index: int, begin: int, place: Place, why: Reason) -> None:
        """A message that is not trained."""
        chars, values, scaffold = self.chars, self.values, (index, 0.0, Reason.SCAFFOLD)
        chars.append(begin)
        values.append(scaffold)
        if place.supplied is not None:
            chars += place.supplied
            values += (index, 0.0, Reason.GENERATION_PROMPT), scaffold
        shown = index, 0.0, why
        for a, b, _ in place.fields:
            self.held.append(len(chars))
            chars += a, b
            values += shown, scaffold

    def begin(self, index: int, begin: int) -> None:
        """A trained turn up to its target."""
        self.clean.append(len(self.chars))
        self.chars.append(begin)
        self.values.append((index, 0.0, Reason.GENERATION_PROMPT))

    def target(self, turn: Turn, branch: Branch, weight: float, off: Sequence[Reason]) -> bool:
        """The target of a turn, in the trunk or in the tails; False if its spans leave a gap."""
        chars, values, index, at = self.chars, self.values, turn.index, len(turn.prompt)
        context, size, shared, cut, first, begin = branch
        if shared != size:
            at += begin - cut
            context, size = context + first - shared, first + size - shared
        self.known.append((len(chars), context))
        edge, within, switched_off = 0, False, (index, 0.0, Reason.SWITCHED_OFF)
        for a, b, why in turn.spans:
            if a != edge:
                return False
            # A token that holds any of a field is the field's, and of two fields the first one's.
            if why not in FIELDS:
                within = False
            elif not within:
                self.held.append(len(chars))
                within = True
            chars.append(at + a)
            values.append((index, weight, why) if weight and why not in off else switched_off)
            edge = b
        self.known.append((len(chars), size))
        chars.append(at + edge)
        values.append((index, 0.0, Reason.SCAFFOLD))
        return edge > 0

    def tokens(self, encoded: Encoded) -> list[int] | None:
        """The token from which on each value holds; None where tokens reach across what they may not."""
        if not self.chars:
            return []
        assert encoded.starts is not None and encoded.ends is not None
        chars = np.array(self.chars, np.int32)
        starts, ends = encoded.starts.searchsorted(chars), encoded.ends.searchsorted(chars, "right")
        if (starts < ends).any():
            return None
        at: list[int] = starts.tolist()
        over: list[int] = ends.tolist()
        if any(over[j] != at[j] for j in self.clean) or any(not at[j] == over[j] == n for j, n in self.known):
            return None
        if any(at[j - 1] >= n for j, n in self.known[1::2]):
            return None
        for j in self.held:
            at[j] = over[j]
        return at
