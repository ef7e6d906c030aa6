"""A value that differs between renderings that run together, and text that some of them write.

A set of renderings is an integer with a bit for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["MOST", "SCALARS", "Buffer", "Facets", "Unproven", "Varied", "merged"]

Facets = list[tuple[int, Any]]
MOST = 200_000  # of anything that is kept until the pass ends, and would not be by one rendering
SCALARS = frozenset((str, int, bool, type(None)))  # equal ones are written alike; 0.0 and -0.0 are not


class Unproven(Exception):
    """Something that is not known to give every world what it would get alone."""


class Varied:
    """A value by worlds: `facets` are (mask, value), whose masks are apart.

    If `items` is not None the values are lists that begin alike: item `i` is ``items[i]`` in the worlds of
    ``longer[i]``, and the others have no such item; `sizes` are their lengths by world, `length` their length as a
    value. `items` may be varied themselves. `reverse` is what the lists are the reverse of, if of anything. If `lazy`
    is not None it gives the value in the worlds that run, of those in `born`; `known` is what it gave. `whole`: all
    values are integers, and if `line` is (of, sign, more) they are ``sign * of + more``; `order`: see `ordered`. If
    `under` is (before, mask, value, depth) it is `value` in the worlds of `mask` and else what `before` is.
    `mask`: the worlds of all facets (-1: not known). `holes`: some worlds have no value, but `missing`.
    """

    __slots__ = (
        "_facets", "_make", "born", "holes", "items", "known", "lazy", "length", "line", "longer", "mask", "order",
        "reverse", "sizes", "under", "whole",
    )
    _facets: Facets | None
    _make: Callable[[], Facets]
    items: list[Any] | None
    reverse: Varied | None
    lazy: Callable[[], Any] | None
    born: int
    known: tuple[int, Any]
    line: tuple[Varied, int, int] | None
    longer: Sequence[int]
    length: Any
    order: tuple[list[int], list[int]] | None
    sizes: Facets
    under: tuple[Varied, int, int, int] | None

    def __init__(self, facets: Facets | None, mask: int = -1, whole: bool = False) -> None:
        self._facets = facets
        self.mask = mask
        self.whole = whole
        self.holes = False
        self.items = self.lazy = self.line = self.order = self.under = None

    @classmethod
    def alike(
        cls, make: Callable[[], Facets], items: list[Any], longer: Sequence[int], sizes: Facets,
        reverse: Varied | None = None,
    ) -> Varied:
        """Lists that begin alike; `make` gives them one by one, should anybody ask for that."""
        value = cls([])
        value._facets, value._make = None, make
        value.items, value.longer, value.sizes, value.reverse = items, longer, sizes, reverse
        value.length = sizes[0][1] if len(sizes) == 1 else cls(sizes, sum(mask for mask, _ in sizes), whole=True)
        return value

    @classmethod
    def later(cls, lazy: Callable[[], Any], born: int, whole: bool) -> Varied:
        """What `lazy` gives, in those of the worlds `born` that will ask for it."""
        value = cls([], whole=whole)
        value.lazy, value.born, value.known = lazy, born, (0, None)
        return value

    @classmethod
    def along(cls, of: Varied, sign: int, more: int) -> Varied:
        """``sign * of + more`` of integers, `sign` being 1 or -1."""
        value = cls(None, of.mask, True)
        value.line = of, sign, more
        return value

    @classmethod
    def over(cls, before: Varied, mask: int, number: int) -> Varied:
        """`number` in the worlds of `mask`, what `before` is in others: integers, gone through when they are read."""
        value = cls(None, before.mask | mask, True)
        value.under = before, mask, number, before.under[3] + 1 if before.under else 1
        return value

    def _laid(self) -> Facets:
        """Its facets from what was laid over what."""
        found: dict[int, int] = {}
        one, left = self, self.mask
        while one.under is not None:
            one, mask, number, _ = one.under
            if mask & left:
                found[number] = found.get(number, 0) | mask & left
                left &= ~mask
        for mask, number in one.facets:
            if mask & left:
                found[number] = found.get(number, 0) | mask & left
        self.under = None
        return [(mask, number) for number, mask in found.items()]

    @property
    def facets(self) -> Facets:
        if self._facets is None:
            if self.under is not None:
                self._facets = self._laid()
            elif self.line is None:
                self._facets = self._make()
            else:
                of, sign, more = self.line
                self._facets = [(mask, sign * one + more) for mask, one in of.facets]
        return self._facets

    def ordered(self) -> tuple[list[int], list[int]]:
        """Its integers in order, and for each number of them the worlds that have one of the first so many."""
        if self.order is None:
            facets, masks = sorted((value, mask) for mask, value in self.facets), [0]
            for _, mask in facets:
                masks.append(masks[-1] | mask)
            self.order = [value for value, _ in facets], masks
        return self.order

    def _unproven(self, *args: Any) -> NoReturn:
        raise Unproven("a value that differs between renderings was used as one")

    __bool__ = __str__ = __repr__ = __len__ = __iter__ = __hash__ = __eq__ = __ne__ = __lt__ = __le__ = _unproven
    __gt__ = __ge__ = __contains__ = __getitem__ = __index__ = __format__ = __call__ = __add__ = __radd__ = _unproven


def merged(found: Facets) -> Any:
    """The value that all of `found` have, or a `Varied` in which equal values are one. The masks are apart."""
    mask, first = found[0]
    if len(found) == 2:  # mostly two, as of booleans
        other, second = found[1]
        if first is second or (type(first) is type(second) and type(first) in SCALARS and first == second):
            return first
        return Varied(found, mask | other)
    if len(found) == 1:
        return first
    values: dict[Any, tuple[int, Any]] = {}
    whole = 0
    for mask, value in found:
        whole |= mask
        kind = type(value)
        key = value if kind is str else (kind, value) if kind in SCALARS else id(value)
        if key in values:
            values[key] = values[key][0] | mask, value
        else:
            values[key] = mask, value
    return first if len(values) == 1 else Varied([*values.values()], whole)


class Buffer:
    """Text that worlds write: pieces, each with the worlds that wrote it."""

    __slots__ = ("pieces",)

    def __init__(self) -> None:
        self.pieces: list[tuple[int, list[str]]] = []

    def write(self, mask: int, text: str) -> None:
        if self.pieces and self.pieces[-1][0] == mask:
            self.pieces[-1][1].append(text)
        else:
            if len(self.pieces) > MOST:
                raise Unproven("the renderings take turns too often")
            self.pieces.append((mask, [text]))

    def texts(self, worlds: int, trunk: int = 0) -> list[tuple[int, str, int]]:
        """(mask, text, known) of all `worlds`, those that wrote the same together.

        Two texts have at least as many characters in common as the smaller `known` says, which is best told for the
        world of `trunk`: its text is `known` throughout.
        """
        # The texts so far, those last written to in front: a piece is mostly the same worlds' as the one before.
        found: list[tuple[int, list[str], int]] = [(worlds, [], -1)]
        for piece_mask, parts in self.pieces:
            left = piece_mask & worlds
            text = "".join(parts)
            touched: list[tuple[int, list[str], int]] = []
            at = 0
            while left and at < len(found):
                mask, before, known = found[at]
                shared = mask & left
                if not shared:
                    at += 1
                    continue
                left ^= shared
                if shared == mask:
                    del found[at]
                    before.append(text)
                    touched.append((mask, before, known))
                else:
                    begun = "".join(before)
                    here = len(begun) if known < 0 else known
                    before[:] = [begun]
                    found[at] = (mask ^ shared, before, known if trunk & (mask ^ shared) else here)
                    touched.append((shared, [begun, text], known if trunk & shared else here))
                    at += 1
            found[:0] = touched
        made = [(mask, "".join(parts), known) for mask, parts, known in found]
        return [(mask, text, len(text) if known < 0 else known) for mask, text, known in made]
