"""Rows read off in one look against rows painted, over generated chats, real ones, and many templates."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatloss import encode
from chatloss.chat import Conversation
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import DataError
from chatloss.load import load_tokenizer
from chatloss.policy import Policy
from chatloss.reader import read
from tests import assets
from tests.conformance import SHAPES
from tests.test_encode_property import messages

POLICIES = (
    Policy(control_tokens="parity"),
    Policy(off_prompt="keep", altered="keep", unrenderable="drop", roles=("assistant", "user")),
    Policy(turns="last_round", parts=("content",), max_length=60, control_tokens="parity", missing_stop="leave"),
)


@cache
def tokens(name: str) -> Any:
    return load_tokenizer(tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name))


@cache
def encoder(name: str, policy: Policy) -> ChatEncoder:
    return ChatEncoder.load(tokens(name), policy=policy)


def examined(by: ChatEncoder, chat: Conversation) -> Encoding | str:
    try:
        return by.examine(chat)
    except DataError as error:
        return str(error)


def differences(by: ChatEncoder, chat: Conversation, taken: Counter[bool]) -> list[str]:
    """What differs between the two ways; `taken` counts how often the short one was."""
    real = encode.straight

    def counted(*args: Any) -> Any:
        row = real(*args)
        taken[row is not None] += 1
        return row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "straight", counted)
        short = examined(by, chat)
        patch.setattr(encode, "straight", lambda *_: None)
        long = examined(by, chat)
    if isinstance(short, str) or isinstance(long, str):
        return [] if short == long else [f"{short} {long}"]
    found = _unequal(short, long, "outcomes", "untrained", "problems", "turns")
    if len(short.rows) != len(long.rows):
        return [*found, "rows"]
    for a, b in zip(short.rows, long.rows, strict=True):
        found += _unequal(a, b, "spans", "outcomes", "untrained", "source")
        found += [] if np.array_equal(a.input_ids, b.input_ids) else ["input_ids"]
    return found


def _unequal(a: Any, b: Any, *names: str) -> list[str]:
    return [name for name in names if getattr(a, name) != getattr(b, name)]


@pytest.mark.parametrize("name", ["demo", "llama3", "qwen2.5", "mistral-v3"])
def test_generated_chats_get_the_same_rows_in_one_look(name: str) -> None:
    taken: Counter[bool] = Counter()

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(messages(), st.sampled_from(POLICIES))
    def check(chat: list[dict[str, Any]], policy: Policy) -> None:
        assert not differences(encoder(name, policy), Conversation.from_messages(chat), taken)

    check()
    assert taken[True] > 3 or name == "mistral-v3", taken


def test_other_templates_with_other_tokenizers_get_the_same_rows_in_one_look() -> None:
    """Also where tokens reach across what one template writes and what another tokenizer cuts."""
    taken: Counter[bool] = Counter()
    names = sorted(assets.templates())
    for k, name in enumerate(names[::25]):
        other = tokens(("llama3", "qwen2.5", "mistral-v3")[k % 3])
        made = ChatEncoder.load(other, assets.template(name), POLICIES[k % 3])
        for shown, tools in SHAPES.values():
            found = differences(made, Conversation.from_messages(shown, tools), taken)
            assert not found, (name, found)
    assert taken[True] > 5, taken


def test_most_chats_of_a_template_that_rewrites_nothing_take_the_short_way() -> None:
    taken: Counter[bool] = Counter()
    for row in [*read(str(chats_file()))][::9]:
        if isinstance(row, Conversation):
            assert not differences(encoder("llama3", Policy()), row, taken)
    assert taken[True] > 3 * taken[False]
