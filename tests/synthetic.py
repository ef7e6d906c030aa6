"""Hand-made rows and tiny models: what the tests of the exact step and the trainer share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from chatloss.sample import Reason, Sample, Span

VOCAB = 61
TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **TINY},
    "qwen3": {"model_type": "qwen3", **TINY, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", **TINY},
    "gemma2": {"model_type": "gemma2", **TINY, "final_logit_softcapping": 5.0, "sliding_window": 8},
    "mixtral": {"model_type": "mixtral", **TINY, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3": {"model_type": "gemma3_text", **TINY, "sliding_window": 8},
}


def row(parts: Sequence[tuple[int, int, float, Reason]], ids: np.ndarray, source: str = "") -> Sample:
    """A row from (length, message, weight, reason) parts."""
    spans, at = [], 0
    for length, message, weight, reason in parts:
        if length:
            spans.append(Span(at, at + length, message, weight, reason))
            at += length
    messages = {m for _, m, _, _ in parts if m % 2 == 1}
    return Sample(ids[:at].astype(np.int32), tuple(spans), dict.fromkeys(sorted(messages), "exact"), source)


def chat(turns: Sequence[tuple[int, int]], seed: int, weights: Sequence[float] = ()) -> list[Sample]:
    """One multi_turn row: turns of (prompt tokens, answer tokens); the answer's last token is its stop."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, sum(map(sum, turns)) + len(turns))
    parts: list[tuple[int, int, float, Reason]] = []
    for k, (prompt, answer) in enumerate(turns):
        weight = weights[k] if weights else 1.0
        parts += [(prompt, 2 * k, 0.0, Reason.OTHER_ROLE), (answer - 1, 2 * k + 1, weight, Reason.CONTENT),
                  (1, 2 * k + 1, weight, Reason.STOP), (1, 2 * k + 1, 0.0, Reason.SCAFFOLD)]
    return [row(parts, ids, f"chats.jsonl:{seed + 1}")]


def per_turn(rows: Sequence[Sample]) -> list[Sample]:
    """The same turns, one row each: the spans of other turns switched off, and nothing after the turn."""
    [whole] = rows
    out = []
    for message in whole.outcomes:
        own = [s for s in whole.spans if s.message == message and s.reason.trained]
        spans = [s if s in own or not s.weight else Span(s.start, s.end, s.message, 0.0, Reason.SPLIT)
                 for s in whole.spans if s.end <= own[-1].end]
        out.append(Sample(whole.input_ids[: own[-1].end], tuple(spans), whole.outcomes, whole.source))
    return out


def chats(n: int, seed: int = 0, most: int = 14) -> list[list[Sample]]:
    """n uneven conversations of 1 to 4 turns."""
    random = np.random.default_rng(seed)
    return [chat([(int(random.integers(1, most)), int(random.integers(1, most))) for _ in range(random.integers(1, 5))],
                 seed=1000 * seed + i) for i in range(n)]


def tokenizer_files(path: Path) -> None:
    (path / "tokenizer.json").write_text("{}", encoding="utf-8")


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))
