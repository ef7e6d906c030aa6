"""Heads, isolation and caveats: what a model really does is found out by running it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from chatloss.attention import use_blocks
from chatloss.batch import Layout, MicroBatch, documents_of
from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.models import NOISE, caveats, head_difference, isolation_difference, load_model
from chatloss.reduction import Reduction
from chatloss.step import gradient, tensors
from tests.synthetic import FAMILIES, TINY, chats
from tests.torch_reference import difference, gradient_of, tiny

MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def documents(n: int = 3) -> list[Any]:
    reduction = Reduction.parse("token")
    return [d for rows in chats(n) for d in documents_of(rows, reduction.of_example(rows))]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3"])
def test_plain_heads_are_computed_for_trained_tokens_only(family: str) -> None:
    assert head_difference(tiny(FAMILIES[family], torch.float32), [1, 2, 3, 4]) == ""


@pytest.mark.parametrize("initializer_range", [0.2, 0.002])
def test_soft_capping_and_logit_scaling_are_seen_even_where_logits_are_tiny(initializer_range: float) -> None:
    small = {"initializer_range": initializer_range}
    capped = tiny({**FAMILIES["gemma2"], **small, "final_logit_softcapping": 30.0}, torch.float32)
    assert "soft-capped" in head_difference(capped, [1, 2, 3, 4])
    scaled = tiny({"model_type": "granite", **TINY, **small, "logits_scaling": 8.0}, torch.float32)
    assert "scaled" in head_difference(scaled, [1, 2, 3, 4])
    values = {k: v for k, v in TINY.items() if k != "head_dim"}
    cohere = tiny({"model_type": "cohere", **values, **small}, torch.float32)
    assert "scaled" in head_difference(cohere, [1, 2, 3, 4])


def test_a_head_that_is_no_plain_linear_layer_uses_the_models_own_logits() -> None:
    recipe = Recipe.from_dict({"model": FAMILIES["llama"], "init": "random", "lora": {"targets": ["lm_head"]}})
    model = load_model(recipe)
    assert "not a plain linear layer" in head_difference(TokenLoss(model).inner, [1, 2, 3])


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("blocks", [False, True])
def test_documents_in_a_pack_are_isolated(family: str, blocks: bool) -> None:
    # axolotl#3796: packing leaks under sdpa; transformers#46634: a 2-D mask disables packed detection.
    for dtype in (torch.float32, torch.float64):
        model = tiny(FAMILIES[family], dtype)
        if blocks and family != "gemma2":  # which soft-caps its attention and so never uses SDPA
            assert use_blocks(model)
        assert isolation_difference(TokenLoss(model), documents()) == ""


def test_a_leak_between_documents_is_found_by_the_probe() -> None:
    class Leaky(TokenLoss):
        pass

    loss = Leaky(tiny(FAMILIES["llama"], torch.float32))
    original = loss.inner.base_model.forward

    def blind(position_ids: Any = None, **kwargs: Any) -> Any:
        return original(attention_mask=torch.ones_like(kwargs["input_ids"]), position_ids=position_ids, **kwargs)

    loss.inner.base_model.forward = blind
    assert "neighbour" in isolation_difference(loss, documents()) or "beside" in isolation_difference(loss, documents())


def test_a_leak_by_position_alone_is_found_by_the_probe() -> None:
    loss = TokenLoss(tiny(FAMILIES["llama"], torch.float32))
    original = loss.inner.base_model.forward
    loss.inner.base_model.forward = lambda position_ids=None, **kwargs: original(**kwargs)
    assert isolation_difference(loss, documents()) != ""


def test_a_recurrent_model_that_leaks_is_found_by_the_probe() -> None:
    mamba = {"model_type": "mamba", "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4,
             "initializer_range": 0.3}
    model = tiny(mamba, torch.float32)
    loss = TokenLoss(model)
    original = model.base_model.forward
    model.base_model.forward = lambda position_ids=None, **kwargs: original(**kwargs)
    assert isolation_difference(loss, documents()) != ""


def test_gradient_checkpointing_changes_no_gradient() -> None:
    batches = Layout(micro_tokens=130).micro_batches(documents(5))
    grads = []
    for checkpointing in (False, True):
        recipe = Recipe.from_dict({"model": FAMILIES["llama"], "init": "random",
                                   "run": {"gradient_checkpointing": checkpointing, "dtype": "float64"}})
        model = load_model(recipe)
        gradient(TokenLoss(model), batches, 10.0)
        grads.append(gradient_of(model))
    assert difference(grads[1], grads[0]) < 1e-12


def test_with_lora_only_adapters_get_a_gradient_and_it_is_exact() -> None:
    recipe = Recipe.from_dict({"model": FAMILIES["llama"], "init": "random", "run": {"dtype": "float64"},
                               "lora": {"rank": 4, "alpha": 8}})
    grads = []
    for layout in (Layout(micro_tokens=4000), Layout(micro_rows=1, packing="none")):
        model = load_model(recipe)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        gradient(TokenLoss(model), layout.micro_batches(documents(5)), 10.0)
        grads.append(gradient_of(model))
    assert grads[0]
    assert all("lora_" in name for name in grads[0])
    assert difference(grads[1], grads[0]) < 1e-6


def test_load_balancing_is_a_term_of_its_own_over_its_own_tokens() -> None:
    model = tiny({"model_type": "mixtral", **TINY, **MOE, "output_router_logits": True}, torch.float32)
    batch = MicroBatch.build([documents(1)])
    loss = TokenLoss(model, moe_aux=0.02)
    result = gradient(loss, [batch], 7.0, moe_aux=True)
    assert result.denominators == (7.0, float(batch.tokens))
    out = model(input_ids=torch.from_numpy(batch.input_ids), output_router_logits=True, use_cache=False)
    assert result.terms[1] == pytest.approx(0.02 * float(out.aux_loss.detach()), rel=1e-5)
    # twice the same micro-batch: the mean stays
    model.zero_grad()
    twice = gradient(loss, [batch, batch], 14.0, moe_aux=True)
    assert twice.terms == pytest.approx(result.terms, rel=1e-6)
    assert any("load-balancing" in note for note in caveats(model, 0.02))


def test_padding_is_not_balanced() -> None:
    model = tiny({"model_type": "mixtral", **TINY, **MOE}, torch.float32)
    loss = TokenLoss(model, moe_aux=1.0)
    short, long = sorted(documents(4), key=len)[:: len(documents(4)) - 1]
    padded = MicroBatch.build([[short], [long]])
    assert (padded.document_ids < 0).any()
    with torch.no_grad():
        sums, _ = loss(*tensors(padded, loss, torch.device("cpu")))
        packed, _ = loss(*tensors(MicroBatch.build([[short, long]]), loss, torch.device("cpu")))
    assert float(sums[1]) == pytest.approx(float(packed[1]), rel=1e-4)


def test_a_dummy_micro_batch_adds_no_load_balancing_and_is_finite() -> None:
    model = tiny({"model_type": "mixtral", **TINY, **MOE}, torch.float32)
    loss = TokenLoss(model, moe_aux=1.0)
    batch = MicroBatch.build([documents(1)])
    plain = gradient(loss, [batch], 7.0, moe_aux=True)
    want = gradient_of(model)
    model.zero_grad()
    assert gradient(loss, [batch, MicroBatch.build([])], 7.0, moe_aux=True).terms == plain.terms
    assert difference(gradient_of(model), want) < 1e-6


def test_dropout_and_length_dependent_positions_are_named() -> None:
    dropout = tiny({**FAMILIES["llama"], "attention_dropout": 0.1})
    assert any("dropout" in note for note in caveats(dropout, 0.0))
    dynamic = tiny({**FAMILIES["llama"], "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
    assert any("dynamic" in note for note in caveats(dynamic, 0.0))
    assert caveats(tiny(FAMILIES["llama"]), 0.0) == []


def test_a_missing_model_is_a_clear_error(tmp_path: Any) -> None:
    with pytest.raises(RecipeError, match="cannot load the model"):
        load_model(Recipe.from_dict({"model": str(tmp_path / "nothing")}))
    with pytest.raises(RecipeError, match="names no model"):
        load_model(Recipe.from_dict({}))
    with pytest.raises(RecipeError, match="cannot read the model's config"):
        load_model(Recipe.from_dict({"model": {"model_type": "lama"}, "init": "random"}))
    with pytest.raises(RecipeError, match="cannot read the model's config"):
        load_model(Recipe.from_dict({"model": {"hidden_size": 3}, "init": "random"}))


def test_a_random_model_takes_its_vocabulary_from_the_tokenizer_and_its_weights_from_the_seed() -> None:
    values = {k: v for k, v in FAMILIES["llama"].items() if k != "vocab_size"}
    recipe = Recipe.from_dict({"model": values, "init": "random", "seed": 5})
    models = [load_model(recipe, vocab_size=77) for _ in range(2)]
    weights = [m.get_input_embeddings().weight for m in models]  # type: ignore[operator]
    assert weights[0].shape[0] == 77
    assert torch.equal(weights[0], weights[1])


def test_noise_bounds_are_far_below_what_a_leak_does() -> None:
    assert max(NOISE[torch.float32], NOISE[torch.float64]) <= 1e-4
    assert np.isfinite(list(NOISE.values())).all()
