"""From what a user has (a directory, a hub id, a tokenizer object, a function) to tokens, template and stop tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chatloss.errors import TokenizerError
from chatloss.tokens import CallableTokens, FastTokens, Tokens

__all__ = ["Loaded", "load_tokenizer"]

# What is fetched from a hub: data only, never code, never weights.
FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json", "special_tokens_map.json",
         "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
MAX_BYTES = 512 * 1024 * 1024
# The special tokens that transformers hands to templates.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tokenizer with all that its files say: template(s), special tokens by name, ids at which engines stop."""

    tokens: Tokens
    chat_template: str | Mapping[str, str] | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    name: str = ""
    directory: Path | None = None


def load_tokenizer(source: Any) -> Loaded:
    """Load from a directory, a tokenizer.json, a hub id, a tokenizer object, or a ``text -> ids`` callable.

    Raises `TokenizerError` that says what was looked for. Never runs code that comes with a model.
    """
    if isinstance(source, str | Path):
        return _from_path_or_hub(source)
    if type(source).__module__.split(".")[0] == "tokenizers" and hasattr(source, "to_str"):
        return Loaded(FastTokens(source), name=type(source).__name__)
    if hasattr(source, "apply_chat_template") and callable(getattr(source, "encode", None)):
        return _from_transformers(source)
    if callable(source):
        decode = getattr(source, "decode", None)
        return Loaded(CallableTokens(source, decode if callable(decode) else None), name=_name(source))
    if callable(getattr(source, "encode", None)):
        return Loaded(CallableTokens(source.encode, getattr(source, "decode", None)), name=_name(source))
    raise TokenizerError(
        f"cannot use a {type(source).__name__} as a tokenizer",
        hint="give a directory, a hub id, a tokenizers.Tokenizer, a transformers tokenizer or a function text -> ids",
    )


def _name(source: Any) -> str:
    return str(getattr(source, "__name__", type(source).__name__))


def _from_path_or_hub(source: str | Path) -> Loaded:
    path = Path(source).expanduser()
    if path.is_file() and path.name.endswith(".json"):
        return _from_directory(path.parent, path.name, str(source))
    if path.is_dir():
        return _from_directory(path, "tokenizer.json", str(source))
    text = str(source)
    if path.exists() or text.count("/") != 1 or text.startswith((".", "/", "~")) or "\\" in text:
        raise TokenizerError(
            f"there is no tokenizer at {text}",
            hint="give a directory with tokenizer.json, or a hub id such as org/name",
        )
    return _from_directory(_fetch(text), "tokenizer.json", text)


