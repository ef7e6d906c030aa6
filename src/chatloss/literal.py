"""Control strings that somebody typed, as ids of ordinary text: `control_tokens = "literal"`.

The ids are those of a tokenizer that matches its added tokens outside typed text only: of what is outside, the longest
of those that begin leftmost (those that are matched before normalising first), none of which reaches into typed text.
What lies between two of them, typed text included, is encoded as the tokenizer encodes ordinary text, and no model
makes a control token out of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.errors import TokenizerError
from chatloss.fast_tokens import FlatTokens
from chatloss.tokens import Encoded, FastTokens, Tokens
from chatloss.typed import Typed, Unproven

__all__ = ["LiteralTokens", "PrivateTokens", "cannot", "why_not_literal"]

_FIRST, _LAST = 0xF0000, 0xFFFFD  # the characters that stand for added tokens: private ones


def why_not_literal(tokens: Tokens) -> str:
    """Why a tokenizer cannot encode control strings as ordinary text; "" if it can."""
    if not isinstance(tokens, FastTokens):
        return "it is a function from text to ids, which does not say where it matches special tokens"
    if any(token.single_word for token in tokens.added_tokens):
        return "some of its added tokens are matched as whole words only"
    if tokens.normalises and any(token.normalized for token in tokens.added_tokens):
        return "some of its added tokens are matched in normalised text"
    return "it has too many added tokens" if len(tokens.added) > _LAST - _FIRST else ""


class PrivateTokens:
    """A tokenizer with its added tokens spelled in private characters, one each, so that no text of users is one.

    It does all else with them that the tokenizer does: cuts at them, swallows the space beside them.
    Raises `TokenizerError` where that cannot be had.
    """

    def __init__(self, tokens: Tokens, name: str) -> None:
        why = why_not_literal(tokens)
        if why or not isinstance(tokens, FastTokens):
            raise cannot(name, why)
        from tokenizers import Tokenizer

        self.reference = tokens
        spec = json.loads(tokens.serialised())
        self._chars = _respelled(spec)
        self.tokens = FastTokens(Tokenizer.from_str(json.dumps(spec)), owned=True)
        added = tokens.added_tokens
        self._phases = [
            re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
            for late in (False, True) if (texts := [token.content for token in added if token.normalized is late])
        ]
        self._reserved = re.compile(f"[{''.join(self._chars.values())}]") if self._chars else re.compile(r"(?!)")
        self._widths = np.ones(_LAST - _FIRST + 1, np.int32)
        self._ids = np.arange(max(self.tokens.size, tokens.size) + 1, dtype=np.int32)
        ordinary = set(_ids_of(spec["model"]).values())
        for text, char in self._chars.items():
            self._widths[ord(char) - _FIRST] = len(text)
            found = self.tokens.added.get(char)
            if found is None or (found != tokens.added[text] and found in ordinary) or found >= len(self._ids):
                raise cannot(name, f"{text!r} cannot be told from ordinary text")
            self._ids[found] = tokens.added[text]
        self._check(name)

    def _check(self, name: str) -> None:
        """Where nothing was typed both must do the same."""
        texts = list(self._chars)[:64]
        text = "".join(f"Say {a} now {b}{a}\n\n{b} \n" for a, b in zip(texts, [*texts[1:], *texts[:1]], strict=True))
        private = self.private(text)
        wanted, found = self.reference._alone(text), self.public(self.tokens.encode(private), self.places(private))
        for a, b in ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends)):
            if not np.array_equal(a, b):  # type: ignore[arg-type]
                raise cannot(name, "its added tokens cannot be spelled in another way")

    def private(self, text: str) -> str:
        """A text in which nothing was typed, with its added tokens in private characters. Raises `Unproven`."""
        self.ordinary(text)
        for phase in self._phases:
            text = phase.sub(lambda match: self._chars[match[0]], text)
        return text

    def ordinary(self, text: str) -> str:
        """The text as it is. Raises `Unproven` if it holds private characters itself."""
        held = self._reserved.search(text)
        if held is not None:
            raise Unproven(f"the text holds the private character U+{ord(held[0]):04X}")
        return text

    def places(self, private: str) -> npt.NDArray[np.int32]:
        """Where each character of a private text stands in the text it is of, and the end of that."""
        codes = np.frombuffer(private.encode("utf-32-le"), np.uint32).astype(np.int64)
        widths = np.ones(len(codes), np.int32)
        reserved = (codes >= _FIRST) & (codes <= _LAST)
        widths[reserved] = self._widths[codes[reserved] - _FIRST]
        return np.concatenate((np.zeros(1, np.int32), widths.cumsum(dtype=np.int32)))

    def public(self, encoded: Encoded, places: npt.NDArray[np.int32]) -> Encoded:
        """The tokens of a private text with the ids of the tokenizer, and their places in the text it is of."""
        assert encoded.starts is not None and encoded.ends is not None
        return Encoded(self._ids[encoded.ids], places[encoded.starts], places[encoded.ends])


class _Private(NamedTuple):
    """A text with sentinels, the private text of what it stands for, and the places of that in it."""

    text: str
    private: str
    places: npt.NDArray[np.int32]


class LiteralTokens:
    """`Tokens` for the texts of one conversation with sentinels: the ids are those of what was typed, as plain text.

    Offsets are places in the text with sentinels, which are those of the text that they stand for.
    """

    def __init__(self, private: PrivateTokens, typed: Typed) -> None:
        self._private, self._typed = private, typed
        self._reference = private.reference
        self.special = self._reference.special
        self._longest = _Private("", "", np.zeros(1, np.int32))
        self._reach = max(map(len, typed.written), default=0)

    def restored(self, text: str) -> str:
        return self._typed.restored(text)

    def _made(self, text: str) -> _Private:
        longest = self._longest
        if longest.text.startswith(text):  # and no added token stands over its end
            n = int(longest.places.searchsorted(len(text)))
            if longest.places[n] == len(text):
                return _Private(text, longest.private[:n], longest.places[: n + 1])
        private = "".join(
            self._private.ordinary(self._typed.written[part]) if i % 2 else self._private.private(part)
            for i, part in enumerate(self._typed.pattern.split(text))
        )
        made = _Private(text, private, self._private.places(private))
        if len(text) > len(longest.text):
            self._longest = made
        return made

    def encode(self, text: str) -> Encoded:
        return self.encode_pair(text, "")[0]

    def encode_pair(self, prompt: str, target: str) -> tuple[Encoded, int | None]:
        before = prompt[-self._reach :]
        for match in self._typed.pattern.finditer(before + target[: self._reach]):
            if match.start() < len(before) < match.end():
                raise Unproven("an answer seems to begin within it")
        if isinstance(self._reference, FlatTokens):
            self._reference.fell_back += 1
        joint = self._made(prompt + target)
        alone = self._made(prompt).private
        if joint.private.startswith(alone):
            encoded, n = self._private.tokens.encode_pair(alone, joint.private[len(alone) :])
        else:  # an added token straddles the boundary
            encoded, n = self._private.tokens.encode(joint.private), None
        return self._private.public(encoded, joint.places), n

    def encode_segment(self, text: str) -> Encoded:
        made = self._made(text)
        return self._private.public(self._private.tokens.encode_segment(made.private), made.places)

    def decode(self, ids: Sequence[int]) -> str:
        return self._reference.decode(ids)

    def token_text(self, token: int) -> str | None:
        return self._reference.token_text(token)

    def ids_of(self, text: str) -> list[int]:
        return self._reference.ids_of(text)


def cannot(name: str, why: str) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer {name} cannot encode control strings as ordinary text: {why}",
        hint="--control-tokens reject|parity, or a tokenizer.json", kind="literal",
    )


def _respelled(spec: dict[str, Any]) -> dict[str, str]:
    """Give the added tokens of a tokenizer.json private characters for names, in place; these by text.

    The model forgets the old names as well, lest it make one out of ordinary text, as Unigram models do; but not
    those that merges are made of.
    """
    model = spec["model"]
    vocab, merged = _ids_of(model), _merged(model)
    free = (char for char in map(chr, range(_FIRST, _LAST + 1)) if char not in vocab)
    names = {token["content"]: next(free) for token in spec["added_tokens"]}
    for token in spec["added_tokens"]:
        token["content"] = names[token["content"]]
    gone = {text: char for text, char in names.items() if text in vocab and text not in merged
            and not re.fullmatch(r"<0x[0-9A-F]{2}>", text)}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {gone.get(text, text): index for text, index in model["vocab"].items()}
    else:
        model["vocab"] = [[gone.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in gone:
        model["unk_token"] = gone[model["unk_token"]]
    return names


def _ids_of(model: Mapping[str, Any]) -> dict[str, int]:
    vocab = model["vocab"]
    return dict(vocab) if isinstance(vocab, dict) else {text: i for i, (text, _) in enumerate(vocab)}


def _merged(model: Mapping[str, Any]) -> set[str]:
    """What merges join, and what they make."""
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges") or ()]
    return {text for a, b in pairs for text in (a, b, a + b)}
