"""Where the parts of an answer stand in a rendered text, which of them are missing, and what stands between them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from chatloss.chat import Message, ToolCall, split_think
from chatloss.frozen import made_quickly
from chatloss.sample import Reason

__all__ = ["Field", "Missing", "common_prefix", "fields_of", "locate", "present", "reasons", "spellings"]

# A field this short may occur by chance in a header or a tag, so its place is proven by rendering another in its stead.
SHORT = 16
# A closing tag, with the space around it.
_CLOSING = re.compile(r"\s*</[^<>]*>\s*")


@made_quickly
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


class Searched(Protocol):
    """A text, for all that looks for something in it."""

    def find(self, piece: str, start: int, end: int | None, /) -> int: ...


def fields_of(message: Message) -> list[Field]:
    """The non-empty fields of an answer in the order templates write them: reasoning, content, calls.

    Inline ``<think>`` counts as reasoning. Fields are stripped: templates that trim still hold them.

    >>> [field.name for field in fields_of(Message("assistant", "<think>a</think>b"))]
    ['reasoning', 'content']
    """
    inline, content = split_think(message.text)
    fields = []
    for reasoning in (message.reasoning, inline):
        if reasoning and (text := reasoning.strip()):
            fields.append(Field(Reason.REASONING, ((text,),), "reasoning"))
    if text := content.strip():
        fields.append(Field(Reason.CONTENT, ((text,),), "content"))
    for i, call in enumerate(message.tool_calls):
        fields.append(Field(Reason.CALL, tuple(_call_pieces(call)), f"tool_calls[{i}]", i))
    return fields


def locate(text: Searched, fields: list[Field], start: int = 0, end: int | None = None) -> Located | Missing:
    """(start, end, reason) of every field in text[start:end], in order, or the first field that is missing.

    Calls may stand before the content: some templates write them so.
    """
    found = _locate_in_order(text, fields, start, end)
    if len(fields) > 1 and isinstance(found, Missing):
        calls_first = sorted(fields, key=lambda field: {Reason.REASONING: 0, Reason.CALL: 1}.get(field.reason, 2))
        if calls_first != fields:
            second = _locate_in_order(text, calls_first, start, end)
            return found if isinstance(second, Missing) else second
    return found


def present(text: Searched, fields: list[Field], start: int = 0, end: int | None = None) -> Located:
    """Those fields that text[start:end] holds, each behind the one before: what a rewriting template still shows."""
    found: Located = []
    for field in fields:
        one = _locate_in_order(text, [field], found[-1][1] if found else start, end)
        if not isinstance(one, Missing):
            found += one
    return found


def needs_proof(field: Field) -> bool:
    """Whether the text of a field is so short that it may occur elsewhere by chance."""
    return field.reason != Reason.CALL and len(field.text) <= SHORT


def marked(field: Field) -> str:
    """What is rendered in a field's stead to see where it stands."""
    return f"\u25c8{field.text}\u25c8"


def proven_place(field: Field, text: str, render_with: Callable[[str], str | None]) -> tuple[int, int] | Missing | None:
    """The place of a short field, shown by rendering another text in its stead; None where that cannot be told.

    `render_with(other)` is the same rendering with the field's text replaced.
    """
    other = render_with(marked(field))
    if other is None:
        return None
    if other == text:
        return Missing(field.name)
    start = common_prefix(text, other)
    if text.startswith(field.text, start) and other.startswith(marked(field), start):
        return start, start + len(field.text)
    return None


def reasons(found: Located, own: str, start: int, end: int, headless: bool) -> list[tuple[int, int, Reason]]:
    """Spans over own[start:end], relative to start: markup around a field takes the reason of what it belongs to."""
    spans: list[tuple[int, int, Reason]] = []
    at = start
    for i, (_, field_end, reason) in enumerate(found):
        field_start = max(found[i][0], at)
        if field_start > at:
            if i == 0:
                first = Reason.HEADER if headless or reason == Reason.CONTENT else reason
                spans.append((at - start, field_start - start, first))
            else:
                spans += _markup(found[i - 1][2], reason, own, (at, field_start), start)
        if field_end > field_start:
            spans.append((field_start - start, field_end - start, reason))
        at = max(at, field_end)
    if end > at:
        last = found[-1][2] if found else Reason.HEADER
        spans.append((at - start, end - start, last))
    return spans


