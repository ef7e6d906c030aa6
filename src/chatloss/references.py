"""Log-probabilities under the reference model: computed once and kept on disk, or at every step alongside the policy.

The reference is the recipe's model as it was before training, without adapters.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from chatloss.answers import AnswerDocument, answer_documents, document_logps
from chatloss.batch import Layout
from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.models import load_model
from chatloss.pairs import Answer
from chatloss.parallel import World

__all__ = ["Machine", "Reference", "adapter_off_reference", "cached_logps", "fingerprint_of", "frozen_model",
           "frozen_reference"]

Floats = npt.NDArray[np.float64]
# The log-probability of every document under the reference model, float64 [D], on every rank.
Reference = Callable[[Sequence[AnswerDocument]], Floats]
PART = 256  # answers per file of the cache: what a killed run loses at most


@dataclass(frozen=True, slots=True)
class Machine:
    """How forward passes are cut and computed here."""

    layout: Layout
    world: World
    autocast: torch.dtype | None = None


def frozen_model(recipe: Recipe, own_logits: bool, vocab_size: int | None) -> TokenLoss:
    """The recipe's model as it is before training, without adapters and without gradients."""
    run = replace(recipe.run, gradient_checkpointing=False)
    model = load_model(replace(recipe, lora=None, run=run), vocab_size=vocab_size)
    return TokenLoss(model, own_logits, per_token=True).requires_grad_(False)


def frozen_reference(frozen: TokenLoss, machine: Machine, parallel: str = "ddp") -> Reference:
    """The reference that a frozen model is; sharded over ranks if the policy is, else on every rank."""
    module: nn.Module = frozen
    if parallel == "fsdp":
        whole = getattr(frozen.inner, "_no_split_modules", None) or ()
        module = machine.world.wrap(frozen, "fsdp", [m for m in frozen.modules() if type(m).__name__ in whole])
    return _Looking(module.to(machine.world.device), nullcontext, machine)


def adapter_off_reference(policy: TokenLoss, machine: Machine) -> Reference:
    """The reference that `policy` is with its adapters switched off; raises `RecipeError` if it has none."""
    off = getattr(policy.model, "disable_adapter", None)
    if off is None:
        raise RecipeError("there are no adapters to switch off", where="dpo.reference",
                          hint="use 'precomputed' or 'frozen', or train adapters with [lora]")
    return _Looking(policy, off, machine)


@dataclass(frozen=True, slots=True)
class _Looking:
    """A `Reference` that runs a module in a context."""

    module: nn.Module
    context: Callable[[], AbstractContextManager[Any]]
    machine: Machine

    def __call__(self, documents: Sequence[AnswerDocument]) -> Floats:
        layout, world, autocast = self.machine.layout, self.machine.world, self.machine.autocast
        with self.context():
            return document_logps(self.module, documents, layout, world, autocast)


def fingerprint_of(model: Any, autocast: torch.dtype | None) -> str:
    """A digest of a model's configuration, the bytes of its weights and the precision it computes in."""
    digest = hashlib.blake2b(f"{model.config.to_json_string(use_diff=False)} {autocast}".encode(), digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def cached_logps(
    answers: Sequence[Answer], directory: Path, fingerprint: str, reference: Callable[[], Reference], world: World
) -> Floats:
    """The reference log-probability of every answer, float64 [A]; from `directory` where it is known already.

    Files hold `PART` answers each and are named by the model's fingerprint and by the ids and weights of these answers,
    so that whatever would change a value changes the name. Each is whole or absent; a killed run goes on behind the
    last one. `reference()` is only asked for if something is missing. Rank 0 reads and writes. Raises `RecipeError` for
    a file that is no such file.
    """
    parts = [answers[at : at + PART] for at in range(0, len(answers), PART)]
    paths = [directory / f"{_name(part, fingerprint)}.npy" for part in parts]
    known = [_read(path, len(part)) if world.rank == 0 else None for path, part in zip(paths, parts, strict=True)]
    known = world.gather(known)[0]
    looking = None
    for i, (part, path) in enumerate(zip(parts, paths, strict=True)):
        if known[i] is None:
            looking = looking or reference()
            documents = [d for k, answer in enumerate(part) for d in answer_documents(answer, k)]
            values = looking(documents)
            known[i] = np.bincount([d.unit for d in documents], values, minlength=len(part))
            if not np.isfinite(known[i]).all():
                bad = part[int(np.flatnonzero(~np.isfinite(known[i]))[0])]
                raise RecipeError("the reference log-probability is not finite", where=bad.source, kind="not finite",
                                  hint="look at this row with `chatloss view`")
            if world.rank == 0:
                _write(path, known[i])
    return np.concatenate([np.zeros(0), *known])


def _name(part: Sequence[Answer], fingerprint: str) -> str:
    digest = hashlib.blake2b(fingerprint.encode(), digest_size=16)
    for answer in part:
        digest.update(f"answer {len(answer.rows)}".encode())
        for row in answer.rows:
            digest.update(f"row {len(row)}".encode() + row.input_ids.tobytes() + row.weights.tobytes())
    return digest.hexdigest()


def _read(path: Path, size: int) -> Floats | None:
    if not path.exists():
        return None
    try:
        values: Floats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, str(error)) from None
    if values.dtype != np.float64 or values.shape != (size,) or not np.isfinite(values).all():
        raise _damaged(path, f"it holds {values.dtype} {values.shape}, not {size} finite float64")
    return values


def _damaged(path: Path, why: str) -> RecipeError:
    return RecipeError(f"cannot read cached reference log-probabilities: {why}", where=str(path),
                       hint="delete this file: it is made again")


def _write(path: Path, values: Floats) -> None:
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise RecipeError(f"cannot write reference log-probabilities: {error}", where=str(path),
                          hint="make room, or set dpo.cache to a directory that can be written") from None
