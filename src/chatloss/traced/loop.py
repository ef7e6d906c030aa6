"""What a template sees as ``loop`` in a loop over a list that renderings have more or less of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2.runtime import Undefined

from chatloss.traced.varied import Varied

if TYPE_CHECKING:
    from chatloss.traced.worlds import Worlds

__all__ = ["Backwards", "Loop"]


class Loop:
    """``loop`` in a loop over a list that worlds have more or less of, at item `at`."""

    __slots__ = ("_worlds", "at", "items")

    def __init__(self, worlds: Worlds, items: Varied) -> None:
        self._worlds = worlds
        self.items = items
        self.at = -1

    @property
    def index0(self) -> Any:
        return self.at

    @property
    def index(self) -> Any:
        return self.at + 1

    @property
    def first(self) -> Any:
        return self.at == 0

    @property
    def length(self) -> Any:
        return self._worlds.length(self.items)

    @property
    def last(self) -> Any:
        return self._ends()

    @property
    def revindex0(self) -> Any:
        return self._from_the_end()

    @property
    def revindex(self) -> Any:
        return self._plus_one(self._from_the_end())

    @property
    def nextitem(self) -> Any:
        return self._above(Undefined("there is no next item"))

    @property
    def previtem(self) -> Any:
        return self._below(Undefined("there is no previous item"))

    @property
    def depth(self) -> int:
        return 1

    @property
    def depth0(self) -> int:
        return 0

    def cycle(self, *values: Any) -> Any:
        return self._worlds.lift(lambda index: values[index % len(values)], self.index0)

    def _ends(self) -> Any:
        """Whether the list ends here."""
        longer, worlds, behind = self.items.longer, self._worlds, self.at + 1
        mask = worlds.mask
        more = longer[behind] & mask if behind < len(longer) else 0
        return not more if more in (0, mask) else Varied([(more, False), (mask ^ more, True)], mask)

    def _from_the_end(self) -> Any:
        length = self.length
        return length - self.at - 1 if type(length) is int else Varied.along(length, 1, -self.at - 1)

    def _plus_one(self, index: Any) -> Any:
        return index + 1 if type(index) is int else self._worlds.summed("+", index, 1)

    def _above(self, none: Undefined) -> Any:
        return self._worlds.item(self.items, self.at + 1, none)

    def _below(self, none: Undefined) -> Any:
        return self._worlds.item(self.items, self.at - 1, none) if self.at else none


class Backwards(Loop):
    """``loop`` in a loop that goes through such a list from its end, all worlds being at the same item."""

    __slots__ = ()

    @property
    def index0(self) -> Any:
        return self._from_the_end()

    @property
    def index(self) -> Any:
        return self._plus_one(self._from_the_end())

    @property
    def first(self) -> Any:
        return self._ends()

    @property
    def last(self) -> Any:
        return self.at == 0

    @property
    def revindex0(self) -> Any:
        return self.at

    @property
    def revindex(self) -> Any:
        return self.at + 1

    @property
    def nextitem(self) -> Any:
        return self._below(Undefined("there is no next item"))

    @property
    def previtem(self) -> Any:
        return self._above(Undefined("there is no previous item"))
