"""Text to ids, whatever the tokenizer: a `tokenizers.Tokenizer`, a slow tokenizer, or any ``text -> ids`` callable."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from chatloss.cuts import drop_prefix, hard_cuts, steps
from chatloss.errors import TokenizerError
from chatloss.fields import common_prefix

__all__ = ["NOTHING", "Branch", "CallableTokens", "Encoded", "FastTokens", "Tokens"]

Ids = npt.NDArray[np.int32]
_SHORT, _MANY = 64, 4096  # so many texts of at most so many characters are kept encoded
# Characters that hardly any token of several characters begins with.
_ANCHORS = ("\u25c8", "\ue000", "\u00a4", "~", "=", "7")


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Ids of a text, and where each token starts and ends in it (characters; None for tokenizers without offsets)."""

    ids: Ids
    starts: npt.NDArray[np.int32] | None = None
    ends: npt.NDArray[np.int32] | None = None

    def tokens_at(self, chars: Sequence[int]) -> tuple[list[int], list[int]]:
        """For each of `chars` the first token that starts at or after it, and the first that holds any of it."""
        assert self.starts is not None and self.ends is not None
        wanted = np.array(chars, self.starts.dtype)
        return self.starts.searchsorted(wanted).tolist(), self.ends.searchsorted(wanted, "right").tolist()


NOTHING = Encoded(*(np.zeros(0, np.int32) for _ in range(3)))


@dataclass(frozen=True, slots=True, eq=False)
class _Trunk:
    """A text, its tokens, and its hard cuts: where they begin and end, and how many tokens there are through each."""

    text: str
    encoded: Encoded
    starts: list[int]
    ends: list[int]
    counts: list[int]


class Branch(NamedTuple):
    """A text of `size` tokens, of which `context` are those of its prompt, beside the trunk.

    It shares `shared` tokens with the trunk, through the hard cut at character `cut`; the others are tokens `first` and
    on of all the tails, which begin at their character `begin`.
    """

    context: int
    size: int
    shared: int
    cut: int
    first: int = 0
    begin: int = 0

    @property
    def along(self) -> bool:
        """Whether it is a part of the trunk."""
        return self.shared == self.size


