"""The arguments that a template reads besides messages and tools, and which of them brings a lost turn back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from jinja2 import meta, nodes
from jinja2.exceptions import TemplateError as JinjaError

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import TemplateError
from chatloss.sandbox import Bounds, Sandbox

__all__ = ["as_flag", "candidates", "kwargs_read", "remedy_for", "repair"]

# What every render gives to a template, so no user needs to.
GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
# Fields of messages: templates ask whether such a variable is defined, meaning their own.
FIELDS = frozenset(("content", "reasoning_content", "role", "tool_calls"))
_LEVEL = re.compile(r"effort|mode|level|style|type", re.IGNORECASE)
LEVELS = ("none", "low", "medium", "high", "no_think", "nothink", "off", "disabled", "chat", "instruct")
MOST_TRIES = 60


def kwargs_read(source: str | Mapping[str, str]) -> list[str]:
    """Names that a template, or any of several, takes from its caller: what `--template-kwargs` can set.

    Left out are the names that every render sets, special tokens, and variables that the template itself always sets.

    >>> kwargs_read("{% if enable_thinking %}{{ bos_token }}{% set x = 1 %}{% endif %}{{ messages }}{{ x }}")
    ['enable_thinking']
    """
    texts = [source] if isinstance(source, str) else list(source.values())
    sandbox = Sandbox(datetime.now, Bounds())
    found: set[str] = set()
    for text in texts:
        try:
            tree = sandbox.parse(text)
            undeclared = meta.find_undeclared_variables(tree)
        except (JinjaError, RecursionError, MemoryError, ValueError, TypeError):
            continue
        own = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
        # A variable that the template sets too is the caller's only if the template asks whether it is there at all.
        asked = {test.node.name for test in tree.find_all(nodes.Test)
                 if isinstance(test.node, nodes.Name) and test.name in ("defined", "undefined")}
        asked |= {use.node.name for use in tree.find_all(nodes.Filter)
                  if isinstance(use.node, nodes.Name) and use.name in ("default", "d")}
        found |= {name for name in undeclared if name not in own or name in asked}
    known = GIVEN | FIELDS | set(sandbox.globals) | {name for name in found if name.endswith("_token")}
    return sorted(found - known)


def as_flag(kwargs: Mapping[str, Any]) -> str:
    """
    >>> as_flag({"enable_thinking": False})
    '--template-kwargs \\'{"enable_thinking": false}\\''
    """
    return f"--template-kwargs '{json.dumps(dict(kwargs), ensure_ascii=False)}'"


def repair(encoder: ChatEncoder, conversation: Conversation, turns: list[int]) -> dict[str, Any] | None:
    """A template argument with which all of `turns`, now lost, are reachable and no reachable turn is lost; or None."""
    others = [i for i, message in enumerate(conversation.messages) if message.role == "assistant" and i not in turns]
    for kwargs in candidates(encoder):
        if kwargs.items() <= {**encoder.template_kwargs, **conversation.template_kwargs}.items():
            continue
        changed = replace(conversation, template_kwargs={**conversation.template_kwargs, **kwargs})
        try:
            rendering = encoder.rendering(changed)
            if all(rendering.turn(i).outcome == "reachable" for i in turns):
                before = encoder.rendering(conversation)
                held = [i for i in others if before.turn(i).outcome == "reachable"]
                if all(rendering.turn(i).outcome == "reachable" for i in held):
                    return kwargs
        except TemplateError:
            continue
    return None


def remedy_for(encoder: ChatEncoder, conversation: Conversation, turns: list[int]) -> str:
    """What brings lost turns back, as a flag or an edit of the data that was tried and works; "" if nothing does."""
    found = repair(encoder, conversation, turns)
    if found:
        return as_flag(found)
    first, second = (*conversation.messages, None, None)[:2]
    if first is None or second is None or first.role != "system" or second.role != "user":
        return ""
    joined = replace(second, content=f"{first.text}\n\n{second.text}")
    merged = encoder.rendering(replace(conversation, messages=(joined, *conversation.messages[2:])))
    try:
        works = all(merged.turn(i - 1).outcome == "reachable" for i in turns)
    except TemplateError:
        return ""
    return "put the system text into the first user message" if works else ""


def candidates(encoder: ChatEncoder) -> Iterator[dict[str, Any]]:
    """Single template arguments worth trying, those that sound like reasoning first."""
    names = kwargs_read(encoder.template.source)
    # Names of reasoning first: they are what a prompt depends on.
    names.sort(key=lambda name: (not re.search("think|reason", name, re.IGNORECASE), name))
    values: list[dict[str, Any]] = [{name: value} for name in names for value in (False, True)]
    values += [{name: level} for name in names if _LEVEL.search(name) for level in LEVELS]
    yield from values[:MOST_TRIES]
