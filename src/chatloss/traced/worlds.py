"""Values that differ between renderings that run together: what `traced` templates compute with.

A world is one rendering: a list of messages, with or without the generation prompt. All worlds run at once, in one
pass through the template. `Worlds.mask` has a bit for each world that the code at hand runs for. A value that is not
the same in all of them is a `Varied`, and whatever is done with it is done once for each of its values, so that every
world gets what it would have got alone. Where worlds take different branches, the branches run one after the other,
each for its own worlds. What cannot be done so raises `Unproven`: never is one world's value taken for another's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from jinja2.runtime import LoopContext, Undefined
from jinja2.utils import Namespace, missing

from chatloss.meter import Exceeded
from chatloss.traced.loop import Loop
from chatloss.traced.varied import Buffer, Facets, Unproven, Varied, merged

__all__ = ["Worlds"]

_SIZED = frozenset((list, tuple, str, dict, range, type({}.keys()), type({}.values()), type({}.items())))
_ALONE = (Exceeded, RecursionError, MemoryError)


class Worlds:
    """The worlds of one traced rendering: for which of them code runs (`mask`), and how values differ between them.

    `left` has for each loop that runs which worlds have left the current iteration, and which the loop. `dead`: those
    that raised something, or may have; `refused`: what they did raise, where it is known. `spaces`: the namespaces, and
    in which worlds they were made.
    """

    __slots__ = ("all", "buffer", "dead", "left", "mask", "refused", "spaces", "tick")

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.tick = tick
        self.begin(0)

    def begin(self, count: int) -> None:
        """Start with `count` worlds."""
        self.all = self.mask = (1 << count) - 1
        self.dead = 0
        self.left = [[0, 0]]
        self.buffer = Buffer()
        self.spaces: dict[int, tuple[Any, int]] = {}
        self.refused: list[tuple[int, Exception]] = []

    # -- values ----------------------------------------------------------------------------------------------------

    def seen(self, value: Varied) -> Facets:
        """The facets of `value` in the worlds that run."""
        if value.mask == self.mask:
            return value.facets
        if value.lazy is not None:
            made = self._forced(value, value.lazy)
            return self.seen(made) if type(made) is Varied else [(self.mask, made)]
        left, found = self.mask, []
        for mask, one in value.facets:
            shared = mask & left
            if shared:
                found.append((shared, one))
                left ^= shared
                if not left:
                    return found
        raise Unproven("a value is not known in all worlds")

    def _forced(self, value: Varied, lazy: Callable[[], Any]) -> Any:
        """What a lazy value is in the worlds that run."""
        mask, made = value.known
        if mask == self.mask:
            return made
        if self.mask & ~mask:
            made = lazy()
            value.known = self.mask, made
            return made
        return self.see(made)

    def later(self, lazy: Callable[[], Any], whole: bool = False) -> Varied:
        """What `lazy`, which cannot fail, will give in those of the worlds that ask for it."""
        return Varied.later(lazy, self.mask, whole)

    def _everywhere(self, value: Varied) -> Facets:
        """The facets of `value` in all the worlds that have it."""
        if value.lazy is None:
            return value.facets
        entry, self.mask = self.mask, value.born & ~self.dead
        found = self.seen(value)
        self.mask = entry
        return found

    def see(self, value: Any) -> Any:
        """What `value` is in the worlds that run: itself, one of its facets, or fewer of them."""
        if type(value) is not Varied or value.items is not None or value.mask == self.mask:
            return value
        if value.lazy is not None:
            return self._forced(value, value.lazy)
        return merged(self.seen(value))

    def named(self, value: Varied, undefined: Callable[[], Any]) -> Any:
        """`see` for a variable or attribute, which may not be set in some of the worlds."""
        value = self.see(value)
        if type(value) is Varied and value.items is None:
            facets = self.seen(value)
            if any(one is missing for _, one in facets):
                return merged([(mask, undefined() if one is missing else one) for mask, one in facets])
            return value
        return undefined() if value is missing else value

    def name(self, value: Varied, name: str, undefined: Callable[..., Any]) -> Any:
        """`named` for a variable."""
        return self.named(value, partial(undefined, name=name))

    def put(self, before: Any, value: Any, scope: int) -> Any:
        """What was `before` after `value` was assigned to it in the worlds that run; those of `scope` may read it."""
        if self.mask == scope & ~self.dead:
            return value
        facets = self.seen(value) if type(value) is Varied else [(self.mask, value)]
        old = self._everywhere(before) if type(before) is Varied else [(self.all, before)]
        left = ~self.mask
        return merged([*facets, *((m & left, one) for m, one in old if m & left)])

    def lift(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """``function(*args, **kwargs)``, called for each value of the arguments that vary."""
        kinds = [type(value) for value in args]
        if Varied not in kinds:
            if not any(type(value) is Varied for value in kwargs.values()):
                return function(*args, **kwargs)
            names = list(kwargs)
            return self.lift(
                lambda *given: function(*given[len(names) :], **dict(zip(names, given, strict=False))),
                *kwargs.values(), *args,
            )
        entry, depth, found, given = self.mask, len(self.left), [], list(args)
        at, last = kinds.index(Varied), not kwargs and kinds.count(Varied) == 1
        for mask, one in self.seen(args[at]):
            given[at] = one
            self.mask = mask
            try:
                made = function(*given) if last else self.lift(function, *given, **kwargs)
            except Exception as error:
                self.die((mask, depth), error)
                continue
            if type(made) is Varied:
                found += self.seen(made)
            else:
                found.append((self.mask, made))
        self._return_to(entry)
        return merged(found)

    def _return_to(self, entry: int) -> None:
        """Go on with the worlds that ran before, but for those that have died since."""
        self.mask = entry & ~self.dead
        self.somebody()

    def lookup(self, value: Varied, key: str) -> Any:
        """``value[key]`` where that is a dict's in all worlds, else `missing`."""
        found = self.seen(value)
        for _, one in found:
            if type(one) is not dict or key not in one:
                return missing
        return merged([(mask, one[key]) for mask, one in found])

    def plain(self, value: Any) -> Any:
        """`value`, which must be the same in all worlds that run."""
        if type(value) is Varied:
            raise Unproven("a test that differs between renderings")
        return value

    def settled(self, value: Any) -> Any:
        """`value`, which must not be an iterator: what one world takes from it another would miss."""
        for one in [one for _, one in self.seen(value)] if type(value) is Varied else [value]:
            if isinstance(one, Iterator):
                raise Unproven("an iterator is kept")
        return value

    def kept(self, value: Any) -> Any:
        """`value`, which must not be a loop or a namespace: those go on when some worlds have left them."""
        if type(value) in (Loop, LoopContext) or isinstance(value, Namespace):
            raise Unproven("what changes is kept")
        return value

    def write(self, buffer: Buffer, text: Any) -> None:
        """Write `text` to `buffer` in the worlds that run."""
        if type(text) is Varied:
            for mask, value in self.seen(text):
                buffer.write(mask, value)
        else:
            buffer.write(self.mask, text)

    # -- operators -------------------------------------------------------------------------------------------------

    def both(self, left: Any, right: Callable[[], Any]) -> Any:
        """``left and right()``."""
        return self.cond(left, right, lambda: left)

    def either(self, left: Any, right: Callable[[], Any]) -> Any:
        """``left or right()``."""
        return self.cond(left, lambda: left, right)

    def cond(self, test: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """``yes() if test else no()``."""
        if type(test) is not Varied:
            return yes() if test else no()
        entry, depth, found = self.mask, len(self.left), []
        for mask, function in zip(self._sides(test), (yes, no), strict=True):
            if mask:
                self.mask = mask
                try:
                    made = function()
                except Exception as error:
                    self.die((mask, depth), error)
                    continue
                found += self.seen(made) if type(made) is Varied else [(self.mask, made)]
        self._return_to(entry)
        return merged(found)

    def _sides(self, test: Varied) -> tuple[int, int]:
        true = false = 0
        for mask, value in self.seen(test):
            if value:
                true |= mask
            else:
                false |= mask
        return true, false

    def negated(self, value: Varied) -> Any:
        return self.lift(lambda one: not one, value)

    def made(self, kind: Callable[[Iterable[Any]], Any], items: Sequence[Any]) -> Any:
        """A list, tuple or dict (of pairs) of `items`."""
        if not any(type(self.kept(item)) is Varied for item in items):
            return kind(items)
        return self.lift(lambda *plain: kind(plain), *items)

    def made_dict(self, keys: Sequence[Any], values: Sequence[Any]) -> Any:
        for value in values:
            self.kept(value)
        return self.lift(lambda *plain: dict(zip(plain[: len(keys)], plain[len(keys) :], strict=True)), *keys, *values)

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
        return Varied.alike(lambda: [(mask, one[::-1]) for mask, one in value.facets], lazy, value.longer, sizes)

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

    def somebody(self) -> None:
        """Raise if no world runs any more."""
        if not self.mask:
            raise Unproven("no world is left")

    def leave(self, whole: bool) -> None:
        """``break`` (`whole`) or ``continue`` in the worlds that run."""
        left = self.left[-1]
        left[0] |= self.mask
        if whole:
            left[1] |= self.mask
        self.mask = 0

    def mark(self) -> tuple[int, int]:
        """What `die` has to know of the place before something that may fail."""
        return self.mask, len(self.left)

    def die(self, mark: tuple[int, int], error: Exception) -> None:
        """Give the worlds of a mark up: in those that ran, `error` was raised, and what the others do is not known."""
        if isinstance(error, _ALONE):
            raise error
        if not isinstance(error, Unproven):
            self.refused.append((self.mask, error))
        mask, depth = mark
        del self.left[depth:]
        self.dead |= mask
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
        entry, left = self.mask, [0, 0]
        self.left.append(left)
        items, longer, loop = values.items, values.longer, Loop(self, values)
        assert items is not None
        for i, item in enumerate(items):
            left[0] = 0
            self.mask = entry & longer[i] & ~(left[1] | self.dead)
            if self.mask:
                loop.index0 = i
                yield (item, loop) if extended else item
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
