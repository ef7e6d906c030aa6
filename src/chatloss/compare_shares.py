"""Who gets what of the loss under one way to weigh tokens: the numbers that a comparison is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from chatloss.reduction import UNITS, Unit

__all__ = ["FilePart", "Kind", "Mover", "Part", "Shares"]

Kind = Literal["reduction", "micro_batch_means", "rank_means"]


@dataclass(frozen=True, slots=True)
class Part:
    """A tenth of the units, by length: from `low` to `high` trained tokens, and its share of all trained tokens."""

    low: int
    high: int
    units: int
    tokens: int
    token_share: float

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A source file, and its share of all trained tokens."""

    file: str
    conversations: int
    turns: int
    tokens: int
    token_share: float

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True, slots=True)
class Mover:
    """A turn or conversation that gets another share of the loss than under `token`."""

    where: str
    tokens: int
    share: float
    share_under_token: float

    def to_dict(self) -> dict[str, Any]:
        return _plain(self)


@dataclass(frozen=True, slots=True)
class Shares:
    """Who gets what under one way to weigh tokens; all shares sum to 1.

    `rows` is "A", "B" or "encoded" for a mistaken `kind`, `size` the rows of its micro-batches or its ranks, `order`
    "data" or "shuffled" ("" where it makes no difference). `same_as` names an earlier reduction with the same shares.
    `scale` is the loss if every nll is 1. `lowest` and `highest` are what a trained token weighs, user weights apart,
    in units of what it weighs under `token`; `factor` turns w into these. `effective` is how many equal turns,
    conversations and tokens would carry the loss as evenly: (sum s)^2 / sum s^2 (Kish). `deciles` are shares by length,
    shortest first, and `short_to_long` is the weight of a token in the first of them over one in the last. `files` are
    in the order of `CompareReport.files`. `gain` and `lose` differ most in share from `token`.
    """

    name: str
    kind: Kind
    rows: str = ""
    size: int = 0
    order: str = ""
    same_as: str = ""
    scale: float = 1.0
    factor: float = 1.0
    lowest: float = 1.0
    highest: float = 1.0
    effective: Mapping[str, float] = field(default_factory=dict)
    deciles: Mapping[Unit, tuple[float, ...]] = field(default_factory=dict)
    short_to_long: Mapping[Unit, float] = field(default_factory=dict)
    files: tuple[float, ...] = ()
    gain: Mapping[Unit, tuple[Mover, ...]] = field(default_factory=dict)
    lose: Mapping[Unit, tuple[Mover, ...]] = field(default_factory=dict)

    @property
    def spread(self) -> float:
        """How many times the weight of one trained token is that of another, at most; user weights apart."""
        return self.highest / self.lowest if self.lowest else math.inf

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; a ratio beyond all numbers is None."""
        return {
            "name": self.name, "kind": self.kind, "row_format": self.rows, "size": self.size, "order": self.order,
            "same_as": self.same_as, "scale": self.scale, "lowest": self.lowest, "highest": self.highest,
            "spread": finite_or_none(self.spread), "effective": dict(self.effective),
            "deciles": {unit: list(self.deciles[unit]) for unit in UNITS},
            "short_to_long": {unit: finite_or_none(self.short_to_long[unit]) for unit in UNITS},
            "files": list(self.files),
            "gain": {unit: [mover.to_dict() for mover in self.gain[unit]] for unit in UNITS},
            "lose": {unit: [mover.to_dict() for mover in self.lose[unit]] for unit in UNITS},
        }


def _plain(item: Part | FilePart | Mover) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__dataclass_fields__}


def finite_or_none(value: float) -> float | None:
    """JSON knows no infinity."""
    return value if math.isfinite(value) else None
