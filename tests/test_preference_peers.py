"""TRL's DPOTrainer beside ours: the same steps where definitions agree, and every difference has a name."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from benchmarks.preference import SAME, compare

# TRL 1.16 uses names that transformers 5.23 is going to drop.
pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")]


@pytest.mark.parametrize("loss", sorted(SAME))
@pytest.mark.parametrize("batch", [8, 2])
def test_losses_gradients_and_weights_agree_to_float_tolerance(loss: str, batch: int) -> None:
    torch.set_num_threads(1)
    found = compare(loss, steps=3, batch=batch)
    assert found["loss"] < 2e-5 and found["grad_norm"] < 2e-4 and found["weights"] < 2e-3, found
    assert found["moved"] > 1e-3


def source() -> str:
    import trl

    return inspect.getsource(trl.DPOTrainer)


def loss_source(name: str) -> str:
    found = re.search(rf'loss_type == "{name}":\n(.*?)(?:\n {{12}}elif|\n {{12}}else)', source(), re.DOTALL)
    assert found is not None
    return found[1]


def test_trl_ignores_label_smoothing_in_its_sigmoid_loss_where_ours_is_conservative_dpo() -> None:
    assert "label_smoothing" not in loss_source("sigmoid")


def test_trl_s_ipo_is_our_ipo_mean_and_its_sum_has_no_name_there() -> None:
    assert "completion tokens" in loss_source("ipo") and SAME["ipo_mean"] == "ipo"


def test_trl_s_sft_term_is_a_mean_over_the_micro_batch_where_ours_has_a_global_denominator() -> None:
    assert ".mean()" in loss_source("sft")


def test_trl_cuts_each_side_of_a_pair_on_its_own() -> None:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    collator = DataCollatorForPreference(pad_token_id=0, max_length=4)
    batch = collator([{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5, 6, 7]}])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0], [0, 0, 1, 1]]  # the rejected answer lost its stop


def test_trl_trains_the_newline_behind_the_stop_of_a_chatml_template(tmp_path: Path) -> None:
    import datasets
    import transformers
    import trl

    from chatloss.demo import tokenizer_directory

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_directory())
    row = {"prompt": [{"role": "user", "content": "Hi"}], "chosen": [{"role": "assistant", "content": "a"}],
           "rejected": [{"role": "assistant", "content": "b"}]}
    bare = trl.DPOTrainer.__new__(trl.DPOTrainer)
    bare._tokenizer = tokenizer
    config = trl.DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False)
    [made] = bare._prepare_dataset(datasets.Dataset.from_list([row]), tokenizer, config, "train")
    assert tokenizer.decode(made["chosen_ids"]) == "a<|im_end|>\n"
