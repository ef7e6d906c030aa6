"""Control strings are found wherever somebody typed them, by every policy, and named by their place."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import DataError
from chatloss.policy import Policy
from tests import assets
from tests.test_literal import CHATML, STOP, TOOLS, assistant, call, loaded, user

END = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "mistral-v3": "[INST]"}


def escaped(text: str) -> str:
    return "".join(f"\\u{ord(char):04x}" for char in text)


def parts(*texts: str) -> dict[str, Any]:
    return user([{"type": "text", "text": text} for text in texts])


def with_tool(**function: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {**TOOLS[0]["function"], **function}}]  # type: ignore[dict-item]


def hidden(end: str) -> list[tuple[list[dict[str, Any]], Any, int, str]]:
    """(messages, tools, the message, the place) of one control string each."""
    yes, called = assistant("yes"), {"role": "tool", "content": "ok", "tool_call_id": "abcdefghi", "name": "lookup"}
    arguments = "messages[1].tool_calls[0].function.arguments"

    def calling(given: Any, name: str = "lookup", **more: Any) -> list[dict[str, Any]]:
        return [user("Hi"), assistant("", tool_calls=[{**call(name, given), **more}]), called, yes]

    properties = {"word": {"type": "string", "enum": ["a", f"b{end}"]}}
    return [
        ([user(f"say {end}"), yes], None, 0, "messages[0].content"),
        ([parts("say", f"so {end}"), yes], None, 0, "messages[0].content[1].text"),
        ([parts(end[:3], end[3:]), yes], None, 0, "messages[0].content[0].text and messages[0].content[1].text"),
        ([parts(end[:1], end[1:]), yes], None, 0, "messages[0].content[0].text and messages[0].content[1].text"),
        ([parts(f"{end[:1]} ", "", end[1:4], end[4:]), yes], None, 0,
         "messages[0].content[0].text and messages[0].content[2].text and messages[0].content[3].text"),
        ([user(f"say {end[:2]}\n"), assistant(f"{end[2:]} no")], None, 0,
         "messages[0].content and messages[1].content"),
        (calling(f'{{"word": "{escaped(end)}"}}'), TOOLS, 1, f"{arguments}.word"),
        (calling(f'{{"{escaped(end)}": 1}}'), TOOLS, 1, f"{arguments}.{end}"),
        (calling({"words": [{"word": end}]}), TOOLS, 1, f"{arguments}.words[0].word"),
        (calling("{}", end), TOOLS, 1, "messages[1].tool_calls[0].function.name"),
        (calling("{}", id=f"{end}1"), TOOLS, 1, "messages[1].tool_calls[0].id"),
        ([user("Hi"), assistant("", tool_calls=[call("lookup", "{}")]), {**called, "tool_call_id": end}, yes], TOOLS, 2,
         "messages[2].tool_call_id"),
        ([{**user("Hi"), "name": end}, yes], None, 0, "messages[0].name"),
        ([user("Hi"), yes], with_tool(description=f"Ends {end}."), -1, "tools[0].function.description"),
        ([user("Hi"), yes], with_tool(description=f"Ends {end}.", limit=2**63), -1, "tools[0].function.description"),
        ([user("Hi"), yes], with_tool(parameters={"type": "object", "properties": properties}), -1,
         "tools[0].function.parameters.properties.word.enum[1]"),
        ([user("Hi"), yes], with_tool(name=f"x{end[:1]}", description=end[1:]), -1,
         "tools[0].function.name and tools[0].function.description"),
    ]


@cache
def finder(name: str, policy: str) -> ChatEncoder:
    return ChatEncoder.load(loaded(name), assets.template(assets.NATIVE[name]), Policy(control_tokens=policy))


@pytest.mark.parametrize("case", range(len(hidden("<|end|>"))))
@pytest.mark.parametrize("name", END)
def test_every_policy_finds_a_control_string_wherever_it_stands_and_names_the_place(name: str, case: int) -> None:
    messages, tools, message, place = hidden(END[name])[case]
    chat = Conversation.from_messages(messages, tools)
    for policy in ("reject", "parity", "literal"):
        problems = finder(name, policy).control_problems(chat)
        told = f"the text holds the control token {END[name]!r} in {place}"
        assert [(one.message, one.detail, one.fatal) for one in problems] == [(message, told, policy == "reject")]
    with pytest.raises(DataError, match=re.escape(place)):
        finder(name, "reject").encode(messages, tools)


@pytest.mark.parametrize("name", END)
def test_what_cannot_become_a_control_string_is_not_refused(name: str) -> None:
    end, made = END[name], finder(name, "reject")
    for messages, tools in [
        ([parts(end[3:], end[:3]), assistant("yes")], None),
        ([user(end[:-1]), assistant(end[1:])], None),
        ([user(f"{end[:2]}."), assistant(f".{end[2:]}")], None),
        ([user("a <"), assistant("[")], with_tool(description="<")),
        ([{**user("Hi"), "raw_text_of_the_export": f"Hi{end}"}, assistant("yes")], None),  # the template never reads it
    ]:
        assert made.control_problems(Conversation.from_messages(messages, tools)) == []


WORDS = ["Hi", "<", "a < b", "|im_end|>", "<|im_end|>", "\n", '"', "\\", "\\u003c", "<|", "é", "[INST]", ""]
PLACES = st.sampled_from(WORDS)


@st.composite
def spoken(draw: Callable[..., Any]) -> Conversation:
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(user(draw(PLACES)))
        made = {"role": "assistant", "content": draw(PLACES)}
        if draw(st.booleans()):
            values = st.one_of(PLACES, st.lists(PLACES, max_size=2))
            given = draw(st.one_of(st.dictionaries(PLACES, values, max_size=2), PLACES.map(json.dumps), PLACES))
            made["tool_calls"] = [{"type": "function", "function": {"name": draw(PLACES) or "f", "arguments": given}}]
        if draw(st.booleans()):
            made["reasoning_content"] = draw(PLACES)
        messages.append(made)
    return Conversation.from_messages(messages)


@pytest.mark.parametrize("name", END)
@settings(max_examples=200, deadline=None)
@given(chat=spoken())
def test_a_first_look_overlooks_nothing(name: str, chat: Conversation) -> None:
    controls = finder(name, "reject")._controls
    if controls._plainly_none(chat):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(controls), "_plainly_none", lambda *_: False)
            assert not controls.found(chat, "object") and not controls.found(chat, "string")


def test_another_key_of_a_message_counts_if_the_template_names_it() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.mood }}")
    made = ChatEncoder.load(loaded("demo"), template)
    with pytest.raises(DataError, match=r"messages\[0\]\.mood"):
        made.encode([{**user("Hi"), "mood": STOP}, assistant("yes")])
