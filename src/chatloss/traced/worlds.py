"""Values that differ between renderings that run together: what `traced` templates compute with.

A world is one rendering: a list of messages, with or without the generation prompt. All worlds run at once, in one
pass through the template. `Worlds.mask` has a bit for each world that the code at hand runs for. A value that is not
the same in all of them is a `Varied`, and whatever is done with it is done once for each of its values, so that every
world gets what it would have got alone. Where worlds take different branches, the branches run one after the other,
each for its own worlds. What cannot be done so raises `Unproven`: never is one world's value taken for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from jinja2.runtime import LoopContext, Undefined

from chatloss.traced.loop import Backwards, Loop
from chatloss.traced.values import Values
from chatloss.traced.varied import Facets, Unproven, Varied, merged

__all__ = ["Worlds"]

_SIZED = frozenset((list, tuple, str, dict, range, type({}.keys()), type({}.values()), type({}.items())))


class Worlds(Values):
    """The worlds of one traced rendering, with lists that they have more or less of, their branches and their loops."""

    __slots__ = ()

    # -- lists -----------------------------------------------------------------------------------------------------

    def length(self, value: Varied) -> Any:
        """The length of a varied list."""
        return self.lift(len, value) if value.items is None else value.length

    def item(self, value: Varied, index: int, none: Any) -> Any:
        """Item `index`, at least 0, of a varied list that worlds have more or less of; `none` where there is none."""
        if value.items is None:
            return self.lift(lambda items: items[index] if index < len(items) else none, value)
        inside = value.longer[index] & self.mask if index < len(value.items) else 0
        if inside == self.mask:
            return self.see(value.items[index])
        if not inside:
            return none
        entry, self.mask = self.mask, inside
        found = self.see(value.items[index])
        self.mask = entry
        facets = found.facets if type(found) is Varied else [(inside, found)]
        return Varied([*facets, (entry & ~inside, none)])

    def rest(self, value: Varied, start: int) -> Varied:
        """``value[start:]`` of a varied list that worlds have more or less of."""
        assert value.items is not None
        sizes = [(mask, max(size - start, 0)) for mask, size in value.sizes]

        def lists() -> Facets:
            return [(mask, one[start:]) for mask, one in value.facets]

        return Varied.alike(lists, value.items[start:], value.longer[start:], sizes)

    def backwards(self, value: Varied) -> Varied:
        """``value[::-1]`` of a varied list that worlds have more or less of."""
        items, sizes = value.items, value.sizes
        assert items is not None

        def item(i: int) -> Any:
            found: Facets = []
            for mask, size in sizes:
                shared = mask & self.mask
                if shared and size > i:
                    one = items[size - 1 - i]
                    if type(one) is Varied:
                        found += [(m & shared, each) for m, each in one.facets if m & shared]
                    else:
                        found.append((shared, one))
            return merged(found)

        lazy = [self.later(partial(item, i)) for i in range(len(items))]
        lists: Callable[[], Facets] = lambda: [(mask, one[::-1]) for mask, one in value.facets]  # noqa: E731
        return Varied.alike(lists, lazy, value.longer, sizes, reverse=value)

    # -- statements ------------------------------------------------------------------------------------------------

    def branches(self, choice: Varied, numbered: bool) -> Iterator[Any]:
        """The branches that worlds take, one after the other, each run for the worlds that take it."""
        entry = self.mask
        taken: dict[Any, int] = {}
        for mask, value in self.seen(choice):
            value = value if numbered else bool(value)
            taken[value] = taken.get(value, 0) | mask
        for value, mask in taken.items():
            self.mask = mask
            yield value
        self.mask = entry & ~(self.left[-1][0] | self.dead)

    def leave(self, whole: bool) -> None:
        """``break`` (`whole`) or ``continue`` in the worlds that run."""
        left = self.left[-1]
        left[0] |= self.mask
        if whole:
            left[1] |= self.mask
        self.mask = 0

    def loop(self, values: Any, cost: int, extended: bool, leaving: bool) -> Iterable[Any]:
        """What a ``for`` goes through: items, or (item, loop) if `extended`. `leaving`: worlds may leave it early."""
        if type(values) is Varied:
            values = values if values.items is not None else self._as_lists(values)
            self.tick((len(values.longer) + 1) * cost)
            return self._together(values, extended)
        if isinstance(values, list | tuple | dict | str):
            self.tick((len(values) + 1) * cost)
        else:
            values = _counted(values, self.tick, cost)
        items = LoopContext(values, Undefined) if extended else values
        return self._alone(items) if leaving else items

    def _alone(self, items: Iterable[Any]) -> Iterator[Any]:
        entry, left = self.mask, [0, 0]
        self.left.append(left)
        for item in items:
            left[0] = 0
            self.mask = entry & ~(left[1] | self.dead)
            if not self.mask:
                break
            yield item
        self.left.pop()
        self._return_to(entry)

    def _together(self, values: Varied, extended: bool) -> Iterator[Any]:
        """The items of lists that begin alike.

        Of their reverses it takes the items from the last one on, and worlds with shorter lists join later: so that all
        are at the same item, which is another iteration for each.
        """
        loop = Loop(self, values) if values.reverse is None else Backwards(self, values.reverse)
        entry, left = self.mask, [0, 0]
        self.left.append(left)
        items, longer = loop.items.items, loop.items.longer
        assert items is not None
        for i in range(len(items)) if values.reverse is None else reversed(range(len(items))):
            left[0] = 0
            self.mask = entry & longer[i] & ~(left[1] | self.dead)
            if self.mask:
                loop.at = i
                yield (items[i], loop) if extended else items[i]
        self.left.pop()
        self._return_to(entry)

    def _as_lists(self, values: Varied) -> Varied:
        """Varied iterables as varied items."""
        found = self.seen(values)
        if not all(type(one) in _SIZED or isinstance(one, Undefined | Iterator) for _, one in found):
            raise Unproven("a loop over something unusual")
        found = [(mask, one if type(one) is list else list(one)) for mask, one in found]
        longest = max(len(one) for _, one in found)
        items, longer = [], []
        for i in range(longest):
            here = [(mask, one[i]) for mask, one in found if len(one) > i]
            items.append(merged(here))
            longer.append(sum(mask for mask, _ in here))
        return Varied.alike(lambda: found, items, longer, [(mask, len(one)) for mask, one in found])

    def unpacked(self, value: Varied, count: int) -> tuple[Any, ...]:
        """The `count` items of a varied tuple."""
        lists = self._as_lists(value)
        assert lists.items is not None
        if any(size != count for _, size in lists.sizes):
            raise Unproven("worlds unpack different numbers of values")
        return tuple(lists.items)


def _counted(values: Iterable[Any], tick: Callable[[int], None], cost: int) -> Iterator[Any]:
    for value in values:
        tick(cost)
        yield value
