"""A few optimiser steps on SmolLM2-135M-Instruct: ``python -m benchmarks.real_model``.

Before training it compares the loss of the tokens that our mask trains with that of all others: a model that was
trained on chats finds answers easier than questions, so a mask that has slipped shows at once.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tests import assets
from transformers import AutoModelForCausalLM

from chatloss.config import Recipe
from chatloss.encode import ChatEncoder
from chatloss.sample import Sample
from chatloss.sft import encode_files, recipe_encoder, stop_ids, write_tokenizer
from chatloss.trainer import train


def losses(directory: Path, rows: list[Sample]) -> tuple[float, float]:
    """Mean negative log-likelihood (nats) of the trained tokens and of all others that have a prediction."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    sums, counts = [0.0, 0.0], [0, 0]
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        trained = torch.from_numpy(row.weights[1:] != 0)
        for kind, mask in enumerate((trained, ~trained)):
            sums[kind] += float(nll[mask].sum())
            counts[kind] += int(mask.sum())
    return sums[0] / counts[0], sums[1] / counts[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--chats", type=int, default=8)
    options = parser.parse_args()
    directory = assets.model_dir("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        recipe = Recipe.from_dict({
            "model": str(directory), "tokenizer": str(assets.tokenizer_dir("smollm2")), "output": f"{folder}/run",
            "data": {"train": [str(chats)], "max_length": 512},
            "batch": {"examples": 4}, "optim": {"lr": 1e-5}, "run": {"steps": options.steps},
        })
        _write_chats(chats, options.chats)
        encoder: ChatEncoder = recipe_encoder(recipe)
        examples, _ = encode_files(recipe, encoder, recipe.data.train)
        rows = [row for example in examples for row in example]
        before = losses(directory, rows)
        print(f"{len(rows)} rows, {sum(map(len, rows))} tokens, {sum(row.n_trained for row in rows)} trained")
        print(f"before: {before[0]:.3f} nats per trained token, {before[1]:.3f} per other token")
        result = train(recipe, examples, tokenizer_files=write_tokenizer(encoder), decode=encoder.decode,
                       stop_ids=stop_ids(encoder), quiet=True)
        after = losses(result.model, rows)
        print(f"after {result.steps} steps: {after[0]:.3f} nats per trained token, {after[1]:.3f} per other token")


def _write_chats(path: Path, count: int) -> None:
    """English preference chats, their chosen answers only."""
    import json

    from chatloss.chat import Preference
    from chatloss.reader import read

    with path.open("w", encoding="utf-8") as file:
        for row in read(str(assets.chat_file("dpo_en"))):
            if count == 0:
                return
            if isinstance(row, Preference) and sum(len(m.text) for m in row.chosen.messages) < 1200:
                file.write(json.dumps({"messages": [message.to_dict() for message in row.chosen.messages]}) + "\n")
                count -= 1


if __name__ == "__main__":
    main()
