"""Reductions: the table of the design, against formulas written out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatloss.errors import DataError, RecipeError
from chatloss.reduction import ALIASES, Reduction
from chatloss.sample import Reason, Sample, Span
from tests.synthetic import chat, per_turn, row

COUNTS = st.lists(st.lists(st.integers(2, 30), min_size=1, max_size=4), min_size=1, max_size=5)


def examples_of(counts: list[list[int]]) -> list[list[Sample]]:
    return [chat([(3, n) for n in turns], seed=i) for i, turns in enumerate(counts)]


def share(reduction: Reduction, counts: list[list[int]]) -> list[list[float]]:
    """Weight over Z of each turn's tokens, as chatloss computes it."""
    done = [reduction.of_example(rows) for rows in examples_of(counts)]
    z = sum(weights.denominator for weights in done)
    out = []
    for rows, weights in zip(examples_of(counts), done, strict=True):
        [only], [weight] = rows, weights.weights
        out.append([float(weight[only.turns == 2 * k + 1][0]) / z for k in range(len(only.outcomes))])
    return out


def expected(name: str, counts: list[list[int]]) -> list[list[float]]:
    """The same from the formulas of the literature, written out without chatloss."""
    n = sum(map(sum, counts))
    k = sum(map(len, counts))
    m = len(counts)
    match name:
        case "token":
            return [[1 / n for _ in turns] for turns in counts]
        case "turn":
            return [[1 / (k * t) for t in turns] for turns in counts]
        case "conversation":
            return [[1 / (m * sum(turns)) for _ in turns] for turns in counts]
        case "power:0.5:conversation":
            z = sum(math.sqrt(sum(turns)) for turns in counts)
            return [[sum(turns) ** -0.5 / z for _ in turns] for turns in counts]
        case "power:0.5:turn":
            z = sum(math.sqrt(t) for turns in counts for t in turns)
            return [[t**-0.5 / z for t in turns] for turns in counts]
        case "sum:turn":
            return [[1 / k for _ in turns] for turns in counts]
        case "sum:conversation":
            return [[1 / m for _ in turns] for turns in counts]
        case "constant:4096:turn":
            return [[1 / (k * 4096) for _ in turns] for turns in counts]
        case "constant:100:conversation":
            return [[1 / (m * 100) for _ in turns] for turns in counts]
    raise AssertionError(name)


NAMES = ["token", "turn", "conversation", "power:0.5:conversation", "power:0.5:turn", "sum:turn", "sum:conversation",
         "constant:4096:turn", "constant:100:conversation"]


@pytest.mark.parametrize("name", NAMES)
@given(counts=COUNTS)
def test_every_reduction_is_the_formula_of_its_name(name: str, counts: list[list[int]]) -> None:
    for got, want in zip(share(Reduction.parse(name), counts), expected(name, counts), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-14)


def test_formats_a_and_b_of_the_literature_differ_on_the_example_that_defines_them() -> None:
    # One conversation whose turns have 1, 9 and 90 tokens: A gives each turn a third, B each token a hundredth.
    counts = [[2, 8, 90]]
    a, b = share(Reduction.parse("format A"), counts)[0], share(Reduction.parse("format B"), counts)[0]
    np.testing.assert_allclose(np.array(a) * counts[0], [1 / 3] * 3)
    np.testing.assert_allclose(np.array(b) * counts[0], [0.02, 0.08, 0.9])


@pytest.mark.parametrize(
    ("alias", "name"),
    [("token-mean", "token"), ("num_items_in_batch", "token"), ("calculate_per_token_loss", "token"), ("DAPO", "token"),
     ("mean:turn", "turn"), ("seq-mean-token-mean", "turn"), ("power:1:turn", "turn"), ("power:0:turn", "token"),
     ("power:0:conversation", "token"), ("mean:conversation", "conversation"), ("square", "power:0.5:conversation"),
     ("seq-mean-token-sum", "sum:turn"), ("seq_mean_token_sum", "sum:turn"), ("Dr. GRPO:2048", "constant:2048:turn"),
     ("seq-mean-token-sum-norm:0.5", "constant:0.5:turn"), ("constant:123456789:turn", "constant:123456789:turn")],
)
def test_the_names_in_use_in_the_field_are_understood(alias: str, name: str) -> None:
    assert Reduction.parse(alias).name == name
    assert Reduction.parse(Reduction.parse(alias).name) == Reduction.parse(alias) or name == "token"


def test_every_alias_resolves() -> None:
    for alias, target in ALIASES.items():
        Reduction.parse(f"{alias}:8" if "{}" in target else alias)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("tokn", "did you mean 'token'?"), ("convers", "did you mean 'conversation'?"), ("mean", "mean:UNIT"),
     ("sum", "sum:UNIT"), ("power:turn", "power:P:UNIT"), ("power:x:turn", "power:P:UNIT"), ("dr-grpo", "dr-grpo:4096"),
     ("constant:0:turn", "constant:H:UNIT"), ("constant:-3:turn", "constant:H:UNIT"), ("", "use one of"),
     ("power:nan:turn", "power:P:UNIT"), ("sum:3:turn", "sum:UNIT"), ("mean:row", "mean:UNIT")],
)
def test_an_unknown_reduction_is_an_error_with_a_suggestion(name: str, hint: str) -> None:
    with pytest.raises(RecipeError) as error:
        Reduction.parse(name)
    assert hint in error.value.hint
    assert error.value.where == "loss.reduction"