def _fetch(repo: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, allow_patterns=list(FILES)))
    except HFValidationError as error:
        raise TokenizerError(f"{repo!r} is no hub id and no directory: {error}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as first:
        try:  # offline, or the hub is down: what is in the cache will do
            return Path(snapshot_download(repo, allow_patterns=list(FILES), local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
            reason = " ".join(str(first).split())[:200]
            raise TokenizerError(
                f"{repo} is not a directory here, not in the hub cache, and could not be fetched: {reason}",
                hint="download the model's tokenizer files and give their directory",
            ) from None


def _from_directory(directory: Path, file: str, name: str) -> Loaded:
    from tokenizers import Tokenizer

    path = directory / file
    if not path.is_file():
        slow = [p.name for p in directory.glob("*.model")] + [p.name for p in directory.glob("*tiktoken*")]
        hint = f"it has {', '.join(slow)}: convert it, or give the transformers tokenizer object" if slow else (
            "a tokenizer directory holds tokenizer.json, tokenizer_config.json and perhaps chat_template.jinja")
        raise TokenizerError(f"{directory} holds no {file}", hint=hint)
    _bounded(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a broken file
        raise TokenizerError(f"{path} is not a tokenizer: {str(error)[:200]}", hint="download it again") from None
    tokens = FastTokens(tokenizer, owned=True)
    config = _json(directory / "tokenizer_config.json")
    special = _special_tokens(config, _json(directory / "special_tokens_map.json"))
    return Loaded(
        tokens, _templates(directory, config), special, _stop_ids(directory, special, tokens), name, directory
    )


def _bounded(path: Path) -> None:
    if path.stat().st_size > MAX_BYTES:
        raise TokenizerError(f"{path} is larger than {MAX_BYTES >> 20} MiB", hint="this is no tokenizer file")


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    _bounded(path)
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path} is not JSON: {str(error)[:200]}", hint="download it again") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold an object", hint="download it again")
    return value


def _text_of(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(config: Mapping[str, Any], older: Mapping[str, Any]) -> dict[str, str]:
    special = {}
    named = config.get("extra_special_tokens")
    extra = named if isinstance(named, dict) else {}
    for key in (*NAMED, *(k for k in (*config, *extra) if k.endswith("_token") and k not in NAMED)):
        text = _text_of(config.get(key, extra.get(key, older.get(key))))
        if text is not None:
            special[key] = text
    return special


def _templates(directory: Path, config: Mapping[str, Any]) -> str | Mapping[str, str] | None:
    """The chat template(s): a file of its own wins over tokenizer_config.json, as in transformers."""
    named: dict[str, str] = {}
    inline = config.get("chat_template")
    if isinstance(inline, str):
        named["default"] = inline
    elif isinstance(inline, list):
        for item in inline:
            if isinstance(item, dict) and isinstance(item.get("name"), str) and isinstance(item.get("template"), str):
                named[item["name"]] = item["template"]
    elif isinstance(inline, dict):
        named.update({str(k): v for k, v in inline.items() if isinstance(v, str)})
    elif inline is not None:
        raise TokenizerError(f"chat_template in {directory}/tokenizer_config.json must be a string or a list")
    older = _json(directory / "chat_template.json").get("chat_template")
    if isinstance(older, str):
        named["default"] = older
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    for path in [directory / "chat_template.jinja", *more]:
        if path.is_file():
            _bounded(path)
            named["default" if path.name == "chat_template.jinja" else path.stem] = read_template(path)
    if not named:
        return None
    return named["default"] if set(named) == {"default"} else named


def read_template(path: Path) -> str:
    """A template file's text, its line ends untouched; raises `TokenizerError` where it is no UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path} is not UTF-8: {error}", hint="convert it") from None
    except OSError as error:
        raise TokenizerError(f"cannot read {path}: {error.strerror or error}", hint="check the path") from None


def _stop_ids(directory: Path, special: Mapping[str, str], tokens: Tokens) -> tuple[int, ...]:
    stops = _json(directory / "generation_config.json").get("eos_token_id")
    if stops is None:
        stops = _json(directory / "config.json").get("eos_token_id")
    ids = [stops] if isinstance(stops, int) else stops if isinstance(stops, list) else []
    found = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and tokens.token_text(i) is not None]
    return tuple(dict.fromkeys(found))


def _from_transformers(tokenizer: Any) -> Loaded:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = {str(k): str(v) for k, v in dict(getattr(tokenizer, "special_tokens_map", {})).items()
               if isinstance(v, str) or hasattr(v, "content")}
    tokens: Tokens
    if backend is not None and hasattr(backend, "to_str"):
        tokens = FastTokens(backend)
    else:
        encode: Callable[[str], Any] = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        decode: Callable[[Any], str] = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))  # noqa: E731
        pairs = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        known = {str(text): int(i) for text, i in pairs}
        tokens = CallableTokens(encode, decode, known)
    directory = Path(str(getattr(tokenizer, "name_or_path", "") or "."))
    local = bool(getattr(tokenizer, "name_or_path", "")) and directory.is_dir()
    stops = _stop_ids(directory, special, tokens) if local else ()
    return Loaded(
        tokens, getattr(tokenizer, "chat_template", None), special, stops,
        str(getattr(tokenizer, "name_or_path", "")) or type(tokenizer).__name__, directory if local else None,
    )
