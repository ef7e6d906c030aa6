"""The tokens of many texts at once, and where characters lie in them: in arrays over all texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from chatloss.fast_tokens import FlatTokens
from chatloss.tokens import Ids

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
    """What must hold at the `places` of a text: the first `spans` + 1 of them part its spans, the last ends it.

    Each is a mark of the text, and how many characters behind it. `loose`: places that a token may reach across, and
    whether it then belongs to what begins there. `zero`: the place at which the text begins.
    """

    __slots__ = ("count", "cuts", "follow", "loose", "marks", "offsets", "places", "rest", "sizes", "spans", "tokens",
                 "zero")

    def __init__(
        self, spans: int, places: Sequence[tuple[int, int]], loose: Mapping[int, bool], cuts: Sequence[Cut],
        zero: int = 0,
    ) -> None:
        count = len(places)
        self.spans, self.places, self.count, self.zero = spans, places, count, zero
        self.marks, self.offsets = np.array(places, np.int32).T
        self.loose = np.full(count, _FIRM, np.int8)
        for place, behind in loose.items():
            self.loose[place] = _BEHIND if behind else _BEFORE
        self.follow = np.arange(count) < spans
        self.cuts = np.array([cut[:3] for cut in cuts], np.intp).reshape(-1, 3)
        self.tokens = np.array([cut.token for cut in cuts], np.int32)
        self.sizes = np.array([len(cut.rest) for cut in cuts], np.intp)
        self.rest = np.concatenate([np.zeros(0, np.int32), *(cut.rest for cut in cuts)])


class Draft(NamedTuple):
    """A text to encode, and the characters of its marks, from which the places of its layout are counted.

    `beside`: the text goes on from the last one before it that is beside none, at that one's first place of two; the
    span that begins at the second is the first that they do not have in common.
    """

    layout: Layout
    text: str
    marks: Sequence[int]
    beside: tuple[int, int] | None = None


class Placed(NamedTuple):
    """The ids of a text, and the token at each of its places.

    Of a text beside another, behind the first `shared` ids of that, which are all that they begin with alike; `begin`
    is the token at which the first span begins that is not the same.
    """

    ids: Ids
    places: Ids
    shared: int
    begin: int


def placed(drafts: Sequence[Draft], tokens: FlatTokens) -> list[Placed | None]:
    """All `drafts` encoded; None for those in which something does not hold."""
    if not drafts:
        return []
    layouts = [draft.layout for draft in drafts]
    counts = np.array([layout.count for layout in layouts])
    base = counts.cumsum() - counts
    sizes = np.array([len(draft.marks) for draft in drafts])
    marks = np.fromiter(chain.from_iterable([draft.marks for draft in drafts]), np.int32, int(sizes.sum()))
    which = (sizes.cumsum() - sizes).repeat(counts) + np.concatenate([layout.marks for layout in layouts])
    chars = marks[which] + np.concatenate([layout.offsets for layout in layouts])

    ids, found, starting, holding = tokens.encode_at([draft.text for draft in drafts], chars, counts)
    firsts = np.array(found)
    loose = np.concatenate([layout.loose for layout in layouts])
    at = np.where(loose == _BEHIND, holding, starting)
    wrong = (starting != holding) & (loose == _FIRM)
    wrong[:-1] |= np.concatenate([layout.follow for layout in layouts])[:-1] & (at[1:] <= at[:-1])
    failed = np.logical_or.reduceat(wrong, base)
    failed |= at[base + [layout.zero for layout in layouts]] != firsts[:-1]
    failed |= at[base + [layout.spans for layout in layouts]] != firsts[1:]
    _cut(layouts, ids, at, base, failed)

    at -= firsts[:-1].repeat(counts)
    shared, begin, same = _beside(drafts, ids, firsts, at, base, failed)
    places = (at + shared.repeat(counts)).astype(np.int32)
    return [
        None if bad else Placed(ids[first:last], places[end - layout.count : end], known, start)
        for bad, first, last, end, layout, known, start in zip(
            failed.tolist(), (firsts[:-1] + same).tolist(), found[1:], accumulate(layout.count for layout in layouts),
            layouts, (shared + same).tolist(), begin.tolist(), strict=True,
        )
    ]


def _beside(
    drafts: Sequence[Draft], ids: Ids, firsts: npt.NDArray[np.intp], at: npt.NDArray[np.intp],
    base: npt.NDArray[np.intp], failed: npt.NDArray[np.bool_],
) -> npt.NDArray[np.intp]:
    """Of each text beside another: the token of that at which it goes on from it, that of its first own span, and how
    many of its own ids are still the same; zeros for others. Those that do not go on so are marked in `failed`.

    `at`: the tokens at places, `base`: the first place of each text.
    """
    shared, begin, same = made = np.zeros((3, len(drafts)), np.intp)
    own = np.array([i for i, draft in enumerate(drafts) if draft.beside is not None], np.intp)
    if not len(own):
        return made
    trunk = np.arange(len(drafts))
    trunk[own] = 0
    trunk = np.maximum.accumulate(trunk)[own]
    cut, before = (base[trunk] + of_trunk for of_trunk in np.array([drafts[i].beside for i in own]).T)
    shared[own], begin[own] = at[cut], at[before]
    sizes = firsts[own + 1] - firsts[own]
    within = np.arange(sizes.sum()) - (sizes.cumsum() - sizes).repeat(sizes)
    mine, others = (first.repeat(sizes) + within for first in (firsts[own], firsts[trunk] + shared[own]))
    alike = (ids[mine] == ids.take(others, mode="clip")) & (others < firsts[trunk + 1].repeat(sizes))
    same[own] = np.minimum.reduceat(np.where(alike, sizes.repeat(sizes), within), sizes.cumsum() - sizes)
    known = shared[own] + same[own]
    failed[own] |= failed[trunk] | (same[own] == sizes) | (begin[own] > known)
    failed[own] |= at[base[own]] + shared[own] <= begin[own]
    return made


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
