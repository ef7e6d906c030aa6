"""Generated conversations through every tokenizer family: the oracle holds, and only what is refused is raised."""

from __future__ import annotations

import json
import logging
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import DataError
from chatloss.load import load_tokenizer
from chatloss.policy import Policy
from tests import assets, conformance
from tests.oracle import violations

CLOCK = datetime(2026, 1, 2, 3, 4, 5)
EXAMPLES = 60

PIECES = [
    "", " ", "\n", "\n\n", "\t", "\r\n", "a", "It", "4", " foo", "foo ", "\nfoo", "Paris", "naïve", "e\u0301", "ﬁ",
    "你好", "🙂", "👩\u200d👩\u200d👧", "שלום", "مرحبا", "\u202e", "\u00a0", "{{ x }}", "{% if %}", "assistant", "user",
    "<think>", "</think>", "<think>\nwhy\n</think>\n\n", "<tool_call>", "### Response:", "[INST]",
    "```py\nx = 1\n```", '"quoted" \\ back', "▁", "Ġ", "\ufffd", "0001", "</s>", "<|im_end|>",
]
texts = st.one_of(
    st.lists(st.sampled_from(PIECES), max_size=4).map("".join),
    st.text(max_size=12).filter(lambda text: "\x00" not in text),
)
arguments = st.dictionaries(
    st.sampled_from(["word", "n", "nested"]),
    st.one_of(texts, st.integers(-9, 9**9), st.booleans(), st.none(), st.lists(texts, max_size=2)), max_size=3,
)


# Stands in what others say and never in an answer: no trained token may hold it.
OTHERS = "Zqx"


def contents(text: st.SearchStrategy[str] = texts) -> st.SearchStrategy[Any]:
    """Mostly a string, now and then typed parts."""
    typed = st.lists(text.map(lambda part: {"type": "text", "text": part}), min_size=1, max_size=2)
    return st.integers(0, 11).flatmap(lambda n: typed if n == 0 else text)


said = contents(st.one_of(texts, texts.map(lambda text: f"{text}{OTHERS}{text}")))


@st.composite
def answers(draw: st.DrawFn, calls: bool) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": draw(contents())}
    if draw(st.integers(0, 3)) == 0:
        answer[draw(st.sampled_from(["reasoning_content", "thinking", "reasoning"]))] = draw(texts)
    if calls:
        answer["content"] = draw(st.one_of(st.none(), st.just(""), texts))
        made = []
        for i in range(draw(st.integers(1, 2))):
            given_arguments = draw(arguments)
            shown = json.dumps(given_arguments) if draw(st.integers(0, 4)) == 0 else given_arguments
            function = {"name": draw(st.sampled_from(["lookup", "search"])), "arguments": shown}
            made.append({"id": f"call{i:05}", "type": "function", "function": function})
        answer["tool_calls"] = made
    return answer


