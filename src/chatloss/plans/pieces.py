"""The pieces of which the renderings of one conversation are, and what they say of those of others of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from chatloss.plans.rows import Place, alike
from chatloss.reference import Turn
from chatloss.shapes.shapes import Recording

__all__ = ["Pieces", "Unlike"]


class Unlike(Exception):
    """Something that rows of other conversations of the shape may not have in common."""


class Pieces:
    """The renderings of a conversation whose recording gave `texts`, as numbers of these.

    `unlike`: what was taken to be so for others too: (piece, text), neither of which may begin the other.
    """

    def __init__(self, recording: Recording, texts: Sequence[str]) -> None:
        self._recording, self._texts = recording, texts
        self.unlike: set[tuple[int, str]] = set()

    def world(self, count: int, prompt: bool = False) -> Sequence[int]:
        found = self._recording.worlds.get((count, prompt))
        if not isinstance(found, tuple):
            raise Unlike("a rendering that is refused")
        return found

    def starts(self, world: Sequence[int]) -> list[int]:
        """Where the pieces of a rendering begin, and where the last one ends."""
        return [0, *accumulate(len(self._texts[i]) for i in world)]

    def own(self, turn: Turn) -> list[int | str]:
        """The pieces of a turn's prompt and target, the last of them cut."""
        world = self.world(turn.index + 1)
        starts = self.starts(world)
        cut, offset = self.place(world, starts, len(turn.prompt) + len(turn.target))
        return [*world[:cut], *([self._texts[world[cut]][:offset]] if offset else [])]

    def place(self, world: Sequence[int], starts: Sequence[int], char: int) -> Place:
        """The place of a character in the pieces of a rendering."""
        if char in starts:
            return starts.index(char), 0
        at = next(i for i, start in enumerate(starts) if start > char) - 1
        if world[at] >= self._recording.constants:
            raise Unlike("a place inside of a text")
        return at, char - starts[at]

    def begins(self, a: Sequence[int | str], b: Sequence[int | str]) -> bool | None:
        """Whether the text of pieces `a` begins that of `b`; None if other texts may decide that otherwise."""
        mine, other = [*map(self._told_text, reversed(a))], [*map(self._told_text, reversed(b))]
        while mine and other:
            one, two = mine.pop(), other.pop()
            if isinstance(one, str) and isinstance(two, str):
                size = min(len(one), len(two))
                if one[:size] != two[:size]:
                    return False
                mine += [one[size:]] if one[size:] else []
                other += [two[size:]] if two[size:] else []
            elif one != two:
                piece, text = (one, two) if isinstance(one, int) else (two, one)
                if not isinstance(piece, int) or not isinstance(text, str) or alike(self._texts[piece], text):
                    return None
                self.unlike.add((piece, text))
                return False
        return not mine or (False if any(isinstance(one, str) for one in mine) else None)

    def _told_text(self, piece: int | str) -> int | str:
        """What the template writes there of itself; the number of what it does not."""
        return self._texts[piece] if isinstance(piece, int) and piece < self._recording.constants else piece
