"""The nll of every token with a gradient of its own: as exact as the plain one, whatever is made of the values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, linear, logsigmoid

from chatloss.loss.nll import token_nll
from tests.test_nll import case


@settings(max_examples=25)
@given(n=st.integers(0, 40), chunk=st.integers(1, 50), bias=st.booleans(), seed=st.integers(0, 99))
def test_any_chunk_gives_values_and_gradients_of_the_definition(n: int, chunk: int, bias: bool, seed: int) -> None:
    hidden, weight, b, target, u = case(n, torch.float64, bias, seed)
    inputs = [x for x in (hidden, weight, b) if x is not None]
    plain = cross_entropy(linear(hidden, weight, b), target, reduction="none")
    both = [token_nll(hidden, weight, b, target, chunk), plain]
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-12)
    got, want = (torch.autograd.grad(-logsigmoid((nll * u).sum()), inputs) for nll in both)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_low_precision_it_is_no_worse_than_the_plain_implementation(dtype: torch.dtype) -> None:
    exact = case(300, torch.float64)
    low = [x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x for x in exact]
    gradients = []
    for (hidden, weight, b, target, u), own in ((exact, False), (low, True), (low, False)):
        nll = token_nll(hidden, weight, b, target, 32) if own else cross_entropy(
            linear(hidden, weight, b), target, reduction="none")
        gradients.append(torch.autograd.grad((nll * u).sum(), [hidden, weight]))
    want, ours, plain = gradients
    for w, o, p in zip(want, ours, plain, strict=True):
        assert (o.double() - w).abs().max() <= 1.5 * (p.double() - w).abs().max()


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_none_either() -> None:
    hidden, weight, b, target, _ = case(5, torch.float64)
    token_nll(hidden, weight.detach(), b.detach(), target).sum().backward()
    assert hidden.grad is not None
    token_nll(hidden.detach(), weight, b.detach(), target).sum().backward()
    assert weight.grad is not None and b.grad is None


def test_autocast_computes_products_in_low_precision_and_sums_in_float32() -> None:
    hidden, weight, b, target, _ = case(9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = token_nll(hidden, weight, b, target)
    nll.sum().backward()
    assert nll.dtype == torch.float32 and hidden.grad is not None and hidden.grad.dtype == torch.float32
    want = cross_entropy(linear(hidden, weight, b), target, reduction="none")
    torch.testing.assert_close(nll.detach(), want.detach(), rtol=0.05, atol=0.1)


def test_nothing_is_kept_for_a_backward_pass_that_never_comes() -> None:
    hidden, weight, b, target, _ = case(5, torch.float32)
    with torch.no_grad():
        assert token_nll(hidden, weight, b, target).grad_fn is None
