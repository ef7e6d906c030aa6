"""The built-in tokenizer, templates and chats, and the demonstration that uses them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tokenizer_directory"]

ASSETS = Path(__file__).parent / "assets" / "demo"


def tokenizer_directory() -> Path:
    """The directory of the built-in tokenizer: a byte-level BPE of 4,096 tokens with a ChatML-like template."""
    return ASSETS / "tokenizer"
