"""What a tokenizer.json says of texts as a whole: where they are cut before anything else, what is put before them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

__all__ = ["drop_prefix", "hard_cuts", "overlaps", "steps"]

# Steps that see a text's pieces between added tokens one by one, wherever these stand.
_LOCAL = frozenset({
    "BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend",
    "Replace", "Strip", "StripAccents", "BertPreTokenizer", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation",
    "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit", "BertProcessing", "TemplateProcessing",
})
_LARGEST_CUT, _MOST = 2**24, 2**18


def hard_cuts(tokenizer: Any, added: Mapping[int, Any]) -> dict[int, str]:
    """Added tokens at which a tokenizer cuts any text, by id, if it then encodes every piece as if it were alone."""
    if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
        return {}
    if getattr(tokenizer.model, "dropout", None) or sum(len(token.content) for token in added.values()) > _MOST:
        return {}
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        for step in _steps_of(tokenizer, name):
            trims = name == "post_processor" and step.get("trim_offsets")
            if step["type"] not in _LOCAL or step.get("prepend_scheme") == "first" or trims:
                return {}
    late = {token.content for token in added.values() if token.normalized}
    early = {token.content for token in added.values()} - late
    if not _steps_of(tokenizer, "normalizer") and len(late) * len(early) <= _MOST:
        # What is matched late gives way to what is matched early, and so does not always stand where it could.
        yielding = {text for text, found in _overlaps(early, late).items() if found}
        early |= {text for text, found in _overlaps(yielding, late - yielding).items() if not found}
    return {i: token.content for i, token in added.items() if token.content in early and i < _LARGEST_CUT}


def _steps_of(tokenizer: Any, name: str) -> list[Mapping[str, Any]]:
    part = getattr(tokenizer, name)
    return list(steps(json.loads(part.__getstate__()))) if part is not None else []


def overlaps(early: Collection[str], late: Collection[str]) -> list[str]:
    """Texts in which an added token that is matched before normalising shares a character with one matched after it.

    The former has the right of way, wherever it begins. Where there are none, all are matched from left to right.
    """
    return sorted(set().union(*_overlaps(early, late).values()))


def _overlaps(early: Collection[str], late: Collection[str]) -> dict[str, set[str]]:
    """The same for each that is matched late."""
    heads: dict[str, list[str]] = {}
    tails: dict[str, list[str]] = {}
    for text in early if late else ():
        for n in range(1, len(text)):
            heads.setdefault(text[:n], []).append(text)
            tails.setdefault(text[n:], []).append(text)
    made: dict[str, set[str]] = {}
    for text in late:
        found = made[text] = {text} if any(other in text for other in early) else set()
        found |= {other for other in early if text in other}
        for n in range(1, len(text)):
            found |= {text[:n] + other for other in heads.get(text[n:], ())}
            found |= {other + text[n:] for other in tails.get(text[:n], ())}
    return made


def steps(part: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """The steps of a part of a tokenizer.json: those of a sequence one by one."""
    if part is not None and part["type"] == "Sequence":
        for item in next(part[key] for key in ("normalizers", "pretokenizers", "processors") if key in part):
            yield from steps(item)
    elif part is not None:
        yield part


def drop_prefix(spec: dict[str, Any]) -> bool:
    """Take the dummy prefix out of a tokenizer.json, in place; whether there was one."""
    changed = False

    def walk(part: Any) -> Any:
        nonlocal changed
        if not isinstance(part, dict):
            return part
        kind = part.get("type")
        if kind == "Sequence":
            for key in ("normalizers", "pretokenizers"):
                if key in part:
                    part[key] = [kept for item in part[key] if (kept := walk(item)) is not None]
        elif kind == "Prepend":
            changed = True
            return None
        elif kind == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            changed = True
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        elif kind == "ByteLevel" and part.get("add_prefix_space"):
            changed = True
            part["add_prefix_space"] = False
        return part

    spec["normalizer"] = walk(spec.get("normalizer"))
    spec["pre_tokenizer"] = walk(spec.get("pre_tokenizer"))
    return changed
