"""Text to ids, whatever the tokenizer: a `tokenizers.Tokenizer`, a slow tokenizer, or any ``text -> ids`` callable."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from chatloss.errors import TokenizerError

__all__ = ["CallableTokens", "Encoded", "FastTokens", "Tokens", "boundary_is_clean"]

Ids = npt.NDArray[np.int32]
# Characters that hardly any token of several characters begins with.
_ANCHORS = ("\u25c8", "\ue000", "\u00a4", "~", "=", "7")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids of a text, and where each token starts and ends in it (characters; None for tokenizers without offsets)."""

    ids: Ids
    starts: npt.NDArray[np.int32] | None = None
    ends: npt.NDArray[np.int32] | None = None


def boundary_is_clean(context: Ids, joint: Encoded, char: int) -> bool:
    """Whether a text's ids begin with `context`, those of its first `char` characters, and no token straddles them."""
    n = len(context)
    if len(joint.ids) < n or not np.array_equal(joint.ids[:n], context):
        return False
    if joint.starts is None or joint.ends is None or n in (0, len(joint.ids)):
        return True
    # Equal ids are not enough: a token such as Phi-3's <|assistant|> swallows the whitespace to its right.
    return bool(joint.starts[n] >= char and joint.ends[n - 1] <= char)


class Tokens(Protocol):
    """What the encoder needs of a tokenizer. Never adds special tokens: the template writes them."""

    special: Mapping[str, int]
    """Special tokens by text."""

    def encode(self, text: str) -> Encoded: ...

    def encode_segment(self, text: str) -> Encoded:
        """The ids of `text` where other text stands before it: no dummy prefix at its start."""
        ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_text(self, token: int) -> str | None:
        """The text of one token as its vocabulary writes it; None if it has none."""
        ...

    def ids_of(self, text: str) -> list[int]:
        """The ids of a stop or marker on its own."""
        ...


class FastTokens:
    """The `tokenizers` library: ids with character offsets. The given tokenizer itself is not changed."""

    def __init__(self, tokenizer: Any, *, owned: bool = False) -> None:
        """`owned`: nobody else holds `tokenizer`, so it need not be copied before its padding is switched off."""
        self._tokenizer = _bare(tokenizer if owned else _from_text(tokenizer.to_str()))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special: Mapping[str, int] = {token.content: i for i, token in added.items() if token.special}
        self.added: Mapping[str, int] = {token.content: i for i, token in added.items()}
        self._added_ids = np.array(sorted(added), dtype=np.int32)

    @cached_property
    def _segments(self) -> Any:
        """The same tokenizer without the prefix it writes before the first word; None where it writes none."""
        spec = json.loads(self._tokenizer.to_str())
        return _from_text(json.dumps(spec)) if _drop_prefix(spec) else None

    @cached_property
    def _prefixes_words(self) -> bool:
        """Whether the prefix is written before every word: words are split before it is, as XLM-R and T5 do."""
        pre_tokenizer = json.loads(self._tokenizer.to_str()).get("pre_tokenizer") or {}
        steps = [step.get("type") for step in pre_tokenizer.get("pretokenizers", ())]
        return "Metaspace" in steps[1:]

    def encode(self, text: str) -> Encoded:
        return _encoded(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_segment(self, text: str) -> Encoded:
        if self._segments is None:
            return self.encode(text)
        if self._prefixes_words:
            return self._behind_an_anchor(text)
        whole = _encoded(self._segments.encode(text, add_special_tokens=False))
        # Only the text before the first added token follows something; behind it the tokenizer does as it always does.
        first = np.flatnonzero(np.isin(whole.ids, self._added_ids))
        if not len(first) or whole.starts is None or whole.ends is None:
            return whole
        cut = int(whole.starts[first[0]])
        rest = self.encode(text[cut:])
        assert rest.starts is not None and rest.ends is not None
        n = int(first[0])
        return Encoded(
            np.concatenate([whole.ids[:n], rest.ids]),
            np.concatenate([whole.starts[:n], rest.starts + cut]),
            np.concatenate([whole.ends[:n], rest.ends + cut]),
        )

    def _behind_an_anchor(self, text: str) -> Encoded:
        """`text` encoded behind a character that no token shares with it, which is then taken away."""
        for anchor in _ANCHORS:
            before, both = self.encode(anchor).ids, self.encode(anchor + text)
            if boundary_is_clean(before, both, len(anchor)):
                assert both.starts is not None and both.ends is not None
                n = len(before)
                return Encoded(both.ids[n:], both.starts[n:] - len(anchor), both.ends[n:] - len(anchor))
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def token_text(self, token: int) -> str | None:
        text = self._tokenizer.id_to_token(token)
        return None if text is None else str(text)

    def ids_of(self, text: str) -> list[int]:
        if text in self.added:
            return [self.added[text]]
        return [int(i) for i in self.encode(text).ids]

    def serialised(self) -> str:
        """The tokenizer as a tokenizer.json holds it."""
        return str(self._tokenizer.to_str())

    @property
    def size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))


class CallableTokens:
    """Any function from text to ids, without offsets: boundaries are found by encoding prefixes."""

    def __init__(
        self, encode: Callable[[str], Sequence[int]], decode: Callable[[Sequence[int]], str] | None = None,
        special: Mapping[str, int] | None = None,
    ) -> None:
        self._encode = encode
        self._decode = decode
        self.special: Mapping[str, int] = dict(special or {})
        self._texts = {i: text for text, i in self.special.items()}

    def encode(self, text: str) -> Encoded:
        ids = self._encode(text) if text else []
        try:
            found = np.asarray(ids).reshape(-1)
            if found.size and found.dtype.kind not in "iu":
                raise TypeError(f"it holds {found.dtype.name} values")
            return Encoded(np.asarray(ids, dtype=np.int32).reshape(-1))
        except (TypeError, ValueError, OverflowError) as error:
            what = f"the tokenizer returned no list of ids: {error}"
            raise TokenizerError(what, hint="it must map a text to a list of ints") from None

    def encode_segment(self, text: str) -> Encoded:
        """`text` encoded behind an anchor, which is then taken away; a plain encoding where no anchor stands alone."""
        for anchor in ("\n", "a\n", ".", "a"):
            before, both = self.encode(anchor).ids, self.encode(anchor + text).ids
            if len(both) > len(before) and np.array_equal(both[: len(before)], before):
                tail = both[len(before) :]
                if self._decode is None or self.decode(both.tolist()) == self.decode(before.tolist()) + text:
                    return Encoded(tail)
        return self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        if self._decode is None:
            return " ".join(f"<{i}>" for i in ids)
        return self._decode(list(ids))

    def token_text(self, token: int) -> str | None:
        return self._texts.get(token)

    def ids_of(self, text: str) -> list[int]:
        return [self.special[text]] if text in self.special else [int(i) for i in self.encode(text).ids]


def _from_text(serialised: str) -> Any:
    from tokenizers import Tokenizer

    return _bare(Tokenizer.from_str(serialised))


def _bare(tokenizer: Any) -> Any:
    """Without truncation and padding: they are not the encoder's to do."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _encoded(encoding: Any) -> Encoded:
    offsets = np.asarray(encoding.offsets, dtype=np.int32).reshape(-1, 2)
    if len(offsets):  # NFC and byte-split characters may step back; a token is never before its predecessor
        offsets = np.maximum.accumulate(offsets, axis=0)
    return Encoded(np.asarray(encoding.ids, dtype=np.int32), offsets[:, 0], offsets[:, 1])


def _drop_prefix(spec: dict[str, Any]) -> bool:
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
