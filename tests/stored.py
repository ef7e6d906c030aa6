"""What a shard holds of rows, to be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chatloss.columns import parts_of
from chatloss.sample import Sample


def stored(rows: Sequence[Sample]) -> list[Any]:
    """The parts of a conversation's rows."""
    if not rows:
        return []
    return [
        (one.source, one.shared_ids, one.ids.tolist(), one.shared_spans, one.spans.spans(), one.turns)
        for one in parts_of(0, [("", row) for row in rows], "rows")
    ]


def whole(rows: Sequence[Sample]) -> list[Sample]:
    """The same rows, none of which says what it has in common with another."""
    return [Sample(row.input_ids, row.spans, row.outcomes, row.source, row.untrained) for row in rows]
