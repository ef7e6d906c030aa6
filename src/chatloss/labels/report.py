"""What an audit of labels found: as JSON, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.check_report import CheckFinding, Findings
from chatloss.findings import Line, Lines, plural
from chatloss.labels.reconstruct import Kind
from chatloss.sample import Sample

__all__ = ["LABEL_COUNTS", "LabelsReport"]

LABEL_COUNTS = ("input_rows", "rejected_rows", "documents", "turns", "trained_turns", "tokens", "trained_tokens")


@dataclass(frozen=True, slots=True)
class LabelsReport(Findings):
    """The result of an audit of rows that another tool made.

    `columns` counts rows by the name of the column that said what is trained. `kinds` maps what tokens are to (how
    many, how many of them trained). With chats, `differences` counts turns by what sets them apart from ours ("equal":
    nothing), and `tokens` those trained by both, by us only and by them only. `samples` are rows in our form, weights
    as they should be, and `weights[i]` those of the other tool.
    """

    tokenizer: str
    columns: Mapping[str, int]
    counts: Mapping[str, int]
    kinds: Mapping[Kind, tuple[int, int]]
    findings: tuple[CheckFinding, ...]
    differences: Mapping[str, int] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    weights: Mapping[int, npt.NDArray[np.float32]] = field(default_factory=dict, repr=False)
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with stable keys: what `chatloss check --labels --json` prints."""
        kinds = {kind.name.lower(): {"tokens": total, "trained": on} for kind, (total, on) in self.kinds.items()}
        out = {
            "tokenizer": self.tokenizer, "columns": dict(self.columns), **self.counts, "tokens_by_kind": kinds,
            "severities": self.severities, "findings": [finding.to_dict() for finding in self.findings],
        }
        return {**out, "differences": dict(self.differences), "tokens_trained": dict(self.tokens)}

    def summary_for_page(self) -> dict[str, object]:
        """Words for the line under a page's title."""
        told = {f"{name}s" if name != "info" else "notes": count for name, count in self.severities.items()}
        return {"labels from": ", ".join(self.columns), "documents": self.counts["documents"],
                "turns": self.counts["turns"], **told}

    # -- the terminal ----------------------------------------------------------------------------------------------

    def render(self, *, color: bool = True) -> Lines:
        """The report for a rich console (or `str()`): totals, what is trained, one finding after the other."""
        n = self.counts
        share = n["trained_tokens"] / n["tokens"] if n["tokens"] else 0.0
        verdict = self.verdict(f"; {plural(n['trained_tokens'], 'token')} trained ({share:.1%})")
        told = [*self._totals(), Line(), *self._trained(), Line(), *self._differences(), *self.finding_lines()]
        return Lines([*told, verdict], color)

    def _totals(self) -> list[Line]:
        n = self.counts
        read = plural(n["input_rows"], "row")
        if n["rejected_rows"]:
            read += f" ({n['rejected_rows']:,} rejected)"
        columns = ", ".join(self.columns) or "nothing"
        parts = [f"{read}, trained by {columns}", plural(n["documents"], "document"), plural(n["turns"], "turn"),
                 plural(n["tokens"], "token")]
        return [Line(text=" → ".join(parts), style="bold")]

    def _trained(self) -> list[Line]:
        """A line for each kind of token: how many there are, and how many of them are trained."""
        lines = []
        for kind, (total, on) in self.kinds.items():
            share = on / total if total else 0.0
            odd = (on > 0) != kind.expected if kind not in (Kind.EMPTY_THINK, Kind.START) else False
            style = "yellow" if odd else "green" if on else "bright_black"
            head = ((f"{kind.label:>24} ", style), (f"{total:>11,}  ", ""))
            lines.append(Line(head, f"{on:,} trained ({share:.1%})" if on else "not trained", style))
        return lines

    def _differences(self) -> list[Line]:
        """Beside the encoder's rows: turns by name of the difference, tokens by who trains them."""
        if not self.differences:
            return []
        tokens = " · ".join(f"{name} {count:,}" for name, count in self.tokens.items() if count)
        lines = [Line(text="beside the chats", style="bold"), Line(((f"{'tokens trained by':>24} ", ""),), tokens)]
        for name, count in self.differences.items():
            style = "green" if name == "equal" else "yellow"
            lines.append(Line(((f"{name.replace('_', ' '):>24} ", style), (f"{count:>11,}", ""))))
        return [*lines, Line()]
