"""`prepare --export labels` in other people's trainers: read as it is, and trained on exactly the labels it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chatloss.demo import chats_file, tokenizer_directory
from chatloss.prepare import Job, prepare

pytestmark = [
    pytest.mark.peer,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import datasets

    folder = tmp_path_factory.mktemp("labels")
    prepare([str(chats_file())], folder / "out", Job(str(tokenizer_directory()), export="labels"), max_rejects=0.1)
    files = [str(path) for path in sorted((folder / "out" / "shards").iterdir())]
    return datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))


@pytest.fixture
def model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                        num_attention_heads=2, num_key_value_heads=2))


def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(tokenizer_directory())


def options(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
                save_strategy="no", logging_steps=1, disable_tqdm=True, seed=3, **more)


def assert_trains_on_these_labels(trainer: Any, data: Any) -> None:
    """One real step; what the collator hands over is rows of the data, padded."""
    wanted = {tuple(row["input_ids"]): row["labels"] for row in data}
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        n = int(mask.sum())
        assert labels[:n].tolist() == wanted[tuple(ids[:n].tolist())] and set(labels[n:].tolist()) <= {-100}
    result = trainer.train()
    assert result.global_step == 1 and 0 < result.training_loss < 20


def test_trl_trains_on_the_labels_as_they_are(data: Any, model: Any, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    arguments = options(SFTConfig, tmp_path, max_length=None)
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer())
    assert [row["labels"] for row in trainer.train_dataset] == [row["labels"] for row in data]
    assert_trains_on_these_labels(trainer, data)


def test_transformers_trains_on_the_labels_as_they_are(data: Any, model: Any, tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    collator = DataCollatorForSeq2Seq(tokenizer(), padding=True)
    trainer = Trainer(model, options(TrainingArguments, tmp_path), train_dataset=data, data_collator=collator)
    assert_trains_on_these_labels(trainer, data)
