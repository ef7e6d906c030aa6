"""What went wrong, where, and what to do about it. One exit code per kind of error."""

from __future__ import annotations

import re
from typing import ClassVar

__all__ = ["ChatlossError", "CheckFailed", "DataError", "RecipeError", "TemplateError", "TokenizerError", "UsageError",
           "one_line"]

# Control characters, and those that change the direction of what follows.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def one_line(text: str) -> str:
    """`text`, which may quote a stranger's file, as part of one line of a terminal that it cannot command.

    >>> one_line("a\\n\\x1b[31mb")
    'a↵⟨U+001B⟩[31mb'
    """
    return _UNSAFE.sub(lambda match: _shown(match[0]), text)


def _shown(char: str) -> str:
    return {"\n": "↵", "\t": " "}.get(char, f"⟨U+{ord(char):04X}⟩")


class ChatlossError(Exception):
    """A mistake in the user's input, told in three parts.

    `what` says what is wrong, `where` is a path such as ``train.jsonl:17 messages[2].content`` (may be empty while an
    inner function does not know it; `at` adds it), `hint` names the remedy. `kind` is a stable word that counts and
    JSON output group by; `exit_code` is what the command line ends with.

    >>> print(DataError("role must be a string", where="a.jsonl:3 messages[0].role", hint="use 'user'"))
    error: role must be a string
      --> a.jsonl:3 messages[0].role
    hint: use 'user'
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", hint: str = "", kind: str = "") -> None:
        super().__init__(what, where, hint, kind)
        self.what = what
        self.where = where
        self.hint = hint
        self.kind = kind or type(self).__name__

    def at(self, place: str) -> ChatlossError:
        """This error with `place` (``file:row``) put before where it already points."""
        return type(self)(self.what, where=f"{place} {self.where}".strip(), hint=self.hint, kind=self.kind)

    def __str__(self) -> str:
        lines = [f"error: {one_line(self.what)}"]
        if self.where:
            lines.append(f"  --> {one_line(self.where)}")
        if self.hint:
            lines.append(f"hint: {one_line(self.hint)}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.where, self.hint, self.kind))


def _rebuild(cls: type[ChatlossError], what: str, where: str, hint: str, kind: str) -> ChatlossError:
    return cls(what, where=where, hint=hint, kind=kind)


class DataError(ChatlossError):
    """A row, or a whole file, is not what its format says, or breaks the law under the chosen policy."""


class TemplateError(ChatlossError):
    """A chat template does not compile, raises on a conversation, or exceeds the sandbox's bounds."""


class TokenizerError(ChatlossError):
    """A tokenizer cannot be loaded, or cannot do what is asked of it."""


class RecipeError(ChatlossError):
    """A training recipe, a checkpoint or a model does not fit."""


class CheckFailed(ChatlossError):
    """An audit found errors."""


class UsageError(ChatlossError):
    """The command line itself is wrong."""

    exit_code = 2
