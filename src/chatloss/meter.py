"""What one render of an untrusted template may use, and the count of what it has used.

What would exceed a bound is refused before it is done, for doing it may already take all time and memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateRuntimeError
from jinja2.utils import Namespace

__all__ = ["Bounds", "Exceeded", "Meter"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one render may use: steps, characters written, bytes of all values built, size of one, width of one format.

    A step is an iteration or a call of code of usual length, or some hundred characters gone through.
    """

    ticks: int = 5_000_000
    output: int = 128_000_000
    built: int = 2_000_000_000
    value: int = 32_000_000
    width: int = 10_000


class Exceeded(TemplateRuntimeError):
    """A bound of the sandbox was hit."""


_DIGITS = re.compile(r"\d{5,}")
_BITS = 1 << 16
_SCALARS = frozenset((int, float, bool, type(None), range))


class Meter:
    """Counts for one render at a time; raises `Exceeded`."""

    __slots__ = ("bounds", "built", "output", "ticks")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.start()

    def start(self) -> None:
        """Begin a render: nothing is spent yet."""
        self.ticks = self.output = self.built = 0

    # -- counting --------------------------------------------------------------------------------------------------

    def tick(self, count: int = 1) -> None:
        self.ticks += count
        if self.ticks > self.bounds.ticks:
            raise Exceeded(f"the template takes more than {self.bounds.ticks:,} steps")

    def write(self, text: str) -> str:
        self.output += len(text)
        if self.output > self.bounds.output:
            raise Exceeded(f"the template writes more than {self.bounds.output:,} characters")
        return text

    def spend(self, value: Any) -> Any:
        """`value`, newly made: its memory is counted."""
        if type(value) is str or isinstance(value, str | bytes):
            self.at_most(len(value))
            self.built += value.__sizeof__()
        elif isinstance(value, list | tuple | dict):
            self.at_most(len(value))
            self.built += 64 * len(value)
        if self.built > self.bounds.built:
            raise Exceeded(f"the template builds values of more than {self.bounds.built:,} bytes")
        return value

    def each(self, iterable: Iterable[Any], cost: int = 1) -> Iterable[Any]:
        """`iterable`, each item counted. Sized inputs stay as they are, so `loop.length` needs no second pass."""
        if type(iterable) is list or isinstance(iterable, list | tuple | dict | str):
            # Counted when the loop starts: a `break` may leave some of them unused, which only errs on the safe side.
            self.tick((len(iterable) + 1) * cost)
            return iterable
        return self._each(iterable, cost)

    def _each(self, iterable: Iterable[Any], cost: int) -> Iterator[Any]:
        for item in iterable:
            self.tick(cost)
            yield item

    # -- measuring -------------------------------------------------------------------------------------------------

    def weighed(self, value: Any) -> Any:
        """`value`, after the steps that reading, comparing or hashing all of it takes."""
        kind = type(value)
        if kind is dict or kind is list:
            self.size(value)
        elif kind is str or isinstance(value, str | bytes):
            self.tick(len(value) >> 8)
        elif isinstance(value, range):
            self.tick(len(value) >> 2)
        elif value is not None and not isinstance(value, int | float):
            self.size(value)
        return value

    def size(self, value: Any) -> int:
        """How much writing `value` out writes: characters, items; a list that holds another twice counts it twice."""
        total, stack = 0, [[value]]
        while stack:
            items = stack.pop()
            self.tick(1 + (len(items) >> 2))
            total += len(items)
            for item in items:
                kind = type(item)
                if kind is str:
                    total += len(item)
                elif kind is list or kind is tuple:
                    stack.append(item)
                elif kind is dict or isinstance(item, Mapping):
                    stack += [[*item.keys()], [*item.values()]]
                elif kind not in _SCALARS:
                    stack.append(self._items(item))
            self.at_most(total)
        return total

    def _items(self, value: Any) -> list[Any]:
        """What is written where an unusual value is."""
        if isinstance(value, str | bytes):
            return [value.decode("latin-1") if isinstance(value, bytes) else str(value)]
        if isinstance(value, Namespace):
            return [value._Namespace__attrs]
        return [*value] if isinstance(value, Collection) else []

    def at_most(self, size: int) -> None:
        if size > self.bounds.value:
            raise Exceeded(f"the template builds a value of more than {self.bounds.value:,} characters or items")

    def narrow(self, form: Any) -> Any:
        """`form`, a format without a width that is too large."""
        text = form.decode("latin-1") if isinstance(form, bytes) else form
        if isinstance(text, str):
            self.tick(len(text) >> 4)
            self.widths(int(digits[:9]) for digits in _DIGITS.findall(text))
        return form

    def widths(self, values: Iterable[Any]) -> None:
        if any(isinstance(value, int) and abs(value) > self.bounds.width for value in values):
            raise Exceeded(f"the template pads or formats wider than {self.bounds.width:,} characters")

    # -- what an operation is about to make ------------------------------------------------------------------------

    def replaced(self, text: Any, old: Any, new: Any) -> None:
        if isinstance(text, str):
            self.at_most(len(text) + self.size(new) * text.count(str(self.weighed(old))))
        elif isinstance(text, bytes) and isinstance(old, bytes):
            self.at_most(len(text) + self.size(new) * text.count(old))

    def joined(self, glue: Any, parts: Iterable[Any]) -> list[Any]:
        """`parts` as a list, small enough to be joined."""
        listed = list(self.each(parts))
        self.at_most(self.size(listed) + self.size(glue) * len(listed))
        return listed

    def formatted(self, form: Any, values: Any) -> None:
        """``form % values``."""
        if isinstance(form, str | bytes):
            text = form.decode("latin-1") if isinstance(form, bytes) else form
            self.narrow(text)
            if "*" in text:
                self.widths(values if isinstance(values, tuple) else ())
            fields = 1 if isinstance(values, tuple) else text.count("%")
            self.at_most(len(text) + fields * self.size(values))

    def translated(self, text: Any, table: Any) -> None:
        if isinstance(table, Mapping):
            self.at_most(len(text) * max((self.size(value) for value in table.values()), default=1))

    def expanded(self, text: Any, size: Any) -> None:
        tab = "\t" if isinstance(text, str) else b"\t"
        if isinstance(size, int):
            self.at_most(len(text) + max(size, 8) * text.count(tab))

    def slow(self, text: str) -> None:
        """What may take the square of its length."""
        self.tick((len(text) >> 2) + (len(text) ** 2 >> 22))

    def summed(self, values: Any) -> None:
        """Adding lists up copies what has been added so far for each of them."""
        lengths = [len(item) for item in values if isinstance(item, list | tuple)]
        self.at_most(sum(lengths))
        self.tick(sum(lengths) * len(lengths) >> 8)

    def operated(self, operator: str, left: Any, right: Any) -> None:
        """``left operator right`` for +, *, ** and %."""
        if operator == "%":
            self.formatted(left, right)
        elif isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            bits = bits * abs(right) if operator == "**" else bits + right.bit_length()
            if operator != "+" and bits > _BITS:
                raise Exceeded("the template computes with numbers of thousands of digits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | bytes | list | tuple) and isinstance(times, int):
                    self.at_most(len(value) * times)
        elif operator == "+" and isinstance(left, Collection) and isinstance(right, Collection):
            self.at_most(len(left) + len(right))
