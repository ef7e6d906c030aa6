"""The judge on other people's trainers: the gradient of one optimiser step of theirs beside the definition."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from chatloss.errors import RecipeError
from chatloss.models import PureFloat64, plain_experts
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.verify import Gradient, Report, definition, judge

__all__ = ["verify"]

Build = Callable[[Any], Any]


def verify(
    builds: Build | Mapping[str, Build], model: Any, examples: Sequence[Sequence[Sample]], reduction: str = "token", *,
    weight_norm: str = "count", tolerance: float = 1e-5,
) -> Report:
    """Whether trainers (transformers.Trainer or a subclass) optimise what the reduction says, and how nearly.

    `builds` makes a trainer around the model that it is given, with its own arguments and data: one function, or
    several by name. Each gets a copy of `model` in float64 without dropout, and takes one optimiser step, which must
    take in all its rows; its gradient is compared with the definition over `examples` (the rows of one conversation
    each). `tolerance` forgives kernels that compute in float32, as TRL's head does; our own are within 1e-12. Under
    torchrun the step is that of all ranks, and the report is the same on each of them. The optimiser, clipping,
    precision, NEFTune, checkpointing and callbacks of the trainer play no part. Raises `RecipeError` if one step does
    not take in all rows.
    """
    named = builds if isinstance(builds, Mapping) else {getattr(builds, "__name__", "trainer"): builds}
    chosen = Reduction.parse(reduction, weight_norm)
    plain = _without_noise(model)
    with PureFloat64():
        reference = definition(copy.deepcopy(plain).eval(), examples, chosen)
        verdicts = judge(lambda build: _gradient(build, copy.deepcopy(plain)), named, reference, tolerance)
    if torch.distributed.is_initialized():  # DDP gives every rank the weights of the first, which may differ here
        box = [verdicts]
        torch.distributed.broadcast_object_list(box, src=0)
        [verdicts] = box
    tokens = sum(chosen.of_example(rows).tokens for rows in examples)
    return Report(tuple(verdicts), (), len(examples), tokens)


def _without_noise(model: Any) -> Any:
    """A float64 copy in which nothing depends on how a batch is cut but the loss."""
    plain = copy.deepcopy(model).double()
    if hasattr(plain, "config"):
        plain_experts(plain)
    for module in plain.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0
    return plain


class _Captured(Exception):
    """Ends a training run when its first gradient is complete."""


class _Capture(transformers.TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.gradient: Gradient = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.accelerator.gradient_state.end_of_dataloader:
            batches = len(self.trainer.get_train_dataloader())
            raise RecipeError(
                f"one optimiser step takes {args.gradient_accumulation_steps} of {batches} micro-batches, and the rows "
                "of the others would be missed", where="gradient_accumulation_steps",
                hint=f"verify with fewer rows, or with gradient_accumulation_steps={batches}",
            )
        self.gradient = _collected(self.trainer.model)
        raise _Captured


def _gradient(build: Build, model: Any) -> Gradient:
    """The gradient of the first optimiser step of a trainer, before clipping."""
    trainer = build(model)
    capture = _Capture(trainer)
    # Only the loop itself runs: no reports are sent, no checkpoints written, no progress drawn.
    trainer.callback_handler.callbacks = [capture]
    trainer.args.max_grad_norm = 0.0
    # Recomputation would leave `PureFloat64`, and changes no gradient.
    trainer.args.activation_checkpointing = trainer.args.gradient_checkpointing = False
    trainer.neftune_noise_alpha = None
    trainer.accelerator.native_amp = False
    try:
        trainer.train()
    except _Captured:
        trainer.accelerator.gradient_state.active_dataloader.end()  # nobody else will
        return capture.gradient
    raise RecipeError("the trainer took no optimiser step", where="train_dataset", hint="give it rows and max_steps=1")


def _collected(model: nn.Module) -> Gradient:
    out = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            whole = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
            out[name] = whole.detach().double().cpu().numpy().copy()
    return out
