"""Rows that are joined when they are asked for are samples like any other."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from chatloss.lazy import LazySample, Strip, Values, strip_of
from chatloss.sample import Reason, Sample, Span
from tests.stored import stored, whole

HISTORY = (Span(0, 3, 0, 0.0, Reason.OTHER_ROLE), Span(3, 5, 1, 0.0, Reason.SPLIT))
LAST = (*HISTORY, Span(5, 8, 3, 0.1, Reason.CONTENT))
OWN = Span(3, 6, 1, 1.0, Reason.CONTENT)


def row(ids: list[int], spans: tuple[Span, ...], base: tuple[Sample, int, int] | None = None) -> LazySample:
    return LazySample.of(np.array(ids, np.int32), strip_of(spans), {1: "split", 3: "exact"}, "a.jsonl:1", {}, str, base)


def rows() -> list[LazySample]:
    last = row([7, 8, 9, 1, 2, 3, 4, 5], LAST)
    return [row([6, 6], (OWN,), (last, 4, 1)), last]


def test_a_lazy_row_is_the_whole_row() -> None:
    one, last = rows()
    assert len(one) == 6 and one.input_ids.tolist() == [7, 8, 9, 1, 6, 6] and one.spans == (*HISTORY[:1], OWN)
    assert one.n_trained == 3 and one.labels.tolist() == [-100, -100, -100, 1, 6, 6]
    assert last.input_ids.tolist() == [7, 8, 9, 1, 2, 3, 4, 5] and last.spans == LAST
    assert [span.weight for span in last.spans] == [0.0, 0.0, 0.1]
    assert all(type(span.reason) is Reason and type(span.end) is int for span in one.spans)


def test_it_can_be_changed_like_any_other_and_not_be_mutated() -> None:
    one, _ = rows()
    other = replace(one, source="b.jsonl:2", spans=(Span(0, 6, 0, 0.0, Reason.OTHER_ROLE),))
    assert other.source == "b.jsonl:2" and len(other.spans) == 1 and len(other) == 6
    assert stored([other]) == stored(whole([other]))
    with pytest.raises(AssertionError, match="cover the row"):
        replace(one, spans=HISTORY)
    copy = pickle.loads(pickle.dumps(one))
    assert copy.spans == one.spans and copy.input_ids.tolist() == one.input_ids.tolist() and copy.decode is None
    for name in ("source", "input_ids", "spans"):
        with pytest.raises(FrozenInstanceError):
            setattr(one, name, "")


def test_what_a_shard_holds_of_lazy_rows_is_what_it_holds_of_whole_ones() -> None:
    one, last = rows()
    further = row([9], (Span(5, 7, 3, 0.1, Reason.CONTENT),), (last, 6, 2))
    for some in ([one, last], [one, further, last], [last, one], [last, further], [further, one], [one, further]):
        assert stored(some) == stored(whole(some))


def test_strips_are_compared_span_by_span() -> None:
    strip = strip_of(LAST)
    assert strip.spans() == LAST and strip.behind(0) is strip and strip.behind(2).spans() == LAST[2:]
    own = Strip(3, np.array([5, 8], np.int32), Values.of([(1, 0.0, Reason.SPLIT), (3, 0.5, Reason.CONTENT)]))
    assert [own.alike(strip, 1, token) for token in (4, 5, 8)] == [0, 1, 1]
    assert own.values.alike(strip.values.part(1)) == 1 and strip.values.part(1).alike(strip.values.part(1, 3)) == 2
