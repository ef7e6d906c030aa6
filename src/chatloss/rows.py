"""Turns to rows: the ids of each turn's context and target, and who may share a row."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatloss.errors import DataError
from chatloss.literal import LiteralTokens
from chatloss.reference import Turn
from chatloss.tokens import Encoded, Ids, Tokens

__all__ = ["TurnIds", "group", "turn_ids"]

# No token is longer, in characters (where a tokenizer tells no offsets).
_REACH = 256


@dataclass(frozen=True, slots=True, eq=False)
class TurnIds:
    """One turn as ids: `ids[:context]` is what the engine holds, the rest what the model must emit.

    `starts` and `ends` are character positions in `text` (prompt + target), or None. `joined`: the ids are those of the
    whole text; else a token would have straddled the boundary, and the target is encoded on its own.
    """

    turn: Turn
    text: str
    ids: Ids
    context: int
    starts: npt.NDArray[np.int32] | None
    ends: npt.NDArray[np.int32] | None
    joined: bool
    tokens: Tokens

    @property
    def written(self) -> str:
        """The text that the ids are of: `text`, but for sentinels in place of what users typed."""
        return _written(self.tokens, self.text)

    def tokens_at(self, chars: Sequence[int]) -> tuple[list[int], list[int]]:
        """For each of `chars` the first token that starts at or after it, and the first that holds any of it."""
        if self.starts is None or self.ends is None:
            known = {char: self._search(char) for char in set(chars)}
            found = [(token, token if start == char else max(token - 1, 0)) for char in chars
                     for token, start in [known[char]]]
            return [token for token, _ in found], [token for _, token in found]
        return Encoded(self.ids, self.starts, self.ends).tokens_at(chars)

    def _search(self, char: int) -> tuple[int, int]:
        """(first token that starts at or after `char`, where it starts), without offsets.

        A token starts where the text before it, or the text from it on, has the same ids alone.
        """
        prompt = len(self.turn.prompt)
        for at in range(char, min(char + _REACH, len(self.text))):
            if self.joined or at <= prompt:
                before = self.tokens.encode(self.text[:at]).ids
            else:
                segment = self.tokens.encode_segment(self.text[prompt:at]).ids
                before = np.concatenate([self.ids[: self.context], segment])
            if np.array_equal(self.ids[: len(before)], before):
                return len(before), at
            behind = self.tokens.encode_segment(self.text[at:]).ids
            if len(behind) and np.array_equal(self.ids[-len(behind) :], behind):
                return len(self.ids) - len(behind), at
        return len(self.ids), len(self.text)


def turn_ids(tokens: Tokens, turn: Turn, *, apart: bool = False) -> TurnIds:
    """The ids of a turn; `apart` encodes the target on its own in any case (spliced targets).

    Raises `DataError` where the ids taken apart do not decode to the text, although the joint ids do.
    """
    text = turn.prompt + turn.target
    joint, n = tokens.encode_pair(turn.prompt, turn.target)
    if n is not None and not apart:
        return TurnIds(turn, text, joint.ids, n, joint.starts, joint.ends, True, tokens)
    context, target = tokens.encode(turn.prompt), tokens.encode_segment(turn.target)
    ids = np.concatenate([context.ids, target.ids])
    starts = _joined(context.starts, target.starts, len(turn.prompt))
    ends = _joined(context.ends, target.ends, len(turn.prompt))
    if tokens.decode(joint.ids.tolist()) == _written(tokens, text) != tokens.decode(ids.tolist()):
        raise DataError(
            "the tokenizer cannot encode this answer apart from its prompt", where=f"messages[{turn.index}]",
            hint="please report this tokenizer; leave the turn out with train: false", kind="boundary",
        )
    return TurnIds(turn, text, ids, len(context.ids), starts, ends, False, tokens)


def _written(tokens: Tokens, text: str) -> str:
    return tokens.restored(text) if isinstance(tokens, LiteralTokens) else text


def _joined(
    before: npt.NDArray[np.int32] | None, behind: npt.NDArray[np.int32] | None, length: int
) -> npt.NDArray[np.int32] | None:
    return None if before is None or behind is None else np.concatenate([before, behind + np.int32(length)])


def group(turns: Sequence[TurnIds], row_format: str) -> list[list[TurnIds]]:
    """Rows as lists of turns, the last of each being its base: the fewest in which every turn is lawful.

    A turn may share a row exactly if the row begins with its context ids and its target ids.
    """
    rows = _shared(turns) if row_format != "per_turn" and len(turns) > 1 else [[t] for t in turns]
    return sorted(rows, key=lambda row: row[-1].turn.index)


def _index(turn: TurnIds) -> int:
    return turn.turn.index


def _shared(turns: Sequence[TurnIds]) -> list[list[TurnIds]]:
    """Every row is the longest turn left, and all that it begins with.

    One turn begins another only if both leave the longest of all at the same place, or if it never leaves that.
    """
    bases = sorted(turns, key=lambda t: (len(t.ids), t.turn.index))
    along: list[TurnIds] = []  # shortest first, as in `aside`
    aside: dict[int, list[TurnIds]] = {}
    leaves = {}
    for t in bases:
        leaves[id(t)] = place = _alike(t.ids, bases[-1].ids)
        (along if place == len(t.ids) else aside.setdefault(place, [])).append(t)
    rows: list[list[TurnIds]] = []
    taken: set[int] = set()
    for base in reversed(bases):
        if id(base) in taken:
            continue
        place = leaves[id(base)]
        count = bisect_right(along, min(place, base.context), key=_length) if along else 0
        found, along = along[:count], along[count:]
        beside = aside[place] if place < len(base.ids) else ()
        if len(beside) > 1:
            found += [t for t in beside if len(t.ids) <= base.context and _alike(t.ids, base.ids) == len(t.ids)]
        members = [base, *(t for t in found if t is not base and id(t) not in taken)]
        taken |= {id(t) for t in members}
        rows.append(sorted(members, key=_index) if len(members) > 1 else members)
    return rows


def _length(turn: TurnIds) -> int:
    return len(turn.ids)


def _alike(a: Ids, b: Ids) -> int:
    """How many ids two rows have in common at their beginning."""
    n = min(len(a), len(b))
    if a is b:
        return n
    differs = a[:n] != b[:n]
    at = int(differs.argmax()) if n else 0
    return at if n and differs[at] else n
