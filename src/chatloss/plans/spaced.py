"""Texts with space at their ends, as pieces of their own: what is looked for in a rendering is the text without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from weakref import WeakKeyDictionary

from chatloss.shapes.shapes import Recording

__all__ = ["Spaced"]

OFTEN, SEEN = 4, 1024  # sights of a pattern that take as long as planning it; patterns of a recording that are counted
KEPT = 200_000  # pieces of all recordings that were made here

# For each value of a recording, whether there is space before its text, and behind it; nothing where all is space.
_Pattern = tuple[tuple[bool, ...], ...]


class Spaced:
    """Recordings in which each text that has space at its ends is up to three pieces, by which texts of a conversation
    have some.
    """

    def __init__(self) -> None:
        self._sights: WeakKeyDictionary[Recording, dict[_Pattern, Recording | int]] = WeakKeyDictionary()

    def of(self, recording: Recording, texts: Sequence[str]) -> tuple[Recording, Sequence[str]] | None:
        """A recording that gave `texts`, and these, with texts and space apart; None for a pattern hardly seen yet.

        >>> from chatloss.shapes.program import Program
        >>> made = Recording(None, ("<u>",), 0, 1, {(1, False): (0, 1, 0, 2)})
        >>> spaced = Spaced()
        >>> spaced.of(made, ("<u>", "a", "b")) == (made, ("<u>", "a", "b"))
        True
        >>> [spaced.of(made, ("<u>", f" {i}", "b")) for i in range(OFTEN - 1)]
        [None, None, None]
        >>> other, texts = spaced.of(made, ("<u>", "\\n c", "d"))
        >>> texts, other.worlds
        (('<u>', '\\n ', 'c', 'd'), {(1, False): (0, 1, 2, 0, 3)})
        """
        values = [*texts[recording.constants :]]
        if [value.strip() for value in values] == values:
            return recording, texts
        parts = [*map(_parts, values)]
        pattern = tuple([there for there, _ in parts])
        sights = self._sights.setdefault(recording, {})
        made = sights.get(pattern, 0)
        if isinstance(made, int):
            if made + 1 < OFTEN:
                if len(sights) < SEEN:
                    sights[pattern] = made + 1
                return None
            made = _apart(recording, pattern)
            if _size(made) + sum(_size(one) for each in self._sights.values() for one in each.values()) > KEPT:
                self._sights.clear()
            self._sights.setdefault(recording, {})[pattern] = made
        return made, (*recording.texts, *[part for _, found in parts for part in found])


def _apart(recording: Recording, pattern: _Pattern) -> Recording:
    """The recording with three pieces, or two, for a value that has space in conversations of the pattern."""
    first = recording.constants
    ends = [*accumulate([1 + sum(there) for there in pattern], initial=first)]
    pieces = [*((i,) for i in range(first)), *map(range, ends, ends[1:])]
    return replace(recording, worlds={
        world: tuple([i for one in old for i in pieces[one]]) if isinstance(old, tuple) else old
        for world, old in recording.worlds.items()
    })


def _parts(value: str) -> tuple[tuple[bool, ...], tuple[str, ...]]:
    """Where a value has space, and the parts that are then apart."""
    text = value.strip()
    if value == text or not text:
        return (False, False) if value == text else (), (value,)
    before, _, behind = value.partition(text)
    return (before != "", behind != ""), tuple(part for part in (before, text, behind) if part)


def _size(made: Recording | int) -> int:
    return 1 if isinstance(made, int) else sum(len(one) for one in made.worlds.values() if isinstance(one, tuple))
