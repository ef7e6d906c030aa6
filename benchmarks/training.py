"""Trained tokens per second and peak memory beside TRL and transformers: ``python -m benchmarks.training``.

The same model, the same rows (real tool chats, encoded once by chatloss), float32, AdamW, no gradient checkpointing,
one process after another. Every contender runs in a process of its own; the first step is not counted. A row is
``contender: trained tokens / s, the same per CPU second, peak memory, share of computed tokens that are no padding``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONTENDERS = ("chatloss packed", "chatloss padded", "trl bfd", "trl padding-free", "trl padded", "transformers padded")
MODEL = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}


def rows(pair: str, data: str, count: int, longest: int) -> tuple[list[Any], int]:
    from itertools import islice

    from tests import assets

    from chatloss.encode import ChatEncoder
    from chatloss.pipeline import examples
    from chatloss.reader import read

    encoder = ChatEncoder.load(assets.tokenizer_dir(pair))
    reader = read(str(assets.chat_file(data)), max_rejects=1.0)
    made = (one.encoding.rows for one in examples(reader, encoder))
    fitting = (rows_ for rows_ in made if max(map(len, rows_)) <= longest)
    return list(islice(fitting, count)), encoder.tokens.size


def run_chatloss(examples: list[Any], vocab: int, micro: int, steps: int, packed: bool) -> dict[str, Any]:
    from chatloss.config import Recipe
    from chatloss.trainer import train

    with tempfile.TemporaryDirectory() as directory:
        recipe = Recipe.from_dict({
            "model": {**MODEL, "vocab_size": vocab}, "init": "random", "output": directory,
            "batch": {"examples": 16, "micro_tokens": micro, "packing": "best_fit" if packed else "none"},
            "optim": {"lr": 1e-4, "schedule": "constant"}, "run": {"steps": steps},
        })
        clock = Clock()
        import chatloss.trainer as trainer

        log = trainer._Run._log

        def watched(run: Any, kind: str, values: dict[str, Any]) -> None:
            log(run, kind, values)
            if kind == "step":
                clock.tick(values["tokens"], values["inputs"], values["computed"])

        trainer._Run._log = watched  # type: ignore[method-assign]
        train(recipe, examples, tokenizer_files=lambda _: None, decode=str, quiet=True)
    return clock.result()


def run_trainer(
    examples: list[Any], vocab: int, micro: int, steps: int, kind: str, batch: int
) -> dict[str, Any]:
    import datasets
    import transformers

    mean = sum(len(row) for rows_ in examples for row in rows_) / len(examples)
    data = datasets.Dataset.from_list([
        {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist(),
         "attention_mask": [1] * len(row)}
        for rows_ in examples for row in rows_
    ])
    config = transformers.AutoConfig.for_model(**{**MODEL, "vocab_size": vocab})
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    clock = Clock()
    counts = [0, 0, 0]

    class Tick(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick(*counts)
            counts[:] = [0, 0, 0]

    with tempfile.TemporaryDirectory() as directory:
        common: dict[str, Any] = {
            "output_dir": directory, "max_steps": steps, "per_device_train_batch_size": batch, "learning_rate": 1e-4,
            "gradient_accumulation_steps": max(1, 16 // batch), "report_to": [], "use_cpu": True, "bf16": False,
            "gradient_checkpointing": False, "save_strategy": "no", "logging_steps": 10**6, "disable_tqdm": True,
            "lr_scheduler_type": "constant", "dataloader_num_workers": 0,
        }
        if kind == "transformers":
            collator = transformers.DataCollatorForSeq2Seq(_Padder(), padding=True)
            trainer: Any = transformers.Trainer(
                model, transformers.TrainingArguments(**common), train_dataset=data,
                data_collator=collator, callbacks=[Tick()],
            )
        else:
            import trl

            if kind == "bfd":
                common |= {"packing": True, "packing_strategy": "bfd", "max_length": micro,
                           "per_device_train_batch_size": 1,
                           "gradient_accumulation_steps": max(1, round(16 * mean / micro))}
            else:
                common |= {"padding_free": kind == "padding-free", "max_length": None}
            trainer = trl.SFTTrainer(
                model, trl.SFTConfig(**common), train_dataset=data.remove_columns("attention_mask"),
                processing_class=_tokenizer(vocab), callbacks=[Tick()],
            )
        compute = trainer.compute_loss

        def counted(model_: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs["labels"]
            mask = inputs.get("attention_mask")
            counts[0] += int((labels[..., 1:] != -100).sum())
            counts[1] += int(labels.numel() if mask is None else mask.sum())
            counts[2] += labels.numel()
            return compute(model_, inputs, *args, **kwargs)

        trainer.compute_loss = counted
        trainer.train()
    return clock.result()


class _Padder:
    """What a collator asks of a tokenizer: padding at the right."""

    padding_side = "right"
    pad_token_id = 0
    model_input_names = ("input_ids", "attention_mask", "labels")

    def pad(self, features: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        import torch

        width = max(len(feature["input_ids"]) for feature in features)
        return {key: torch.tensor([f[key] + [fill] * (width - len(f[key])) for f in features])
                for key, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)) if key in features[0]}


def _tokenizer(vocab: int) -> Any:
    import tokenizers
    import transformers

    words = {f"t{i}": i for i in range(vocab)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="t0", eos_token="t1")


class Clock:
    """Time and tokens from the end of the first step on."""

    def __init__(self) -> None:
        self.ticks: list[tuple[float, float, int, int, int]] = []

    def tick(self, trained: int, inputs: int, computed: int) -> None:
        self.ticks.append((time.perf_counter(), time.process_time(), trained, inputs, computed))

    def result(self) -> dict[str, Any]:
        first, *rest = self.ticks
        trained, inputs, computed = (sum(tick[i] for tick in rest) for i in (2, 3, 4))
        return {"wall": trained / (rest[-1][0] - first[0]), "cpu": trained / (rest[-1][1] - first[1]),
                "fill": inputs / computed, "trained": trained,
                "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def one(contender: str, arguments: argparse.Namespace) -> dict[str, Any]:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    examples, vocab = rows(arguments.pair, arguments.data, arguments.examples, arguments.micro_tokens)
    who, _, how = contender.partition(" ")
    common = (examples, vocab, arguments.micro_tokens, arguments.steps)
    if who == "chatloss":
        return run_chatloss(*common, how == "packed")
    return run_trainer(*common, "transformers" if who == "transformers" else how, arguments.batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contender", nargs="*", default=CONTENDERS)
    parser.add_argument("--pair", default="smollm2")
    parser.add_argument("--data", default="tools_en")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--micro-tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=4, help="rows per micro-batch of trainers that do not pack")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.json:
        print("RESULT " + json.dumps(one(arguments.contender[0], arguments)))
        return
    print("| contender | trained tokens / s | per CPU second | peak MiB | fill |\n| --- | --- | --- | --- | --- |")
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in vars(arguments).items()
              if name not in ("contender", "json")]
    for contender in arguments.contender:
        done = subprocess.run([sys.executable, "-m", "benchmarks.training", contender, "--json", *passed],
                              capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            print(f"| {contender} | failed: {done.stderr.strip().splitlines()[-1]} | | | |")
            continue
        r = json.loads(found[0].removeprefix("RESULT "))
        print(f"| {contender} | {r['wall']:.0f} | {r['cpu']:.0f} | {r['memory']:.0f} | {r['fill']:.0%} |", flush=True)


if __name__ == "__main__":
    main()
