"""What somebody typed into a conversation that looks like a control token, and where that stands in a rendering.

Who wrote a control string is shown, not guessed. What was typed is replaced by letters of the same length (a sentinel)
and the conversation is rendered twice, as it is and with the sentinels. Where putting the typed strings back into the
second text gives the first one character by character, the sentinels are the places that were typed, and all else the
template wrote. All else that is found out about the conversation is found out with its sentinels: none of them is a
stop, and none is the beginning of one.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import orjson

from chatloss.chat import Conversation, Message, ToolCall
from chatloss.fields import spellings
from chatloss.kept import Kept, exact
from chatloss.reference import Rendering, Stops
from chatloss.template import ChatTemplate

__all__ = ["Controls", "Found", "Origin", "Typed", "TypedRendering", "Unproven"]

# Sentinels: letters that few texts hold side by side, and others that have no case for those shorter than a word.
_LETTERS, _RARE = "QXZJVKWG", "".join(map(chr, range(0xA000, 0xA400)))

# Where a text stands: the place that holds it (None: the conversation), and its key there.
_Place = tuple[Any, str | int]
_MESSAGES: _Place = (None, "messages")


class Unproven(Exception):
    """It is not shown which control strings were typed. `respell`: (what, as the template writes it) may show it."""

    def __init__(self, why: str, respell: tuple[Origin, str] | None = None) -> None:
        super().__init__(why)
        self.respell = respell


@dataclass(frozen=True, slots=True)
class Origin:
    """A typed string, and whether it stands in a value that templates write as JSON."""

    text: str
    data: bool


@dataclass(frozen=True, slots=True)
class Found:
    """A control string that somebody typed, in `place`: of a message, or of the tools if `message` is -1."""

    text: str
    message: int
    place: str


class Typed:
    """A conversation with sentinels in place of what was typed; `message`: the first that holds one, or -1.

    `origins` says what each sentinel stands for, `written` what the template makes of that: of the same length.
    """

    def __init__(self, conversation: Conversation, message: int, origins: Mapping[str, Origin],
                 written: Mapping[str, str]) -> None:
        self.conversation, self.message, self.origins, self.written = conversation, message, origins, written
        self.pattern = re.compile(f"({'|'.join(sorted(origins, key=len, reverse=True))})")

    def restored(self, text: str) -> str:
        """A rendered text with what was typed."""
        return self.pattern.sub(lambda match: self.written[match[0]], text)

    def original(self, conversation: Conversation) -> Conversation:
        """The conversation, or a part of it, as it was."""

        def back(text: str, data: bool) -> str:
            return self.pattern.sub(lambda match: self.origins[match[0]].text, text)

        return _changed(conversation, back)

    def prove(self, shown: str | None, wanted: str | None) -> None:
        """Raise `Unproven` unless `shown` is the rendering `wanted` but for what was typed."""
        if shown is None or wanted is None:
            if shown is not wanted:
                raise Unproven("the template refuses other words in its place")
            return
        at = 0
        for i, part in enumerate(self.pattern.split(shown)):
            written = self.written[part] if i % 2 else part
            if not wanted.startswith(written, at):
                origin = self.origins.get(part) if i % 2 else None
                others = [text for text in spellings(origin.text) if wanted.startswith(text, at)] if origin else []
                respell = (origin, others[0]) if origin and others else None
                raise Unproven("the template does something else with other words in its place", respell)
            at += len(written)
        if at != len(wanted):
            raise Unproven("the template does something else with other words in its place")


class Controls:
    """Finds typed control strings, and beginnings of such at the end of a text, which what follows could complete."""

    def __init__(self, texts: Collection[str], avoided: str) -> None:
        """`avoided` holds texts that no sentinel may occur in: the template, and the names of tokens."""
        self._avoided = avoided
        # Templates strip fields, unless that would tear such a text.
        self._trim: Callable[[str], str] = str.strip if all(text == text.strip() for text in texts) else str
        self._starts = tuple(sorted({text[:2] for text in texts}))
        ends = {f'{text[0]}"' for text in texts}  # of strings that what follows may go on with
        self._json_starts = tuple(sorted({orjson.dumps(start).decode()[1:-1] for start in self._starts} | ends))
        self._pattern = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
        self._heads = frozenset(text[:n] for text in texts for n in range(1, len(text)))
        self._firsts = tuple(sorted({text[0] for text in texts}))
        self._reach = max(map(len, self._heads), default=1)
        self._of_tools = Kept()  # whether tools may hold one

    def found(self, conversation: Conversation, arguments: str) -> list[Found]:
        """The first control string of every text, and those put together of texts that follow each other.

        `arguments` as for `typed`. Other keys of messages count if the template names them.
        """
        tools, parse = self._may_hold(conversation.tools), arguments == "object"
        if not tools and self._plainly_none(conversation):
            return []
        for closely in (False, True):
            said = _said(conversation, tools=tools, parse=parse, closely=closely)
            texts = [self._trim(text) for _, text in said]
            together = "".join(texts)
            if not any(start in together for start in self._starts):
                return []
        ends = list(accumulate(map(len, texts)))
        found: dict[tuple[int, int], Found] = {}
        for match in self._pattern.finditer(together):
            first, last = bisect_right(ends, match.start()), bisect_left(ends, match.end())
            paths = [_path(said[i][0]) for i in range(first, last + 1) if texts[i]]
            if (first, last) not in found and all(self._is_shown(path, conversation) for path in paths):
                message = int(paths[0][1]) if paths[0][0] == "messages" else -1
                found[first, last] = Found(match[0], message, " and ".join(map(_name, paths)))
        return list(found.values())

    def _plainly_none(self, conversation: Conversation) -> bool:
        """Whether no text of the messages holds so much as the first character of a control string."""
        shown: list[str] = []
        for one in conversation.messages:
            if type(one.content) is str:
                shown.append(one.content)
            elif one.content is not None:
                return False
            if one.extra:
                return False
            shown += [text for text in (one.reasoning, one.tool_call_id, one.name) if text]
            for call in one.tool_calls:
                given = call.arguments
                if not isinstance(given, str):
                    try:
                        given = orjson.dumps(given).decode()
                    except TypeError:  # integers beyond 64 bits
                        return False
                if "\\" in given:
                    return False  # an escape may be anything
                shown += given, call.name, call.id or ""
        together = "".join(shown)
        return not any(first in together for first in self._firsts)

    def _may_hold(self, tools: Any) -> bool:
        """Whether a closer look may find something: most chats say the same of their tools, at length."""
        if not tools:
            return False
        form = exact(tools)
        known = None if form is None else self._of_tools.texts.get(form)
        if known is None:
            try:
                shown = orjson.dumps(tools).decode()
                known = "yes" if any(start in shown for start in self._json_starts) else "no"
            except TypeError:  # integers beyond 64 bits
                known = "yes"
            if form is not None:
                self._of_tools.keep(form, known)
        return known == "yes"

    def _is_shown(self, path: list[str | int], conversation: Conversation) -> bool:
        """Whether the template may write it: what a row keeps beside its messages is often meant for others."""
        if path[0] != "messages" or path[2] not in conversation.messages[int(path[1])].extra:
            return True
        return str(path[2]) in self._avoided

    def typed(self, conversation: Conversation, arguments: str, spelled: Mapping[Origin, str]) -> Typed | None:
        """The conversation with sentinels; None if there is nothing to replace.

        `arguments` "object": tool arguments given as JSON strings are looked at as objects, as templates see them.
        `spelled` tells how the template writes what it writes in another way than it was typed.
        """
        known: dict[Origin, str] = {}
        haystack: list[str] = []

        def sentinel(text: str, data: bool) -> str:
            origin = Origin(text, data)
            if origin not in known:
                haystack[:] = haystack or [f"{self._avoided}\n{_everything(conversation)}"]
                known[origin] = _sentinel(len(spelled.get(origin, text)), origin, haystack[0], known.values())
            return known[origin]

        def put(text: str, data: bool) -> str:
            if any(start in text for start in self._starts):
                text = self._pattern.sub(lambda match: sentinel(match[0], data), text)
            end = text.rstrip()
            tail = end[-self._reach :]
            for at, char in enumerate(tail) if any(first in tail for first in self._firsts) else ():
                if char in self._firsts and tail[at:] in self._heads:
                    return f"{end[: len(end) - len(tail) + at]}{sentinel(tail[at:], data)}{text[len(end) :]}"
            return text

        changed = _changed(conversation, put, parse=arguments == "object")
        if not known:
            return None
        pairs = zip(conversation.messages, changed.messages, strict=True)
        message = next((i for i, (a, b) in enumerate(pairs) if a is not b), -1)
        origins = {sentinel: origin for origin, sentinel in known.items()}
        return Typed(changed, message, origins, {s: spelled.get(o, o.text) for s, o in origins.items()})


class TypedRendering(Rendering):
    """The rendering of a conversation with sentinels. Raises `Unproven` for texts that do not show what was typed."""

    def __init__(
        self, typed: Typed, template: ChatTemplate, conversation: Conversation, stops: Stops, **options: Any
    ) -> None:
        super().__init__(template, conversation, stops, **options)
        self._typed = typed
        self._plain = Rendering(template, typed.original(conversation), stops, **options)
        self._proven: set[tuple[int, bool]] = set()

    def text(self, count: int, prompt: bool = False) -> str | None:
        shown = super().text(count, prompt)
        if (count, prompt) not in self._proven:
            self._typed.prove(shown, self._plain.text(count, prompt))
            self._proven.add((count, prompt))
        return shown


def _sentinel(size: int, origin: Origin, haystack: str, others: Collection[str]) -> str:
    """Letters that stand nowhere in `haystack`, nor in another sentinel."""
    alphabet = _LETTERS if size > 2 else _RARE
    for attempt in range(2048):
        seed = hashlib.shake_128(f"{origin}{attempt}".encode()).digest(2 * size)
        made = "".join(alphabet[(a << 8 | b) % len(alphabet)] for a, b in zip(seed[::2], seed[1::2], strict=True))
        if made not in haystack and not any(made in other or other in made for other in others):
            return made
    raise Unproven("there are no words that could stand in its place")


def _everything(conversation: Conversation) -> str:
    return str((conversation.messages, conversation.tools))


def _said(conversation: Conversation, *, tools: bool, parse: bool, closely: bool) -> list[tuple[_Place, str]]:
    """All texts of a conversation with their places, those side by side that a template may write side by side.

    Not `closely`: arguments may stay the JSON strings that they are.
    """
    said: list[tuple[_Place, str]] = []
    if tools:
        _data(said, conversation.tools, (None, "tools"))
    for i, one in enumerate(conversation.messages):
        here: _Place = (_MESSAGES, i)
        if one.reasoning:
            said.append(((here, "reasoning_content"), one.reasoning))
        if isinstance(one.content, str):
            said.append(((here, "content"), one.content))
        else:
            for j, part in enumerate(one.content or ()):
                said.append(((((here, "content"), j), "text"), part["text"]))
        for j, call in enumerate(one.tool_calls):
            place = ((here, "tool_calls"), j)
            given, function = call.arguments, (place, "function")
            if call.id:
                said.append(((place, "id"), call.id))
            said.append(((function, "name"), call.name))
            # A JSON string without escapes holds what its parts hold.
            _data(said, _parsed(given) if parse and (closely or "\\" in given) else given, (function, "arguments"))
        if one.tool_call_id or one.name or one.extra:
            _data(said, one.tool_call_id, (here, "tool_call_id"))
            _data(said, one.name, (here, "name"))
            _data(said, one.extra, here)
    return said


def _data(said: list[tuple[_Place, str]], value: Any, place: _Place) -> None:
    """All texts of a JSON value: not a function within `_said`, which would hold itself and all that was said."""
    if isinstance(value, str):
        said.append((place, value))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _data(said, item, (place, key))
        said.extend(((place, key), key) for key in value)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _data(said, item, (place, i))


def _path(place: _Place | None) -> list[str | int]:
    return [] if place is None else [*_path(place[0]), place[1]]


def _name(path: list[str | int]) -> str:
    """``messages[2].content``"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]


