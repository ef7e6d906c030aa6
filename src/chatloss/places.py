"""Whose text is whose: where each message stands in a rendering of more of them, rewritten or not."""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from chatloss.fields import SHORT, Field, Located, Missing, common_prefix, locate, present
from chatloss.reference import Rendering, Turn, View
from chatloss.sample import Reason
from chatloss.stops import control_texts

__all__ = ["Place", "Places", "Seen", "end_in", "fields_in", "place_in", "standing"]


class Place(NamedTuple):
    """A message in a text: what is behind the one before, up to `end`, with `fields` in it (characters).

    `supplied` is the generation prompt before it.
    """

    end: int
    fields: Located
    supplied: tuple[int, int] | None


class Places:
    """Where the messages before a turn stand in its prompt. What the prompts of a conversation share is found once.

    Exact where shorter renderings are prefixes; where a template rewrites history, a message ends behind its text.
    """

    def __init__(self, rendering: Rendering) -> None:
        self._rendering = rendering
        self._prompt = ""
        self._places: list[Place] = []
        self._reaches: list[int] = []  # the first k + 1 places are the same in any prompt that is the same up to here,
        self._absent: list[tuple[int, list[str]]] = []  # unless it holds one of these texts of place k further on

    def of(self, turn: Turn, text: str) -> tuple[list[Place], int]:
        """(places of the messages before `turn`, how many are those of the last call). `text`: prompt and target."""
        prompt = turn.prompt
        kept = min(self._still_true(prompt), turn.index)
        del self._places[kept:], self._reaches[kept:]
        self._absent = [entry for entry in self._absent if entry[0] < kept]
        self._prompt = prompt
        for i in range(kept, turn.index):
            self._add(i, prompt, text)
        return self._places, kept

    def _still_true(self, prompt: str) -> int:
        shared = common_prefix(self._prompt, prompt)
        kept = bisect_right(self._reaches, shared)
        for i, texts in self._absent:
            if i < kept and any(prompt.find(text, max(0, shared - len(text) + 1)) >= 0 for text in texts):
                return i
        return kept

    def _add(self, i: int, prompt: str, text: str) -> None:
        start = self._places[-1].end if self._places else 0
        seen = Seen(prompt, self._reaches[-1] if self._reaches else 0)
        end, _, found = end_in(seen, self._rendering, i, start)
        if seen.absent:
            self._absent.append((i, seen.absent))
        self._places.append(place_in(seen, self._rendering, i, start, end, text, found=found))
        self._reaches.append(seen.reach)


def end_in(
    seen: Seen, rendering: Rendering, i: int, start: int, known: int = 0
) -> tuple[int, bool, Located | None]:
    """(where message `i`, which begins at `start`, ends in a prompt; whether the prompt begins with it rendered last;
    its fields, if it had to be told by these).

    So many characters of both are `known` to be the same.
    """
    prompt, prefix = seen.text, rendering.text(i + 1)
    if prefix is not None and prompt.startswith(prefix[known:] if known else prefix, known):
        end = max(start, len(prefix))
        seen.to(end)
        return end, end == len(prefix), None
    end, found = _end_by_text(rendering, seen, start, i, prefix, known)
    end = max(start, min(end, len(prompt)))
    seen.to(end)
    return end, False, found


def place_in(
    seen: Seen, rendering: Rendering, i: int, start: int, end: int, text: str, known: int = 0, *,
    found: Located | None = None,
) -> Place:
    """Message `i`, which stands from `start` to `end` in a prompt that begins `text`; `found` is what `end_in` found.

    So many characters of that are `known` to be those of its own prompt.
    """
    supplied = None
    if found is None:
        found = fields_in(seen.text, rendering.fields[i], start, end)
    if rendering.conversation.messages[i].role == "assistant":
        before, plain = rendering.prompt(i), rendering.text(i)
        if before is not None and plain is not None and before != plain:
            seen.to(len(before))
            if text.startswith(before[known:], known):
                supplied = len(plain), len(before)
    return Place(end, found, supplied)


