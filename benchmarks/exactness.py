"""Whose gradient is the definition's? ``python -m benchmarks.exactness``

A tiny random Llama in float64, eight uneven chats, one optimiser step of plain SGD with learning rate 1: the gradient
is the difference of the weights. Compared with the definition (row by row, all logits, plain sums over all trained
tokens) by ``max over parameters of max |dg| / max |g|``.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tests.synthetic import FAMILIES, chats
from tests.torch_reference import tiny

from chatloss.attention import use_blocks
from chatloss.batch import Layout, documents_of
from chatloss.loss.model import TokenLoss
from chatloss.models import PureFloat64
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.step import gradient
from chatloss.verify import Gradient, definition, judge

Case = Callable[[Any, Sequence[Sequence[Sample]]], Gradient]


def collected(model: Any) -> Gradient:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def chatloss(layout: Layout) -> Case:
    def case(model: Any, examples: Sequence[Sequence[Sample]]) -> Gradient:
        use_blocks(model)
        weights = [Reduction.parse("token").of_example(rows) for rows in examples]
        documents = [d for rows, w in zip(examples, weights, strict=True) for d in documents_of(rows, w)]
        gradient(TokenLoss(model), layout.micro_batches(documents), sum(w.denominator for w in weights))
        return collected(model)

    return case


def mean_of_means(size: int) -> Case:
    """The loop of nanoGPT and its heirs: every micro-batch's mean, divided by the number of micro-batches."""

    def case(model: Any, examples: Sequence[Sequence[Sample]]) -> Gradient:
        for at in range(0, len(examples), size):
            losses, count = torch.zeros((), dtype=torch.float64), 0
            for [row] in examples[at : at + size]:
                ids, labels = torch.from_numpy(row.input_ids.astype(np.int64))[None], torch.from_numpy(row.labels[1:])
                logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                losses = losses + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                count += int((labels != -100).sum())
            (losses / count * size / len(examples)).backward()
        return collected(model)

    return case


def trainer(kind: str, size: int, steps: int, **settings: Any) -> Case:
    """transformers.Trainer or TRL's SFTTrainer: `steps` micro-batches of `size` rows in one optimiser step."""

    def case(model: Any, examples: Sequence[Sequence[Sample]]) -> Gradient:
        import datasets
        import transformers

        from benchmarks.training import _Padder, _tokenizer

        data = datasets.Dataset.from_list([
            {"input_ids": row.input_ids.tolist(), "labels": row.labels.tolist()} for [row] in examples
        ])
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with tempfile.TemporaryDirectory() as directory:
            common: dict[str, Any] = {
                "output_dir": directory, "max_steps": 1, "per_device_train_batch_size": size, "optim": "sgd",
                "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "report_to": [],
                "gradient_accumulation_steps": steps, "use_cpu": True, "bf16": False, "save_strategy": "no",
                "gradient_checkpointing": False, "disable_tqdm": True, "logging_strategy": "no", **settings,
            }
            if kind == "transformers":
                padded = data.map(lambda row: {"attention_mask": [1] * len(row["input_ids"])})
                made: Any = transformers.Trainer(
                    model, transformers.TrainingArguments(**common), train_dataset=padded,
                    data_collator=transformers.DataCollatorForSeq2Seq(_Padder(), padding=True),
                )
            else:
                import trl

                vocabulary = _tokenizer(model.config.vocab_size)
                made = trl.SFTTrainer(model, trl.SFTConfig(**common), train_dataset=data, processing_class=vocabulary)
            made.remove_callback(transformers.PrinterCallback)
            made.train()
        return {name: (before[name] - p.detach()).numpy() for name, p in model.named_parameters()}

    return case


CASES: Mapping[str, Case] = {
    "chatloss, one pack": chatloss(Layout(micro_tokens=4000)),
    "chatloss, packs of 130 tokens": chatloss(Layout(micro_tokens=130)),
    "chatloss, padded, 3 rows a micro-batch": chatloss(Layout(micro_rows=3, packing="none")),
    "chatloss, row by row": chatloss(Layout(micro_rows=1, packing="none")),
    "mean of micro-batch means, 8 rows": mean_of_means(8),
    "mean of micro-batch means, 2 rows x 4": mean_of_means(2),
    "mean of micro-batch means, 1 row x 8": mean_of_means(1),
    "transformers.Trainer, 8 rows": trainer("transformers", 8, 1),
    "transformers.Trainer, 1 row x 8": trainer("transformers", 1, 8),
    "TRL SFTTrainer, 8 rows": trainer("trl", 8, 1, max_length=None),
    "TRL SFTTrainer, 1 row x 8": trainer("trl", 1, 8, max_length=None),
    "TRL SFTTrainer, padding-free, 4 rows x 2": trainer("trl", 4, 2, padding_free=True, max_length=None),
    "TRL SFTTrainer, packed bfd 130, 1 pack x 4": trainer("trl", 1, 4, packing=True, max_length=130),
    "TRL SFTTrainer, packed wrapped 130, 1 pack x 4": trainer(
        "trl", 1, 4, packing=True, packing_strategy="wrapped", max_length=130
    ),
}


def main() -> None:
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    examples = chats(8)
    model = tiny(FAMILIES["llama"])
    with PureFloat64():
        reference = definition(copy.deepcopy(model), examples, Reduction.parse("token"))
    print(f"{sum(row.n_trained for [row] in examples)} trained tokens in rows of "
          f"{', '.join(str(row.n_trained) for [row] in examples)}\n")
    print("| on the same rows | difference from the definition |\n| --- | --- |")
    for name, case in CASES.items():
        try:
            with PureFloat64():
                [verdict] = judge(lambda run: run(copy.deepcopy(model), examples), {name: case}, reference, 1e-12)
            print(f"| {name} | {verdict.difference:.1e} |", flush=True)
        except Exception as error:  # a peer that cannot run this is a result too
            print(f"| {name} | failed: {str(error).splitlines()[0][:80]} |", flush=True)


if __name__ == "__main__":
    main()
