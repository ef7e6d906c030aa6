"""`fastokens` behind the interface of `Tokens`: the same ids some fifty times faster, used only where shown equal.

It tells no offsets. Those of a byte-level tokenizer follow from its ids, because each token stands for a fixed number
of bytes. Where that does not hold (a token that swallows whitespace, text that the normaliser changes), and where added
tokens overlap that it looks for in another order, the reference encodes the text. Equality is checked when a tokenizer
is loaded for the first time, over texts that hold its own added tokens, and on a sample of everything that is encoded
later: the first difference ends its use.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.cuts import overlaps, steps
from chatloss.errors import TokenizerError, UsageError
from chatloss.load import Loaded
from chatloss.remembered import remember, remembered
from chatloss.tokens import NOTHING, Encoded, FastTokens

__all__ = ["ENCODERS", "FlatTokens", "Unequal", "loaded_with"]

ENCODERS = ("auto", "reference", "fast")
LARGEST_ID, MOST_PAIRS = 2**24, 2**24
SAMPLE = 512  # one character in so many is encoded by both
# Scripts, spaces, digits and punctuation of all kinds: what pre-tokenizers tell apart.
TEXTS = (
    "The quick brown fox can't jump over 12345 lazy dogs, I'll say; they've  two   spaces.\n\n\tTabs\r\nand lines \n ",
    "def f(x: int) -> str:\n    return f\"{x!r:>{10}}\"  # comment\n\nclass A:\n\tpass\n</tool_call>{\"a\": [1, 2.5]}",
    "你好，世界！天気がいいですね。안녕하세요 여러분? Привет, как дела? Γειά σου Κόσμε. مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया। สวัสดีชาวโลก ಕನ್ನಡ தமிழ் ბარევი Բարեւ አማርኛ ភាសាខ្មែរ Tiếng Việt",
    "İstanbul’da çğış naïve café Ålesund 🙂👩\u200d👩\u200d👧🏽🇩🇪 ½ ² ① Ⅷ ﬁ ﷺ \U0001f9d1\u200d\U0001f680",
    "\u00a0\u2003\u200b\ufeff\u202e x̄ e\u0301 a\u0308\u0323 \ufffd \u3000 wide\x0b\x0c\x1c\x85 odd \t \t mixed",
    "Ġ Ċ ▁ <0x0A> ##ing </s> <unk> [INST] it's IT'S it’s 1st 2,000,000 3.14 0x1F a_b c-d e/f g\\h i@j k#l $m %n ^o",
    "    indented\n        more\n\n\n\nand    inner     runs of      spaces, trailing ones too     \n      ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!!!!!!!!!!!!!!!!----------==========~~~~~~~~......…“”«»",
)


class Unequal(Exception):
    """The two encoders differ on a text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"the fast encoder differs from the reference on {self.text[:80]!r}"


class FlatTokens(FastTokens):
    """A `FastTokens` whose `encode` goes through `fastokens`. Raises `TokenizerError` where that cannot do the same.

    `encode` raises `Unequal` if a sampled text shows a difference; `fell_back` counts texts left to the reference.
    """

    def __init__(self, reference: FastTokens) -> None:
        super().__init__(reference._tokenizer, owned=True)
        serialised = self.serialised()
        spec = json.loads(serialised)
        reason = _not_byte_level(spec) or _too_large(spec)
        if reason:
            raise TokenizerError(f"the fast encoder cannot tell offsets: {reason}", hint="--encoder reference")
        self._composes = "NFC" in json.dumps(spec.get("normalizer"))
        self._sizes = _byte_sizes(spec)
        late = {token["content"] for token in spec["added_tokens"] if token.get("normalized")}
        self._unlike = overlaps(set(self.added) - late, late)
        del spec  # before the library takes as much memory again
        try:
            import fastokens

            self._fast = fastokens.Tokenizer.from_json_str(serialised)
        except ImportError:
            raise TokenizerError("the fast encoder is not installed", hint="pip install fastokens") from None
        except Exception as error:  # the library raises plain exceptions for what it does not support
            raise TokenizerError(f"the fast encoder refuses: {error}", hint="--encoder reference") from None
        self._encoded = self._next_sample = self.fell_back = 0
        fact = _checked(serialised, [*_texts(self.added)])
        if not remembered("equal", fact):
            for text in _texts(self.added):
                found = self._flat([text])
                self._compare(text, found and found[0])
            remember("equal", fact)

    def encode_pair(self, prompt: str, target: str) -> tuple[Encoded, int | None]:
        found = super().encode_pair(prompt, target)
        if self._encoded > self._next_sample:
            self._compare(prompt + target, found[0])
            self._next_sample = self._encoded + SAMPLE * len(prompt + target)
        return found

    def _alone(self, text: str) -> Encoded:
        self._encoded += len(text)
        found = self._flat([text])
        if found is None:
            self.fell_back += 1
            return super()._alone(text)
        return found[0]

    def encode_each(self, texts: Sequence[str]) -> tuple[Encoded, list[int]]:
        found = self._flat(texts)
        if found is None:
            return super().encode_each(texts)
        self._encoded += sum(map(len, texts))
        if self._encoded > self._next_sample:
            tails, k = found[0], self._encoded % len(texts)
            assert tails.starts is not None and tails.ends is not None
            first, last = found[1][k : k + 2]
            begin = np.int32(sum(map(len, texts[:k])))
            own = Encoded(tails.ids[first:last], tails.starts[first:last] - begin, tails.ends[first:last] - begin)
            self._compare(texts[k], own)
            self._next_sample = self._encoded + SAMPLE * len(texts[k])
        return found

    def _flat(self, texts: Sequence[str]) -> tuple[Encoded, list[int]] | None:
        """As `encode_each`, with offsets from the sizes of tokens; None where these do not add up to the texts'."""
        text = "".join(texts)
        if not text:
            return NOTHING, [0] * (len(texts) + 1)
        if self._unlike and any(part in text for part in self._unlike):
            return None
        plain, size = text.isascii(), len(text)
        if not plain:
            if self._composes and not unicodedata.is_normalized("NFC", text):
                return None
            data = np.frombuffer(text.encode(), np.uint8)
            size = len(data)
        found, bounds = self._fast.encode_batch_flat(texts)
        ids = np.frombuffer(found, np.int32)
        sizes = self._sizes.take(ids)
        ends: npt.NDArray[np.int32] = sizes.cumsum(dtype=np.int32)
        if not len(ends) or ends[-1] != size:
            return None
        firsts = [0, len(ids)]
        if len(texts) > 1:
            lasts = np.frombuffer(bounds, np.int64)
            firsts = lasts.tolist()
            lengths = [len(text if plain else text.encode()) for text in texts]
            if ends[lasts[1:] - 1].tolist() != list(accumulate(lengths)):
                return None
        starts = ends - sizes
        if not plain:  # a token that holds a part of a character counts as holding it
            begun = ((data & 0xC0) != 0x80).cumsum(dtype=np.int32)
            starts, ends = begun[starts] - np.int32(1), begun[ends - 1]
        return Encoded(ids, starts, ends), firsts

    def _compare(self, text: str, found: Encoded | None) -> None:
        wanted = super()._alone(text)
        if found is not None:
            pairs = ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends))
            if not all(np.array_equal(a, b) for a, b in pairs):  # type: ignore[arg-type]
                raise Unequal(text)


