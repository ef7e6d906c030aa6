"""Chunked linear cross entropy: as exact as the plain one in the same precision, in a fraction of the memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear

from chatloss.loss.nll import logits_nll, weighted_nll


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def case(n: int, dtype: torch.dtype, bias: bool = True, seed: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(n, 8), torch.randn(23, 8)
    return (hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(),
            torch.randn(23).to(dtype).requires_grad_() if bias else None, torch.randint(0, 23, (n,)),
            torch.randn(n).to(dtype))  # type: ignore[return-value]


@settings(deadline=None, max_examples=25)
@given(n=st.integers(0, 40), chunk=st.integers(1, 50), bias=st.booleans(), seed=st.integers(0, 99))
def test_any_chunk_gives_the_sum_and_gradients_of_the_definition(n: int, chunk: int, bias: bool, seed: int) -> None:
    hidden, weight, b, target, u = case(n, torch.float64, bias, seed)
    total, nll = weighted_nll(hidden, weight, b, target, u, chunk)
    want = cross_entropy(linear(hidden, weight, b), target, reduction="none")
    torch.testing.assert_close(nll, want.detach(), rtol=1e-12, atol=1e-12)
    inputs = [x for x in (hidden, weight, b) if x is not None]
    got = torch.autograd.grad(total * 0.37, inputs)
    torch.testing.assert_close(got, torch.autograd.grad((want * u).sum() * 0.37, inputs), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_it_is_no_worse_than_the_plain_implementation(dtype: torch.dtype) -> None:
    hidden, weight, b, target, u = case(300, torch.float64)
    exact = torch.autograd.grad((cross_entropy(linear(hidden, weight, b), target, reduction="none") * u).sum(),
                                [hidden, weight])
    low = [x.detach().to(dtype).requires_grad_() for x in (hidden, weight, b)]
    plain_nll = cross_entropy(linear(*low).float(), target, reduction="none")
    plain = torch.autograd.grad((plain_nll * u.float()).sum(), low[:2])
    total, _ = weighted_nll(*low, target, u.float(), chunk=32)
    ours = torch.autograd.grad(total, low[:2])
    for got, naive, want in zip(ours, plain, exact, strict=True):
        assert got.dtype == dtype
        assert float((got - want).abs().max()) <= 1.5 * float((naive - want).abs().max())


def test_frozen_heads_and_hidden_states_get_no_gradient_and_no_grad_mode_computes_none() -> None:
    hidden, weight, _, target, u = case(10, torch.float32, bias=False)
    total, _ = weighted_nll(hidden, weight.detach(), None, target, u)
    total.backward()
    assert weight.grad is None
    with torch.no_grad():
        total, nll = weighted_nll(hidden, weight, None, target, u)
    assert not total.requires_grad
    assert not nll.requires_grad


def test_a_second_backward_is_refused_instead_of_being_wrong() -> None:
    hidden, weight, _, target, u = case(10, torch.float32, bias=False)
    total, _ = weighted_nll(hidden, weight, None, target, u)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="has been used"):
        total.backward()


def test_under_autocast_products_are_low_and_sums_are_float32() -> None:
    hidden, weight, b, target, u = case(50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = weighted_nll(hidden, weight, b, target, u)
    assert total.dtype == nll.dtype == torch.float32
    total.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_a_models_own_logits_give_the_same() -> None:
    hidden, weight, b, target, u = case(12, torch.float64)
    a, b_ = logits_nll(linear(hidden, weight, b), target, u), weighted_nll(hidden, weight, b, target, u)
    torch.testing.assert_close(a, b_)


def test_token_weights_reach_every_token_alike() -> None:
    # Liger#968: `none` used grad_output[0] for all tokens.
    hidden, weight, _, target, _ = case(6, torch.float64, bias=False)
    for t in range(6):
        u = torch.zeros(6, dtype=torch.float64)
        u[t] = 2.0
        total, nll = weighted_nll(hidden, weight, None, target, u, chunk=4)
        assert float(total.detach()) == pytest.approx(2.0 * float(nll[t]))
        [grad] = torch.autograd.grad(total, [hidden])
        assert (grad[t] != 0).any()
        assert (grad[torch.arange(6) != t] == 0).all()
