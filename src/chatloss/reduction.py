"""Reductions: what every trained token weighs, and what an optimiser step divides by.

``loss = sum_t u_t * w_t * nll_t / Z``. `u` is the user's weight of a token, `w` the reduction's, and `Z` a sum of
contributions, one per example, so that micro-batches and ranks can add theirs up before the first backward pass.

A reduction is a form applied to a unit. The unit is a ``turn`` (one trained message) or a ``conversation``; the form is
one small function from the number of trained tokens of every unit to the weight of its tokens and its share of `Z`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from chatloss.errors import DataError, RecipeError
from chatloss.sample import Sample

__all__ = ["ALIASES", "FORMS", "UNITS", "ExampleWeights", "Reduction", "WeightNorm"]

Floats = npt.NDArray[np.float64]
Unit = Literal["turn", "conversation"]
WeightNorm = Literal["count", "weights"]
Form = Callable[[Floats, float], tuple[Floats, Floats]]

UNITS: tuple[Unit, ...] = ("turn", "conversation")


def power(n: Floats, p: float) -> tuple[Floats, Floats]:
    """``w = n^-p``, ``Z = sum n^(1-p)``. p = 0 is the token mean, p = 1 the mean of unit means, 0.5 InternVL's square.

    >>> power(np.array([1.0, 4.0]), 0.5)
    (array([1. , 0.5]), array([1., 2.]))
    """
    return n**-p, n ** (1.0 - p)


def unit_sum(n: Floats, _: float) -> tuple[Floats, Floats]:
    """``w = 1``, ``Z = number of units``: the mean over units of their summed loss (seq-mean-token-sum)."""
    return np.ones_like(n), np.ones_like(n)


def constant(n: Floats, horizon: float) -> tuple[Floats, Floats]:
    """``w = 1``, ``Z = units * H``: Dr. GRPO's length-free normaliser. H is the user's, never the padded width."""
    return np.ones_like(n), np.full_like(n, horizon)


FORMS: dict[str, Form] = {"power": power, "sum": unit_sum, "constant": constant}

# Every other name in use in the field -> the name used here. "{}" takes the number that the name is followed by.
ALIASES = {
    "token": "power:0:turn",
    "token-mean": "token",
    "num-items-in-batch": "token",
    "calculate-per-token-loss": "token",
    "dapo": "token",
    "turn": "mean:turn",
    "mean:turn": "power:1:turn",
    "format-a": "mean:turn",
    "sample-level": "mean:turn",
    "seq-mean-token-mean": "mean:turn",
    "conversation": "mean:conversation",
    "mean:conversation": "power:1:conversation",
    "format-b": "mean:conversation",
    "square": "power:0.5:conversation",
    "square-averaging": "power:0.5:conversation",
    "internvl-square": "power:0.5:conversation",
    "seq-mean-token-sum": "sum:turn",
    "seq-mean-token-sum-norm": "constant:{}:turn",
    "dr-grpo": "constant:{}:turn",
}
_SHORT = {"power:0:turn": "token", "power:0:conversation": "token", "power:1:turn": "turn",
          "power:1:conversation": "conversation"}


@dataclass(frozen=True, slots=True, eq=False)
class ExampleWeights:
    """What one example (a conversation with all its rows) adds to an optimiser step.

    `weights[r]` is float64 [n] for row r: ``u_t * w_t`` of the prediction of ``input_ids[t]``, 0 where not trained and
    always 0 at position 0, which nothing predicts. `denominator` is the example's share of `Z`. `tokens` counts its
    trained targets and `units` the turns (or the conversation) that have any.
    """

    weights: tuple[Floats, ...]
    denominator: float
    tokens: int
    units: int


@dataclass(frozen=True, slots=True)
class Reduction:
    """A form, its number (p of `power`, H of `constant`, else 0), a unit, and how user weights enter `Z`.

    With ``weight_norm="count"`` user weights scale the loss and leave `Z` as it is, so they may be negative.
    ``"weights"`` sets ``Z = sum_t u_t * w_t``; a negative weight could make that 0 or turn the loss around, and is
    refused.
    """

    form: str
    number: float
    unit: Unit
    weight_norm: WeightNorm = "count"

    @classmethod
    def parse(cls, name: str, weight_norm: str = "count") -> Reduction:
        """The reduction that `name` means; raises `RecipeError` with the nearest known names.

        >>> Reduction.parse("token").name, Reduction.parse("mean:turn").name, Reduction.parse("Dr. GRPO:4096").name
        ('token', 'turn', 'constant:4096:turn')
        >>> Reduction.parse("tokn")
        Traceback (most recent call last):
        chatloss.errors.RecipeError: error: unknown reduction 'tokn'
          --> loss.reduction
        hint: did you mean 'token'?
        """
        if weight_norm not in ("count", "weights"):
            raise RecipeError(
                f"unknown weight_norm {weight_norm!r}", where="loss.weight_norm", hint="use 'count' or 'weights'"
            )
        form, number, unit = _parse(name)
        return cls(form, number, unit, weight_norm)  # type: ignore[arg-type]

    @property
    def name(self) -> str:
        """The canonical name, which `parse` understands; without `weight_norm`."""
        number = "" if self.form == "sum" else ":" + repr(self.number).removesuffix(".0")
        full = f"{self.form}{number}:{self.unit}"
        return _SHORT.get(full, full)

    def of_example(self, rows: Sequence[Sample]) -> ExampleWeights:
        """Weights and share of `Z` of one example: all rows of one conversation, over which its units are counted.

        n counts targets with ``u != 0``, after the shift. An example that trains nothing gives zeros.

        >>> from chatloss.sample import Reason, Span
        >>> spans = Span(0, 2, 0, 0.0, Reason.OTHER_ROLE), Span(2, 6, 1, 1.0, Reason.CONTENT)
        >>> row = Sample(np.arange(6, dtype=np.int32), spans)
        >>> out = Reduction.parse("turn").of_example([row])
        >>> out.weights[0], out.denominator
        (array([0.  , 0.  , 0.25, 0.25, 0.25, 0.25]), 1.0)
        """
        users = [_user_weights(row) for row in rows]
        trained = [user != 0 for user in users]
        keys = [row.messages[mask] if self.unit == "turn" else np.zeros(int(mask.sum()), np.int32)
                for row, mask in zip(rows, trained, strict=True)]
        tokens = sum(len(key) for key in keys)
        if tokens == 0:
            return ExampleWeights(tuple(np.zeros(len(row)) for row in rows), 0.0, 0, 0)
        if self.weight_norm == "weights" and any((user < 0).any() for user in users):
            raise _negative(rows, users)
        _, inverse, counts = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
        w_unit, z_unit = FORMS[self.form](counts.astype(np.float64), self.number)
        w_token = np.split(w_unit[inverse], np.cumsum([len(key) for key in keys])[:-1])
        weights = []
        for user, mask, w in zip(users, trained, w_token, strict=True):
            weight = np.zeros(len(user))
            weight[mask] = user[mask] * w
            weights.append(weight)
        z = math.fsum(z_unit) if self.weight_norm == "count" else math.fsum(np.concatenate(weights))
        return ExampleWeights(tuple(weights), z, tokens, len(counts))


def _user_weights(row: Sample) -> Floats:
    user = row.weights.astype(np.float64)
    if not np.isfinite(user).all():
        raise DataError("a token weight is not finite", where=row.source, hint="weights must be finite numbers")
    user[:1] = 0.0
    return user


def _negative(rows: Sequence[Sample], users: Sequence[Floats]) -> DataError:
    row = next(row for row, user in zip(rows, users, strict=True) if (user < 0).any())
    return DataError(
        "negative token weights under weight_norm 'weights', which divides by their sum", where=row.source,
        hint="set loss.weight_norm = 'count', where weights scale the loss only", kind="negative weight",
    )


def _parse(name: str) -> tuple[str, float, Unit]:
    key = ":".join(_normal(part) for part in name.split(":"))
    for _ in range(3):  # an alias may name another
        head, _, rest = key.partition(":")
        if key in ALIASES:
            key = ALIASES[key]
        elif rest and "{}" in ALIASES.get(head, ""):
            key = ALIASES[head].format(rest)
    if "{}" in key:
        raise RecipeError(
            f"reduction {name!r} needs its constant H", where="loss.reduction", hint=f"for example '{name}:4096'"
        )
    parts = key.split(":")
    form, number, unit = parts[0], parts[1:-1], parts[-1]
    if form in FORMS and unit in UNITS and len(number) == (0 if form == "sum" else 1):
        return form, _number(form, number[0], name) if number else 0.0, unit
    if form in _PATTERNS or unit in _PATTERNS:
        pattern = _PATTERNS.get(form) or _PATTERNS[unit]
        hint = f"write it as {pattern}, where UNIT is turn or conversation"
    else:
        known = [*ALIASES, "sum:turn", "sum:conversation"]
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(known)}"
    raise RecipeError(f"unknown reduction {name!r}", where="loss.reduction", hint=hint)


_PATTERNS = {"mean": "mean:UNIT", "sum": "sum:UNIT", "power": "power:P:UNIT", "constant": "constant:H:UNIT"}


def _normal(part: str) -> str:
    try:
        float(part)
    except ValueError:
        return "-".join(re.split(r"[\s_.\-]+", part.strip().lower()))
    return part.strip()


def _number(form: str, text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or (form == "constant" and value <= 0):
        kind = "a positive number" if form == "constant" else "a finite number"
        raise RecipeError(
            f"{text!r} in reduction {name!r} is not {kind}", where="loss.reduction",
            hint=f"write it as {_PATTERNS[form]}",
        )
    return value