def loaded_with(loaded: Loaded, encoder: str, note: Any = None) -> Loaded:
    """`loaded` with the tokens of `encoder`, one of `ENCODERS`.

    "fast" raises `TokenizerError` where it cannot be used; "auto" then stays with the reference, and tells
    `note` why.
    """
    if encoder not in ENCODERS:
        raise UsageError(f"there is no encoder {encoder!r}", where="--encoder", hint=f"one of {', '.join(ENCODERS)}")
    if encoder == "reference":
        return loaded
    try:
        if type(loaded.tokens) is not FastTokens:
            raise TokenizerError("the fast encoder needs a tokenizer.json", hint="--encoder reference")
        return replace(loaded, tokens=FlatTokens(loaded.tokens))
    except Unequal as error:
        refusal = TokenizerError(str(error), hint="--encoder reference")
    except TokenizerError as error:
        refusal = error
    if encoder == "fast":
        raise refusal
    if note is not None:
        note(f"encoding with the reference: {refusal.what}")
    return loaded


def _checked(serialised: str, texts: Sequence[str]) -> dict[str, str]:
    """What a check of a tokenizer depends on."""
    fact = {name: version(name) for name in ("chatloss", "fastokens", "tokenizers")}
    shown = {"tokenizer": serialised, "texts": "\0".join(texts)}
    return fact | {name: hashlib.sha256(text.encode()).hexdigest() for name, text in shown.items()}


def _not_byte_level(spec: Mapping[str, Any]) -> str:
    """Why the tokens of a tokenizer.json do not each stand for a fixed number of the text's bytes; "" if they do."""
    split = list(steps(spec.get("pre_tokenizer")))
    if spec["model"].get("type") != "BPE" or not any(step["type"] == "ByteLevel" for step in split):
        return "its tokens are not byte-level"
    if any(step["type"] == "ByteLevel" and step.get("add_prefix_space") for step in split):
        return "it puts a space before a text"
    if any(step["type"] != "NFC" for step in steps(spec.get("normalizer"))):
        return "it normalises text"
    behind = steps(spec.get("post_processor"))
    if any(step["type"] == "ByteLevel" and step.get("trim_offsets") for step in behind):
        return "it trims offsets"
    return ""


def _too_large(spec: Mapping[str, Any]) -> str:
    """Why tables over the ids, or over pairs of added tokens, would take too much memory or time; "" if they do not."""
    ids = [*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])]
    if max(ids, default=0) >= LARGEST_ID:
        return f"it has the id {max(ids):,}"
    late = sum(bool(token.get("normalized")) for token in spec["added_tokens"])
    return "it has too many added tokens" if late * (len(spec["added_tokens"]) - late) > MOST_PAIRS else ""


def _byte_sizes(spec: Mapping[str, Any]) -> npt.NDArray[np.int32]:
    """Bytes by id: in a byte-level vocabulary every character stands for one byte; added tokens are plain text."""
    sizes = {index: len(token) for token, index in spec["model"]["vocab"].items()}
    sizes |= {token["id"]: len(token["content"].encode()) for token in spec["added_tokens"]}
    found = np.zeros(max(sizes) + 1, np.int32)
    found[list(sizes)] = list(sizes.values())
    return found


def _texts(added: Sequence[str] | Mapping[str, int]) -> Iterator[str]:
    """Texts that show a tokenizer whole: all of `TEXTS`, and added tokens between their pieces and each other."""
    yield from TEXTS
    names = list(added)
    names = names if len(names) <= 64 else [*names[:32], *names[32 :: len(names) // 32]]
    words = [word for text in TEXTS for word in text.split(" ")]
    for i, name in enumerate(names):
        before, behind, other = words[3 * i % len(words)], words[(7 * i + 1) % len(words)], names[(i + 1) % len(names)]
        yield f"{before}{name}{behind} {name}\n{name}{other} {before}\n"
