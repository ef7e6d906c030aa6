"""Which conversation a document was made of: by order where that holds, else by what both say first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from chatloss.chat import Conversation, Message, split_think

__all__ = ["Matcher", "needle"]

MOST_HELD = 10_000
LONGEST = 80


def needle(message: Message) -> str:
    """A text that a rendering of `message` holds: how its text begins, else the name of its call.

    >>> needle(Message("assistant", "<think>no</think> Yes, certainly. "))
    'Yes, certainly.'
    """
    _, content = split_think(message.text)
    text = content.strip()[:LONGEST].split("\n")[0].strip()
    return text or next((call.name for call in message.tool_calls), "")


class Matcher:
    """Finds the conversation of a document among the next 10,000, first in order; several documents may share one."""

    def __init__(self, conversations: Iterable[Conversation], most: int = MOST_HELD) -> None:
        self._coming: Iterator[Conversation] = iter(conversations)
        self._held: list[_Signs] = []
        self._most, self._at, self._turns = most, 0, 0
        self._found: set[str] = set()
        self.n_read = 0

    def find(self, text: str, turns: int) -> Conversation | None:
        """The conversation of which `text`, with so many answers in it, is a rendering, or None."""
        while len(self._held) <= self._at and self._read():
            pass
        # Rows of one conversation grow: one with no more answers than the row before begins another.
        near = (self._at - 1, self._at) if turns > self._turns else (self._at, self._at - 1)
        at = self._search(near, text, turns)
        if at is None or not self._held[at].all(text, turns):
            while len(self._held) < self._most and self._read():
                pass
            far = self._search(range(len(self._held)), text, turns)
            at = far if at is None or (far is not None and self._held[far].all(text, turns)) else at
        if at is None:
            return None
        self._at, self._turns = at + 1, turns
        found = self._held[at].conversation
        self._found.add(found.source)
        if self._at > self._most // 2 and len(self._held) >= self._most:
            del self._held[: self._at - 1]
            self._at = 1
        return found

    def _search(self, places: Iterable[int], text: str, turns: int) -> int | None:
        """The first place whose answers all stand in `text`, else whose first does, else whose question does."""
        likely = [i for i in places if 0 <= i < len(self._held) and self._held[i].question in text]
        ranks = [(not self._held[i].all(text, turns), not self._held[i].all(text, 1), place)
                 for place, i in enumerate(likely) if self._held[i].question or self._held[i].all(text, 1)]
        return likely[min(ranks)[2]] if ranks else None

    def left(self) -> int:
        """How many conversations no document was found for; reads the rest of them."""
        while self._read(hold=False):
            pass
        return self.n_read - len(self._found)

    def _read(self, hold: bool = True) -> bool:
        conversation = next(self._coming, None)
        if conversation is None:
            return False
        self.n_read += 1
        if hold:
            self._held.append(_Signs.of(conversation))
        return True


@dataclass(frozen=True, slots=True)
class _Signs:
    """How the first question and the answers of a conversation begin."""

    conversation: Conversation
    question: str
    answers: tuple[str, ...]

    @classmethod
    def of(cls, conversation: Conversation) -> _Signs:
        question = next((needle(message) for message in conversation.messages if message.role == "user"), "")
        answers = tuple(needle(message) for message in conversation.messages if message.role == "assistant")
        return cls(conversation, question, answers)

    def all(self, text: str, turns: int) -> bool:
        """Whether `text` holds the beginnings of as many answers as it has."""
        return len(self.answers) >= turns and all(sign in text for sign in self.answers[:turns])
