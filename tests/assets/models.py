"""A small real chat model (slow tier)."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path

from .families import tokenizer_dir
from .packages import build_once
from .vocabularies import smollm2_gguf

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def model_dir(name: str = "smollm2") -> Path:
    """SmolLM2-135M-Instruct in Hugging Face form: config.json, float32 model.safetensors, tokenizer and template.

    Loads with `AutoModelForCausalLM.from_pretrained(model_dir())`. Made once from the GGUF file, whose 4-bit weights
    it dequantises; that takes seconds, transformers, torch and gguf. Raises `KeyError` for another name.
    """
    if name != "smollm2":
        raise KeyError(name)
    source = tokenizer_dir(name)
    return build_once(f"models/{source.parent.name}/{name}", convert_smollm2)


def gguf_dir(name: str = "smollm2") -> Path:
    """The same model as it was shipped: the GGUF file beside the tokenizer files.

    Loads with `AutoModelForCausalLM.from_pretrained(gguf_dir(), gguf_file=GGUF_FILE, dtype=torch.float32)`.
    """
    if name != "smollm2":
        raise KeyError(name)
    source = tokenizer_dir(name)
    return build_once(f"models/{source.parent.name}/{name}-gguf", lambda folder: link_gguf(folder, source))


def link_gguf(folder: Path, source: Path) -> None:
    """Put the GGUF file (a hard link where the file system has them) and the tokenizer files into `folder`."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    try:
        os.link(smollm2_gguf(), folder / GGUF_FILE)
    except OSError:
        shutil.copyfile(smollm2_gguf(), folder / GGUF_FILE)


def convert_smollm2(folder: Path) -> None:
    """Write the dequantised model and the tokenizer files into `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(gguf_dir(), gguf_file=GGUF_FILE, dtype=torch.float32)
    # A model read from GGUF refuses to be saved, although its weights are ordinary tensors by now.
    del quantized.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantized.config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    shutil.copytree(tokenizer_dir("smollm2"), folder, dirs_exist_ok=True)
