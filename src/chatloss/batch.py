"""Examples -> global batches -> balanced micro-batches of NumPy arrays, padded or packed.

A global batch is what one optimiser step optimises: whole examples. Packs and micro-batches are made inside it and are
execution details. Targets are shifted here and nowhere else: position t of a micro-batch holds the id that it predicts
(`target_ids`) and the weight of that prediction, so that no loss can shift twice or cross a document's edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.errors import RecipeError
from chatloss.pack import best_fit, spread
from chatloss.reduction import ExampleWeights
from chatloss.sample import Sample

__all__ = ["IGNORE", "Document", "GlobalBatch", "Layout", "MicroBatch", "documents_of", "epoch_order", "global_batches"]

IGNORE = -100  # target id of a position whose prediction nobody asked for

Plan = list[list[list[list[int]]]]  # [rank][micro-batch][pack] -> indices of documents


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """One row, shifted, and cut after its last wanted target: what comes later changes nothing in a causal model.

    `input_ids` int32 [n] = ids[:n]; `target_ids` int64 [n] = ids[1:n+1] where wanted, else -100; `weights` float64 [n]
    weighs the prediction made at a position. `row` is where it came from: target t is token t+1 of that row. Documents
    that follow each other with the same `unit` (but -1) stay in one micro-batch.
    """

    input_ids: npt.NDArray[np.int32]
    target_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    row: Sample
    unit: int = -1

    def __len__(self) -> int:
        return len(self.input_ids)


def documents_of(rows: Sequence[Sample], weights: ExampleWeights, every_token: bool = False) -> list[Document]:
    """The documents of one example; rows that train nothing give none.

    With `every_token` all predictions are wanted (at their own weight, 0 if not trained): for evaluation.

    >>> from chatloss.reduction import Reduction
    >>> from chatloss.sample import Reason, Span
    >>> spans = (Span(0, 2, 0, 0.0, Reason.OTHER_ROLE), Span(2, 4, 1, 1.0, Reason.CONTENT),
    ...          Span(4, 5, 1, 0.0, Reason.SCAFFOLD))
    >>> row = Sample(np.arange(10, 15, dtype=np.int32), spans)
    >>> [document] = documents_of([row], Reduction.parse("token").of_example([row]))
    >>> document.input_ids, document.target_ids, document.weights
    (array([10, 11, 12], dtype=int32), array([-100,   12,   13]), array([0., 1., 1.]))
    """
    documents = []
    for row, weight in zip(rows, weights.weights, strict=True):
        wanted = np.ones(len(row), bool) if every_token else weight != 0
        wanted[:1] = False
        if wanted.any():
            n = int(np.flatnonzero(wanted)[-1])
            target_ids = np.where(wanted, row.input_ids, IGNORE).astype(np.int64)[1 : n + 1]
            documents.append(Document(row.input_ids[:n], target_ids, weight[1 : n + 1], row))
    return documents


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Arrays [B, T] of one forward pass, B packs of one or more documents, padded at the right.

    `input_ids`, `position_ids` (from 0 in every document) and `target_ids` (-100: not wanted) are int64, `document_ids`
    int32 (-1: padding), `weights` float64 (``u_t * w_t``, not yet divided by anything). `placed` says where each
    document lies: (document, pack, start). A micro-batch without documents is a dummy: one finite prediction of weight
    0, for a rank that has less to do than others.
    """

    input_ids: npt.NDArray[np.int64]
    position_ids: npt.NDArray[np.int64]
    document_ids: npt.NDArray[np.int32]
    target_ids: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    placed: tuple[tuple[Document, int, int], ...]

    @classmethod
    def build(cls, packs: Sequence[Sequence[Document]]) -> MicroBatch:
        """The arrays of these packs."""
        width = max((sum(map(len, pack)) for pack in packs), default=1)
        shape = (max(len(packs), 1), width)
        batch = cls(
            input_ids=np.zeros(shape, np.int64), position_ids=np.zeros(shape, np.int64),
            document_ids=np.full(shape, -1, np.int32), target_ids=np.full(shape, IGNORE, np.int64),
            weights=np.zeros(shape, np.float64),
            placed=tuple((document, b, start) for b, pack in enumerate(packs) for document, start in _starts(pack)),
        )
        if not batch.placed:
            batch.target_ids[0, 0] = 0
        packed = any(len(pack) > 1 for pack in packs)
        for b, pack in enumerate(packs):
            used = sum(map(len, pack))
            # Padding is a document of its own beside packs, and a continuation after single rows: no row then looks
            # packed to a model, which keeps its plain causal attention. Neither is seen by a document before it.
            batch.position_ids[b, used:] = np.arange(width - used) + (0 if packed else used)
        for i, (document, b, start) in enumerate(batch.placed):
            at = b, slice(start, start + len(document))
            batch.input_ids[at] = document.input_ids
            batch.position_ids[at] = np.arange(len(document))
            batch.document_ids[at] = i
            batch.target_ids[at] = document.target_ids
            batch.weights[at] = document.weights
        return batch

    @property
    def tokens(self) -> int:
        """Input tokens that are not padding."""
        return int((self.document_ids >= 0).sum())


