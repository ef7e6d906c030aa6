"""Real tokenizers as directories in Hugging Face form, one per family, each with its model's own template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from . import vocabularies as vocabulary
from .corpora import template
from .packages import build_once

RECIPE_FILES = ("families.py", "vocabularies.py", "bpe.py", "gguf_metadata.py", "corpora.py", "packages.py")


@dataclass(frozen=True, slots=True)
class Family:
    """How one tokenizer directory is made.

    `template` is a name for `corpora.template`, or several by their names in the model's own dict of templates;
    `stops` are the tokens whose ids the real model's generation_config.json lists as `eos_token_id`.
    """

    build: Callable[[], Tokenizer]
    template: str | dict[str, str]
    bos: str | None
    eos: str
    pad: str | None
    stops: tuple[str, ...]


def qwen(build: Callable[[], Tokenizer], native: str) -> Family:
    return Family(build, native, None, "<|im_end|>", "<|endoftext|>", ("<|im_end|>", "<|endoftext|>"))


def mistral(filename: str, native: str, legacy: bool = False) -> Family:
    build = partial(vocabulary.mistral_sentencepiece, filename, legacy)
    return Family(build, native, "<s>", "</s>", None, ("</s>",))


V1, V2 = "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2"
V3, V7 = "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7"
TEKKEN = "tekken_240911.json"

FAST: dict[str, Family] = {
    "qwen3": qwen(partial(vocabulary.qwen, vocabulary.QWEN3_ORDINARY), "Qwen-Qwen3-0.6B@a55ee1"),
    "qwen2.5": qwen(partial(vocabulary.qwen, vocabulary.QWEN25_ORDINARY), "Qwen-Qwen2.5-7B-Instruct"),
    "qwen3.5": qwen(vocabulary.qwen35, "Qwen-Qwen3.5-0.8B"),
    "llama3": Family(
        vocabulary.llama3,
        "meta-llama-Llama-3.1-8B-Instruct",
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|finetune_right_pad_id|>",
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "llama4": Family(
        vocabulary.llama4,
        "trl-internal-testing-tiny-Llama4ForCausalLM",
        "<|begin_of_text|>",
        "<|eot|>",
        "<|finetune_right_pad|>",
        ("<|end_of_text|>", "<|eom|>", "<|eot|>"),
    ),
    "gpt-oss": Family(
        vocabulary.gpt_oss,
        "openai-gpt-oss-120b",
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
        ("<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "deepseek-v3": Family(
        vocabulary.deepseek,
        "trl/deepseekv3",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ("<｜end▁of▁sentence｜>",),
    ),
    "mistral-v1": mistral(V1, "mistralai-Mistral-7B-Instruct-v0.2"),
    "mistral-v2": mistral(V2, f"mistral/{V2}"),
    "mistral-v3": mistral(V3, "mistralai-Mistral-7B-Instruct-v0.3"),
    "mistral-v7": mistral(V7, "mistralai-Mistral-Large-Instruct-2411"),
    "mistral-v3-legacy": mistral(V3, "mistralai-Mistral-7B-Instruct-v0.3", legacy=True),
    "tekken": Family(partial(vocabulary.tekken, TEKKEN), f"mistral/{TEKKEN}", "<s>", "</s>", "<pad>", ("</s>",)),
    "smollm2": Family(
        vocabulary.smollm2,
        "HuggingFaceTB-SmolLM2-135M-Instruct",
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
        ("<|im_end|>",),
    ),
    "gemma-like": Family(
        vocabulary.gemma_like, "google-gemma-2-2b-it", "<bos>", "<eos>", "<pad>", ("<eos>", "<end_of_turn>")
    ),
}
SLOW: dict[str, Family] = {
    "llama2": Family(
        vocabulary.llama2,
        "optimum-intel-internal-testing-tiny-random-ArceeForCausalLM",
        "<s>",
        "</s>",
        None,
        ("</s>",),
    ),
    "phi3": Family(
        vocabulary.phi3,
        "microsoft-Phi-3-mini-4k-instruct",
        "<s>",
        "<|endoftext|>",
        "<|endoftext|>",
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "gemma3": Family(vocabulary.gemma3, "trl/gemma3", "<bos>", "<eos>", "<pad>", ("<eos>", "<end_of_turn>")),
    "gemma4": Family(
        partial(vocabulary.gemma, {}),
        "google-gemma-4-E4B-it",
        "<bos>",
        "<eos>",
        "<pad>",
        ("<eos>", "<turn|>", "<|tool_response>"),
    ),
    "command-r": Family(
        vocabulary.command_r,
        {name: f"gguf/command-r/{name}" for name in ("default", "tool_use", "rag")},
        "<BOS_TOKEN>",
        "<|END_OF_TURN_TOKEN|>",
        "<PAD>",
        ("<|END_OF_TURN_TOKEN|>",),
    ),
    "xlmr": Family(vocabulary.xlm_roberta, "OrionStarAI-Orion-14B-Chat", "<s>", "</s>", "<pad>", ("</s>",)),
}
FAMILIES = FAST | SLOW
FAST_TIER = tuple(FAST)
SLOW_TIER = tuple(SLOW)
NATIVE = {
    name: family.template if isinstance(family.template, str) else family.template["default"]
    for name, family in FAMILIES.items()
}


@cache
def tokenizer_dir(name: str) -> Path:
    """The directory of one family: tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja.

    A family with several templates has them in tokenizer_config.json instead of chat_template.jinja. Built on
    first use and kept; a change of the code that builds it, or of the library, makes another directory.
    """
    family = FAMILIES[name]
    recipe = b"".join(Path(__file__).with_name(file).read_bytes() for file in RECIPE_FILES)
    key = hashlib.sha256(recipe + version("tokenizers").encode()).hexdigest()[:12]
    return build_once(f"tokenizers/{key}/{name}", lambda folder: write_directory(folder, family))


def tokenizer_dirs(names: Sequence[str] = FAST_TIER) -> dict[str, Path]:
    """The directories of these families by name."""
    return {name: tokenizer_dir(name) for name in names}


def write_directory(folder: Path, family: Family) -> None:
    """Write the files of one family into `folder`."""
    tokenizer = family.build()
    tokenizer.save(str(folder / "tokenizer.json"))
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "added_tokens_decoder": {str(index): flags(token) for index, token in added},
    }
    if isinstance(family.template, str):
        (folder / "chat_template.jinja").write_bytes(template(family.template).encode("utf-8"))
    else:
        named = family.template.items()
        config["chat_template"] = [{"name": name, "template": template(source)} for name, source in named]
    write_json(folder / "tokenizer_config.json", config)
    stops = [tokenizer.token_to_id(stop) for stop in family.stops]
    generation: dict[str, Any] = {"eos_token_id": stops if len(stops) > 1 else stops[0]}
    for key, token in (("bos_token_id", family.bos), ("pad_token_id", family.pad)):
        if token is not None:
            generation[key] = tokenizer.token_to_id(token)
    write_json(folder / "generation_config.json", generation)


def flags(token: AddedToken) -> dict[str, Any]:
    """One added token as tokenizer_config.json holds it."""
    names = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: getattr(token, name) for name in names}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", "utf-8")
