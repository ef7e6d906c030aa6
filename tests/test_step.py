"""The exact step in one process: the gradient is that of the definition, however a batch is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from chatloss.attention import use_blocks
from chatloss.batch import Layout, documents_of
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.models import PureFloat64, head_difference
from chatloss.reduction import Reduction
from chatloss.sample import Reason, Sample
from chatloss.step import StepResult, blame, clip_gradient, gradient
from tests.synthetic import FAMILIES, chat, chats, per_turn, row
from tests.test_reduction import NAMES
from tests.torch_reference import Gradient, difference, gradient_of, reference_gradient, tiny

LAYOUTS = {
    "one packed": Layout(micro_tokens=4000),
    "packed by 130": Layout(micro_tokens=130, quadratic=0.01),
    "2 packs of 150": Layout(micro_rows=2, pack_tokens=150),
    "one padded": Layout(micro_tokens=100_000, packing="none"),
    "padded by 3": Layout(micro_rows=3, packing="none"),
    "row by row": Layout(micro_rows=1, packing="none"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    with PureFloat64():
        yield


def chatloss_gradient(
    model: Any, examples: Sequence[Sequence[Sample]], name: str, layout: Layout, norm: str = "count"
) -> tuple[StepResult, Gradient]:
    model.zero_grad()
    use_blocks(model)
    reduction = Reduction.parse(name, norm)
    weights = [reduction.of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    loss = TokenLoss(model, own_logits=bool(head_difference(model, [1, 2, 3])))
    result = gradient(loss, layout.micro_batches(documents), math.fsum(w.denominator for w in weights))
    return result, gradient_of(model)


# transformers#45305, #35856, #37766, trl#2615, #3938, ms-swift#10116, verl#3994: divided twice, not at all, or by the
# number of micro-batches.
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_gradient_is_the_definitions_under_every_partition_in_float64(family: str) -> None:
    model, examples = tiny(FAMILIES[family]), chats(9)
    loss, want = reference_gradient(model, examples)
    for name, layout in LAYOUTS.items():
        result, got = chatloss_gradient(model, examples, "token", layout)
        assert abs(result.loss - loss) < 1e-12, name
        assert difference(got, want) < 1e-12, name


@pytest.mark.parametrize("reduction", NAMES)
def test_every_reduction_is_exact_under_every_partition(reduction: str) -> None:
    model, examples = tiny(FAMILIES["llama"]), chats(7, seed=3)
    loss, want = reference_gradient(model, examples, reduction)
    for name in ("packed by 130", "padded by 3"):
        result, got = chatloss_gradient(model, examples, reduction, LAYOUTS[name])
        assert math.isclose(result.loss, loss, rel_tol=1e-12), name
        assert difference(got, want) < 1e-12, name


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_in_float32_every_partition_agrees_with_float64_within_1e_5(family: str) -> None:
    model, examples = tiny(FAMILIES[family], torch.float32), chats(9)
    _, want = reference_gradient(model, examples)
    for name, layout in LAYOUTS.items():
        _, got = chatloss_gradient(model, examples, "token", layout)
        assert difference(got, want) < 1e-5, name


@pytest.mark.parametrize("reduction", NAMES)
def test_multi_turn_and_per_turn_rows_have_the_same_gradient(reduction: str) -> None:
    model = tiny(FAMILIES["qwen3"])
    one_row = [chat([(5, 4), (3, 9), (2, 6)], seed=1), chat([(4, 3), (2, 1), (3, 5)], seed=2)]
    three_rows = [per_turn(rows) for rows in one_row]
    assert [len(rows) for rows in three_rows] == [3, 3]
    a, want = chatloss_gradient(model, one_row, reduction, LAYOUTS["one packed"])
    b, got = chatloss_gradient(model, three_rows, reduction, LAYOUTS["packed by 130"])
    assert a.tokens == b.tokens == 28
    assert difference(got, want) < 1e-12


def test_float_weights_of_either_sign_are_exact() -> None:
    model = tiny(FAMILIES["llama"])
    examples = [chat([(3, 9), (5, 4)], seed=1, weights=[0.25, -1.5]), chat([(4, 6)], seed=2, weights=[3.0])]
    _, want = reference_gradient(model, examples)
    for layout in LAYOUTS.values():
        assert difference(chatloss_gradient(model, examples, "token", layout)[1], want) < 1e-12


def test_micro_batches_with_10_and_990_targets_weigh_every_token_alike() -> None:
    # axolotl#3982, torchtune#1875, nanochat#623, Lightning#20350: the mean of micro-batch means.
    model, examples = tiny(FAMILIES["llama"]), [chat([(2, 10)], seed=1), chat([(2, 990)], seed=2)]
    _, want = reference_gradient(model, examples)
    result, got = chatloss_gradient(model, examples, "token", Layout(micro_rows=1, packing="none"))
    assert result.denominators == (1000.0,)
    assert difference(got, want) < 1e-12


def test_a_short_last_window_is_divided_by_what_it_holds() -> None:
    # Lightning#19987, transformers#35808: a short last accumulation window divided by the full one.
    model, examples = tiny(FAMILIES["llama"]), chats(1)
    _, want = reference_gradient(model, examples)
    _, got = chatloss_gradient(model, examples, "token", Layout(micro_rows=1, packing="none"))
    assert difference(got, want) < 1e-12


def test_empty_rows_and_all_masked_micro_batches_add_nothing() -> None:
    # Liger#968, FIELD: mean of an empty micro-batch gives NaN; (logp*mask).sum()/mask.sum() gives NaN gradients.
    model, examples = tiny(FAMILIES["llama"]), chats(3)
    _, want = reference_gradient(model, examples)
    nothing = [[row([(6, 0, 0.0, Reason.OTHER_ROLE)], np.arange(6))], [], [row([], np.arange(0))]]
    result, got = chatloss_gradient(model, [*nothing, *examples], "turn", LAYOUTS["row by row"])
    assert math.isfinite(result.loss)
    _, got = chatloss_gradient(model, [*nothing, *examples], "token", LAYOUTS["row by row"])
    assert difference(got, want) < 1e-12


def test_dummy_micro_batches_add_nothing_and_are_finite() -> None:
    model, examples = tiny(FAMILIES["llama"]), chats(2)
    _, want = reference_gradient(model, examples)
    reduction = Reduction.parse("token")
    weights = [reduction.of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    layout = Layout(ranks=4, micro_tokens=1000)
    batches = [b for rank in range(4) for b in layout.micro_batches(documents, rank)]
    assert sum(not b.placed for b in batches) == 2
    model.zero_grad()
    gradient(TokenLoss(model), batches, sum(w.denominator for w in weights))
    assert difference(gradient_of(model), want) < 1e-12


def test_a_step_without_targets_is_skipped_without_touching_a_gradient() -> None:
    model = tiny(FAMILIES["llama"])
    result, got = chatloss_gradient(model, [[row([(6, 0, 0.0, Reason.OTHER_ROLE)], np.arange(6))]], "token",
                                    LAYOUTS["one packed"])
    assert result.skipped
    assert got == {}


def test_logits_exist_for_trained_tokens_only() -> None:
    model, examples = tiny(FAMILIES["llama"]), [chat([(50, 3), (60, 4)], seed=1)]
    seen: list[int] = []
    for own_logits in (False, True):
        loss = TokenLoss(model, own_logits)
        hook = torch.nn.functional.linear

        def spy(*args: Any, hook: Any = hook, **kwargs: Any) -> Any:
            out = hook(*args, **kwargs)
            if out.shape[-1] == model.config.vocab_size:
                seen.append(out.numel() // out.shape[-1])
            return out

        weights = Reduction.parse("token").of_example(examples[0])
        batches = Layout(micro_tokens=1000).micro_batches(documents_of(examples[0], weights))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", spy)
            gradient(loss, batches, 7.0)
        assert seen.pop() == 7
        assert not seen


def test_a_non_finite_loss_stops_and_names_the_rows() -> None:
    # trl#6668: NaN reported as 0.0; transformers hides it behind logging_nan_inf_filter.
    model, examples = tiny(FAMILIES["llama"]), chats(4)
    bad = int(examples[2][0].input_ids[3])
    clean = [e for e in examples if bad not in e[0].input_ids]
    model.model.embed_tokens.weight.data[bad] = math.nan
    with pytest.raises(RecipeError, match="loss is not finite") as error:
        chatloss_gradient(model, examples, "token", LAYOUTS["padded by 3"])
    assert examples[2][0].source in error.value.where.split(", ")
    for rows in clean:
        assert rows[0].source not in error.value.where.split(", ")
    assert error.value.kind == "not finite"


def test_a_non_finite_gradient_is_blamed_on_its_rows() -> None:
    model, examples = tiny(FAMILIES["llama"]), chats(4)
    reduction = Reduction.parse("token")
    documents = [d for rows in examples for d in documents_of(rows, reduction.of_example(rows))]
    batches = Layout(micro_rows=1, packing="none").micro_batches(documents)
    bad = batches[2].placed[0][0].row.source
    count = iter(range(100))

    def poison(grad: torch.Tensor) -> torch.Tensor:
        return grad * math.nan if next(count) == 2 else grad

    from chatloss.parallel import World

    model.model.norm.weight.register_hook(poison)
    error = blame(TokenLoss(model), batches, World())
    assert error.where == bad
    assert "gradient is not finite" in error.what


def test_clipping_acts_on_the_true_gradient() -> None:
    # Clipping per micro-batch, or before the sum over ranks, clips something else.
    model, examples = tiny(FAMILIES["llama"]), chats(5)
    _, want = reference_gradient(model, examples)
    norm = math.sqrt(sum(float((g**2).sum()) for g in want.values()))
    chatloss_gradient(model, examples, "token", LAYOUTS["row by row"])
    assert math.isclose(clip_gradient(model, norm / 10), norm, rel_tol=1e-12)
    assert difference(gradient_of(model), {k: g / 10 for k, g in want.items()}) < 1e-12
    assert math.isclose(clip_gradient(model, 0.0), norm / 10, rel_tol=1e-12)


def test_bf16_autocast_is_no_worse_than_naive_bf16() -> None:
    # The bound is the error of the plain implementation in the same precision, not a hand-picked number.
    model, examples = tiny(FAMILIES["llama"], torch.float32), chats(6)
    _, want = reference_gradient(model, examples)
    reduction = Reduction.parse("token")
    weights = [reduction.of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    z = sum(w.denominator for w in weights)
    gradient(TokenLoss(model), LAYOUTS["row by row"].micro_batches(documents), z, autocast=torch.bfloat16)
    ours = difference(gradient_of(model), want)
    model.zero_grad()
    for rows in examples:
        ids = torch.from_numpy(rows[0].input_ids.astype("int64"))[None]
        labels = torch.from_numpy(rows[0].labels)[None]
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(z))
        out.loss.backward()
    assert ours <= 1.5 * difference(gradient_of(model), want)
