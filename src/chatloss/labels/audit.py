"""The audit of rows that another tool prepared: what is trained, and what of it nobody wants."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.causes import Cause
from chatloss.chat import Conversation
from chatloss.check_report import CheckFinding
from chatloss.encode import ChatEncoder
from chatloss.findings import SEVERITIES
from chatloss.formats import Row
from chatloss.labels.difference import DIFFERENCE_CAUSES, Comparison
from chatloss.labels.findings import LABEL_CAUSES, LabelHit, examine, window
from chatloss.labels.reconstruct import Document, Kind, Reconstructor
from chatloss.labels.report import LABEL_COUNTS, LabelsReport
from chatloss.labels.rows import LabelReader, LabelRow, read_labels
from chatloss.labels.structure import Structure
from chatloss.pipeline import conversations_of
from chatloss.sample import Reason, Sample, Span
from chatloss.tally import Seen

__all__ = ["check_labels"]

Mask = npt.NDArray[np.bool_]

_TOTALS = {"chat": "chats", "turn": "turns", "document": "documents", "row": "rows", "input row": "input_rows"}


def check_labels(
    data: Any, encoder: ChatEncoder, *, chats: Iterable[Row] | None = None, max_rejects: float = 0.01,
    keep_samples: int = 0,
) -> LabelsReport:
    """Audit rows of ids with labels or a mask (see `read_labels`), made by any tool with the encoder's tokenizer.

    What each token is, is told from the ids and from what the encoder's template writes around messages.
    `chats`, usually a `Reader`, are what the rows were made of: then every turn is compared with what the encoder makes
    of it. `keep_samples`: so many rows are kept for a page. Raises `DataError` for data that cannot be read at all.

    >>> from chatloss.demo import tokenizer_directory
    >>> encoder = ChatEncoder.load(tokenizer_directory())
    >>> text = "<|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello there!<|im_end|>\\n"
    >>> ids = encoder.tokens.encode(text).ids.tolist()
    >>> start = len(encoder.tokens.encode(text.split("Hello")[0]).ids)
    >>> labels = [-100] * start + ids[start:-2] + [-100, -100]
    >>> report = check_labels([{"input_ids": ids, "labels": labels}], encoder)
    >>> [(finding.cause, finding.count, finding.example) for finding in report.findings]
    [('stop_untrained', 1, '<list>:1')]
    """
    conversations = None if chats is None else (chat for row in chats for chat in conversations_of(row))
    audit = _Audit(encoder, keep_samples, conversations)
    reader = data if isinstance(data, LabelReader) else read_labels(
        data, vocabulary=getattr(encoder.loaded.tokens, "size", 0))
    for row in reader:
        audit.row(row)
    audit.rejects(reader, max_rejects)
    return audit.report()


class _Audit:
    """What has been counted so far."""

    def __init__(self, encoder: ChatEncoder, keep: int, chats: Iterable[Conversation] | None) -> None:
        self.encoder, self.keep = encoder, keep
        self.comparison = None if chats is None else Comparison(encoder, chats)
        tokens = encoder.loaded.tokens
        added = getattr(tokens, "added", tokens.special)
        structure = Structure.of(encoder)
        self.reconstructor = Reconstructor(structure, encoder.decode, added)
        self.stops = frozenset(tokens.ids_of(text)[-1] for text in encoder.engine_stops)
        self.pad, bos = self.special("pad_token"), self.special("bos_token")
        text = encoder.loaded.special_tokens.get("bos_token", "")
        # Some models begin every message with it.
        self.bos = -1 if any(text in opener.text for opener in structure.openers) else bos
        self.seen: dict[str, Seen] = {}
        self.n: Counter[str] = Counter()
        self.columns: Counter[str] = Counter()
        self.totals = np.zeros(len(Kind), np.int64)
        self.trained = np.zeros(len(Kind), np.int64)
        self.samples: list[Sample] = []
        self.weights: dict[int, npt.NDArray[np.float32]] = {}
        self.roles: dict[str, tuple[str, ...]] = {}

    def special(self, name: str) -> int:
        """The id of a special token, -1 where the tokenizer has none or cuts it."""
        text = self.encoder.loaded.special_tokens.get(name, "")
        ids = self.encoder.loaded.tokens.ids_of(text) if text else []
        return ids[0] if len(ids) == 1 else -1

    def hit(self, cause: str, source: str, detail: str = "", remedy: str = "") -> None:
        if cause not in self.seen:
            self.seen[cause] = Seen(remedy=remedy)
        self.seen[cause].add(source, "", detail)

    # -- one row ---------------------------------------------------------------------------------------------------

    def row(self, row: LabelRow) -> None:
        self.n["rows"] += 1
        self.columns[row.column] += 1
        if row.shifted:
            self.hit("labels_shifted", row.source)
        if row.odd:
            at = row.odd[0]
            text = self.encoder.decode(row.ids[max(0, at - 6) : at + 3].tolist())
            self.hit("label_differs", row.source, f"token {at}, and {len(row.odd) - 1} more: {text}")
        padding = row.padding if row.padding.any() else self.padding(row.ids)
        real = np.flatnonzero(~padding)
        first = int(real[0]) if len(real) else len(row.ids)
        if row.weights[:first].any():
            self.hit("padding_trained", row.source, f"tokens 0-{first - 1}")
        if not len(real):
            self.hit("empty_row", row.source)
            return
        self.bounds(row, first)
        starts = [max(start, first) for start in row.starts.tolist()]
        for k, (start, end) in enumerate(zip(starts, [*starts[1:], len(row.ids)], strict=True)):
            if end > start:
                source = row.source if len(starts) == 1 else f"{row.source} document {k + 1}"
                ids, weights = row.ids[start:end], row.weights[start:end]
                self.document(ids, weights, padding[start:end], source, row.said, k == 0)

    def bounds(self, row: LabelRow, first: int) -> None:
        """Beginnings of documents behind the token `first` that nothing announces."""
        if self.bos < 0:
            return
        begins = np.flatnonzero((row.ids == self.bos) & ~row.padding)
        inside = begins[(begins > first) & ~np.isin(begins, row.starts) & ~np.isin(begins - 1, begins)]
        if len(inside) and self.bos not in self.stops:
            at = int(inside[0])
            text = self.encoder.decode(row.ids[max(0, at - 6) : at + 6].tolist())
            self.hit("positions_run_on" if row.said else "several_documents", row.source, f"token {at}: {text}")

    def padding(self, ids: npt.NDArray[np.int32]) -> Mask:
        """The pad tokens at both ends of a row that does not say what is padding, but for one that ends a turn."""
        other = np.flatnonzero(ids != self.pad)
        padding = np.zeros(len(ids), np.bool_)
        if self.pad < 0 or not len(other):
            return padding
        last = int(other[-1])
        kept = self.pad in self.stops and int(ids[last]) not in self.stops
        padding[: other[0]] = padding[last + 1 + kept :] = True
        return padding

    def document(
        self, ids: npt.NDArray[np.int32], weights: npt.NDArray[np.float32], padding: Mask, source: str, said: bool,
        first: bool,
    ) -> None:
        document = self.reconstructor.document(ids, padding)
        trained = weights != 0
        self.n["documents"] += 1
        self.n["tokens"] += len(ids)
        self.n["trained_tokens"] += int(trained.sum())
        self.n["turns"] += len(document.turns)
        self.n["trained_turns"] += sum(bool(trained[turn.answer : turn.end].any()) for turn in document.turns)
        self.totals += np.bincount(document.kinds, minlength=len(Kind))
        self.trained += np.bincount(document.kinds[trained], minlength=len(Kind))
        known = len(self.seen)
        for found in examine(document, trained, self.stops, first=first):
            if found.cause == "unrecognised" and not self.reconstructor.structure.openers:
                self.hit("no_template", source)
                continue
            self.hit(found.cause, source, _shown(document, found))
        if self.bos < 0 and not said and _begins_anew(document.roles):
            self.hit("several_documents", source, "a system message behind an answer")
        expected = self.beside(document, trained, source)
        if self.bos >= 0 and ids[:2].tolist() == [self.bos] * 2:
            self.hit("double_bos", source, window(document, LabelHit("double_bos", 0, 2)))
        if self.keep and (len(self.samples) < self.keep or len(self.seen) > known):
            self.weights[len(self.samples)] = weights
            self.samples.append(as_sample(document, source, self.encoder, expected))
            self.roles[source] = document.roles

    def beside(self, document: Document, trained: Mask, source: str) -> Mask | None:
        """What we would train of a document, None without its chat; the differences are counted."""
        if self.comparison is None:
            return None
        found = self.comparison.document(document, trained)
        if found is None:
            self.hit("unmatched", source, _shown(document, LabelHit("unmatched", 0, min(8, len(document.ids)))))
            return None
        for hit in found.hits:
            if hit.cause in DIFFERENCE_CAUSES:
                self.hit(hit.cause, source, f"{found.chat}: {_shown(document, hit)}")
        return found.ours

    # -- the end ---------------------------------------------------------------------------------------------------

    def rejects(self, reader: LabelReader, most: float) -> None:
        self.n["rejected_rows"], self.n["input_rows"] = reader.n_rejected, reader.n_rows
        for kind, count in reader.reject_counts.items():
            reject = next(reject for reject in reader.rejects if reject.kind == kind)
            where = reject.where.removeprefix(reject.source).strip()
            self.hit(f"rejected_{kind}", reject.source, f"{where}: {reject.what}".removeprefix(": "), reject.hint)
            self.seen[f"rejected_{kind}"].count = count
        if reader.n_rejected > most * reader.n_rows:
            share = math.ceil(1000 * reader.n_rejected / reader.n_rows) / 1000
            self.hit("too_many_rejects", "", remedy=f"mend them, or go on without them: --max-rejects {share:g}")
            self.seen["too_many_rejects"].count = reader.n_rejected

    def report(self) -> LabelsReport:
        if self.comparison is not None:
            self.comparison.finish()
            for place in self.comparison.lost:
                self.hit("turn_lost", place)
            # The comparison knows better: what a row leaves out may be trained in another one.
            known = () if self.comparison.lost else ("only_last_turn", "turns_untrained")
            for cause in (*known, "empty_think_trained"):
                self.seen.pop(cause, None)
            if left := self.comparison.names["chats without a row"]:
                self.hit("chat_without_row", "")
                self.seen["chat_without_row"].count = left
            self.n["chats"] = self.comparison.matcher.n_read
        findings = [self.finding(cause, seen) for cause, seen in self.seen.items()]
        findings.sort(key=lambda f: (SEVERITIES.index(f.severity), -f.count, f.cause))
        kinds = {kind: (int(self.totals[kind]), int(self.trained[kind])) for kind in Kind if self.totals[kind]}
        return LabelsReport(
            tokenizer=self.encoder.loaded.name, columns=dict(self.columns),
            counts={name: self.n[name] for name in LABEL_COUNTS}, kinds=kinds, findings=tuple(findings),
            differences={} if self.comparison is None else dict(self.comparison.names.most_common()),
            tokens={} if self.comparison is None else dict(self.comparison.tokens),
            samples=tuple(self.samples), weights=self.weights, roles=self.roles,
        )

    def finding(self, cause: str, seen: Seen) -> CheckFinding:
        known = _CAUSES.get(cause) or Cause("error", "input row", "a row that cannot be read as ids with labels", "")
        total = self.n[_TOTALS[known.unit]]
        return CheckFinding(
            severity=known.severity, cause=cause, text=known.text, count=seen.count, unit=known.unit,
            share=seen.count / total if total else None, example=seen.example, detail=seen.detail,
            remedy=seen.remedy or known.remedy, rows=tuple(seen.sources),
        )


_CAUSES = {
    **LABEL_CAUSES, **DIFFERENCE_CAUSES,
    "too_many_rejects": Cause("error", "input row", "more rows are rejected than --max-rejects allows", "mend them"),
    "rejected_labels": Cause("error", "input row", "labels that are neither -100 nor the id, nor shifted by one", ""),
    "rejected_length": Cause("error", "input row", "lists of one row that differ in length", ""),
    "rejected_ids": Cause("error", "input row", "ids that this tokenizer does not have", ""),
}


def _begins_anew(roles: tuple[str, ...]) -> bool:
    """Whether a system message stands behind an answer."""
    return "system" in roles[roles.index("assistant") :] if "assistant" in roles else False


def _shown(document: Document, hit: LabelHit) -> str:
    return f"tokens {hit.start}-{hit.end - 1}: {window(document, hit)}"


def as_sample(document: Document, source: str, encoder: ChatEncoder, expected: Mask | None = None) -> Sample:
    """A document in the form of our rows: weight 1 for `expected` [n], else for all that the model must emit."""
    kinds, messages = document.kinds, document.messages
    n = len(kinds)
    wanted = (kinds >= Kind.EMPTY_THINK) & (kinds <= Kind.STOP) if expected is None else expected
    edges = np.flatnonzero((np.diff(kinds) != 0) | (np.diff(messages) != 0) | np.diff(wanted)) + 1
    borders = [0, *edges.tolist(), n]
    spans = []
    for a, b in pairwise(borders):
        kind = Kind(int(kinds[a]))
        reason = kind.reason if wanted[a] or not kind.expected else Reason.SPLIT
        spans.append(Span(a, b, int(messages[a]), float(wanted[a]), reason))
    outcomes = {i: "exact" for i, role in enumerate(document.roles) if role == "assistant"}
    return Sample(document.ids, tuple(spans), outcomes, source, {}, encoder.decode)

