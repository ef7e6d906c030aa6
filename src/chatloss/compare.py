"""What each turn, conversation, length and file of your data gets of the loss: under every reduction, and by mistake.

A share of the loss is a part of the sum of ``|u_t * w_t| / Z``, which is the part of the loss if every trained token
has the same nll. Reductions are taken over all of the data, as if one optimiser step held it. Beside them stand what
many trainers compute instead, means of means: of micro-batches, and of ranks.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from chatloss.batch import epoch_order
from chatloss.compare_report import CompareReport, FilePart, Mover, Part, Shares
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
    schemes = [*(_reduction(table, name) for name in named), *_mistaken(table, micro_rows, ranks, seed, step_rows)]
    measured = _Measured(table)
    shares: list[Shares] = []
    known: dict[str, Floats] = {}
    for scheme in schemes:
        w = scheme.weights()
        relative = measured.relative(w, scheme.shares.name)
        same = next((name for name, other in known.items() if np.allclose(relative, other, _EQUAL, 0.0)), "")
        if scheme.shares.kind == "reduction" and not same:
            known[scheme.shares.name] = relative
        shares.append(replace(measured.shares(scheme, w, relative), same_as=same))
    by_name = {scheme.shares.name: scheme for scheme in schemes}
    return CompareReport(
        counts=table.counts(), parts={unit: measured.parts(unit) for unit in UNITS}, files=measured.file_parts(),
        shares=tuple(shares), seed=seed, step_rows=step_rows,
        shares_of=lambda name, unit: measured.unit_shares(by_name[name].weights(), unit),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """The trained tokens of a stream. A piece is what one row trains of one turn; nearly always that is all of it.

    Of the P pieces: `n` trained tokens, `user` sum of ``|u|``, `square` sum of ``u^2``, `row` and `turn` they are of. Of
    the K turns, sorted by conversation and message: `conversation`, `message`. Of the M conversations: `file` and
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
        ints = [np.frombuffer(of, np.int64) for of in (n, row, turn, conversation, message, file, number)]
        floats = [np.frombuffer(of, np.float64) for of in (user, square)]
        return cls(ints[0], *floats, *ints[1:], tuple(files), skipped)

    def ids(self, unit: Unit) -> Ints:
        """int64 [P]: the unit that a piece is of."""
        return self.turn if unit == "turn" else self.conversation[self.turn]

    def tokens(self, unit: Unit) -> Floats:
        """float64 [units]: trained tokens."""
        return np.bincount(self.ids(unit), self.n)

    def where(self, unit: Unit, index: int) -> str:
        """``file:row``, and of a turn its message."""
        m = int(self.conversation[index]) if unit == "turn" else index
        name = self.files[self.file[m]]
        source = f"{name}:{self.number[m]}" if self.number[m] >= 0 else name
        return f"{source} messages[{self.message[index]}]".strip() if unit == "turn" else source

    def counts(self) -> dict[str, int]:
        return {"conversations": len(self.file), "turns": len(self.message), "rows": int(self.row.max()) + 1,
                "trained_tokens": int(self.n.sum()), "files": len(self.files), "untrained_conversations": self.skipped}


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


@dataclass(frozen=True, slots=True)
class _Scheme:
    """One way to weigh. `shares` has its name and kind, the rest still empty; `weights` makes w, float64 [P]."""

    shares: Shares
    weights: Callable[[], Floats]
    denominator: float


def _reduction(table: Table, name: str) -> _Scheme:
    reduction = Reduction.parse(name)
    of = table.ids(reduction.unit)
    with np.errstate(all="ignore"):  # too large or small a power is told where the weights are summed
        w, z = FORMS[reduction.form](table.tokens(reduction.unit), reduction.number)
        return _Scheme(Shares(name, "reduction"), lambda: w[of], float(z.sum()))


