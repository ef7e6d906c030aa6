"""Their rows beside ours, turn by turn: each difference by name, and the tokens that only one of us trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from chatloss.causes import Cause
from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder, Encoding
from chatloss.labels.findings import LabelHit, Mask, of_turn
from chatloss.labels.matching import Matcher, needle
from chatloss.labels.reconstruct import Document, Kind, TurnPlace
from chatloss.probes import THINKING

__all__ = ["DIFFERENCE_CAUSES", "Beside", "Comparison"]

Ids = npt.NDArray[np.int32]

_TOLD_OTHERWISE = ("empty_think_trained", "other_stop")
_CHATLOSS = "prepare the rows with chatloss, which gives such a turn a row of its own"
DIFFERENCE_CAUSES: Mapping[str, Cause] = {
    "context_differs": Cause("warning", "turn", "trained behind a context that inference never shows", _CHATLOSS),
    "target_differs": Cause("warning", "turn", "trained on a text that the model does not have to write there",
                            "see what the template drops or adds in past answers; " + _CHATLOSS),
    "reasoning_missing": Cause("warning", "turn", "trained without the reasoning block with which inference begins it: "
                               "the template drops it from past answers", _CHATLOSS),
    "reasoning_untrained": Cause("info", "turn", "the empty reasoning block that begins the answer is not trained",
                                 "right if inference runs with enable_thinking=false, whose prompt has it"),
    "stop_differs": Cause("warning", "turn", "trained on another stop than the one at which the turn ends",
                          _CHATLOSS),
    "ids_differ": Cause("warning", "turn", "the same text in other ids than inference produces",
                        "tokenize the rendered chat in one piece, not part by part"),
    "turn_lost": Cause("warning", "turn", "an answer that we train and they train in no row",
                       "give an instruction template, or one row per turn"),
    "trained_off_prompt": Cause("warning", "turn", "trained although inference would show another prompt",
                                "see chatloss check on the chats: --off-prompt"),
    "trained_altered": Cause("warning", "turn", "trained although the template changes the answer",
                             "see chatloss check on the chats: --altered"),
    "trained_otherwise": Cause("info", "turn", "trained although the policy leaves it out",
                               "nothing to do if that is meant"),
    "mask_differs": Cause("info", "turn", "the masks differ in another way", "see the page: --html"),
    "unmatched": Cause("warning", "document", "a document of which no chat was found",
                       "give the chats in the order of the rows, and the same ones"),
    "chat_without_row": Cause("info", "chat", "a chat of which no row was found", "was it dropped, or is it too long?"),
}


@dataclass(frozen=True, slots=True, eq=False)
class Beside:
    """One document beside our rows: hits, their name for each turn, and what we would train of its tokens [n]."""

    chat: str
    hits: tuple[LabelHit, ...]
    ours: Mask


@dataclass(eq=False)
class Comparison:
    """Counts over all documents. `names` counts turns: "equal", or what differs (a turn may differ in several ways)."""

    encoder: ChatEncoder
    conversations: Iterable[Conversation]
    names: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.matcher = Matcher(self.conversations)
        self._lost: dict[tuple[str, int], int] = {}
        self._trained: set[tuple[str, int]] = set()
        self._last: tuple[Conversation, Encoding] | None = None

    def document(self, document: Document, trained: Mask) -> Beside | None:
        """What sets a document apart from ours; None where it has no chat."""
        conversation = self.matcher.find(document.text, len(document.turns))
        if conversation is None:
            self.names["unmatched documents"] += 1
            self.tokens["unmatched"] += int(trained.sum())
            return None
        encoding = self._encoding(conversation)
        ours = _our_turns(encoding)
        expected = np.zeros(len(trained), np.bool_)
        hits: list[LabelHit] = []
        places = _places(document, conversation)
        inside = np.zeros(len(trained), np.bool_)
        for i in encoding.outcomes.keys() | encoding.untrained.keys():
            place, key = places.get(i), (conversation.source, i)
            on = place is not None and bool(trained[place.answer : place.end].any())
            if not on:
                if i in ours and key not in self._trained:
                    self._lost[key] = len(ours[i][1])
                continue
            assert place is not None
            inside[place.header : place.after + 1] = True
            self._trained.add(key)
            self._lost.pop(key, None)
            if i not in ours:
                why = encoding.untrained.get(i) or encoding.outcomes.get(i, "")
                cause = f"trained_{why}" if f"trained_{why}" in DIFFERENCE_CAUSES else "trained_otherwise"
                hits.append(LabelHit(cause, place.answer, place.end))
                self.names[cause] += 1
                self.tokens["theirs only"] += int(trained[place.header : place.after].sum())
                continue
            found = list(self._turn(document, place, trained, *ours[i], expected))
            hits += found
            for cause in {hit.cause for hit in found} or {"equal"}:
                self.names[cause] += 1
        self.tokens["theirs only"] += int(trained[~inside].sum())
        return Beside(conversation.source, tuple(hits), expected)

    def finish(self) -> None:
        """Count what no row held."""
        self.names["turn_lost"] += len(self._lost)
        self.tokens["ours only"] += sum(self._lost.values())
        self.names["chats without a row"] = self.matcher.left()
        self.names = +self.names

    @property
    def lost(self) -> list[str]:
        """The turns that they train in no row, as ``file:row messages[i]``."""
        return [f"{source} messages[{i}]" for source, i in self._lost]

    def _encoding(self, conversation: Conversation) -> Encoding:
        if self._last is None or self._last[0] is not conversation:
            self._last = conversation, self.encoder.examine(conversation)
        return self._last[1]

    def _turn(
        self, document: Document, place: TurnPlace, trained: Mask, context: Ids, target: Ids, expected: Mask
    ) -> Iterator[LabelHit]:
        """The differences of one turn that both train; marks in `expected` what we train of the document."""
        ids, n = document.ids, len(context)
        same_context = np.array_equal(ids[:n], context)
        base = n if same_context else place.answer
        end = max(place.end, base)
        head, tail = _shared(ids[base:end], target)
        same_target = head == len(target) == end - base
        mine = np.zeros(len(ids), np.bool_)
        mine[base : base + head] = mine[end - tail : end] = True
        agreed = trained & mine
        self.tokens["both"] += int(agreed.sum())
        self.tokens["ours only"] += len(target) - int(agreed.sum())
        self.tokens["theirs only"] += int(trained[place.header : place.after].sum()) - int(agreed.sum())
        if not same_context:
            at, _ = _shared(ids, context)
            yield LabelHit("context_differs", min(at, place.answer), max(place.answer, at + 1))
        else:
            expected |= mine
        if not same_target:
            yield LabelHit(self._target(document, place, target, tail), place.answer, place.end)
        elif same_context and np.array_equal(trained[place.header : place.after], mine[place.header : place.after]):
            return
        named = [hit for hit in of_turn(document, place, trained) if hit.cause not in _TOLD_OTHERWISE]
        yield from named
        if same_target and not trained[base : place.stop][document.kinds[base : place.stop] == Kind.EMPTY_THINK].all():
            yield LabelHit("reasoning_untrained", base, place.stop)
        elif same_context and not named and same_target:
            yield LabelHit("mask_differs", place.header, place.after)

    def _target(self, document: Document, place: TurnPlace, target: Ids, tail: int) -> str:
        """What sets a target apart from ours, of which the last `tail` tokens are equal."""
        theirs = document.ids[place.answer : place.end]
        if len(theirs) == len(target) and np.array_equal(theirs[:-1], target[:-1]):
            return "stop_differs"
        if 0 < tail == len(theirs) and THINKING.search(self.encoder.decode(target[:-tail].tolist())):
            return "reasoning_missing"
        text = self.encoder.decode(target.tolist())
        return "ids_differ" if document.text_of(place.answer, place.end) == text else "target_differs"


def _shared(theirs: Ids, ours: Ids) -> tuple[int, int]:
    """How many tokens two targets share at their beginning, and of the rest at their end."""
    n = min(len(theirs), len(ours))
    other = np.flatnonzero(theirs[:n] != ours[:n])
    head = int(other[0]) if len(other) else n
    n -= head
    other = np.flatnonzero(theirs[len(theirs) - n :][::-1] != ours[len(ours) - n :][::-1])
    return head, int(other[0]) if len(other) else n


def _our_turns(encoding: Encoding) -> dict[int, tuple[Ids, Ids]]:
    """(context, target) of every turn that we train."""
    found = {}
    for row in encoding.rows:
        owners = row.turns
        for turn in np.unique(owners[owners >= 0]).tolist():
            places = np.flatnonzero(owners == turn)
            found[turn] = row.input_ids[: places[0]], row.input_ids[places[0] : places[-1] + 1]
    return found


def _places(document: Document, conversation: Conversation) -> dict[int, TurnPlace]:
    """Where each answer of the conversation stands in the document."""
    wanted = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    if len(wanted) == len(document.turns):
        return dict(zip(wanted, document.turns, strict=True))
    found: dict[int, TurnPlace] = {}
    for place in document.turns:
        text = document.text_of(place.answer, place.end)
        at = next((i for i in wanted if needle(conversation.messages[i]) in text), None)
        if at is not None:
            found[at] = place
            wanted = [i for i in wanted if i > at]
    return found
