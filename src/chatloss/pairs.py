"""Preference rows through the encoder: two answers to one prompt, or one judged answer, each under the same law.

Only the turns behind the shared prompt are trained. A pair is kept whole or rejected with a reason: nothing is cut or
left out on one side only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from chatloss.chat import Conversation, Label, Preference
from chatloss.encode import ChatEncoder, Encoding, Problem
from chatloss.errors import DataError
from chatloss.sample import Reason, Sample, Span

__all__ = ["Answer", "Judged", "Pair", "answer_of", "answers_of", "examine_judged", "examine_pair", "judged",
           "mismatched", "pair_of", "prompt_ids", "sides"]


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The rows of one answer to a prompt (more than one if its turns cannot share a row), judged or one of a pair.

    `desirable` is the judgement of an unpaired answer, None in a pair. `reference` is the log-probability of its
    trained tokens under the reference model (nats, summed), None if it is not known.
    """

    rows: tuple[Sample, ...]
    desirable: bool | None = None
    reference: float | None = None

    @property
    def source(self) -> str:
        return self.rows[0].source

    @property
    def n_trained(self) -> int:
        return sum(row.n_trained for row in self.rows)


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """A preferred and a dispreferred answer to the same prompt ids. `source` is ``file:row``."""

    chosen: Answer
    rejected: Answer
    source: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """An answer with its judgement, and another answer behind the same prompt, for KTO's estimate of the KL divergence.

    The other answer is that of the next example of the data, whatever it was an answer to.
    """

    answer: Answer
    mismatched: Answer

    @property
    def source(self) -> str:
        return self.answer.source


def mismatched(answers: Sequence[Answer]) -> list[Judged]:
    """Every answer with the next one (the last: with the first) behind its prompt.

    Raises `DataError` for fewer than two answers: an answer behind its own prompt is no estimate of anything.
    """
    if len(answers) < 2:
        raise DataError("KTO needs at least two answers", hint="its baseline puts answers behind each other's prompts")
    return [Judged(answer, _behind(prompt_ids(answer.rows), answers[(i + 1) % len(answers)]))
            for i, answer in enumerate(answers)]


def _behind(prompt: npt.NDArray[np.int32], other: Answer) -> Answer:
    """The trained tokens of `other` behind a prompt's ids."""
    ids = [row.input_ids[row.weights != 0] for row in other.rows]
    weights = [row.weights[row.weights != 0] for row in other.rows]
    row = Sample(np.concatenate([prompt, *ids]), _spans(len(prompt), np.concatenate(weights)), {}, other.source)
    return Answer((row,))


def _spans(prompt: int, weights: npt.NDArray[np.float32]) -> tuple[Span, ...]:
    """Spans of a prompt of `prompt` tokens and of the tokens behind it, which have these weights."""
    edges = [0, *(np.flatnonzero(np.diff(weights)) + 1).tolist(), len(weights)]
    answer = (Span(prompt + a, prompt + b, 1, float(weights[a]), Reason.CONTENT) for a, b in pairwise(edges))
    return (*([Span(0, prompt, 0, 0.0, Reason.OTHER_ROLE)] if prompt else []), *answer)


def sides(preference: Preference) -> tuple[Conversation, Conversation]:
    """Both conversations, with everything in the prompt switched off, and a source that tells which side it is.

    >>> chats = [Conversation.from_messages([{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": a}])
    ...          for a in ("4", "5")]
    >>> [side.source for side in sides(Preference(chats[0].messages[:1], *chats, source="pairs.jsonl:1"))]
    ['pairs.jsonl:1 chosen', 'pairs.jsonl:1 rejected']
    """
    n = len(preference.prompt)
    chosen, rejected = (
        _only_trained_from(n, replace(chat, source=f"{preference.source} {side}".strip()))
        for side, chat in (("chosen", preference.chosen), ("rejected", preference.rejected))
    )
    return chosen, rejected


def judged(label: Label) -> Conversation:
    """The conversation of an unpaired row with everything before its last message, which is judged, switched off."""
    return _only_trained_from(len(label.conversation.messages) - 1, label.conversation)


