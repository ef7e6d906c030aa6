"""A tokenizer whose assistant mask is right under any unmodified template, and TRL training on it."""

from __future__ import annotations

import copy
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
import trl
from datasets.fingerprint import Hasher
from trl.chat_template_utils import get_training_chat_template, is_chat_template_stop_token_trained

from chatloss import ChatEncoder, Policy, hf
from chatloss.demo import tokenizer_directory
from chatloss.errors import DataError, RecipeError, TokenizerError
from chatloss.hf.masks import NothingMasked
from tests import assets, conformance

# What TRL and transformers say of their own deprecated settings is theirs.
pytestmark = [
    pytest.mark.peer, pytest.mark.usefixtures("trainer_runs"), pytest.mark.filterwarnings("ignore::FutureWarning")
]

PLAIN = conformance.PLAIN
CHATS = [PLAIN, PLAIN[:4], PLAIN[:2]]
# Families for whose own template TRL 1.16 has no tagged version.
UNKNOWN_TO_TRL = ("llama3", "mistral-v1", "mistral-v3", "mistral-v7", "tekken", "smollm2")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "[[{{ m.content + '<|im_end|>' }}]]{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    conformance.freeze_clock()


@cache
def plain_tokenizer(name: str) -> Any:
    where = tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)
    return transformers.AutoTokenizer.from_pretrained(where)


