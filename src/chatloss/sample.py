"""One training row: ids, and a few spans that say of every token whose it is, what it weighs and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Reason", "Sample", "Span"]

Decode = Callable[[Sequence[int]], str]


class Reason(IntEnum):
    """Why a token is, or is not, trained. Values below 16 are trained unless their weight is 0 by the user's wish."""

    CONTENT = 1
    REASONING = 2
    CALL = 3
    STOP = 4
    HEADER = 5
    GENERATION_PROMPT = 16
    SCAFFOLD = 17
    OTHER_ROLE = 18
    SWITCHED_OFF = 19
    SPLIT = 20
    TRUNCATED = 21
    OFF_PROMPT = 22
    ALTERED = 23
    UNRENDERABLE = 24
    PADDING = 25

    @property
    def trained(self) -> bool:
        return self < 16

    @property
    def explanation(self) -> str:
        return _EXPLANATIONS[self]


_EXPLANATIONS = {
    Reason.CONTENT: "trained: the answer itself",
    Reason.REASONING: "trained: reasoning, with the markup the model must emit around it",
    Reason.CALL: "trained: a tool call, with the markup the model must emit around it",
    Reason.STOP: "trained: the stop at which the engine ends the turn",
    Reason.HEADER: "trained: a header or scaffold that the prompt does not supply, so the model must emit it",
    Reason.GENERATION_PROMPT: "not trained: supplied by the generation prompt",
    Reason.SCAFFOLD: "not trained: written by the template, not by the model",
    Reason.OTHER_ROLE: "not trained: another role's text",
    Reason.SWITCHED_OFF: "not trained: switched off by train/weight or by the policy",
    Reason.SPLIT: "not trained here: this turn is trained in another row, where its context is the one of inference",
    Reason.TRUNCATED: "not trained: the turn does not fit whole into max_length",
    Reason.OFF_PROMPT: "not trained: inference would never show this prompt before this answer",
    Reason.ALTERED: "not trained: the template changed or dropped part of the answer",
    Reason.UNRENDERABLE: "not trained: the template cannot render this turn's prompt",
    Reason.PADDING: "not trained: padding",
}


class Span(NamedTuple):
    """Tokens [start, end) of a row that share message (-1: none), weight and reason."""

    start: int
    end: int
    message: int
    weight: float
    reason: Reason


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One training row of a conversation.

    `input_ids` is int32 [n]. `spans` partition [0, n) in order. `outcomes` maps the index of every assistant message of
    the conversation that is a turn to "exact", "split", "off_prompt", "altered" or "unrenderable"; `untrained` says why
    any assistant message is trained in no row. `source` is ``file:row``; all rows of one conversation share it. The
    per-token arrays are derived from the spans when asked for.
    """

    input_ids: npt.NDArray[np.int32]
    spans: tuple[Span, ...]
    outcomes: Mapping[int, str] = field(default_factory=dict)
    source: str = ""
    untrained: Mapping[int, str] = field(default_factory=dict)
    decode: Decode | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        end = 0
        for start, following, _, _, _ in self.spans:
            assert start == end < following, "spans must partition the row in order"
            end = following
        assert end == len(self.input_ids), "spans must cover the row"

    def __len__(self) -> int:
        return len(self.input_ids)

    def _per_token(self, values: Sequence[Any], dtype: type[np.generic]) -> npt.NDArray[Any]:
        return np.repeat(np.asarray(values, dtype=dtype), [span.end - span.start for span in self.spans])

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """float32 [n]; weights[t] weighs the prediction of input_ids[t] from input_ids[:t]; 0 = not trained."""
        return self._per_token([span.weight for span in self.spans], np.float32)

    @property
    def turns(self) -> npt.NDArray[np.int32]:
        """int32 [n]; index of the message a trained token belongs to, -1 elsewhere."""
        return self._per_token([span.message if span.weight else -1 for span in self.spans], np.int32)

    @property
    def messages(self) -> npt.NDArray[np.int32]:
        """int32 [n]; index of the message any token belongs to, -1 for none."""
        return self._per_token([span.message for span in self.spans], np.int32)

    @property
    def reasons(self) -> npt.NDArray[np.uint8]:
        """uint8 [n]; `Reason` of every token."""
        return self._per_token([int(span.reason) for span in self.spans], np.uint8)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """int64 [n]; input_ids where trained, -100 elsewhere. Not shifted: a causal-LM loss shifts it itself."""
        return np.where(self.weights != 0, self.input_ids, -100).astype(np.int64)

    @property
    def n_trained(self) -> int:
        """How many tokens of this row have a weight other than 0."""
        return sum(span.end - span.start for span in self.spans if span.weight)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `chatloss encode --json` prints."""
        return {
            "source": self.source,
            "input_ids": self.input_ids.tolist(),
            "weights": self.weights.tolist(),
            "turns": self.turns.tolist(),
            "messages": self.messages.tolist(),
            "reasons": self.reasons.tolist(),
            "outcomes": {str(message): outcome for message, outcome in self.outcomes.items()},
            "untrained": {str(message): why for message, why in self.untrained.items()},
        }

    def __reduce__(self) -> tuple[object, ...]:
        # The decoder belongs to the process that encoded the row.
        return (type(self), (self.input_ids, self.spans, dict(self.outcomes), self.source, dict(self.untrained)))

    def _repr_html_(self) -> str:
        from chatloss.view import sample_html

        return sample_html(self)
