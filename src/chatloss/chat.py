"""Conversations as frozen, validated dataclasses: what every reader produces and every other module consumes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from chatloss.errors import DataError
from chatloss.frozen import made_quickly
from chatloss.kept import Kept, exact
from chatloss.values import check_json, checked_text, is_json, is_text, kind_of, parse_json, shown

__all__ = ["Conversation", "Label", "Message", "Preference", "Text", "ToolCall", "plain_message", "split_think",
           "tools_of"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TRAIN_KEYS = ("train", "training", "loss")  # ours, axolotl's, ms-swift's
WEIGHT_KEYS = ("weight", "loss_weight")  # OpenAI's and ours, LLaMA-Factory's
CALL_KEYS = ("tool_calls", "function_call")
MESSAGE_KEYS = ("role", "content", *REASONING_KEYS, *CALL_KEYS, "tool_call_id", "name", *TRAIN_KEYS, *WEIGHT_KEYS)
ROLES = ("system", "developer", "user", "assistant", "tool")
T = TypeVar("T")


@made_quickly
@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant message makes. `arguments` is an object, or a string as the data had it."""

    name: str
    arguments: Any
    id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        call: dict[str, Any] = {} if self.id is None else {"id": self.id}
        return {**call, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@made_quickly
@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is a string, a tuple of typed text parts, or None (an assistant that only calls tools).

    `train` and `weight` are the data's own wish for this message: None where it says nothing. `extra` holds every other
    key of the row's message, because a template may read it. Inline ``<think>`` stays in `content` (see `split_think`).
    """

    role: str
    content: str | tuple[Mapping[str, Any], ...] | None = None
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None
    weight: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The content as one string: parts joined by newlines, as engines do for templates that take strings."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "\n".join(str(part["text"]) for part in self.content)

    def to_dict(self) -> dict[str, Any]:
        """The message as a template sees it: OpenAI keys, nothing that is None, no training wishes."""
        out: dict[str, Any] = {"role": self.role}
        if self.content is not None:
            out["content"] = self.content if isinstance(self.content, str) else [dict(p) for p in self.content]
        if self.reasoning is not None:
            out["reasoning_content"] = self.reasoning
        if self.tool_calls:
            out["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        if self.tool_call_id is not None:
            out["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            out["name"] = self.name
        out.update(self.extra)
        return out

    @classmethod
    def from_dict(cls, data: object, where: str = "message") -> Message:
        """A message from its OpenAI form, legacy `function_call` and `tool_calls` given as a JSON string included.

        Raises `DataError` that names the field by `where` for every wrong type.

        >>> Message.from_dict({"role": "user", "content": "hi"}).text
        'hi'
        >>> Message.from_dict({"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}).tool_calls
        (ToolCall(name='f', arguments='{}', id=None),)
        """
        if (plain := plain_message(data)) is not None:
            return plain
        if type(data) is dict and data.keys() <= _CALLING:
            role, calls, content = data.get("role"), data.get("tool_calls"), data.get("content")
            if type(role) is str and role == "assistant" and type(calls) is list and calls:
                return cls("assistant", _content(content, f"{where}.content"), None, _tool_calls(data, where))
        if not isinstance(data, Mapping):
            raise DataError(f"a message must be an object, not {kind_of(data)}", where=where, hint=_FORM)
        role, here = data.get("role"), f"{where}.role"
        if not isinstance(role, str) or not role.strip():
            hint = f"use one of {', '.join(ROLES)}"
            raise DataError(f"role must be a non-empty string, not {kind_of(role)}", where=here, hint=hint)
        checked_text(role, here)
        content = _content(data.get("content"), f"{where}.content")
        reasoning = _agreed(data, REASONING_KEYS, where, checked_text)
        tool_calls = _tool_calls(data, where)
        if content is None and not tool_calls and reasoning is None:
            hint = "give it a content string (it may be empty)"
            raise DataError("a message needs content, tool_calls or reasoning_content", where=where, hint=hint)
        extra = {str(key): value for key, value in data.items() if key not in MESSAGE_KEYS and value is not None}
        if extra:
            check_json(extra, where)
        return cls(
            role=role, content=content, reasoning=reasoning, tool_calls=tool_calls,
            tool_call_id=_optional_text(data.get("tool_call_id"), f"{where}.tool_call_id"),
            name=_optional_text(data.get("name"), f"{where}.name"),
            train=_agreed(data, TRAIN_KEYS, where, _train),
            weight=_agreed(data, WEIGHT_KEYS, where, _weight), extra=extra,
        )


@made_quickly
@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with the tools and template arguments they are rendered with. `source` is ``file:row`` (1-based row).

    >>> Conversation.from_messages([{"role": "user", "content": "hi"}]).messages[0].role
    'user'
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @classmethod
    def from_messages(
        cls, messages: object, tools: object = None, template_kwargs: object = None, source: str = ""
    ) -> Conversation:
        """A validated conversation from plain JSON values, or from messages that are `Message` already.

        Raises `DataError` naming the field path.
        """
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise DataError(f"messages must be a list, not {kind_of(messages)}", where="messages", hint=_FORM)
        if not messages:
            raise DataError("messages is empty", where="messages", hint="give it at least one message")
        here = "chat_template_kwargs"
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            what = f"{here} must be an object, not {kind_of(template_kwargs)}"
            raise DataError(what, where=here, hint='for example {"enable_thinking": false}')
        kwargs = dict(template_kwargs or {})
        if kwargs:
            check_json(kwargs, here)
        made = [m if isinstance(m, Message) else Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(messages)]
        return cls(messages=tuple(made), tools=tools_of(tools), template_kwargs=kwargs, source=source)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with a preferred and a dispreferred answer, each a full conversation that begins with the prompt."""

    prompt: tuple[Message, ...]
    chosen: Conversation
    rejected: Conversation
    source: str = ""


@dataclass(frozen=True, slots=True)
class Label:
    """A conversation judged good or bad on its own (KTO)."""

    conversation: Conversation
    desirable: bool
    source: str = ""


@dataclass(frozen=True, slots=True)
class Text:
    """Text without message structure, for marker mode."""

    text: str
    source: str = ""


def plain_message(data: object) -> Message | None:
    """The message that most are: a role of the usual ones and a text. None for all else, which needs a closer look."""
    if type(data) is dict and len(data) == 2:
        role, content = data.get("role"), data.get("content")
        if type(content) is str and type(role) is str and role in ROLES and (content.isascii() or is_text(content)):
            return Message(role, content)
    return None


def split_think(text: str) -> tuple[str | None, str]:
    """Inline reasoning and the answer after it: ``<think>r</think>a`` -> (``r``, ``a``); no block -> (None, text).

    >>> split_think("<think>two and two</think>four")
    ('two and two', 'four')
    """
    head = text.lstrip()
    if not head.startswith("<think>") or "</think>" not in head:
        return None, text
    reasoning, answer = head[len("<think>") :].split("</think>", 1)
    return reasoning, answer


_SEEN = Kept()  # tools that many chats have, and that are known to be JSON
_CALLING = {"role", "content", "tool_calls"}  # the keys of most messages with calls
_FORM = 'expected {"role": "user", "content": "..."} objects'
_CALLS = 'expected [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
def _agreed(data: Mapping[str, Any], keys: Sequence[str], where: str, read: Callable[[Any, str], T]) -> T | None:
    """The one value that the spellings `keys` of a field give; an empty string yields to another spelling's text."""
    found = {key: read(data[key], f"{where}.{key}") for key in keys if data.get(key) is not None}
    if not found:
        return None
    told = {key: value for key, value in found.items() if value != ""} or found
    for key, value in told.items():
        if value != next(iter(told.values())):
            raise DataError(f"{next(iter(told))} and {key} differ", where=f"{where}.{key}", hint="keep one of them")
    return next(iter(told.values()))


def _optional_text(value: object, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64:
        return str(value)
    return checked_text(value, where)


def _train(value: object, where: str) -> bool:
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"must be true or false, not {shown(value)}", where=where, hint="use weight for a share")


def _weight(value: object, where: str) -> float:
    small = isinstance(value, int) and not isinstance(value, bool) and value.bit_length() <= 64
    if small or (isinstance(value, float) and math.isfinite(value)):
        return float(value)  # type: ignore[arg-type]
    raise DataError(f"must be a finite number, not {shown(value)}", where=where, hint="for example 0.5")


def _content(value: object, where: str) -> str | tuple[Mapping[str, Any], ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        checked_text(value, where)
        return value
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise DataError(
            f"content must be a string or a list of parts, not {kind_of(value)}", where=where,
            hint="dump structured content to a JSON string",
        )
    parts = []
    for i, part in enumerate(value):
        here = f"{where}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise DataError(f"a content part must be an object, not {kind_of(part)}", where=here, hint=_PART)
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"content parts of type {shown(kind)} are not supported yet", where=f"{here}.type",
                hint="only text parts can be trained; drop the row or the part", kind="media",
            )
        checked_text(part.get("text"), f"{here}.text")
        parts.append({"type": "text", "text": part["text"]})
    return tuple(parts)


_PART = 'expected {"type": "text", "text": "..."}'
_TOOLS = "expected {\"type\": \"function\", \"function\": {...}}"


def _tool_calls(data: Mapping[str, Any], where: str) -> tuple[ToolCall, ...]:
    legacy, here = data.get("function_call"), f"{where}.function_call"
    if isinstance(legacy, str):
        legacy = parse_json(legacy, here) if legacy.strip() else None
    old = () if legacy is None else (_tool_call(legacy, here),)
    calls, here = data.get("tool_calls"), f"{where}.tool_calls"
    if isinstance(calls, str):
        calls = parse_json(calls, here) if calls.strip() else None
    if calls is not None and type(calls) is not list and (
        isinstance(calls, str | Mapping) or not isinstance(calls, Sequence)
    ):
        raise DataError(f"tool_calls must be a list, not {kind_of(calls)}", where=here, hint=_CALLS)
    if calls and old:
        raise DataError("a message has tool_calls or function_call, not both", where=here, hint="keep tool_calls")
    return old or tuple([_plain_call(call) or _tool_call(call, f"{here}[{i}]") for i, call in enumerate(calls or ())])


def _plain_call(value: object) -> ToolCall | None:
    """The call that most are. None for all else, which needs a closer look."""
    if type(value) is dict and type(function := value.get("function")) is dict:
        name, arguments, own = function.get("name"), function.get("arguments"), value.get("id")
        if type(name) is str and name and is_text(name) and type(arguments) is dict and is_json(arguments) and (
            own is None or (type(own) is str and is_text(own))
        ):
            return ToolCall(name, arguments, own)
    return None


def _tool_call(value: object, where: str) -> ToolCall:
    if type(value) is not dict and not isinstance(value, Mapping):
        raise DataError(f"a tool call must be an object, not {kind_of(value)}", where=where, hint=_CALLS)
    function = value.get("function", value)
    if type(function) is not dict and not isinstance(function, Mapping):
        raise DataError(f"function must be an object, not {kind_of(function)}", where=f"{where}.function", hint=_CALLS)
    name = function.get("name")
    name = checked_text(name, f"{where}.function.name")
    if not name:
        raise DataError("a tool call needs a name", where=f"{where}.function.name", hint=_CALLS)
    arguments = function.get("arguments", {})
    if arguments is None:
        arguments = {}
    if type(arguments) is not dict and not isinstance(arguments, str | Mapping):
        raise DataError(
            f"arguments must be an object or a JSON string, not {kind_of(arguments)}",
            where=f"{where}.function.arguments", hint=_CALLS,
        )
    check_json(arguments, f"{where}.function.arguments")
    return ToolCall(name, arguments, _optional_text(value.get("id"), f"{where}.id"))


def tools_of(value: object) -> tuple[Mapping[str, Any], ...] | None:
    """The tools of a conversation, from a list of JSON schemas or its JSON; None where there are none.

    Raises `DataError` naming the tool.
    """
    if value is None:
        return None
    if isinstance(value, str):
        value = parse_json(value, "tools") if value.strip() else []
    if type(value) is not list and (isinstance(value, str | Mapping) or not isinstance(value, Sequence)):
        raise DataError(f"tools must be a list, not {kind_of(value)}", where="tools", hint="give JSON schemas")
    form = exact(value)
    seen = form in _SEEN.texts
    tools = []
    for i, tool in enumerate(value):
        parsed = parse_json(tool, f"tools[{i}]") if isinstance(tool, str) else tool
        if type(parsed) is not dict and not isinstance(parsed, Mapping):
            raise DataError(f"a tool must be an object, not {kind_of(parsed)}", where=f"tools[{i}]", hint=_TOOLS)
        if not seen:
            check_json(parsed, f"tools[{i}]")
        tools.append(dict(parsed))
    if form is not None and not seen:
        _SEEN.keep(form, "")
    return tuple(tools) or None
