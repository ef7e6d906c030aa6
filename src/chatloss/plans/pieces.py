"""The pieces of which the renderings of one conversation are, and what they say of those of others of its shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from chatloss.plans.rows import Place, alike
from chatloss.reference import Turn
from chatloss.shapes.recording import Recording
from chatloss.shapes.renderings import shared

__all__ = ["Pieces", "Unlike"]


class Unlike(Exception):
    """Something that rows of other conversations of the shape may not have in common."""


class Pieces:
    """The renderings of a conversation whose recording gave `texts`, as numbers of these.

    `unlike`: what was taken to be so for others too: (piece, text), neither of which may begin the other.
    """

    def __init__(self, recording: Recording, texts: Sequence[str]) -> None:
        self._recording, self._texts, self._sizes = recording, texts, [*map(len, texts)]
        self.unlike: set[tuple[int, str]] = set()
        self.reach = 0
        self._own: dict[int, tuple[int | str, ...]] = {}

    def world(self, count: int, prompt: bool = False) -> Sequence[int]:
        found = self._recording.worlds.get((count, prompt))
        if not isinstance(found, tuple):
            raise Unlike("a rendering that is refused")
        return found

    def starts(self, world: Sequence[int], first: int = 0) -> list[int]:
        """Where the pieces of a rendering begin, and where the last one ends; the first of them at `first`."""
        return [*accumulate(map(self._sizes.__getitem__, world), initial=first)]

    def own(self, turn: Turn) -> tuple[int | str, ...]:
        """The pieces of a turn's prompt and target, the last of them cut."""
        found = self._own.get(turn.index)
        if found is None:
            world = self.world(turn.index + 1)
            cut, offset = self.place(self.starts(world), len(turn.prompt) + len(turn.target), world)
            found = self._own[turn.index] = (*world[:cut], *([self._texts[world[cut]][:offset]] if offset else []))
        return found

    def place(self, starts: Sequence[int], char: int, world: Sequence[int]) -> Place:
        """The place of a character in the pieces of a rendering."""
        at = bisect_left(starts, char)
        if at == len(starts):
            raise Unlike("a place behind the text")
        if starts[at] == char:
            return at, 0
        if world[at - 1] >= self._recording.constants:
            raise Unlike("a place inside of a text")
        return at - 1, char - starts[at - 1]

    def begins(self, a: Sequence[int | str], b: Sequence[int | str]) -> bool | None:
        """Whether the text of pieces `a` begins that of `b`; None if other texts may decide that otherwise.

        `reach` is then how many pieces of `b` decided it: more than it has, if that it ends did.
        """
        i = j = shared(a, b)
        one: int | str | None = None
        two: int | str | None = None
        while True:
            if one is None and i < len(a):
                one, i = self._told_text(a[i]), i + 1
            if two is None and j < len(b):
                two, j = self._told_text(b[j]), j + 1
            self.reach = j
            if one is None or two is None:
                break
            if isinstance(one, str) and isinstance(two, str):
                size = min(len(one), len(two))
                if one[:size] != two[:size]:
                    return False
                one, two = one[size:] or None, two[size:] or None
            elif one != two:
                piece, text = (one, two) if isinstance(one, int) else (two, one)
                if not isinstance(piece, int) or not isinstance(text, str) or alike(self._texts[piece], text):
                    return None
                self.unlike.add((piece, text))
                return False
            else:
                one = two = None
        if one is None:
            return True
        self.reach = len(b) + 1
        return False if any(isinstance(self._told_text(rest), str) for rest in (one, *a[i:])) else None

    def _told_text(self, piece: int | str) -> int | str:
        """What the template writes there of itself; the number of what it does not."""
        return self._texts[piece] if isinstance(piece, int) and piece < self._recording.constants else piece
