"""Rows that are put together when they are asked for: what they begin with is another's.

A conversation with a row per turn has half as many rows as messages, and nearly all of each is in the last one too.
Made whole they take the square of the conversation; a shard stores what they have in common once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.sample import Decode, Reason, Sample, Span

__all__ = ["LazySample", "Strip", "Values", "strip_of"]

_REASONS = {int(reason): reason for reason in Reason}
_put: Any = object.__setattr__


class Values(NamedTuple):
    """The message (int32), weight (float64) and reason (uint8) of each of some spans."""

    messages: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float64]
    reasons: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, values: Sequence[tuple[int, float, int]]) -> Values:
        """Those of (message, weight, reason) of each span."""
        messages, weights, reasons = zip(*values, strict=True) if values else ((), (), ())
        return cls(np.array(messages, np.int32), np.array(weights, np.float64), np.array(reasons, np.uint8))

    def part(self, first: int, last: int | None = None) -> Values:
        return Values(self.messages[first:last], self.weights[first:last], self.reasons[first:last])

    def copy(self) -> Values:
        """The same, to let go of what it is a part of."""
        return Values(self.messages.copy(), self.weights.copy(), self.reasons.copy())

    def behind(self, other: Values) -> Values:
        """Both, the other ones first."""
        return Values(
            np.concatenate((other.messages, self.messages)), np.concatenate((other.weights, self.weights)),
            np.concatenate((other.reasons, self.reasons)),
        )

    def alike(self, other: Values) -> int:
        """How many at their beginning are the same."""
        size = min(len(self.messages), len(other.messages))
        mine, others = self.part(0, size), other.part(0, size)
        differing = (mine.messages != others.messages) | (mine.weights != others.weights)
        return first_of(differing | (mine.reasons != others.reasons))


class Strip(NamedTuple):
    """Spans that follow each other from token `start` on, in arrays: where each ends (int32), and its values."""

    start: int
    ends: npt.NDArray[np.int32]
    values: Values

    def behind(self, first: int) -> Strip:
        """All but the first spans."""
        if not first:
            return self
        return Strip(int(self.ends[first - 1]), self.ends[first:], self.values.part(first))

    def alike(self, other: Strip, at: int, token: int) -> int:
        """How many spans are the same as those of another from its span `at` on, of those that end up to `token`."""
        if not len(self.ends) or self.ends[0] > token:
            return 0
        size = min(int(self.ends.searchsorted(token, "right")), len(other.ends) - at)
        same = self.values.part(0, size).alike(other.values.part(at))
        return first_of(self.ends[:same] != other.ends[at : at + same])

    def spans(self) -> tuple[Span, ...]:
        ends = self.ends.tolist()
        reasons = map(_REASONS.__getitem__, self.values.reasons.tolist())
        return tuple(map(Span, [self.start, *ends], ends, self.values.messages.tolist(), self.values.weights.tolist(),
                         reasons))


def strip_of(spans: Sequence[Span]) -> Strip:
    """Spans that follow each other, in arrays."""
    ends = np.array([span.end for span in spans], np.int32)
    return Strip(spans[0].start if spans else 0, ends, Values.of([span[2:] for span in spans]))


def first_of(there: npt.NDArray[np.bool_]) -> int:
    """The index of the first that is true, or how many there are."""
    at = int(there.argmax()) if len(there) else 0
    return at if len(there) and there[at] else len(there)


class LazySample(Sample):
    """A row of which the first `n_ids` ids are those of `base`, and the first `n_spans` spans, which end within these;
    `ids` and `strip` are the rest, which does not begin alike. Without a `base` that is all of it.

    To everybody else it is a `Sample`.
    """

    __slots__ = ("base", "ids", "n_ids", "n_spans", "strip")
    base: Sample | None
    ids: npt.NDArray[np.int32]
    strip: Strip
    n_ids: int
    n_spans: int

    @classmethod
    def of(
        cls, ids: npt.NDArray[np.int32], strip: Strip, outcomes: Mapping[int, str], source: str,
        untrained: Mapping[int, str], decode: Decode, base: tuple[Sample, int, int] | None = None,
    ) -> LazySample:
        """A row whose spans are known to partition it. `base`: as (base, n_ids, n_spans)."""
        made = cls.__new__(cls)
        begun, n_ids, n_spans = base or (None, 0, 0)
        set_ids, set_strip, set_base, set_n_ids, set_n_spans, set_outcomes, set_source, set_untrained, set_decode = _SET
        set_ids(made, ids)
        set_strip(made, strip)
        set_base(made, begun)
        set_n_ids(made, n_ids)
        set_n_spans(made, n_spans)
        set_outcomes(made, outcomes)
        set_source(made, source)
        set_untrained(made, untrained)
        set_decode(made, decode)
        return made

    def __post_init__(self) -> None:
        """For `dataclasses.replace`, which makes it whole."""
        super().__post_init__()
        for name, value in (("base", None), ("n_ids", 0), ("n_spans", 0)):
            _put(self, name, value)
        _put(self, "ids", self.input_ids)
        _put(self, "strip", strip_of(self.spans))

    @property
    def input_ids(self) -> npt.NDArray[np.int32]:
        try:
            whole: npt.NDArray[np.int32] = _IDS.__get__(self)
        except AttributeError:
            whole = self.ids if self.base is None else np.concatenate((self.base.input_ids[: self.n_ids], self.ids))
            _IDS.__set__(self, whole)
        return whole

    @input_ids.setter
    def input_ids(self, whole: npt.NDArray[np.int32]) -> None:
        _IDS.__set__(self, whole)

    @property
    def spans(self) -> tuple[Span, ...]:
        try:
            whole: tuple[Span, ...] = _SPANS.__get__(self)
        except AttributeError:
            whole = (() if self.base is None else self.base.spans[: self.n_spans]) + self.strip.spans()
            _SPANS.__set__(self, whole)
        return whole

    @spans.setter
    def spans(self, whole: tuple[Span, ...]) -> None:
        _SPANS.__set__(self, whole)

    def __len__(self) -> int:
        return self.n_ids + len(self.ids)


# Where a sample keeps what its constructor was given.
_IDS, _SPANS = (vars(Sample)[name] for name in ("input_ids", "spans"))
# What sets a slot, twice as fast as by its name.
_SET: Any = [getattr(LazySample, name).__set__ for name in (
    "ids", "strip", "base", "n_ids", "n_spans", "outcomes", "source", "untrained", "decode",
)]
