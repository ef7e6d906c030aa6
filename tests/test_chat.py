"""chat.py: every field of a message is validated, every error names the field."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss import values as json_values
from chatloss.chat import Conversation, Message, ToolCall, split_think
from chatloss.errors import DataError
from chatloss.frozen import made_quickly
from chatloss.sample import Sample
from chatloss.values import check_json, parse_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20)
JSON_LIKE = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
CALL = {"type": "function", "id": "c1", "function": {"name": "f", "arguments": {"x": 1}}}


def message(**fields: Any) -> Message:
    return Message.from_dict({"role": "assistant", "content": "a", **fields}, "messages[2]")


def error_of(**fields: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        message(**fields)
    return caught.value


def test_a_message_keeps_all_that_its_row_says() -> None:
    row = {
        "role": "assistant", "content": "a", "thinking": "t", "tool_calls": [CALL], "tool_call_id": 7, "name": "n",
        "train": False, "weight": 0.5, "refusal": None, "custom": {"deep": [1, None]},
    }  # fmt: skip
    got = Message.from_dict(row)
    assert got == Message(
        "assistant", "a", reasoning="t", tool_calls=(ToolCall("f", {"x": 1}, "c1"),), tool_call_id="7", name="n",
        train=False, weight=0.5, extra={"custom": {"deep": [1, None]}},
    )  # fmt: skip
    assert got.to_dict() == {
        "role": "assistant", "content": "a", "reasoning_content": "t", "tool_calls": [CALL], "tool_call_id": "7",
        "name": "n", "custom": {"deep": [1, None]},
    }  # fmt: skip


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_three_spellings_and_an_empty_one_does_not_hide_another(key: str) -> None:
    assert message(**{key: "why"}).reasoning == "why"
    assert message(**{"reasoning_content": "", "thinking": "", "reasoning": "", key: "why"}).reasoning == "why"
    assert message(reasoning_content="").reasoning == ""


def test_spellings_that_disagree_are_refused() -> None:
    assert error_of(reasoning="a", thinking="b").where == "messages[2].reasoning"
    assert error_of(train=True, loss=False).where == "messages[2].loss"
    assert error_of(weight=1, loss_weight=0.5).where == "messages[2].loss_weight"


@pytest.mark.parametrize(("key", "value"), [("train", False), ("training", False), ("loss", False), ("train", 0)])
def test_training_wishes_are_read_in_every_spelling_and_never_shown_to_a_template(key: str, value: object) -> None:
    got = message(**{key: value})
    assert got.train is False and got.extra == {} and set(got.to_dict()) == {"role", "content"}


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_weights_are_read_in_every_spelling(key: str) -> None:
    assert message(**{key: 0}).weight == 0.0 and message(**{key: 2}).weight == 2.0


def test_calls_are_read_from_a_list_a_json_string_and_the_legacy_field() -> None:
    calls = (ToolCall("f", {"x": 1}, "c1"),)
    assert message(tool_calls=[CALL]).tool_calls == calls
    assert message(tool_calls=str([CALL]).replace("'", '"')).tool_calls == calls
    assert message(tool_calls="", function_call=None).tool_calls == ()
    legacy = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    assert Message.from_dict(legacy).tool_calls == (ToolCall("f", '{"x": 1}'),)
    assert error_of(tool_calls=[CALL], function_call={"name": "g"}).what.endswith("not both")


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"role": None}, "role"),
        ({"role": " "}, "role"),
        ({"role": "\ud800"}, "role"),
        ({"content": 3}, "content"),
        ({"content": {"text": "a"}}, "content"),
        ({"content": [{"type": "text"}]}, "content[0].text"),
        ({"content": [None]}, "content[0]"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "content[0].type"),
        ({"content": "lone \udfff"}, "content"),
        ({"thinking": 1}, "thinking"),
        ({"tool_calls": {}}, "tool_calls"),
        ({"tool_calls": "{"}, "tool_calls"),
        ({"tool_calls": [1]}, "tool_calls[0]"),
        ({"tool_calls": [{"function": "f"}]}, "tool_calls[0].function"),
        ({"tool_calls": [{"function": {"name": ""}}]}, "tool_calls[0].function.name"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, "tool_calls[0].function.arguments"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": math.nan}}]}, "tool_calls[0].function.arguments.a"),
        ({"tool_calls": [{"name": "f", "arguments": {"a": 10**2000}}]}, "tool_calls[0].function.arguments.a"),
        ({"tool_calls": [{"name": "f", "arguments": {1: 2}}]}, "tool_calls[0].function.arguments (a key)"),
        ({"tool_call_id": []}, "tool_call_id"),
        ({"name": 1.5}, "name"),
        ({"train": "yes"}, "train"),
        ({"weight": True}, "weight"),
        ({"weight": math.inf}, "weight"),
        ({"weight": 10**400}, "weight"),
        ({"custom": object()}, "custom"),
    ],
)
def test_every_wrong_type_is_an_error_that_names_the_field_and_a_remedy(fields: dict[str, Any], where: str) -> None:
    error = error_of(**fields)
    assert error.where == f"messages[2].{where}" and error.hint


def test_deep_nesting_is_an_error_and_no_recursion_error() -> None:
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for field in ("custom", "train", "weight", "content", "name", "thinking", "tool_calls"):
        assert isinstance(error_of(**{field: deep}), DataError)
    with pytest.raises(DataError, match="nested"):
        Conversation.from_messages([{"role": "user", "content": "a"}], tools=[{"name": deep}])
    with pytest.raises(DataError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_a_message_needs_something_to_say() -> None:
    with pytest.raises(DataError, match="needs content"):
        Message.from_dict({"role": "assistant", "content": None})
    assert Message.from_dict({"role": "assistant", "content": ""}).content == ""
    assert Message.from_dict({"role": "assistant", "reasoning": "r"}).content is None


def test_typed_parts_become_text_parts() -> None:
    got = message(content=["a", {"type": "input_text", "text": "b"}])
    assert got.content == ({"type": "text", "text": "a"}, {"type": "text", "text": "b"}) and got.text == "a\nb"


def test_tools_are_objects_or_json_strings_of_them() -> None:
    chat = [{"role": "user", "content": "a"}]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"x": None}}}
    text = '{"type": "function", "function": {"name": "f", "parameters": {"x": null}}}'
    for tools in ([tool], [text], f"[{text}]"):
        assert Conversation.from_messages(chat, tools).tools == (tool,)
    nothing: tuple[Any, ...] = (None, [], "", " ", "[]")
    for none in nothing:
        assert Conversation.from_messages(chat, none).tools is None
    wrong: tuple[Any, ...] = (3, "x", {}, [3], ["x"], "{}", [[]], ['{"a": 1, "a": 2}'])
    for bad in wrong:
        with pytest.raises(DataError) as caught:
            Conversation.from_messages(chat, bad)
        assert caught.value.where.startswith("tools")


def test_tools_that_are_like_others_but_for_a_type_are_looked_at_anew() -> None:
    chat = [{"role": "user", "content": "a"}]

    def tools(value: Any) -> Any:
        return [{"type": "function", "function": {"name": "like", "parameters": {"x": value}}}]

    for value in (1, True, 1.0, [1], "1", 1):
        for _ in range(2):
            (found,) = Conversation.from_messages(chat, tools(value)).tools or ()
            assert repr(found) == repr(tools(value)[0])
    for value in (float("nan"), (1,), {1: 2}, {1}, b"1", "\ud800", 10**2000):
        for _ in range(2):
            if value == (1,):  # a list, to Python
                Conversation.from_messages(chat, tools(value))
                continue
            with pytest.raises(DataError):
                Conversation.from_messages(chat, tools(value))


@pytest.mark.parametrize("change", [
    {}, {"id": "c1"}, {"id": 7}, {"id": True}, {"id": "\ud800"}, {"name": ""}, {"name": 3}, {"name": "\ud800"},
    {"arguments": None}, {"arguments": "{}"}, {"arguments": [1]}, {"arguments": {"x": float("inf")}},
    {"arguments": {"x": [{"y": "\ud800"}]}}, {"arguments": {"x": 2**80}}, {"type": 1},
])
def test_a_call_is_read_at_once_as_it_is_read_field_by_field(change: dict[str, Any]) -> None:
    of_call = {key: value for key, value in change.items() if key in ("id", "type")}
    function = {"name": "f", "arguments": {"x": 1}} | {k: v for k, v in change.items() if k in ("name", "arguments")}

    def read(kind: Any) -> Any:
        call = kind({"type": "function", **of_call, "function": kind(function)})
        try:
            return Message.from_dict({"role": "assistant", "tool_calls": [call]})
        except DataError as error:
            return str(error)

    assert read(dict) == read(MappingProxyType)  # which is looked at field by field


def test_what_is_made_quickly_is_what_dataclass_makes() -> None:
    made = Message("user", extra={"a": 1})
    assert made == replace(made) == pickle.loads(pickle.dumps(made)) == Message(role="user", extra={"a": 1})
    assert Message("user").extra == {} and Message("user").extra is not Message("user").extra
    assert [*signature(Message).parameters] == [one.name for one in fields(Message)]
    with pytest.raises(FrozenInstanceError):
        made.role = "tool"  # type: ignore[misc]
    for wrong in ((), ("user",) * 10):
        with pytest.raises(TypeError):
            Message(*wrong)
    with pytest.raises(TypeError, match="does more than to hold"):
        made_quickly(Sample)


PUT = ["", ",", "}", '"', "\\", "0", "e5", "-", "\n", "\\ud8"]
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)


@settings(max_examples=1000, deadline=None)
@given(VALUE, st.booleans(), st.integers(0, 60), st.sampled_from(PUT))
def test_json_is_read_as_the_standard_library_reads_it(value: Any, ascii_only: bool, at: int, put: str) -> None:
    """Values to the last bit and type, and the same texts refused."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    for one in (text, text[:at] + put + text[at:]):
        try:
            wanted = repr(json_values._DECODER.decode(one))
        except (DataError, ValueError):
            with pytest.raises(DataError):
                parse_json(one)
        else:
            assert repr(parse_json(one)) == repr(parse_json(one.encode())) == wanted


