"""Many renderings of a conversation in one pass: what varies between them, and what each of them wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError

from chatloss.meter import Bounds, Exceeded
from chatloss.traced.expressions import Unsupported
from chatloss.traced.sandbox import TracedSandbox
from chatloss.traced.varied import Facets, Unproven, Varied

__all__ = ["TracedTemplate", "World", "bits", "given_to"]

Message = Mapping[str, Any]


@dataclass(slots=True)
class World:
    """One rendering: of the first `count` messages, with the generation prompt or without.

    `swap`: (index, message) that stands in place of a message.
    """

    count: int
    prompt: bool = False
    swap: tuple[int, Message] | None = None

    def of(self, messages: Sequence[Message]) -> list[Message]:
        """The messages that are rendered."""
        made = list(messages[: self.count])
        if self.swap is not None:
            made[self.swap[0]] = self.swap[1]
        return made


class TracedTemplate:
    """One template text, made ready to render many worlds at once. Raises `Unsupported` where it cannot be.

    Not safe for use by several threads at a time.
    """

    def __init__(self, text: str, clock: Callable[[], datetime], bounds: Bounds) -> None:
        self.why = ""
        self.known: list[int] = []
        self._environment = TracedSandbox(clock, bounds)
        self._environment.meter.start()
        try:
            self._template = self._environment.from_string(text)
        except (JinjaError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, TypeError) as error:
            raise Unsupported(str(error)) from None

    def render(
        self, messages: Sequence[Message], worlds: Sequence[World], **variables: Any
    ) -> list[str | Exception | None]:
        """What `worlds` write or raise; None where that is not proven, and `why` then says what stood in the way.

        `known` has for each a number of characters: two of the texts begin alike through the smaller of theirs.
        """
        environment, run = self._environment, self._environment.worlds
        run.begin(len(worlds))
        environment.meter.start()
        found: list[str | Exception | None] = [None] * len(worlds)
        self.why = ""
        try:
            context = self._template.new_context({**variables, **given_to(messages, worlds)})
            for _ in self._template.root_render_func(context):
                pass
        except (Unproven, Exceeded, RecursionError, MemoryError) as error:
            run.dead, self.why = run.all, f"{type(error).__name__}: {error}"[:200]
        except Exception as error:  # a stranger's code: whatever it raises is its refusal
            run.refused.append((run.mask, error))
            run.dead = run.all
        self.known = [0] * len(worlds)
        longest = max(range(len(worlds)), key=lambda i: (worlds[i].count, worlds[i].swap is None))
        for mask, text, known in run.buffer.texts(run.all & ~run.dead, 1 << longest):
            for i in bits(mask):
                found[i], self.known[i] = text, known
        for mask, raised in run.refused:
            for i in bits(mask):
                found[i] = raised
        return found


def given_to(messages: Sequence[Message], worlds: Sequence[World]) -> dict[str, Any]:
    """What a template is given that varies between worlds."""
    prompts, everyone = sum(1 << i for i, world in enumerate(worlds) if world.prompt), (1 << len(worlds)) - 1
    prompt: Any = prompts != 0
    if prompts not in (0, everyone):
        prompt = Varied([(prompts, True), (everyone ^ prompts, False)])
    return {"messages": _prefixes(messages, worlds), "add_generation_prompt": prompt}


def bits(mask: int) -> Iterator[int]:
    """The numbers of the worlds of a mask."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def _prefixes(messages: Sequence[Message], worlds: Sequence[World]) -> Varied:
    """The list of messages as the worlds have it."""
    sizes: dict[int, int] = {}
    swapped: dict[int, Facets] = {}
    for i, world in enumerate(worlds):
        sizes[world.count] = sizes.get(world.count, 0) | 1 << i
        if world.swap is not None:
            index, other = world.swap
            swapped.setdefault(index, []).append((1 << i, other))
    longer, more = [], 0
    for count in range(max(sizes), 0, -1):
        more |= sizes.get(count, 0)
        longer.append(more)
    longer.reverse()
    size = max(sizes)
    everyone = (1 << len(worlds)) - 1
    items: list[Any] = list(messages[:size])
    for i, others in swapped.items():
        items[i] = Varied([*others, (everyone & ~sum(mask for mask, _ in others), messages[i])])

    def lists() -> Facets:
        return [(1 << i, world.of(messages)) for i, world in enumerate(worlds)]

    return Varied.alike(lists, items, longer, [(mask, count) for count, mask in sizes.items()])