def _only_trained_from(n: int, chat: Conversation) -> Conversation:
    prompt = (message if message.train is False else replace(message, train=False) for message in chat.messages[:n])
    return replace(chat, messages=(*prompt, *chat.messages[n:]))


def examine_pair(encoder: ChatEncoder, preference: Preference) -> tuple[Encoding, Encoding]:
    """Both answers encoded. What they lack as a pair is told by a fatal problem of one of them.

    These are, beside what each answer has by itself: ``lost_answer`` (an answer, or a turn of one, is not trained),
    ``too_long`` (`max_length` cuts an answer; see below), ``other_prompt`` (different ids before the first trained
    token) and ``tie`` (the trained tokens are the same).

    `overflow` is applied to the pair: "right" cuts both answers at the same length and keeps what still differs,
    "window" takes the same messages out of both, "drop" gives a pair without rows (not a reject), and with
    "whole_turns" or "error" a pair that is too long is a reject. Never raises for what a policy decides.
    """
    chats, overflow = sides(preference), encoder.policy.overflow
    if overflow == "window":
        encoder = _dropping(encoder)
    both = [encoder.examine(chat) for chat in chats]
    if any(_is_cut(encoding) for encoding in both):
        if overflow == "drop":
            return replace(both[0], rows=[]), replace(both[1], rows=[])
        if overflow == "window":
            both = _windowed(encoder, chats, len(preference.prompt)) or both
    chosen, rejected = both
    found = next(_pair_problems(both, len(preference.prompt), cut=overflow == "right"), None)
    if found is not None and found[0] is chosen:
        chosen = replace(chosen, problems=(*chosen.problems, found[1]))
    elif found is not None:
        rejected = replace(rejected, problems=(*rejected.problems, found[1]))
    return chosen, rejected


def pair_of(encoder: ChatEncoder, preference: Preference) -> Pair | None:
    """The pair, or None if the policy drops it; raises `DataError` with a reason for all else that is no pair."""
    both = examine_pair(encoder, preference)
    for encoding, side in zip(both, ("chosen", "rejected"), strict=True):
        _raise_fatal(encoding, f"{preference.source} {side}".strip())
    if not any(encoding.rows for encoding in both):
        return None
    return Pair(Answer(tuple(both[0].rows)), Answer(tuple(both[1].rows)), preference.source)


def examine_judged(encoder: ChatEncoder, label: Label) -> Encoding:
    """The judged answer (the last message) of an unpaired row. A fatal problem tells that it is lost, as in a pair."""
    chat, overflow = judged(label), encoder.policy.overflow
    encoding = encoder.examine(chat)
    if _is_cut(encoding) and overflow == "drop":
        return replace(encoding, rows=[])
    lost = next(_lost(encoding, len(chat.messages) - 1, cut=overflow == "right"), None)
    return encoding if lost is None else replace(encoding, problems=(*encoding.problems, lost))


def answer_of(encoder: ChatEncoder, label: Label) -> Answer | None:
    """The judged answer of an unpaired row, or None if the policy drops it; raises `DataError`."""
    encoding = examine_judged(encoder, label)
    _raise_fatal(encoding, label.source)
    return Answer(tuple(encoding.rows), label.desirable) if encoding.rows else None


def answers_of(encoder: ChatEncoder, row: Preference | Label) -> list[Answer]:
    """Judged answers: that of an unpaired row, or both of a pair (chosen: desirable, rejected: undesirable)."""
    if isinstance(row, Label):
        answer = answer_of(encoder, row)
        return [] if answer is None else [answer]
    pair = pair_of(encoder, row)
    return [] if pair is None else [replace(pair.chosen, desirable=True), replace(pair.rejected, desirable=False)]


def prompt_ids(rows: Sequence[Sample]) -> npt.NDArray[np.int32]:
    """The ids before the first trained token of an answer: its row's whose first trained turn comes first."""
    first = min(rows, key=lambda row: min(span.message for span in row.spans if span.weight))
    return first.input_ids[: int(np.flatnonzero(first.weights)[0])]


def _raise_fatal(encoding: Encoding, source: str) -> None:
    for problem in encoding.problems:
        if problem.fatal:
            raise problem.error(source)


