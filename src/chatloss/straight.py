"""The row of a conversation that only ever goes on: where every token stands follows from the lengths of renderings.

That is what most conversations are under most templates: each rendering begins with the one before, every turn is
reachable, and all of them share one row. What the row is, `group` and `sample` say, which ask for none of this; here
it is read off in one look. Whatever is not plainly so gives None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chatloss.fields import Located, Missing, locate, present
from chatloss.paint import FIELDS, Value, weight_of, why_not
from chatloss.policy import Policy
from chatloss.reference import Rendering, Turn
from chatloss.sample import Decode, Reason, Sample, Span
from chatloss.tokens import FastTokens

__all__ = ["straight"]


def straight(
    rendering: Rendering, turns: Sequence[Turn], policy: Policy, untrained: Mapping[int, str], tokens: FastTokens,
    decode: Decode,
) -> Sample | None:
    """The one row of all `turns`, or None."""
    conversation = rendering.conversation
    ends = _ends(rendering, turns)
    if ends is None or policy.spans or (policy.row_format == "per_turn" and len(turns) > 1):
        return None
    base, prompt = turns[-1], turns[-1].prompt
    encoded, context = tokens.encode_pair(prompt, base.target)
    size = len(encoded.ids)
    if context is None or (policy.max_length and size > policy.max_length):
        return None
    events = _Events()
    trained = {turn.index: turn for turn in turns}
    for i, (start, end) in enumerate(zip(ends, [*ends[1:], len(prompt)], strict=True)):
        message, turn = conversation.messages[i], trained.get(i)
        if turn is None:
            before = rendering.prompt(i) if message.role == "assistant" else None
            if before is not None and len(before) > len(prompt):
                return None
            supplied = len(before) if before is not None and prompt.startswith(before) else 0
            why = why_not(message, i, untrained, policy)
            events.history(i, start, supplied, _shown(rendering, prompt, i, start, end), why)
            continue
        at = len(turn.prompt)
        stop = at + len(turn.target)
        known = (context, size) if turn is base else tokens.count(encoded, prompt, at, stop)
        # A call may be spelled in several ways, of which history need not show the same first.
        if message.tool_calls and any(b > stop for _, b, _ in _shown(rendering, prompt, i, start, end)):
            return None
        weighed = [(a, b, why, weight_of(why, message, policy)) for a, b, why in turn.spans]
        if known is None or not events.target(i, start, at, weighed, known):
            return None
    spans = events.spans(*encoded.tokens_at(events.chars))
    if spans is None:
        return None
    outcomes = {turn.index: "exact" for turn in turns}
    return Sample(encoded.ids.copy(), spans, outcomes, conversation.source, dict(untrained), decode)


def _ends(rendering: Rendering, turns: Sequence[Turn]) -> list[int] | None:
    """Where the messages through the last turn begin, if each rendering begins with the one before."""
    if not turns or turns[0].index == 0 or rendering.conversation.messages[0].role == "assistant":
        return None  # what is rendered before the first message is somebody else's
    if any(turn.outcome != "reachable" or turn.stop != "rendered" for turn in turns):
        return None
    prompt, ends = turns[-1].prompt, [0]
    for count in range(1, turns[-1].index + 1):
        text = rendering.text(count)
        if text is None or len(text) < ends[-1] or not prompt.startswith(text):
            return None
        ends.append(len(text))
    return ends


def _shown(rendering: Rendering, prompt: str, index: int, start: int, end: int) -> Located:
    """The fields of a message in history."""
    found = locate(prompt, rendering.fields[index], start, end)
    return present(prompt, rendering.fields[index], start, end) if isinstance(found, Missing) else found


class _Events:
    """What the tokens are from a character on, each until the next: `values` from the first token that starts at or
    after `chars`, or that holds any of it where `holds`.
    """

    def __init__(self) -> None:
        self.chars: list[int] = []
        self.holds: list[bool] = []
        self.values: list[Value] = []
        self.known: list[tuple[int, int]] = []  # (event, its token)
        self.clean: list[int] = []  # events at which no token may reach across

    def add(self, char: int, value: Value, holds: bool = False) -> None:
        self.chars.append(char)
        self.values.append(value)
        self.holds.append(holds)

    def history(self, index: int, start: int, supplied: int, found: Located, why: Reason) -> None:
        """A message that is not trained."""
        scaffold = index, 0.0, Reason.SCAFFOLD
        if supplied > start:
            self.add(start, (index, 0.0, Reason.GENERATION_PROMPT))
        self.add(max(start, supplied), scaffold)
        for a, b, _ in found:
            self.add(a, (index, 0.0, why), True)
            self.add(b, scaffold)

    def target(
        self, index: int, start: int, at: int, spans: Sequence[tuple[int, int, Reason, float]], known: tuple[int, int]
    ) -> bool:
        """A trained turn, whose target begins `at` and has the tokens `known`; False if its spans leave a gap."""
        self.clean.append(len(self.chars))
        self.add(start, (index, 0.0, Reason.GENERATION_PROMPT))
        self.known.append((len(self.chars), known[0]))
        edge, within = 0, False
        for a, b, why, weight in spans:
            if a != edge:
                return False
            field = why in FIELDS
            # A token that holds any of a field is the field's, and of two fields the first one's.
            self.add(at + a, (index, weight, why if weight else Reason.SWITCHED_OFF), field and not within)
            edge, within = b, field
        self.known.append((len(self.chars), known[1]))
        self.add(at + edge, (index, 0.0, Reason.SCAFFOLD))
        return start <= at and edge > 0

    def spans(self, at: list[int], over: list[int]) -> tuple[Span, ...] | None:
        """The spans; `at` and `over` say of `chars` which tokens start there and hold that."""
        if any(over[j] != at[j] for j in self.clean) or any(not at[j] == over[j] == n for j, n in self.known):
            return None
        if any(at[j - 1] >= n for j, n in self.known[1::2]) or any(a < b for a, b in zip(at, over, strict=True)):
            return None
        tokens = [b if holds else a for a, b, holds in zip(at, over, self.holds, strict=True)]
        starts: list[int] = []
        values: list[Value] = []
        for token, following, value in zip(tokens, tokens[1:], self.values, strict=False):
            if token > following:
                return None
            if token < following and (not values or values[-1] != value):
                starts.append(token)
                values.append(value)
        if not starts or starts[0] or values[0][1] or values[0][2].trained:
            return None
        ends = [*starts[1:], tokens[-1]]
        return tuple([Span(a, b, *value) for a, b, value in zip(starts, ends, values, strict=True)])
