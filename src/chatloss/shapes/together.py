"""All renderings of a conversation recorded in one pass: values that differ between them, and symbols among these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from jinja2 import Template
from jinja2.runtime import Context

from chatloss.meter import Exceeded
from chatloss.shapes.recorder import MOST, Recorder, Written
from chatloss.shapes.recording import forget
from chatloss.shapes.sandbox import RecordingSandbox
from chatloss.shapes.symbols import Symbol, Unplanned
from chatloss.traced.render import World, bits, given_to
from chatloss.traced.sandbox import TracedSandbox
from chatloss.traced.statements import Generator
from chatloss.traced.varied import Unproven, Varied
from chatloss.traced.worlds import Worlds

__all__ = ["TogetherSandbox", "written_together"]


class _Generator(Generator):
    varies = "in V"


class SymbolWorlds(Worlds):
    """The worlds of one pass in which a value, and each facet of a varied one, may be a symbol."""

    __slots__ = ("recorder",)
    recorder: Recorder

    def begin(self, count: int) -> None:
        super().begin(count)
        self.buffer: Any = SymbolBuffer()

    # -- as the recorder does, for each of the facets ----------------------------------------------------------------

    def name(self, value: Any, name: str, undefined: Callable[..., Any]) -> Any:
        return value if type(value) is Symbol else super().name(value, name, undefined)

    def lift(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if getattr(function, "__name__", "").startswith("t_"):  # the choice of a loop's items
            args = tuple(self._each(self.recorder.items, value) for value in args)
        return super().lift(function, *args, **kwargs)

    def _each(self, function: Callable[[Any], Any], value: Any) -> Any:
        """``function(value)``, or that of each facet of a varied value that is no list of messages."""
        if type(value) is not Varied:
            return function(value)
        return super().lift(function, value) if self._holds_symbols(value) else value

    def _holds_symbols(self, value: Any) -> bool:
        """Whether it is a symbol in any of the worlds."""
        if type(value) is not Varied:
            return type(value) is Symbol
        return value.items is None and any(type(one) is Symbol for _, one in self.seen(value))

    def tested(self, test: Callable[..., bool], *args: Any) -> Any:
        if not any(type(value) is Varied for value in args):
            return self._asked(test, *args)
        if any(map(self._holds_symbols, args)):
            return super().lift(partial(self._asked, test), *args)
        return super().tested(test, *args)

    def _asked(self, test: Callable[..., bool], *args: Any) -> Any:
        return self.recorder.tested(test, *args) if Symbol in map(type, args) else test(*args)

    def negated(self, value: Any) -> Any:
        return not value if type(value) is Symbol else super().negated(value)

    def settled(self, value: Any) -> Any:
        for one in [one for _, one in self.seen(value)] if type(value) is Varied and value.items is None else [value]:
            self.recorder.settled(one)
        return super().settled(value)

    def branches(self, choice: Any, numbered: bool) -> Iterator[Any]:
        if type(choice) is Symbol:
            yield self.recorder.exactly(choice) if numbered else bool(choice)
        else:
            yield from super().branches(choice, numbered)

    def loop(self, values: Any, cost: int, extended: bool, leaving: bool) -> Iterable[Any]:
        return super().loop(self._each(self.recorder.items, values), cost, extended, leaving)

    def unpacked(self, value: Any, count: int) -> tuple[Any, ...]:
        if type(value) is Symbol:
            return self.recorder.unpacked(value, count)
        return super().unpacked(self._each(self.recorder.items, value), count)

    def die(self, mark: tuple[int, int], error: Exception) -> None:
        if isinstance(error, Unplanned):
            raise error  # which ends the recording
        super().die(mark, error)


class SymbolBuffer:
    """What worlds write: texts and symbols, each with the worlds that wrote it."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[tuple[int, list[str | Symbol]]] = []

    def write(self, mask: int, text: str | Symbol) -> None:
        if self.pieces and self.pieces[-1][0] == mask:
            self.pieces[-1][1].append(text)
        else:
            if len(self.pieces) > 4 * MOST:
                raise Unplanned("the renderings take turns too often")
            self.pieces.append((mask, [text]))

    def parts(self, worlds: int, flat: Callable[[list[Any]], list[Any]]) -> list[tuple[int, list[Any]]]:
        """(mask, what they wrote, `flat` and without two texts in a row) of all `worlds`."""
        found: list[tuple[int, list[Any]]] = [(worlds, [])]
        for piece_mask, parts in self.pieces:
            left, more = piece_mask & worlds, flat(parts)
            touched: list[tuple[int, list[Any]]] = []
            at = 0
            while left and at < len(found):
                mask, before = found[at]
                shared = mask & left
                if not shared:
                    at += 1
                    continue
                left ^= shared
                if shared == mask:
                    del found[at]
                else:
                    found[at] = (mask ^ shared, before)
                    before = before[:]
                    at += 1
                if len(before) + len(more) > MOST:
                    raise Unplanned("too many parts of a text")
                if before and more and type(before[-1]) is type(more[0]) is str:
                    before[-1] += more[0]
                    before += more[1:]
                else:
                    before += more
                touched.append((shared, before))
            found[:0] = touched
        return found


