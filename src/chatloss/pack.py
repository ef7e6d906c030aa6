"""Lengths -> bins: best-fit-decreasing packing, and balancing bins by cost."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from chatloss.errors import RecipeError

__all__ = ["best_fit", "spread"]


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices by best-fit-decreasing: longest first, each into the fullest bin that still holds it.

    Needs at most 11/9 of the optimal number of bins (Johnson 1973). Deterministic; ties go to the lower index. Raises
    `RecipeError` if one length exceeds `capacity` (tokens). O(n log n) but for list insertion.

    >>> best_fit([5, 3, 4, 2, 6], 10)
    [[4, 2], [0, 1, 3]]
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > capacity:
            raise RecipeError(
                f"a row of {length} tokens does not fit a bin of {capacity}", where="batch.micro_tokens",
                hint=f"set batch.micro_tokens to at least {length}, or a smaller data.max_length",
            )
        at = bisect.bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([index])
            bisect.insort(room, (capacity - length, len(bins) - 1))
        else:
            left, target = room.pop(at)
            bins[target].append(index)
            bisect.insort(room, (left - length, target))
    return bins


def spread(costs: Sequence[float], bins: int, lengths: Sequence[int] = (), capacity: int = 0) -> list[list[int]] | None:
    """Indices spread over exactly `bins` bins of near-equal cost: dearest first, each to the cheapest bin with room.

    The longest-processing-time rule (Graham 1969, at most 4/3 of the optimal largest cost). `lengths` and `capacity`
    bound each bin if given; None if some index finds no room, which does not prove that there is no way. Bins may stay
    empty.

    >>> spread([7.0, 5.0, 4.0, 3.0], 2)
    [[0, 3], [1, 2]]
    """
    out: list[list[int]] = [[] for _ in range(bins)]
    cost = [0.0] * bins
    room = [capacity] * bins
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        need = lengths[index] if lengths else 0
        fits = [b for b in range(bins) if room[b] >= need]
        if not fits:
            return None
        target = min(fits, key=lambda b: (cost[b], b))
        out[target].append(index)
        cost[target] += costs[index]
        room[target] -= need
    return out
