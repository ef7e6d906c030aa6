"""Models in: from a directory, a hub id or a config; adapters; and two probes of what the model really does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from chatloss.attention import use_blocks
from chatloss.batch import Document, MicroBatch
from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.parallel import inspecting
from chatloss.step import tensors

__all__ = ["PureFloat64", "caveats", "head_difference", "isolation_difference", "load_model", "plain_experts"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
# Largest relative difference that counts as float noise in the probes, by dtype of the parameters.
NOISE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def load_model(recipe: Recipe, checkpoint: Path | None = None, vocab_size: int | None = None) -> nn.Module:
    """The recipe's model on the CPU, in training mode; from `checkpoint` (a directory that `save` made) if given.

    Parameters are float32 (also for bfloat16, which computes under autocast) or float64. A random model's weights
    depend on the recipe's seed alone; `vocab_size` fills in a config that has none. Raises `RecipeError`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    dtype = DTYPES[recipe.run.dtype]
    if recipe.init == "random" and (checkpoint is None or recipe.lora is not None):
        config = _config(recipe, vocab_size)
        torch.manual_seed(recipe.seed)
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        where = str(checkpoint) if checkpoint is not None and recipe.lora is None else recipe.model
        if not isinstance(where, str) or not where:
            raise RecipeError("the recipe names no model", where="model", hint="a directory or a hub id")
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=dtype)
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(
                f"cannot load the model: {str(error).splitlines()[0]}", where=f"model = {where!r}",
                hint="a directory with config.json and *.safetensors, or a hub id; init = 'random' needs no weights",
            ) from None
    use_blocks(model)
    if dtype == torch.float64:
        plain_experts(model)
    if recipe.lora is not None:
        model = _with_lora(model, recipe, checkpoint)
    if recipe.run.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    trained: nn.Module = model.train()
    return trained


def plain_experts(model: Any) -> None:
    """Makes experts multiply one by one: torch's grouped product, transformers' default, knows no float64."""
    if getattr(model.config, "_experts_implementation", None) not in (None, "eager"):
        model.set_experts_implementation("eager")


def _config(recipe: Recipe, vocab_size: int | None) -> Any:
    import transformers

    try:
        if isinstance(recipe.model, dict):
            values = dict(recipe.model)
            if vocab_size is not None:
                values.setdefault("vocab_size", vocab_size)
            return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        return transformers.AutoConfig.from_pretrained(recipe.model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"cannot read the model's config: {str(error).splitlines()[0]}", where="model",
            hint='for example model = {model_type = "llama", hidden_size = 64, ...}, or the path of a config.json',
        ) from None


def _with_lora(model: Any, recipe: Recipe, checkpoint: Path | None) -> Any:
    import peft

    assert recipe.lora is not None
    if checkpoint is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return peft.PeftModel.from_pretrained(model, str(checkpoint), is_trainable=True)
    targets: Any = list(recipe.lora.targets)
    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, task_type="CAUSAL_LM",
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers 5.23 for names that are going to be renamed.
            warnings.simplefilter("ignore", FutureWarning)
            return peft.get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(str(error).splitlines()[0], where="lora.targets", hint="names of linear layers") from None


def head_difference(model: Any, input_ids: Sequence[int]) -> str:
    """Why the logits of this model are not ``head(hidden states)``; "" if they are.

    Runs one row twice: once as is, and once with the head's input scaled up until logits are around 100, where
    soft-capping shows even in an untrained model.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"its head is {type(head).__name__}, not a plain linear layer"
    ids = torch.tensor([list(input_ids)], device=head.weight.device)
    scale = 1.0
    with inspecting(model):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        for _ in range(2):
            handle = head.register_forward_pre_hook(lambda _, args, by=scale: (args[0] * by, *args[1:]))
            try:
                logits = model(input_ids=ids, use_cache=False).logits
            finally:
                handle.remove()
            expected = nn.functional.linear(hidden * scale, head.weight, head.bias)
            if logits.shape != expected.shape or not _same(logits, expected):
                return "its logits are not the linear head of its last hidden states (scaled or soft-capped?)"
            scale = 100.0 / max(float(expected.abs().max()), 1e-6)
    return ""


def isolation_difference(loss: TokenLoss, documents: Sequence[Document], module: nn.Module | None = None) -> str:
    """Why documents in one pack are not isolated from each other in this model; "" if they are.

    Packs up to three real documents, then changes the content and then the length of one neighbour, and compares what
    the others get with what they get alone. Compared are hidden states at every position, beyond float noise. They are
    computed by `module`, which is `loss` wrapped for several ranks (all of them call this), on its own device.
    """
    parts = [_cut(document) for document in documents[:3]]
    while len(parts) < 3:
        parts.append(parts[-1])
    first, middle, last = parts
    vocabulary = int(loss.inner.get_input_embeddings().weight.shape[0])
    other = replace(middle, input_ids=(middle.input_ids[::-1] * 7 + 3) % vocabulary)
    twice = [np.concatenate([array, array]) for array in (other.input_ids, other.target_ids, other.weights)]
    longer = Document(twice[0], twice[1], twice[2], other.row)
    with inspecting(module or loss):
        alone = [_states(loss, [part], module)[0] for part in (first, last)]
        for name, pack in (("", [first, middle, last]), ("content", [first, other, last]),
                           ("length", [first, longer, last])):
            states = _states(loss, pack, module)
            if not all(_same(a, b) for a, b in zip(alone, (states[0], states[2]), strict=True)):
                return f"a neighbour's {name} changes it" if name else "a document computes differently beside others"
    return ""


def _cut(document: Document, length: int = 32) -> Document:
    return Document(document.input_ids[:length], document.target_ids[:length], document.weights[:length], document.row)


def _states(loss: TokenLoss, pack: list[Document], module: nn.Module | None) -> list[Tensor]:
    """The last hidden states [n, H] of every document of a pack, out of the whole module's own forward pass."""
    seen: list[Tensor] = []
    hook = loss.inner.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        (module or loss)(*tensors(MicroBatch.build([pack]), loss, next(loss.parameters()).device))
    finally:
        hook.remove()
    return list(torch.split(seen[0][0], [len(document) for document in pack]))


def _same(a: Tensor, b: Tensor) -> bool:
    if not bool(torch.isfinite(a).all()):
        return False
    return float((a - b).abs().max()) <= NOISE[a.dtype] * float(b.abs().max())


def caveats(model: Any, moe_aux: float) -> list[str]:
    """What in this model makes the gradient depend on how a batch is cut, however exact the loss: to be told."""
    out = []
    dropout = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    config = model.config.get_text_config()
    if dropout or float(getattr(config, "attention_dropout", 0.0) or 0.0) > 0:
        out.append("dropout is on: its noise depends on how a batch is cut into micro-batches")
    if moe_aux:
        out.append("the load-balancing loss couples the tokens of a micro-batch: it depends on how a batch is cut")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if kind in ("dynamic", "longrope"):
        out.append(f"positions of type {kind} depend on the longest row of a micro-batch beyond the original context")
    return out


class PureFloat64(TorchFunctionMode):
    """While active, code that asks for float32 on the way keeps a float64 tensor as it is.

    Many models compute norms, softmax or routers in float32 whatever the parameters are (Gemma sums the gradient of its
    norms so); their float64 gradients would agree to 1e-7 only, and hide what a proof in float64 is for.

    >>> with PureFloat64():
    ...     torch.ones(1, dtype=torch.float64).float().dtype
    torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and args[1:] == (torch.float32,)):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)
