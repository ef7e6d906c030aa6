"""One rendering with symbols in place of texts: the steps that are taken with them, and the guards that led there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import eq
from typing import Any, NoReturn

from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace

from chatloss.kept import Kept
from chatloss.meter import Exceeded, Meter
from chatloss.shapes.pure import OfTools
from chatloss.shapes.symbols import Once, Pieces, Symbol, Unplanned, holds_symbols

__all__ = ["MOST", "Recorder", "Step", "Written", "told"]

MOST = 4000  # steps of a recording, parts of a text
LARGEST = 256  # parts of a list or dict with symbols in it
_SCALARS = frozenset((str, int, float, bool, type(None)))


# (slot, function, arguments, keyword arguments), or (-1, what it must be, (symbol,), whether only its truth counts)
Step = tuple[int, Any, tuple[Any, ...], Any]
# By world what it writes: texts of the template, and slots of symbols; or what it raises.
Written = dict[tuple[int, bool], "tuple[str | int, ...] | Exception"]


class Recorder:
    """What code of `traced.statements` calls `W`, for one rendering alone whose varying values are symbols.

    `steps` are those of all renderings since `begin`, `written` the symbols that these write, by slot. A step that was
    taken before is not taken again.
    """

    mask = 1  # the one rendering runs

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self._of_tools: dict[Any, OfTools] = {}
        self._kept_of_tools = Kept()
        self.tick = meter.tick
        self.begin()

    def begin(self) -> None:
        self.steps: list[Step] = []
        self.slots = 0
        self._known: dict[Any, Symbol | Exception] = {}
        self._asked: set[tuple[int, bool]] = set()
        self.written: dict[int, Symbol] = {}
        self._kept: list[Any] = []  # what steps are known by the identity of
        self.start()

    def start(self) -> None:
        """Begin another rendering."""
        self.mask = 1
        self.left = [0]
        self.buffer = Text()

    def end(self) -> None:
        """No symbol may be asked for anything from now on; none is kept here."""
        self.start()
        self.slots = -1
        self.steps, self.written, self._known, self._kept = [], {}, {}, []

    # -- symbols ---------------------------------------------------------------------------------------------------

    def leaf(self, value: Any, of_tools: bool = False) -> Symbol:
        """A value that the conversation has, of a type that is its shape's."""
        self.slots += 1
        return Symbol(self, value, self.slots - 1, True, of_tools=of_tools)

    def step(
        self, name: Any, function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None,
        fixed: bool = False,
    ) -> Symbol:
        """``function(*args, **kwargs)``, which depends on nothing else; `name` tells it from other functions."""
        given, named = tuple(map(self.plain_value, args)), {k: self.plain_value(v) for k, v in (kwargs or {}).items()}
        if Once in map(type, (*given, *named.values())) and function is not _gone_through:
            raise Unplanned("an iterator that is used by something else than a loop")
        key = (name, tuple(map(self._key, args)), tuple((k, self._key(v)) for k, v in (kwargs or {}).items()))
        known = self._known.get(key)
        if isinstance(known, Exception):
            raise known
        if known is not None:
            return known
        try:
            value = function(*given, **named)
        except (Unplanned, Exceeded, RecursionError, MemoryError):
            raise
        except Exception as error:  # which every conversation must meet here
            slot = self._next()
            self._add((slot, partial(_raised, function), tuple(args), kwargs))
            self._add((-1, told(error), (Symbol(self, None, slot, False),), False))
            self._known[key] = error
            raise
        if isinstance(value, Iterator) or type(value) is Symbol:
            raise Unplanned("an iterator over what a text holds")
        made = Symbol(self, value, self._next(), fixed, of_tools=_of_tools((*args, *(kwargs or {}).values())))
        self._add((made.slot, function, tuple(args), kwargs))
        self._known[key] = made
        return made

    def step_of_tools(
        self, name: Any, function: Callable[..., str], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Symbol | None:
        """``function(*args, **kwargs)`` as one step, whatever it asks of them; None if they are more than tools."""
        given, named = [*map(self.listed, args)], {key: self.listed(value) for key, value in kwargs.items()}
        values = *given, *named.values()
        if not _of_tools(values) or not all(type(one) is Symbol or _is_plain(one) for one in values):
            return None
        known = self._of_tools.get(name)
        if known is None:
            known = self._of_tools[name] = OfTools(name, function, self.meter, self._kept_of_tools)
        return self.step(name, known, given, named, fixed=True)

    def listed(self, value: Any) -> Any:
        """A list of tools as one value, which is made again in every conversation."""
        whole = type(value) is list and value and all(type(one) is Symbol and one.of_tools for one in value)
        return self.step("listed", _listed, value) if whole else value

    def whole(self, value: Any, left: list[int] | None = None) -> Any:
        """A list or dict with symbols in it as one value, which is made again in every conversation."""
        left = left or [LARGEST]
        left[0] -= 1
        if left[0] < 1:
            raise Unplanned("a text inside of a large value")
        kind = type(value)
        if kind is dict:
            if not all(type(key) is str for key in value):
                raise Unplanned("other keys than texts")
            parts, make = [self.whole(one, left) for one in value.values()], partial(_dict, (*value,))
        elif kind is list or kind is tuple:
            parts, make = [self.whole(one, left) for one in value], partial(_made, kind)
        else:
            return value
        if not any(type(one) is Symbol for one in parts):
            return value
        return self.step(("made", kind, *value) if kind is dict else ("made", kind), make, parts, fixed=True)

    def joined(self, parts: Sequence[str | Symbol]) -> str | Symbol:
        """The sum of texts."""
        flat: Pieces = []
        for part in parts:
            for one in part.parts or (part,) if type(part) is Symbol else (part,):
                if type(one) is str and flat and type(flat[-1]) is str:
                    flat[-1] += one
                elif type(one) is Symbol or one:
                    flat.append(one)
                    if len(flat) > MOST:
                        raise Unplanned("too many parts of a text")
        if all(type(one) is str for one in flat):
            return "".join(flat)  # type: ignore[arg-type]
        if len(flat) == 1:
            return flat[0]
        text = self.summed(*map(self.plain_value, flat))
        return Symbol(self, text, -1, True, flat, of_tools=_of_tools(flat))

    def flat(self, parts: Sequence[str | Symbol]) -> list[str | int]:
        """What is written: texts, and the slots of symbols."""
        whole, found = self.joined(parts), list[str | int]()
        for one in (whole.parts or [whole]) if type(whole) is Symbol else [whole]:
            if isinstance(one, Symbol):
                self.written[one.slot] = one
                found.append(one.slot)
            elif one:
                found.append(one)
        return found

    def summed(self, *texts: str) -> str:
        """The sum of texts, counted: in a recording, and in each replay."""
        self.meter.at_most(sum(map(len, texts)))
        return str(self.meter.spend("".join(texts)))

    def plain_value(self, value: Any) -> Any:
        """What `value` is in the conversation that is recorded."""
        if type(value) is not Symbol:
            return value
        if value.slot < 0:
            value.slot = self._next()
            self._add((value.slot, self.summed, tuple(value.parts or ()), None))
        return value.value

    def _next(self) -> int:
        if self.slots < 0:
            raise Unplanned("the recording is over")
        self.slots += 1
        return self.slots - 1

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        if len(self.steps) > MOST:
            raise Unplanned("too many steps")

    def _key(self, value: Any) -> Any:
        kind = type(value)
        if kind is Symbol:
            return Symbol, value.slot
        if kind in _SCALARS:
            return kind, repr(value) if kind is float else value  # 0.0 is -0.0, and written in another way
        if holds_symbols(value):
            raise Unplanned("a text inside of a value")
        if kind is list or kind is tuple:
            return (kind, *map(self._key, value))
        self._kept.append(value)
        return object, id(value)

    # -- guards ----------------------------------------------------------------------------------------------------

    def truth(self, value: Any) -> bool:
        """Whether `value` is true, as it must be in every conversation."""
        if type(value) is not Symbol:
            return bool(value)
        given = self.plain_value(value)
        if type(given) is Once:
            raise Unplanned("whether there is an iterator")
        found = bool(given)
        self._guard(value, found, True)
        return found

    def equal(self, value: Symbol, other: Any) -> bool:
        """Whether they are equal, as they must be in every conversation, or in none."""
        return self.truth(self.step("==", eq, (value, self.whole(other)), fixed=True))

    def exactly(self, value: Any) -> Any:
        """`value`, which every conversation must have the same of."""
        if type(value) is not Symbol:
            return value
        found = self.plain_value(value)
        if type(found) not in _SCALARS:
            raise Unplanned("a value that is no number")
        self._guard(value, found, False)
        return found

    def _guard(self, value: Symbol, found: Any, only_truth: bool) -> None:
        if self.slots < 0:
            raise Unplanned("the recording is over")
        if (value.slot, only_truth) not in self._asked:
            self._asked.add((value.slot, only_truth))
            self._add((-1, found, (value,), only_truth))

    def items(self, value: Any) -> Any:
        """The items of a symbol, as many in every conversation."""
        if type(value) is not Symbol:
            return value
        whole = self.plain_value(value)
        if type(whole) is Once:
            value = self.step("list", _gone_through, (value,), fixed=True)
            whole = value.value
        if not isinstance(whole, list | tuple | dict | str | type({}.items()) | type({}.keys()) | type({}.values())):
            raise Unplanned("a loop over something unusual")
        listed = self.step("list", list, (value,), fixed=True)
        self.exactly(self.step("len", len, (listed,), fixed=True))
        return [self.step("item", _item, (listed, i)) for i in range(len(listed.value))]

    # -- what the code of templates calls ---------------------------------------------------------------------------

    def name(self, value: Any, name: str, undefined: Any) -> Any:
        return value

    def lift(self, function: Callable[..., Any], *args: Any) -> Any:
        """A test of the sandbox, which records itself, or the choice of a loop's items."""
        if function.__name__ == "<lambda>":
            return self.tested(function, *args)
        return function(*map(self.items, args) if function.__name__.startswith("t_") else args)

    def tested(self, test: Callable[..., bool], *args: Any) -> Any:
        """A comparison, or a test of a type."""
        if "isinstance" in test.__code__.co_names and args[0].fixed:
            return test(args[0].value)
        return self.step(test.__code__, test, args, fixed=True)

    def compared(self, test: Callable[..., bool], operator: str, *args: Any) -> Any:
        return self.tested(test, *args)

    def both(self, left: Any, right: Callable[[], Any]) -> Any:
        return right() if self.truth(left) else left

    def either(self, left: Any, right: Callable[[], Any]) -> Any:
        return left if self.truth(left) else right()

    def cond(self, test: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        return yes() if self.truth(test) else no()

    def negated(self, value: Any) -> bool:
        return not self.truth(value)

    def made(self, kind: Callable[[Iterable[Any]], Any], items: Sequence[Any]) -> Any:
        return kind(map(self.kept, items))

    def made_dict(self, keys: Sequence[Any], values: Sequence[Any]) -> Any:
        return dict(zip(keys, map(self.kept, values), strict=True))

    def kept(self, value: Any) -> Any:
        """`value`, which must not change later: the items of a loop are chosen before it runs."""
        if isinstance(value, LoopContext | Namespace):
            raise Unplanned("what changes is kept")
        return value

    def settled(self, value: Any) -> Any:
        """`value`, which must not be an iterator: another loop would go through it from the beginning."""
        if type(value) is Symbol and type(value.value) is Once:
            raise Unplanned("an iterator is kept")
        return value

    def plain(self, value: Any) -> Any:
        return value

    def put(self, before: Any, value: Any, scope: int) -> Any:
        return value

    def write(self, buffer: Text, text: Any) -> None:
        buffer.write(1, text)

    def branches(self, choice: Any, numbered: bool) -> Iterator[Any]:
        yield self.exactly(choice) if numbered else self.truth(choice)

    def somebody(self) -> None:
        """Always one."""

    def leave(self, whole: bool) -> None:
        """``break`` (`whole`) or ``continue``."""
        self.left[-1] = whole
        self.mask = 0

    def mark(self) -> None:
        """Nothing goes on behind an error."""

    def die(self, mark: None, error: Exception) -> NoReturn:
        raise error

    def loop(self, values: Any, cost: int, extended: bool, leaving: bool) -> Iterable[Any]:
        values = self.meter.each(self.items(values), cost)
        self.left.append(0)
        for item in LoopContext(values, Undefined) if extended else values:
            yield item
            self.mask = 1
            if self.left[-1]:
                break
        self.left.pop()

    def unpacked(self, value: Symbol, count: int) -> tuple[Any, ...]:
        items = self.items(value)
        if len(items) != count:
            raise Unplanned("another number of values to unpack")
        return tuple(items)


class Text:
    """What is written: texts and symbols."""

    __slots__ = ("parts",)

    def __init__(self) -> None:
        self.parts: Pieces = []

    def write(self, mask: int, text: str | Symbol) -> None:
        self.parts.append(text)


def _raised(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return told(error)
    return None


def told(error: Exception) -> str:
    """All that is told of an error."""
    return f"{type(error).__name__}: {error}"


def _listed(*items: Any) -> list[Any]:
    return [*items]


def _made(kind: Callable[[Iterable[Any]], Any], *items: Any) -> Any:
    return kind(items)


def _dict(keys: Sequence[str], *values: Any) -> dict[str, Any]:
    return dict(zip(keys, values, strict=True))


def _gone_through(once: Once) -> list[Any]:
    return once.items


def _of_tools(values: Iterable[Any]) -> bool:
    """Whether the symbols among `values`, if there are any, are all of tools."""
    found = [one.of_tools for one in values if type(one) is Symbol]
    return bool(found) and all(found)


def _is_plain(value: Any) -> bool:
    """Whether it is nothing that varies or changes."""
    return all(type(one) in _SCALARS for one in (value if type(value) is list or type(value) is tuple else (value,)))


def _item(values: Sequence[Any], index: int) -> Any:
    return values[index]
