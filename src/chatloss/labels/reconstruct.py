"""What every token of a document is, told from its ids alone: headers, whose text, answers, their stops."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
import numpy.typing as npt

from chatloss.labels.structure import Opener, Structure
from chatloss.probes import THINKING
from chatloss.runs import Pieces
from chatloss.sample import Decode, Reason

__all__ = ["Document", "Kind", "Reconstructor", "TurnPlace"]

Ints = npt.NDArray[np.int64]


class Kind(IntEnum):
    """What a token is."""

    START = 0
    STRUCTURE = 1
    SYSTEM = 2
    USER = 3
    TOOL = 4
    HEADER = 5
    SUPPLIED = 6
    EMPTY_THINK = 7
    REASONING = 8
    ANSWER = 9
    STOP = 10
    AFTER_STOP = 11
    PADDING = 12

    @property
    def label(self) -> str:
        return _LABELS[self]

    @property
    def expected(self) -> bool:
        """Whether the model must emit it itself."""
        return Kind.EMPTY_THINK <= self <= Kind.STOP

    @property
    def reason(self) -> Reason:
        return _REASONS[self]


_LABELS = {
    Kind.START: "outside messages", Kind.STRUCTURE: "headers of other roles",
    Kind.SYSTEM: "system text", Kind.USER: "user text", Kind.TOOL: "tool results",
    Kind.HEADER: "headers of answers", Kind.SUPPLIED: "rest of the prompt",
    Kind.EMPTY_THINK: "empty reasoning blocks", Kind.REASONING: "reasoning", Kind.ANSWER: "answers and calls",
    Kind.STOP: "stops", Kind.AFTER_STOP: "behind the stop", Kind.PADDING: "padding",
}
_REASONS = {
    Kind.START: Reason.SCAFFOLD, Kind.STRUCTURE: Reason.SCAFFOLD, Kind.SYSTEM: Reason.OTHER_ROLE,
    Kind.USER: Reason.OTHER_ROLE, Kind.TOOL: Reason.OTHER_ROLE, Kind.HEADER: Reason.GENERATION_PROMPT,
    Kind.SUPPLIED: Reason.GENERATION_PROMPT, Kind.EMPTY_THINK: Reason.REASONING, Kind.REASONING: Reason.REASONING,
    Kind.ANSWER: Reason.CONTENT, Kind.STOP: Reason.STOP, Kind.AFTER_STOP: Reason.SCAFFOLD,
    Kind.PADDING: Reason.PADDING,
}
_TEXT_KINDS = {"system": Kind.SYSTEM, "user": Kind.USER, "tool": Kind.TOOL}


@dataclass(frozen=True, slots=True)
class TurnPlace:
    """An assistant's turn as token indices: header [header, answer), answer [answer, stop), stop [stop, end).

    What follows the stop and belongs to no other message is [end, after). `ending` is "stop", "closer" (what ends past
    answers, at which no engine stops) or "" where nothing ends the turn.
    """

    header: int
    answer: int
    stop: int
    end: int
    after: int
    ending: str


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """A document taken apart: its text, where in it each token ends, what each is (`Kind`), whose message, its turns.

    `kinds` uint8 [n]; `ends` int64 [n]; `messages` int32 [n], -1 before the first; `roles` of the messages.
    """

    ids: npt.NDArray[np.int32]
    text: str
    ends: Ints
    kinds: npt.NDArray[np.uint8]
    messages: npt.NDArray[np.int32]
    roles: tuple[str, ...]
    turns: tuple[TurnPlace, ...]

    def text_of(self, start: int, end: int) -> str:
        """The text of the tokens [start, end)."""
        return self.text[self.char(start) : self.char(end)]

    def char(self, token: int) -> int:
        """Where in the text a token begins."""
        return int(self.ends[token - 1]) if token > 0 else 0


@dataclass(frozen=True, slots=True)
class _Event:
    start: int
    end: int
    role: str
    opener: Opener | None = None


class Reconstructor:
    """Takes the documents of one tokenizer and template apart."""

    def __init__(self, structure: Structure, decode: Decode, added: Mapping[str, int] | None = None) -> None:
        """`added`: tokens that stand for whole texts. A header that begins with one is none if it is typed out."""
        self.structure = structure
        self._pieces = Pieces(decode)
        self._lengths: dict[int, int] = {}
        self._added = dict(added or {})

    def document(self, ids: npt.NDArray[np.int32], padding: npt.NDArray[np.bool_] | None = None) -> Document:
        """A document's ids [n] taken apart; `padding` [n] marks what belongs to nobody."""
        text, ends = self._text(ids)
        events = self._merged(list(self._events(text, ids, ends)), text)
        marks: list[tuple[int, Kind, int]] = [(0, Kind.START, -1)]
        turns: list[TurnPlace] = []
        if events and text[: events[0].start].strip():
            self._opening(text, events[0], marks)
        for i, event in enumerate(events):
            border = events[i + 1].start if i + 1 < len(events) else len(text)
            if event.role == "assistant":
                turns.append(self._turn(event, border, i, text, ends, marks))
            else:
                self._other(event, border, i, text, marks)
        places = np.asarray([mark[0] for mark in marks], np.int64)
        which = np.searchsorted(places, np.maximum(ends - 1, 0), side="right") - 1
        kinds = np.asarray([mark[1] for mark in marks], np.uint8)[which]
        messages = np.asarray([mark[2] for mark in marks], np.int32)[which]
        if padding is not None and padding.any():
            kinds, messages = kinds.copy(), messages.copy()
            kinds[padding], messages[padding] = Kind.PADDING, -1
        return Document(ids, text, ends, kinds, messages, tuple(event.role for event in events), tuple(turns))

    # -- text ------------------------------------------------------------------------------------------------------

    def _text(self, ids: npt.NDArray[np.int32]) -> tuple[str, Ints]:
        """(the text of `ids`, where in it each token ends)."""
        listed = ids.tolist()
        text = self._pieces.decode(listed)
        unique, inverse = np.unique(ids, return_inverse=True)
        lengths = np.asarray([self._length(int(token)) for token in unique], np.int64)
        if len(lengths) and lengths.min() >= 0:
            ends = np.cumsum(lengths[inverse.reshape(-1)])
            if ends[-1] == len(text):
                return text, ends
        # Bytes of characters, or a decoder that depends on neighbours: the first of such tokens takes the whole text.
        sizes = np.zeros(len(ids), np.int64)
        for start, _, piece in self._pieces.cut(listed):
            sizes[start] = len(piece)
        return text, np.cumsum(sizes)

    def _length(self, token: int) -> int:
        if token not in self._lengths:
            piece = self._pieces.text(token)
            self._lengths[token] = -1 if piece is None else len(piece)
        return self._lengths[token]

    # -- messages --------------------------------------------------------------------------------------------------

    @cached_property
    def _forms(self) -> list[tuple[str, str, Opener | None, int]]:
        """(header, role, opener, id of its first token or -1), the longest first; of two equal ones the answer's."""
        forms: list[tuple[str, str, Opener | None]] = [(o.text, "assistant", o) for o in self.structure.openers]
        forms += [(text, role, None) for role, texts in self.structure.headers.items() for text in texts]
        kept = {form[0].rstrip(): form for form in reversed(forms) if form[0].strip()}
        longest = sorted(kept.values(), key=lambda form: -len(form[0]))
        return [(*form, self._first_token(form[0])) for form in longest]

    def _first_token(self, text: str) -> int:
        found = max((token for token in self._added if text.startswith(token)), key=len, default="")
        return self._added.get(found, -1)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        cores = [(form[0], form[0].rstrip()) for form in self._forms]
        parts = [f"({_literal(core)}{_optional(text[len(core) :])})" for text, core in cores]
        return re.compile("|".join(parts) or r"(?!)")

    def _events(self, text: str, ids: npt.NDArray[np.int32], ends: Ints) -> Iterator[_Event]:
        for match in self._pattern.finditer(text):
            _, role, opener, first = self._forms[(match.lastindex or 1) - 1]
            if first < 0 or int(ids[np.searchsorted(ends, match.start(), side="right")]) == first:
                yield _Event(match.start(), match.end(), role, opener)

    def _merged(self, events: list[_Event], text: str) -> list[_Event]:
        """Without the headers that stand inside a turn: gpt-oss writes one for each channel."""
        kept: list[_Event] = []
        for event in events:
            before = kept[-1] if kept else None
            if before and before.role == event.role == "assistant" and self._stop(before, event.start, text) is None:
                continue
            kept.append(event)
        return kept

    def _stop(self, event: _Event, border: int, text: str) -> tuple[int, int] | None:
        """Where the stop of the turn that `event` opens stands; it may be the header of the next message."""
        found = []
        for stop in self.structure.stops:
            if _control(stop):
                at = text.find(stop, event.end, border + len(stop))
            else:
                at = text.rfind(stop, event.end, border)
            if 0 <= at <= border:
                found.append((at, at + len(stop)))
        return min(found) if found else None

    def _turn(
        self, event: _Event, border: int, index: int, text: str, ends: Ints, marks: list[tuple[int, Kind, int]]
    ) -> TurnPlace:
        assert event.opener is not None
        start, kind = event.end, Kind.ANSWER if event.opener.emitted else Kind.HEADER
        marks.append((event.start, kind, index))
        supplied = event.opener.supplied
        if supplied and text.startswith(supplied, start):
            marks.append((start, Kind.SUPPLIED, index))
            start += len(supplied)
        answer = event.start if event.opener.emitted else start
        empty = _EMPTY_THINK.match(text, start, border)
        if empty and THINKING.match(empty[1]):
            marks.append((start, Kind.EMPTY_THINK, index))
            start = empty.end()
        place, ending = self._stop(event, border, text), "stop"
        if place is None:
            last = len(text[:border].rstrip())
            closer = next((closer for closer in self.structure.closers if text.endswith(closer, start, last)), "")
            place, ending = ((last - len(closer), last), "closer") if closer else (None, "")
        stop, end = place or (border, border)
        space = end + len(text[end:border]) - len(text[end:border].lstrip())
        thought = _THINK.match(text, start, stop)
        if thought and THINKING.match(thought[1]):
            marks.append((start, Kind.REASONING, index))
            start = thought.end()
        elif supplied and (closing := _CLOSE.search(text, start, stop)) and answer == start:
            marks.append((start, Kind.REASONING, index))
            start = closing.end()
        marks.append((min(start, stop), Kind.ANSWER, index))
        if place:
            marks.append((stop, Kind.STOP, index))
            marks.append((end, Kind.AFTER_STOP, index))
            if space < border:  # Mistral writes the tools before the last question
                marks.append((space, Kind.SYSTEM, -1))
        chars = [event.start, answer, stop, end, max(space, end)]
        first, answer, stop, end, after = np.searchsorted(ends, chars, side="right").tolist()
        return TurnPlace(first, answer, stop, end, after, ending)

    def _other(self, event: _Event, border: int, index: int, text: str, marks: list[tuple[int, Kind, int]]) -> None:
        # A stop may be the header of this message: then the marks of the turn before reach into it.
        start = max(event.start, marks[-1][0])
        marks.append((start, Kind.STRUCTURE, index))
        at = max(start, event.end)
        marks.append((at, _TEXT_KINDS[event.role], index))
        for end in self.structure.ends.get(event.role, ()):
            for form in (end, end.strip()):
                if form and len(form) <= border - at and text.endswith(form, at, border):
                    marks.append((border - len(form), Kind.STRUCTURE, index))
                    return

    def _opening(self, text: str, event: _Event, marks: list[tuple[int, Kind, int]]) -> None:
        """What stands before the first header: BOS and a default system text, or the rest of a message cut apart."""
        head = _HEAD.match(text, 0, event.start)
        start = head.end() if head else 0
        last = len(text[: event.start].rstrip())
        stop = next((stop for stop in self.structure.stops if text.endswith(stop, start, last)), "")
        if start >= last:
            return
        if start or (event.role != "assistant" and not stop):
            marks.append((start, Kind.SYSTEM, -1))
        elif event.role == "assistant":
            marks.append((0, Kind.USER, -1))
        else:
            marks += [(0, Kind.ANSWER, -1), (last - len(stop), Kind.STOP, -1), (last, Kind.AFTER_STOP, -1)]


_HEAD = re.compile(r"(?:\s*(?:<[^<>\s]*>|\[[A-Z_]+\]))*")
_EMPTY_THINK = re.compile(r"\s*([<\[][^<>\[\]]{1,48}[>\]])\s*[<\[]/[^<>\[\]]{1,48}[>\]]\s*")
_CLOSE = re.compile(r"[<\[]/[^<>\[\]]*(?:think|thought|reason)[^<>\[\]]*[>\]]\s*")
_THINK = re.compile(rf"\s*([<\[][^<>\[\]]{{1,48}}[>\]]).*?{_CLOSE.pattern}", re.DOTALL)


def _control(stop: str) -> bool:
    return stop[:1] in "<[" and stop[-1:] in ">]"


def _literal(text: str) -> str:
    return r"\S{1,200}?".join(re.escape(part) for part in text.split("\0"))


def _optional(space: str) -> str:
    """Trailing whitespace of a header, as much of it as is there."""
    return "".join(f"(?:{re.escape(char)}" for char in space) + ")?" * len(space)
