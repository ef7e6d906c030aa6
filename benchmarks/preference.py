"""DPO beside TRL's DPOTrainer: ``python -m benchmarks.preference``.

First the built-in preference pairs and a tiny model, the same tokens in both: losses, norms of gradients and final
weights of a few steps, per loss. Then trained tokens per CPU second and peak memory on real preference chats, every
contender in a process of its own, reference log-probabilities computed before, the first step not counted.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Our name of a loss -> TRL's, where the definitions are the same.
SAME = {"sigmoid": "sigmoid", "sigmoid_norm": "sigmoid_norm", "hinge": "hinge", "robust": "robust", "ipo_mean": "ipo",
        "apo_zero": "apo_zero", "apo_down": "apo_down"}
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
SMALL = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}


def encoded(tokenizer: Path, data: Path, count: int, longest: int = 10**9) -> tuple[list[Any], Any]:
    """(pairs that fit, encoder)."""
    from chatloss.encode import ChatEncoder
    from chatloss.pipeline import pairs
    from chatloss.reader import read

    encoder = ChatEncoder.load(tokenizer)
    made = [pair for pair in pairs(read(str(data), max_rejects=1.0), encoder)
            if max(len(row) for side in (pair.chosen, pair.rejected) for row in side.rows) <= longest]
    return made[:count], encoder


def as_ids(pair: Any) -> dict[str, list[int]]:
    """A pair as TRL's collator takes it: the prompt's ids and those that are trained, cut behind the stop."""
    from chatloss.pairs import prompt_ids

    sides = {f"{name}_ids": [int(i) for row in side.rows for i in row.input_ids[row.weights != 0]]
             for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected))}
    return {"prompt_ids": prompt_ids(pair.chosen.rows).tolist(), **sides}


def save_model(directory: Path, config: dict[str, Any], vocab: int) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**{**config, "vocab_size": vocab})
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(directory)


def run_chatloss(
    pairs: Sequence[Any], model: Path, loss: str, steps: int, examples: int, micro: int | None = None,
    beta: float = 0.1, rate: float = 1e-3, **dpo: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """(one record per step with its seconds, the trained model)."""
    from chatloss.config import Recipe
    from chatloss.trainer import train

    recipe = Recipe.from_dict({
        "objective": "dpo", "model": str(model), "output": str(model.parent / "ours"),
        "batch": {"examples": examples, "micro_tokens": micro}, "run": {"steps": steps},
        "optim": {"lr": rate, "schedule": "constant", "warmup": 0}, "dpo": {"loss": loss, "beta": beta, **dpo},
    })
    result = train(recipe, pairs, tokenizer_files=lambda _: None, decode=str, quiet=True, fresh=True)
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"], result.model


def run_trl(
    rows: Sequence[dict[str, list[int]]], model: Path, tokenizer: Path, loss: str, steps: int, batch: int,
    accumulation: int = 1, beta: float = 0.1, rate: float = 1e-3, **settings: Any,
) -> tuple[list[dict[str, Any]], Path]:
    """The same from TRL, which gets the ids as they are."""
    import datasets
    import transformers
    import trl

    class AsEncoded(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    seconds: list[float] = []

    class Tick(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            seconds.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds[-1] += time.perf_counter()

    output = model.parent / "trl"
    config = trl.DPOConfig(
        output_dir=str(output), max_steps=steps, per_device_train_batch_size=batch, learning_rate=rate, beta=beta,
        gradient_accumulation_steps=accumulation, report_to=[], use_cpu=True, bf16=False, save_strategy="no",
        gradient_checkpointing=False, logging_steps=1, disable_tqdm=True, lr_scheduler_type="constant", max_length=None,
        loss_type=[loss], precompute_ref_log_probs=True, logging_nan_inf_filter=False, **settings,
    )
    trainer = AsEncoded(
        str(model), args=config, train_dataset=datasets.Dataset.from_list(list(rows)), callbacks=[Tick()],
        processing_class=transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    trainer.save_model(str(output / "model"))
    records = [{**log, "seconds": s} for log, s in zip(trainer.state.log_history, seconds, strict=False)]
    return records, output / "model"


def compare(loss: str, steps: int = 5, count: int = 8, batch: int = 8) -> dict[str, float]:
    """Largest relative differences over a few steps on the same `count` pairs: loss, gradient norm, weights.

    Every step takes all pairs, so that the order in which trainers draw them does not matter.
    """
    import numpy as np
    from safetensors.numpy import load_file

    import chatloss

    demo = Path(chatloss.__file__).parent / "assets" / "demo"
    settings = {"label_smoothing": 0.1} if loss == "robust" else {}
    beta = 1.0 if loss == "sigmoid_norm" else 0.1
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        pairs, encoder = encoded(demo / "tokenizer", demo / "preferences.jsonl", count)
        save_model(model, TINY, encoder.tokens.size)
        ours, mine = run_chatloss(pairs, model, loss, steps, count, beta=beta, **settings)
        theirs, other = run_trl([as_ids(pair) for pair in pairs], model, demo / "tokenizer", SAME[loss], steps, batch,
                                count // batch, beta=beta, **settings)
        weights, others = load_file(mine / "model.safetensors"), load_file(other / "model.safetensors")
    out = {name: max(abs(a[name] - b[name]) / abs(b[name]) for a, b in zip(ours, theirs, strict=False))
           for name in ("loss", "grad_norm")}
    out["weights"] = max(float(np.abs(weights[k] - others[k]).max() / np.abs(others[k]).max()) for k in others)
    out["moved"] = abs(theirs[steps - 1]["loss"] - theirs[0]["loss"])
    return out


def real(data: str, steps: int = 3, count: int = 3, longest: int = 160) -> list[dict[str, Any]]:
    """Records of a few DPO steps of SmolLM2-135M-Instruct on `count` short real pairs ("dpo_en", "dpo_zh")."""
    from tests import assets

    pairs, _ = encoded(assets.tokenizer_dir("smollm2"), assets.chat_file(data), count, longest)
    with tempfile.TemporaryDirectory() as folder:
        from chatloss.config import Recipe
        from chatloss.trainer import train

        recipe = Recipe.from_dict({
            "objective": "dpo", "model": str(assets.model_dir("smollm2")), "output": folder,
            "batch": {"examples": count, "micro_tokens": 2 * longest}, "run": {"steps": steps},
            "optim": {"lr": 5e-6, "schedule": "constant", "warmup": 0},
        })
        result = train(recipe, pairs, tokenizer_files=lambda _: None, decode=str, quiet=True)
        lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [line for line in lines if line["kind"] == "step"]


def speed(who: str, options: argparse.Namespace) -> dict[str, float]:
    """Trained tokens per CPU second after the first step, and peak memory in MiB, of this process.

    CPU seconds, since other programs may run beside a benchmark.
    """
    import warnings

    import torch
    from tests import assets

    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    time.perf_counter = time.process_time
    tokenizer = assets.tokenizer_dir("smollm2")
    pairs, encoder = encoded(tokenizer, assets.chat_file("dpo_en"), options.examples, options.longest)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_model(model, SMALL, encoder.tokens.size)
        if who == "chatloss":
            records, _ = run_chatloss(pairs, model, "sigmoid", options.steps, 8, options.micro_tokens)
            trained = [float(record["tokens"]) for record in records]
        else:
            rows = [as_ids(pair) for pair in pairs]
            records, _ = run_trl(rows, model, tokenizer, "sigmoid", options.steps, options.batch, 8 // options.batch)
            mean = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows) / len(rows)
            trained = [8 * mean] * len(records)
    took = sum(record["seconds"] for record in records[1 : options.steps])
    return {"rate": math.fsum(trained[1 : options.steps]) / took,
            "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--longest", type=int, default=500, help="tokens of a row; longer pairs are left out")
    parser.add_argument("--micro-tokens", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2, help="pairs per micro-batch of TRL")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["chatloss", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--skip-losses", action="store_true")
    parser.add_argument("--real", metavar="DATA", help="a few steps of SmolLM2 on dpo_en or dpo_zh, and nothing else")
    options = parser.parse_args()
    if options.real:
        for record in real(options.real):
            print({key: round(record[key], 3) for key in ("step", "loss", "margin", "accuracy", "logp/chosen",
                                                          "logp/rejected", "tokens", "seconds")}, flush=True)
        return
    if options.only:
        print("RESULT " + json.dumps(speed(options.only, options)))
        return
    if not options.skip_losses:
        print("| loss | loss of a step | gradient norm | weights after 5 steps |\n| --- | --- | --- | --- |")
        for loss in SAME:
            found = compare(loss)
            print(f"| {loss} | {found['loss']:.1e} | {found['grad_norm']:.1e} | {found['weights']:.1e} |", flush=True)
    print("| contender | trained tokens / CPU s | peak MiB |\n| --- | --- | --- |")
    passed = [f"--{name.replace('_', '-')}={value}" for name, value in vars(options).items()
              if name not in ("only", "skip_losses", "real")]
    for who in ("chatloss", "trl"):
        done = subprocess.run([sys.executable, "-m", "benchmarks.preference", "--only", who, *passed],
                              capture_output=True, text=True, cwd=Path(__file__).parent.parent)
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            print(f"| {who} | failed: {done.stderr.strip().splitlines()[-1]} | |")
            continue
        found = json.loads(line.removeprefix("RESULT "))
        print(f"| {who} | {found['rate']:.0f} | {found['memory']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