def _mistaken(
    table: Table, micro_rows: Sequence[int], ranks: Sequence[int], seed: int, step_rows: int
) -> Iterator[_Scheme]:
    formats = {"A": table.turn, "B": table.ids("conversation"), "encoded": table.row}
    for i, (rows, of) in enumerate(formats.items()):
        if any(np.array_equal(of, other) for other in list(formats.values())[:i]):
            continue
        count = int(of.max()) + 1
        for size in dict.fromkeys(micro_rows):
            shares = Shares(f"{rows}: means of {size} row{'s' * (size != 1)}", "micro_batch_means", rows, size)
            at = np.arange(count) // size
            yield from _in_orders(table, shares, of, at, int(at[-1]) + 1, seed)
        step, place = np.divmod(np.arange(count), step_rows)
        for size in dict.fromkeys(ranks):
            shares = Shares(f"{rows}: means of {size} rank{'s' * (size != 1)}", "rank_means", rows, size)
            yield from _in_orders(table, shares, of, step * size + place % size, size, seed)


def _in_orders(
    table: Table, shares: Shares, rows: Ints, group_at: Ints, per_step: int, seed: int
) -> Iterator[_Scheme]:
    """Means of groups of rows. `rows` [P] are ids, `group_at` the group of every place, `per_step` groups a step."""
    groups = len(np.unique(group_at))
    whatever = groups == 1 or (groups == len(group_at) and groups <= per_step)
    for order in ("",) if whatever else ("data", "shuffled"):
        group = group_at
        if order == "shuffled":
            group = np.empty_like(group_at)
            group[epoch_order(len(group_at), seed, 0)] = group_at
        name = f"{shares.name}, shuffled" if order == "shuffled" else shares.name
        weights = _group_means(table, group[rows], per_step)
        yield _Scheme(replace(shares, name=name, order=order), weights, float(table.n.sum()))


def _group_means(table: Table, group: Ints, per_step: int) -> Callable[[], Floats]:
    """In a step of N tokens whose G groups have n each, a token weighs N / (G n) instead of 1."""

    def weights() -> Floats:
        n = np.bincount(group, table.n)
        step = np.arange(len(n)) // per_step
        tokens, groups = np.bincount(step, n), np.bincount(step, n > 0)
        w = tokens[step] / (groups[step] * np.maximum(n, 1.0))  # nobody asks for the weight in a rank without rows
        return w[group]

    return weights


class _Measured:
    """What the schemes have in common: the tenths of the units, and what everything gets under `token`."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.lengths = {unit: table.tokens(unit) for unit in UNITS}
        self.tenths = {unit: _tenths(self.lengths[unit]) for unit in UNITS}
        ones = np.ones(len(table.n))
        self.token = {unit: self.unit_shares(ones, unit) for unit in UNITS}
        self.token_tenths = {unit: np.bincount(self.tenths[unit], self.token[unit]) for unit in UNITS}

    def unit_shares(self, w: Floats, unit: Unit) -> Floats:
        """float64 [units], sum 1."""
        sums = np.bincount(self.table.ids(unit), self.table.user * w)
        return sums / sums.sum()

    def relative(self, w: Floats, name: str) -> Floats:
        """float64 [P]: how many times the weight of a token is what it is under `token`."""
        with np.errstate(all="ignore"):
            total = float((self.table.user * w).sum())
        if not (math.isfinite(total) and total > 0):
            raise RecipeError(
                f"the weights under {name!r} are too large or too small for numbers", where="loss.reduction",
                hint="use a power nearer to 0",
            )
        return w * (self.table.user.sum() / total)

    def shares(self, scheme: _Scheme, w: Floats, relative: Floats) -> Shares:
        table = self.table
        units = {unit: self.unit_shares(w, unit) for unit in UNITS}
        tenths = {unit: np.bincount(self.tenths[unit], units[unit]) for unit in UNITS}
        tokens = float((table.user * w).sum() ** 2 / (table.square * w * w).sum())
        movers = {unit: units[unit] - self.token[unit] for unit in UNITS}
        return replace(
            scheme.shares,
            scale=math.fsum(table.user * w) / scheme.denominator, factor=float(table.user.sum() / (table.user * w).sum()),
            lowest=float(relative.min()), highest=float(relative.max()),
            effective={**{unit: float(1 / (units[unit] ** 2).sum()) for unit in UNITS}, "token": tokens},
            deciles={unit: tuple(tenths[unit].tolist()) for unit in UNITS},
            short_to_long={unit: self._short_to_long(tenths[unit], unit) for unit in UNITS},
            files=tuple(np.bincount(table.file, units["conversation"]).tolist()),
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
        tokens = np.bincount(table.file, self.lengths["conversation"])
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
