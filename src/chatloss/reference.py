"""The spec of a turn, in text: render the history, render the answer last, and see what the model must emit itself.

Every prefix is rendered, so this is quadratic in the number of turns and obviously right. Faster ways are tested
against it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

from chatloss.chat import Conversation, Message
from chatloss.errors import TemplateError
from chatloss.fields import (
    Field,
    Located,
    Missing,
    common_prefix,
    fields_of,
    locate,
    marked,
    needs_proof,
    present,
    proven_place,
    reasons,
)
from chatloss.sample import Reason
from chatloss.stops import Stop
from chatloss.template import ChatTemplate
from chatloss.traced import World

__all__ = ["Rendering", "Stops", "Turn", "View", "engine_message"]

T = TypeVar("T")
_ENDING = re.compile(r"(<\|[^<>|]+\|>|<｜[^<>｜]+｜>)\s*\Z")


@dataclass(frozen=True, slots=True)
class Stops:
    """The texts that end a turn. `texts`: all that may; `answer` and `call`: what is appended where none stands."""

    texts: tuple[str, ...]
    answer: Stop
    call: Stop

    def end(self, text: str, start: int) -> int | None:
        """Where the first stop at or after `start` ends; of two that overlap, the one that ends first."""
        end: int | None = None
        for stop in self.texts:
            at = text.find(stop, start, end)
            if at >= 0:
                end = at + len(stop)
        return end


@dataclass(frozen=True, slots=True)
class Turn:
    """What inference and training say of message `index`.

    `outcome`: "reachable", "off_prompt", "altered" or "unrenderable", with `detail` in words. `prompt` is what the
    engine holds, `target` what the model must emit, through the stop; `spans` are (start, end, reason) over `target`.
    `stop` is "rendered", "appended" or "missing". `trimmed`: the template strips whitespace at the ends of a field.
    `engine_prompt` is what inference holds where that differs from `prompt` (off_prompt only).
    """

    index: int
    outcome: str
    prompt: str = ""
    target: str = ""
    spans: tuple[tuple[int, int, Reason], ...] = ()
    stop: str = "rendered"
    trimmed: bool = False
    detail: str = ""
    engine_prompt: str = ""


def engine_message(message: Message, content: str, arguments: str, reasoning: str) -> dict[str, Any]:
    """The message in the form in which engines hand it to this template.

    `content` "string" joins typed parts, "parts" makes them; `arguments` "object" parses JSON strings, "string" dumps
    objects; `reasoning` is the key the template reads.
    """
    out = message.to_dict()
    if content == "parts" and isinstance(message.content, str):
        out["content"] = [{"type": "text", "text": message.content}]
    elif content == "string" and isinstance(message.content, tuple):
        out["content"] = message.text
    if message.reasoning is not None and reasoning != "reasoning_content":
        out[reasoning] = message.reasoning
    for call in out.get("tool_calls", ()):
        function = call["function"]
        if arguments == "object" and isinstance(function["arguments"], str):
            import orjson

            try:
                parsed = orjson.loads(function["arguments"])
            except orjson.JSONDecodeError:
                continue
            if isinstance(parsed, dict):
                function["arguments"] = parsed
        elif arguments == "string" and not isinstance(function["arguments"], str):
            import json

            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return out


class _Fields(dict[int, list[Field]]):
    """The fields of messages, found when they are asked for."""

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__()
        self._messages = messages

    def __missing__(self, index: int) -> list[Field]:
        found = self[index] = fields_of(self._messages[index])
        return found


class Rendering:
    """One conversation under one template: its prompts and own renderings, each rendered once.

    `messages` are the dicts that the template sees; `refused` keeps the template's words where a text is None.
    """

    def __init__(
        self, template: ChatTemplate, conversation: Conversation, stops: Stops, *, content: str = "string",
        arguments: str = "object", reasoning: str = "reasoning_content", missing_stop: str = "append",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.conversation = conversation
        self.stops = stops
        self.forms = (content, arguments, reasoning)
        self.missing_stop = missing_stop
        self.kwargs = {**(template_kwargs or {}), **conversation.template_kwargs}
        self.refused: dict[tuple[int, bool], str] = {}
        self._texts: dict[tuple[int, bool], str | None] = {}
        self._known: Callable[[int, bool], str | None] | None = None
        self._alike: dict[tuple[int, bool], int] = {}
        self._swapped: list[tuple[int, Message, str | None]] = []
        self._places: dict[tuple[int, int, bool, str, str], tuple[int, int] | Missing | None] = {}
        self._made: dict[Callable[[Rendering], Any], Any] = {}
        self.fields: Mapping[int, list[Field]] = _Fields(conversation.messages)  # of every message, by its index
        text = self.forms[0] != "parts"
        self.messages: list[dict[str, Any]] = [
            {"role": one.role, "content": one.content}  # the usual
            if text and type(one.content) is str and not (one.tool_calls or one.extra)
            and one.reasoning is one.tool_call_id is one.name is None
            else engine_message(one, *self.forms) for one in conversation.messages
        ]

    def text(self, count: int, prompt: bool = False) -> str | None:
        """The first `count` messages rendered, with or without the generation prompt; None where refused."""
        key = (count, prompt)
        if not self._texts and self._known is None:
            self._in_one_pass()
        if key not in self._texts:
            known = self._known(count, prompt) if self._known else None
            self._texts[key] = self._render(self.messages[:count], prompt, key) if known is None else known
        return self._texts[key]

    def give(self, known: Callable[[int, bool], str | None]) -> None:
        """Take renderings of a number of messages, with generation prompt or not, from `known` where it has them."""
        self._known = known

    def alike(self, one: tuple[int, bool], other: tuple[int, bool]) -> int:
        """How many characters two renderings are known to have in common at their beginning."""
        known = self._alike
        return min(known.get(one, 0), known.get(other, 0))

    def _in_one_pass(self) -> None:
        """Make the renderings that are asked for of every conversation, as far as they can be made at once."""
        messages = self.conversation.messages
        if len(messages) < 2:
            return
        worlds = [World(count) for count in range(1, len(messages) + 1)]
        worlds += [World(i, True) for i in range(1, len(messages)) if messages[i].role == "assistant"]
        swaps = []
        for i, message in enumerate(messages):
            for field in self.fields[i] if message.role == "assistant" else ():
                other = with_field(message, field, marked(field)) if needs_proof(field) else None
                if other is not None:
                    swaps.append((i, other))
                    worlds.append(World(i + 1, False, (i, engine_message(other, *self.forms))))
        known: list[int] = []
        made = self.template.render_all(
            self.messages, worlds, self.conversation.tools, known_of=known, **self.kwargs
        )
        for i, (world, one) in enumerate(zip(worlds, made[: len(made) - len(swaps)], strict=False)):
            if one is not None:
                key = world.count, world.prompt
                if isinstance(one, TemplateError):
                    self._texts[key], self.refused[key] = None, one.what
                else:
                    self._texts[key], self._alike[key] = one, known[i] if known else 0
        for (i, other), one in zip(swaps, made[len(made) - len(swaps) :], strict=True):
            if one is not None:
                self._swapped.append((i, other, None if isinstance(one, TemplateError) else one))

    def _render(
        self, messages: Sequence[Mapping[str, Any]], prompt: bool, key: tuple[int, bool] | None = None
    ) -> str | None:
        try:
            return self.template.render(
                messages, self.conversation.tools, add_generation_prompt=prompt, **self.kwargs
            )
        except TemplateError as error:
            if error.kind != "refused":
                raise
            if key is not None:
                self.refused[key] = error.what
            return None

    def render_with(self, index: int, message: Message, count: int, prompt: bool) -> str | None:
        """The first `count` messages, or the prompt of message `count`, with another message at `index`."""
        if count == index + 1 and not prompt:
            for at, other, text in self._swapped:
                if at == index and other == message:
                    return text
        messages = [*self.messages[:index], engine_message(message, *self.forms), *self.messages[index + 1 : count]]
        return self._render(messages, prompt and self.conversation.messages[count].role == "assistant")

    def prompt(self, index: int) -> str | None:
        """What an engine holds before message `index`: an assistant's prompt ends in the generation prompt."""
        return self.text(index, self.conversation.messages[index].role == "assistant")

    def once(self, make: Callable[[Rendering], T]) -> T:
        """What `make` makes of this rendering, made once: what the rows of a conversation have in common."""
        if make not in self._made:
            self._made[make] = make(self)
        return cast(T, self._made[make])

    def turn(self, index: int) -> Turn:
        """The outcome of message `index` as a trained turn."""
        message = self.conversation.messages[index]
        prompt, own = self.prompt(index), self.text(index + 1)
        if prompt is None or own is None:
            assistant = message.role == "assistant"
            why = self.refused.get((index, assistant)) or self.refused.get((index + 1, False), "")
            return Turn(index, "unrenderable", detail=why)
        known = self.alike((index, message.role == "assistant"), (index + 1, False))
        if not own.startswith(prompt[known:], known):
            return self._off_prompt(index, prompt, own)
        found = self._locate(index, own, len(prompt))
        if isinstance(found, Missing):
            target = self._target(index, own, prompt, [], whole=True)
            return replace(target, outcome="altered", detail=f"the rendering lacks the {found.name}")
        return self._target(index, own, prompt, found)

    def _off_prompt(self, index: int, prompt: str, own: str) -> Turn:
        at = common_prefix(prompt, own)
        detail = f"the prompt has {prompt[at : at + 24]!r} where the rendering has {own[at : at + 24]!r}"
        view = View(self, index + 1, False)
        found = view.shown(index, view.last_text(index))
        if not found:
            return Turn(index, "off_prompt", detail=detail, engine_prompt=prompt)
        # What "keep" would train: the fields where they stand, through the stop.
        kept = self._target(index, own, own[: found[0][0]], found)
        return replace(kept, outcome="off_prompt", detail=detail, engine_prompt=prompt)

    def _locate(self, index: int, own: str, start: int) -> Located | Missing:
        fields = self.fields[index]
        if len(fields) == 1 and fields[0].reason is Reason.CONTENT and not needs_proof(fields[0]):
            text = fields[0].text  # the usual: it begins where the prompt ends
            if own.startswith(text, start):
                return [(start, start + len(text), Reason.CONTENT)]
        proven: dict[int, tuple[int, int]] = {}
        for i, field in enumerate(fields):
            if not needs_proof(field):
                continue
            place = View(self, index + 1, False).place(index, field)
            if isinstance(place, Missing):
                return place
            if place is not None and place[0] >= start:
                proven[i] = place
        found = locate(own, fields, start)
        if isinstance(found, Missing) or not proven or len(found) != len(fields):
            return found
        places = list(found)
        for i, place in proven.items():
            if found[i][2] == fields[i].reason:
                places[i] = (*place, fields[i].reason)
        return places if sorted(places) == places else found

    def _target(self, index: int, own: str, prompt: str, found: Located, whole: bool = False) -> Turn:
        """The turn with what its own rendering has behind `prompt` as its target, through its stop."""
        message, start = self.conversation.messages[index], len(prompt)
        fields_end = found[-1][1] if found else (len(own) if whole else start)
        end = self.stops.end(own, max(start, fields_end))
        if whole and end is None:
            end = self.stops.end(own, start)
        # A stop that the template writes only in this place: Apertus ends calls with a token that ends nothing else.
        ending = None if end is not None else _ENDING.search(own, max(start, fields_end))
        stop, kind, stop_start = "", "rendered", end or 0
        if ending is not None:
            stop_start, end = ending.span(1)
        elif end is None:
            known = self.stops.call if message.tool_calls else self.stops.answer
            kind = "appended" if self.missing_stop == "append" and known.text else "missing"
            stop = known.append if kind == "appended" else ""
            fields_end = max(fields_end, start)
            end = stop_start = len(own) if known.flush and stop else self._tail_end(own, fields_end, message)
        else:
            stop_start = end - max([len(stop) for stop in self.stops.texts if own.endswith(stop, 0, end)])
        target = own[start:end] + stop
        spans = reasons(found, own, start, stop_start, headless=self._headless(index))
        if len(target) > stop_start - start:
            spans.append((stop_start - start, len(target), Reason.STOP))
        trimmed = _is_trimmed(message.text, target) or _is_trimmed(message.reasoning or "", target)
        return Turn(index, "reachable", prompt, target, tuple(spans), kind, trimmed)

    def _tail_end(self, own: str, fields_end: int, message: Message) -> int:
        """Where a turn without a rendered stop ends: after its closing markup and the answer's own trailing space."""
        content = message.text
        trailing = content[len(content.rstrip()) :] if not message.tool_calls else ""
        while trailing and not own.startswith(trailing, fields_end):
            trailing = trailing[:-1]
        return max(fields_end + len(trailing), len(own.rstrip()))

    def _headless(self, index: int) -> bool:
        """Whether the generation prompt leaves the header to the model."""
        return self.conversation.messages[index].role != "assistant" or self.text(index) == self.text(index, True)


