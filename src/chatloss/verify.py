"""The proof on your own recipe: one global batch, cut in every way, must have one gradient."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.multiprocessing.spawn import spawn

from chatloss.answers import plain_logp
from chatloss.batch import Layout, global_batches
from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.models import PureFloat64, head_difference, isolation_difference, load_model, plain_experts
from chatloss.objective import Objective, Supervised, first_documents
from chatloss.objectives import objective_of
from chatloss.parallel import World
from chatloss.reduction import Reduction
from chatloss.step import gradient

__all__ = ["Case", "Report", "Verdict", "definition", "judge", "verify"]

Gradient = Mapping[str, npt.NDArray[np.float64]]
Examples = Sequence[Any]
T = TypeVar("T")
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


@dataclass(frozen=True, slots=True)
class Verdict:
    """One case: `difference` is the largest, over parameters, of ``max |g - g_ref| / max |g_ref|``."""

    case: str
    difference: float
    tolerance: float
    worst: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.difference <= self.tolerance


def judge(
    gradient_of: Callable[[T], Gradient], cases: Mapping[str, T], reference: Gradient, tolerance: float = 1e-5
) -> list[Verdict]:
    """Compares anybody's gradients with a reference: one verdict per case.

    `gradient_of` gets a case (any description of how to cut a batch: micro-batches of rows, a trainer's settings) and
    returns the gradient that its optimiser step would use, by parameter name. A parameter that is missing, extra or not
    finite makes the difference infinite.

    >>> reference = {"w": np.array([2.0, -4.0])}
    >>> mean_of_means = lambda counts: {"w": np.array([2.0, -4.0 + 1.0 / counts])}
    >>> [verdict] = judge(mean_of_means, {"two micro-batches": 4}, reference)
    >>> verdict.difference, verdict.passed
    (0.0625, False)
    """
    verdicts = []
    for name, case in cases.items():
        began = time.perf_counter()
        got = gradient_of(case)
        worst, most = _worst(got, reference)
        verdicts.append(Verdict(name, most, tolerance, worst, time.perf_counter() - began))
    return verdicts


def _worst(got: Gradient, want: Gradient) -> tuple[str, float]:
    strange = sorted(set(got) ^ set(want))
    if strange:
        return strange[0], math.inf
    differences = {}
    for name, g in want.items():
        most, scale = float(np.abs(got[name] - g).max(initial=0.0)), float(np.abs(g).max(initial=0.0))
        differences[name] = most / scale if scale else (0.0 if most == 0.0 else math.inf)
        if not math.isfinite(most):
            differences[name] = math.inf
    worst = max(differences, key=lambda name: differences[name], default="")
    return worst, differences.get(worst, 0.0)


def definition(model: Any, examples: Examples, objective: Objective | Reduction) -> Gradient:
    """The gradient as the definition says it, in the model's precision: row by row, all logits, plain sums.

    For a reduction ``sum_t u_t w_t nll_t / Z``, with no batching, no packing, no chunks and no ranks: what everything
    else must equal.
    """
    model.zero_grad(set_to_none=True)
    objective = Supervised(objective) if isinstance(objective, Reduction) else objective
    objective.definition(model, examples)
    return _collect(model)


@dataclass(frozen=True, slots=True)
class Case:
    """One way to cut a global batch: precision, row format, layout (with its ranks) and what the ranks do."""

    dtype: Literal["float64", "float32"]
    row_format: str
    layout: Layout
    parallel: str = "ddp"

    @property
    def name(self) -> str:
        layout = self.layout
        micro = f"{layout.micro_tokens} tokens" if layout.micro_tokens else f"{layout.micro_rows} rows"
        packing = "packed" if layout.packing == "best_fit" else "padded"
        ranks = "1 rank" if layout.ranks == 1 else f"{layout.ranks} ranks {self.parallel}"
        return f"{self.dtype}  {self.row_format}  {packing}  {micro}  {ranks}"


@dataclass(frozen=True, slots=True)
class Report:
    """All verdicts on one global batch of `examples` (conversations, pairs) with `tokens` trained tokens."""

    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    examples: int
    tokens: int

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdict in self.verdicts)

    def table(self) -> str:
        """The verdicts as lines of text."""
        width = max(len(verdict.case) for verdict in self.verdicts)
        return "\n".join(
            f"{v.case:{width}}  {v.difference:8.1e} <= {v.tolerance:.0e}  {'ok' if v.passed else 'FAILED ' + v.worst}"
            for v in self.verdicts
        )


def verify(
    recipe: Recipe, formats: Mapping[str, Examples], *, ranks: Sequence[int] = (1, 2, 4), step: int = 0,
    vocab_size: int | None = None,
) -> Report:
    """The gradient of one global batch of a recipe under every partition, against the definition in float64.

    `formats` maps a row format to the examples encoded so; the same conversations, in the same order. Partitions are
    micro-batch sizes x packed and padded x row formats x `ranks` (spawned processes on gloo; DDP, and FSDP2 on two).
    The first format is the reference's. Dropout and load balancing, which do depend on the partition, are off. The
    log-probabilities of a reference model are drawn at random, so that no two pairs weigh the same.
    """
    recipe = replace(recipe, run=replace(recipe.run, gradient_checkpointing=False))
    objective = objective_of(recipe)
    batch, notes = _draw(recipe, formats, objective, step)
    first = next(iter(batch))
    tokens = sum(objective.survey(batch[first]).trained)
    if not tokens:
        raise RecipeError("this global batch trains nothing", where="data.train", hint="choose another step")
    model = _model(recipe, "float64", vocab_size)
    with PureFloat64():
        batch = _with_references(objective, model, batch, recipe.seed)
        reference = definition(model, batch[first], objective)
    if "best_fit" in recipe.batch.packing:
        leak = _leak(model, batch[first], objective)
        notes += [f"packing is not exact with this model: {leak}"] if leak else ["packed documents are isolated"]
    else:
        leak = "off"
    cases = {case.name: case for case in _cases(batch, objective, ranks, packed=not leak)}
    by_ranks: dict[str, Gradient] = {}
    verdicts = []
    for size in sorted({case.layout.ranks for case in cases.values()}):
        own = {name: case for name, case in cases.items() if case.layout.ranks == size}
        began = time.perf_counter()
        by_ranks = _run(recipe, batch, own, objective, size, vocab_size)
        seconds = (time.perf_counter() - began) / len(own)
        for dtype, tolerance in TOLERANCE.items():
            named = {name: name for name, case in own.items() if case.dtype == dtype}
            verdicts += [replace(v, seconds=seconds) for v in judge(by_ranks.__getitem__, named, reference, tolerance)]
    return Report(tuple(verdicts), tuple(notes), len(batch[first]), tokens)


def _draw(
    recipe: Recipe, formats: Mapping[str, Examples], objective: Objective, step: int
) -> tuple[dict[str, Examples], list[str]]:
    """The examples of one global batch in every format, without those that train other tokens in another format."""
    counts = {name: objective.survey(examples).trained for name, examples in formats.items()}
    trained = next(iter(counts.values()))
    batches = global_batches(trained, examples=recipe.batch.examples or (None if recipe.batch.tokens else 32),
                             tokens=recipe.batch.tokens, seed=recipe.seed)
    for _ in range(step):
        next(batches)
    drawn = next(batches).examples
    same = [i for i in drawn if len({count[i] for count in counts.values()}) == 1]
    notes = []
    if len(same) < len(drawn):
        notes.append(f"{len(drawn) - len(same)} of {len(drawn)} examples train other tokens in another row format and "
                     "are left out")
    return {name: [examples[i] for i in same] for name, examples in formats.items()}, notes


def _with_references(
    objective: Objective, model: Any, batch: Mapping[str, Examples], seed: int
) -> dict[str, Examples]:
    """The examples with reference log-probabilities some nats below those of the model."""
    random = np.random.default_rng(seed)
    answers = [objective.answers(example) for example in next(iter(batch.values()))]
    with torch.no_grad():
        values = [[float(plain_logp(model, answer)) - abs(random.normal(scale=3.0)) for answer in own]
                  for own in answers]
    return {name: [objective.referred(example, own) for example, own in zip(examples, values, strict=True)]
            for name, examples in batch.items()}


def _cases(batch: Mapping[str, Examples], objective: Objective, ranks: Sequence[int], packed: bool) -> list[Case]:
    cases = []
    for size, (row_format, examples) in product(ranks, batch.items()):
        survey = objective.survey(examples)
        lengths = [len(d) for example in examples for d in objective.documents(example)]
        whole, longest, rows = len(lengths) * max(lengths), survey.longest, survey.rows
        layouts = [Layout(size, None, rows, "none"), Layout(size, None, 3 * rows, "none"),
                   Layout(size, whole, None, "none")]
        if packed:
            layouts += [Layout(size, n) for n in (longest, max(longest, sum(lengths) // 3), sum(lengths))]
        for layout in layouts if size == 1 else [layouts[1], layouts[-1 if packed else 2]]:
            cases.append(Case("float64", row_format, layout))
            if size == 1:
                cases.append(Case("float32", row_format, layout))
            if size == 2:
                cases.append(Case("float64", row_format, layout, "fsdp"))
    return cases


def _run(
    recipe: Recipe, batch: Mapping[str, Examples], cases: Mapping[str, Case], objective: Objective, size: int,
    vocab_size: int | None,
) -> dict[str, Gradient]:
    if size == 1:
        return {name: _gradient(recipe, batch, case, objective, World(), vocab_size) for name, case in cases.items()}
    with tempfile.TemporaryDirectory() as directory:
        work = (directory, size, recipe, batch, dict(cases), objective, vocab_size, torch.get_num_threads())
        spawn(_rank, work, nprocs=size)  # type: ignore[no-untyped-call]
        return {name: dict(np.load(Path(directory, f"{i}.npz"))) for i, name in enumerate(cases)}


def _rank(
    rank: int, directory: str, size: int, recipe: Recipe, batch: Mapping[str, Examples], cases: Mapping[str, Case],
    objective: Objective, vocab_size: int | None, threads: int,
) -> None:
    torch.set_num_threads(max(1, min(threads, (os.cpu_count() or 1) // size)))
    store = f"file://{directory}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
    try:
        world = World(rank, size, torch.device("cpu"), torch.distributed.group.WORLD)
        for i, case in enumerate(cases.values()):
            got = _gradient(recipe, batch, case, objective, world, vocab_size)
            if rank == 0:
                np.savez(Path(directory, f"{i}.npz"), **got)  # type: ignore[arg-type]
        world.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _gradient(
    recipe: Recipe, batch: Mapping[str, Examples], case: Case, objective: Objective, world: World,
    vocab_size: int | None,
) -> Gradient:
    """The gradient that the trainer's own step computes in this case, in float64 NumPy."""
    model = _model(recipe, case.dtype, vocab_size)
    examples = batch[case.row_format]
    loss = TokenLoss(model, per_token=objective.per_token)
    ids = first_documents(objective, examples, 1)[0].input_ids
    loss.own_logits = bool(head_difference(loss.inner, ids[:64].tolist()))
    kinds = getattr(loss.inner, "_no_split_modules", None) or ()
    module = world.wrap(loss, case.parallel, [part for part in loss.modules() if type(part).__name__ in kinds])
    with PureFloat64():
        work = objective.work(examples, case.layout, module, world)
        gradient(module, work.micro_batches, work.denominators, world, terms=work.terms)
    return _collect(model)


def _model(recipe: Recipe, dtype: Literal["float64", "float32"], vocab_size: int | None) -> Any:
    """The recipe's model without dropout, with the same float32 values in either precision.

    Adapters, which begin with a zero gradient, get values.
    """
    model: Any = load_model(replace(recipe, run=replace(recipe.run, dtype="float32")), vocab_size=vocab_size)
    if dtype == "float64":
        plain_experts(getattr(model, "get_base_model", lambda: model)())
    generator = torch.Generator().manual_seed(recipe.seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
        if dtype == "float64":
            parameter.data = parameter.data.double()
    return model.eval()


def _leak(model: Any, examples: Examples, objective: Objective) -> str:
    with PureFloat64():
        return isolation_difference(TokenLoss(model), first_documents(objective, examples))


def _collect(model: Any) -> Gradient:
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad = parameter.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            out[name] = whole.detach().double().cpu().numpy()
    return out