def sft(tokenizer: Any, rows: list[dict[str, Any]], folder: Path, **settings: Any) -> Any:
    """TRL's trainer on chats, with assistant_only_loss, around a tiny model."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    return trl.SFTTrainer(
        model, trl.SFTConfig(**{
            "output_dir": str(folder), "max_steps": 2, "assistant_only_loss": True, "use_cpu": True, "bf16": False,
            "report_to": [], "save_strategy": "no", "disable_tqdm": True, "gradient_checkpointing": False,
            "learning_rate": 0.1, **settings,
        }),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
    )


def targets(ids: list[int], labels: list[int]) -> list[tuple[list[int], list[int]]]:
    """(context ids, target ids) of every trained stretch."""
    found, at = [], 0
    while at < len(ids):
        if labels[at] != -100:
            end = at
            while end < len(ids) and labels[end] != -100:
                end += 1
            assert labels[at:end] == ids[at:end]
            found.append((ids[:at], ids[at:end]))
            at = end
        at += 1
    return found


def our_turns(tokenizer: Any, messages: Any) -> list[tuple[list[int], list[int]]]:
    encoder = ChatEncoder.load(tokenizer, policy=Policy(row_format="per_turn"), clock=lambda: conformance.CLOCK)
    return [targets(row.input_ids.tolist(), row.labels.tolist())[0] for row in encoder.encode(messages)]


@pytest.mark.parametrize("name", UNKNOWN_TO_TRL)
def test_trl_trains_on_templates_it_has_no_tagged_version_of_and_its_labels_are_ours(name: str, tmp_path: Path) -> None:
    plain = plain_tokenizer(name)
    with pytest.raises(ValueError, match="not training-compatible"):
        get_training_chat_template(plain)
    tokenizer = hf.with_assistant_masks(plain)
    trainer = sft(tokenizer, [{"messages": messages} for messages in CHATS], tmp_path)
    assert is_chat_template_stop_token_trained(tokenizer)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert bool((trainer.model.lm_head.weight != before).any())
    made = list(trainer.train_dataset)
    assert len(made) == len(CHATS)
    for messages, row in zip(CHATS, made, strict=True):
        assert targets(row["input_ids"], row["labels"]) == our_turns(plain, messages)
    assert not tokenizer.mask_counts.left_out
    assert not plain.chat_template.count("chatloss"), "the given tokenizer is left as it was"


@pytest.mark.parametrize(("name", "held"), [("qwen3", 1), ("gpt-oss", 1), ("qwen2.5", 3)])
def test_turns_that_one_row_cannot_hold_are_left_out_and_counted(
    name: str, held: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer(name))
    trainer = sft(tokenizer, [{"messages": PLAIN}], tmp_path)
    trainer.train()
    [row] = trainer.train_dataset
    ours = our_turns(plain_tokenizer(name), PLAIN)
    assert targets(row["input_ids"], row["labels"]) == ours[len(ours) - held :]
    counts = tokenizer.mask_counts
    # TRL's own probe of three messages is one conversation more where its turn can be held.
    assert counts.left_out == ({"split": 3 - held} if held < 3 else {})
    assert counts.masked - (counts.conversations - 1) == held
    assert ("cannot hold every turn" in caplog.text) == (held < 3)


def test_a_chat_of_which_nothing_can_be_held_is_refused(tmp_path: Path) -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer("llama3"))
    reasoning, _ = conformance.SHAPES["reasoning"]
    with pytest.raises(NothingMasked, match="2 altered") as caught:
        tokenizer.apply_chat_template(reasoning, return_assistant_tokens_mask=True)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DataError)
    with pytest.raises(NothingMasked, match="no turn is trained"):
        tokenizer.apply_chat_template(PLAIN[:1], return_assistant_tokens_mask=True)


@pytest.mark.parametrize("settings", [
    {}, {"return_tensors": "pt"}, {"padding": "max_length", "max_length": 120},
    {"padding": "max_length", "max_length": 120, "return_tensors": "np"}, {"truncation": True, "max_length": 40},
    {"add_generation_prompt": True},
], ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_answer_has_the_form_of_transformers_own(settings: dict[str, Any], batched: bool, side: str) -> None:
    """A template and its tagged version that say the same: so must the two ways to a mask."""
    plain = copy.copy(plain_tokenizer("demo"))
    plain.chat_template, plain.padding_side = CHATML.replace("[[", "").replace("]]", ""), side
    tokenizer = hf.with_assistant_masks(plain)
    chats: Any = [PLAIN, PLAIN[:4]] if batched else PLAIN
    if batched and "return_tensors" in settings:
        settings = {"padding": True, **settings}
    mine = tokenizer.apply_chat_template(chats, return_assistant_tokens_mask=True, **settings)
    if "truncation" in settings:  # transformers trains what is left of a turn that is cut; we leave the turn out
        whole = tokenizer.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)["assistant_masks"]
        first = mine["assistant_masks"][0] if batched else mine["assistant_masks"]
        held = whole.index(0, whole.index(1))  # where the first turn ends; the second one is cut
        assert len(first) == 40 and first == whole[:held] + [0] * (40 - held)
        assert tokenizer.mask_counts.left_out["cut"]
        return
    tagged = CHATML.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")
    theirs = plain.apply_chat_template(
        chats, chat_template=tagged, return_assistant_tokens_mask=True, return_dict=True, **settings)
    assert set(mine) == set(theirs) and type(mine) is type(theirs)
    for key in theirs:
        assert type(mine[key]) is type(theirs[key])
        assert torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) if "return_tensors" in settings \
            else mine[key] == theirs[key]


def test_everything_but_the_mask_is_the_tokenizers_own(tmp_path: Path) -> None:
    plain = plain_tokenizer("mistral-v3")
    tokenizer = hf.with_assistant_masks(plain)
    assert isinstance(tokenizer, type(plain))
    for settings in ({"tokenize": False}, {"return_dict": True}, {"add_generation_prompt": True, "tokenize": False}):
        assert tokenizer.apply_chat_template(PLAIN, **settings) == plain.apply_chat_template(PLAIN, **settings)
    tools = conformance.SHAPES["tools"]
    assert tokenizer.apply_chat_template(*tools, tokenize=False) == plain.apply_chat_template(*tools, tokenize=False)
    masked = tokenizer.apply_chat_template(*tools, return_assistant_tokens_mask=True)
    assert masked["input_ids"] == plain.apply_chat_template(*tools, return_dict=True)["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(plain) and again.chat_template == plain.chat_template
    assert "chatloss" not in "".join(path.read_text("utf-8") for path in tmp_path.iterdir())
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer), hf.with_assistant_masks(tokenizer)):
        assert type(other) is type(tokenizer)
        same = other.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)
        assert same == tokenizer.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)


def test_datasets_takes_it_into_other_processes_and_knows_it_again(tmp_path: Path) -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer("demo"))
    before = Hasher.hash(tokenizer)
    trainer = sft(tokenizer, [{"messages": PLAIN}] * 4, tmp_path, dataset_num_proc=2)
    [row, *_] = trainer.train_dataset
    assert targets(row["input_ids"], row["labels"]) == our_turns(plain_tokenizer("demo"), PLAIN)
    fresh = hf.with_assistant_masks(plain_tokenizer("demo"))
    fresh.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)
    assert Hasher.hash(fresh) == before
    assert Hasher.hash(hf.with_assistant_masks(fresh, Policy(turns="last"))) != before


def test_another_template_of_the_user_is_followed() -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer("demo"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant:' }}{% endif %}"
    )
    row = tokenizer.apply_chat_template(PLAIN[:2], return_assistant_tokens_mask=True)
    trained = [i for i, mask in zip(row["input_ids"], row["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == PLAIN[1]["content"] + "<|im_end|>"


def test_a_missing_last_stop_is_appended_and_counted() -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer("demo"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{% if not loop.last %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_end|>\n<|im_start|>assistant\n' }}{% endif %}"
    )
    row = tokenizer.apply_chat_template(PLAIN[:2], return_assistant_tokens_mask=True)
    assert tokenizer.decode(row["input_ids"][-1:]) == "<|im_end|>" and row["assistant_masks"][-1] == 1
    assert len(row["input_ids"]) == len(row["attention_mask"]) == len(row["assistant_masks"])
    assert tokenizer.mask_counts.stops_appended == 1


def test_weights_that_a_mask_cannot_hold_are_refused() -> None:
    tokenizer = hf.with_assistant_masks(plain_tokenizer("demo"), Policy(spans=(("o", 0.5),)))
    with pytest.raises(DataError, match="weights other than 0 and 1"):
        tokenizer.apply_chat_template(PLAIN[:2], return_assistant_tokens_mask=True)
    last = hf.with_assistant_masks(plain_tokenizer("demo"), Policy(turns="last"))
    row = last.apply_chat_template(PLAIN, return_assistant_tokens_mask=True)
    labels = [i if mask else -100 for i, mask in zip(row["input_ids"], row["assistant_masks"], strict=True)]
    assert targets(row["input_ids"], labels) == our_turns(plain_tokenizer("demo"), PLAIN)[-1:]
    assert str(last.mask_counts) == "1 of 1 turns in 1 conversations are masked"


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TokenizerError, match="no transformers tokenizer"):
        hf.with_assistant_masks(str)
    with pytest.raises(RecipeError, match="a mask cuts nothing"):
        hf.with_assistant_masks(plain_tokenizer("demo"), Policy(max_length=5))
    bare = copy.copy(plain_tokenizer("demo"))
    bare.chat_template = None
    with pytest.raises(TokenizerError, match="no chat template"):
        hf.with_assistant_masks(bare)
