"""What each turn, conversation, length and file of your data gets of the loss: under every reduction, and by mistake.

A share of the loss is a part of the sum of ``|u_t * w_t| / Z``, which is the part of the loss if every trained token
has the same nll. Reductions are taken over all of the data, as if one optimiser step held it. Beside them stand what
many trainers compute instead, means of means: of micro-batches, and of ranks.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from chatloss.batch import epoch_order
from chatloss.compare_report import CompareReport
from chatloss.compare_shares import FilePart, Kind, Mover, Part, Shares
from chatloss.errors import DataError, RecipeError
from chatloss.reduction import FORMS, UNITS, Reduction, Unit
from chatloss.sample import Sample

__all__ = ["REDUCTIONS", "CompareReport", "compare"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

REDUCTIONS = ("token", "turn", "conversation", "power:0.5:turn", "power:0.5:conversation", "sum:turn",
              "sum:conversation", "constant:1024:turn")
MOVERS = 5
_EQUAL = 1e-9
_SOURCE = re.compile(r"(.*):(\d{1,18})", re.DOTALL)


def compare(
    examples: Iterable[Sequence[Sample]], *, micro_rows: Sequence[int] = (1, 4, 8), ranks: Sequence[int] = (2, 4, 8),
    seed: int = 0, step_rows: int = 32, reductions: Sequence[str] = REDUCTIONS,
) -> CompareReport:
    """The shares of the loss in one pass over `examples`, each of them all rows of one conversation.

    `token`, to which everything is compared, comes first whether or not `reductions` names it. The mistaken ones are
    computed for rows that hold one turn (format A of the literature), one conversation (B), and, if they are neither,
    the rows as they come; in the order of the data and shuffled by `seed`. Means of micro-batches: `micro_rows` rows
    that follow each other form a micro-batch (the last may be smaller), divide by their own tokens, and every mean
    counts the same. Means of ranks: the rows of a step, `step_rows` of them, are dealt out to so many ranks, each of
    which divides by its own tokens; a step as a whole keeps the share that `token` gives it. Rows that train nothing
    are left out, and so is position 0 of a row, which nothing predicts.

    Reads `examples` once and keeps some numbers for each turn, nothing for a token. Raises `RecipeError` for an unknown
    reduction, `DataError` if nothing is trained, `ValueError` for sizes below 1.

    >>> from chatloss.sample import Reason, Span
    >>> def answer(n): return [Sample(np.zeros(n + 1, np.int32),
    ...     (Span(0, 1, 0, 0.0, Reason.OTHER_ROLE), Span(1, n + 1, 1, 1.0, Reason.CONTENT)), source=f"a.jsonl:{n}")]
    >>> report = compare([answer(10), answer(990)])
    >>> report["token"].deciles["turn"], report["turn"].deciles["turn"]
    ((0.01, 0.99), (0.5, 0.5))
    >>> round(report["A: means of 1 row"].spread), report["A: means of 1 row"].same_as
    (99, 'turn')
    """
    if min([*micro_rows, *ranks, step_rows]) < 1:
        raise ValueError("micro_rows, ranks and step_rows must be at least 1")
    named = list(dict.fromkeys(Reduction.parse(name).name for name in ("token", *reductions)))
    table = Table.of(examples)
    ways = [*(Shares(name, "reduction") for name in named), *_mistaken(table, micro_rows, ranks, step_rows)]
    measured = _Measured(table)
    shares: list[Shares] = []
    known: dict[str, Floats] = {}
    for way in ways:
        w, z = _weights(table, way, seed, step_rows)
        relative = measured.relative(w, z, way.name)
        same = next((name for name, other in known.items() if np.allclose(relative, other, _EQUAL, 0.0)), "")
        if way.kind == "reduction" and not same:
            known[way.name] = relative
        shares.append(replace(measured.shares(way, w, z, relative), same_as=same))

    def shares_of(name: str, unit: Unit) -> Floats:
        way = next(way for way in ways if way.name == name)
        return measured.unit_shares(_weights(table, way, seed, step_rows)[0], unit)

    return CompareReport(
        counts=table.counts(), parts={unit: measured.parts(unit) for unit in UNITS}, files=measured.file_parts(),
        shares=tuple(shares), seed=seed, step_rows=step_rows, shares_of=shares_of,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The trained tokens of a stream. A piece is what one row trains of one turn; nearly always that is all of it.

    Of the P pieces: `n` trained tokens, `user` sum of ``|u|``, `square` sum of ``u^2``, `row` and `turn` that it is of.
    Of the K turns, sorted by conversation and message: `conversation`, `message`. Of the M conversations: `file` and
    `number` of the row (-1: unknown). `skipped` conversations train nothing.
    """

    n: Ints
    user: Floats
    square: Floats
    row: Ints
    turn: Ints
    conversation: Ints
    message: Ints
    file: Ints
    number: Ints
    files: tuple[str, ...]
    skipped: int

    @classmethod
    def of(cls, examples: Iterable[Sequence[Sample]]) -> Table:
        """Raises `DataError` if nothing is trained or a weight is not finite."""
        n, row, turn, conversation, message, file, number = (array("q") for _ in range(7))
        user, square = array("d"), array("d")
        files: dict[str, int] = {}
        rows = skipped = 0
        for samples in examples:
            turns: dict[int, list[tuple[int, int, float, float]]] = {}
            for sample in samples:
                pieces = _pieces(sample)
                for index, (count, total, squares) in pieces.items():
                    turns.setdefault(index, []).append((rows, count, total, squares))
                rows += bool(pieces)
            if not turns:
                skipped += 1
                continue
            for index in sorted(turns):
                for in_row, count, total, squares in turns[index]:
                    row.append(in_row)
                    turn.append(len(message))
                    n.append(count)
                    user.append(total)
                    square.append(squares)
                conversation.append(len(file))
                message.append(index)
            found = _SOURCE.fullmatch(samples[0].source)
            file.append(files.setdefault(found[1] if found else samples[0].source, len(files)))
            number.append(int(found[2]) if found else -1)
        if not n:
            raise DataError("nothing is trained", hint="see `chatloss view` for what is not, and why", kind="empty")
        return cls(
            _ints(n), np.frombuffer(user, np.float64), np.frombuffer(square, np.float64), _ints(row), _ints(turn),
            _ints(conversation), _ints(message), _ints(file), _ints(number), tuple(files), skipped,
        )

    def ids(self, unit: Unit) -> Ints:
        """int64 [P]: the unit that a piece is of."""
        return self.turn if unit == "turn" else self.conversation[self.turn]

    def tokens(self, unit: Unit) -> Floats:
        """float64 [units]: trained tokens."""
        return _sums(self.ids(unit), self.n)

    def where(self, unit: Unit, index: int) -> str:
        """``file:row``, and of a turn its message."""
        m = int(self.conversation[index]) if unit == "turn" else index
        name = self.files[self.file[m]]
        source = f"{name}:{self.number[m]}" if self.number[m] >= 0 else name
        return f"{source} messages[{self.message[index]}]".strip() if unit == "turn" else source

    def counts(self) -> dict[str, int]:
        return {"conversations": len(self.file), "turns": len(self.message), "rows": int(self.row.max()) + 1,
                "trained_tokens": int(self.n.sum()), "files": len(self.files), "untrained_conversations": self.skipped}


