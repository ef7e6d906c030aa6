"""mistral-common in a process of its own: its templates, and its ids as an independent reference.

Run as a script: `mistral_peer.py PACKAGE templates FOLDER`, or `mistral_peer.py PACKAGE encode FILE` with JSON requests
on stdin and a JSON list of id lists on stdout. The package is put on `sys.path`, not installed; two libraries
it imports only to validate requests are replaced by stand-ins.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any


class AcceptsAnything:
    """Stands in for a JSON Schema validator."""

    def __init__(self, *_: object, **__: object) -> None: ...

    @staticmethod
    def check_schema(*_: object, **__: object) -> None: ...

    def validate(self, *_: object, **__: object) -> None: ...


def stand_in(name: str, **attributes: object) -> None:
    """Register an importable module `name` with these attributes."""
    module = types.ModuleType(name)
    module.__dict__.update(attributes, __path__=[])
    sys.modules[name] = module


def load(package: str) -> Path:
    """Make mistral-common importable and return the folder with its tokenizer files."""
    sys.path.insert(0, package)
    names = ("ValidationError", "SchemaError")
    errors: dict[str, Any] = {name: type(name, (Exception,), {"message": ""}) for name in names}
    exceptions = types.ModuleType("jsonschema.exceptions")
    exceptions.__dict__.update(errors)
    stand_in("jsonschema", Draft7Validator=AcceptsAnything, exceptions=exceptions, **errors)
    sys.modules["jsonschema.exceptions"] = exceptions
    stand_in("pydantic_extra_types")
    stand_in("pydantic_extra_types.language_code", LanguageAlpha2=str)
    return Path(package) / "mistral_common" / "data"


def write_templates(data: Path, folder: Path) -> None:
    """Write the generated template of every tokenizer file to `FILE.jinja`."""
    from mistral_common.integrations.chat_templates.chat_templates import convert_tokenizer_to_chat_template  # type: ignore[import-not-found]

    for path in sorted(data.iterdir()):
        if ".model" in path.name or path.name.startswith("tekken"):
            (folder / f"{path.name}.jinja").write_text(convert_tokenizer_to_chat_template(path), "utf-8")


def encode(path: Path, requests: list[dict[str, Any]]) -> list[list[int]]:
    """Ids of each request (`{"text": ...}` or `{"messages": ..., "tools": ...}`) with the tokenizer in `path`."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest  # type: ignore[import-not-found]
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer  # type: ignore[import-not-found]

    tokenizer = MistralTokenizer.from_file(path)
    ids = []
    for request in requests:
        if "text" in request:
            ids.append(tokenizer.instruct_tokenizer.tokenizer.encode(request["text"], bos=False, eos=False))
        else:
            ids.append(tokenizer.encode_chat_completion(ChatCompletionRequest(**request)).tokens)
    return ids


def main(package: str, job: str, argument: str) -> None:
    """Do one job; see the module's docstring."""
    data = load(package)
    if job == "templates":
        write_templates(data, Path(argument))
    else:
        json.dump(encode(data / argument, json.load(sys.stdin)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