def test_an_unknown_weight_norm_is_an_error() -> None:
    with pytest.raises(RecipeError, match="weight_norm"):
        Reduction.parse("token", "mean")


def test_the_first_token_of_a_row_has_no_target_and_is_in_no_denominator() -> None:
    # transformers#24725, #34191, #34198, #34242, #46204: counted before the shift.
    whole = row([(10, 1, 1.0, Reason.CONTENT)], np.arange(10))
    done = Reduction.parse("token").of_example([whole])
    assert (done.denominator, done.tokens, done.weights[0][0]) == (9.0, 9, 0.0)
    done = Reduction.parse("turn").of_example([whole])
    np.testing.assert_allclose(done.weights[0][1:], 1 / 9)


def test_the_stop_is_in_the_sum_and_in_the_length() -> None:
    # PaddleFormers#4908: EOS out of the sum, but in the length.
    [whole] = chat([(3, 5)], seed=1)
    done = Reduction.parse("turn").of_example([whole])
    stop = int(np.flatnonzero(whole.reasons == Reason.STOP)[0])
    assert done.weights[0][stop] == 1 / 5
    assert done.weights[0].sum() == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_one_change_nothing_and_zero_means_not_trained(name: str) -> None:
    plain = Reduction.parse(name).of_example(chat([(3, 5), (2, 7)], seed=1))
    dropped = Reduction.parse(name).of_example(chat([(3, 5), (2, 7)], seed=1, weights=[1.0, 0.0]))
    alone = Reduction.parse(name).of_example(per_turn(chat([(3, 5), (2, 7)], seed=1))[:1])
    assert dropped.denominator == alone.denominator
    assert dropped.tokens == alone.tokens == 5
    np.testing.assert_array_equal(dropped.weights[0][:8], alone.weights[0])
    assert plain.tokens == 12


def test_weight_norm_count_keeps_the_denominator_and_weights_divides_by_their_sum() -> None:
    rows = chat([(3, 4), (2, 6)], seed=1, weights=[0.5, 2.0])
    count, weights = (Reduction.parse("token", norm).of_example(rows) for norm in ("count", "weights"))
    assert count.denominator == 10
    assert weights.denominator == 4 * 0.5 + 6 * 2.0
    np.testing.assert_array_equal(count.weights[0], weights.weights[0])
    count, weights = (Reduction.parse("turn", norm).of_example(rows) for norm in ("count", "weights"))
    assert (count.denominator, weights.denominator) == (2.0, 2.5)


def test_negative_weights_work_with_count_and_are_refused_with_a_reason_otherwise() -> None:
    rows = chat([(3, 4), (2, 6)], seed=1, weights=[1.0, -0.25])
    done = Reduction.parse("token").of_example(rows)
    assert done.denominator == 10
    assert done.weights[0].min() == -0.25
    with pytest.raises(DataError, match="negative token weights") as error:
        Reduction.parse("token", "weights").of_example(rows)
    assert "count" in error.value.hint


def test_a_weight_that_is_not_finite_is_refused() -> None:
    bad = Sample(np.arange(3, dtype=np.int32), (Span(0, 3, 1, math.inf, Reason.CONTENT),), {1: "exact"}, "f.jsonl:3")
    with pytest.raises(DataError, match="not finite"):
        Reduction.parse("token").of_example([bad])


@pytest.mark.parametrize("norm", ["count", "weights"])
@pytest.mark.parametrize("name", NAMES)
def test_the_row_format_changes_neither_weights_nor_denominator(name: str, norm: str) -> None:
    whole = chat([(3, 5), (2, 7), (4, 1)], seed=1, weights=[1.0, 0.5, 2.0])
    a, b = Reduction.parse(name, norm).of_example(whole), Reduction.parse(name, norm).of_example(per_turn(whole))
    assert math.isclose(a.denominator, b.denominator, rel_tol=1e-15)
    assert (a.tokens, a.units) == (b.tokens, b.units)
    np.testing.assert_allclose(a.weights[0][a.weights[0] != 0], np.concatenate([w[w != 0] for w in b.weights]))


def test_a_turn_cut_over_two_rows_counts_once() -> None:
    left = row([(4, 0, 0.0, Reason.OTHER_ROLE), (3, 1, 1.0, Reason.CONTENT)], np.arange(7))
    right = row([(4, 0, 0.0, Reason.OTHER_ROLE), (2, 1, 1.0, Reason.CONTENT)], np.arange(6))
    done = Reduction.parse("turn").of_example([left, right])
    assert (done.units, done.denominator) == (1, 1.0)
    assert math.isclose(sum(float(w.sum()) for w in done.weights), 1.0)


def test_an_example_that_trains_nothing_adds_nothing() -> None:
    for rows in ([], [row([(4, 0, 0.0, Reason.OTHER_ROLE)], np.arange(4))], [row([], np.arange(0))],
                 [row([(1, 1, 1.0, Reason.CONTENT)], np.arange(1))]):
        done = Reduction.parse("turn").of_example(rows)
        assert (done.denominator, done.tokens, done.units) == (0.0, 0, 0)
        assert [len(w) for w in done.weights] == [len(r) for r in rows]


@given(counts=COUNTS)
def test_denominators_are_exact_sums(counts: list[list[int]]) -> None:
    z = sum(Reduction.parse("token").of_example(rows).denominator for rows in examples_of(counts))
    assert Fraction(z) == sum(map(sum, counts))
