"""The pieces of all renderings of a conversation, which begin alike: each is told by where it leaves the longest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

__all__ = ["Renderings", "shared"]

World = tuple[int, bool]
Pieces = tuple[Any, ...]


class Renderings(Mapping[World, "Pieces | Exception"]):
    """By world (number of messages, generation prompt or not) its pieces, or what the template raises.

    `size`: how many pieces are held. Of 200 messages' renderings a whole one each would be a hundred times as many.

    >>> made = Renderings({(1, False): (0, 1, 2), (2, False): (0, 1, 3, 4)})
    >>> made[1, False], made.size
    ((0, 1, 2), 5)
    """

    def __init__(self, worlds: Mapping[World, Pieces | Exception]) -> None:
        self._trunk = max((one for one in worlds.values() if isinstance(one, tuple)), key=len, default=())
        # How much of the trunk each begins with, and what it has of its own.
        self._worlds = {
            world: one if isinstance(one, Exception) else ((n := shared(one, self._trunk)), one[n:])
            for world, one in worlds.items()
        }

    def __getitem__(self, world: World) -> Pieces | Exception:
        found = self._worlds[world]
        return found if isinstance(found, Exception) else self._trunk[: found[0]] + found[1]

    def __iter__(self) -> Iterator[World]:
        return iter(self._worlds)

    def __len__(self) -> int:
        return len(self._worlds)

    @property
    def size(self) -> int:
        return sum(map(len, self.held()))

    def held(self) -> Iterator[Pieces]:
        """All pieces that are held."""
        yield self._trunk
        for one in self._worlds.values():
            if isinstance(one, tuple):
                yield one[1]

    def repeats(self) -> int:
        """How often a piece stands in a world, at most."""
        most = [max(Counter(one).values(), default=0) for one in self.held()]
        return most[0] + max(most[1:], default=0)

    def written(self, texts: Sequence[str]) -> Callable[[World], tuple[str, int] | Exception | None]:
        """What a world writes where ``texts[i]`` is piece `i`, and how much of that the longest begins with, too.

        The longest is joined once; others are a part of it and the rest. None for a world that is not known.
        """
        ends = [*accumulate([len(texts[i]) for i in self._trunk], initial=0)]
        trunk = "".join([texts[i] for i in self._trunk])

        def made(world: World) -> tuple[str, int] | Exception | None:
            found = self._worlds.get(world)
            if found is None or isinstance(found, Exception):
                return found
            return trunk[: ends[found[0]]] + "".join([texts[i] for i in found[1]]), ends[found[0]]

        return made

    def split(self, parts: Callable[[Any], Sequence[int]]) -> Renderings:
        """The same with `parts` of each piece in its stead."""
        made = Renderings({})
        made._trunk, ends = _split(self._trunk, parts)
        made._worlds = {
            world: one if isinstance(one, Exception) else (ends[one[0]], _split(one[1], parts)[0])
            for world, one in self._worlds.items()
        }
        return made


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many pieces of two tuples are the same at the beginning."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _split(own: Pieces, parts: Callable[[Any], Sequence[int]]) -> tuple[Pieces, list[int]]:
    ends, made = [0], list[int]()
    for one in own:
        made += parts(one)
        ends.append(len(made))
    return tuple(made), ends
