"""Which text each token of a row stands for: runs of tokens, cut so that no character is broken."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from chatloss.errors import TokenizerError
from chatloss.sample import Decode, Reason, Sample, Span

__all__ = ["Pieces", "Run", "cut", "runs"]

_BAD = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [start, end) of a row that only decode together (usually one), and what their span says of them.

    `text` is empty for tokens that decode to nothing, and where a span begins in the middle of a character.
    """

    start: int
    end: int
    text: str
    ids: tuple[int, ...]
    weight: float
    reason: Reason
    message: int


class Pieces:
    """Cuts rows into runs, remembering what single tokens decode to; share one over the rows of one tokenizer."""

    def __init__(self, decode: Decode) -> None:
        self._foreign = decode
        self._anchor: list[int] = []
        self._anchor_text = ""
        self._texts: dict[int, str | None] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """`ids` as text. Raises `TokenizerError` whatever the foreign decoder raises."""
        try:
            return self._foreign(ids)
        except Exception as error:
            raise TokenizerError(
                f"the decoder cannot decode this row: {type(error).__name__}: {error}",
                hint="are these ids of this tokenizer, and none negative?",
            ) from error

    def text(self, token: int) -> str | None:
        """What `token` adds to a decoded text that it does not begin, or None where it cannot be told alone."""
        if token not in self._texts:
            both = self.decode([*self._anchor, token])
            sure = both.startswith(self._anchor_text) and _BAD not in both
            self._texts[token] = both[len(self._anchor_text) :] if sure else None
        return self._texts[token]

    def cut(self, ids: list[int]) -> Iterator[tuple[int, int, str]]:
        """(start, end, text) of every run, in order. The texts joined are exactly ``decode(ids)``.

        A token's own text is taken where it fits the row's text. Where it does not (bytes of a character, a leading
        space that the decoder strips), tokens are added until the text they decode to behind their neighbours fits.
        Linear in the length of the row, whatever the decoder.
        """
        text, n = self.decode(ids), len(ids)
        if not self._anchor:
            self._choose_anchor(ids)
        start = place = clean = 0  # `clean`: where the last run begins that surely begins with a character
        starts: list[int] = []
        while start < n:
            piece = self.text(ids[start])
            if piece is not None and text.startswith(piece, place):
                end, piece = start + 1, piece if start + 1 < n else text[place:]
            else:
                near = clean if start - clean <= 64 else starts[-8:][0]
                end, piece = self._widen(ids, start, near, text, place)
            yield start, end, piece
            starts.append(start)
            if piece and _BAD not in piece:
                clean = start
            start, place = end, place + len(piece)

    def _widen(self, ids: list[int], start: int, near: int, text: str, place: int) -> tuple[int, str]:
        before = self.decode(ids[near:start])
        end = start
        while True:
            end = min(len(ids), end + 1 + (end - start) // 4)
            if end == len(ids):
                return end, text[place:]
            joined = self.decode(ids[near:end])
            piece = joined[len(before) :]
            if not piece or not joined.startswith(before) or not text.startswith(piece, place):
                continue
            # A replacement character at the end is final only if the next token leaves it standing and adds to it.
            longer = self.decode(ids[near : end + 1]) if piece.endswith(_BAD) else joined + " "
            if len(longer) > len(joined) and longer.startswith(joined):
                return end, piece

    def _choose_anchor(self, ids: list[int]) -> None:
        for token in ids[:100]:
            text = self.decode([token])
            if text.isalpha() and self.decode([token, token]).startswith(text):
                self._anchor, self._anchor_text = [token], text
                self._texts.clear()
                return


def cut(sample: Sample, pieces: Pieces | None) -> Iterator[tuple[Span, int, int, str]]:
    """(span, start, end, text) of every run of a row, cut at the borders of its spans too. No decoder: no text."""
    ids: list[int] = sample.input_ids.tolist()
    spans = iter(sample.spans)
    span = next(spans, Span(0, 0, -1, 0.0, Reason.PADDING))
    found = pieces.cut(ids) if pieces else ((i, i + 1, "") for i in range(len(ids)))
    try:
        for start, end, text in found:
            while start < end:
                span = span if start < span.end else next(spans)
                stop = min(end, span.end)
                yield span, start, stop, text
                start, text = stop, ""
    except TokenizerError as error:
        raise error.at(sample.source) from error.__cause__


def runs(sample: Sample, decode: Decode | None = None) -> list[Run]:
    """The row's tokens as runs of text: ``"".join(run.text for run in runs)`` is ``decode(input_ids)``.

    `decode` defaults to the sample's own; without either every text is empty. Raises `TokenizerError` where it fails.

    >>> import numpy as np
    >>> row = Sample(np.array([1, 2, 3], np.int32), (Span(0, 3, 0, 1.0, Reason.CONTENT),))
    >>> data = {1: b"na", 2: b"\\xc3", 3: b"\\xaf"}
    >>> [(r.start, r.end, r.text) for r in runs(row, lambda ids: b"".join(map(data.get, ids)).decode(errors="replace"))]
    [(0, 1, 'na'), (1, 3, 'ï')]
    """
    decode = decode or sample.decode
    ids: list[int] = sample.input_ids.tolist()
    return [
        Run(start, end, text, tuple(ids[start:end]), span.weight, span.reason, span.message)
        for span, start, end, text in cut(sample, Pieces(decode) if decode else None)
    ]
