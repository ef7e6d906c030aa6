"""One pass through a chat template for many renderings of a conversation: all prefixes, with and without prompt.

The template is compiled by jinja's own compiler into code that computes with the values of all renderings at once
(`worlds`). A rendering that comes out is, character for character, what `ChatTemplate.render` gives: every test,
lookup, filter and call is made for each value that renderings differ in, and what cannot be done so is not proven and
left to `render`. Nothing depends on this module but speed: ``--no-trace`` does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, cast

from jinja2 import pass_context
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace, missing

from chatloss.meter import Bounds, Exceeded
from chatloss.sandbox import DICT_METHODS, SHORT, SLICED, SafeNamespace, Sandbox
from chatloss.traced_code import Generator, Unsupported
from chatloss.varied import Buffer, Facets, Unproven, Varied
from chatloss.worlds import Loop, Worlds

__all__ = ["TracedTemplate", "Unsupported", "World"]

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class World:
    """One rendering: of the first `count` messages, with the generation prompt or without.

    `swap`: (index, message) that stands in place of a message.
    """

    count: int
    prompt: bool = False
    swap: tuple[int, Message] | None = None


_STATEFUL = frozenset(("cycler", "joiner", "lipsum"))
_LOOP_VALUES = frozenset(name for name in dir(Loop) if not name.startswith("_"))


class _TracedSandbox(Sandbox):
    """A sandbox in which everything takes varied values."""

    code_generator_class = Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    intercepted_unops = frozenset(["+", "-"])
    varied = Varied
    light = frozenset((int, bool, float, type(None)))
    new_buffer = Buffer

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds) -> None:
        super().__init__(clock, bounds)
        self.worlds = Worlds(self.meter.tick)
        self.filters = {name: self._lifted(function) for name, function in self.filters.items()}
        self.filters[SLICED] = pass_context(partial(self._cut, self.filters[SLICED]))
        for name in ("length", "count"):
            self.filters[name] = partial(self._count, self.filters[name])
        self.filters["random"] = _stateful
        tests: dict[str, Any] = dict(self.tests)
        self.tests |= {name: self._lifted(function) for name, function in tests.items()}
        self.globals |= dict.fromkeys(_STATEFUL, _stateful)

    def _lifted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        worlds = self.worlds

        def lifted(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if type(value) is Varied:
                    return worlds.lift(function, *args, **kwargs)
            return worlds.lift(function, *args, **kwargs) if kwargs else function(*args)

        if hasattr(function, "jinja_pass_arg"):
            lifted.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return lifted

    def _cut(self, sliced: Callable[..., Any], context: Context, value: Any, *limits: Any) -> Any:
        if type(value) is Varied and value.items is not None:
            if limits == (None, None, -1):
                return self.worlds.backwards(value)
            if limits[1:] == (None, None) and type(limits[0]) is int and limits[0] >= 0:
                return self.worlds.rest(value, limits[0])
        return sliced(context, value, *limits)

    def _count(self, length: Callable[..., Any], value: Any) -> Any:
        return self.worlds.length(value) if type(value) is Varied and value.items is not None else length(value)

    def show(self, buffer: Buffer, value: Any) -> None:
        """Write out a value that the template names."""
        if type(value) is Varied:
            value = self.worlds.lift(self._finalize, value)
        elif type(value) is str:
            self.meter.write(value)
        else:
            value = self._finalize(value)
        self.worlds.write(buffer, value)

    def added(self, context: Context, *parts: Any) -> Any:
        """The sum of `parts` from left to right."""
        sizes = [len(part) for part in parts if type(part) is str]
        if len(sizes) == len(parts) and sum(sizes) < SHORT:
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def method(self, context: Context, name: str, owner: Any, *args: Any) -> Any:
        """``owner.name(*args)`` for a method that strings have."""
        if type(owner) is Varied:
            return self.worlds.lift(partial(self.method, context, name), owner, *args)
        if type(owner) is str and len(owner) < SHORT and all(type(one) is str and len(one) < SHORT for one in args):
            self.meter.tick(4)
            return getattr(owner, name)(*args)
        return self.call(context, self.getattr(owner, name), *args)

    def joined(self, buffer: Buffer) -> Any:
        found = buffer.texts(self.worlds.mask)
        return found[0][1] if len(found) == 1 else Varied(found)

    def assign(self, space: Any, name: str, value: Any) -> None:
        """``space.name = value`` in the worlds that run."""
        worlds = self.worlds
        if type(space) is Varied:
            worlds.lift(lambda one: self.assign(one, name, worlds.see(value)), space)
            return
        if not isinstance(space, Namespace):
            raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
        _, born = worlds.spaces[id(space)]
        if worlds.mask != born:
            value = worlds.put(getattr(space, name, missing), value)
        space[name] = value

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is SafeNamespace and not attribute.startswith("_"):
            found = obj._Namespace__attrs.get(attribute, missing)
            if type(found) is Varied:
                return self._known(found)
            if found is not missing:
                return found
        if kind is Varied:
            found = missing if attribute in DICT_METHODS else self.worlds.lookup(obj, attribute)
            return self.worlds.lift(self.getattr, obj, attribute) if found is missing else found
        if kind is Loop:
            if attribute not in _LOOP_VALUES:
                raise Unproven(f"loop.{attribute}")
            return getattr(obj, attribute)
        if kind is LoopContext and attribute == "changed":
            raise Unproven("loop.changed")
        return super().getattr(obj, attribute)

    def _known(self, value: Varied) -> Any:
        """The value of a namespace's attribute."""
        seen = self.worlds.see(value)
        if seen is missing or (type(seen) is Varied and any(one is missing for _, one in self.worlds.seen(seen))):
            raise Unproven("an attribute that is not set in every world")
        return seen

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is Varied or type(argument) is Varied:
            if type(obj) is Varied and obj.items is not None and type(argument) is int and argument >= 0:
                return self.worlds.item(obj, argument, self.undefined(obj=[], name=cast(Any, argument)))
            found = self.worlds.lookup(obj, argument) if type(argument) is str else missing
            return self.worlds.lift(self.getitem, obj, argument) if found is missing else found
        value = super().getitem(obj, argument)
        return self._known(value) if type(value) is Varied else value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        worlds = __self.worlds
        varied = any(type(value) is Varied for value in (__obj, *args, *kwargs.values()))
        if __obj is SafeNamespace and not any(type(value) is Varied for value in args):
            made = super().call(__context, __obj, *args, **kwargs)
            worlds.spaces[id(made)] = made, worlds.mask
            return made
        if varied and type(__obj) is not Macro:
            call = partial(__self.call, __context)
            return worlds.lift(call, __obj, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if type(left) is Varied or type(right) is Varied:
            if operator in "+-" and _whole(left) and _whole(right):
                worlds, function = self.worlds, self.binop_table[operator]
                return worlds.later(lambda: worlds.lift(function, left, right), whole=True)
            return self.worlds.lift(partial(super().call_binop, context, operator), left, right)
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        if type(arg) is Varied:
            return self.worlds.lift(partial(super().call_unop, context, operator), arg)
        return super().call_unop(context, operator, arg)


def _whole(value: Any) -> bool:
    return value.whole if type(value) is Varied else type(value) is int


def _stateful(*args: Any, **kwargs: Any) -> NoReturn:
    raise Unproven("what it gives depends on who was given before")


class TracedTemplate:
    """One template text, made ready to render many worlds at once. Raises `Unsupported` where it cannot be.

    Not safe for use by several threads at a time.
    """

    def __init__(self, text: str, clock: Callable[[], datetime], bounds: Bounds) -> None:
        self.why = ""
        self._environment = _TracedSandbox(clock, bounds)
        self._environment.meter.start()
        try:
            self._template = self._environment.from_string(text)
        except (JinjaError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, TypeError) as error:
            raise Unsupported(str(error)) from None

    def render(
        self, messages: Sequence[Message], worlds: Sequence[World], **variables: Any
    ) -> list[str | Exception | None]:
        """What `worlds` write or raise; None where that is not proven, and `why` then says what stood in the way."""
        environment, run = self._environment, self._environment.worlds
        run.begin(len(worlds))
        environment.meter.start()
        prompts = sum(1 << i for i, world in enumerate(worlds) if world.prompt)
        given = _prefixes(messages, worlds)
        prompt: Any = prompts != 0
        if prompts not in (0, run.all):
            prompt = Varied([(prompts, True), (run.all, False)])
        found: list[str | Exception | None] = [None] * len(worlds)
        self.why = ""
        try:
            context = self._template.new_context({**variables, "messages": given, "add_generation_prompt": prompt})
            for _ in self._template.root_render_func(context):
                pass
        except (Unproven, Exceeded, RecursionError, MemoryError) as error:
            run.dead, self.why = run.all, f"{type(error).__name__}: {error}"[:200]
        except Exception as error:  # a stranger's code: whatever it raises is its refusal
            run.refused.append((run.mask, error))
            run.dead = run.all
        for mask, text in run.buffer.texts(run.all & ~run.dead):
            for i in _bits(mask):
                found[i] = text
        for mask, raised in run.refused:
            for i in _bits(mask):
                found[i] = raised
        return found


def _bits(mask: int) -> Iterator[int]:
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
    items = [
        Varied([*swapped[i], ((1 << len(worlds)) - 1, message)]) if i in swapped else message
        for i, message in enumerate(messages[:size])
    ]

    def lists() -> Facets:
        found: Facets = []
        for i, world in enumerate(worlds):
            if world.swap is not None:
                at, other = world.swap
                found.append((1 << i, [*messages[:at], other, *messages[at + 1 : world.count]]))
        return [*found, *((mask, list(messages[:count])) for count, mask in sizes.items())]

    return Varied.alike(lists, items, longer, [(mask, count) for count, mask in sizes.items()])
