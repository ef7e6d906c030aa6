"""What a template writes around every message, learned by rendering probes: how roles can be told in plain ids."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chatloss.encode import ChatEncoder
from chatloss.probes import (
    ANSWER,
    ANSWER2,
    ARGUMENT,
    QUESTION,
    QUESTION2,
    QUESTION3,
    RESULT,
    SYSTEM,
    THINKING,
    Probes,
    answer,
    call,
    result,
    user,
)
from chatloss.stops import control_texts
from chatloss.template import TOOL

__all__ = ["Opener", "Structure"]

_ROLES = {"system": SYSTEM, "user": QUESTION, "tool": RESULT}


@dataclass(frozen=True, slots=True)
class Opener:
    """What stands before an answer. `text`: always. `supplied`: what the prompt adds to it, such as ``<think>\\n``.

    `emitted`: the prompt supplies nothing, so the model writes `text` itself.
    """

    text: str
    supplied: str = ""
    emitted: bool = False


@dataclass(frozen=True, slots=True)
class Structure:
    """The texts by which a template's messages can be told apart.

    `openers` begin an assistant's turn. `headers[role]` and `ends[role]` stand around the text of another role.
    `stops` end a turn; `closers` end it where the template renders it as history, if by anything else.
    A NUL in a header stands for the name of a tool. An empty structure knows nothing.
    """

    openers: tuple[Opener, ...] = ()
    headers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ends: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stops: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()

    @classmethod
    def of(cls, encoder: ChatEncoder) -> Structure:
        """What `encoder`'s template writes, as far as its probes render.

        >>> from chatloss.demo import tokenizer_directory
        >>> found = Structure.of(ChatEncoder.load(tokenizer_directory()))
        >>> found.openers[0].text, found.headers["user"], found.stops
        ('<|im_start|>assistant\\n', ('<|im_start|>user\\n',), ('<|im_end|>',))
        """
        return _Learner(encoder).structure()


class _Learner:
    def __init__(self, encoder: ChatEncoder) -> None:
        self.encoder, self.probes = encoder, Probes.of(encoder)
        self.known = frozenset(encoder.loaded.tokens.special)

    def text(self, messages: Sequence[Mapping[str, Any]], prompt: bool = False) -> str | None:
        tools = any(message.get("tool_calls") for message in messages)
        rendering = self.probes.rendering(*messages, tools=tools)
        return rendering.text(len(self.probes.opening) + len(messages), prompt)

    def structure(self) -> Structure:
        stops = self.encoder.stops.texts
        ends = {role: self.ends(role) for role in _ROLES}
        strip = [*(end for texts in ends.values() for end in texts), *stops]
        closer = self.closer()
        headers = {role: self.headers(role, [*strip, *([closer] if closer else [])]) for role in _ROLES}
        found = dict.fromkeys(filter(None, map(self.opener, self.lead_ins())))
        openers = tuple(sorted(found, key=lambda opener: opener.emitted))
        closers = (closer,) if closer and closer not in stops else ()
        return Structure(openers, headers, ends, stops, closers)

    def lead_ins(self) -> list[tuple[list[dict[str, Any]], str]]:
        """Chats that an answer follows, with the last text in each."""
        return [
            ([user()], QUESTION), ([user(), answer(), user(QUESTION2)], QUESTION2), ([user(), call(), result()], RESULT)
        ]

    def opener(self, lead_in: tuple[list[dict[str, Any]], str]) -> Opener | None:
        """What of the prompt behind the last text comes before every answer."""
        messages, last = lead_in
        plain, prompt = _after(self.text(messages), last), _after(self.text(messages, True), last)
        follow = _before(_after(self.text([*messages, answer(ANSWER2)]), last), ANSWER2)
        history = _before(_after(self.text([*messages, answer(ANSWER2), user(QUESTION3)]), last), ANSWER2)
        texts = [text for text in (prompt, follow, history) if text is not None]
        if plain is None or not texts:
            return None
        shared = os.path.commonprefix(texts)  # noqa: RUF071 (texts, not paths)
        thinking = THINKING.search(shared)
        shared = shared[: thinking.start()] if thinking else shared
        supplied = (prompt or "")[len(shared) :]
        if shared.startswith(plain) and _names(shared[len(plain) :]):
            return Opener(shared[len(plain) :], supplied)
        written = (follow or "").removeprefix(plain)
        if follow is not None and follow.startswith(plain) and _names(written):
            thinking = THINKING.search(written)
            return Opener(written[: thinking.start()] if thinking else written, emitted=True)
        text = _from_control(shared, self.known)  # [/INST] ends the question and begins the answer
        return Opener(text, supplied) if text.strip() else None

    def ends(self, role: str) -> tuple[str, ...]:
        """What stands behind a role's text when it comes last."""
        found = {
            "system": lambda: _between(self.text([_system(), user(), answer()]), SYSTEM, QUESTION),
            "user": lambda: _after(self.text([user()]), QUESTION),
            "tool": lambda: _after(self.text([user(), call(), result()]), RESULT),
        }[role]()
        if role == "system":
            found = _before_header(found or "", self.known)
        return (found,) if found and found.strip() else ()

    def headers(self, role: str, ends: Sequence[str]) -> tuple[str, ...]:
        """What stands before a role's text, whatever comes before it."""
        if role == "system":
            text = _before(self.text([_system(), user(), answer()]), SYSTEM)
            found = _first_lines(_last_run(text or "", self.known))
            return _kept(found) if found.strip() != self.encoder.loaded.special_tokens.get("bos_token") else ()
        if role == "tool":
            text = _between(self.text([user(), call(), result(), answer()]), ARGUMENT, RESULT)
            tail = _after(self.text([user(), call()]), ARGUMENT)
            if text is not None and tail:
                shared = os.path.commonprefix([text, tail])  # noqa: RUF071
                text = text[len(shared) :] if shared == tail else text
            return _kept(_core(_stripped(_from_control(text or "", self.known), ends), self.known))
        start = _before(self.text([user(), answer()]), QUESTION)
        later = _between(self.text([user(), answer(), user(QUESTION2), answer(ANSWER2)]), ANSWER, QUESTION2)
        texts = [text for text in (start, later) if text is not None]
        shared = os.path.commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071
        return _kept(_stripped(_from_control(shared, self.known), ends))

    def closer(self) -> str:
        """What ends an answer that another message follows."""
        text = _between(self.text([user(), answer(), user(QUESTION2), answer(ANSWER2)]), ANSWER, QUESTION2)
        spans = control_texts(text or "", self.known)
        return (text or "")[slice(*spans[0])] if len(spans) > 1 else ""


