"""What the row of a turn shows of the messages before it, and what decides where they begin and end in it.

Rows of one conversation have most of that in common: what was decided by what two of them have in common is asked once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
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
    ended: tuple[tuple[int, tuple[int, ...], str], ...]
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

    `begins`: where each message before the turn begins. `first`: a row that was read before.
    """

    def __init__(self, held: Held, base: Turn, first: Reading | None) -> None:
        self._held, self._rendering, self.base, self._first = held, held.rendering, base, first
        self.text = base.prompt + base.target
        self.world = held.pieces.world(base.index + 1)
        self.starts = held.pieces.starts(self.world)
        cut, offset = held.pieces.place(self.starts, len(self.text), self.world)
        self.pieces, self.ends = self.world[:cut], self.starts[: cut + 1]
        self.tail = held.texts[self.world[cut]][:offset] if offset else ""
        if any(not held.texts[i] for i in self.pieces):
            raise Unlike("an empty piece")
        self._whole: tuple[int | str, ...] = (*self.pieces, self.tail)
        self._whole_ends = [*self.ends, len(self.text)]
        self._prompt = held.pieces.world(base.index, True)
        self._prompt_ends = held.pieces.starts(self._prompt)
        self._seen = Seen(self.text)
        self._known = self._shared(first) if first is not None else 0
        self._said: dict[int, Said] = {}
        self._reaches: list[int] = []
        self.begins = [0, *self._begins()]

    def _shared(self, first: Reading) -> int:
        """How many characters the row begins with that are those of another row, in the same pieces."""
        in_prompt, in_row = shared(self._prompt, first._prompt), shared(self.pieces, first.pieces)
        return min(self._prompt_ends[in_prompt], self.ends[in_row])

    def _begins(self) -> Iterator[int]:
        """Where each message before the turn ends."""
        begin, reach, first = 0, 0, self._first
        for k in range(self.base.index):
            if first is not None and k < len(first._reaches) and first._reaches[k] <= self._known:
                begin, reach = first.begins[k + 1], first._reaches[k]
            else:
                seen = Seen(self.base.prompt)
                begin, *_ = end_in(seen, self._rendering, k, begin)
                reach = max(reach, seen.reach, len(self.text) + 1 if seen.absent else 0)
            self._reaches.append(reach)
            yield begin

    def place(self, char: int) -> Place:
        return self._held.pieces.place(self.starts, char, self.world)

    def said(self, k: int) -> Said:
        """Of message `k` before the turn, which the row does not train. Raises `Unlike`."""
        known = self._first._said.get(k) if self._first is not None else None
        if known is None or known.reach > self._known:
            known = self._read(k)
        self._said[k] = known
        return known

    def _read(self, k: int) -> Said:
        rendering, begin = self._rendering, self.begins[k]
        self._seen = Seen(self.text, self._reaches[k])
        by_text, calls = not self.goes_on_from(k), bool(rendering.conversation.messages[k].tool_calls)
        found: list[tuple[int, int, Place]] = []
        ended: list[tuple[int, tuple[int, ...], str]] = []
        shown: tuple[tuple[int, Place, Place, tuple[tuple[Place, int, bool], ...], bool], ...] = ()
        texts: list[tuple[int, int, int | None]] = []
        edges: tuple[int, ...] = ()
        more = calls or (by_text and (len(rendering.fields[k]) > 1 or not self._goes_on(k + 1)))
        if more or not self.is_plain(k, begin):
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
            row_begins(self._whole, self._whole_ends, world(k, True))
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
            k < len(self.begins) and self.is_plain(k, self.begins[k]))

    def is_plain(self, k: int, begin: int) -> bool:
        """Whether the texts of message `k` are pieces of the row."""
        told = self._held.told
        kept = {(k, reasoning): {*told[k, reasoning]} for reasoning in (True, False) if (k, reasoning) in told}
        try:
            self.fields(k, begin)
        except Unlike:
            return False
        finally:
            for key in ((k, True), (k, False)):
                told.pop(key, None)
            told.update(kept)
        return True

    def fields(self, k: int, begin: int) -> list[tuple[Field, int]]:
        """The texts of message `k`, each with the piece of the row that it is."""
        message = self._rendering.conversation.messages[k]
        fields = [field for field in self._rendering.fields[k] if field.reason != Reason.CALL]
        if not isinstance(message.content, str | None) or len({field.reason for field in fields}) < len(fields):
            raise Unlike("a message of more than a text")
        at, found = begin, []
        told = {reasoning: self._held.told.setdefault((k, reasoning), set()) for reasoning in (True, False)}
        for field in fields:
            place = self._seen.find(field.text, at, None)
            piece = bisect_left(self.ends, place, hi=len(self.ends) - 1)
            if place < 0 or self.ends[piece] != place or piece == len(self.pieces):
                raise Unlike("a text that is not written as it stands")
            self._seen.to(self.ends[piece + 1])
            if self._held.texts[self.pieces[piece]] != field.text:
                raise Unlike("a text that is not written as it stands")
            if self.pieces[piece] < self._held.constants:
                raise Unlike("a text that the template writes too")
            told[field.reason == Reason.REASONING].add(self.pieces[piece])
            at = place + len(field.text)
            found.append((field, piece))
        return found

    def ended(self, k: int, field: Field, piece: int) -> tuple[int, tuple[int, ...], str]:
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
        return self.pieces[piece], spaces, behind
