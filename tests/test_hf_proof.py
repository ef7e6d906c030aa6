"""The judge on other people's trainers: which configurations are exact, by how much the others are off, and ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from benchmarks.training import _tokenizer

from chatloss import hf
from chatloss.errors import DataError, RecipeError
from tests.synthetic import FAMILIES, VOCAB, chats
from tests.test_hf import arguments
from tests.torch_reference import tiny

pytestmark = [
    pytest.mark.peer, pytest.mark.usefixtures("trainer_runs"), pytest.mark.filterwarnings("ignore::FutureWarning")
]
EXAMPLES = chats(8)
WORDS = _tokenizer(VOCAB)


class ReturnsTheModelsLoss(transformers.Trainer):  # type: ignore[misc]
    """What many do in compute_loss: the mean of the micro-batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def per_row_mean(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    logp = outputs.logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    nll = -logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    return (nll.sum(1) / (targets != -100).sum(1)).mean()


def trainer(kind: Any = transformers.Trainer, **settings: Any) -> Any:
    """Builds a trainer on rows with labels, two in a micro-batch, as anybody would."""
    more = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}

    def build(model: Any) -> Any:
        return kind(
            model, arguments(settings.pop("folder", "unused"), **settings), train_dataset=hf.dataset(EXAMPLES),
            data_collator=transformers.DataCollatorForSeq2Seq(WORDS, padding=True), **more,
        )

    return build


class ExactSFTTrainer(hf.ExactLoss, trl.SFTTrainer):  # type: ignore[misc]
    pass


def sft(kind: Any = trl.SFTTrainer, reduction: str = "token", **settings: Any) -> Any:
    """Builds TRL's trainer on rows that chatloss prepared."""
    more = {name: settings.pop(name) for name in ("data_collator",) if name in settings}

    def build(model: Any) -> Any:
        config = trl.SFTConfig(**{
            "output_dir": "unused", "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True, "bf16": False,
            "gradient_accumulation_steps": 50, "report_to": [], "save_strategy": "no", "max_length": None, **settings,
        })
        return kind(model, config, train_dataset=hf.dataset(EXAMPLES, reduction), processing_class=WORDS, **more)

    return build


def differences(builds: dict[str, Any], reduction: str = "token") -> dict[str, float]:
    report = hf.verify(builds, tiny(FAMILIES["llama"]), EXAMPLES, reduction)
    return {verdict.case: verdict.difference for verdict in report.verdicts}


def test_trainers_default_is_exact_and_what_breaks_it_is_seen() -> None:
    found = differences({
        "default": trainer(), "one row a micro-batch": trainer(per_device_train_batch_size=1),
        "one micro-batch": trainer(per_device_train_batch_size=8, gradient_accumulation_steps=1),
        "label smoothing": trainer(label_smoothing_factor=0.1), "the model's loss": trainer(ReturnsTheModelsLoss),
        "per-row mean": trainer(compute_loss_func=per_row_mean),
    })
    for name in ("default", "one row a micro-batch", "one micro-batch"):
        assert found[name] <= 1e-12, found
    for name in ("label smoothing", "the model's loss", "per-row mean"):
        assert found[name] > 0.01, found


def test_trl_is_exact_on_prepared_rows_unless_its_packs_cut_them() -> None:
    found = differences({
        "padded": sft(), "padding-free": sft(padding_free=True),
        "bfd": sft(packing=True, max_length=130, per_device_train_batch_size=1),
        "wrapped": sft(packing=True, packing_strategy="wrapped", max_length=130, per_device_train_batch_size=1),
        "dft": sft(loss_type="dft"), "smoothing": sft(label_smoothing_factor=0.1),
    })
    for name in ("padded", "padding-free", "bfd"):
        assert found[name] <= 1e-5, "exact but for a head that computes in float32"
    for name in ("wrapped", "dft", "smoothing"):
        assert found[name] > 0.01, found


@pytest.mark.parametrize("reduction", ["token", "turn", "conversation"])
def test_trl_with_our_loss_is_exact_under_every_reduction(reduction: str) -> None:
    found = differences({
        "plain": sft(reduction=reduction), "padded": sft(ExactSFTTrainer, reduction),
        "packed": sft(ExactSFTTrainer, reduction, data_collator=hf.Collator(packed=True)),
    }, reduction)
    assert max(found["padded"], found["packed"]) <= 1e-12, found
    assert (found["plain"] <= 1e-5) == (reduction == "token"), found


def test_trl_logs_and_evaluates_with_our_loss(tmp_path: Path) -> None:
    build = sft(ExactSFTTrainer, "turn", output_dir=str(tmp_path), logging_steps=1)
    made = build(tiny(FAMILIES["llama"], torch.float32))
    trained = made.train().training_loss
    assert trained > 0 and made.state.log_history[0]["loss"] == pytest.approx(trained, rel=1e-3)
    assert made.evaluate(hf.dataset(EXAMPLES, "turn"))["eval_loss"] > 0


def test_rows_that_trl_cut_are_refused(tmp_path: Path) -> None:
    build = sft(ExactSFTTrainer, "turn", output_dir=str(tmp_path), max_length=10)
    with pytest.raises(DataError, match="something cut one of them"):
        build(tiny(FAMILIES["llama"])).train()


def test_clipping_noise_and_precision_of_the_run_play_no_part() -> None:
    model = tiny({**FAMILIES["llama"], "attention_dropout": 0.5})
    report = hf.verify(
        trainer(max_grad_norm=1e-3, neftune_noise_alpha=5.0, bf16=True, learning_rate=0.0), model, EXAMPLES)
    assert report.passed and report.tokens == sum(row.n_trained for [row] in EXAMPLES), report.table()
    assert model.config.attention_dropout == 0.5 and not any(p.grad is not None for p in model.parameters())


def test_a_step_that_misses_rows_is_refused_with_the_setting_that_takes_them_in() -> None:
    with pytest.raises(RecipeError, match="gradient_accumulation_steps=4"):
        hf.verify(trainer(gradient_accumulation_steps=3), tiny(FAMILIES["llama"]), EXAMPLES)


def test_nothing_is_written_or_reported(tmp_path: Path) -> None:
    told: list[str] = []

    class Told(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            told.append("began")

    def build(model: Any) -> Any:
        made = trainer(folder=str(tmp_path), save_strategy="steps", save_steps=1)(model)
        made.add_callback(Told())
        return made

    hf.verify(build, tiny(FAMILIES["llama"]), EXAMPLES)
    assert not told and not list(tmp_path.iterdir())
