"""A recipe's objective by name, and what it is compared with: the reference model, or values computed before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from chatloss.config import Dpo, Recipe
from chatloss.errors import RecipeError
from chatloss.kto import Unpaired
from chatloss.loss.model import TokenLoss
from chatloss.loss.preference import LOSSES, LossOptions, find
from chatloss.objective import Objective, Supervised, widened
from chatloss.preference import NLLTerm, Paired
from chatloss.reduction import Reduction
from chatloss.references import (
    Machine,
    Reference,
    adapter_off_reference,
    cached_logps,
    fingerprint_of,
    frozen_model,
    frozen_reference,
)

__all__ = ["Referred", "is_unpaired", "objective_of", "refer"]


def objective_of(recipe: Recipe) -> Objective:
    """The objective that a recipe names: "sft", "dpo" (with any loss of ``dpo.loss``), or a loss by its own name.

    Raises `RecipeError` for names and settings that do not exist or do not fit together.

    >>> objective_of(Recipe.from_dict({"objective": "dpo", "dpo": {"loss": "ipo", "beta": 0.2}})).options.beta
    0.2
    """
    if recipe.objective == "sft":
        if recipe.dpo is not None:
            raise RecipeError("[dpo] has no effect on supervised training", where="dpo", hint="set objective = 'dpo'")
        return Supervised(Reduction.parse(recipe.loss.reduction, recipe.loss.weight_norm))
    name, settings = _loss_name(recipe), recipe.dpo or Dpo()
    if recipe.loss.reduction != "token" or recipe.loss.weight_norm != "count":
        raise RecipeError("the unit of a preference loss is the pair or the judged answer", where="loss.reduction",
                          hint="leave it out; the NLL of chosen answers has dpo.nll_reduction")
    _refuse_unused(name, settings)
    if name == "kto":
        beta = 0.1 if settings.beta is None else settings.beta
        return Unpaired(beta, settings.desirable_weight, settings.undesirable_weight)
    loss = LOSSES[name]
    beta = loss.beta if settings.beta is None else settings.beta
    gamma = (1.0 if "gamma" in loss.options else 0.0) if settings.gamma is None else settings.gamma
    coefficient = loss.nll if settings.nll is None else settings.nll
    nll = NLLTerm(coefficient, Reduction.parse(settings.nll_reduction), settings.nll_tokens) if coefficient else None
    return Paired(loss, LossOptions(beta, settings.label_smoothing, gamma), nll)


def is_unpaired(recipe: Recipe) -> bool:
    """Whether a recipe trains on judged single answers."""
    return recipe.objective != "sft" and _loss_name(recipe) == "kto"


def _loss_name(recipe: Recipe) -> str:
    name = find(recipe.objective, "objective", ("sft", "dpo"))
    told = None if recipe.dpo is None or recipe.dpo.loss is None else find(recipe.dpo.loss)
    if told is not None and recipe.objective != "dpo" and told != name:
        raise RecipeError(f"objective {recipe.objective!r} and loss {told!r} differ", where="dpo.loss",
                          hint="keep one of them, or set objective = 'dpo'")
    return told or name


def _refuse_unused(name: str, settings: Dpo) -> None:
    """Settings that are out of range, or that this loss does not look at."""
    options = ("desirable_weight", "undesirable_weight") if name == "kto" else (*LOSSES[name].options, "nll")
    reference = name == "kto" or LOSSES[name].reference
    unset = Dpo()
    for key in ("label_smoothing", "gamma", "desirable_weight", "undesirable_weight", "nll"):
        if getattr(settings, key) != getattr(unset, key) and key not in options:
            raise RecipeError(f"the loss {name!r} has no {key}", where=f"dpo.{key}", hint="leave it out")
    for key in ("reference", "cache"):
        if getattr(settings, key) != getattr(unset, key) and not reference:
            raise RecipeError(f"the loss {name!r} has no reference", where=f"dpo.{key}", hint="leave it out")
    if settings.beta is not None and settings.beta <= 0:
        raise RecipeError(f"{settings.beta} is not positive", where="dpo.beta")
    if not 0 <= settings.label_smoothing < 0.5:
        raise RecipeError(f"{settings.label_smoothing} is not a share below one half", where="dpo.label_smoothing",
                          hint="the share of pairs whose label is wrong")
    for key in ("nll", "desirable_weight", "undesirable_weight"):
        if (getattr(settings, key) or 0.0) < 0:
            raise RecipeError(f"{getattr(settings, key)} is negative", where=f"dpo.{key}")


@dataclass(frozen=True, slots=True)
class Referred:
    """An objective and examples that know, or can find out, what the reference says; and the reference's fingerprint,
    which is "" where nothing was computed before."""

    objective: Objective
    examples: Sequence[Any]
    eval_examples: Sequence[Any]
    fingerprint: str = ""


def refer(
    objective: Objective, recipe: Recipe, policy: TokenLoss, examples: Sequence[Any], eval_examples: Sequence[Any],
    machine: Machine, vocab_size: int | None = None, fingerprint: str = "",
) -> Referred:
    """What `objective` needs of a reference model, if anything, as ``recipe.dpo.reference`` says.

    A `fingerprint` from an earlier run of the same recipe saves loading the model where the cache holds all its values.
    """
    if isinstance(objective, Supervised) or (isinstance(objective, Paired) and not objective.loss.reference):
        return Referred(objective, examples, eval_examples)
    assert isinstance(objective, Paired | Unpaired)
    if eval_examples:  # held-out rows may be longer than any micro-batch of the training data
        machine = replace(machine, layout=widened(machine.layout, objective.survey(eval_examples).widest))
    settings = recipe.dpo or Dpo()
    parallel = recipe.run.parallel if machine.world.size > 1 else "ddp"
    if settings.reference == "adapter_off":
        objective = replace(objective, reference=adapter_off_reference(policy, machine))
        return Referred(objective, examples, eval_examples)
    if settings.reference == "frozen":
        frozen = frozen_model(recipe, policy.own_logits, vocab_size)
        objective = replace(objective, reference=frozen_reference(frozen, machine, parallel))
        return Referred(objective, examples, eval_examples)
    directory = Path(settings.cache) if settings.cache else Path(recipe.output) / "reference"
    model = None if fingerprint else frozen_model(recipe, policy.own_logits, vocab_size)
    if model is not None:
        fingerprint = fingerprint_of(model.inner, machine.autocast)

    @cache  # a model can be sharded once only
    def load() -> Reference:
        return frozen_reference(model or frozen_model(recipe, policy.own_logits, vocab_size), machine, parallel)

    sets = []
    for given in (examples, eval_examples):
        answers = [answer for example in given for answer in objective.answers(example)]
        values = cached_logps(answers, directory, fingerprint, load, machine.world)
        per = len(answers) // max(len(given), 1)
        sets.append([objective.referred(example, own) for example, own in
                     zip(given, np.reshape(values, (-1, max(per, 1))).tolist(), strict=True)])
    return Referred(objective, sets[0], sets[1], fingerprint)