def _ints(values: array[int]) -> Ints:
    return np.frombuffer(values, np.int64)


def _sums(ids: Ints, values: npt.NDArray[Any]) -> Floats:
    """float64 [ids that occur or are smaller]."""
    return np.bincount(ids, values).astype(np.float64, copy=False)


def _pieces(sample: Sample) -> dict[int, tuple[int, float, float]]:
    """Of every message that the row trains: tokens after the shift, sum of ``|u|`` and of ``u^2``."""
    pieces: dict[int, tuple[int, float, float]] = {}
    for span in sample.spans:
        u = abs(float(np.float32(span.weight)))  # float32, as `Sample.weights` has it
        count = span.end - max(span.start, 1)
        if u and count:
            if not math.isfinite(u):
                what, hint = "a token weight is not finite", "weights must be finite numbers"
                raise DataError(what, where=sample.source, hint=hint)
            tokens, total, squares = pieces.get(span.message, (0, 0.0, 0.0))
            pieces[span.message] = tokens + count, total + count * u, squares + count * u * u
    return pieces


def _rows(table: Table, rows: str) -> Ints:
    """int64 [P]: the row of a piece in that format; rows are numbered in the order of the data."""
    return table.row if rows == "encoded" else table.ids("turn" if rows == "A" else "conversation")