def _markup(
    before: Reason, after: Reason, own: str, place: tuple[int, int], start: int
) -> list[tuple[int, int, Reason]]:
    """Spans for what stands between two fields: a closing tag belongs to what it closes, the rest to calls first."""
    a, b = place
    closing = _CLOSING.match(own, a, b)
    middle = closing.end() if closing and before == Reason.REASONING else a
    rest = after if after == Reason.CALL or middle > a else before
    spans = [(a - start, middle - start, before), (middle - start, b - start, rest)]
    return [span for span in spans if span[1] > span[0]]


def common_prefix(a: str, b: str, known: int = 0) -> int:
    """How many characters two texts have in common at their beginning; so many are `known` to be.

    >>> common_prefix("answer", "answers"), common_prefix("answer", "anger")
    (6, 2)
    """
    high, low, step = min(len(a), len(b)), known, 64
    while low < high and a.startswith(b[low : low + step], low):
        low += step
        step *= 2
    if low >= high:
        return high
    high = min(high, low + step)
    while low < high:
        middle = (low + high + 1) // 2
        if a.startswith(b[low:middle], low):
            low = middle
        else:
            high = middle - 1
    return low


def _locate_in_order(text: Searched, fields: list[Field], start: int, end: int | None) -> Located | Missing:
    found: Located = []
    at = start
    for field in fields:
        begin = behind = -1
        if field.reason is not Reason.CALL:
            begin = text.find(field.text, at, end)
            if begin < 0:
                return Missing(field.name)
            at = begin + len(field.text)
            found.append((begin, at, field.reason))
            continue
        for alternatives in field.pieces:
            place = _first(text, alternatives, at, end)
            if place is None:
                return Missing(field.name)
            begin, behind = (min(begin, place[0]), max(behind, place[1])) if begin >= 0 else place
        found.append((begin, behind, field.reason))
        at = behind
    return found


def _first(text: Searched, alternatives: tuple[str, ...], start: int, end: int | None) -> tuple[int, int] | None:
    at, size = text.find(alternatives[0], start, end), len(alternatives[0])
    for piece in alternatives[1:]:
        # What begins behind the first one found so far need not be found.
        bound = end if at < 0 else at + len(piece)
        other = text.find(piece, start, bound if end is None or bound is None else min(bound, end))
        if other >= 0 and (at < 0 or (other, len(piece)) < (at, size)):
            at, size = other, len(piece)
    return (at, at + size) if at >= 0 else None


def _call_pieces(call: ToolCall) -> Iterator[tuple[str, ...]]:
    yield (call.name,) if _is_plain(call.name) else (call.name, json.dumps(call.name)[1:-1])
    arguments = call.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            yield spellings(arguments.strip())
            return
    for leaf in _leaves(arguments):
        spelled = spellings(leaf)
        if any(spelled):
            yield spelled


def _leaves(value: Any) -> Iterator[Any]:
    if type(value) is str:  # mostly
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def spellings(leaf: Any) -> tuple[str, ...]:
    """A leaf argument as templates write it: raw, JSON-escaped with and without ASCII only, or a Python literal."""
    if isinstance(leaf, str):
        if _is_plain(leaf):
            return (leaf,) if leaf == (bare := leaf.strip()) else (leaf, bare)  # all others are the same
        escaped, ascii_only = json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1]
        # Double encoding: the arguments are a JSON string inside JSON.
        twice = (json.dumps(escaped, ensure_ascii=False)[1:-1], json.dumps(ascii_only)[1:-1])
        return tuple(dict.fromkeys((leaf, leaf.strip(), escaped, ascii_only, repr(leaf)[1:-1], *twice)))
    return (str(leaf),) if type(leaf) is int else tuple(dict.fromkeys((json.dumps(leaf), str(leaf))))


def _is_plain(text: str) -> bool:
    """Whether it is written the same way in whatever notation."""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text
