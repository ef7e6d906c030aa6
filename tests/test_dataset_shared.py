"""What the rows of a conversation begin with alike is stored once: they come back as they were, damage is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss import dataset as datasets
from chatloss.dataset import Prepared, ShardWriter
from chatloss.errors import DataError
from chatloss.folders import Folder
from chatloss.manifest import FORMAT, Counts, shard_file, write_json
from chatloss.sample import Reason, Sample, Span

Rows = list[tuple[str, Sample]]
# message, weight, reason
VALUES = [(-1, 0.0, Reason.SCAFFOLD), (0, 0.0, Reason.OTHER_ROLE), (1, 1.0, Reason.CONTENT), (1, 0.5, Reason.CONTENT),
          (1, 0.0, Reason.SPLIT), (3, 1.0, Reason.STOP)]
ids = st.lists(st.integers(0, 2), max_size=6)
parts = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(VALUES)), max_size=5)
statuses = st.dictionaries(st.integers(0, 2), st.sampled_from(["exact", "split", "switched_off"]), max_size=2)


@st.composite
def samples(draw: st.DrawFn, trunk: list[int], trunk_parts: list[Any], source: str) -> Sample:
    """A row that begins with a part of the trunk, and with some of its spans."""
    own = trunk[: draw(st.integers(0, len(trunk)))] + draw(ids)
    own = own or [0]
    spans: list[Span] = []
    for length, value in [*trunk_parts[: draw(st.integers(0, len(trunk_parts)))], *draw(parts), (len(own), VALUES[0])]:
        at = spans[-1].end if spans else 0
        if at < len(own):
            spans.append(Span(at, min(at + length, len(own)), *value))
    return Sample(np.array(own, np.int32), tuple(spans), draw(statuses), source, draw(statuses))


@st.composite
def examples(draw: st.DrawFn) -> list[Rows]:
    """Conversations and pairs whose rows have all sorts of beginnings in common, some being the same object."""
    made = []
    for n in range(draw(st.integers(1, 4))):
        trunk, trunk_parts = draw(ids), draw(parts)
        rows: Rows = []
        for side in draw(st.sampled_from([("",), ("chosen", "rejected"), ("desirable",)])):
            source = f"a:b.jsonl:{n + 1}" + (f" {side}" if side in ("chosen", "rejected") else "")
            of_side = draw(st.lists(samples(trunk, trunk_parts, source), min_size=1, max_size=4))
            rows += [(side, row) for row in of_side + of_side[: draw(st.integers(0, 1))]]
        made.append(rows)
    return made


def written(examples: Sequence[Rows], directory: Path, group_tokens: int = 8) -> Counts:
    """A prepared directory of one shard."""
    folder = Folder(str(directory))
    folder.make("shards")
    path = directory / shard_file(0)
    with pytest.MonkeyPatch.context() as patch, ShardWriter(path) as writer:
        patch.setattr(datasets, "GROUP_TOKENS", group_tokens)
        for rows in examples:
            writer.add(rows)
    described(directory, len(examples))
    return writer.counts


def described(directory: Path, conversations: int) -> None:
    about = {"file": shard_file(0), "bytes": (directory / shard_file(0)).stat().st_size, "conversations": conversations}
    job = {"format": FORMAT, "export": "rows"}
    write_json(Folder(str(directory)), "manifest.json", {"job": job, "shards": [about], "counts": {}})


def plain(rows: Rows) -> list[Any]:
    return [(side, row.input_ids.dtype, row.spans, row.to_dict()) for side, row in rows]


def counted(examples: Sequence[Rows]) -> Counts:
    rows = [row for of_example in examples for _, row in of_example]
    reasons = Counter(Reason(reason).name.lower() for row in rows for reason in row.reasons.tolist())
    return Counts(rows=len(rows), tokens=sum(map(len, rows)), trained=sum(row.n_trained for row in rows),
                  reasons=reasons)


def in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


@settings(max_examples=200, deadline=None)
@given(examples())
def test_rows_come_back_as_they_were_and_are_counted(made: list[Rows]) -> None:
    with TemporaryDirectory() as folder:
        assert written(made, Path(folder)) == counted(made)
        prepared, table = Prepared(folder), pq.read_table(Path(folder, shard_file(0))).to_pylist()
        for i in reversed(range(len(made))):
            assert plain(prepared.sided(i)) == plain(made[i])
    for i, rows in enumerate(made):
        stored, last = [row for row in table if row["conversation"] == i], rows[-1][1]
        assert {row["conversation_trained"] for row in stored} == {sum(row.n_trained for _, row in rows)}
        for (_, row), part in zip(rows[:-1], stored, strict=False):
            shared = in_common(row.input_ids, last.input_ids)
            spans = in_common([span for span in row.spans if span.end <= shared], last.spans)
            assert (part["shared_ids"], part["shared_spans"]) == (shared, spans)
            assert part["rest_ids"] == row.input_ids[shared:].tolist()
            assert len(part["rest_span_ends"]) == len(row.spans) - spans


def agent(turns: int) -> Rows:
    """A row per turn, each with the history up to it."""
    rows = []
    for n in range(1, turns + 1):
        spans = [Span(20 * i, 20 * i + 20, i, 0.0, Reason.SPLIT) for i in range(n)]
        spans.append(Span(20 * n, 20 * n + 5, n, 1.0, Reason.CONTENT))
        outcomes = dict.fromkeys(range(1, turns + 1), "split")
        rows.append(("", Sample(np.arange(20 * n + 5, dtype=np.int32), tuple(spans), outcomes, "chats.jsonl:1")))
    return rows


def test_a_row_group_is_measured_by_what_is_stored(tmp_path: Path) -> None:
    rows = agent(50)
    counts = written([rows] * 4, tmp_path, group_tokens=3000)
    file = pq.ParquetFile(tmp_path / shard_file(0))
    stored = sum(map(len, file.read()["rest_ids"].to_pylist()))
    assert counts.tokens == 4 * sum(len(row) for _, row in rows) > 20 * stored
    assert file.num_row_groups == 2


DAMAGE: list[tuple[str, int, Any, str]] = [
    *((column, 0, value, "shares more") for column in ("shared_ids", "shared_spans") for value in (-1, 10_000)),
    *((column, 2, 1, "last row") for column in ("shared_ids", "shared_spans")),
    ("turns", 2, None, "last row"),
    ("shared_spans", 0, 2, ""), ("shared_ids", 0, 3, ""),
    ("rest_ids", 0, [-5], "numbers from 0"), ("rest_span_ends", 0, [0], ""), ("rest_span_reasons", 0, [99], ""),
    ("rest_span_weights", 2, [1.0] * 9, ""), ("rest_span_messages", 2, [0] * 9, ""),
    ("conversation", 2, 1, "last row"),
]


@pytest.mark.parametrize(("column", "row", "value", "what"), DAMAGE)
def test_rows_that_cannot_be_joined_are_refused(
    column: str, row: int, value: Any, what: str, tmp_path: Path
) -> None:
    written([agent(3)], tmp_path)
    path = tmp_path / shard_file(0)
    table = pq.read_table(path)
    at, values = table.schema.get_field_index(column), table[column].to_pylist()
    values[row] = value
    field = table.schema.field(at)
    pq.write_table(table.set_column(at, field, pa.array(values, type=field.type)), path)
    described(tmp_path, 1)
    with pytest.raises(DataError, match=f"cannot be read: .*{what}") as caught:
        Prepared(tmp_path)[0]
    assert caught.value.where == str(path) and "--fresh" in caught.value.hint


def test_a_conversation_without_its_last_row_is_refused(tmp_path: Path) -> None:
    written([agent(3)], tmp_path)
    path = tmp_path / shard_file(0)
    table = pq.read_table(path)
    for rows, what in ((table.slice(0, 2), "last row"), (table.slice(3), "")):
        pq.write_table(rows, path)
        described(tmp_path, 1)
        with pytest.raises(DataError, match=f"cannot be read: .*{what}"):
            Prepared(tmp_path)[0]
