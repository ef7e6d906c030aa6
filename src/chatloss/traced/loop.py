"""What a template sees as ``loop`` in a loop over a list that renderings have more or less of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2.runtime import Undefined

from chatloss.traced.varied import Varied

if TYPE_CHECKING:
    from chatloss.traced.worlds import Worlds

__all__ = ["Loop"]


class Loop:
    """``loop`` in a loop over a list that worlds have more or less of."""

    __slots__ = ("_items", "_worlds", "index0")

    def __init__(self, worlds: Worlds, items: Varied) -> None:
        self._worlds = worlds
        self._items = items
        self.index0 = -1

    @property
    def index(self) -> int:
        return self.index0 + 1

    @property
    def first(self) -> bool:
        return self.index0 == 0

    @property
    def length(self) -> Any:
        return self._worlds.length(self._items)

    @property
    def last(self) -> Any:
        longer, worlds = self._items.longer, self._worlds
        more = (longer[self.index] if self.index < len(longer) else 0) & worlds.mask
        return not more if more in (0, worlds.mask) else Varied([(more, False), (worlds.mask ^ more, True)])

    @property
    def revindex(self) -> Any:
        return self._worlds.lift(lambda length: length - self.index0, self.length)

    @property
    def revindex0(self) -> Any:
        return self._worlds.lift(lambda length: length - self.index, self.length)

    @property
    def nextitem(self) -> Any:
        return self._worlds.item(self._items, self.index, Undefined("there is no next item"))

    @property
    def previtem(self) -> Any:
        if self.index0 == 0:
            return Undefined("there is no previous item")
        return self._worlds.item(self._items, self.index0 - 1, None)

    @property
    def depth(self) -> int:
        return 1

    @property
    def depth0(self) -> int:
        return 0

    def cycle(self, *values: Any) -> Any:
        return values[self.index0 % len(values)]
