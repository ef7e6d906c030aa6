"""Asking a template what it does: a few readable chats, rendered as the encoder renders every chat."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.findings import Witness, witness
from chatloss.policy import Policy
from chatloss.reference import Rendering
from chatloss.template import TOOL

__all__ = ["Chat", "Probes", "TemplateFinding", "answer", "call", "refusal", "result", "user"]

Chat = Sequence[Mapping[str, Any]]

# Plain sentences that no template branches on, none of them part of another: what a witness shows should be readable.
SYSTEM = "Be brief and kind."
QUESTION, ANSWER, THOUGHT = "Define lumen, please.", "It measures light.", "Recall the unit first."
QUESTION2, ANSWER2, THOUGHT2 = "And what is lux?", "Lumen per square metre.", "Divide by the area."
QUESTION3, ANSWER3 = "Thank you!", "You are welcome."
ARGUMENT, ARGUMENT2, RESULT = "candela", "brightness", "Found 12 entries."
REFUSES = "the chat template refuses these messages: "


@dataclass(frozen=True, slots=True)
class TemplateFinding:
    """One thing that a template does.

    `name` is a stable key and `value` a JSON value for programs; `statement` says it in words. `witness` is the
    shortest rendered text that shows it, `remedy` the flag or edit that changes it, `group` the heading it belongs to.
    """

    group: str
    name: str
    value: Any
    statement: str
    severity: str = "info"
    witness: Witness | None = None
    remedy: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        shown = None if self.witness is None else self.witness.to_dict()
        return {
            "group": self.group, "name": self.name, "value": self.value, "statement": self.statement,
            "severity": self.severity, "witness": shown, "remedy": self.remedy,
        }


def user(text: str = QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str = ANSWER, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(*words: str, content: str = "", **more: Any) -> dict[str, Any]:
    """An answer that calls the probe's tool, once for each of `words`."""
    calls = [
        {"id": f"call0000{i}", "type": "function", "function": {"name": "lookup", "arguments": {"word": word}}}
        for i, word in enumerate(words or (ARGUMENT,), 1)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **more}


def result(text: str = RESULT) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "name": "lookup", "content": text}


def refusal(rendering: Rendering) -> str:
    """The words with which the template refused, without the preamble that every refusal has."""
    words = next(iter(rendering.refused.values()), "")
    return words.removeprefix(REFUSES)


@dataclass(frozen=True, eq=False)
class Probes:
    """An encoder whose policies stop nothing, and the opening that its template needs before a plain chat."""

    encoder: ChatEncoder
    opening: tuple[Mapping[str, Any], ...] = ()

    @classmethod
    def of(cls, encoder: ChatEncoder) -> Probes:
        """Probes of `encoder`; its policy keeps only the formats it forces."""
        kept = encoder.policy
        policy = Policy(
            off_prompt="drop", altered="drop", unrenderable="drop", control_tokens="parity",
            content_format=kept.content_format, tool_arguments=kept.tool_arguments, missing_stop=kept.missing_stop,
        )
        probes = cls(replace(encoder, policy=policy))
        if probes.render([user(), answer()]) is None:
            system = ({"role": "system", "content": SYSTEM},)
            if probes.render([*system, user(), answer()]) is not None:
                return replace(probes, opening=system)
        return probes

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> Probes:
        """The same with further template arguments."""
        merged = {**self.encoder.template_kwargs, **kwargs}
        return replace(self, encoder=replace(self.encoder, template_kwargs=merged))

    def chat(self, *messages: Mapping[str, Any], tools: bool = False) -> Conversation:
        return Conversation.from_messages([*self.opening, *messages], [TOOL] if tools else None)

    def rendering(self, *messages: Mapping[str, Any], tools: bool = False) -> Rendering:
        """The chat behind the opening that this template needs: its first message has index `len(opening)`."""
        return self.encoder.rendering(self.chat(*messages, tools=tools))

    def text(self, *messages: Mapping[str, Any], tools: bool = False) -> str | None:
        """The whole chat rendered, without a generation prompt; None where it is refused."""
        return self.rendering(*messages, tools=tools).text(len(self.opening) + len(messages))

    def render(self, messages: Chat) -> str | None:
        """The messages rendered without any opening."""
        return self.encoder.rendering(Conversation.from_messages(list(messages))).text(len(messages))

    def prompt(self, *messages: Mapping[str, Any]) -> str | None:
        """What an engine holds after the messages, rendered without any opening."""
        return self.encoder.rendering(Conversation.from_messages(list(messages))).text(len(messages), True)


def place(text: str, needle: str, around: int = 28) -> Witness:
    """A witness of the first `needle` in `text`."""
    at = max(0, text.find(needle))
    return witness(text, at, at + len(needle), around)


# Tags that open or close reasoning, whatever a family calls them.
THINKING = re.compile(r"[<\[](?P<close>/?)[^<>\[\]/]{0,24}(?:think|thought|reason)[^<>\[\]]{0,24}[>\]]", re.IGNORECASE)


def thinking_tags(text: str) -> tuple[int, int]:
    """(opening, closing) tags of reasoning in `text`.

    >>> thinking_tags("<think>\\n</think>"), thinking_tags("<|im_start|>assistant\\n")
    ((1, 1), (0, 0))
    """
    closing = [bool(match["close"]) for match in THINKING.finditer(text)]
    return closing.count(False), closing.count(True)
