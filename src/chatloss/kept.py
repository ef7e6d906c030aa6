"""Texts that are made again and again, kept by what they are made of."""

from __future__ import annotations

import marshal
from typing import Any

__all__ = ["Kept", "exact"]

_LONGEST, _MOST = 2**13, 2**21  # characters of one, with what it is made of, and of all


class Kept:
    """What was made, by what it was made of; all is forgotten when it is too much."""

    def __init__(self) -> None:
        self.texts: dict[str | bytes, str] = {}
        self._size = 0

    def keep(self, of: str | bytes, text: str) -> str:
        """`text`, which is found under `of` from now on."""
        size = len(of) + len(text)
        if size <= _LONGEST:
            if self._size + size > _MOST:
                self.texts.clear()
                self._size = 0
            self.texts[of] = text
            self._size += size
        return text


def exact(value: Any) -> bytes | None:
    """What nothing but an equal value of the same types has; None for a value that JSON does not give.

    >>> exact([1]) == exact([1]), exact([1]) == exact([True]), exact([1]) == exact((1,)), exact({1, object()})
    (True, False, False, None)
    """
    try:
        return marshal.dumps(value, 2)
    except ValueError:
        return None