def _starts(pack: Sequence[Document]) -> Iterator[tuple[Document, int]]:
    start = 0
    for document in pack:
        yield document, start
        start += len(document)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the documents of a global batch become micro-batches on `ranks` ranks.

    `micro_tokens` bounds B*T of a micro-batch, `micro_rows` bounds B; one of them is given. `packing` is "best_fit"
    (several documents per pack) or "none" (padding). With `micro_rows`, packs hold `pack_tokens` tokens. `quadratic` is
    the cost of attention relative to everything else: a document of n tokens costs ``n + quadratic * n^2``.
    """

    ranks: int = 1
    micro_tokens: int | None = None
    micro_rows: int | None = None
    packing: Literal["best_fit", "none"] = "best_fit"
    pack_tokens: int = 0
    quadratic: float = 0.0

    def plan(self, lengths: Sequence[int], units: Sequence[int] = ()) -> Plan:
        """Indices of documents, [rank][micro-batch][pack][document]; every rank gets equally many micro-batches.

        Documents that follow each other with the same unit (but -1) stay in one micro-batch: in one pack, or in rows of
        their own if nothing is packed. Raises `RecipeError` where one unit is too much for a micro-batch.

        >>> Layout(ranks=2, micro_tokens=10).plan([5, 3, 4, 2, 6])
        [[[[4, 2]]], [[[0, 1, 3]]]]
        >>> Layout(ranks=2, micro_tokens=10).plan([5, 3, 4, 2], units=[0, 0, 1, 1])
        [[[[0, 1]]], [[[2, 3]]]]
        """
        packed = self.packing == "best_fit"
        members = _runs(len(lengths), units)
        items = _Items(
            [(sum if packed else max)(lengths[i] for i in item) for item in members],
            [1 if packed else len(item) for item in members],
            [sum(lengths[i] + self.quadratic * lengths[i] ** 2 for i in item) for item in members],
        )
        groups = self._groups(items)
        per_rank = -(-len(groups) // self.ranks)
        groups = _more(groups, per_rank * self.ranks, items)
        groups.sort(key=lambda group: -items.cost(group))
        plan: Plan = [[] for _ in range(self.ranks)]
        for at in range(0, len(groups), self.ranks):
            # Like beside like, since ranks may wait for each other at every micro-batch; the dearest first to the
            # ranks with the least so far.
            spent = [sum(map(items.cost, plan[rank])) for rank in range(self.ranks)]
            order = sorted(range(self.ranks), key=lambda rank: (spent[rank], rank))
            for rank, group in zip(order, groups[at : at + self.ranks], strict=False):
                plan[rank].append(group)
        for batches in plan:
            batches.extend([] for _ in range(per_rank - len(batches)))
        return [[_expanded(group, members, packed) for group in batches] for batches in plan]

    def micro_batches(self, documents: Sequence[Document], rank: int = 0) -> list[MicroBatch]:
        """The micro-batches of one rank."""
        plan = self.plan([len(document) for document in documents], [document.unit for document in documents])[rank]
        return [MicroBatch.build([[documents[i] for i in pack] for pack in group]) for group in plan]

    def _groups(self, items: _Items) -> list[list[list[int]]]:
        sizes = items.sizes
        packs = [[i] for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))]
        if self.packing == "best_fit":
            capacity = self.micro_tokens or self.pack_tokens or max(sizes, default=0)
            packs = best_fit(sizes, capacity)
            if self.micro_tokens:
                bins = -(-len(packs) // self.ranks) * self.ranks
                balanced = spread(items.costs, bins, sizes, capacity)
                return [[pack] for pack in balanced or packs if pack]
            packs.sort(key=lambda pack: -sum(sizes[i] for i in pack))
        elif self.micro_tokens:  # refuses a row that does not fit
            best_fit([size * rows for size, rows in zip(sizes, items.rows, strict=True)], self.micro_tokens)
        most = max(items.rows, default=0)
        if self.micro_rows and most > self.micro_rows:
            raise RecipeError(
                f"{most} rows belong together, and a micro-batch has {self.micro_rows}", where="batch.micro_rows",
                hint=f"set batch.micro_rows to at least {most}",
            )
        groups: list[list[list[int]]] = []
        for pack in packs:
            if groups and self._fits([*groups[-1], pack], items):
                groups[-1].append(pack)
            else:
                groups.append([pack])
        return groups

    def _fits(self, group: list[list[int]], items: _Items) -> bool:
        rows = sum(items.rows[pack[0]] for pack in group)
        if self.micro_rows:
            return rows <= self.micro_rows
        # Packs come longest first, so the first one is the width.
        return rows * sum(items.sizes[i] for i in group[0]) <= (self.micro_tokens or 0)


class _Items(NamedTuple):
    """What is put into packs: per unit its tokens (the width, if its rows stand apart), its rows and its cost."""

    sizes: list[int]
    rows: list[int]
    costs: list[float]

    def cost(self, group: list[list[int]]) -> float:
        return sum(self.costs[i] for pack in group for i in pack)


def _runs(n: int, units: Sequence[int]) -> list[list[int]]:
    """Indices 0..n-1 by runs of equal unit; -1 is a unit of its own each time."""
    runs: list[list[int]] = []
    for i in range(n):
        if runs and units and units[i] == units[i - 1] != -1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return runs


def _expanded(group: list[list[int]], members: list[list[int]], packed: bool) -> list[list[int]]:
    """A micro-batch of packs of units as packs of documents; what is not packed gets a row per document."""
    if packed:
        return [[i for item in pack for i in members[item]] for pack in group]
    return [[i] for pack in group for item in pack for i in members[item]]


def _more(groups: list[list[list[int]]], count: int, items: _Items) -> list[list[list[int]]]:
    """Splits the dearest group until there are `count`, or nothing is left to split: no rank idles needlessly."""
    groups = list(groups)
    while groups and len(groups) < count:
        groups.sort(key=lambda group: (sum(map(len, group)) > 1, items.cost(group)))
        group = groups.pop()
        if sum(map(len, group)) == 1:
            return [*groups, group]
        parts = group if len(group) > 1 else [[i] for i in group[0]]
        halves = spread([items.cost([part]) for part in parts], 2) or []
        for half in halves:
            chosen = [parts[i] for i in half]
            groups.append(chosen if len(group) > 1 else [[i for part in chosen for i in part]])
    return groups


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The examples of one optimiser step: `examples` are indices; the next batch starts at (epoch, end)."""

    epoch: int
    start: int
    end: int
    examples: tuple[int, ...]


