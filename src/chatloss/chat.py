"""Conversations as frozen, validated dataclasses: what every reader produces and every other module consumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatloss.errors import DataError

__all__ = ["Conversation", "Label", "Message", "Preference", "ToolCall", "split_think"]

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
MESSAGE_KEYS = ("role", "content", *REASONING_KEYS, "tool_calls", "tool_call_id", "name", "train", "weight")
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that an assistant message makes. `arguments` is an object, or a string as the data had it."""

    name: str
    arguments: Any
    id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        call: dict[str, Any] = {} if self.id is None else {"id": self.id}
        return {**call, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `content` is a string, a tuple of typed text parts, or None (an assistant that only calls tools).

    `train` and `weight` are the data's own wish for this message: None where it says nothing. `extra` holds every other
    key of the row's message, because a template may read it.
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
        return {**out, **self.extra}

    @classmethod
    def from_dict(cls, data: object, where: str = "message") -> Message:
        """A message from its OpenAI form.

        Raises `DataError` that names the field by `where` for every wrong type.

        >>> Message.from_dict({"role": "user", "content": "hi"}).text
        'hi'
        """
        if not isinstance(data, Mapping):
            raise DataError(f"a message must be an object, not {_kind(data)}", where=where, hint=_FORM)
        role = data.get("role")
        if not isinstance(role, str) or not role.strip():
            raise DataError(
                f"role must be a non-empty string, not {_kind(role)}", where=f"{where}.role",
                hint=f"use one of {', '.join(ROLES)}",
            )
        _check_text(role, f"{where}.role")
        reasoning = next((data[key] for key in REASONING_KEYS if data.get(key) is not None), None)
        if reasoning is not None:
            _check_text(reasoning, f"{where}.reasoning_content")
        calls = data.get("tool_calls")
        if calls is not None and not isinstance(calls, Sequence | str):
            raise DataError(f"tool_calls must be a list, not {_kind(calls)}", where=f"{where}.tool_calls", hint=_CALLS)
        if isinstance(calls, str):
            raise DataError("tool_calls must be a list, not a string", where=f"{where}.tool_calls", hint=_CALLS)
        tool_calls = tuple(_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls or ()))
        content = _content(data.get("content"), f"{where}.content")
        if content is None and not tool_calls and reasoning is None:
            raise DataError(
                "a message needs content, tool_calls or reasoning_content", where=where,
                hint="give it a content string (it may be empty)",
            )
        extra = {str(key): value for key, value in data.items() if key not in MESSAGE_KEYS and value is not None}
        _check_json(extra, where)
        return cls(
            role=role, content=content, reasoning=reasoning, tool_calls=tool_calls,
            tool_call_id=_optional_text(data.get("tool_call_id"), f"{where}.tool_call_id"),
            name=_optional_text(data.get("name"), f"{where}.name"),
            train=_train(data.get("train"), f"{where}.train"),
            weight=_weight(data.get("weight"), f"{where}.weight"), extra=extra,
        )


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
        """A validated conversation from plain JSON values; raises `DataError` naming the field path."""
        if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
            raise DataError(f"messages must be a list, not {_kind(messages)}", where="messages", hint=_FORM)
        if not messages:
            raise DataError("messages is empty", where="messages", hint="give it at least one message")
        if template_kwargs is not None and not isinstance(template_kwargs, Mapping):
            raise DataError(
                f"chat_template_kwargs must be an object, not {_kind(template_kwargs)}", where="chat_template_kwargs",
                hint='for example {"enable_thinking": false}',
            )
        kwargs = dict(template_kwargs or {})
        _check_json(kwargs, "chat_template_kwargs")
        return cls(
            messages=tuple(Message.from_dict(m, f"messages[{i}]") for i, m in enumerate(messages)),
            tools=_tools(tools), template_kwargs=kwargs, source=source,
        )


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


_FORM = 'expected {"role": "user", "content": "..."} objects'
_CALLS = 'expected [{"type": "function", "function": {"name": "...", "arguments": {...}}}]'
_MAX_DEPTH = 64


def _kind(value: object) -> str:
    names = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
    return names.get(type(value).__name__, type(value).__name__)