def _parsed(arguments: Any) -> Any:
    """Tool arguments as templates that take objects see them."""
    if isinstance(arguments, str):
        try:
            parsed = orjson.loads(arguments)
        except orjson.JSONDecodeError:
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    return arguments


def _changed(
    conversation: Conversation, change: Callable[[str, bool], str], *, parse: bool = False
) -> Conversation:
    """The conversation with all that is said in it changed; `change` is told which texts are data, such as arguments.

    Roles and template arguments are not said by anybody. Messages that stay as they are, stay the same objects.
    """

    def data(value: Any) -> Any:
        if isinstance(value, str):
            return change(value, True)
        if isinstance(value, Mapping):
            made: Any = {data(key): data(item) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            made = type(value)(data(item) for item in value)
        else:
            return value
        return value if made == value else made

    def told(text: str | None) -> str | None:
        return None if text is None else change(text, False)

    def call(one: ToolCall) -> ToolCall:
        arguments = one.arguments
        if parse and isinstance(arguments, str) and data(parsed := _parsed(arguments)) != parsed:
            arguments = parsed
        return replace(one, name=change(one.name, True), arguments=data(arguments), id=told(one.id))

    def message(one: Message) -> Message:
        content = one.content
        if content is not None:
            content = change(content, False) if isinstance(content, str) else tuple(
                {**part, "text": change(part["text"], False)} for part in content)
        if not (one.reasoning or one.tool_calls or one.tool_call_id or one.name or one.extra):
            return one if content == one.content else replace(one, content=content)
        made = replace(
            one, content=content, reasoning=told(one.reasoning), tool_calls=tuple(map(call, one.tool_calls)),
            tool_call_id=told(one.tool_call_id), name=told(one.name), extra=data(one.extra),
        )
        return one if made == one else made

    messages = tuple(map(message, conversation.messages))
    return replace(conversation, messages=messages, tools=data(conversation.tools))
