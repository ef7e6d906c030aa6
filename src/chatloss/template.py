"""A chat template: compiled once, rendered as transformers renders it, and probed for the formats and stops it uses."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateSyntaxError

from chatloss.chat import REASONING_KEYS
from chatloss.errors import ChatlossError, TemplateError
from chatloss.sandbox import Bounds, Exceeded, Sandbox
from chatloss.shapes.recording import Recording
from chatloss.shapes.shapes import Shapes
from chatloss.stops import Stop, control_texts, first_stop, last_stop, next_header
from chatloss.traced import TracedTemplate, Unsupported, World

__all__ = ["ChatTemplate", "Formats"]

Messages = Sequence[Mapping[str, Any]]

# Texts that no template branches on, and that survive stripping, splitting and JSON.
USER, ANSWER, THOUGHT, ARGUMENT, NEXT = "QxUserx1", "QxAnswerx2", "QxThoughtx3", "QxArgumentx4", "QxNextx5"
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "The word."}},
            "required": ["word"],
        },
    },
}
# One pass in so many is checked by rendering alone.
SAMPLE = 256
_PLAIN_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id", "name"))
_ANOTHER = "the template is hostile or broken: give another with --chat-template FILE"


@dataclass(frozen=True, slots=True)
class Formats:
    """How a template wants its input, found by probing. None: it renders that field in no form.

    `content`: "string" or "parts". `arguments`: "object" or "string". `reasoning`: the key it reads.
    """

    content: str | None
    arguments: str | None
    reasoning: str | None


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """One template text, or several by name ("default", "tool_use"), and the special tokens it is rendered with.

    `render` gives the same text as ``transformers.apply_chat_template(..., tokenize=False)``. `clock` is what
    ``strftime_now`` reads. Raises `TemplateError` where the template does not compile, raises, or exceeds `bounds`.
    `render_all` makes many renderings at once, if `trace`; `traced` counts, by whether it could.

    >>> ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}").render(
    ...     [{"role": "user", "content": "hi"}])
    'user: hi\\n'
    """

    source: str | Mapping[str, str]
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    clock: Callable[[], datetime] = datetime.now
    bounds: Bounds = field(default_factory=Bounds)
    trace: bool = True
    traced: Counter[str] = field(default_factory=Counter, repr=False)

    @cached_property
    def _local(self) -> _PerThread:
        return _PerThread(self.clock, self.bounds)

    def select(self, tools: object = None) -> tuple[str, str]:
        """(name, text) of the template that serves a conversation with or without tools, as transformers chooses."""
        if isinstance(self.source, str):
            return "default", self.source
        name = "tool_use" if tools is not None and "tool_use" in self.source else "default"
        if name not in self.source:
            raise TemplateError(
                f"the tokenizer has the templates {', '.join(sorted(self.source))} and none named default",
                hint="choose one with --chat-template FILE",
            )
        return name, self.source[name]

    def render(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, *,
        add_generation_prompt: bool = False, documents: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any,
    ) -> str:
        """The text of `messages`; keyword arguments reach the template and override special tokens."""
        name, text = self.select(tools)
        local = self._local
        if name not in local.compiled:
            local.compiled[name] = self._compile(text)
        local.sandbox.meter.start()
        try:
            return local.compiled[name].render(
                messages=[_aliased(message) for message in messages],
                tools=None if tools is None else list(tools),
                documents=None if documents is None else list(documents),
                add_generation_prompt=add_generation_prompt,
                **{**self.special_tokens, **kwargs},
            )
        except Exceeded as error:
            raise TemplateError(str(error), hint=_ANOTHER, kind="bounds") from None
        except RecursionError:
            raise TemplateError("the template recurses without end", hint=_ANOTHER, kind="bounds") from None
        except MemoryError:
            raise TemplateError("the template ran out of memory", hint=_ANOTHER, kind="bounds") from None
        except Exception as error:  # a stranger's code: whatever it raises is its refusal of this conversation
            raise _refusal(error) from None

    def render_all(
        self, messages: Messages, worlds: Sequence[World], tools: Sequence[Mapping[str, Any]] | None = None,
        known_of: list[int] | None = None, **kwargs: Any,
    ) -> list[str | TemplateError | None]:
        """What `render` gives or raises for each of `worlds`, in one pass; None where that is not proven.

        `known_of` is given for each of them what `TracedTemplate.known` says.

        >>> template = ChatTemplate("{% for m in messages %}{{ m.content }}{{ '.' if loop.last }}{% endfor %}")
        >>> template.render_all([{"content": "a"}, {"content": "b"}], [World(1), World(2)])
        ['a.', 'ab.']
        """
        name, text = self.select(tools)
        if not self.trace or not worlds:
            return [None] * len(worlds)
        passes, shapes = self._local.passes, self._local.shapes
        if name not in passes:
            try:
                passes[name] = TracedTemplate(text, self.clock, self.bounds)
                shapes[name] = Shapes(text, self.clock, self.bounds, self.special_tokens)
            except Unsupported:
                passes.setdefault(name)
                shapes.setdefault(name)
        traced, known = passes[name], shapes[name]
        if traced is None:
            self.traced["rendered alone"] += len(worlds)
            return [None] * len(worlds)
        messages = [_aliased(message) for message in messages]
        worlds = [
            World(one.count, one.prompt, (one.swap[0], _aliased(one.swap[1]))) if one.swap else one for one in worlds
        ]
        made = by_shape = known.render(messages, worlds, tools, kwargs) if known is not None else None
        # What takes long to render alone is compared with the one pass when its shape is new.
        replayed = known is not None and made is not None and not known.together
        if not replayed:
            made = traced.render(
                messages, worlds, tools=None if tools is None else list(tools), documents=None,
                **{**self.special_tokens, **kwargs},
            )
            differing = [both for both in zip(by_shape or (), made, strict=False) if _differ(*both)]
            if any(isinstance(one, str) and isinstance(other, str) for one, other in differing):
                raise _wrong()
            if differing:  # one is wrong about a refusal: the pass's are looked into below
                shapes[name] = None
        else:
            self.traced["of a known shape"] += 1
        assert made is not None
        if known_of is not None:
            known_of += known.known if replayed and known is not None else traced.known
        refusals = {id(one): _refusal(one) for one in made if isinstance(one, Exception)}
        found = [refusals[id(one)] if isinstance(one, Exception) else one for one in made]

        def alone(i: int) -> str | TemplateError:
            try:
                return self.render(worlds[i].of(messages), tools, add_generation_prompt=worlds[i].prompt, **kwargs)
            except TemplateError as error:
                return error

        still = self.clock != datetime.now or "strftime_now" not in text
        whole = replayed and known is not None and known.fresh
        if not self._check(found, alone, still, replayed, whole) and replayed:
            shapes[name] = None
        missing = found.count(None)
        self.traced["rendered alone"] += missing
        self.traced["in one pass"] += len(worlds) - missing
        return found

    def recall(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]] | None = None, **kwargs: Any
    ) -> tuple[Recording, tuple[str, ...]] | None:
        """The recording that `render_all` would use for a conversation, and the texts of its pieces; None if none."""
        shapes = self._local.shapes.get(self.select(tools)[0])
        if shapes is None:
            return None
        own = [
            one if len(one) == 2 and type(one.get("role")) is type(one.get("content")) is str else _aliased(one)
            for one in messages
        ]
        return shapes.recall(own, tools, kwargs)

    def _check(
        self, found: list[str | TemplateError | None], alone: Callable[[int], str | TemplateError], still: bool,
        replayed: bool, whole: bool,
    ) -> bool:
        """Nobody shall have to believe in the one pass: forget refusals, in place, that one of the renderings which
        met them does not meet alone (False then), and once in `SAMPLE` passes compare a text, if time stands `still`.

        What is `whole` is compared whole: the first conversation that a recording was used for. Those that are
        `replayed` later passed guards that lead to the refusals as to the texts, and are sampled for both: there a
        refusal that is wrong is an error, for others before it may have been.
        """
        self.traced["passes"] += 1
        right, sampled = True, self.traced["passes"] % SAMPLE == 1
        refused = {id(one): i for i, one in enumerate(found) if isinstance(one, TemplateError)}
        for i in refused.values() if whole or sampled or not replayed else ():
            refusal, single = found[i], alone(i)
            if str(single) != str(refusal) or isinstance(single, str):
                right, found[:] = False, [None if one is refusal else one for one in found]
        sample = [self.traced["passes"] // SAMPLE % len(found)] if sampled else []
        compared = range(len(found)) if whole else sample
        wrong = still and any(isinstance(found[i], str) and alone(i) != found[i] for i in compared)
        if wrong or (still and replayed and not whole and not right):
            raise _wrong()
        return right

    def _compile(self, text: str) -> Template:
        sandbox = self._local.sandbox
        sandbox.meter.start()
        try:
            return sandbox.from_string(text)
        except TemplateSyntaxError as error:
            raise TemplateError(
                f"the chat template does not compile: {error.message}", where=f"line {error.lineno}", kind="syntax"
            ) from None
        except (JinjaError, RecursionError, MemoryError, ValueError, SyntaxError, OverflowError, TypeError) as error:
            raise TemplateError(f"the chat template does not compile: {_one_line(error)}", kind="syntax") from None

    # -- probes ----------------------------------------------------------------------------------------------------

    def probe(self, *turns: Mapping[str, Any], tools: object = None, parts: bool = False, **kwargs: Any) -> str | None:
        """The text of a user message followed by `turns` (a system message before it if need be); None if refused."""
        wanted = tools if isinstance(tools, list) else None
        for opening in ([], [{"role": "system", "content": "QxSystemx0"}]):
            messages = [*opening, {"role": "user", "content": USER}, *turns]
            if parts:
                messages = [_as_parts(message) for message in messages]
            try:
                return self.render(messages, wanted, **kwargs)
            except TemplateError as error:
                if error.kind != "refused":
                    raise
        return None

    @cached_property
    def formats(self) -> Formats:
        """The content, argument and reasoning formats, each the first of the usual ones that reaches the text."""
        answer = {"role": "assistant", "content": ANSWER}
        content = next(
            (name for name in ("string", "parts")
             if (text := self.probe(answer, parts=name == "parts")) and USER in text and _once(ANSWER, text)), None,
        )
        parts = content == "parts"
        arguments = None
        for name, value in (("object", {"word": ARGUMENT}), ("string", f'{{"word": "{ARGUMENT}"}}')):
            text = self.probe(call_message(value), tools=[TOOL], parts=parts)
            if text and ARGUMENT in text and '\\"word\\"' not in text:
                arguments = name
                break
        reasoning = next(
            (key for key in ("reasoning_content", "reasoning")
             if THOUGHT in (self.probe({**answer, key: THOUGHT}, parts=parts) or "")), None,
        )
        return Formats(content, arguments, reasoning)

    def after_answer(self, *following: Mapping[str, Any]) -> str | None:
        """What the template writes between an answer and `following` (or the end): where its stop is. None: refused."""
        parts = self.formats.content == "parts"
        text = self.probe({"role": "assistant", "content": ANSWER}, *following, parts=parts)
        return _between(text, ANSWER)

    def after_call(self, *following: Mapping[str, Any]) -> str | None:
        """The same for an answer that is a tool call."""
        value: Any = {"word": ARGUMENT} if self.formats.arguments != "string" else f'{{"word": "{ARGUMENT}"}}'
        parts = self.formats.content == "parts"
        text = self.probe(call_message(value), *following, tools=[TOOL], parts=parts)
        return _between(text, ARGUMENT)

    def stops(self, control: Iterable[str] = (), engine_stops: Sequence[str] = ()) -> tuple[Stop, Stop]:
        """(stop of an answer, stop of a call), each with empty texts where the template shows none.

        `control`: the tokenizer's special tokens. `engine_stops`: the texts of the generation config's end ids, then
        the tokenizer's EOS. A stop is the run of control tokens that the template puts after an answer, cut after the
        first that an engine stops at and before a header's; if it ends an answer with nothing, the first control token
        of what comes next.
        """
        known = set(control) | set(engine_stops)
        parts = self.formats.content == "parts"
        shown = self.probe({"role": "assistant", "content": ANSWER}, parts=parts) or ""
        between = shown.partition(ANSWER)[0].rpartition(USER)[2]
        # Behind the user's text stand the end of that turn and then what the answer's header is made of.
        headers = {between[a:b] for a, b in control_texts(between, known)[1:]}
        user, tool = {"role": "user", "content": NEXT}, {"role": "tool", "content": NEXT, "tool_call_id": "call00001"}
        tail, call_tail = self.after_answer(), self.after_call()
        rendered = first_stop(tail, known, engine_stops, headers)
        answer = Stop(rendered, rendered) if rendered else next_header(tail, self.after_answer(user), known)
        rendered = last_stop(call_tail, known, (*engine_stops, answer.text), headers)
        call = Stop(rendered, rendered) if rendered else next_header(call_tail, self.after_call(tool), known)
        return answer, call if call.text else answer


class _PerThread(threading.local):
    """What renders: nothing that counts or keeps values may serve two threads at a time."""

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds) -> None:
        self.sandbox = Sandbox(clock, bounds)
        self.compiled: dict[str, Template] = {}
        self.passes: dict[str, TracedTemplate | None] = {}
        self.shapes: dict[str, Shapes | None] = {}


def call_message(arguments: Any) -> dict[str, Any]:
    call = {"id": "call00001", "type": "function", "function": {"name": "lookup", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _between(text: str | None, before: str) -> str | None:
    if text is None or before not in text:
        return None
    tail = text.rsplit(before, 1)[1]
    return tail.split(NEXT, 1)[0]


def _aliased(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message without null fields, its reasoning under the names that templates read (as transformers aliases)."""
    if type(message) is dict and message.keys() <= _PLAIN_KEYS and None not in message.values():
        return message
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING_KEYS if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _differ(one: str | Exception | None, other: str | Exception | None) -> bool:
    """Whether two ways of rendering give something else."""
    return one is not None and other is not None and (type(one), str(one)) != (type(other), str(other))


def _wrong() -> ChatlossError:
    return ChatlossError(
        "the template rendered in one pass differs from the template rendered alone",
        hint="--no-trace, and please report this template", kind="trace",
    )


def _refusal(error: Exception) -> TemplateError:
    return TemplateError(
        f"the chat template refuses these messages: {_one_line(error)}",
        hint="see `chatloss template` for what it accepts", kind="refused",
    )


def _as_parts(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str):
        return dict(message)
    return {**message, "content": [{"type": "text", "text": content}]}


def _once(needle: str, text: str) -> bool:
    # A template that prints a parts list as Python shows the text too, but inside quotes and braces.
    return needle in text and f"'{needle}'" not in text


def _one_line(error: BaseException) -> str:
    return " ".join(f"{error}".split())[:300] or type(error).__name__
