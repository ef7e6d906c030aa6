"""TOML recipe + ``--set a.b=1`` -> frozen dataclasses. Unknown keys are errors with a suggestion."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from chatloss.errors import RecipeError

__all__ = ["Batch", "Data", "Dpo", "Lora", "Loss", "Optim", "Recipe", "Run"]


@dataclass(frozen=True, slots=True)
class Data:
    """Where the chats are. Every policy may stand here by its own name; they end up in `policy`."""

    train: tuple[str, ...] = ()
    eval: tuple[str, ...] = ()
    input_format: str | None = None
    max_rejects: float = 0.01
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Loss:
    """`reduction` as in `chatloss.reduction`. `moe_aux` weighs load balancing; unset: as the model's config says."""

    reduction: str = "token"
    weight_norm: Literal["count", "weights"] = "count"
    moe_aux: float | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """An optimiser step takes `examples` conversations, or whole ones until `tokens` trained tokens are reached.

    A micro-batch holds at most `micro_tokens` input tokens with padding, or `micro_rows` rows (packs, if packing).
    """

    examples: int | None = None
    tokens: int | None = None
    micro_tokens: int | None = None
    micro_rows: int | None = None
    packing: Literal["best_fit", "none"] = "best_fit"


@dataclass(frozen=True, slots=True)
class Optim:
    """`warmup` is a number of steps, or below 1 a share of all; `max_grad_norm` 0 is off.

    The schedule falls to ``min_lr * lr``; `decay` is the share of steps in which wsd does so.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-5
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup: float = 0.03
    min_lr: float = 0.0
    decay: float = 0.2
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, slots=True)
class Run:
    """How long, how precise, how often. `steps` or `epochs`; `save_every`, `eval_every` in steps, 0: at the end only.

    `log` names extra loggers: tensorboard, wandb, trackio. `keep` is the number of checkpoints to keep, `samples` the
    number of answers to generate at every evaluation, `parallel` what several ranks do.
    """

    steps: int | None = None
    epochs: float | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    save_every: int = 0
    eval_every: int = 0
    log: tuple[str, ...] = ()
    keep: int = 2
    samples: int = 0
    gradient_checkpointing: bool = False
    parallel: str = "ddp"


@dataclass(frozen=True, slots=True)
class Lora:
    """Low-rank adapters through peft; `targets` are names of linear layers, "all-linear" for all but the head."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)


@dataclass(frozen=True, slots=True)
class Dpo:
    """Preference objectives. Unset values are those of the loss (see `chatloss.loss.preference`).

    `reference` log-probabilities are "precomputed" once and kept in `cache` (a directory; unset: in the output), or
    computed at every step by a "frozen" copy of the model, or by the model itself with "adapter_off". `nll` is the
    coefficient of the NLL of chosen answers, over "trained" or "all" of their tokens, under `nll_reduction`. The last
    two weigh the two kinds of judged answers (KTO).
    """

    loss: str | None = None
    beta: float | None = None
    label_smoothing: float = 0.0
    gamma: float | None = None
    reference: Literal["precomputed", "frozen", "adapter_off"] = "precomputed"
    cache: str | None = None
    nll: float | None = None
    nll_reduction: str = "token"
    nll_tokens: Literal["trained", "all"] = "trained"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole training run. `model` is a directory, a hub id, or (init = "random") a config.json's path or contents.

    >>> recipe = Recipe.from_dict({"model": "m", "optim": {"lr": 0.001}}, ["batch.examples=8", "data.turns=last"])
    >>> recipe.optim.lr, recipe.batch.examples, recipe.data.policy
    (0.001, 8, {'turns': 'last'})
    >>> Recipe.from_dict({"optim": {"learning_rate": 1}})
    Traceback (most recent call last):
    chatloss.errors.RecipeError: error: unknown key 'learning_rate'
      --> optim.learning_rate
    hint: one of name, lr, schedule, warmup, min_lr, decay, weight_decay, betas, eps, momentum, max_grad_norm
    """

    objective: str = "sft"
    model: str | dict[str, Any] = ""
    init: Literal["pretrained", "random"] = "pretrained"
    tokenizer: str | None = None
    chat_template: str | None = None
    output: str = ""
    seed: int = 0
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    batch: Batch = field(default_factory=Batch)
    optim: Optim = field(default_factory=Optim)
    run: Run = field(default_factory=Run)
    lora: Lora | None = None
    dpo: Dpo | None = None

    @classmethod
    def load(cls, path: str | Path, settings: Sequence[str] = ()) -> Recipe:
        """The recipe in a TOML file, with ``key=value`` settings on top; raises `RecipeError` naming file and key."""
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise RecipeError(
                f"cannot read the recipe: {error.strerror}", where=str(path), hint="check the path"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RecipeError(f"not valid TOML: {error}", where=str(path)) from None
        try:
            return cls.from_dict(values, settings)
        except RecipeError as error:
            raise error.at(str(path)) from None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], settings: Sequence[str] = ()) -> Recipe:
        """A recipe from nested plain values, validated, defaults filled in."""
        merged = _copy(values)
        for setting in settings:
            _set(merged, setting)
        recipe: Recipe = _build(cls, merged, "")
        _validate(recipe)
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


# What may differ between a run and its continuation: nothing that changes parameters.
FREE = ("output", "run.log", "run.save_every", "run.eval_every", "run.keep", "run.samples", "data.eval",
        "data.max_rejects")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two plain recipes differ and that change what is trained, as ``key: old -> new``.

    A key that an older version did not know yet counts as its default.

    >>> differences({"seed": 0, "output": "a"}, {"seed": 1, "output": "b", "init": "pretrained"})
    ['seed: 0 -> 1']
    """
    return _differences(old, new, Recipe().to_dict(), "")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], default: Mapping[str, Any], prefix: str) -> list[str]:
    out = []
    for key in sorted({*old, *new}):
        path, other = prefix + key, default.get(key)
        a, b = old.get(key, other), new.get(key, other)
        if path in FREE or a == b:
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out += _differences(a, b, other if isinstance(other, Mapping) else {}, f"{path}.")
        else:
            out.append(f"{path}: {a!r} -> {b!r}")
    return out


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _set(values: dict[str, Any], setting: str) -> None:
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"cannot read --set {setting!r}", hint="write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, key = path.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise RecipeError(f"{section!r} is no section", where=path.strip(), hint="write it as section.key=value")
        values = inner
    values[key] = value


