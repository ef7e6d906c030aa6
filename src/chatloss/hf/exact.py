"""The exact loss in other people's loops: ``sum_t u_t w_t nll_t / Z``, with Z of the whole step before any backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn

from chatloss.batch import Document
from chatloss.errors import DataError, RecipeError
from chatloss.hf.rows import Collator
from chatloss.loss.model import TokenLoss
from chatloss.loss.nll import logits_nll
from chatloss.models import isolation_difference
from chatloss.sample import Sample

if TYPE_CHECKING:
    _Trainer: Any = transformers.Trainer
else:
    _Trainer = object

__all__ = ["ExactLoss", "ExactTrainer", "backward", "windows"]

T = TypeVar("T")


class ExactLoss(_Trainer):  # type: ignore[misc]
    """Put before a Trainer class, makes its loss that of the rows' reduction, exactly.

    ``class MyTrainer(ExactLoss, trl.SFTTrainer): ...``; `ExactTrainer` is this on transformers.Trainer. Rows come from
    `dataset` through a `Collator`, which is the default. The denominator is summed over all micro-batches and ranks of
    an optimiser step, whatever `average_tokens_across_devices` says; rows with which accelerate fills up the last batch
    of an epoch count for nothing. Raises `RecipeError` for settings that would change the loss: label smoothing,
    `compute_loss_func`, a load-balancing loss, `nn.DataParallel`, tensor, context or sequence parallelism, and packs in
    a model that lets one document see another.
    """

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) < 3 and kwargs.get("data_collator") is None:
            kwargs["data_collator"] = Collator()
        super().__init__(*args, **kwargs)
        self.label_names = ["weights"]
        _refuse(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.accelerator.num_processes > 1 and not hasattr(self.train_dataset, "__len__"):
            raise _uncounted()
        if self.train_dataset is not None:
            batch = self.data_collator(list(islice(iter(self.train_dataset), 3)))
            missing = [name for name in ("input_ids", "position_ids", "weights", "denominator") if name not in batch]
            if missing:
                raise RecipeError(
                    f"the data collator makes no {' and no '.join(missing)}", where="data_collator",
                    hint="leave it out, or give chatloss.hf.Collator(...)",
                )
            _check_isolation(self.model, batch)
        return super().train(*args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in ("weights", "denominator") if name not in self._signature_columns]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        return _denominator(self.accelerator, batch_samples) if batch_samples else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        z = _denominator(self.accelerator, [inputs]) if num_items_in_batch is None else num_items_in_batch
        total, outputs = _weighted_nll(model, inputs, all_logits=return_outputs)
        loss = total * (self.accelerator.num_processes / z.to(total.device))
        return (loss, outputs) if return_outputs else loss


class ExactTrainer(ExactLoss, transformers.Trainer):  # type: ignore[misc]
    """transformers.Trainer with `ExactLoss`."""


def windows(batches: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` micro-batches, one list per optimiser step; the last one of an epoch may be shorter.

    >>> list(windows(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    if size < 1:
        raise ValueError("a window holds at least one micro-batch")
    window: list[T] = []
    for batch in batches:
        window.append(batch)
        # The last window is handed out while accelerate still knows which of its rows are repeated.
        if len(window) == size or getattr(batches, "end_of_dataloader", False):
            yield window
            window = []
    if window:
        yield window


def backward(accelerator: Any, model: nn.Module, micro_batches: Sequence[dict[str, Any]]) -> float:
    """Adds the exact gradient of one optimiser step to `.grad`, in a loop of one's own, and returns the step's loss.

    `micro_batches` (all of this step's on this rank; every rank has equally many) come out of a prepared DataLoader
    with a `Collator`; `model` is prepared too. Gradients are exchanged in the last micro-batch only. Do not wrap the
    call in ``accelerator.accumulate``. Raises `RecipeError` under DeepSpeed, whose engine steps inside backward.
    """
    if str(accelerator.distributed_type).endswith("DEEPSPEED"):
        raise RecipeError("DeepSpeed takes its optimiser step inside backward", hint="use ExactTrainer")
    if accelerator.num_processes > 1 and accelerator.gradient_state.active_dataloader is None:
        raise RecipeError(
            "the loader has come to its end, and nobody knows any more which rows its last batch repeats",
            hint="take micro-batches from chatloss.hf.windows(loader, size)",
        )
    z = _denominator(accelerator, micro_batches)
    # accelerate divides by G whatever the window holds, and the ranks' gradients are averaged.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / z
    numerator = torch.zeros((), dtype=torch.float64, device=z.device)
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            total, _ = _weighted_nll(model, dict(batch))
            accelerator.backward(total * scale)
        numerator += total.detach()
    return float(accelerator.gather(numerator[None]).sum() / z)


def _denominator(accelerator: Any, micro_batches: Sequence[dict[str, Any]]) -> Tensor:
    """Z of a step, float64 [], the same bits on every rank."""
    _leave_out_duplicates(accelerator, micro_batches)
    own = torch.stack([batch["denominator"].sum() for batch in micro_batches]).sum().to(accelerator.device)
    z: Tensor = accelerator.gather(own[None]).sum()
    if not bool(z > 0):
        raise DataError("this optimiser step trains nothing", hint="make rows with chatloss.hf.dataset")
    return z


def _leave_out_duplicates(accelerator: Any, micro_batches: Sequence[dict[str, Any]]) -> None:
    """Takes the weight off the rows with which accelerate fills up the last batch of an epoch (`even_batches`).

    Rank r holds rows [r * B, (r + 1) * B) of that batch in the order of the sampler; those past its end came before.
    """
    loader = accelerator.gradient_state.active_dataloader
    if accelerator.num_processes == 1 or loader is None or not loader.end_of_dataloader:
        return
    batches = loader.sampler if hasattr(loader.sampler, "batch_sampler") else loader.batch_sampler
    even = True
    while hasattr(batches, "batch_sampler"):  # accelerate's shards, and what it skips, around the one that counts
        even = even and getattr(batches, "even_batches", True)
        batches = batches.batch_sampler
    batch = micro_batches[-1]
    rows = len(batch["denominator"])
    try:
        real = 0 if batches.drop_last or not even else len(batches.sampler) % (rows * accelerator.num_processes)
    except (TypeError, AttributeError):
        raise _uncounted() from None
    own = min(max(real - accelerator.process_index * rows, 0), rows)
    if real == 0 or own == rows:
        return
    starts = batch["position_ids"].flatten() == 0
    document = (starts.cumsum(0) - 1).view_as(batch["position_ids"])
    batch["weights"] = batch["weights"].masked_fill(document >= own, 0.0)
    batch["denominator"] = torch.where(torch.arange(rows, device=document.device) < own, batch["denominator"], 0.0)


def _uncounted() -> RecipeError:
    return RecipeError(
        "the rows of this data set cannot be counted, so nobody knows which ones its last batch repeats",
        where="train_dataset", hint="use a data set with a length on several ranks",
    )


def _weighted_nll(model: Any, inputs: dict[str, Any], *, all_logits: bool = False) -> tuple[Tensor, Any]:
    """(``sum_t u_t w_t nll_t`` of a micro-batch, the model's outputs); logits at predicting positions only."""
    inputs = dict(inputs)
    weights, _ = inputs.pop("weights")[:, 1:], inputs.pop("denominator")
    targets, wanted = inputs["input_ids"][:, 1:], weights != 0
    columns = torch.arange(targets.shape[1], device=targets.device)
    if not all_logits and _keeps_logits(model):
        columns = wanted.any(0).nonzero()[:, 0] if bool(wanted.any()) else columns[:1]
        outputs = model(**inputs, use_cache=False, logits_to_keep=columns)
        logits = outputs.logits
    else:
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[:, :-1]
    chosen = wanted[:, columns]
    return logits_nll(logits[chosen], targets[:, columns][chosen], weights[:, columns][chosen])[0], outputs


def _keeps_logits(model: Any) -> bool:
    import inspect

    inner = model
    while hasattr(inner, "module"):
        inner = inner.module
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return "logits_to_keep" in inspect.signature(type(inner).forward).parameters


def _refuse(trainer: Any) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    parallel = getattr(accelerator, "parallelism_config", None)
    config = getattr(trainer.model, "config", None)
    reasons = {
        "label_smoothing_factor": args.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        "n_gpu": args.n_gpu > 1,
        "parallelism_config": any(getattr(parallel, f"{kind}_size", 1) > 1 for kind in ("tp", "cp", "sp")),
        "output_router_logits": bool(getattr(config, "output_router_logits", False)),
    }
    hints = {
        "label_smoothing_factor": "set it to 0: smoothed targets are another loss",
        "compute_loss_func": "leave it out: the loss is that of the rows' reduction",
        "n_gpu": "start one process per GPU with torchrun or accelerate launch; nn.DataParallel averages replicas",
        "parallelism_config": "use data parallelism only",
        "output_router_logits": "set model.config.output_router_logits = False: a load-balancing loss depends on how "
                                "the batch is cut",
    }
    for name, found in reasons.items():
        if found:
            raise RecipeError(f"{name} would change the loss of a step", where=name, hint=hints[name])


def _check_isolation(model: Any, batch: dict[str, Any]) -> None:
    """Raises if the documents of a packed batch would see each other in this model."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    if len(starts) < 2:
        return
    ids, weights = (batch[name][0].cpu().numpy() for name in ("input_ids", "weights"))
    documents = []
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        part = ids[start : end - 1].astype("int32")
        documents.append(Document(part, ids[start + 1 : end], weights[start + 1 : end], Sample(part[:0], ())))
    why = isolation_difference(TokenLoss(model), documents[:3])
    if why:
        raise RecipeError(
            f"documents in one pack see each other in this model: {why}", where="data_collator", kind="packing",
            hint="use Collator(packed=False)",
        )