class Tokens(Protocol):
    """What the encoder needs of a tokenizer. Never adds special tokens: the template writes them."""

    special: Mapping[str, int]
    """Special tokens by text."""

    def encode(self, text: str) -> Encoded: ...

    def encode_pair(self, prompt: str, target: str) -> tuple[Encoded, int | None]:
        """`prompt + target` encoded, and how many of the ids are those of `prompt` alone; None if these are others."""
        ...

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
        self.added_tokens: Sequence[Any] = tuple(added.values())
        self._added_ids = np.array(sorted(added), dtype=np.int32)
        self._cuts = hard_cuts(self._tokenizer, added)
        self._reach = max(map(len, self.added), default=0)
        self._is_cut = np.zeros(max(self._cuts, default=0) + 2, bool)
        self._is_cut[list(self._cuts)] = True
        self._trunk = _Trunk("", NOTHING, [], [], [])
        self._short: dict[str, Encoded] = {}

    @property
    def normalises(self) -> bool:
        """Whether text is changed before it is cut into words."""
        normalizer = self._tokenizer.normalizer
        return normalizer is not None and any(steps(json.loads(normalizer.__getstate__())))

    @cached_property
    def _segments(self) -> Any:
        """The same tokenizer without the prefix it writes before the first word; None where it writes none."""
        spec = json.loads(self._tokenizer.to_str())
        return _from_text(json.dumps(spec)) if drop_prefix(spec) else None

    @cached_property
    def _prefixes_words(self) -> bool:
        """Whether the prefix is written before every word: words are split before it is, as XLM-R and T5 do."""
        pre_tokenizer = json.loads(self._tokenizer.to_str()).get("pre_tokenizer") or {}
        steps = [step.get("type") for step in pre_tokenizer.get("pretokenizers", ())]
        return "Metaspace" in steps[1:]

    def encode(self, text: str) -> Encoded:
        """Ids and offsets, read-only. Of a text that begins as one before, only what differs is encoded."""
        return self.encode_pair(text, "")[0]

    def encode_pair(self, prompt: str, target: str) -> tuple[Encoded, int | None]:
        """As `Tokens` has it; best given the longest text of a conversation first.

        A tokenizer cuts a text at its added tokens before anything else, from left to right, and encodes what lies
        between on its own. Two texts that are equal through an added token therefore have the same ids up to there and
        independent ids behind it, unless where they part an added token may be open that begins no later. Of a text
        that only ends sooner than the other no added token is open that the other does not have.
        """
        text, trunk, end = prompt + target, self._trunk, len(prompt)
        begun = trunk.text.startswith(prompt)
        if begun and trunk.text.startswith(target, end):
            n, at = self._cut(trunk, len(text))
            joint = _joined(trunk.encoded, n, at, self._rest(text, at))
            n, at = self._cut(trunk, end)
        else:
            n, at = self._cut(trunk, end if begun else common_prefix(trunk.text, text), differs=True)
            joint = _joined(trunk.encoded, n, at, self._rest(text, at))
            if not begun:  # else shorter prompts are the trunk's as well, and longer ones would not be this text's
                self._trunk = trunk = _Trunk(text, _read_only(joint), *self._cut_places(text, joint))
                n, at = self._cut(trunk, end)
        return joint, self._boundary(joint, n, self._rest(prompt, at), end)

    def _cut(self, trunk: _Trunk, limit: int, *, differs: bool = False) -> tuple[int, int]:
        """(tokens, characters) through the trunk's last hard cut up to character `limit`; (0, 0) where there is none.

        `differs`: the cut is also one of texts that are like the trunk up to there and then go on in another way.
        """
        for i in range(bisect_right(trunk.ends, limit) - 1, -1, -1):
            longer = range(limit - trunk.starts[i], min(limit + 1, self._reach)) if differs else ()
            if not any(trunk.text[limit - size : limit] in self._heads for size in longer):
                return trunk.counts[i], trunk.ends[i]
        return 0, 0

    @cached_property
    def _heads(self) -> frozenset[str]:
        """What added tokens begin with: an open end of a text may go on to be one of them."""
        return frozenset(text[:size] for text in self.added for size in range(1, len(text)))

    def last_cut(self, text: str, encoded: Encoded, limit: int) -> tuple[int, int, int] | None:
        """Where the last hard cut up to character `limit` begins and ends, and its id."""
        assert encoded.starts is not None and encoded.ends is not None
        within = encoded.ids[: encoded.ends.searchsorted(limit, "right")]
        for at in reversed(self._is_cut.take(within, mode="clip").nonzero()[0].tolist()):
            begin, end, token = (int(array[at]) for array in (encoded.starts, encoded.ends, encoded.ids))
            if text[begin:end] == self._cuts[token]:
                return begin, end, token
        return None

    def may_go_on(self, text: str) -> bool:
        """Whether a text that ends with this one may end within an added token that began before it."""
        return any(head.endswith(text) for head in self._heads)

    def _boundary(self, joint: Encoded, n: int, rest: Encoded, length: int) -> int | None:
        """How many ids of `joint` are those of its first `length` characters, which end in `n` ids and `rest`."""
        assert joint.starts is not None and joint.ends is not None
        end = n + len(rest.ids)
        if joint.ids[n:end].tobytes() != rest.ids.tobytes():
            return None
        # Equal ids are not enough: a token such as Phi-3's <|assistant|> swallows the whitespace to its right.
        apart = end in (0, len(joint.ids)) or (joint.starts[end] >= length >= joint.ends[end - 1])
        return end if apart else None

    def branches(
        self, joint: Encoded, prompt: str, others: Sequence[tuple[int, str]]
    ) -> tuple[list[Branch], Encoded] | None:
        """The texts ``prompt[:end] + target``, for each (end, target), and the tails of those that leave `joint`.

        `joint` is what `encode_pair` gave of `prompt` just now. None where one neither ends within that at a hard cut,
        nor leaves it behind its own prompt. Whether the ids of a prompt end where it does is for the offsets to say.
        """
        trunk, ids, width = self._trunk, joint.ids.tobytes(), joint.ids.itemsize
        made: list[Branch] = []
        texts: list[str] = []
        for end, target in others:
            along = prompt.startswith(target, end)
            n, at = self._cut(trunk, end, differs=not along)
            rest = self._piece(prompt[at:end]).ids if at < end else NOTHING.ids
            size, cut = self._cut(trunk, end + len(target)) if along else (0, at)
            if not n or not ids.startswith(rest.tobytes(), n * width) or (along and cut != end + len(target)):
                return None
            made.append(Branch(n + len(rest), size, size or n, cut))
            if not along:
                texts.append(prompt[at:end] + target)
        if not texts:
            return made, NOTHING
        tails, firsts = self.encode_each(texts)
        own, parts, begin = tails.ids.tobytes(), zip(texts, pairwise(firsts), strict=True), 0
        for k, (context, size, n, at, *_) in enumerate(made):
            if not size:
                text, (first, last) = next(parts)
                tail = own[first * width : last * width]
                if ids.startswith(tail, n * width) or not tail.startswith(ids[n * width : context * width]):
                    return None
                made[k] = Branch(context, n + last - first, n, at, first, begin)
                begin += len(text)
        return made, tails

    def encode_each(self, texts: Sequence[str]) -> tuple[Encoded, list[int]]:
        """The tokens of texts that are encoded alone, placed as in all of them joined; where those of each begin."""
        made = [self._alone(text) for text in texts]
        begins = [0, *accumulate(len(text) for text in texts)]
        starts = [one.starts + at for one, at in zip(made, begins, strict=False) if one.starts is not None]
        ends = [one.ends + at for one, at in zip(made, begins, strict=False) if one.ends is not None]
        ids = [one.ids for one in made]
        return Encoded(*map(np.concatenate, (ids, starts, ends))), [0, *accumulate(map(len, ids))]

    def encode_like(self, first: str, texts: Sequence[str], known: Sequence[int]) -> list[Encoded]:
        """The tokens of texts, encoded at once but for what they begin with that `first` does: so much is `known`."""
        self.encode(first)
        trunk, made, begin, pairs = self._trunk, list[Encoded](), np.int32(0), zip(texts, known, strict=True)
        cuts = [self._cut(trunk, common_prefix(first, text, n), differs=True) for text, n in pairs]
        tails, firsts = self.encode_each([text[at:] for text, (_, at) in zip(texts, cuts, strict=True)])
        assert tails.starts is not None and tails.ends is not None
        for text, (n, at), own in zip(texts, cuts, map(slice, firsts, firsts[1:]), strict=True):
            tail = Encoded(tails.ids[own], tails.starts[own] - begin, tails.ends[own] - begin)
            made.append(_joined(trunk.encoded, n, at, tail))
            begin += np.int32(len(text) - at)
        return made

    def _cut_places(self, text: str, encoded: Encoded) -> tuple[list[int], list[int], list[int]]:
        """Where hard cuts begin and end in a text, and how many tokens it has through each."""
        assert encoded.starts is not None and encoded.ends is not None
        found = self._is_cut.take(encoded.ids, mode="clip").nonzero()[0]
        places = zip(*(array[found].tolist() for array in (encoded.starts, encoded.ends, encoded.ids)), strict=True)
        # The model may give an added token's id to other text: as the unknown token, or once it is normalised.
        counts = (found + 1).tolist()
        kept = [(a, b, n) for (a, b, i), n in zip(places, counts, strict=True) if text[a:b] == self._cuts[i]]
        return [a for a, _, _ in kept], [b for _, b, _ in kept], [n for _, _, n in kept]

    def _rest(self, text: str, at: int) -> Encoded:
        """`text` from a cut on. Behind the last one there is nothing, which is less than an empty text to some."""
        return self._piece(text[at:]) if at < len(text) or not at else NOTHING

    def _piece(self, text: str) -> Encoded:
        """What stands between two cuts. Headers come again and again."""
        found = self._short.get(text)
        if found is None:
            found = self._alone(text)
            if len(text) <= _SHORT and len(self._short) < _MANY:
                self._short[text] = _read_only(found)
        return found

    def _alone(self, text: str) -> Encoded:
        return _encoded(self._tokenizer.encode(text, add_special_tokens=False))

    def encode_segment(self, text: str) -> Encoded:
        if self._segments is None:
            return self._piece(text)
        if self._prefixes_words:
            return self._behind_an_anchor(text)
        whole = _encoded(self._segments.encode(text, add_special_tokens=False))
        # Only the text before the first added token follows something; behind it the tokenizer does as it always does.
        first = np.flatnonzero(np.isin(whole.ids, self._added_ids))
        if not len(first) or whole.starts is None or whole.ends is None:
            return whole
        cut = int(whole.starts[first[0]])
        return _joined(whole, int(first[0]), cut, self._piece(text[cut:]))

    def _behind_an_anchor(self, text: str) -> Encoded:
        """`text` encoded behind a character that no token shares with it, which is then taken away."""
        for anchor in _ANCHORS:
            both = self._piece(anchor + text)
            n = self._boundary(both, 0, self._piece(anchor), len(anchor))
            if n is not None:
                assert both.starts is not None and both.ends is not None
                return Encoded(both.ids[n:], both.starts[n:] - len(anchor), both.ends[n:] - len(anchor))
        return self._piece(text)

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

    def encode_pair(self, prompt: str, target: str) -> tuple[Encoded, int | None]:
        alone, joint = self.encode(prompt).ids, self.encode(prompt + target)
        return joint, len(alone) if np.array_equal(joint.ids[: len(alone)], alone) else None

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


def _read_only(encoded: Encoded) -> Encoded:
    for array in (encoded.ids, encoded.starts, encoded.ends):
        if array is not None:
            array.flags.writeable = False
    return encoded


def _joined(known: Encoded, n: int, at: int, rest: Encoded) -> Encoded:
    """The first `n` tokens of `known`, which end at character `at`, and what follows them."""
    assert known.starts is not None and known.ends is not None and rest.starts is not None and rest.ends is not None
    if not n:
        return rest
    if not len(rest.ids):
        return Encoded(known.ids[:n], known.starts[:n], known.ends[:n])
    return Encoded(
        np.concatenate((known.ids[:n], rest.ids)), np.concatenate((known.starts[:n], rest.starts + at)),
        np.concatenate((known.ends[:n], rest.ends + at)),
    )