def _is_cut(encoding: Encoding) -> bool:
    return "truncated" in encoding.untrained.values() or any(p.cause == "too_long" for p in encoding.problems)


def _pair_problems(both: Sequence[Encoding], size: int, cut: bool) -> Iterator[tuple[Encoding, Problem]]:
    """What keeps two encodings from being a pair, each with the one that it concerns."""
    for encoding in both:
        yield from ((encoding, problem) for problem in _lost(encoding, size, cut))
    chosen, rejected = both
    if not np.array_equal(prompt_ids(chosen.rows), prompt_ids(rejected.rows)):
        what = "the ids before the first trained token differ between the answers"
        yield rejected, Problem("other_prompt", size, what, "mend the pair; look with `chatloss view`", True)
    if _trained(chosen) == _trained(rejected):
        remedy = "a longer --max-length" if cut else "drop the pair: it prefers nothing"
        yield rejected, Problem("tie", size, "the trained tokens of both answers are the same", remedy, True)


def _lost(encoding: Encoding, size: int, cut: bool) -> Iterator[Problem]:
    """Why an encoding does not hold its answer (messages[size:]) whole; `cut`: cutting it is what the user wants."""
    for message, why in sorted(encoding.untrained.items()):
        if message < size or why == "switched_off" or (why == "truncated" and cut):
            continue
        if why == "truncated":
            yield Problem("too_long", message, "max_length cuts this answer",
                          "a longer --max-length, or --overflow drop|right|window", True)
        else:
            yield Problem("lost_answer", message, f"this turn of the answer is not trained: {why}",
                          "drop the pair, or settle the turn with its own flag", True)
    if not any(row.n_trained for row in encoding.rows):
        cause = "too_long" if _is_cut(encoding) else "lost_answer"
        yield Problem(cause, size, "nothing of this answer is trained",
                      "a longer --max-length" if cause == "too_long" else "drop the pair", True)


def _trained(encoding: Encoding) -> list[list[int]]:
    return [row.input_ids[row.weights != 0].tolist() for row in encoding.rows]


@lru_cache(maxsize=4)
def _dropping(encoder: ChatEncoder) -> ChatEncoder:
    """The encoder with another policy for rows that are too long; kept, since a new one probes its template again."""
    return replace(encoder, policy=replace(encoder.policy, overflow="drop"))


def _windowed(encoder: ChatEncoder, chats: Sequence[Conversation], size: int) -> list[Encoding] | None:
    """Both sides without the oldest messages of their prompt, the same ones, so that both fit; None if none do."""
    messages = chats[0].messages
    head = [i for i in range(min(2, size)) if messages[i].role in ("system", "developer")][:1]
    for start in (i for i in range(len(head) + 1, size) if messages[i].role == "user"):
        both = []
        for chat in chats:
            kept = [*head, *range(start, len(chat.messages))]
            shorter = replace(chat, messages=tuple(chat.messages[i] for i in kept))
            both.append(_renumbered(encoder.examine(shorter), kept))
        if not any(_is_cut(encoding) for encoding in both):
            return both
    return None


_INDEX = re.compile(r"messages\[(\d+)\]")  # as details name messages


def _renumbered(encoding: Encoding, kept: Sequence[int]) -> Encoding:
    """The encoding with the message indices of the whole conversation."""

    def index(found: re.Match[str]) -> str:
        i = int(found[1])
        return f"messages[{kept[i]}]" if i < len(kept) else found[0]

    outcomes = {kept[i]: outcome for i, outcome in encoding.outcomes.items()}
    untrained = {kept[i]: why for i, why in encoding.untrained.items()}
    rows = [
        replace(row, outcomes=outcomes, untrained=untrained, spans=tuple(
            span._replace(message=kept[span.message] if span.message >= 0 else -1) for span in row.spans))
        for row in encoding.rows
    ]
    problems = tuple(
        replace(p, message=kept[p.message] if p.message >= 0 else -1, detail=_INDEX.sub(index, p.detail))
        for p in encoding.problems
    )
    return Encoding(rows, outcomes, untrained, problems, encoding.turns)
