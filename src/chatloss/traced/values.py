"""Values that differ between renderings that run together: reading and assigning them, calling functions with them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import eq, ge, gt, le, lt, ne
from typing import Any

from jinja2.runtime import LoopContext
from jinja2.utils import Namespace, missing

from chatloss.meter import Exceeded
from chatloss.traced.expressions import LIGHT
from chatloss.traced.loop import Backwards, Loop
from chatloss.traced.varied import SCALARS, Buffer, Facets, Unproven, Varied, merged

__all__ = ["Values"]

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<": lt, "<=": le, ">": gt, ">=": ge, "==": eq, "!=": ne,
}
_MIRRORED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "==": "==", "!=": "!="}
_DEEP = 256
_ALONE = (Exceeded, RecursionError, MemoryError)


class Values:
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

    # -- reading ---------------------------------------------------------------------------------------------------

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
        if value.holes:
            return merged([(mask, undefined() if one is missing else one) for mask, one in self.seen(value)])
        return self.see(value)

    def name(self, value: Varied, name: str, undefined: Callable[..., Any]) -> Any:
        """`named` for a variable."""
        return self.named(value, partial(undefined, name=name)) if value.holes else self.see(value)

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

    # -- keeping ---------------------------------------------------------------------------------------------------

    def put(self, before: Any, value: Any, scope: int) -> Any:
        """What was `before` after `value` was assigned to it in the worlds that run; those of `scope` may read it."""
        if self.mask == scope & ~self.dead:
            return value
        if type(value) is int and _is_laid(before) and before.mask & ~self.mask:
            return Varied.over(before, self.mask, value)
        old = self._everywhere(before) if type(before) is Varied else [(self.all, before)]
        left = ~self.mask
        if type(value) is Varied:
            made = merged([*self.seen(value), *((m & left, one) for m, one in old if m & left)])
        else:  # the old values differ already
            kind, mask, others, found = type(value), self.mask, 0, []
            for m, one in old:
                m &= left
                if m:
                    if one is value or (kind in SCALARS and type(one) is kind and one == value):
                        mask |= m
                    else:
                        others |= m
                        found.append((m, one))
            whole = kind is int and (before.whole if type(before) is Varied else type(before) is int)
            made = Varied([(mask, value), *found], mask | others, whole) if found else value
        if type(made) is Varied:
            made.holes = before.holes if type(before) is Varied else before is missing
        return made

    def settled(self, value: Any) -> Any:
        """`value`, which must not be an iterator: what one world takes from it another would miss."""
        for one in [one for _, one in self.seen(value)] if type(value) is Varied else [value]:
            if isinstance(one, Iterator):
                raise Unproven("an iterator is kept")
        return value

    def kept(self, value: Any) -> Any:
        """`value`, which must not be a loop or a namespace: those go on when some worlds have left them."""
        if type(value) in (Loop, Backwards, LoopContext) or isinstance(value, Namespace):
            raise Unproven("what changes is kept")
        return value

    def write(self, buffer: Buffer, text: Any) -> None:
        """Write `text` to `buffer` in the worlds that run."""
        if type(text) is Varied:
            for mask, value in self.seen(text):
                buffer.write(mask, value)
        else:
            buffer.write(self.mask, text)

    # -- computing -------------------------------------------------------------------------------------------------

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

    def tested(self, test: Callable[..., bool], *args: Any) -> Any:
        """`lift` for a test that changes nothing: what it gives is two sets of worlds."""
        kinds = [*map(type, args)]
        if kinds.count(Varied) == 1:
            at, given, sides = kinds.index(Varied), list(args), [0, 0]
            try:
                for mask, one in self.seen(args[at]):
                    given[at] = one
                    sides[test(*given)] |= mask
                return merged([(mask, bool(side)) for side, mask in enumerate(sides) if mask])
            except Exception:  # who it is that fails, and how, is told by `lift`
                pass
        return self.lift(test, *args)

    def compared(self, test: Callable[[Any, Any], bool], operator: str, left: Any, right: Any) -> Any:
        """`tested` for ``left operator right``: integers are compared at once."""
        if type(left) is int and type(right) is Varied and right.whole:
            return self._order(right, _MIRRORED[operator], left)
        if type(right) is int and type(left) is Varied and left.whole:
            return self._order(left, operator, right)
        return self.tested(test, left, right)

    def _order(self, value: Varied, operator: str, number: int) -> Any:
        """Where varied integers are ``operator number``."""
        if value.lazy is not None:
            return self.tested(_OPERATORS[operator], value, number)
        values, masks = value.ordered()
        if self.mask & ~masks[-1]:
            raise Unproven("a value is not known in all worlds")
        below, upto = masks[bisect_left(values, number)], masks[bisect_right(values, number)]
        if operator in ("==", "!="):
            true = upto & ~below
        else:
            true = below if operator in ("<", ">=") else upto
        true &= self.mask
        false = self.mask ^ true
        if operator in ("!=", ">", ">="):
            true, false = false, true
        return true != 0 if not (true and false) else Varied([(true, True), (false, False)], self.mask)

    def weighed(self, weigh: Callable[..., Any], *args: Any) -> Any:
        """`lift` for what only counts its last argument and returns it; numbers and truth weigh nothing."""
        value = args[-1]
        if type(value) is not Varied:
            return weigh(*args)
        if value.whole:
            return value
        if all(type(one) in LIGHT for _, one in self.seen(value)):
            return value
        return self.lift(weigh, *args)

    def summed(self, operator: str, left: Any, right: Any) -> Any:
        """``left + right`` or ``left - right`` of integers."""
        (of, sign, more), (other, more_sign, much) = _line(left), _line(right)
        if operator == "-":
            more_sign, much = -more_sign, -much
        if of is other or of is None or other is None:
            of, sign = other if of is None else of, sign + more_sign
            if not sign:
                return more + much
            if abs(sign) == 1 and of is not None and of.lazy is None:
                return Varied.along(of, sign, more + much)
        function = (lambda a, b: a + b) if operator == "+" else (lambda a, b: a - b)
        return self.later(lambda: self.lift(function, left, right), whole=True)

    def both(self, left: Any, right: Callable[[], Any]) -> Any:
        """``left and right()``."""
        return self.cond(left, right, None)

    def either(self, left: Any, right: Callable[[], Any]) -> Any:
        """``left or right()``."""
        return self.cond(left, None, right)

    def cond(self, test: Any, yes: Callable[[], Any] | None, no: Callable[[], Any] | None) -> Any:
        """``yes() if test else no()``; where there is no such function, it is the value of `test`."""
        if type(test) is not Varied:
            function = yes if test else no
            return test if function is None else function()
        entry, depth, found = self.mask, len(self.left), []
        true = false = 0
        for mask, value in self.seen(test):
            if value:
                true |= mask
            else:
                false |= mask
            if (yes if value else no) is None:
                found.append((mask, value))
        for mask, function in ((true, yes), (false, no)):
            if mask and function is not None:
                self.mask = mask
                try:
                    made = function()
                except Exception as error:
                    self.die((mask, depth), error)
                    continue
                if type(made) is Varied:
                    found += self.seen(made)
                else:
                    found.append((self.mask, made))
        self._return_to(entry)
        return merged(found)

    def negated(self, value: Varied) -> Any:
        return self.tested(lambda one: not one, value)

    def made(self, kind: Callable[[Iterable[Any]], Any], items: Sequence[Any]) -> Any:
        """A list, tuple or dict (of pairs) of `items`."""
        if not any(type(self.kept(item)) is Varied for item in items):
            return kind(items)
        return self.lift(lambda *plain: kind(plain), *items)

    def made_dict(self, keys: Sequence[Any], values: Sequence[Any]) -> Any:
        for value in values:
            self.kept(value)
        return self.lift(lambda *plain: dict(zip(plain[: len(keys)], plain[len(keys) :], strict=True)), *keys, *values)

    # -- failing ---------------------------------------------------------------------------------------------------

    def _return_to(self, entry: int) -> None:
        """Go on with the worlds that ran before, but for those that have died since."""
        self.mask = entry & ~self.dead
        self.somebody()

    def somebody(self) -> None:
        """Raise if no world runs any more."""
        if not self.mask:
            raise Unproven("no world is left")

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


def _is_laid(before: Any) -> bool:
    """Whether integers may be laid over a value: some that vary, of which nobody need know each at once."""
    if type(before) is not Varied or not before.whole or before.lazy is not None or before.mask < 0:
        return False
    return before.under is None or before.under[3] < _DEEP


def _line(value: Any) -> tuple[Varied | None, int, int]:
    """(of, sign, more) of an integer that is ``sign * of + more``; `of` is None where it does not vary."""
    if type(value) is not Varied:
        return None, 0, value
    return value.line or (value, 1, 0)