def _mistaken(table: Table, micro_rows: Sequence[int], ranks: Sequence[int], step_rows: int) -> Iterator[Shares]:
    """The ways to be mistaken: names and kinds, the rest of `Shares` still empty."""
    known: list[Ints] = []
    for rows in ("A", "B", "encoded"):
        of = _rows(table, rows)
        if any(np.array_equal(of, other) for other in known):
            continue
        known.append(of)
        sizes = [(f"{n} row{'s' * (n != 1)}", "micro_batch_means", n) for n in dict.fromkeys(micro_rows)]
        sizes += [(f"{n} rank{'s' * (n != 1)}", "rank_means", n) for n in dict.fromkeys(ranks)]
        for words, kind, size in sizes:
            way = Shares(f"{rows}: means of {words}", cast(Kind, kind), rows, size)
            group, per_step = _groups(way, int(of.max()) + 1, step_rows)
            groups = len(np.unique(group))
            if groups == 1 or (groups == len(group) and groups <= per_step):
                yield way
            else:
                yield replace(way, order="data")
                yield replace(way, name=f"{way.name}, shuffled", order="shuffled")


def _groups(way: Shares, count: int, step_rows: int) -> tuple[Ints, int]:
    """(the group of each of so many places in the order of rows, groups in a step)."""
    place = np.arange(count)
    if way.kind == "micro_batch_means":
        return place // way.size, -(-count // way.size)
    return place // step_rows * way.size + place % step_rows % way.size, way.size


def _weights(table: Table, way: Shares, seed: int, step_rows: int) -> tuple[Floats, float]:
    """w, float64 [P], and Z."""
    if way.kind == "reduction":
        reduction = Reduction.parse(way.name)
        with np.errstate(all="ignore"):  # too large or small a power is told where the weights are summed
            w, z = FORMS[reduction.form](table.tokens(reduction.unit), reduction.number)
            return w[table.ids(reduction.unit)], float(z.sum())
    rows = _rows(table, way.rows)
    group_at, per_step = _groups(way, int(rows.max()) + 1, step_rows)
    group = group_at
    if way.order == "shuffled":
        group = np.empty_like(group_at)
        group[epoch_order(len(group_at), seed, 0)] = group_at
    # In a step of N tokens, of whose G groups one has n, a token of that one weighs N / (G n) instead of 1.
    n = _sums(group[rows], table.n)
    step = np.arange(len(n)) // per_step
    tokens, groups = _sums(step, n), _sums(step, n > 0)
    w = tokens[step] / (groups[step] * np.maximum(n, 1.0))  # nobody asks for the weight in a rank without rows
    return w[group[rows]], float(table.n.sum())


