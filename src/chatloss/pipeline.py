"""Rows of data through the encoder, one at a time: what `view`, `encode`, `check` and `train` have in common."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chatloss.chat import Conversation, Label, Preference, Text
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import ChatlossError, DataError
from chatloss.formats import Row
from chatloss.markers import Markers, encode_text
from chatloss.reader import Reader

__all__ = ["Encoded", "conversations_of", "encodings", "examples"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation (None for plain text) with what the encoder made of it."""

    conversation: Conversation | None
    encoding: Encoding


def conversations_of(row: Row) -> list[Conversation]:
    """The conversations of a row: both answers of a preference pair, none of a plain text."""
    if isinstance(row, Conversation):
        return [row]
    if isinstance(row, Preference):
        return [row.chosen, row.rejected]
    return [row.conversation] if isinstance(row, Label) else []


def encodings(
    reader: Reader, encoder: ChatEncoder, *, markers: Markers | None = None, strict: bool = False,
    supervised: bool = False,
) -> Iterator[Encoded]:
    """Everything in `reader`, encoded. Rows that cannot be encoded at all join the reader's rejects.

    `strict` also rejects what the policy calls an error; without it such rows come with their problems. `supervised`
    rejects preference rows. At the end the reader decides whether too many rows were bad.
    """
    for row in reader:
        try:
            if supervised and isinstance(row, Preference | Label):
                raise DataError(
                    "a preference row has no place in supervised training", where=row.source,
                    hint="keep the chosen answers only, as messages", kind="preference",
                )
            made = _encode(row, encoder, markers)
            fatal = next((p.error(row.source) for e in made for p in e.encoding.problems if p.fatal), None)
            if strict and fatal is not None:
                raise fatal
        except ChatlossError as error:
            reader.reject(row.source, error)
            continue
        yield from made


def examples(reader: Reader, encoder: ChatEncoder, *, markers: Markers | None = None) -> Iterator[Encoded]:
    """What training takes: strictly encoded supervised rows that train something."""
    for made in encodings(reader, encoder, markers=markers, strict=True, supervised=True):
        if made.encoding.rows:
            yield made


def _encode(row: Row, encoder: ChatEncoder, markers: Markers | None) -> list[Encoded]:
    if isinstance(row, Text):
        if markers is None:
            raise DataError(
                "a plain text says nothing about what to train in it", where=row.source,
                hint="give --response-template, or chats as messages", kind="markers",
            )
        sample = encode_text(encoder.tokens, row.text, markers, source=row.source, decode=encoder.decode)
        return [Encoded(None, Encoding([sample], sample.outcomes, {}, ()))]
    return [Encoded(conversation, encoder.examine(conversation)) for conversation in conversations_of(row)]
