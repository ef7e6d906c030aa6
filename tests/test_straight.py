"""Rows read off in one look against rows painted one by one, over generated chats, real ones, and many templates."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatloss import encode, straight
from chatloss.chat import Conversation
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import DataError
from chatloss.fast_tokens import FlatTokens, loaded_with
from chatloss.load import load_tokenizer
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.sample import Sample
from tests import assets
from tests.conformance import SHAPES
from tests.stored import stored, whole
from tests.test_encode_property import messages

POLICIES = (
    Policy(control_tokens="parity"),
    Policy(off_prompt="keep", altered="keep", unrenderable="drop", roles=("assistant", "user")),
    Policy(turns="last_round", parts=("content",), max_length=60, control_tokens="parity", missing_stop="leave"),
    Policy(row_format="per_turn", roles=("assistant", "tool"), control_tokens="parity"),
    Policy(row_format="multi_turn", max_length=90, control_tokens="parity"),
)
# Under these templates an answer is written otherwise once it is history.
REWRITING = ("qwen3", "gpt-oss")


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


def differences(by: ChatEncoder, chat: Conversation, taken: Counter[int]) -> list[str]:
    """What differs between the two ways; `taken` counts how often the short one made how many rows, or 0."""
    real = encode.straight

    def counted(*args: Any) -> Any:
        rows = real(*args)
        taken[len(rows or ())] += 1
        for row in rows or ():  # its spans are not looked at again where they are made
            Sample(row.input_ids, row.spans)
        return rows

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
    found += [] if stored(short.rows) == stored(whole(short.rows)) else ["stored"]
    for a, b in zip(short.rows, long.rows, strict=True):
        found += _unequal(a, b, "spans", "outcomes", "untrained", "source")
        found += [] if np.array_equal(a.input_ids, b.input_ids) else ["input_ids"]
    return found


def _unequal(a: Any, b: Any, *names: str) -> list[str]:
    return [name for name in names if getattr(a, name) != getattr(b, name)]


@pytest.mark.parametrize("name", ["demo", "llama3", "qwen2.5", "mistral-v3", *REWRITING])
def test_generated_chats_get_the_same_rows_in_one_look(name: str) -> None:
    taken: Counter[int] = Counter()

    @settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(messages(), st.sampled_from(POLICIES))
    def check(chat: list[dict[str, Any]], policy: Policy) -> None:
        assert not differences(encoder(name, policy), Conversation.from_messages(chat), taken)

    check()
    assert taken[1] > 3 or name == "mistral-v3", taken
    assert sum(count for rows, count in taken.items() if rows > 1) > 3 or name not in REWRITING, taken


@cache
def fast_encoder(name: str) -> ChatEncoder:
    return ChatEncoder.load(loaded_with(tokens(name), "auto"))


def rounds(size: int, reasoning: bool = False) -> list[dict[str, Any]]:
    thought = {"reasoning_content": "Somebody asks, so I answer."} if reasoning else {}
    return [{"role": ("user", "assistant")[i % 2], "content": f"Round {i}, naïve.", **(thought if i % 2 else {})}
            for i in range(size)]


@pytest.mark.parametrize("name", REWRITING)
def test_rows_of_their_own_are_read_off_in_one_look(name: str) -> None:
    """So are those of each length, with thoughts that history drops, and one of which weighs less."""
    for by in (encoder(name, Policy()), fast_encoder(name)):
        for size in (4, 5, 20):
            taken: Counter[int] = Counter()
            chats = [rounds(size), rounds(size, True), rounds(size)]
            chats[2][3] |= {"weight": 0.5}
            chats[2][1] |= {"content": "I think so. " * 30}  # the first row is the longest
            for chat in chats:
                assert not differences(by, Conversation.from_messages(chat), taken)
            assert taken == {size // 2: 3}


def test_a_history_is_placed_and_encoded_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work grows with the length of a chat, not with that times the number of its rows."""
    looked: Counter[str] = Counter()

    def counted(name: str, size: Any) -> None:
        owner, one = (FlatTokens, FlatTokens._flat) if name == "encoded" else (straight, getattr(straight, name))

        def call(*args: Any, **kwargs: Any) -> Any:
            looked[name] += size(*args)
            return one(*args, **kwargs)

        monkeypatch.setattr(owner, one.__name__, call)

    by = fast_encoder("qwen3")
    by.examine(Conversation.from_messages(rounds(2)))
    counted("encoded", lambda _, texts: sum(map(len, texts)))
    counted("end_in", lambda *_: 1)
    counted("place_in", lambda *_: 1)
    counted("_joined", lambda tokens, _: len(tokens))
    found = []
    for size in (40, 80):
        looked.clear()
        rows = by.examine(Conversation.from_messages(rounds(size))).rows
        assert len(rows) == size // 2
        found.append(looked.copy())
    assert all(found[1][name] < 2.2 * found[0][name] for name in found[0]), found
    assert set(found[0]) == {"encoded", "end_in", "place_in", "_joined"}


def test_other_templates_with_other_tokenizers_get_the_same_rows_in_one_look() -> None:
    """Also where tokens reach across what one template writes and what another tokenizer cuts."""
    taken: Counter[int] = Counter()
    names = sorted(assets.templates())
    for k, name in enumerate(names[::25]):
        other = tokens(("llama3", "qwen2.5", "mistral-v3")[k % 3])
        made = ChatEncoder.load(other, assets.template(name), POLICIES[k % 3])
        for shown, tools in SHAPES.values():
            found = differences(made, Conversation.from_messages(shown, tools), taken)
            assert not found, (name, found)
    assert taken[1] > 5, taken


def test_most_chats_of_a_template_that_rewrites_nothing_take_the_short_way() -> None:
    taken: Counter[int] = Counter()
    for row in [*read(str(chats_file()))][::9]:
        if isinstance(row, Conversation):
            assert not differences(encoder("llama3", Policy()), row, taken)
    assert taken[1] > 3 * taken[0]