def _check_text(value: object, where: str) -> None:
    if not isinstance(value, str):
        raise DataError(f"must be a string, not {_kind(value)}", where=where, hint="convert the value to text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"holds a lone surrogate (U+{ord(value[error.start]):04X}), which is not text", where=where,
            hint="re-export the data as valid UTF-8",
        ) from None


def _optional_text(value: object, where: str) -> str | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    _check_text(value, where)
    return str(value)


def _train(value: object, where: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    raise DataError(f"train must be true or false, not {value!r:.40}", where=where, hint="use weight for a share")


def _weight(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"weight must be a finite number, not {value!r:.40}", where=where, hint="for example 0.5")
    return float(value)


def _content(value: object, where: str) -> str | tuple[Mapping[str, Any], ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        _check_text(value, where)
        return value
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise DataError(
            f"content must be a string or a list of parts, not {_kind(value)}", where=where,
            hint="dump structured content to a JSON string",
        )
    parts = []
    for i, part in enumerate(value):
        here = f"{where}[{i}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise DataError(f"a content part must be an object, not {_kind(part)}", where=here, hint=_PART)
        kind = part.get("type", "text")
        if kind not in ("text", "input_text", "output_text"):
            raise DataError(
                f"content parts of type {kind!r:.40} are not supported yet", where=f"{here}.type",
                hint="only text parts can be trained; drop the row or the part",
            )
        _check_text(part.get("text"), f"{here}.text")
        parts.append({"type": "text", "text": part["text"]})
    return tuple(parts)


_PART = 'expected {"type": "text", "text": "..."}'
_TOOLS = "expected {\"type\": \"function\", \"function\": {...}}"


def _tool_call(value: object, where: str) -> ToolCall:
    if not isinstance(value, Mapping):
        raise DataError(f"a tool call must be an object, not {_kind(value)}", where=where, hint=_CALLS)
    function = value.get("function", value)
    if not isinstance(function, Mapping):
        raise DataError(f"function must be an object, not {_kind(function)}", where=f"{where}.function", hint=_CALLS)
    name = function.get("name")
    _check_text(name, f"{where}.function.name")
    if not name:
        raise DataError("a tool call needs a name", where=f"{where}.function.name", hint=_CALLS)
    arguments = function.get("arguments", {})
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, str | Mapping):
        raise DataError(
            f"arguments must be an object or a JSON string, not {_kind(arguments)}",
            where=f"{where}.function.arguments", hint=_CALLS,
        )
    _check_json(arguments, f"{where}.function.arguments")
    return ToolCall(str(name), arguments, _optional_text(value.get("id"), f"{where}.id"))


def _tools(value: object) -> tuple[Mapping[str, Any], ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = _parse(value, "tools") if value.strip() else []
    if isinstance(value, Mapping) or not isinstance(value, Sequence):
        raise DataError(f"tools must be a list, not {_kind(value)}", where="tools", hint="give a list of JSON schemas")
    tools = []
    for i, tool in enumerate(value):
        parsed = _parse(tool, f"tools[{i}]") if isinstance(tool, str) else tool
        if not isinstance(parsed, Mapping):
            raise DataError(f"a tool must be an object, not {_kind(parsed)}", where=f"tools[{i}]", hint=_TOOLS)
        _check_json(parsed, f"tools[{i}]")
        tools.append(dict(parsed))
    return tuple(tools) or None


def _parse(text: str, where: str) -> object:
    import orjson

    try:
        return orjson.loads(text)
    except (orjson.JSONDecodeError, RecursionError) as error:
        raise DataError(f"is a string but not JSON: {error}", where=where, hint="give an object") from None


def _check_json(value: object, where: str, depth: int = 0) -> None:
    """Plain JSON values only, of bounded depth: what a template may be shown."""
    if depth > _MAX_DEPTH:
        raise DataError(f"is nested more than {_MAX_DEPTH} levels deep", where=where, hint="flatten it")
    if isinstance(value, str):
        _check_text(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(key, f"{where} (a key)")
            _check_json(item, f"{where}.{key}" if len(str(key)) < 60 else where, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]", depth + 1)
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(f"holds a {type(value).__name__}, which is not JSON", where=where, hint="convert it to text")
