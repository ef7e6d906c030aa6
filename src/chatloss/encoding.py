"""What encoding a conversation gives: rows, the outcome of every turn, and problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from chatloss.errors import DataError
from chatloss.frozen import made_quickly
from chatloss.reference import Turn
from chatloss.sample import Sample

__all__ = ["Encoding", "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    """What a conversation has that the policy does not settle silently. `fatal`: `encode` refuses because of it."""

    cause: str
    message: int
    detail: str
    remedy: str
    fatal: bool

    def where(self, source: str) -> str:
        """``source messages[i]``, or the source alone for what is in no message."""
        return f"{source} messages[{self.message}]".strip() if self.message >= 0 else source

    def error(self, source: str) -> DataError:
        return DataError(self.detail, where=self.where(source), hint=self.remedy, kind=self.cause)


@made_quickly
@dataclass(frozen=True, slots=True)
class Encoding:
    """All that encoding found out about a conversation: its rows, the outcome of every turn, and the problems.

    `outcomes` and `untrained` are as in `Sample`; `turns` holds the text of every turn that was looked at.
    """

    rows: list[Sample]
    outcomes: Mapping[int, str]
    untrained: Mapping[int, str]
    problems: tuple[Problem, ...]
    turns: tuple[Turn, ...] = ()
