"""The rows of a conversation whose last prompt begins with all the others, read off in one look.

That is what most conversations are under most templates: every turn is reachable, and its prompt is a part of the last
one's, even where its answer is written otherwise once it is history. The last turn is the trunk: it is encoded, and the
history in it placed, once. A turn that is a part of the trunk may share its row; of any other only the target is new.
What the rows are, `group` and `sample` say, which ask for none of this. Whatever is not plainly so gives None.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from chatloss.fields import Located
from chatloss.lazy import LazySample, Strip, Values, first_of
from chatloss.paint import FIELDS, Value, left_out, weight_in, why_not
from chatloss.places import Place, Seen, end_in, place_in
from chatloss.policy import Policy
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Reason, Sample
from chatloss.tokens import Branch, Encoded, FastTokens, Ids

__all__ = ["straight"]

# What tokens are, from each of the first on until the next.
_Runs = tuple[list[int], list[Value]]


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

    def ids(self, k: int) -> tuple[Ids, int]:
        """The ids of a turn, less those at the beginning that are the trunk's; and how many these are."""
        _, size, shared, _, first, _ = branch = self.branches[k]
        if branch.along:
            return self.encoded.ids[size:size], size
        own, others = self.tails.ids[first : first + size - shared], self.encoded.ids[shared:]
        count = min(len(own), len(others))
        same = first_of(own[:count] != others[:count])
        return own[same:], shared + same


class _Row(NamedTuple):
    """The runs of a row whose last turn is number `base`: where each starts, and the last one ends, and its value.

    The first `begun` are those of the history as it is before the last turn, where that is known.
    """

    base: int
    starts: list[int]
    values: list[Value]
    begun: int = 0


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
    runs = _runs(trunk, rows, policy, untrained)
    if runs is None:
        return None
    outcomes = dict.fromkeys([turn.index for turn in turns], "exact")
    for row in rows[:-1]:
        outcomes.update(dict.fromkeys([turns[k].index for k in row], "split"))
    return _samples(trunk, runs, outcomes, untrained, decode)


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


def _runs(
    trunk: _Trunk, rows: Sequence[Sequence[int]], policy: Policy, untrained: Mapping[int, str]
) -> list[_Row] | None:
    """The runs of each row."""
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
        return None if whole is None else [_Row(len(trunk.turns) - 1, *whole)]
    strips: dict[int, _Runs] = {}
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
    turns: Sequence[Turn], rows: Sequence[Sequence[int]], history: Sequence[_Runs], own: Mapping[int, _Runs]
) -> list[_Row] | None:
    """The runs of each row, of which those with a single turn begin with the history. All are by message."""
    before = _joined(*_chained([*history[:-1], ([own[turns[-1].index][0][0]], [])]))
    if before is None:
        return None
    made: list[_Row] = []
    for row in rows:
        last = turns[row[-1]].index
        members = {turns[k].index for k in row}
        found = _joined(*own[last] if len(row) == 1 else _chained(
            [own[i] if i in members else history[i] for i in range(last + 1)]))
        if found is None:
            return None
        begun = bisect_left(before[0], found[0][0], hi=len(before[1])) if len(row) == 1 else 0
        made.append(_Row(row[-1], before[0][:begun] + found[0], before[1][:begun] + found[1], begun))
    return made


def _chained(strips: Sequence[_Runs]) -> _Runs:
    """Runs as one: each ends where the next one begins."""
    return (
        [token for tokens, _ in strips for token in tokens],
        [value for _, values in strips for value in values],
    )


def _joined(tokens: Sequence[int], values: Sequence[Value]) -> _Runs | None:
    """The runs that have tokens, equal ones as one, and where the last one ends; None where the tokens step back."""
    starts: list[int] = []
    kept: list[Value] = []
    held = None
    for token, following, value in zip(tokens, tokens[1:], values, strict=False):
        if token > following:
            return None
        if token < following and value != held:
            starts.append(token)
            kept.append(value)
            held = value
    if held is None:
        return None
    starts.append(tokens[-1])
    return starts, kept


def _samples(
    trunk: _Trunk, rows: Sequence[_Row], outcomes: Mapping[int, str], untrained: Mapping[int, str], decode: Decode
) -> list[Sample] | None:
    """The rows, each of what its last turn has of its own behind what it has in common with the last row."""
    last = rows[-1]
    ends: list[int] = []
    values: list[Value] = []
    parts: list[tuple[int, Ids, int, int]] = []
    # The longest history that a row begins with, and how much of that the last one has too.
    history = max(rows, key=lambda row: row.begun)
    known = _same(history, last, 0, history.begun)
    for row in rows:
        if row.starts[0] or row.values[0][1] or row.values[0][2].trained:
            return None  # nothing predicts the first token of a row
        if row is last:
            ids, shared, same = trunk.encoded.ids.copy(), 0, 0
        else:
            ids, shared = trunk.ids(row.base)
            inside = bisect_right(row.starts, shared) - 1
            same = _same(row, last, min(inside, known, row.begun), inside)
        parts.append((len(ends), ids, shared, same))
        ends += row.starts[same + 1 :]
        values += row.values[same:]
    source, all_ends, all_values = trunk.rendering.conversation.source, np.array(ends, np.int32), Values.of(values)
    told = dict(outcomes), source, dict(untrained), decode
    made: list[LazySample] = []
    for row, (at, ids, shared, same) in zip(reversed(rows), reversed(parts), strict=True):
        end = at + len(row.values) - same
        strip = Strip(row.starts[same], all_ends[at:end], all_values.part(at, end))
        made.append(LazySample.of(ids, strip, *told, (made[0], shared, same) if made else None))
    return [*reversed(made)]


def _same(row: _Row, last: _Row, same: int, most: int) -> int:
    """How many runs of a row are the last one's, of the first `most`, if the first `same` are."""
    most = min(most, len(last.values))
    while same < most and row.starts[same + 1] == last.starts[same + 1] and row.values[same] == last.values[same]:
        same += 1
    return same


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
