"""Texts with space at their ends, as pieces of their own: what is looked for in a rendering is the text without it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from weakref import WeakKeyDictionary

from chatloss.shapes.recording import Recording

__all__ = ["Spaced"]

OFTEN, SEEN = 4, 4096  # sights of a pattern that take as long as planning it; patterns that are counted
KEPT = 200_000  # pieces of all recordings that were made here

_BEFORE, _BEHIND, _ALL = 1, 2, 4  # where a value has space


class Spaced:
    """Recordings in which each text that has space at its ends is up to three pieces, by which texts of a conversation
    have some.
    """

    def __init__(self) -> None:
        self._sights: dict[int, int] = {}  # by hash: all is forgotten when it is too much
        self._made: WeakKeyDictionary[Recording, dict[bytes, Recording]] = WeakKeyDictionary()

    def of(self, recording: Recording, texts: Sequence[str]) -> tuple[Recording, Sequence[str]] | None:
        """A recording that gave `texts`, and these, with texts and space apart; None for a pattern hardly seen yet.

        >>> from chatloss.shapes.renderings import Renderings
        >>> made = Recording(None, ("<u>",), 0, 1, Renderings({(1, False): (0, 1, 0, 2)}))
        >>> spaced = Spaced()
        >>> spaced.of(made, ("<u>", "a", "b")) == (made, ("<u>", "a", "b"))
        True
        >>> [spaced.of(made, ("<u>", f" {i}", "b")) for i in range(OFTEN - 1)]
        [None, None, None]
        >>> other, texts = spaced.of(made, ("<u>", "\\n c", "d"))
        >>> texts, other.worlds[1, False]
        (('<u>', '\\n ', 'c', 'd'), (0, 1, 2, 0, 3))
        """
        values = [*texts[recording.constants :]]
        if [value.strip() for value in values] == values:
            return recording, texts
        spaces, parts = zip(*map(_parts, values), strict=True)
        pattern = bytes(spaces)
        made = self._made.setdefault(recording, {}).get(pattern)
        if made is None:
            if not self._often(hash((id(recording), pattern))):
                return None
            made = _apart(recording, pattern)
            self._keep(recording, pattern, made)
        return made, (*recording.texts, *[part for found in parts for part in found])

    def _often(self, sight: int) -> bool:
        """Whether a plan is worth its time, after so many conversations that had to do without."""
        seen = self._sights.pop(sight, 0) + 1
        if seen < OFTEN:
            if len(self._sights) == SEEN:
                self._sights.clear()
            self._sights[sight] = seen
        return seen >= OFTEN

    def _keep(self, recording: Recording, pattern: bytes, made: Recording) -> None:
        if made.worlds.size + sum(one.worlds.size for each in self._made.values() for one in each.values()) > KEPT:
            self._made.clear()
        self._made.setdefault(recording, {})[pattern] = made


def _apart(recording: Recording, pattern: bytes) -> Recording:
    """The recording with three pieces, or two, for a value that has space in conversations of the pattern."""
    first = recording.constants
    ends = [*accumulate([1 + bool(there & _BEFORE) + bool(there & _BEHIND) for there in pattern], initial=first)]
    pieces = [*((i,) for i in range(first)), *map(range, ends, ends[1:])]
    return replace(recording, worlds=recording.worlds.split(pieces.__getitem__))


def _parts(value: str) -> tuple[int, tuple[str, ...]]:
    """Where a value has space, and the parts that are then apart."""
    text = value.strip()
    if value == text or not text:
        return 0 if value == text else _ALL, (value,)
    before, _, behind = value.partition(text)
    return _BEFORE * bool(before) + _BEHIND * bool(behind), tuple(part for part in (before, text, behind) if part)

