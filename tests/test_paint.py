"""Rows painted by runs against arrays painted token by token, and the shared history against one that is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest

from chatloss.chat import Conversation
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.fields import common_prefix
from chatloss.paint import Painting
from chatloss.places import Places
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.sample import Reason, Sample


@pytest.mark.parametrize("seed", range(40))
def test_runs_painted_over_are_the_tokens_painted_over(seed: int) -> None:
    chance, size = random.Random(seed), 24
    painting = Painting()
    message, weight, reason = np.full(size, -1), np.zeros(size), np.full(size, Reason.SCAFFOLD)
    for step in range(30):
        first, last = chance.randrange(size), chance.randrange(size + 1)
        which, heavy, why = (chance.choice(given) for given in ([None, 0, 1], [None, 0.0, 0.5], [None, *Reason][:4]))
        painting.paint(first, last, message=which, weight=heavy, reason=why)
        for array, value in ((message, which), (weight, heavy), (reason, why)):
            if value is not None:
                array[first:last] = value
        if step % 7 == 3:
            painting = painting.copy()
        if step % 7 == 5:
            painting.switch_off(first, last)
            reason[first:last][weight[first:last] == 0] = Reason.SWITCHED_OFF
    painting.leave_first()
    weight[0], reason[0] = 0, Reason.SCAFFOLD if Reason(reason[0]).trained else reason[0]
    length = chance.randrange(size + 1)
    made = Sample(np.zeros(length, np.int32), painting.spans(length))
    assert (made.messages == message[:length]).all() and (made.weights == weight[:length]).all()
    assert (made.reasons == reason[:length]).all()
    values = [(s.message, s.weight, s.reason) for s in made.spans]
    assert all(a != b for a, b in pairwise(values)), "neighbours that are equal are one span"


def test_a_copy_is_not_painted_over_with_the_original() -> None:
    painting = Painting()
    painting.paint(0, 4, message=0)
    copy = painting.copy()
    painting.paint(2, 6, message=1)
    assert [(s.start, s.end, s.message) for s in copy.spans(5)] == [(0, 4, 0), (4, 5, -1)]


def _conversations() -> Iterator[Conversation]:
    yield from (row for row in read(str(chats_file())) if isinstance(row, Conversation))
    thought = "A thought that history drops, and somebody quotes later."
    turns = [("user", "Hello there, my friend", None), ("assistant", "The first of the answers", thought),
             ("user", "And now the second of them", None), ("assistant", "The second of the answers", thought * 2),
             ("user", f"You said: {thought} The first of the answers", None), ("assistant", "Did I?", None)]
    yield Conversation.from_messages([
        {"role": role, "content": text, **({"reasoning_content": why} if why else {})} for role, text, why in turns
    ])


@pytest.mark.parametrize("template", ["chat_template", "chat_template_rewrites"])
def test_places_known_from_the_row_before_are_those_found_afresh(template: str) -> None:
    policy = Policy(off_prompt="keep", altered="keep", control_tokens="parity")
    encoder = ChatEncoder.load(tokenizer_directory(), tokenizer_directory() / f"{template}.jinja", policy)
    reused = 0
    for conversation in _conversations():
        rendering = encoder.rendering(conversation)
        turns = [rendering.turn(i) for i, m in enumerate(conversation.messages) if m.role == "assistant"]
        shared = Places(rendering)
        for turn in [*turns, *turns[::-1]]:
            text = turn.prompt + turn.target
            found, kept = shared.of(turn, text)
            assert found == Places(rendering).of(turn, text)[0]
            reused += kept
    assert reused


def test_weights_are_those_that_a_row_can_hold() -> None:
    encoder = ChatEncoder.load(tokenizer_directory())
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 0.1}]
    [row] = encoder.encode(messages)
    assert {span.weight for span in row.spans} == {0.0, float(np.float32(0.1))}


def test_texts_have_in_common_what_they_begin_with() -> None:
    for a, b, size in (("", "", 0), ("abc", "", 0), ("abc", "abd", 2), ("abc", "abcd", 3), ("xbc", "abc", 0)):
        assert common_prefix(a, b) == common_prefix(b, a) == size