class TogetherSandbox(TracedSandbox, RecordingSandbox):
    """A sandbox whose templates render all worlds of a conversation at once, and record what they do with symbols."""

    code_generator_class = _Generator
    varied: Any = frozenset((Varied, Symbol))
    new_buffer: Any = SymbolBuffer
    worlds: Any

    def _new_worlds(self) -> SymbolWorlds:
        made = SymbolWorlds(self.meter.tick)
        made.recorder = self.recorder
        return made

    def show(self, buffer: Any, value: Any) -> None:
        if type(value) is Varied:
            self.worlds.write(buffer, self.worlds.lift(self._as_text, value))
        elif type(value) is Symbol:
            self.worlds.write(buffer, self._as_text(value))
        else:
            super().show(buffer, value)

    def method(self, context: Context, name: str, owner: Any, *args: Any) -> Any:
        kinds = {*map(type, (owner, *args))}
        if Varied in kinds:
            return self.worlds.lift(partial(self.method, context, name), owner, *args)
        return (RecordingSandbox if Symbol in kinds else TracedSandbox).method(self, context, name, owner, *args)

    def joined(self, buffer: Any) -> Any:
        found = buffer.parts(self.worlds.mask, list)
        made = [(mask, self.recorder.joined(parts)) for mask, parts in found]
        return made[0][1] if len(made) == 1 else Varied(made)

    def _joined_texts(self, parts: Any, glue: Any = "") -> str | Symbol | None:
        return None if type(parts) is Varied or type(glue) is Varied else super()._joined_texts(parts, glue)


def written_together(
    sandbox: TogetherSandbox, template: Template, messages: Sequence[Mapping[str, Any]],
    worlds: Sequence[tuple[int, bool]], variables: Mapping[str, Any],
) -> Written:
    """What each of `worlds` of messages with symbols writes, or raises; those of which that is not proven are left out.

    Raises `Unplanned` where another conversation of the shape may be rendered in another way.
    """
    run = sandbox.worlds
    run.begin(len(worlds))
    context = template.new_context({**variables, **given_to(messages, [World(*one) for one in worlds])})
    try:
        return _written(sandbox, template, context, worlds)
    except (Unproven, Exceeded, RecursionError, MemoryError) as error:
        raise Unplanned(str(error)) from None
    finally:
        forget(context)
        run.begin(0)


def _written(
    sandbox: TogetherSandbox, template: Template, context: Context, worlds: Sequence[tuple[int, bool]]
) -> Written:
    run, made = sandbox.worlds, Written()
    try:
        for _ in template.root_render_func(context):
            pass
    except (Unplanned, Unproven, Exceeded, RecursionError, MemoryError):
        raise
    except Exception as error:  # a stranger's code: whatever it raises is its refusal
        run.refused.append((run.mask, error))
        run.dead = run.all
    for mask, parts in run.buffer.parts(run.all & ~run.dead, sandbox.recorder.flat):
        made.update(dict.fromkeys([worlds[i] for i in bits(mask)], tuple(parts)))
    for mask, refusal in run.refused:
        made.update(dict.fromkeys([worlds[i] for i in bits(mask)], refusal))
    return made
