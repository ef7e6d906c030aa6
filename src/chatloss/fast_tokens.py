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
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from chatloss.tokens import NOTHING, Encoded, FastTokens, Ids

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
        ids, firsts = found[0].ids, found[1]
        self._sampled(texts, lambda k: self._placed(
            texts[k], ids[firsts[k] : firsts[k + 1]], None if texts[k].isascii() else texts[k].encode()))
        return found

    def _sampled(self, texts: Sequence[str], made: Callable[[int], Encoded]) -> None:
        """Now and then compare what was `made` of one of the texts, by its number, with what the reference makes."""
        self._encoded += sum(map(len, texts))
        if self._encoded > self._next_sample:
            k = self._encoded % len(texts)
            self._compare(texts[k], made(k))
            self._next_sample = self._encoded + SAMPLE * len(texts[k])

    def encode_at(
        self, texts: Sequence[str], chars: npt.NDArray[np.int32], counts: npt.NDArray[np.intp]
    ) -> tuple[Ids, list[int], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
        """The ids of texts that are encoded alone, and where those of each begin; and for each of `chars`, of which so
        many `counts` are of each text, the first token that starts at or after it, and the first that holds any of it.
        """
        found = self._bytes(texts)
        if found is None:
            made, firsts = super().encode_each(texts)
            assert made.starts is not None and made.ends is not None
            begins = np.array([0, *accumulate(map(len, texts))][:-1], np.int32)
            wanted = chars + begins.repeat(counts)
            return made.ids, firsts, made.starts.searchsorted(wanted), made.ends.searchsorted(wanted, "right")
        ids, firsts, ends, begins, encoded = found
        wanted = chars.copy()
        some = np.array([data is not None for data in encoded])
        if some.any():  # where characters begin: a token that holds a part of one counts as holding it
            own, there = some.repeat(counts), counts[some]
            char, byte = (
                np.array([0, *accumulate(sizes)][:-1]).repeat(there) for sizes in (
                    [len(text) for text, data in zip(texts, encoded, strict=True) if data is not None],
                    [len(data) for data in encoded if data is not None],
                )
            )
            wanted[own] = _begins(b"".join(filter(None, encoded)))[wanted[own] + char] - byte
        wanted += begins.repeat(counts)
        # A token starts where the one before it ends.
        starting, holding = ends.searchsorted(wanted) + (wanted > 0), ends.searchsorted(wanted, "right")
        self._sampled(texts, lambda k: self._placed(texts[k], ids[firsts[k] : firsts[k + 1]], encoded[k]))
        return ids, firsts, starting, holding

    def _flat(self, texts: Sequence[str]) -> tuple[Encoded, list[int]] | None:
        """As `encode_each`, with offsets from the sizes of tokens; None where these do not add up to the texts'."""
        text = "".join(texts)
        if not text:
            return NOTHING, [0] * (len(texts) + 1)
        found = self._bytes(texts)
        if found is None:
            return None
        ids, firsts, *_ = found
        return self._placed(text, ids, None if text.isascii() else text.encode()), firsts

    def _placed(self, text: str, ids: Ids, data: bytes | None) -> Encoded:
        """The tokens of a text. `data`: the text in UTF-8, None where each character takes one byte."""
        sizes = self._sizes.take(ids)
        ends: npt.NDArray[np.int32] = sizes.cumsum(dtype=np.int32)
        starts = ends - sizes
        if data is not None:  # a token that holds a part of a character counts as holding it
            begun = ((np.frombuffer(data, np.uint8) & 0xC0) != 0x80).cumsum(dtype=np.int32)
            starts, ends = begun[starts] - np.int32(1), begun[ends - 1]
        return Encoded(ids, starts, ends)

    def _bytes(self, texts: Sequence[str]) -> tuple[Ids, list[int], Ids, Ids, list[bytes | None]] | None:
        """The ids of texts; where those of each begin; at which byte of all texts each token ends, and where each text
        begins; and the texts in UTF-8, None for those of which each character takes one byte.

        None where the sizes of the tokens do not add up to the texts', or the library would not encode alike.
        """
        encoded = [None if text.isascii() else text.encode() for text in texts]
        if self._unlike and any(part in text for part in self._unlike for text in texts):
            return None
        if self._composes and not all(
            data is None or unicodedata.is_normalized("NFC", text) for text, data in zip(texts, encoded, strict=True)
        ):
            return None
        found, bounds = self._fast.encode_batch_flat(texts)
        ids, lasts = np.frombuffer(found, np.int32), np.frombuffer(bounds, np.int64)
        ends: npt.NDArray[np.int32] = self._sizes.take(ids).cumsum(dtype=np.int32)
        sizes = np.array([len(text if data is None else data) for text, data in zip(texts, encoded, strict=True)])
        if not len(ends) or not np.array_equal(sizes.cumsum(), ends[lasts[1:] - 1]):
            return None
        return ids, lasts.tolist(), ends, ends[lasts[1:] - 1] - sizes.astype(np.int32), encoded

    def _compare(self, text: str, found: Encoded | None) -> None:
        wanted = super()._alone(text)
        if found is not None:
            pairs = ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends))
            if not all(np.array_equal(a, b) for a, b in pairs):  # type: ignore[arg-type]
                raise Unequal(text)


def _begins(data: bytes) -> npt.NDArray[np.intp]:
    """At which byte each character of a text in UTF-8 begins, and where the last one ends."""
    return np.append(np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80), len(data))


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
