"""Several ranks: the gradient is that of the definition under DDP and FSDP2, and each trap gives another one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from chatloss.batch import Layout, documents_of
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.models import PureFloat64
from chatloss.parallel import World
from chatloss.reduction import Reduction
from chatloss.sample import Reason, Sample
from chatloss.step import clip_gradient, gradient
from tests.ranks import on_ranks
from tests.synthetic import FAMILIES, chats, row
from tests.torch_reference import difference, gradient_of, reference_gradient, tiny

Examples = Sequence[Sequence[Sample]]


def spread_gradient(
    world: World, examples: Examples, parallel: Any, reduction: str = "token", layout: Layout | None = None,
    family: str = "llama", checks: bool = True,
) -> dict[str, float]:
    """Differences from the reference of the gradient over all ranks, of its clipped norm, and of the loss."""
    model = tiny(FAMILIES[family])
    loss, want = reference_gradient(model, examples, reduction)
    weigh = Reduction.parse(reduction)
    weights = [weigh.of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    layout = layout or Layout(world.size, micro_tokens=130)
    token_loss = TokenLoss(model)
    module = world.wrap(token_loss, parallel, list(model.model.layers))
    mine = math.fsum(w.denominator for i, w in enumerate(weights) if i % world.size == world.rank)
    result = gradient(module, layout.micro_batches(documents, world.rank), mine, world)
    out = {"gradient": difference(gradient_of(model), want), "loss": abs(result.loss - loss),
           "tokens": result.tokens - sum(w.tokens for w in weights)}
    norm = math.sqrt(sum(float((g**2).sum()) for g in want.values()))
    return {**out, "norm": abs(clip_gradient(token_loss, norm / 3) - norm) / norm,
            "clipped": difference(gradient_of(model), {k: g / 3 for k, g in want.items()})}


def everything(world: World) -> dict[str, Any]:
    """All that is checked on these ranks, in one spawn."""
    out: dict[str, Any] = {}
    with PureFloat64():
        for parallel in ("ddp", "fsdp"):
            for name in ("token", "turn", "power:0.5:conversation")[: 3 if parallel == "ddp" else 1]:
                out[parallel, name] = spread_gradient(world, chats(7), parallel, name)
            padded = Layout(world.size, None, 2, "none")
            out[parallel, "padded"] = spread_gradient(world, chats(9), parallel, layout=padded)
            out[parallel, "fewer rows than ranks"] = spread_gradient(world, chats(1), parallel)
            out[parallel, "experts"] = spread_gradient(world, chats(5), parallel, family="mixtral")
            out[parallel, "tied"] = spread_gradient(world, chats(5), parallel, family="qwen3")
            out[parallel, "uneven tail"] = spread_gradient(
                world, chats(3), parallel, layout=Layout(world.size, None, 1, "none")
            )
        out["not finite"] = _not_finite(world)
        out["skipped"] = _skipped(world)
        out["traps"] = {name: trap(world) for name, trap in TRAPS.items()}
    return out


def _not_finite(world: World) -> list[str]:
    model, examples = tiny(FAMILIES["llama"]), chats(4)
    documents = [d for rows in examples for d in documents_of(rows, Reduction.parse("token").of_example(rows))]
    batches = Layout(world.size, None, 1, "none").micro_batches(documents, world.rank)
    if world.rank == world.size - 1:
        batches[0].weights[batches[0].weights != 0] = math.nan
    try:
        gradient(world.wrap(TokenLoss(model), "ddp"), batches, 1.0, world)
    except RecipeError as error:
        return world.gather(error.what)
    return world.gather("")


def _skipped(world: World) -> list[bool]:
    """Z is 0 only if it is so on all ranks."""
    model = tiny(FAMILIES["llama"])
    rows = [row([(6, 0, 0.0, Reason.OTHER_ROLE)], torch.arange(6).numpy())]
    weights = Reduction.parse("token").of_example(rows)
    batches = Layout(world.size, micro_tokens=50).micro_batches(documents_of(rows, weights), world.rank)
    return world.gather(gradient(world.wrap(TokenLoss(model), "ddp"), batches, 0.0, world).skipped)


def _trap_head_outside(world: World) -> float:
    """Head and loss computed outside the wrapped forward: their gradients are never exchanged."""
    model, examples = tiny(FAMILIES["llama"]), chats(2 * world.size)
    _, want = reference_gradient(model, examples)
    body = torch.nn.parallel.DistributedDataParallel(model.model)
    z = sum(e[0].n_trained for e in examples)
    for rows in examples[world.rank :: world.size]:
        ids = torch.from_numpy(rows[0].input_ids.astype("int64"))[None]
        logits = model.lm_head(body(input_ids=ids, use_cache=False).last_hidden_state)
        nll = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")
        (nll * torch.from_numpy(rows[0].weights[1:]) * world.size / z).sum().backward()
    return difference(gradient_of(model), want)


def _trap_mean_of_means(world: World) -> float:
    """Each rank divides by its own targets."""
    model, examples = tiny(FAMILIES["llama"]), chats(4)
    _, want = reference_gradient(model, examples)
    documents = [d for rows in examples for d in documents_of(rows, Reduction.parse("token").of_example(rows))]
    batches = Layout(world.size, None, 1, "none").micro_batches(documents, world.rank)
    module = world.wrap(TokenLoss(model), "ddp")
    from chatloss.step import tensors

    for batch in batches:
        sums, _ = module(*tensors(batch, module, world.device))
        (sums.sum() / max(int((batch.weights != 0).sum()), 1) / len(batches)).backward()
    return difference(gradient_of(model), want)


def _trap_divide_factor_on_the_root_only(world: World) -> float:
    """FSDP2: `set_gradient_divide_factor(1.0)` on the root leaves the gradients of nested layers divided by W."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, examples = tiny(FAMILIES["llama"]), chats(4)
    _, want = reference_gradient(model, examples)
    weights = [Reduction.parse("token").of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    module: Any = TokenLoss(model)
    mesh = init_device_mesh("cpu", (world.size,))
    for part in [*model.model.layers, module]:
        fully_shard(part, mesh=mesh)
    module.set_gradient_divide_factor(1.0)
    mine = sum(w.denominator for w in weights[world.rank :: world.size])
    gradient(module, Layout(world.size, micro_tokens=130).micro_batches(documents, world.rank), mine, world)
    return difference(gradient_of(model), want)


def _trap_sum_hook_at_every_micro_batch(world: World) -> float:
    """A SUM hook without `no_sync` on all but the last: earlier micro-batches are summed over the ranks again."""
    from chatloss.step import tensors

    model, examples = tiny(FAMILIES["llama"]), chats(8)
    _, want = reference_gradient(model, examples)
    weights = [Reduction.parse("token").of_example(rows) for rows in examples]
    documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
    module: Any = world.wrap(TokenLoss(model), "ddp")

    def add(_, bucket):  # type: ignore[no-untyped-def] # DDP reads the annotations
        work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    module.register_comm_hook(None, add)
    for batch in Layout(world.size, None, 1, "none").micro_batches(documents, world.rank):
        sums, _nll = module(*tensors(batch, module, world.device))
        (sums.sum() / sum(w.denominator for w in weights)).backward()
    return difference(gradient_of(model), want)


TRAPS = {"sum hook": _trap_sum_hook_at_every_micro_batch, "head outside": _trap_head_outside,
         "mean of means": _trap_mean_of_means, "divide factor on the root only": _trap_divide_factor_on_the_root_only}


@pytest.fixture(scope="module")
def two_ranks() -> dict[Any, Any]:
    return dict(on_ranks(2, everything))


def check_exact(results: dict[Any, Any]) -> None:
    exact = {key: value for key, value in results.items() if isinstance(key, tuple)}
    assert len(exact) == 3 + 1 + 10
    for key, value in exact.items():
        assert all(number < 1e-12 for number in value.values()), (key, value)


def test_the_gradient_over_two_ranks_is_the_definitions_under_ddp_and_fsdp2(two_ranks: dict[Any, Any]) -> None:
    # axolotl#3982, open-instruct#1728, verl#5625, prime-rl#1957, Megatron-LM#7452: ranks with unequal targets.
    check_exact(two_ranks)


def test_a_non_finite_loss_on_one_rank_stops_all(two_ranks: dict[Any, Any]) -> None:
    assert two_ranks["not finite"] == ["the loss is not finite"] * 2


def test_a_step_is_skipped_by_all_ranks_or_none(two_ranks: dict[Any, Any]) -> None:
    assert two_ranks["skipped"] == [True, True]


def test_each_trap_would_have_been_seen(two_ranks: dict[Any, Any]) -> None:
    # What these tests can detect: the mistakes of section 4 are errors of a tenth and more, not of float noise.
    assert all(value > 0.05 for value in two_ranks["traps"].values()), two_ranks["traps"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_the_gradient_over_more_ranks_is_the_definitions(size: int) -> None:
    check_exact(on_ranks(size, everything))