def fields_in(text: str, fields: list[Field], start: int, end: int) -> Located:
    """The fields of a message that stands from `start` to `end`, or those of them that are shown."""
    located = locate(text, fields, start, end)
    return present(text, fields, start, end) if isinstance(located, Missing) else located


class Seen:
    """A text that remembers what was looked at: all up to `reach`, and that `absent` is nowhere further on."""

    __slots__ = ("absent", "reach", "text")

    def __init__(self, text: str, reach: int = 0) -> None:
        self.text, self.reach = text, reach
        self.absent: list[str] = []

    def find(self, piece: str, start: int, end: int | None, /) -> int:
        at = self.text.find(piece, start, end)
        if at >= 0:
            self.to(at + len(piece))
        elif end is None:
            self.absent.append(piece)
        else:
            self.to(end)
        return at

    def to(self, at: int) -> None:
        if at > self.reach:
            self.reach = at


def _end_by_text(
    rendering: Rendering, seen: Seen, at: int, index: int, prefix: str | None, known: int
) -> tuple[int, Located | None]:
    fields, text = rendering.fields[index], seen.text
    agreed = common_prefix(prefix or "", text, known)
    seen.to(agreed + 1)
    for whole in (True, False):  # the template may have dropped the reasoning or the calls
        found = locate(seen, fields if whole else _answer(fields), at)
        if isinstance(found, Missing) or not found or not _goes_on(rendering, seen, found[-1][1], index + 1):
            continue
        end = found[-1][1]
        # What the shorter rendering writes behind the same words belongs to the message as far as it stands here too.
        words = text[max(found[-1][0], end - SHORT) : end]
        behind = prefix.rfind(words) if prefix else -1
        if prefix and behind >= 0:
            tail = prefix[behind + len(words) :]
            end += common_prefix(tail, text[end : end + len(tail)])
            seen.to(end + 1)
        return end, found if whole and end <= len(text) else None
    if not fields:
        return max(at, agreed), None
    prompt = rendering.prompt(index) or ""  # of a message that is dropped the header may be left
    seen.to(len(prompt))
    return max(at, len(prompt)) if text.startswith(prompt) else at, None


def _goes_on(rendering: Rendering, seen: Seen, at: int, index: int) -> bool:
    """Whether the next message is behind `at`; else what was found is somebody's quotation of a dropped message."""
    messages = rendering.conversation.messages
    following = _answer(rendering.fields[index]) if index < len(messages) else []
    return not following or messages[index].role == "assistant" or not isinstance(locate(seen, following, at), Missing)


def _answer(fields: list[Field]) -> list[Field]:
    return [field for field in fields if field.reason == Reason.CONTENT]


def standing(rendering: Rendering, index: int, base: Turn) -> Located:
    """What the row of a later turn, `base`, shows of message `index` in its context: its fields and its stop, if any.

    This is what training in an unlawful row can train of it.
    """
    engine, before, text = rendering.prompt(base.index), rendering.prompt(index), base.prompt
    # A turn that is kept off its prompt has a row of its own rendering.
    view = View(rendering, base.index, True) if text == engine else View(rendering, base.index + 1, False)
    known = before is not None and text.startswith(before)
    start = len(before or "") if known else view.last_text(index)
    found = [place for place in view.shown(index, start) if place[1] <= len(text)]
    if not found and not known:
        return []
    at = found[-1][1] if found else start
    limit = min(view.next_text(index, at), len(text))
    stop = rendering.stops.end(text[:limit], at)
    starts = [stop - len(end) for end in rendering.stops.texts if text.endswith(end, at, stop)] if stop else []
    if stop is None or control_texts(text[at : min(starts)]):  # that is the stop of another message
        return found
    return [*found, (at, stop, Reason.STOP)]