def epoch_order(n: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of n examples in an epoch: a pure function of its arguments, on every platform and for ever.

    Sorts by SplitMix64 (Steele, Lea, Flood 2014) of index, epoch and seed; int64 [n].

    >>> epoch_order(6, seed=0, epoch=0)
    array([0, 2, 5, 4, 3, 1])
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed & (2**64 - 1))) + np.uint64(epoch))
        keys = _mix(key + np.arange(n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(keys, kind="stable").astype(np.int64)


def _mix(z: npt.NDArray[np.uint64] | np.uint64) -> npt.NDArray[np.uint64]:
    z = np.asarray(z, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def global_batches(
    trained: Sequence[int], *, examples: int | None = None, tokens: int | None = None, seed: int = 0,
    epoch: int = 0, position: int = 0,
) -> Iterator[GlobalBatch]:
    """Global batches without end, from (epoch, position) on; no batch crosses the end of an epoch.

    `trained[i]` is the number of trained tokens of example i. A batch closes at `examples` examples, or when its
    trained tokens reach `tokens`: trained tokens and not row lengths, so that the row format does not change the batch.
    The last batch of an epoch may be smaller; it is exact all the same.

    >>> batches = global_batches([3, 1, 2], examples=2, seed=0)
    >>> [next(batches).examples for _ in range(3)]
    [(0, 2), (1,), (1, 0)]
    """
    if (examples is None) == (tokens is None) or (examples or tokens or 0) < 1:
        raise ValueError("give examples or tokens, at least 1")
    if len(trained) == 0:
        raise ValueError("there are no examples")
    while True:
        order = epoch_order(len(trained), seed, epoch)
        while position < len(order):
            end, total = position, 0
            while end < len(order) and (end - position < examples if examples else total < (tokens or 0)):
                total += trained[order[end]]
                end += 1
            yield GlobalBatch(epoch, position, end, tuple(order[position:end].tolist()))
            position = end
        epoch, position = epoch + 1, 0
