"""Which conversation a document was made of: by order where that holds, else by what both say first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from chatloss.chat import Conversation, Message, split_think

__all__ = ["Matcher", "needle"]

MOST_HELD = 10_000
LONGEST = 60


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
        self._held: list[tuple[Conversation, tuple[str, ...]]] = []
        self._most, self._at = most, 0
        self._found: set[str] = set()
        self.n_read = 0

    def find(self, text: str) -> Conversation | None:
        """The conversation of which `text` is a rendering, or None."""
        while len(self._held) <= self._at and self._read():
            pass
        order = [i for i in (self._at, self._at - 1) if 0 <= i < len(self._held)]
        at = next((i for i in order if self._matches(i, text)), None)
        if at is None:
            while len(self._held) < self._most and self._read():
                pass
            at = next((i for i in range(len(self._held)) if self._matches(i, text)), None)
        if at is None:
            return None
        self._at = at + 1
        found = self._held[at][0]
        self._found.add(found.source)
        if self._at > self._most // 2 and len(self._held) >= self._most:
            del self._held[: self._at - 1]
            self._at = 1
        return found

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
            self._held.append((conversation, _signs(conversation)))
        return True

    def _matches(self, at: int, text: str) -> bool:
        signs = self._held[at][1]
        return bool(signs) and all(sign in text for sign in signs)


def _signs(conversation: Conversation) -> tuple[str, ...]:
    """How the first question and the first answer begin."""
    first = {role: next((m for m in conversation.messages if m.role == role and needle(m)), None)
             for role in ("user", "assistant")}
    return tuple(needle(message) for message in first.values() if message is not None)
