"""What the user decides: which turns are trained, and what happens where template and data do not fit the law."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from chatloss.errors import RecipeError

__all__ = ["CHOICES", "Policy"]

CHOICES: Mapping[str, tuple[str, ...]] = {
    "row_format": ("auto", "per_turn", "multi_turn"),
    "unlawful": ("error", "keep"),
    "turns": ("all", "last", "last_round"),
    "off_prompt": ("error", "drop", "keep", "splice"),
    "altered": ("error", "drop", "keep"),
    "unrenderable": ("error", "drop"),
    "control_tokens": ("reject", "parity", "literal"),
    "missing_stop": ("append", "leave", "error"),
    "overflow": ("whole_turns", "window", "right", "drop", "error"),
    "content_format": ("auto", "string", "parts"),
    "tool_arguments": ("auto", "object", "string"),
}
PARTS = ("reasoning", "content", "calls")


@dataclass(frozen=True, slots=True)
class Policy:
    """Every choice that encoding leaves to the user; the defaults train all turns and refuse what breaks the law.

    - `row_format`: "auto" makes the fewest lawful rows; "per_turn" one row per turn; "multi_turn" one row per
      conversation, an error where that is unlawful unless `unlawful` is "keep".
    - `turns`: "all", "last" (the last one) or "last_round" (those after the last user message); `roles`: whose messages
      are turns; `parts`: which of reasoning, content and calls is trained. A message's `train` and `weight` hold too.
    - `spans`: (regular expression, weight) pairs; what a pattern matches inside an answer gets that weight.
    - `off_prompt`, `altered`, `unrenderable`: what to do with a turn of that outcome. "drop" leaves it untrained;
      "keep" trains it in its own rendering although that breaks the law; "splice" writes `splice_format` (any of
      {content}, {reasoning_content}, {stop}) after the prompt.
    - `control_tokens`: text that holds control tokens is rejected, encoded as control tokens ("parity": as engines do
      that do not sanitise), or encoded as ordinary text ("literal": as those do that sanitise), see `chatloss.literal`.
    - `missing_stop`: where a rendering ends without a stop, "append" one, "leave" it, or "error".
    - `max_length` (tokens; 0: unlimited) and `overflow`: "whole_turns" cuts a row after the last turn that fits whole,
      "window" leaves the oldest messages after the system message out, "right" cuts anywhere, "drop", "error".
    - `content_format`, `tool_arguments`: "auto" probes what the template takes.

    Raises `RecipeError` for values that do not exist.

    >>> Policy(max_length=4096).overflow
    'whole_turns'
    """

    row_format: str = "auto"
    unlawful: str = "error"
    turns: str = "all"
    roles: tuple[str, ...] = ("assistant",)
    parts: tuple[str, ...] = PARTS
    spans: tuple[tuple[str, float], ...] = ()
    off_prompt: str = "error"
    splice_format: str = "{content}"
    altered: str = "error"
    unrenderable: str = "error"
    control_tokens: str = "reject"
    missing_stop: str = "append"
    max_length: int = 0
    overflow: str = "whole_turns"
    content_format: str = "auto"
    tool_arguments: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                close = difflib.get_close_matches(str(value), choices, 1)
                meant = f" (did you mean {close[0]!r}?)" if close else ""
                hint = f"one of {', '.join(choices)}"
                raise RecipeError(f"{name} has no choice {value!r}{meant}", where=name, hint=hint)
        for part in self.parts:
            if part not in PARTS:
                raise RecipeError(f"there is no part {part!r}", where="parts", hint=f"any of {', '.join(PARTS)}")
        if isinstance(self.max_length, bool) or not isinstance(self.max_length, int) or self.max_length < 0:
            raise RecipeError(f"max_length must be a whole number, not {self.max_length!r}", where="max_length")
        for pattern, weight in self.spans:
            try:
                re.compile(pattern)
            except re.error as error:
                raise RecipeError(f"{pattern!r} is no regular expression: {error}", where="spans") from None
            if not math.isfinite(weight):
                raise RecipeError(f"the weight of {pattern!r} must be finite, not {weight}", where="spans")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """A policy from plain values (TOML, JSON); unknown names are errors with a suggestion.

        >>> Policy.from_dict({"turns": "last", "parts": ["content"]}).parts
        ('content',)
        """
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                meant = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names)}"
                raise RecipeError(f"there is no policy named {name!r}", where=name, hint=meant)
        plain = dict(values)
        for name in ("roles", "parts"):
            if name in plain:
                plain[name] = (plain[name],) if isinstance(plain[name], str) else tuple(plain[name])
        if "spans" in plain:
            try:
                plain["spans"] = tuple((str(pattern), float(weight)) for pattern, weight in plain["spans"])
            except (TypeError, ValueError):
                hint = '[["\\\\d+", 2.0]]'
                raise RecipeError("spans must be [regex, weight] pairs", where="spans", hint=hint) from None
        return cls(**plain)