def test_json_is_strict_and_integers_stay_exact() -> None:
    assert parse_json(b'{"a": 18446744073709551616, "b": "\\u0000"}') == {"a": 2**64, "b": "\0"}
    for text, what in {
        '{"a": 1, "b": {"c": 1, "c": 1}}': "'c' occurs twice",
        "[NaN]": "NaN is not JSON",
        "[-Infinity]": "-Infinity is not JSON",
        "{'a': 1}": "not JSON",
        '"a\0b"': "not JSON: Invalid control character",
        "1" * 5000: "not JSON",
        "": "not JSON",
    }.items():
        with pytest.raises(DataError) as caught:
            parse_json(text, "tools[0]")
        assert what in caught.value.what and caught.value.where == "tools[0]"
    for data in (b'"\xff"', b'"\xed\xa0\x80"', '{"a":1}'.encode("utf-16")):
        with pytest.raises(DataError, match="not UTF-8"):
            parse_json(data)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>r</think>a", ("r", "a")),
        ("\n<think>\nr\n</think>\n\na</think>", ("\nr\n", "\n\na</think>")),
        ("<think></think>a", ("", "a")),
        ("<think>r", (None, "<think>r")),
        ("a<think>r</think>", (None, "a<think>r</think>")),
        ("", (None, "")),
    ],
)
def test_inline_reasoning_is_split_only_at_the_start(text: str, parts: tuple[str | None, str]) -> None:
    assert split_think(text) == parts