@st.composite
def messages(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Mostly well-formed chats; now and then the roles come in any order."""
    chat: list[dict[str, Any]] = []
    if draw(st.booleans()):
        chat.append({"role": draw(st.sampled_from(["system", "system", "developer"])), "content": draw(said)})
    for _ in range(draw(st.integers(1, 3))):
        chat.append({"role": "user", "content": draw(said)})
        if draw(st.integers(0, 3)) == 0:
            chat.append(draw(answers(calls=True)))
            for call in chat[-1]["tool_calls"]:
                result = {"tool_call_id": call["id"], "name": call["function"]["name"], "content": draw(said)}
                chat.append({"role": "tool", **result})
        chat.append(draw(answers(calls=False)))
    if draw(st.integers(0, 5)) == 0:
        chat = draw(st.permutations(chat))
    if draw(st.integers(0, 5)) == 0:
        chat = chat[1:] or chat
    return chat


@cache
def pair(name: str, template: str = "") -> tuple[ChatEncoder, Any]:
    from transformers import AutoTokenizer

    logging.disable(logging.WARNING)
    conformance.freeze_clock()
    directory = tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)
    text = (directory / template).read_text("utf-8") if template else None
    encoder = ChatEncoder.load(load_tokenizer(directory), text, Policy(control_tokens="parity"), clock=lambda: CLOCK)
    return encoder, AutoTokenizer.from_pretrained(directory)


def with_policy(encoder: ChatEncoder, **policy: Any) -> ChatEncoder:
    return ChatEncoder(encoder.loaded, encoder.template, Policy(**policy))


def assert_consistent(encoding: Encoding, n_messages: int) -> None:
    trained: list[int] = []
    for row in encoding.rows:
        n = len(row)
        arrays = (row.weights, row.turns, row.messages, row.reasons, row.labels)
        assert all(len(array) == n for array in arrays)
        assert [str(array.dtype) for array in arrays] == ["float32", "int32", "int32", "uint8", "int64"]
        on = row.weights != 0
        assert n and not on[0]
        assert ((row.turns >= 0) == on).all() and (row.turns[on] == row.messages[on]).all()
        assert ((row.labels != -100) == on).all() and (row.labels[on] == row.input_ids[on]).all()
        assert (row.reasons[on] < 16).all() and (row.reasons[~on] >= 16).all()
        assert row.messages.max() < n_messages
        trained += sorted(set(row.turns[on].tolist()))
    assert len(trained) == len(set(trained)), "a turn is trained in one row only"
    assert not set(trained) & set(encoding.untrained), "a turn that is trained is not said to be untrained"
    # Where an engine holds no ids yet and the answer is one token, position 0 has nothing that predicts it.
    lonely = any(len(row) <= 1 for row in encoding.rows)
    assert {*trained, *encoding.untrained} == set(encoding.outcomes) or lonely, "every turn is in a row or counted"


def targets(encoding: Encoding) -> dict[int, tuple[list[int], list[int]]]:
    """(context, target) ids of every trained turn."""
    found = {}
    for row in encoding.rows:
        for turn in sorted(set(row.turns.tolist()) - {-1}):
            places = np.flatnonzero(row.turns == turn)
            found[turn] = row.input_ids[: places[0]].tolist(), row.input_ids[places].tolist()
    return found


def check(name: str, template: str, chat: list[dict[str, Any]]) -> None:
    encoder, tokenizer = pair(name, template)
    tools = [conformance.LOOKUP] if any("tool_calls" in message for message in chat) else None
    conversation = Conversation.from_messages(chat, tools)
    encoding = encoder.examine(conversation)
    assert_consistent(encoding, len(chat))
    for row in encoding.rows:
        assert OTHERS not in encoder.decode(row.input_ids[row.weights != 0]), "what others say is trained"
    _, text = encoder.template.select(tools)
    seen = encoder.rendering(conversation).messages
    found = violations(
        tokenizer, text, seen, encoding.rows, tools=tools, stop_ids=encoder.loaded.stop_ids, row_format="auto"
    )
    assert not found, found
    each = with_policy(encoder, control_tokens="parity", row_format="per_turn").examine(conversation)
    assert targets(each) == targets(encoding)
    for strict in (encoder, with_policy(encoder)):
        examined = strict.examine(conversation)
        fatal = [problem for problem in examined.problems if problem.fatal]
        try:
            rows = strict.encode(conversation)
        except DataError as error:
            assert error.kind == fatal[0].cause and error.hint
        else:
            assert not fatal and len(rows) == len(examined.rows)


@pytest.mark.parametrize("template", ["chat_template.jinja", "chat_template_rewrites.jinja"])
@settings(max_examples=4 * EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(chat=messages())
def test_the_built_in_templates_are_lawful(template: str, chat: list[dict[str, Any]]) -> None:
    check("demo", template, chat)


@pytest.mark.parametrize("name", assets.FAST_TIER)
@settings(max_examples=EXAMPLES)
@given(chat=messages())
def test_every_family_with_its_own_template_is_lawful(name: str, chat: list[dict[str, Any]]) -> None:
    check(name, "", chat)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in assets.SLOW_TIER if name not in ("command-r", "xlmr")])
@settings(max_examples=4 * EXAMPLES)
@given(chat=messages())
def test_every_larger_family_with_its_own_template_is_lawful(name: str, chat: list[dict[str, Any]]) -> None:
    check(name, "", chat)


@pytest.mark.slow
@pytest.mark.parametrize("name", assets.FAST_TIER)
@settings(max_examples=10 * EXAMPLES)
@given(chat=messages())
def test_every_family_is_lawful_over_many_more(name: str, chat: list[dict[str, Any]]) -> None:
    check(name, "", chat)
