"""Where the parts of an answer stand in a rendered text, and which of them are missing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatloss.chat import Message, ToolCall, split_think
from chatloss.sample import Reason

__all__ = ["Field", "Missing", "fields_of", "locate", "present"]

# A field this short may occur by chance in a header or a tag, so its place is proven by rendering another in its stead.
SHORT = 16


@dataclass(frozen=True, slots=True)
class Field:
    """A part of an answer. Each of `pieces` must occur, in one of its spellings; texts are one piece.

    `call` is the index of the tool call that the field is.
    """

    reason: Reason
    pieces: tuple[tuple[str, ...], ...]
    name: str
    call: int = 0

    @property
    def text(self) -> str:
        return self.pieces[0][0]


@dataclass(frozen=True, slots=True)
class Missing:
    """A field that a rendering does not hold."""

    name: str


Located = list[tuple[int, int, Reason]]


def fields_of(message: Message) -> list[Field]:
    """The non-empty fields of an answer in the order templates write them: reasoning, content, calls.

    Inline ``<think>`` counts as reasoning. Fields are stripped: templates that trim still hold them.

    >>> [field.name for field in fields_of(Message("assistant", "<think>a</think>b"))]
    ['reasoning', 'content']
    """
    inline, content = split_think(message.text)
    fields = []
    for reasoning in (message.reasoning, inline):
        if reasoning and reasoning.strip():
            fields.append(Field(Reason.REASONING, ((reasoning.strip(),),), "reasoning"))
    if content.strip():
        fields.append(Field(Reason.CONTENT, ((content.strip(),),), "content"))
    for i, call in enumerate(message.tool_calls):
        fields.append(Field(Reason.CALL, tuple(_call_pieces(call)), f"tool_calls[{i}]", i))
    return fields


def locate(text: str, fields: list[Field], start: int = 0) -> Located | Missing:
    """(start, end, reason) of every field in `text`, in order from `start`, or the first field that is missing.

    Calls may stand before the content: some templates write them so.
    """
    found = _locate_in_order(text, fields, start)
    if isinstance(found, Missing):
        calls_first = sorted(fields, key=lambda field: {Reason.REASONING: 0, Reason.CALL: 1}.get(field.reason, 2))
        if calls_first != fields:
            second = _locate_in_order(text, calls_first, start)
            return found if isinstance(second, Missing) else second
    return found


def present(text: str, fields: list[Field], start: int = 0) -> Located:
    """Those fields that `text` holds, each looked for behind the one before: what a rewriting template still shows."""
    found: Located = []
    for field in fields:
        one = _locate_in_order(text, [field], found[-1][1] if found else start)
        if not isinstance(one, Missing):
            found += one
    return found


def proven_place(field: Field, text: str, render_with: Callable[[str], str | None]) -> tuple[int, int] | Missing | None:
    """The place of a short field, shown by rendering another text in its stead; None where that cannot be told.

    `render_with(other)` is the same rendering with the field's text replaced.
    """
    other = render_with(f"\u25c8{field.text}\u25c8")
    if other is None:
        return None
    if other == text:
        return Missing(field.name)
    size = min(len(text), len(other))
    start = next((i for i in range(size) if text[i] != other[i]), size)
    if text.startswith(field.text, start) and other.startswith(f"\u25c8{field.text}\u25c8", start):
        return start, start + len(field.text)
    return None


def _locate_in_order(text: str, fields: list[Field], start: int) -> Located | Missing:
    found: Located = []
    at = start
    for field in fields:
        places = [_first(text, alternatives, at) for alternatives in field.pieces]
        if any(place is None for place in places):
            return Missing(field.name)
        spans = [place for place in places if place is not None]
        begin, end = min(a for a, _ in spans), max(b for _, b in spans)
        found.append((begin, end, field.reason))
        at = end
    return found


def _first(text: str, alternatives: tuple[str, ...], start: int) -> tuple[int, int] | None:
    places = [(at, at + len(piece)) for piece in alternatives if (at := text.find(piece, start)) >= 0]
    return min(places) if places else None


def _call_pieces(call: ToolCall) -> Iterator[tuple[str, ...]]:
    yield (call.name, json.dumps(call.name)[1:-1])
    arguments = call.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            yield _spellings(arguments.strip())
            return
    for leaf in _leaves(arguments):
        spellings = _spellings(leaf)
        if any(spellings):
            yield spellings


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(leaf: Any) -> tuple[str, ...]:
    """A leaf argument as templates write it: raw, JSON-escaped with and without ASCII only, or a Python literal."""
    if isinstance(leaf, str):
        escaped, ascii_only = json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1]
        # Double encoding: the arguments are a JSON string inside JSON.
        twice = (json.dumps(escaped, ensure_ascii=False)[1:-1], json.dumps(ascii_only)[1:-1])
        return tuple(dict.fromkeys((leaf, leaf.strip(), escaped, ascii_only, repr(leaf)[1:-1], *twice)))
    return tuple(dict.fromkeys((json.dumps(leaf), str(leaf))))
