"""All prefixes in one pass through the template: ``python -m benchmarks.one_pass``, about three minutes.

The first table: of all prefixes of a chat, with and without prompt, over all templates of the corpus, how many the one
pass proves, and that those are what rendering alone gives (of long chats every seventh is compared). The second: CPU
time of the one pass beside that of rendering the whole chat once, and beside rendering every prefix alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from tests import assets, conformance
from tests.test_traced import MIXED, SPECIAL, Chat, agent, alone

from chatloss.errors import TemplateError
from chatloss.template import ChatTemplate
from chatloss.traced import World

FAMILIES = ("qwen3", "qwen2.5", "llama3", "gpt-oss", "deepseek-v3")
SHAPES: dict[str, Chat] = {**conformance.SHAPES, "mixed": MIXED, "agent, 200 messages": agent(200)}


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(text, SPECIAL, lambda: conformance.CLOCK)


def prefixes(messages: Sequence[dict[str, Any]]) -> list[World]:
    return [World(count, prompt) for count in range(1, len(messages) + 1) for prompt in (False, True)]


def served(chat: Chat) -> tuple[int, int, int]:
    """(prefixes that are proven, of how many, those that differ from rendering alone) over the corpus."""
    proven = everything = differing = 0
    worlds = prefixes(chat[0])
    for text in assets.templates().values():
        if not isinstance(text, str):
            continue
        template = template_of(text)
        found = template.render_all(chat[0], worlds, chat[1])
        proven, everything = proven + len(found) - found.count(None), everything + len(found)
        for world, one in list(zip(worlds, found, strict=True))[:: 1 if len(worlds) < 50 else 7]:
            if one is not None:
                wanted = alone(template, chat, world)
                differing += str(one) != str(wanted) or type(one) is not type(wanted)
    return proven, everything, differing


def seconds(function: Callable[[], Any]) -> float:
    """CPU seconds of one call, the least of three rounds of a tenth of a second."""
    function()
    best = float("inf")
    for _ in range(3):
        began, done = time.process_time(), 0
        while time.process_time() - began < 0.1:
            function()
            done += 1
        best = min(best, (time.process_time() - began) / done)
    return best


def costs(text: str, chat: Chat) -> tuple[float, float]:
    """(one pass, every prefix alone), in renderings of the whole chat."""
    template, worlds = template_of(text), prefixes(chat[0])

    def each() -> None:
        for world in worlds:
            alone(template, chat, world)

    once = seconds(lambda: template.render(chat[0], chat[1]))
    return seconds(lambda: template.render_all(chat[0], worlds, chat[1])) / once, seconds(each) / once


def main() -> None:
    print("| chat | prefixes proven in one pass | not equal |\n| --- | ---: | ---: |")
    for name, chat in SHAPES.items():
        proven, everything, differing = served(chat)
        print(f"| {name} | {proven:,} of {everything:,} ({proven / everything:.2%}) | {differing} |", flush=True)
    print("\n| template | chat | one pass : one rendering | one by one : one rendering |\n| --- | --- | ---: | ---: |")
    for family in FAMILIES:
        text = (assets.tokenizer_dir(family) / "chat_template.jinja").read_text("utf-8")
        for name, chat in SHAPES.items():
            try:
                template_of(text).render(chat[0], chat[1])
            except TemplateError:
                continue
            one, each = costs(text, chat)
            print(f"| {family} | {name} | {one:.1f} | {each:.0f} |", flush=True)


if __name__ == "__main__":
    main()
