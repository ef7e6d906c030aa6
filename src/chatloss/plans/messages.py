"""What the row of a turn shows of the messages before it, and what decides where they begin and end in it.

Rows of one conversation have most of that in common: what was decided by what two of them have in common is asked once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from operator import eq
from typing import NamedTuple

from chatloss.fields import Field
from chatloss.places import Seen, end_in, place_in
from chatloss.plans.pieces import Pieces, Unlike
from chatloss.plans.rows import Place
from chatloss.reference import Rendering, Turn
from chatloss.sample import Reason
from chatloss.shapes.renderings import shared

__all__ = ["Held", "Reading", "Said"]


class Said(NamedTuple):
    """What a row shows of an earlier message that it does not train; `found`, `ended` and `shown` are as in `Row`.

    `texts`: where its fields begin and end, and where a scaffold begins that stands before each, if that is told by
    where they are; `edges`: where its generation prompt begins and ends. All was decided by the first `reach`
    characters of the row.
    """

    found: tuple[tuple[int, int, Place], ...]
    ended: tuple[tuple[int, int, tuple[int, ...], str], ...]
    shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int, bool], ...], bool], ...]
    texts: tuple[tuple[int, int, int | None], ...]
    edges: tuple[int, ...]
    reach: int


class Held:
    """One conversation: its rendering, whose recording gave `texts`, the first `constants` of them the template's own.

    `told`: by (message, whether it is its reasoning) the pieces that are that.
    """

    def __init__(self, rendering: Rendering, pieces: Pieces, texts: Sequence[str], constants: int) -> None:
        self.rendering, self.pieces, self.texts, self.constants = rendering, pieces, texts, constants
        self.told: dict[tuple[int, bool], set[int]] = {}

    def has_space(self, pieces: Sequence[int], at: int) -> bool:
        """Whether the piece there is the space at an end of a text."""
        return at < len(pieces) and pieces[at] >= self.constants and self.texts[pieces[at]].isspace()


class Reading:
    """The row whose last turn is `base`, as its `pieces`, which end at characters `ends`, then `tail`.

    `begins`: where each message before the turn begins. `first`: a row that was read before; of the first `alike`
    messages, none of which is one of `inside`, that shows the same for the same reasons.
    """

    def __init__(self, held: Held, base: Turn, inside: Sequence[int], first: Reading | None) -> None:
        self._held, self._rendering, self.base, self._first = held, held.rendering, base, first
        self.text = base.prompt + base.target
        self.world = held.pieces.world(base.index + 1)
        of_first = shared(self.world, first.world) if first is not None else 0
        before: list[int] = first.starts[:of_first] if first is not None else []
        own = held.pieces.starts(self.world[of_first:], first.starts[of_first] if first is not None else 0)
        if any(map(eq, own, own[1:])):
            raise Unlike("an empty piece")
        self.starts: list[int] = before + own
        cut, offset = held.pieces.place(self.starts, len(self.text), self.world)
        self.pieces, self.ends = self.world[:cut], self.starts[: cut + 1]
        self.tail = held.texts[self.world[cut]][:offset] if offset else ""
        self._prompt = held.pieces.world(base.index, True)
        self._seen = Seen(self.text)
        self._said: dict[int, Said] = {}
        self._plains: dict[tuple[int, int], tuple[list[tuple[Field, int]] | None, int, list[str]]] = {}
        self._reaches: list[int] = []
        self.begins, self.alike = [0], 0
        if first is not None:
            of_prompt = shared(self._prompt, first._prompt)
            known = min(first._prompt_ends[of_prompt], self.starts[min(of_first, cut)])
            same = bisect_right(first._reaches, known)
            self._reaches, self.begins = first._reaches[:same], first.begins[: same + 1]
            self.alike = min(bisect_right(first._reach_of_said, known), inside[0])
        for k in range(len(self._reaches), base.index):
            seen = Seen(base.prompt, self._reaches[-1] if k else 0)
            self.begins.append(end_in(seen, self._rendering, k, self.begins[-1])[0])
            self._reaches.append(len(self.text) + 1 if seen.absent else seen.reach)
        del self._reaches[base.index :], self.begins[base.index + 1 :]

    @cached_property
    def _whole(self) -> tuple[tuple[int | str, ...], list[int]]:
        """The pieces of the row, with its tail, and where they begin and end."""
        return (*self.pieces, self.tail), [*self.ends, len(self.text)]

    @cached_property
    def _prompt_ends(self) -> list[int]:
        return self._held.pieces.starts(self._prompt)

    @cached_property
    def _reach_of_said(self) -> list[int]:
        """So many characters decided what the row shows of the first messages, of one, two and so on."""
        known = [self._said[k].reach if k in self._said else len(self.text) + 1 for k in range(self.base.index)]
        return [*accumulate(known, max)]

    def place(self, char: int) -> Place:
        return self._held.pieces.place(self.starts, char, self.world)

    def said(self, k: int) -> Said:
        """Of message `k` before the turn, which the row does not train. Raises `Unlike`."""
        known = self._first._said.get(k) if self._first is not None and k < self.alike else None
        self._said[k] = known = known or self._read(k)
        return known

    def _read(self, k: int) -> Said:
        rendering, begin = self._rendering, self.begins[k]
        self._seen = Seen(self.text, self._reaches[k])
        by_text, calls = not self.goes_on_from(k), bool(rendering.conversation.messages[k].tool_calls)
        found: list[tuple[int, int, Place]] = []
        ended: list[tuple[int, int, tuple[int, ...], str]] = []
        shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int, bool], ...], bool], ...] = ()
        texts: list[tuple[int, int, int | None]] = []
        edges: tuple[int, ...] = ()
        more = calls or (by_text and (len(rendering.fields[k]) > 1 or not self._goes_on(k + 1)))
        if more or not self._is_plain(k, begin):
            end, seen = self.begins[k + 1], Seen(self.base.prompt)
            _, fields, supplied = place_in(seen, rendering, k, begin, end, self.text)
            self._seen.to(len(self.text) + 1 if seen.absent else seen.reach)
            befores = [begin if supplied is None else supplied[1], *(b for _, b, _ in fields)]
            texts += [(a, b, before) for (a, b, _), before in zip(fields, befores, strict=False)]
            shown = ((k, self.place(begin), self.place(end), tuple(self._within(a, b) for a, b, _ in fields), by_text),)
        else:
            for field, piece in self.fields(k, begin):
                found.append((piece, self.pieces[piece], self.place(begin)))
                texts.append((self.ends[piece], self.ends[piece + 1], None))
                if by_text:
                    ended.append(self.ended(k, field, piece))
        if rendering.conversation.messages[k].role == "assistant":
            before, plain = rendering.prompt(k), rendering.text(k)
            if before is not None and plain is not None and before != plain:
                self._seen.to(len(before))
                edges = (len(plain), len(before)) if self.text.startswith(before) else ()
        if self._seen.absent:
            self._seen.to(len(self.text) + 1)
        return Said(tuple(found), tuple(ended), shown, tuple(texts), edges, self._seen.reach)

    def _within(self, a: int, b: int) -> tuple[Place, int, bool]:
        """Where a field begins, in characters from the beginning of its piece, the piece in which it ends, and whether
        it ends with that.
        """
        at = bisect_right(self.ends, a) - 1
        return (at, a - self.ends[at]), bisect_left(self.ends, b) - 1, b in self.ends

    def goes_on_from(self, k: int) -> bool:
        """Whether the row goes on from message `k` as it is rendered last.

        Raises where another conversation's may begin or end in another way in the row.
        """
        world, row_begins = self._held.pieces.world, self._row_begins
        found = row_begins(self._prompt, self._prompt_ends, world(k + 1))
        if self._rendering.conversation.messages[k].role == "assistant":
            row_begins(*self._whole, world(k, True))
            if self._held.pieces.begins(world(k), world(k, True)) is None:
                raise Unlike("whether a prompt begins with what is before it depends on the texts")
        return found

    def _row_begins(self, row: Sequence[int | str], ends: Sequence[int], other: Sequence[int]) -> bool:
        """Whether the row, or its prompt, begins with another rendering."""
        found, reach = self._held.pieces.begins(other, row), self._held.pieces.reach
        if found is None:
            raise Unlike("whether a rendering begins another depends on the texts")
        self._seen.to(ends[reach] if reach < len(ends) else len(self.text) + 1)
        return found

    def _goes_on(self, k: int) -> bool:
        """Whether message `k` plainly follows: it is looked for where the one before is written otherwise."""
        return self._rendering.conversation.messages[k].role == "assistant" or (
            k < len(self.begins) and self._is_plain(k, self.begins[k]))

    def _is_plain(self, k: int, begin: int) -> bool:
        """Whether the texts of message `k` are pieces of the row."""
        found, reach, absent = self._plain(k, begin)
        self._seen.to(reach)
        self._seen.absent += absent
        return found is not None

    def fields(self, k: int, begin: int) -> list[tuple[Field, int]]:
        """The texts of message `k`, each with the piece of the row that it is."""
        found, _, _ = self._plain(k, begin)
        if found is None or not self._is_plain(k, begin):
            raise Unlike("a text that is not written as it stands")
        told = {reasoning: self._held.told.setdefault((k, reasoning), set()) for reasoning in (True, False)}
        for field, piece in found:
            told[field.reason == Reason.REASONING].add(self.pieces[piece])
        return found

    def _plain(self, k: int, begin: int) -> tuple[list[tuple[Field, int]] | None, int, list[str]]:
        """(what `fields` gives, or None; how far one had to look for it, and what was nowhere)."""
        known = self._plains.get((k, begin))
        if known is None:
            seen = Seen(self.text)
            self._plains[k, begin] = known = self._looked_for(k, begin, seen), seen.reach, seen.absent
        return known

    def _looked_for(self, k: int, begin: int, seen: Seen) -> list[tuple[Field, int]] | None:
        message = self._rendering.conversation.messages[k]
        fields = [field for field in self._rendering.fields[k] if field.reason != Reason.CALL]
        if not isinstance(message.content, str | None) or len({field.reason for field in fields}) < len(fields):
            return None  # a message of more than a text
        at, found = begin, []
        for field in fields:
            place = seen.find(field.text, at, None)
            piece = bisect_left(self.ends, place, hi=len(self.ends) - 1)
            if place < 0 or self.ends[piece] != place or piece == len(self.pieces):
                return None
            seen.to(self.ends[piece + 1])
            if self._held.texts[self.pieces[piece]] != field.text or self.pieces[piece] < self._held.constants:
                return None  # it is not written as it stands, or the template writes it too
            at = place + len(field.text)
            found.append((field, piece))
        return found

    def ended(self, k: int, field: Field, piece: int) -> tuple[int, int, tuple[int, ...], str]:
        """What decides where a message ends that its own rendering ends in another way."""
        held, texts, before = self._held, self._held.texts, self._rendering.prompt(k)
        own = held.pieces.world(k + 1)
        starts = held.pieces.starts(own)
        at = "".join([texts[i] for i in own]).find(field.text, len(before or ""))
        first = bisect_left(starts, at, hi=len(starts) - 1)
        if at < 0 or starts[first] != at or first == len(own) or texts[own[first]] != field.text:
            raise Unlike("an answer that is not written as it stands")
        held.told[k, field.reason == Reason.REASONING].add(own[first])
        rest, following = own[first + 1 :], self.pieces[piece + 1 : piece + 3]
        spaces: tuple[int, ...] = ()
        if held.has_space(rest, 0) and held.has_space(following, 0) and texts[rest[0]] == texts[following[0]]:
            spaces, rest, following = (rest[0], following[0]), rest[1:], following[1:]
        self._seen.to(self.ends[piece + 3] if piece + 3 < len(self.ends) else len(self.text) + 1)
        behind, here = "".join([texts[i] for i in rest]), texts[following[0]] if following else self.tail
        same = next((i for i, (a, b) in enumerate(zip(behind, here, strict=False)) if a != b), len(behind))
        if any(i >= held.constants for i in rest) or same >= len(here):
            raise Unlike("an answer with more behind it")
        return self.pieces[piece], own[first], spaces, behind
