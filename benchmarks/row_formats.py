"""What a row per turn costs beside a row per conversation, at equal gradients: ``python -m benchmarks.row_formats``.

The literature's format A trains every turn in a row of its own with a mean per row. `multi_turn` rows with the `turn`
reduction have the same gradient, and every context token is computed once. On the English and Chinese tool chats, in a
small random Llama: tokens, CPU seconds of the gradient, and the difference between the two gradients.
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from tests import assets

from benchmarks.training import MODEL
from chatloss.batch import Layout, documents_of
from chatloss.config import Recipe
from chatloss.encode import ChatEncoder
from chatloss.loss.model import TokenLoss
from chatloss.models import load_model
from chatloss.pipeline import examples
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.step import gradient

REDUCTION = Reduction.parse("turn")


def encoded(pair: str, data: str, row_format: str) -> tuple[dict[str, list[Sample]], int]:
    """Source -> rows of all conversations that this format holds."""
    encoder = ChatEncoder.load(assets.tokenizer_dir(pair), policy=Policy(row_format=row_format))
    reader = read(str(assets.chat_file(data)), max_rejects=1.0)
    return {one.encoding.rows[0].source: one.encoding.rows for one in examples(reader, encoder)}, encoder.tokens.size


def take(recipe: Recipe, conversations: list[list[Sample]], micro_tokens: int) -> tuple[dict[str, torch.Tensor], float]:
    """The gradient of all conversations as one step, and the CPU seconds it took."""
    loss = TokenLoss(load_model(recipe))
    weights = [REDUCTION.of_example(rows) for rows in conversations]
    documents = [d for rows, w in zip(conversations, weights, strict=True) for d in documents_of(rows, w)]
    batches = Layout(micro_tokens=micro_tokens).micro_batches(documents)
    began = time.process_time()
    gradient(loss, batches, math.fsum(w.denominator for w in weights))
    seconds = time.process_time() - began
    return {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| chats | conversations | turns | tokens, one row a turn | tokens, one row | saved | CPU s, one row a turn "
          "| CPU s, one row | saved | difference of gradients |\n" + "| --- " * 10 + "|")
    for data in ("tools_en", "tools_zh"):
        each, vocab = encoded(arguments.pair, data, "per_turn")
        one, _ = encoded(arguments.pair, data, "multi_turn")
        both = [source for source in one if source in each and _fits(one[source], arguments.micro_tokens)]
        both = both[: arguments.conversations]
        recipe = Recipe.from_dict({"model": {**MODEL, "vocab_size": vocab},
                                   "init": "random", "output": "unused"})
        made: list[Any] = []
        for rows in (each, one):
            chosen = [rows[source] for source in both]
            tokens = sum(len(row) for rows_ in chosen for row in rows_)
            made.append((tokens, *take(recipe, chosen, arguments.micro_tokens)))
        (tokens_a, grads_a, seconds_a), (tokens_b, grads_b, seconds_b) = made
        turns = sum(len(each[source]) for source in both)
        difference = max(float((grads_a[k] - grads_b[k]).abs().max() / grads_a[k].abs().max()) for k in grads_a)
        print(f"| {data} | {len(both)} | {turns} | {tokens_a:,} | {tokens_b:,} | {1 - tokens_b / tokens_a:.0%} "
              f"| {seconds_a:.0f} | {seconds_b:.0f} | {1 - seconds_b / seconds_a:.0%} | {difference:.1e} |", flush=True)


def _fits(rows: list[Sample], most: int) -> bool:
    return max(map(len, rows)) <= most


if __name__ == "__main__":
    main()