class _Measured:
    """What all ways have in common: the tenths of the units, and what everything gets under `token`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.lengths = {unit: table.tokens(unit) for unit in UNITS}
        self.tenths = {unit: _tenths(self.lengths[unit]) for unit in UNITS}
        ones = np.ones(len(table.n))
        self.token = {unit: self.unit_shares(ones, unit) for unit in UNITS}
        self.token_tenths = {unit: _sums(self.tenths[unit], self.token[unit]) for unit in UNITS}

    def unit_shares(self, w: Floats, unit: Unit) -> Floats:
        """float64 [units], sum 1."""
        sums = _sums(self.table.ids(unit), self.table.user * w)
        sums /= sums.sum()
        return sums

    def relative(self, w: Floats, z: float, name: str) -> Floats:
        """float64 [P]: how many times the weight of a token is what it is under `token`."""
        with np.errstate(all="ignore"):
            total = float((self.table.user * w).sum())
        if not (0 < total < math.inf and 0 < z < math.inf):
            raise RecipeError(
                f"the weights under {name!r} are too large or too small for numbers", where="loss.reduction",
                hint="use a power nearer to 0",
            )
        return w * (float(self.table.user.sum()) / total)

    def shares(self, way: Shares, w: Floats, z: float, relative: Floats) -> Shares:
        table = self.table
        units = {unit: self.unit_shares(w, unit) for unit in UNITS}
        tenths = {unit: _sums(self.tenths[unit], units[unit]) for unit in UNITS}
        total = float((table.user * w).sum())
        movers = {unit: units[unit] - self.token[unit] for unit in UNITS}
        return replace(
            way, scale=total / z, factor=float(table.user.sum()) / total,
            lowest=float(relative.min()), highest=float(relative.max()),
            effective={**{unit: float(1 / (units[unit] ** 2).sum()) for unit in UNITS},
                       "token": float(table.user.sum() ** 2 / (table.square * relative**2).sum())},
            deciles={unit: tuple(tenths[unit].tolist()) for unit in UNITS},
            short_to_long={unit: self._short_to_long(tenths[unit], unit) for unit in UNITS},
            files=tuple(_sums(table.file, units["conversation"]).tolist()),
            gain={unit: self._movers(movers[unit], units[unit], unit) for unit in UNITS},
            lose={unit: self._movers(-movers[unit], units[unit], unit) for unit in UNITS},
        )

    def _short_to_long(self, tenths: Floats, unit: Unit) -> float:
        per_token = tenths / self.token_tenths[unit]
        return float(per_token[0] / per_token[-1]) if per_token[-1] else math.inf

    def _movers(self, by: Floats, shares: Floats, unit: Unit) -> tuple[Mover, ...]:
        """The units with the largest `by`, the earlier first among equals."""
        most = min(MOVERS, len(by))
        found = np.flatnonzero(by >= np.partition(by, -most)[-most])
        found = found[np.argsort(-by[found], kind="stable")][:most]
        return tuple(
            Mover(self.table.where(unit, i), int(self.lengths[unit][i]), float(shares[i]), float(self.token[unit][i]))
            for i in found.tolist() if by[i] > _EQUAL * self.token[unit][i]
        )

    def parts(self, unit: Unit) -> tuple[Part, ...]:
        lengths, tenths = self.lengths[unit], self.tenths[unit]
        inside = [lengths[tenths == i] for i in range(int(tenths.max()) + 1)]
        total = lengths.sum()
        return tuple(Part(int(n.min()), int(n.max()), len(n), int(n.sum()), float(n.sum() / total)) for n in inside)

    def file_parts(self) -> tuple[FilePart, ...]:
        table = self.table
        chats = np.bincount(table.file)
        turns = np.bincount(table.file[table.conversation])
        tokens = _sums(table.file, self.lengths["conversation"])
        return tuple(FilePart(name, int(chats[i]), int(turns[i]), int(tokens[i]), float(tokens[i] / tokens.sum()))
                     for i, name in enumerate(table.files))


def _tenths(lengths: Floats) -> Ints:
    """int64 [units]: 0 for the shortest tenth to 9 for the longest; fewer groups if there are fewer units.

    >>> _tenths(np.array([30.0, 10.0, 20.0]))
    array([2, 0, 1])
    """
    out = np.empty(len(lengths), np.int64)
    out[np.argsort(lengths, kind="stable")] = np.arange(len(lengths)) * min(10, len(lengths)) // len(lengths)
    return out
