"""formats.py: every input format, what it says about training, and how a file's format is told."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatloss.chat import Conversation, Label, Message, Preference, Text, ToolCall
from chatloss.errors import DataError
from chatloss.formats import INPUT_FORMATS, Row, detect, parse
from chatloss.reader import read
from tests.assets import CHATS, chat_file, chats

FORMATS = INPUT_FORMATS[1:]
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


def chat(row: dict[str, Any], input_format: str = "messages") -> Conversation:
    got = parse(row, input_format, "f:1")
    assert isinstance(got, Conversation) and got.source == "f:1"
    return got


def told(messages: tuple[Message, ...]) -> list[tuple[str, str, bool | None]]:
    return [(m.role, m.text, m.train) for m in messages]


def error_of(row: object, input_format: str) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row, input_format, "f:1")
    assert caught.value.where.startswith("f:1") and caught.value.hint and caught.value.kind != "DataError"
    return caught.value


# What is read.


def test_messages_with_tools_and_template_arguments() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"messages": [USER, ANSWER], "tools": [tool], "chat_template_kwargs": {"enable_thinking": False}, "id": 3}
    got = chat(row)
    assert told(got.messages) == [("user", "q", None), ("assistant", "a", None)]
    assert got.tools == (tool,) and got.template_kwargs == {"enable_thinking": False}
    text = chat({**row, "messages": '[{"role": "user", "content": "q"}]', "chat_template_kwargs": '{"k": null}'})
    assert told(text.messages) == [("user", "q", None)] and text.template_kwargs == {"k": None}


def test_inline_reasoning_stays_in_the_content_for_the_encoder_to_split() -> None:
    text = "<think>r</think>a"
    assert chat({"messages": [USER, {"role": "assistant", "content": text}]}).messages[1].content == text


def test_sharegpt_speakers_calls_and_observations() -> None:
    call = '{"name": "f", "arguments": {"x": null}}'
    turns = [("system", "s"), ("human", "q"), ("function_call", f"<think>r</think>\n{call}"), ("observation", "42")]
    turns += [("function_call", f"[{call}, {call}]"), ("observation", "43"), ("gpt", "a")]
    row = {"conversations": [{"from": who, "value": text} for who, text in turns], "tools": '[{"name": "f"}]'}
    got = chat(row, "sharegpt")
    roles = ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    assert [m.role for m in got.messages] == roles
    assert got.messages[2].content == "<think>r</think>"
    assert got.messages[2].tool_calls == (ToolCall("f", {"x": None}),) and len(got.messages[4].tool_calls) == 2
    assert got.messages[4].content is None
    assert got.tools == ({"type": "function", "function": {"name": "f"}},)


def test_minimind_keeps_role_and_content_in_conversations_and_tools_in_the_system_message() -> None:
    system = {"role": "system", "content": "s", "tools": '[{"name": "f"}]'}
    calls = {"role": "assistant", "content": "", "tool_calls": '[{"name": "f", "arguments": {}}]'}
    got = chat({"conversations": [system, USER, calls]}, "sharegpt")
    assert got.messages[0].extra == {} and got.messages[2].tool_calls == (ToolCall("f", {}),)
    assert got.tools == ({"type": "function", "function": {"name": "f"}},)


def test_alpaca_joins_instruction_and_input_and_puts_history_first() -> None:
    row = {"instruction": "i", "input": "j", "output": "o", "system": "s", "history": [["q", "a"]]}
    assert told(chat(row, "alpaca").messages) == [
        ("system", "s", None), ("user", "q", None), ("assistant", "a", None), ("user", "i\nj", None),
        ("assistant", "o", None),
    ]  # fmt: skip
    assert chat({"instruction": "i", "input": "", "output": "o"}, "alpaca").messages[0].text == "i"


def test_only_the_completion_of_a_prompt_is_trained() -> None:
    assert told(chat({"prompt": "q", "completion": "a"}, "prompt-completion").messages) == [
        ("user", "q", None), ("assistant", "a", None),
    ]  # fmt: skip
    own = {**ANSWER, "weight": 0.5}
    row = {"prompt": [USER, ANSWER, USER, own, USER], "completion": [ANSWER]}
    got = chat(row, "prompt-completion").messages
    assert [m.train for m in got] == [None, False, None, None, None, None] and got[3].weight == 0.5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": "q", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "messages": [USER, ANSWER]},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"chosen_messages": [USER, ANSWER], "rejected_messages": [USER, OTHER]},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
)
def test_every_form_of_a_preference_is_the_same_pair(row: dict[str, Any]) -> None:
    got = parse(row, detect([row]), "f:1")
    assert isinstance(got, Preference) and got.source == got.chosen.source == "f:1"
    assert told(got.prompt) == [("user", "q", None)]
    assert told(got.chosen.messages) == [("user", "q", None), ("assistant", "a", None)]
    assert told(got.rejected.messages) == [("user", "q", None), ("assistant", "b", None)]


def test_a_pair_is_judged_only_by_what_follows_the_shared_prompt() -> None:
    start = [USER, ANSWER, USER]
    got = parse({"system": "s", "chosen": [*start, ANSWER], "rejected": [*start, OTHER, USER, OTHER]}, "preference")
    assert isinstance(got, Preference)
    prompt = [("system", "s", None), ("user", "q", None), ("assistant", "a", False), ("user", "q", None)]
    assert told(got.prompt) == prompt
    assert got.chosen.messages[:4] == got.rejected.messages[:4] == got.prompt
    assert [m.train for m in got.rejected.messages[4:]] == [None, None, None]


@pytest.mark.parametrize("judged", [{"label": True}, {"label": 1}, {"kto_tag": True, "label": "topic"}])
@pytest.mark.parametrize(
    "row", [{"messages": [USER, OTHER, USER, ANSWER]}, {"prompt": [USER, OTHER, USER], "completion": "a"}]
)
def test_a_label_judges_the_last_answer(row: dict[str, Any], judged: dict[str, Any]) -> None:
    got = parse({**row, **judged}, "kto", "f:1")
    assert isinstance(got, Label) and got.desirable is True and got.source == "f:1"
    assert [m.train for m in got.conversation.messages] == [None, False, None, None]
    alpaca = parse({"instruction": "q", "output": "a", "kto_tag": False}, "kto")
    assert isinstance(alpaca, Label) and not alpaca.desirable


def test_parts_of_llamafactory_v1_become_fields() -> None:
    parts = [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"}]
    parts.append({"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'})
    got = chat({"messages": [USER, {"role": "assistant", "content": parts, "loss_weight": 0.5}]}).messages[1]
    assert (got.reasoning, got.content, got.weight) == ("r", "a", 0.5)
    assert got.tool_calls == (ToolCall("f", {"x": 1}),)
    late = {"messages": [USER, {"role": "assistant", "content": [parts[1], parts[0]]}]}
    assert error_of(late, "messages").where == "f:1 messages[1].content[1]"


def test_legacy_functions_become_tools() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    messages = [USER, call, {"role": "function", "name": "f", "content": "1"}]
    got = chat({"messages": messages, "functions": [{"name": "f"}]})
    assert got.tools == ({"type": "function", "function": {"name": "f"}},) and got.messages[2].role == "tool"


# What is refused.


@pytest.mark.parametrize(
    ("input_format", "row", "where"),
    [
        ("messages", {"messages": []}, "messages"),
        ("messages", {"messages": "x"}, "messages"),
        ("messages", {"text": "x"}, "messages"),
        ("messages", [USER], ""),
        ("messages", {"messages": [USER, 3]}, "messages[1]"),
        ("messages", {"messages": [USER], "images": ["a.png"]}, "images"),
        ("messages", {"messages": [{**USER, "images": ["a.png"]}]}, "messages[0].images"),
        ("messages", {"messages": [{"role": "system", "content": "s"}, USER], "system": "t"}, "system"),
        ("messages", {"messages": [USER], "system": 3}, "system"),
        ("messages", {"messages": [USER], "tools": [{}], "functions": [{}]}, "tools"),
        ("messages", {"messages": [USER], "chat_template_kwargs": 3}, "chat_template_kwargs"),
        ("messages", {"messages": [{**USER, "content": [{"type": "audio", "value": "x"}]}]}, "messages[0].content[0]"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0].from"),
        ("sharegpt", {"conversations": [{"from": [], "value": "x"}]}, "conversations[0].from"),
        ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "conversations[0].value"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "f(x)"}]}, "conversations[0].value"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "[]"}]}, "conversations[0].value"),
        ("alpaca", {"instruction": "", "output": "o"}, "instruction"),
        ("alpaca", {"instruction": "i"}, "output"),
        ("alpaca", {"instruction": "i", "output": "o", "history": 3}, "history[0]"),
        ("alpaca", {"instruction": "i", "output": "o", "history": [["q", None]]}, "history[0][1]"),
        ("prompt-completion", {"prompt": [USER, ANSWER], "completion": "a"}, "prompt"),
        ("prompt-completion", {"completion": "a"}, "prompt"),
        ("prompt-completion", {"prompt": "q", "completion": 3}, "completion"),
        ("preference", {"chosen": "a", "rejected": "b"}, "prompt"),
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "a"}, "rejected"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, "rejected"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER, OTHER]}, "rejected[2]"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "r"}, OTHER]}, "rejected[0]"),
        ("preference", {"chosen": [USER, ANSWER], "rejected": "b"}, "rejected"),
        ("preference", {"prompt": "r", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "chosen"),
        ("preference", {"prompt": "q", "messages": [USER], "chosen": "a", "rejected": "b"}, "messages"),
        ("kto", {"messages": [USER, ANSWER]}, "label"),
        ("kto", {"messages": [USER, ANSWER], "label": "yes"}, "label"),
        ("kto", {"messages": [USER], "label": True}, "label"),
        ("text", {"text": ["a"]}, "text"),
        ("text", {"text": "\udc80"}, "text"),
    ],
)  # fmt: skip
def test_a_bad_row_is_an_error_that_names_the_field(input_format: str, row: object, where: str) -> None:
    assert error_of(row, input_format).where == f"f:1 {where}".strip()


# Which format it is.


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (["messages", "prompt", "prompt_id", "text"], "messages"),
        (["conversations", "id", "system"], "sharegpt"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["prompt", "completion"], "prompt-completion"),
        (["chosen", "rejected", "messages", "prompt"], "preference"),
        (["messages", "kto_tag"], "kto"),
        (["text", "url"], "text"),
    ],
)
def test_keys_tell_the_format(keys: list[str], name: str) -> None:
    assert detect([dict.fromkeys(keys, "x"), {"y": None}]) == name


def test_a_boolean_label_means_kto_a_class_does_not_and_a_number_is_ambiguous() -> None:
    assert detect([{"messages": [], "label": False}, {"messages": []}]) == "kto"
    assert detect([{"messages": [], "label": "sports"}]) == "messages"
    assert detect([{"text": "x", "label": True}]) == "text"
    with pytest.raises(DataError, match="messages as well as kto"):
        detect([{"messages": [], "label": 1}])


@pytest.mark.parametrize(
    "row", [{"messages": [], "conversations": []}, {"question": "", "answer": ""}, {}, {"messages": None}]
)
def test_unknown_and_ambiguous_keys_are_an_error_that_lists_keys_formats_and_the_option(row: dict[str, Any]) -> None:
    with pytest.raises(DataError) as caught:
        detect([row])
    assert all(key in caught.value.what for key in row if row[key] is not None)
    assert "--input-format" in caught.value.hint and all(name in caught.value.hint for name in FORMATS)


# Real files and arbitrary rows.

EXPECTED: dict[str, type[Row]] = dict.fromkeys(CHATS, Conversation)
EXPECTED |= {name: Preference for name in CHATS if name.startswith("dpo")} | {"kto_en": Label, "text_en": Text}


@pytest.mark.parametrize("name", CHATS)
def test_real_files_are_read_without_a_reject_and_nothing_is_lost(name: str) -> None:
    reader = read(chat_file(name), max_rejects=0)
    rows = list(reader)
    assert {type(row) for row in rows} == {EXPECTED[name]} and len(rows) == reader.n_rows == len(chats(name))
    if name in ("tools_en", "tools_zh"):
        got = Counter(m.role for row in rows if isinstance(row, Conversation) for m in row.messages)
        speakers = Counter(turn["from"] for row in chats(name) for turn in row["conversations"])
        assert got["assistant"] == speakers["gpt"] + speakers["function_call"]
        assert got["tool"] == speakers["observation"] and got["user"] == speakers["human"]
    if name == "weights":
        weights = [[turn["loss_weight"] for turn in row["messages"]] for row in chats(name)]
        assert weights == [[m.weight for m in row.messages] for row in rows if isinstance(row, Conversation)]


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=9)
LEAVES |= st.sampled_from(["user", "assistant", "human", "gpt", "function_call", '[{"role": "user", "content": "q"}]'])
FIELD_NAMES = ["role", "content", "from", "value", "type", "text", "tool_calls", "function", "name", "arguments"]
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(FIELD_NAMES) | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER], "tools": [], "system": "", "chat_template_kwargs": {}, "functions": None},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}], "tools": "", "system": None},
    "alpaca": {"instruction": "i", "input": "", "output": "o", "history": [], "system": ""},
    "prompt-completion": {"prompt": "q", "completion": "a", "tools": None},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b", "messages": None, "chosen_messages": None},
    "kto": {"messages": [USER, ANSWER], "label": True, "kto_tag": None, "prompt": None, "completion": None},
    "text": {"text": "t", "images": None},
}


@given(st.sampled_from(FORMATS), st.data())
def test_any_value_in_any_field_is_a_row_or_a_data_error(input_format: str, data: st.DataObject) -> None:
    row = dict(GOOD[input_format])
    parse(row, input_format)
    for key in data.draw(st.lists(st.sampled_from(sorted(row)), min_size=1, max_size=3)):
        row[key] = data.draw(VALUES)
    try:
        parse(row, input_format, "f:1")
    except DataError as error:
        assert error.what and error.hint and error.where.startswith("f:1")


@pytest.mark.parametrize("input_format", FORMATS)
@pytest.mark.parametrize("value", [np.array(["a", "b"], dtype=object), np.int64(1), np.bool_(True), b"x", {1: 2}, ...])
def test_python_values_that_are_no_json_are_data_errors_or_ignored(input_format: str, value: Any) -> None:
    for key in GOOD[input_format]:
        with contextlib.suppress(DataError):
            parse({**GOOD[input_format], key: value}, input_format)


@given(st.lists(st.dictionaries(st.sampled_from([*GOOD["kto"], *GOOD["preference"], "text", "x"]), VALUES)))
@example([{"label": True}])
def test_any_rows_have_a_format_or_are_a_data_error(rows: list[dict[str, Any]]) -> None:
    try:
        assert detect(rows) in FORMATS
    except DataError as error:
        assert "--input-format" in error.hint
