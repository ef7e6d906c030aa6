"""The exact loss inside transformers.Trainer and accelerate, on one rank: every reduction, padded and packed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader

from chatloss import hf
from chatloss.errors import DataError, RecipeError
from chatloss.models import PureFloat64
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.verify import definition, judge
from tests.synthetic import FAMILIES, chats, per_turn
from tests.torch_reference import tiny

pytestmark = [pytest.mark.peer, pytest.mark.usefixtures("trainer_runs")]

REDUCTIONS = ("token", "turn", "conversation", "power:0.5:conversation", "sum:turn", "constant:64:turn")
EXAMPLES = chats(7)
SPLIT = [per_turn(rows) for rows in EXAMPLES]


def arguments(folder: Path | str, **settings: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(str(folder), **{
        "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 50, "use_cpu": True,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, **settings,
    })


def differences(builds: dict[str, Any], examples: Sequence[Sequence[Sample]], reduction: str, **more: Any) -> Any:
    report = hf.verify(builds, tiny(FAMILIES["llama"]), examples, reduction, **more)
    return {verdict.case: verdict.difference for verdict in report.verdicts}


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_trainer_has_the_definitions_gradient_under_every_reduction(reduction: str, tmp_path: Path) -> None:
    def build(rows: Sequence[Sequence[Sample]], packed: bool, size: int) -> Any:
        return lambda model: hf.ExactTrainer(
            model, arguments(tmp_path, per_device_train_batch_size=size), train_dataset=hf.dataset(rows, reduction),
            data_collator=hf.Collator(packed=packed),
        )

    builds = {
        f"{name} {'packed' if packed else 'padded'} {size}": build(rows, packed, size)
        for name, rows, packed, size in (
            ("multi_turn", EXAMPLES, False, 3), ("multi_turn", EXAMPLES, True, 100), ("per_turn", SPLIT, False, 1),
            ("per_turn", SPLIT, True, 3),
        )
    }
    found = differences(builds, EXAMPLES, reduction)
    assert len(found) == 4 and max(found.values()) <= 1e-12, found


def test_user_weights_count_in_both_norms(tmp_path: Path) -> None:
    from tests.synthetic import chat

    examples = [chat([(3, 4), (2, 6)], seed=1, weights=(0.5, 2.0)), chat([(5, 3)], seed=2, weights=(0.25,))]
    for norm in ("count", "weights"):
        for reduction in ("token", "turn", "conversation"):
            found = differences({"own": lambda model, reduction=reduction, norm=norm: hf.ExactTrainer(
                model, arguments(tmp_path), train_dataset=hf.dataset(examples, reduction, norm)
            )}, examples, reduction, weight_norm=norm)
            assert found["own"] <= 1e-12


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3"])
def test_other_models_are_exact_too(family: str, tmp_path: Path) -> None:
    report = hf.verify(
        {str(packed): lambda model, packed=packed: hf.ExactTrainer(
            model, arguments(tmp_path), train_dataset=hf.dataset(EXAMPLES, "turn"), data_collator=hf.Collator(packed))
         for packed in (False, True)},
        tiny(FAMILIES[family]), EXAMPLES, "turn", tolerance=1e-12,
    )
    assert report.passed, report.table()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft 0.21 speaks transformers' older names
def test_adapters_are_exact_too(tmp_path: Path) -> None:
    import peft

    model = peft.get_peft_model(
        tiny(FAMILIES["llama"]), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    report = hf.verify(
        {str(packed): lambda model, packed=packed: hf.ExactTrainer(
            model, arguments(tmp_path), train_dataset=hf.dataset(EXAMPLES, "turn"), data_collator=hf.Collator(packed))
         for packed in (False, True)},
        model, EXAMPLES, "turn",
    )
    assert report.passed and max(verdict.difference for verdict in report.verdicts) <= 1e-12, report.table()


def test_every_step_of_an_epoch_is_the_mean_over_its_own_rows(tmp_path: Path) -> None:
    """Short last window and short last batch: each step is exactly the definition over the rows that it drew."""
    rows = hf.dataset(EXAMPLES, "turn")
    drawn: list[list[dict[str, Any]]] = []
    gradients = []

    class Watched(hf.ExactTrainer):  # type: ignore[misc]
        def get_batch_samples(self, *args: Any) -> Any:
            batches, z = super().get_batch_samples(*args)
            drawn.append(batches)
            return batches, z

    class Capture(transformers.TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.append({n: p.grad.numpy().copy() for n, p in kwargs["model"].named_parameters()})

    model = tiny(FAMILIES["llama"])
    settings = {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3, "learning_rate": 0.0,
                "max_grad_norm": 0.0}
    with PureFloat64():
        Watched(model, arguments(tmp_path, **settings), train_dataset=rows, callbacks=[Capture()]).train()
    assert [len(window) for window in drawn] == [3, 1]
    for window, got in zip(drawn, gradients, strict=True):
        ids = [row.tolist() for batch in window for row in batch["input_ids"]]
        own = [rows for row in ids for rows in EXAMPLES if row[: len(rows[0])] == rows[0].input_ids.tolist()]
        with PureFloat64():
            reference = definition(copy.deepcopy(model), own, Reduction.parse("turn"))
        [verdict] = judge(lambda gradient: gradient, {"step": got}, reference, 1e-12)
        assert verdict.passed, verdict


def test_logged_and_evaluated_losses_are_those_of_the_reduction(tmp_path: Path) -> None:
    rows = hf.dataset(EXAMPLES, "turn")
    model = tiny(FAMILIES["llama"], torch.float32)
    trainer = hf.ExactTrainer(
        model, arguments(tmp_path, learning_rate=0.0, per_device_eval_batch_size=100), train_dataset=rows,
        eval_dataset=rows,
    )
    trained = trainer.train().training_loss
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trained, rel=1e-5)


def test_accelerate_loop_has_the_definitions_gradient() -> None:
    for reduction in REDUCTIONS:
        for packed, steps in ((False, 1), (True, 4)):
            accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
            model = tiny(FAMILIES["llama"])
            loader = DataLoader(hf.dataset(SPLIT, reduction), batch_size=3, collate_fn=hf.Collator(packed))
            prepared, loader = accelerator.prepare(model, loader)
            with PureFloat64():
                [loss] = [hf.backward(accelerator, prepared, window) for window in hf.windows(loader, 100)]
                reference = definition(tiny(FAMILIES["llama"]), EXAMPLES, Reduction.parse(reduction))
            got = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
            [verdict] = judge(lambda gradient: gradient, {reduction: got}, reference, 1e-12)
            assert verdict.passed and loss > 0, verdict


def test_rows_share_a_conversations_denominator() -> None:
    for reduction in (*REDUCTIONS, "power:0.5:turn", "sum:conversation"):
        chosen = Reduction.parse(reduction)
        for rows, split in zip(EXAMPLES, SPLIT, strict=True):
            z = chosen.of_example(rows).denominator
            assert sum(hf.dataset([rows], reduction)["denominator"]) == pytest.approx(z)
            assert sum(hf.dataset([split], reduction)["denominator"]) == pytest.approx(z)
    with pytest.raises(DataError, match="two rows"):
        hf.dataset([EXAMPLES[0] * 2], "turn")


def test_a_trainer_that_knows_nothing_of_weights_stops(tmp_path: Path) -> None:
    rows = hf.dataset(EXAMPLES, "turn")
    plain = transformers.Trainer(
        tiny(FAMILIES["llama"]), arguments(tmp_path), train_dataset=rows, data_collator=hf.Collator())
    with pytest.raises(DataError, match=r"no weights.*\n.*\n?.*ExactLoss"):
        plain.train()
    kept = transformers.Trainer(
        tiny(FAMILIES["llama"]), arguments(tmp_path, remove_unused_columns=False), train_dataset=rows,
        data_collator=hf.Collator(),
    )
    with pytest.raises(ValueError, match="did not return a loss"):
        kept.train()


@pytest.mark.parametrize(("settings", "name"), [({"label_smoothing_factor": 0.1}, "label_smoothing_factor")])
def test_settings_that_change_the_loss_are_refused_by_name(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=name):
        hf.ExactTrainer(tiny(FAMILIES["llama"]), arguments(tmp_path, **settings), train_dataset=hf.dataset(EXAMPLES))


def test_losses_of_others_are_refused_by_name(tmp_path: Path) -> None:
    rows = hf.dataset(EXAMPLES)
    with pytest.raises(RecipeError, match="compute_loss_func"):
        hf.ExactTrainer(tiny(FAMILIES["llama"]), arguments(tmp_path), train_dataset=rows,
                        compute_loss_func=lambda *_, **__: torch.zeros(()))
    model = tiny({**FAMILIES["mixtral"], "output_router_logits": True})
    with pytest.raises(RecipeError, match="output_router_logits"):
        hf.ExactTrainer(model, arguments(tmp_path), train_dataset=rows)


def test_a_collator_that_loses_the_weights_is_refused_before_the_first_step(tmp_path: Path) -> None:
    def stack(rows: Sequence[Any]) -> dict[str, Any]:
        return {"input_ids": torch.tensor([row["input_ids"][:2] for row in rows])}

    trainer = hf.ExactTrainer(tiny(FAMILIES["llama"]), arguments(tmp_path), train_dataset=hf.dataset(EXAMPLES),
                              data_collator=stack)
    with pytest.raises(RecipeError, match="makes no position_ids and no weights and no denominator"):
        trainer.train()


def test_packs_are_refused_in_a_model_that_does_not_isolate_documents(tmp_path: Path) -> None:
    model = tiny(FAMILIES["llama"])
    forward = model.model.forward
    model.model.forward = lambda *args, position_ids=None, **kwargs: forward(*args, **kwargs)
    trainer = hf.ExactTrainer(
        model, arguments(tmp_path), train_dataset=hf.dataset(EXAMPLES), data_collator=hf.Collator(packed=True))
    with pytest.raises(RecipeError, match="see each other"):
        trainer.train()


def test_rows_cut_by_somebody_else_are_refused() -> None:
    row = {"input_ids": [1, 2], "weights": [0.0, 1.0, 1.0], "denominator": 2.0}
    with pytest.raises(DataError, match="2 ids and 3 weights"):
        hf.Collator()([row])


def test_only_trained_positions_have_logits(tmp_path: Path) -> None:
    """The largest tensor of a step on packs is [trained tokens, vocabulary], not [tokens, vocabulary]."""
    model = tiny(FAMILIES["llama"], torch.float32)
    rows = hf.dataset(EXAMPLES)
    seen = []
    model.lm_head.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape)))
    hf.ExactTrainer(model, arguments(tmp_path, per_device_train_batch_size=100), train_dataset=rows,
                    data_collator=hf.Collator(packed=True)).train()
    trained = sum(sum(weight != 0 for weight in row) for row in rows["weights"])
    assert seen[-1][:2] == (1, trained)
