"""Conversations one after the other, those of known shapes encoded many at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from chatloss.chat import Conversation
from chatloss.encoding import Encoding, Problem
from chatloss.errors import ChatlossError
from chatloss.plans.plans import Planned, RowPlans, same_encodings
from chatloss.reference import Rendering
from chatloss.sample import Sample
from chatloss.template import ChatTemplate

__all__ = ["AHEAD", "each"]

AHEAD, AHEAD_TOKENS = 64, 2**16  # so many conversations are taken ahead, until they have so many tokens

Made = tuple[Conversation, Encoding | ChatlossError]


class Usual(Protocol):
    """What `ChatEncoder` does without plans."""

    @property
    def template(self) -> ChatTemplate: ...

    def control_problems(self, conversation: Conversation) -> list[Problem]: ...

    def rendering(self, conversation: Conversation) -> Rendering: ...

    def usual(
        self, conversation: Conversation, problems: list[Problem], rendering: Rendering | None = None
    ) -> Encoding: ...


def each(encoder: Usual, plans: RowPlans, conversations: Iterable[Conversation]) -> Iterator[Made]:
    """Every conversation with its encoding, or with the error that it raised; without turns."""
    waiting: list[tuple[Conversation, Planned | Encoding | ChatlossError]] = []
    held = 0
    for conversation in conversations:
        begun = _begun(encoder, plans, conversation)
        waiting.append((conversation, begun))
        if isinstance(begun, Planned):
            held += sum([len(draft.text) for draft in begun.drafts]) // 4
        elif isinstance(begun, Encoding):
            held += sum(map(len, begun.rows))
        else:
            held = AHEAD_TOKENS + 1  # an error holds what the template held when it was raised
        if len(waiting) == AHEAD or held > AHEAD_TOKENS:
            yield from _done(encoder, plans, waiting)
            waiting, held = [], 0
    yield from _done(encoder, plans, waiting)


def _begun(encoder: Usual, plans: RowPlans, conversation: Conversation) -> Planned | Encoding | ChatlossError:
    try:
        problems = encoder.control_problems(conversation)
        if problems:
            return _without_turns(encoder.usual(conversation, problems))
        rendering = encoder.rendering(conversation)
        recall = partial(encoder.template.recall, rendering.messages, conversation.tools, **rendering.kwargs)
        recorded = recall()
        known = recorded and plans.known(*recorded, rendering)
        if isinstance(known, Planned):
            return known
        if known is None:
            encoding = encoder.usual(conversation, [], rendering)
            if recorded is None and (recorded := recall()) is not None:
                known = plans.known(*recorded, rendering)
                if isinstance(known, tuple):
                    plans.learn(*known, rendering, encoding)  # it has been recorded just now
            return _without_turns(encoding)
        planned = plans.begun(*known, rendering)
        if isinstance(planned, Planned):
            return planned
        if planned is not None and not planned[1]:
            return planned[0]
        encoding = encoder.usual(conversation, [], rendering)
        if planned is None:
            plans.learn(*known, rendering, encoding)
        elif not same_encodings(planned[0], encoding):
            raise _different(conversation)
        return _without_turns(encoding)
    except ChatlossError as error:
        return error


def _without_turns(encoding: Encoding) -> Encoding:
    """What may wait: a turn holds all that is before it."""
    return replace(encoding, turns=())


def _done(
    encoder: Usual, plans: RowPlans, waiting: Sequence[tuple[Conversation, Planned | Encoding | ChatlossError]]
) -> Iterator[Made]:
    found = iter(plans.rows([one for _, one in waiting if isinstance(one, Planned)]))
    for conversation, one in waiting:
        yield conversation, _finished(encoder, plans, one, next(found)) if isinstance(one, Planned) else one


def _finished(
    encoder: Usual, plans: RowPlans, begun: Planned, found: tuple[list[Sample], bool] | None
) -> Encoding | ChatlossError:
    """The rows by plan; now and then compared with those made as ever, which they are where the plan gives none."""
    planned, compared = None, True
    if found is not None:
        rows, compared = found
        planned = Encoding(rows, rows[-1].outcomes, rows[-1].untrained, begun.plan.problems)
    if planned is not None and not compared:
        return planned
    conversation = begun.rendering.conversation
    try:
        encoding = encoder.usual(conversation, [], begun.rendering)
    except ChatlossError as error:
        return error
    if planned is not None and not same_encodings(planned, encoding):
        return _different(conversation)
    if planned is None and not begun.spaced:
        plans.learn(begun.recording, begun.texts, begun.rendering, encoding)
    return _without_turns(encoding)


def _different(conversation: Conversation) -> ChatlossError:
    return ChatlossError("rows by shape differ from rows by reference", where=conversation.source,
                         hint="--no-trace, and please report this template", kind="trace")