def _build(cls: type[Any], values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    values = dict(values)
    if cls is Data:
        known.remove("policy")
        values["policy"] = {key: values.pop(key) for key in list(values) if key in _policies()}
    for key in values:
        if key not in known and key != "policy":
            choices = known + (_policies() if cls is Data else [])
            near = difflib.get_close_matches(key, choices, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"one of {', '.join(choices)}"
            raise RecipeError(f"unknown key {key!r}", where=prefix + key, hint=hint)
    return cls(**{key: _value(value, hints[key], prefix + key) for key, value in values.items()})


def _policies() -> list[str]:
    from chatloss.policy import Policy

    return [item.name for item in fields(Policy)]


def _value(value: Any, hint: Any, where: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        origin, args = get_origin(option), get_args(option)
        if value is None and option is type(None):
            return None
        if is_dataclass(option) and isinstance(value, Mapping):
            return _build(option, value, f"{where}.")  # type: ignore[arg-type]
        if origin is Literal and value in args:
            return value
        if origin is tuple:
            items = value if isinstance(value, list | tuple) else [value]
            return tuple(_value(item, args[0], where) for item in items)
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if option is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if option in (bool, int, str) and type(value) is option:
            return value
    raise RecipeError(f"{value!r} is not {' or '.join(filter(None, map(_kind, options)))}", where=where)


def _kind(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(repr, get_args(option)))
    names = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", type(None): ""}
    return names.get(option, "a table")


def _validate(recipe: Recipe) -> None:
    batch, run, optim = recipe.batch, recipe.run, recipe.optim
    for first, second, one, other in (
        ("batch.examples", "batch.tokens", batch.examples, batch.tokens),
        ("batch.micro_tokens", "batch.micro_rows", batch.micro_tokens, batch.micro_rows),
        ("run.steps", "run.epochs", run.steps, run.epochs),
    ):
        if one is not None and other is not None:
            raise RecipeError(f"both {first} and {second} are set", where=first, hint="set one of them")
        for name, value in ((first, one), (second, other)):
            if value is not None and value <= 0:
                raise RecipeError(f"{value} is not positive", where=name)
    for name, value in (("optim.lr", optim.lr), ("optim.warmup", optim.warmup), ("optim.min_lr", optim.min_lr),
                        ("optim.decay", optim.decay), ("optim.max_grad_norm", optim.max_grad_norm),
                        ("optim.weight_decay", optim.weight_decay), ("run.save_every", run.save_every),
                        ("run.eval_every", run.eval_every), ("run.samples", run.samples)):
        if value < 0:
            raise RecipeError(f"{value} is negative", where=name)
    if run.parallel not in ("ddp", "fsdp"):
        near = "context, tensor, sequence and pipeline parallelism are refused for now: they are not shown to be exact"
        raise RecipeError(f"{run.parallel!r} is not known", where="run.parallel", hint=f"use 'ddp' or 'fsdp'; {near}")
    if len(optim.betas) != 2:
        raise RecipeError("betas are two numbers", where="optim.betas", hint="for example [0.9, 0.95]")
    if run.keep < 1:
        raise RecipeError("at least one checkpoint is kept", where="run.keep")
    if recipe.lora is not None and recipe.lora.rank < 1:
        raise RecipeError("the rank must be at least 1", where="lora.rank")
