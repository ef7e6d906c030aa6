"""The tokens of many texts at once, and where characters lie in them: in arrays over all texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.tokens import FastTokens, Ids

__all__ = ["Cut", "Draft", "Layout", "Placed", "placed"]

# Whose a token is that reaches across a place: nobody's, it may not be; of what ends there; of what begins there.
_FIRM, _BEFORE, _BEHIND = range(3)


class Cut(NamedTuple):
    """The added token `token` between two places, at which any text is cut, and the ids `rest` from there to a third.

    A text that ends at the third has then the same ids as this one up to there. Places are numbered. Where `token` is
    -1 there is none, and both are the beginning of the text.
    """

    begin: int
    end: int
    until: int
    token: int
    rest: Ids


class Layout:
    """What must hold at the `count` places of a text: the first `spans` + 1 of them part its spans, the last ends it.

    `loose`: places that a token may reach across, and whether it then belongs to what begins there. `zero`: the place
    at which the text begins.
    """

    __slots__ = ("count", "cuts", "follow", "loose", "rest", "sizes", "spans", "tokens", "zero")

    def __init__(self, spans: int, count: int, loose: Mapping[int, bool], cuts: Sequence[Cut], zero: int = 0) -> None:
        self.spans, self.count, self.zero = spans, count, zero
        self.loose = np.full(count, _FIRM, np.int8)
        for place, behind in loose.items():
            self.loose[place] = _BEHIND if behind else _BEFORE
        self.follow = np.arange(count) < spans
        self.cuts = np.array([cut[:3] for cut in cuts], np.intp).reshape(-1, 3)
        self.tokens = np.array([cut.token for cut in cuts], np.int32)
        self.sizes = np.array([len(cut.rest) for cut in cuts], np.intp)
        self.rest = np.concatenate([np.zeros(0, np.int32), *(cut.rest for cut in cuts)])


class Draft(NamedTuple):
    """A text to encode, and the characters of the places of its layout."""

    layout: Layout
    text: str
    chars: Sequence[int]


# The ids of a text, and the token at each of its places.
Placed = tuple[Ids, list[int]]


def placed(drafts: Sequence[Draft], tokens: FastTokens) -> list[Placed | None]:
    """All `drafts` encoded; None for those in which something does not hold."""
    if not drafts:
        return []
    layouts = [draft.layout for draft in drafts]
    encoded, found = tokens.encode_each([draft.text for draft in drafts])
    assert encoded.starts is not None and encoded.ends is not None
    firsts, counts = np.array(found), np.array([layout.count for layout in layouts])
    base = counts.cumsum() - counts
    begins = np.array([0, *accumulate(len(draft.text) for draft in drafts)][:-1], np.int32)
    chars = np.fromiter(chain.from_iterable([draft.chars for draft in drafts]), np.int32, int(counts.sum()))
    chars += begins.repeat(counts)

    starting, holding = encoded.starts.searchsorted(chars), encoded.ends.searchsorted(chars, "right")
    loose = np.concatenate([layout.loose for layout in layouts])
    at = np.where(loose == _BEHIND, holding, starting)
    wrong = (starting != holding) & (loose == _FIRM)
    wrong[:-1] |= np.concatenate([layout.follow for layout in layouts])[:-1] & (at[1:] <= at[:-1])
    failed = np.logical_or.reduceat(wrong, base)
    failed |= at[base + [layout.zero for layout in layouts]] != firsts[:-1]
    failed |= at[base + [layout.spans for layout in layouts]] != firsts[1:]
    _cut(layouts, encoded.ids, at, base, failed)

    places, ids = (at - firsts[:-1].repeat(counts)).tolist(), encoded.ids
    ends = [*accumulate(layout.count for layout in layouts)]
    return [
        None if bad else (ids[first:last], places[end - layout.count : end])
        for bad, first, last, end, layout in zip(failed.tolist(), found, found[1:], ends, layouts, strict=False)
    ]


def _cut(
    layouts: Sequence[Layout], ids: Ids, at: npt.NDArray[np.intp],
    base: npt.NDArray[np.intp], failed: npt.NDArray[np.bool_],
) -> None:
    """Mark the texts without their cuts in `failed`. `at`: the tokens at places, `base`: the first place of each."""
    number = np.array([len(layout.tokens) for layout in layouts])
    of_text = np.arange(len(layouts)).repeat(number)
    begin, end, until = at[np.concatenate([layout.cuts for layout in layouts]) + base[of_text, None]].T
    wanted, sizes = (np.concatenate([getattr(layout, name) for layout in layouts]) for name in ("tokens", "sizes"))
    wrong = (end - begin != (wanted >= 0)) | (until - end != sizes)
    wrong |= (wanted >= 0) & (ids.take(begin, mode="clip") != wanted)
    rest = np.concatenate([layout.rest for layout in layouts])
    there = (end - (sizes.cumsum() - sizes)).repeat(sizes) + np.arange(len(rest))
    differing = ids.take(there, mode="clip") != rest
    wrong[np.arange(len(sizes)).repeat(sizes)[differing]] = True
    failed[of_text[wrong]] = True
