"""Turns to rows: the ids of each turn's context and target, and who may share a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatloss.errors import DataError
from chatloss.reference import Turn
from chatloss.tokens import Ids, Tokens, boundary_is_clean

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

    def where(self, chars: Sequence[int]) -> tuple[dict[int, int], dict[int, int]]:
        """For each of `chars` the first token that starts at or after it, and the first that holds any of it."""
        if self.starts is None or self.ends is None:
            found = {char: self._search(char) for char in set(chars)}
            over = {char: at if start == char else max(at - 1, 0) for char, (at, start) in found.items()}
            return {char: at for char, (at, _) in found.items()}, over
        wanted = np.array(chars, self.starts.dtype)
        at, holds = self.starts.searchsorted(wanted), self.ends.searchsorted(wanted, "right")
        return dict(zip(chars, at.tolist(), strict=True)), dict(zip(chars, holds.tolist(), strict=True))

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
    context, joint = tokens.encode(turn.prompt), tokens.encode(text)
    n = len(context.ids)
    if not apart and boundary_is_clean(context.ids, joint, len(turn.prompt)):
        return TurnIds(turn, text, joint.ids, n, joint.starts, joint.ends, True, tokens)
    target = tokens.encode_segment(turn.target)
    ids = np.concatenate([context.ids, target.ids])
    starts = _joined(context.starts, target.starts, len(turn.prompt))
    ends = _joined(context.ends, target.ends, len(turn.prompt))
    if tokens.decode(joint.ids.tolist()) == text != tokens.decode(ids.tolist()):
        raise DataError(
            "the tokenizer cannot encode this answer apart from its prompt", where=f"messages[{turn.index}]",
            hint="please report this tokenizer; leave the turn out with train: false", kind="boundary",
        )
    return TurnIds(turn, text, ids, n, starts, ends, False, tokens)


def _joined(
    before: npt.NDArray[np.int32] | None, behind: npt.NDArray[np.int32] | None, length: int
) -> npt.NDArray[np.int32] | None:
    return None if before is None or behind is None else np.concatenate([before, behind + np.int32(length)])


def group(turns: Sequence[TurnIds], row_format: str) -> list[list[TurnIds]]:
    """Rows as lists of turns, the last of each being its base: the fewest in which every turn is lawful.

    A turn may share a row exactly if the row begins with its context ids and its target ids.
    """
    rows: list[list[TurnIds]] = []
    left = sorted(turns, key=lambda t: (len(t.ids), t.turn.index))
    while left:
        base = left.pop()
        members = [base]
        if row_format != "per_turn":
            members += [t for t in left if len(t.ids) <= base.context and _begins_with(base.ids, t)]
            taken = {id(t) for t in members}
            left = [t for t in left if id(t) not in taken]
        rows.append(sorted(members, key=lambda t: t.turn.index))
    return sorted(rows, key=lambda row: row[-1].turn.index)


def _begins_with(ids: Ids, turn: TurnIds) -> bool:
    n = len(turn.ids)
    # Where rows differ they mostly do at once, in the first target.
    target = slice(turn.context, min(turn.context + 8, n))
    return np.array_equal(ids[target], turn.ids[target]) and np.array_equal(ids[:n], turn.ids)
