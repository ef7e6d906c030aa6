"""Every preference loss equals, in value and gradient, what its paper says, written here by hand with plain floats."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.errors import RecipeError
from chatloss.loss.preference import ALIASES, LOSSES, LossOptions, find, kto
from chatloss.loss.sequence import PairLogps, sequence_logps

# (s_w, s_l, ref_w, ref_l, n_w, n_l, beta, e, gamma) -> (loss, d loss / d s_w, d loss / d s_l)
Paper = Callable[[float, float, float, float, float, float, float, float, float], tuple[float, float, float]]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def bell(x: float) -> float:
    """The derivative of sigma."""
    return sigma(x) * sigma(-x)


def smooth(x: float, e: float) -> tuple[float, float]:
    """-(1-e) log sigma(x) - e log sigma(-x), and its derivative."""
    return -(1 - e) * log_sigma(x) - e * log_sigma(-x), -(1 - e) * sigma(-x) + e * sigma(x)


def dpo(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    value, slope = smooth(beta * ((w - rw) - (l - rl)), e)
    return value, beta * slope, -beta * slope


def dpo_norm(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    value, slope = smooth(beta * ((w - rw) / nw - (l - rl) / nl), e)
    return value, beta * slope / nw, -beta * slope / nl


def rdpo(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    x = beta * ((w - rw) - (l - rl))
    value = ((1 - e) * -log_sigma(x) - e * -log_sigma(-x)) / (1 - 2 * e)
    slope = beta * (-(1 - e) * sigma(-x) - e * sigma(x)) / (1 - 2 * e)
    return value, slope, -slope


def slic(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    x = beta * ((w - rw) - (l - rl))
    slope = -beta if x < 1 else 0.0
    return max(0.0, 1 - x), slope, -slope


def ipo_sum(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    h = (w - l) - (rw - rl) - 1 / (2 * beta)
    return h * h, 2 * h, -2 * h


def ipo_avg(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    h = (w / nw - l / nl) - (rw / nw - rl / nl) - 1 / (2 * beta)
    return h * h, 2 * h / nw, -2 * h / nl


def simple(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    value, slope = smooth(beta / nw * w - beta / nl * l - gamma, e)
    return value, beta / nw * slope, -beta / nl * slope


def contrastive(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    value, slope = smooth(beta * w - beta * l, e)
    return value, beta * slope, -beta * slope


def odds_ratio(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    # log odds(y) = a - log(1 - exp a), a = s / n; its derivative in a is 1 / (1 - exp a).
    a, b = w / nw, l / nl
    x = (a - math.log(-math.expm1(a))) - (b - math.log(-math.expm1(b)))
    slope = -beta * sigma(-x)
    return -beta * log_sigma(x), slope / (nw * -math.expm1(a)), -slope / (nl * -math.expm1(b))


def anchored_zero(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    p, q = sigma(beta * (w - rw)), sigma(beta * (l - rl))
    return (1 - p) + q, -beta * bell(beta * (w - rw)), beta * bell(beta * (l - rl))


def anchored_down(w, l, rw, rl, nw, nl, beta, e, gamma):  # type: ignore[no-untyped-def]  # noqa: E741
    p, q = sigma(beta * (w - rw)), sigma(beta * ((w - rw) - (l - rl)))
    slope = bell(beta * ((w - rw) - (l - rl)))
    return p + (1 - q), beta * (bell(beta * (w - rw)) - slope), beta * slope


PAPERS: dict[str, Paper] = {
    "sigmoid": dpo, "sigmoid_norm": dpo_norm, "robust": rdpo, "hinge": slic, "ipo": ipo_sum, "ipo_mean": ipo_avg,
    "simpo": simple, "cpo": contrastive, "orpo": odds_ratio, "apo_zero": anchored_zero, "apo_down": anchored_down,
}
LENGTHS = st.integers(1, 300)
PER_TOKEN = st.floats(-6.0, -1e-3)
PAIRS = st.lists(st.tuples(LENGTHS, LENGTHS, PER_TOKEN, PER_TOKEN, PER_TOKEN, PER_TOKEN), min_size=1, max_size=5)


def test_every_loss_has_a_paper() -> None:
    assert PAPERS.keys() == LOSSES.keys()


@settings(max_examples=40)
@pytest.mark.parametrize("name", sorted(LOSSES))
@given(PAIRS, st.floats(0.01, 3.0), st.floats(0.0, 0.45), st.floats(0.0, 2.0))
def test_value_and_gradient_are_those_of_the_paper(
    name: str, pairs: list[tuple[int, int, float, float, float, float]], beta: float, e: float, gamma: float
) -> None:
    loss = LOSSES[name]
    used = [value if key in loss.options else 0.0 for key, value in (("label_smoothing", e), ("gamma", gamma))]
    options = LossOptions(beta, *used)
    rows = [(a * n, b * m, c * n, d * m, float(n), float(m)) for n, m, a, b, c, d in pairs]
    columns = [torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True)]
    chosen, rejected = columns[0].requires_grad_(), columns[1].requires_grad_()
    got = loss.function(PairLogps(chosen, rejected, *columns[2:]), options)
    assert got.shape == (len(pairs),) and got.dtype == torch.float64
    d_chosen, d_rejected = torch.autograd.grad(got.sum(), (chosen, rejected))
    for k, row in enumerate(rows):
        want = PAPERS[name](*row, options.beta, options.label_smoothing, options.gamma)
        for value, expected in zip((got[k], d_chosen[k], d_rejected[k]), want, strict=True):
            assert math.isclose(value.item(), expected, rel_tol=1e-9, abs_tol=1e-11), (row, want)


@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=6), st.floats(0, 20),
       st.floats(0.01, 2), st.floats(0.1, 2), st.floats(0.1, 2))
def test_kto_is_the_paper_s_value_function(
    answers: list[tuple[float, bool]], baseline: float, beta: float, good: float, bad: float
) -> None:
    ratios = torch.tensor([r for r, _ in answers], dtype=torch.float64, requires_grad=True)
    got = kto(ratios, torch.tensor([d for _, d in answers]), baseline, beta, good, bad)
    [slope] = torch.autograd.grad(got.sum(), ratios)
    for k, (r, desirable) in enumerate(answers):
        weight, x = (good, beta * (r - baseline)) if desirable else (bad, beta * (baseline - r))
        assert math.isclose(got[k].item(), weight - weight * sigma(x), rel_tol=1e-9, abs_tol=1e-14)
        want = weight * bell(x) * beta * (-1 if desirable else 1)
        assert math.isclose(slope[k].item(), want, rel_tol=1e-9, abs_tol=1e-14)


def test_orpo_is_finite_with_a_finite_gradient_where_an_answer_is_nearly_certain_or_nearly_impossible() -> None:
    s = torch.tensor([-1e-9, -0.5, -500.0], dtype=torch.float64, requires_grad=True)
    n, zero = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    loss = LOSSES["orpo"].function(PairLogps(s, s.detach().flip(0), zero, zero, n, n), LossOptions(0.1))
    assert torch.isfinite(loss).all()
    assert torch.isfinite(torch.autograd.grad(loss.sum(), s)[0]).all()


def test_nothing_is_added_to_a_length_that_could_be_divided_by() -> None:
    # A "+ 1e-8" would show here: the mean of one token is that token.
    one, s = torch.ones(1, dtype=torch.float64), torch.tensor([-1e-12], dtype=torch.float64)
    assert PairLogps(s, s, s, s, one, one).mean().chosen.item() == -1e-12


def test_tokens_of_weight_zero_are_in_no_log_probability_and_get_no_gradient() -> None:
    nll = torch.tensor([3.0, 1e30, 2.0, 5.0], dtype=torch.float64, requires_grad=True)
    logps = sequence_logps(nll, torch.tensor([1.0, 0.0, 0.5, 1.0]), torch.tensor([0, 0, 1, 1]), 2)
    assert logps.tolist() == [-3.0, -6.0]
    assert torch.autograd.grad(logps.sum(), nll)[0].tolist() == [-1.0, 0.0, -0.5, -1.0]


def test_other_names_are_understood_and_unknown_ones_get_a_suggestion() -> None:
    assert {find(name) for name in ALIASES} == set(ALIASES.values()) <= LOSSES.keys()
    assert find("KTO") == "kto"
    with pytest.raises(RecipeError, match="did you mean 'hinge'"):
        find("hing")
    with pytest.raises(RecipeError, match="one of sft, dpo, sigmoid"):
        find("grpo-like", "objective", ("sft", "dpo"))


def test_both_forms_of_ipo_differ_by_length() -> None:
    # TRL's "ipo" averages over tokens, the paper and OpenRLHF sum: with one token each they are the same.
    values = [torch.tensor([v], dtype=torch.float64) for v in (-4.0, -6.0, -5.0, -5.0)]
    for n, same in ((1.0, True), (2.0, False)):
        length = torch.tensor([n], dtype=torch.float64)
        summed, mean = (LOSSES[name].function(PairLogps(*values, length, length), LossOptions(0.1)).item()
                        for name in ("ipo", "ipo_mean"))
        assert (summed == mean) is same