def _is_trimmed(text: str, target: str) -> bool:
    """Whether a target holds a text without the space at its ends."""
    return (stripped := text.strip()) != text and stripped != "" and text not in target


@dataclass(frozen=True, slots=True)
class View:
    """The first `count` messages rendered, as a prompt or not, and where the text of each of them stands in that.

    A text, or the name of a call, is where another one stands if it is replaced.
    """

    rendering: Rendering
    count: int
    prompt: bool

    @property
    def text(self) -> str:
        made = self.rendering.prompt(self.count) if self.prompt else self.rendering.text(self.count)
        return made or ""

    def place(self, index: int, field: Field) -> tuple[int, int] | Missing | None:
        known, key = self.rendering._places, (index, self.count, self.prompt, field.name, field.text)
        if key not in known:
            known[key] = proven_place(field, self.text, partial(self._with_field, index, field))
        return known[key]

    def shown(self, index: int, start: int) -> Located:
        """The fields of message `index` that can be seen from `start` on."""
        found: Located = []
        for field in self.rendering.fields[index]:
            at = found[-1][1] if found else start
            place = self.place(index, field)
            if place is None or (field.reason == Reason.CALL and not isinstance(place, Missing)):
                at = max(at, place[0]) if place is not None else at
                found += present(self.text, [field], at, self.next_text(index, at))
            elif not isinstance(place, Missing) and place[0] >= at:
                found.append((*place, field.reason))
        return found

    def last_text(self, index: int) -> int:
        """Where the text of the last message before `index` ends that has one."""
        for earlier in reversed(range(index)):
            for field in reversed(self.rendering.fields[earlier]):
                place = self.place(earlier, field)
                if field.reason == Reason.CONTENT and isinstance(place, tuple):
                    return place[1]
        return 0

    def next_text(self, index: int, at: int) -> int:
        """Where behind `at` the text of a message after `index` begins."""
        for later in range(index + 1, self.count):
            for field in self.rendering.fields[later]:
                place = self.place(later, field)
                if isinstance(place, tuple) and place[0] >= at:
                    return place[0]
        return len(self.text)

    def _with_field(self, index: int, field: Field, other: str) -> str | None:
        """The same rendering with one text of message `index` replaced."""
        message = with_field(self.rendering.conversation.messages[index], field, other)
        return None if message is None else self.rendering.render_with(index, message, self.count, self.prompt)


def with_field(message: Message, field: Field, other: str) -> Message | None:
    """The message with one of its texts, or the name of a call, replaced; None for texts that are parts."""
    if field.reason == Reason.REASONING and message.reasoning and message.reasoning.strip() == field.text:
        return replace(message, reasoning=message.reasoning.replace(field.text, other, 1))
    if field.reason == Reason.CONTENT and isinstance(message.content, str):
        head, _, tail = message.content.rpartition(field.text)
        return replace(message, content=f"{head}{other}{tail}")
    if field.reason == Reason.CALL:
        calls = list(message.tool_calls)
        calls[field.call] = replace(calls[field.call], name=other)
        return replace(message, tool_calls=tuple(calls))
    return None