def _system() -> dict[str, Any]:
    return {"role": "system", "content": SYSTEM}


def _after(text: str | None, needle: str) -> str | None:
    return text.rpartition(needle)[2] if text is not None and needle in text else None


def _before(text: str | None, needle: str) -> str | None:
    return text.partition(needle)[0] if text is not None and needle in text else None


def _between(text: str | None, a: str, b: str) -> str | None:
    return _before(_after(text, a), b)


def _names(text: str) -> bool:
    return any(char.isalnum() for char in text)


def _from_control(text: str, known: Iterable[str]) -> str:
    """`text` from its first control token on; all of it where there is none."""
    spans = control_texts(text, known, inner=True)
    return text[spans[0][0] :] if spans else text


def _before_header(text: str, known: Iterable[str]) -> str:
    """What of `text` between two messages ends the first: all before the second control token; else nothing is sure."""
    spans = control_texts(text, known)
    return text[: spans[1][0]] if len(spans) > 1 else ""


def _last_run(text: str, known: Iterable[str]) -> str:
    """The first header in what opens a text, without BOS: ``<|im_start|>system\\n``."""
    spans = control_texts(text, known)
    if not spans:
        return text
    start = spans[-1][0]
    for a, b in reversed(spans[:-1]):  # <|start_header_id|>system<|end_header_id|> is one header
        between = text[b:start]
        if not between or not re.fullmatch(r"\w+", between):
            break
        start = a
    return text[start:]


def _first_lines(text: str) -> str:
    """A header without what the template writes below it: dates, default instructions."""
    found = re.match(r".*(?:[>\]|](?=\n|\s*\Z)|\n)\n*|.*", text)
    return found[0] if found else text


def _core(text: str, known: Iterable[str]) -> str:
    """A header without quotes or keys that a template writes around some texts and not around others."""
    spans = control_texts(text, known, inner=True)
    if not spans:
        return text
    found = re.compile(r"[\w ]*\n*").match(text, spans[-1][1])
    return text[: found.end()] if found else text


def _stripped(text: str, ends: Sequence[str]) -> str:
    """Without the end of the message before."""
    for end in sorted(ends, key=len, reverse=True):
        for form in (end, end.strip()):
            if form and text.startswith(form) and len(text) > len(form):
                return text[len(form) :].lstrip("\n") if form != end else text[len(form) :]
    return text


def _kept(text: str) -> tuple[str, ...]:
    return (text.replace(TOOL["function"]["name"], "\0"),) if text.strip() else ()  # type: ignore[index]