@given(st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "train", "weight", "name", "x"]), JSON_LIKE))
def test_any_message_is_a_message_or_a_data_error(row: dict[str, Any]) -> None:
    try:
        got = Message.from_dict(row)
    except DataError as error:
        assert error.what and error.where.startswith("message") and error.hint
    else:
        assert Message.from_dict(got.to_dict()).to_dict() == got.to_dict()


@given(JSON_LIKE, JSON_LIKE, JSON_LIKE)
def test_any_conversation_is_a_conversation_or_a_data_error(messages: Any, tools: Any, kwargs: Any) -> None:
    for values in (messages, [messages], [{"role": "user", "content": "a"}]):
        try:
            Conversation.from_messages(values, tools, kwargs)
        except DataError as error:
            assert error.where and error.hint


@given(st.sampled_from(["user", "assistant", "tool", "critic", ""]) | SCALARS, SCALARS)
def test_a_role_and_a_text_alone_are_read_as_they_are_beside_other_keys(role: Any, content: Any) -> None:
    def read(row: dict[str, Any]) -> Message | str:
        try:
            return Message.from_dict(row)
        except DataError as error:
            return str(error)

    assert read({"role": role, "content": content}) == read({"role": role, "content": content, "name": None})


@given(JSON_LIKE)
def test_values_that_pass_at_once_are_those_that_pass_place_by_place(value: Any) -> None:
    def fault(value: object) -> str:
        try:
            check_json(value, "here")
        except DataError as error:
            return str(error)
        return ""

    assert fault([value]) == fault((value,))  # a tuple is looked at place by place
