"""Global batches, packs and micro-batches: nothing lost, nothing twice, nothing that moves a target."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatloss.batch import IGNORE, Layout, MicroBatch, documents_of, epoch_order, global_batches
from chatloss.errors import RecipeError
from chatloss.pack import best_fit, spread
from chatloss.reduction import Reduction
from chatloss.sample import Reason
from tests.synthetic import chats, row

LENGTHS = st.lists(st.integers(1, 50), max_size=40)
LAYOUTS = st.builds(
    lambda ranks, tokens, rows, packing: Layout(
        ranks, tokens if rows is None else None, rows, packing, 60, quadratic=0.01
    ),
    st.integers(1, 5), st.integers(50, 200), st.none() | st.integers(1, 6), st.sampled_from(["best_fit", "none"]),
)


@given(lengths=LENGTHS, layout=LAYOUTS)
def test_every_document_is_in_exactly_one_micro_batch_and_bounds_hold(lengths: list[int], layout: Layout) -> None:
    # accelerate#2316: a tail filled up with duplicated rows; nothing here is ever computed twice.
    plan = layout.plan(lengths)
    flat = [i for rank in plan for group in rank for pack in group for i in pack]
    assert sorted(flat) == list(range(len(lengths)))
    assert len(plan) == layout.ranks
    assert len({len(rank) for rank in plan}) == 1
    for group in itertools.chain(*plan):
        sizes = [sum(lengths[i] for i in pack) for pack in group]
        if layout.micro_tokens:
            assert len(group) * max(sizes, default=0) <= layout.micro_tokens
        else:
            assert len(group) <= (layout.micro_rows or 0)
        if layout.packing == "none":
            assert all(len(pack) == 1 for pack in group)


@given(lengths=LENGTHS, layout=LAYOUTS)
def test_no_rank_idles_while_another_could_share(lengths: list[int], layout: Layout) -> None:
    busy = [sum(len(pack) for group in rank for pack in group) for rank in layout.plan(lengths)]
    if len(lengths) >= layout.ranks:
        assert min(busy) >= 1


@given(lengths=st.lists(st.integers(1, 100), max_size=60))
def test_packs_hold_everything_once_and_no_two_of_them_could_be_one(lengths: list[int]) -> None:
    bins = best_fit(lengths, 100)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in b) <= 100 for b in bins)
    sums = sorted(sum(lengths[i] for i in b) for b in bins)
    assert len(sums) < 2 or sums[0] + sums[1] > 100


def test_a_row_that_fits_no_bin_is_refused_with_both_remedies() -> None:
    for packing in ("best_fit", "none"):
        with pytest.raises(RecipeError, match="a row of 60 tokens") as error:
            Layout(micro_tokens=50, packing=packing).plan([3, 60])  # type: ignore[arg-type]
        assert "max_length" in error.value.hint


def test_spread_balances_and_says_when_it_cannot() -> None:
    assert spread([3, 3, 3], 2, [3, 3, 3], 5) is None
    bins = spread([float(n) for n in range(20)], 4) or []
    sums = [sum(b) for b in bins]
    assert max(sums) - min(sums) <= 3


def test_ranks_are_balanced_by_cost_on_uneven_conversations() -> None:
    lengths = (np.random.default_rng(0).lognormal(5.5, 0.8, 256).astype(int) + 10).clip(max=4096).tolist()
    layout = Layout(ranks=8, micro_tokens=4096, quadratic=1 / (6 * 2048))
    plan = layout.plan(lengths)
    cost = [sum(lengths[i] + lengths[i] ** 2 / (6 * 2048) for g in rank for p in g for i in p) for rank in plan]
    assert max(cost) / (sum(cost) / 8) < 1.02


def test_positions_restart_and_targets_stay_inside_their_document() -> None:
    # torchtitan#4075: the loss at position 0 crosses documents; ms-swift#10185: shifted twice.
    reduction = Reduction.parse("token")
    documents = [d for rows in chats(5) for d in documents_of(rows, reduction.of_example(rows))]
    batch = MicroBatch.build([documents[:2], documents[2:]])
    for document, b, start in batch.placed:
        at = slice(start, start + len(document))
        np.testing.assert_array_equal(batch.position_ids[b, at], np.arange(len(document)))
        for t in np.flatnonzero(batch.target_ids[b, at] != IGNORE):
            assert batch.target_ids[b, start + t] == document.row.input_ids[t + 1]
            assert batch.weights[b, start + t] == document.row.weights[t + 1]
    padding = batch.document_ids < 0
    assert padding.any()
    assert (batch.target_ids[padding] == IGNORE).all()
    assert (batch.weights[padding] == 0).all()
    assert batch.tokens == sum(map(len, documents))


def test_the_weights_of_a_batch_are_those_of_its_rows_whatever_the_layout() -> None:
    # nanochat#582: packing lost the mask.
    reduction = Reduction.parse("turn")
    examples = chats(9)
    weights = [reduction.of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    want = np.sort(np.concatenate([x[x != 0] for w in weights for x in w.weights]))
    for layout in (Layout(1, 200), Layout(3, 90), Layout(2, None, 2, "none"), Layout(4, None, 1, "best_fit", 100)):
        batches = [b for rank in range(layout.ranks) for b in layout.micro_batches(documents, rank)]
        got = np.sort(np.concatenate([b.weights[b.weights != 0] for b in batches]))
        np.testing.assert_array_equal(got, want)


def test_what_follows_the_last_target_is_not_computed() -> None:
    rows = [row([(5, 0, 0.0, Reason.OTHER_ROLE), (3, 1, 1.0, Reason.CONTENT), (9, 2, 0.0, Reason.OTHER_ROLE)],
                np.arange(17))]
    [document] = documents_of(rows, Reduction.parse("token").of_example(rows))
    assert document.input_ids.tolist() == list(range(7))
    assert document.target_ids[4:].tolist() == [5, 6, 7]


def test_rows_that_train_nothing_are_not_computed_and_fewer_rows_than_ranks_give_dummies() -> None:
    nothing = [row([(5, 0, 0.0, Reason.OTHER_ROLE)], np.arange(5))]
    reduction = Reduction.parse("token")
    assert documents_of(nothing, reduction.of_example(nothing)) == []
    documents = [d for rows in chats(1) for d in documents_of(rows, reduction.of_example(rows))]
    layout = Layout(ranks=3, micro_tokens=100)
    batches = [layout.micro_batches(documents, rank) for rank in range(3)]
    assert [len(b) for b in batches] == [1, 1, 1]
    dummies = [b for [b] in batches if not b.placed]
    assert len(dummies) == 2
    assert dummies[0].input_ids.shape == (1, 1)
    assert (dummies[0].target_ids != IGNORE).sum() == 1
    assert dummies[0].weights.sum() == 0
    assert dummies[0].tokens == 0


def test_evaluation_wants_every_token_but_the_first() -> None:
    [rows] = chats(1)
    [document] = documents_of(rows, Reduction.parse("token").of_example(rows), every_token=True)
    np.testing.assert_array_equal(document.target_ids, rows[0].input_ids[1:])


@given(trained=st.lists(st.integers(0, 20), min_size=1, max_size=30), size=st.integers(1, 8), seed=st.integers(0, 5),
       by=st.sampled_from(["examples", "tokens"]))
def test_an_epoch_holds_every_example_once_and_can_be_entered_anywhere(
    trained: list[int], size: int, seed: int, by: str
) -> None:
    def start(epoch: int = 0, position: int = 0) -> itertools.takewhile:  # type: ignore[type-arg]
        batches = global_batches(trained, **{by: size}, seed=seed, epoch=epoch, position=position)  # type: ignore[arg-type]
        return itertools.takewhile(lambda b: b.epoch < 2, batches)

    whole = list(start())
    for epoch in (0, 1):
        assert sorted(i for b in whole if b.epoch == epoch for i in b.examples) == list(range(len(trained)))
    for k, batch in enumerate(whole):
        assert list(start(batch.epoch, batch.end)) == whole[k + 1 :]
        if by == "tokens" and batch.end < len(trained):
            assert sum(trained[i] for i in batch.examples) >= size
            assert sum(trained[i] for i in batch.examples[:-1]) < size


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else() -> None:
    assert epoch_order(1000, 7, 3).tolist() == epoch_order(1000, 7, 3).tolist()
    orders = {tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    # The bits are part of the contract: a resumed run must not meet another order after an upgrade.
    assert epoch_order(10, 42, 1).tolist() == ORDER
    first = [int(epoch_order(8, seed, 0)[0]) for seed in range(800)]
    assert np.bincount(first).min() > 60


ORDER = [8, 0, 3, 7, 1, 4, 2, 9, 6, 5]


def test_bad_sizes_are_refused() -> None:
    for kwargs in ({}, {"examples": 1, "tokens": 1}, {"examples": 0}):
        with pytest.raises(ValueError, match="give examples or tokens"):
            next(global_batches([1], **kwargs))
    with pytest.raises(ValueError, match="no examples"):
        next(global_batches([], examples=1))
