"""What can be wrong with the labels of a document, told from what its tokens are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from chatloss.causes import Cause
from chatloss.findings import witness
from chatloss.labels.reconstruct import Document, Kind, TurnPlace

__all__ = ["LABEL_CAUSES", "LabelHit", "examine", "of_turn", "window"]

Mask = npt.NDArray[np.bool_]

_TRAINER = "in the trainer, or prepare the rows with chatloss"
LABEL_CAUSES: Mapping[str, Cause] = {
    # All or nothing
    "nothing_trained": Cause("error", "document", "no token is trained",
                             "look for a response template that never matches, a chat template without generation "
                             "tags, or answers that were cut off"),
    "everything_trained": Cause("warning", "document", "every token is trained, questions and headers too",
                                "fine for pretraining, and the default of some trainers; to train answers only: "
                                "assistant_only_loss, completion_only_loss, train_on_inputs: false"),
    "unrecognised": Cause("warning", "document", "no header of an answer in it, as this template writes them",
                          "--chat-template: the template that made the rows"),
    "no_template": Cause("info", "document", "without a chat template nothing can be told of messages",
                         "--chat-template: the template that made the rows"),
    # Shifts
    "labels_shifted": Cause("error", "row", "labels[t] is the id at t + 1: they are shifted already",
                            "do not shift them: a causal-LM loss of transformers shifts labels itself, so these would "
                            "be shifted twice"),
    "label_differs": Cause("warning", "row", "a label is another token than the one that stands there, so the row goes "
                           "on otherwise than the model is told to",
                           "a convention of LLaMA-Factory (efficient_eos): EOS in place of the next header; else "
                           "write the id itself, or -100"),
    "mask_shifted_left": Cause("error", "turn", "the mask lies one token too early: the last token of the header is "
                               "trained, the stop is not",
                               "if the loss pairs mask[t] with the prediction of the next token, this is its "
                               "convention; else shift the mask with the labels: mask[1:]"),
    "mask_shifted_right": Cause("error", "turn", "the mask lies one token too late: the first token of the answer is "
                                "not trained, the one behind the stop is",
                                "an off-by-one: begin the mask at the first token of the answer"),
    # Ends of a turn
    "headers_trained": Cause("warning", "turn", "the header of the answer is trained, which the prompt supplies",
                             "begin the mask behind the generation prompt"),
    "prompt_tokens_trained": Cause("warning", "turn", "the end of the generation prompt is trained: the engine writes "
                                   "it, never the model", "begin the mask behind the generation prompt"),
    "empty_think_trained": Cause("info", "turn", "an empty reasoning block is trained",
                                 "right if the model has to write it; with enable_thinking=false the prompt has it"),
    "answer_start_untrained": Cause("error", "turn", "the answer's first tokens are not trained",
                                    "begin the mask where the generation prompt ends"),
    "answer_gaps": Cause("warning", "turn", "part of an answer is not trained, although text before and behind it is",
                         "fine where spans are masked on purpose"),
    "answer_end_untrained": Cause("warning", "turn", "the end of the answer is not trained",
                                  "end the mask behind the stop"),
    "stop_untrained": Cause("error", "turn", "the stop is not trained, so the model does not learn to end its turn",
                            "end the mask behind the stop; if pad and EOS are the same token, mask padding by length, "
                            "not by id"),
    "other_stop": Cause("warning", "turn", "the turn ends as this template ends past answers, with a token at which no "
                        "engine stops", "one row per turn, so that each answer comes last, as chatloss makes them"),
    "no_stop": Cause("warning", "turn", "the turn is trained and no stop stands behind it",
                     "was the row cut off? Else let the template write the stop, or append it"),
    "past_stop": Cause("warning", "turn", "what stands behind the stop is trained, and no engine asks for it",
                       "end the mask behind the stop; LLaMA-Factory and several tagged templates count the newline to "
                       "the turn by convention"),
    # Turns
    "only_last_turn": Cause("warning", "document", "only the last of several answers is trained",
                            "fine by the convention of one row per turn; with one row per chat the others are lost: "
                            "give an instruction template, or prepare one row per turn"),
    "turns_untrained": Cause("warning", "turn", "an answer is not trained here, although another is",
                             "fine where it was switched off, or has a row of its own"),
    # Other text
    "user_trained": Cause("error", "document", "text of the user is trained",
                          "a marker scan that a user's text misleads, or a mask that does not end"),
    "system_trained": Cause("error", "document", "text of the system prompt is trained",
                            "begin the mask at the first answer"),
    "tool_trained": Cause("error", "document", "tool results are trained: the model learns to invent them",
                          "give tool results a header that ends the mask"),
    "structure_trained": Cause("warning", "document", "headers of other roles are trained",
                               "end the mask behind the stop of the answer"),
    "padding_trained": Cause("error", "document", "padding is trained", "set labels to -100 where attention_mask is 0"),
    "empty_row": Cause("warning", "row", "no tokens, or nothing but padding", "drop the row"),
    # Documents
    "cross_document": Cause("error", "document", "the first token of a packed document is trained: it is predicted "
                            "from the end of the document before", "set the first label of every document to -100"),
    "first_token": Cause("info", "row", "the first token of the row is labelled; nothing predicts it, so it adds no "
                         "loss", "nothing to do, but do not count it in a denominator"),
    "several_documents": Cause("warning", "row", "several documents, and nothing says where they begin: they attend to "
                               "each other unless the trainer knows better",
                               "write position_ids that begin anew at 0, or seq_lengths"),
    "positions_run_on": Cause("error", "row", "position_ids run on over the beginning of another document",
                              "begin them anew at 0: attention reaches across documents"),
    "cut_row": Cause("warning", "row", "the row begins in the middle of a message, whose beginning is in no context",
                     "pack whole documents (bfd in TRL, not wrapped)"),
    "double_bos": Cause("warning", "document", "it begins with BOS twice",
                        "tokenize rendered chats with add_special_tokens=False"),
}


@dataclass(frozen=True, slots=True)
class LabelHit:
    """One occurrence of a cause: the tokens [start, end) of the document that show it."""

    cause: str
    start: int
    end: int


def examine(document: Document, trained: Mask, stops: frozenset[int] = frozenset(), *, first: bool = True) -> Iterator[
    LabelHit
]:
    """Everything wrong with `trained` [n] in a document; `first`: it is the first of its row.

    `stops`: ids that end a turn, for documents in which no turn was recognised.
    """
    kinds, n = document.kinds, len(document.ids)
    real = kinds != Kind.PADDING
    if (trained & ~real).any():
        yield _hit("padding_trained", trained & ~real)
        trained = trained & real
    if not trained.any():
        yield LabelHit("nothing_trained", 0, min(n, 8))
        return
    if trained[0]:
        yield LabelHit("first_token" if first else "cross_document", 0, 1)
    if trained[1:][real[1:]].all() and real.sum() > 2:
        yield LabelHit("everything_trained", 0, min(n, 8))
        return
    if not document.turns:
        yield LabelHit("unrecognised", 0, min(n, 8))
        yield from _bare_stops(document, trained, stops)
        return
    if document.messages[0] < 0 and kinds[0] in (Kind.ANSWER, Kind.USER):
        yield LabelHit("cut_row", 0, 1)
    on = [turn for turn in document.turns if trained[turn.answer : turn.end].any()]
    for turn in on:
        yield from of_turn(document, turn, trained)
    off = [turn for turn in document.turns if turn not in on]
    if off and on == [document.turns[-1]]:
        yield LabelHit("only_last_turn", off[-1].answer, off[-1].end)
    else:
        for turn in off:
            yield LabelHit("turns_untrained", turn.answer, turn.end)
    shifted = _shifts(document, trained)
    for kind, cause in _OTHERS.items():
        found = trained & (kinds == kind) & ~shifted
        if kind == Kind.START:
            found[0] = False
        if found.any():
            yield _hit(cause, found)


_OTHERS = {Kind.USER: "user_trained", Kind.SYSTEM: "system_trained", Kind.TOOL: "tool_trained",
           Kind.STRUCTURE: "structure_trained", Kind.START: "structure_trained"}


def of_turn(document: Document, turn: TurnPlace, trained: Mask) -> Iterator[LabelHit]:
    """Everything wrong with a turn of which some is trained."""
    shift = _shift(turn, trained) or _cut_shift(document, turn, trained)
    if shift:
        start, end = (turn.answer - 1, turn.end) if shift < 0 else (turn.answer, min(turn.end + 1, len(trained)))
        yield LabelHit("mask_shifted_left" if shift < 0 else "mask_shifted_right", start, end)
        return
    if trained[turn.header : turn.answer].any():
        header = bool(trained[turn.header])
        yield LabelHit("headers_trained" if header else "prompt_tokens_trained", turn.header, turn.answer)
    empty = np.flatnonzero(document.kinds[turn.answer : turn.stop] == Kind.EMPTY_THINK) + turn.answer
    body = turn.answer
    if len(empty):
        body = int(empty[-1]) + 1
        if trained[empty].any():
            yield LabelHit("empty_think_trained", int(empty[0]), body)
    on = np.flatnonzero(trained[body : turn.stop]) + body
    if len(on):
        first, last = int(on[0]), int(on[-1]) + 1
        if first > body:
            yield LabelHit("answer_start_untrained", body, first)
        if len(on) < last - first:
            gap = first + int(np.flatnonzero(~trained[first:last])[0])
            yield LabelHit("answer_gaps", gap, gap + 1)
        if last < turn.stop:
            yield LabelHit("answer_end_untrained", last, turn.stop)
    if turn.ending == "closer":
        yield LabelHit("other_stop", turn.stop, turn.end)
    elif not turn.ending:
        yield LabelHit("no_stop", max(turn.answer, turn.end - 1), turn.end)
    elif not trained[turn.stop : turn.end].all():
        yield LabelHit("stop_untrained", turn.stop, turn.end)
    if trained[turn.end : turn.after].any():
        yield LabelHit("past_stop", turn.end, turn.after)


def _shift(turn: TurnPlace, trained: Mask) -> int:
    """-1 or 1 where the mask of a turn is displaced at both of its ends, by one token, and lies right otherwise."""
    answer, end, n = turn.answer, turn.end, len(trained)
    if not turn.ending or end - answer < 3 or turn.end - turn.stop != 1:
        return 0
    inner = trained[answer + 1 : end - 1].all()
    if inner and answer > 1 and trained[answer - 1 : answer + 1].all() and not trained[answer - 2]:
        return -1 if not trained[end - 1] else 0
    if inner and trained[end - 1] and not trained[answer] and end < n and trained[end]:
        return 1
    return 0


def _cut_shift(document: Document, turn: TurnPlace, trained: Mask) -> int:
    """1 where a turn ends its document, misses its first token, and another one of the document is displaced so."""
    at_end = turn.end == len(trained) and not trained[turn.answer] and trained[turn.answer + 1 : turn.end].all()
    return int(at_end and any(_shift(other, trained) > 0 for other in document.turns))


def _shifts(document: Document, trained: Mask) -> Mask:
    """The tokens that a displaced mask reaches beyond its turn."""
    reached = np.zeros(len(trained), np.bool_)
    for turn in document.turns:
        if _shift(turn, trained) > 0:
            reached[turn.end : turn.after + 1] = True
    return reached


def _bare_stops(document: Document, trained: Mask, stops: frozenset[int]) -> Iterator[LabelHit]:
    """Trained stretches that end right before a stop."""
    for at in np.flatnonzero(trained[:-1] & ~trained[1:]).tolist():
        if int(document.ids[at + 1]) in stops:
            yield LabelHit("stop_untrained", at + 1, at + 2)


def _hit(cause: str, where: Mask) -> LabelHit:
    """The first stretch of tokens that `where` marks."""
    start = int(np.flatnonzero(where)[0])
    behind = np.flatnonzero(~where[start:])
    return LabelHit(cause, start, start + int(behind[0]) if len(behind) else len(where))


def window(document: Document, hit: LabelHit) -> str:
    """The tokens of a hit with a little of what stands around them."""
    return str(witness(document.text, document.char(hit.start), document.char(hit.end)))
