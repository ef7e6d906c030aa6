"""Attention by document: the numbers of the masked product over the whole pack, for any mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from chatloss.attention import NAME, attend_by_document, blocks_of, use_blocks
from tests.synthetic import FAMILIES
from tests.torch_reference import tiny


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


def compare(mask: torch.Tensor) -> None:
    torch.manual_seed(0)
    b, _, t, _ = mask.shape
    query, key, value = (torch.randn(b, heads, t, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
    got, _ = attend_by_document(Layer(), query, key, value, mask, scaling=0.5)
    want = scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), attn_mask=mask, scale=0.5
    ).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(want)
    grads = [torch.autograd.grad(out, [query, key, value], probe, retain_graph=True) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(rows=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=5), min_size=1, max_size=3),
       window=st.integers(1, 9))
def test_packs_with_any_window_are_the_masked_product(rows: list[list[int]], window: int) -> None:
    width = max(map(sum, rows))
    masks = []
    for lengths in rows:
        lengths = [*lengths, width - sum(lengths)]
        square = torch.block_diag(*[torch.ones(n, n) for n in lengths if n]).tril().triu(1 - window)
        masks.append(square.bool()[None])
    mask = torch.stack(masks)
    compare(mask)
    if window > 1:
        assert [end - start for b, start, end, _ in blocks_of(mask) if b == 0][: len(rows[0])] == rows[0]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), t=st.integers(1, 9))
def test_a_mask_that_is_not_made_of_blocks_is_not_cut(seed: int, t: int) -> None:
    random = torch.rand(2, 1, t, t, generator=torch.Generator().manual_seed(seed)) < 0.5
    compare(random | torch.eye(t).bool())


def test_no_number_of_one_document_reaches_another() -> None:
    mask = torch.block_diag(torch.ones(3, 3), torch.ones(4, 4)).tril().bool()[None, None]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, 4) for _ in range(3))
    before, _ = attend_by_document(Layer(), q, k[:, :1], v[:, :1], mask)
    k[:, :, :3], v[:, :, :3] = float("nan"), float("inf")
    after, _ = attend_by_document(Layer(), q, k[:, :1], v[:, :1], mask)
    assert torch.equal(before[:, 3:], after[:, 3:])


def test_decoding_and_unmasked_rows_use_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 1, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    got, _ = attend_by_document(Layer(), q, k, v, torch.ones(1, 1, 1, 6, dtype=torch.bool))
    want = scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(got, want)


def test_a_model_that_attends_in_its_own_way_is_left_alone_and_the_name_is_not_saved(tmp_path: Any) -> None:
    eager = tiny(FAMILIES["gemma2"])
    eager.set_attn_implementation("eager")
    assert not use_blocks(eager)
    model = tiny(FAMILIES["llama"])
    assert use_blocks(model)
    assert model.config._attn_implementation == NAME
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generation_is_unchanged(family: str) -> None:
    model = tiny(FAMILIES[family]).eval()
    ids = torch.tensor([[3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    before = model.generate(ids, **kwargs)
    use_blocks(model)
    assert torch.equal(model.generate(ids, **kwargs), before)
