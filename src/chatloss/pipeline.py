"""Rows of data through the encoder, one at a time: what `view`, `encode`, `check` and `train` have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import TypeVar, cast

from chatloss.chat import Conversation, Label, Preference, Text
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import ChatlossError, DataError
from chatloss.formats import Row
from chatloss.frozen import made_quickly
from chatloss.markers import Markers, encode_text
from chatloss.pairs import Answer, Pair, answers_of, examine_judged, examine_pair, judged, pair_of, sides
from chatloss.reader import Reader

__all__ = ["Encoded", "answers", "conversations_of", "encodings", "examples", "pairs", "records"]

S = TypeVar("S")
T = TypeVar("T")


@made_quickly
@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation (None for plain text) with what the encoder made of it.

    `side` is "chosen" or "rejected" in a pair, "desirable" or "undesirable" for a judged answer, else "".
    """

    conversation: Conversation | None
    encoding: Encoding
    side: str = ""

    @property
    def source(self) -> str:
        return self.conversation.source if self.conversation else ""


def conversations_of(row: Row) -> list[Conversation]:
    """The conversations of a row, none of a plain text.

    Those of a preference row have only the judged answers switched on, and a source that tells chosen from rejected.
    """
    if isinstance(row, Conversation):
        return [row]
    if isinstance(row, Preference):
        return list(sides(row))
    return [judged(row)] if isinstance(row, Label) else []


def encodings(
    reader: Reader, encoder: ChatEncoder, *, markers: Markers | None = None, strict: bool = False,
    supervised: bool = False,
) -> Iterator[Encoded]:
    """Everything in `reader`, encoded. Rows that cannot be encoded at all join the reader's rejects.

    `strict` also rejects what the policy calls an error; without it such rows come with their problems. `supervised`
    rejects preference rows. At the end the reader decides whether too many rows were bad.
    """
    for made in records(reader, encoder, markers=markers, strict=strict, supervised=supervised):
        yield from made


def records(
    reader: Reader, encoder: ChatEncoder, *, markers: Markers | None = None, strict: bool = False,
    supervised: bool = False, ahead: bool = False,
) -> Iterator[list[Encoded]]:
    """The same, record by record: both answers of a preference pair together, everything else alone.

    `ahead`: rows may be read before those ahead of them are encoded, which is faster. What is rejected when it is read
    then joins the rejects before them, and the reader decides without the last of them.
    """

    def judged(row: Row, record: list[Encoded]) -> list[list[Encoded]]:
        for made in record if strict else ():
            for problem in made.encoding.problems:
                if problem.fatal:
                    raise problem.error(made.source or row.source)
        return [record]

    def made(row: Row) -> list[list[Encoded]]:
        if supervised and isinstance(row, Preference | Label):
            raise DataError(
                "a preference row has no place in supervised training", where=row.source,
                hint="keep the chosen answers only, as messages", kind="preference",
            )
        return judged(row, _encode(row, encoder, markers))

    def chat(found: tuple[Conversation, Encoding | ChatlossError]) -> list[list[Encoded]]:
        row, encoding = found
        if isinstance(encoding, ChatlossError):
            raise encoding
        return judged(row, [Encoded(row, encoding)])

    if not ahead:
        yield from _of_each(reader, reader, made)
        return
    for chats, rows in groupby(reader, lambda row: isinstance(row, Conversation)):
        if chats:
            found = encoder.examine_each(cast("Iterator[Conversation]", rows))
            yield from _of_each(reader, found, chat, lambda one: one[0].source)
        else:
            yield from _of_each(reader, rows, made)


def examples(reader: Reader, encoder: ChatEncoder, *, markers: Markers | None = None) -> Iterator[Encoded]:
    """What training takes: strictly encoded supervised rows that train something."""
    for made in encodings(reader, encoder, markers=markers, strict=True, supervised=True):
        if made.encoding.rows:
            yield made


def pairs(reader: Reader, encoder: ChatEncoder) -> Iterator[Pair]:
    """What preference training takes: pairs that are whole. Rows that give none join the reader's rejects."""

    def made(row: Row) -> list[Pair]:
        if not isinstance(row, Preference):
            raise DataError(
                "not a preference pair", where=row.source, kind="not a pair",
                hint="rows need chosen and rejected; judged single answers are for objective = 'kto'",
            )
        pair = pair_of(encoder, row)
        return [] if pair is None else [pair]

    return _of_each(reader, reader, made)


def answers(reader: Reader, encoder: ChatEncoder) -> Iterator[Answer]:
    """What KTO takes: judged answers; a pair gives one of each kind. Rows that give none join the reader's rejects."""

    def made(row: Row) -> list[Answer]:
        if not isinstance(row, Preference | Label):
            raise DataError(
                "not a judged answer", where=row.source, kind="not judged",
                hint="rows need a boolean label, or chosen and rejected",
            )
        return answers_of(encoder, row)

    return _of_each(reader, reader, made)


def _of_each(
    reader: Reader, given: Iterable[S], made: Callable[[S], list[T]], source: Callable[[S], str] = attrgetter("source")
) -> Iterator[T]:
    """All that is made of each; one of which it raises joins the rejects, unless the fault is not the data's."""
    for one in given:
        try:
            found = made(one)
        except ChatlossError as error:
            if error.kind == "trace":
                raise
            reader.reject(source(one), error)
        else:
            yield from found


def _encode(row: Row, encoder: ChatEncoder, markers: Markers | None) -> list[Encoded]:
    if isinstance(row, Text):
        if markers is None:
            raise DataError(
                "a plain text says nothing about what to train in it", where=row.source,
                hint="give --response-template, or chats as messages", kind="markers",
            )
        sample = encode_text(encoder.tokens, row.text, markers, source=row.source, decode=encoder.decode)
        return [Encoded(None, Encoding([sample], sample.outcomes, {}, ()))]
    if isinstance(row, Preference):
        both = zip(sides(row), examine_pair(encoder, row), ("chosen", "rejected"), strict=True)
        return [Encoded(*side) for side in both]
    if isinstance(row, Label):
        return [Encoded(judged(row), examine_judged(encoder, row), "desirable" if row.desirable else "undesirable")]
    return [Encoded(row, encoder.examine(row))]
