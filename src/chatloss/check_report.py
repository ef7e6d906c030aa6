"""What an audit found, as JSON, for the terminal and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from chatloss.findings import MARKS, SEVERITIES, STYLES, Line, Lines, inline, plural
from chatloss.sample import Sample

__all__ = ["COUNTS", "TURN_STATUSES", "CheckFinding", "CheckReport", "Findings"]

# What becomes of a turn, exactly one of these; `rejected`: its conversation cannot be used as a whole.
TURN_STATUSES = (
    "exact", "split", "off_prompt", "altered", "unrenderable", "switched_off", "truncated", "rejected",
)
COUNTS = ("input_rows", "rejected_rows", "conversations", "messages", "turns", "trained_turns", "rows", "tokens",
          "trained_tokens", "refused_conversations", "refused_turns", "texts")
_TRAINED = ("content", "reasoning", "call", "stop", "header")


@dataclass(frozen=True, slots=True)
class CheckFinding:
    """One cause: how often, of what, where first, and the flag or edit that settles it.

    `share` is of all that `unit` names (None where there is nothing to share). `rows` are up to 100 sources.
    """

    severity: str
    cause: str
    text: str
    count: int
    unit: str
    share: float | None = None
    example: str = ""
    detail: str = ""
    remedy: str = ""
    rows: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "severity": self.severity, "cause": self.cause, "text": self.text, "count": self.count,
            "unit": self.unit, "share": self.share, "example": self.example, "detail": self.detail,
            "remedy": self.remedy, "rows": list(self.rows),
        }


class Findings:
    """What reports of findings have in common; the findings are sorted by severity and count."""

    __slots__ = ()
    findings: tuple[CheckFinding, ...]

    def __getitem__(self, cause: str) -> CheckFinding:
        """The finding of that cause; raises `KeyError`."""
        for finding in self.findings:
            if finding.cause == cause:
                return finding
        raise KeyError(cause)

    def __contains__(self, cause: str) -> bool:
        return any(finding.cause == cause for finding in self.findings)

    @property
    def severities(self) -> dict[str, int]:
        counts = Counter(finding.severity for finding in self.findings)
        return {severity: counts[severity] for severity in SEVERITIES}

    def exit_code(self, strict: bool = False) -> int:
        """1 if there are errors, or, with `strict`, warnings; else 0."""
        counts = self.severities
        return int(bool(counts["error"] or (strict and counts["warning"])))

    def findings_for_page(self) -> list[dict[str, Any]]:
        """The findings in the shape that `page.page(findings=...)` takes."""
        return [
            {
                "severity": finding.severity, "cause": f"{finding.cause.replace('_', ' ')}: {finding.text}",
                "count": finding.count, "example": finding.example, "remedy": finding.remedy, "rows": finding.rows,
            }
            for finding in self.findings
        ]

    def finding_lines(self) -> list[Line]:
        """What a terminal shows of them: cause, first example and remedy of each, and an empty line."""
        lines = [line for finding in self.findings for line in _lines(finding)]
        return [*lines, Line()] if lines else []

    def verdict(self, more: str = "") -> Line:
        """The last line: how many there are of each severity."""
        counts = self.severities
        told = [plural(counts["error"], "error"), plural(counts["warning"], "warning"), plural(counts["info"], "note")]
        worst = next((severity for severity in SEVERITIES if counts[severity]), "info")
        return Line(text=", ".join(told) + more, style=STYLES[worst] if worst != "info" else "bold green")


@dataclass(frozen=True, slots=True)
class CheckReport(Findings):
    """The result of an audit.

    `counts` has the keys of `COUNTS`; refused_conversations and refused_turns are what encoding refuses under the
    policy. `turns` counts every turn once, by status: the sum is counts["turns"]. `reasons` are tokens by reason,
    `lengths` tokens of a row, `turn_lengths` trained tokens of a turn. `findings` are sorted by severity and count.
    `samples`, `roles` and `untrained` are for a page.
    """

    tokenizer: str
    counts: Mapping[str, int]
    turns: Mapping[str, int]
    reasons: Mapping[str, int]
    lengths: Mapping[str, float]
    turn_lengths: Mapping[str, float]
    findings: tuple[CheckFinding, ...]
    samples: tuple[Sample, ...] = field(default=(), repr=False)
    roles: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    untrained: Mapping[str, Mapping[int, str]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with stable keys: what `chatloss check --json` prints."""
        return {
            "tokenizer": self.tokenizer, **self.counts,
            "trained_share": _share(self.counts["trained_tokens"], self.counts["tokens"]),
            "turns_by_outcome": dict(self.turns), "tokens_by_reason": dict(self.reasons),
            "row_lengths": dict(self.lengths), "turn_lengths": dict(self.turn_lengths),
            "severities": self.severities, "findings": [finding.to_dict() for finding in self.findings],
        }

    def summary_for_page(self) -> dict[str, object]:
        """Words for the line under a page's title."""
        counts = self.severities
        told = {f"{severity}s" if severity != "info" else "notes": counts[severity] for severity in SEVERITIES}
        return {"conversations": self.counts["conversations"], "turns": self.counts["turns"], **told}

    # -- the terminal ----------------------------------------------------------------------------------------------

    def render(self, *, color: bool = True) -> Lines:
        """The report for a rich console (or `str()`): totals, then one cause after the other, the worst first."""
        return Lines([*self._totals(), Line(), *self.finding_lines(), self._verdict()], color)

    def _totals(self) -> list[Line]:
        n = self.counts
        read = plural(n["input_rows"], "input row")
        if n["rejected_rows"]:
            read += f" ({n['rejected_rows']:,} rejected)"
        parts = [read, plural(n["conversations"], "conversation"), plural(n["turns"], "turn"), plural(n["rows"], "row"),
                 plural(n["tokens"], "token")]
        lines = [Line(text=" → ".join(parts), style="bold")]
        told = [f"{name.replace('_', ' ')} {count:,} ({_share(count, n['turns']):.1%})"
                for name, count in self.turns.items() if count]
        lines.append(Line((("turns     ", ""),), " · ".join(told) or "none"))
        trained = [f"{name} {self.reasons[name]:,}" for name in _TRAINED if self.reasons.get(name)]
        share = _share(n["trained_tokens"], n["tokens"])
        text = f"{plural(n['trained_tokens'], 'token')} ({share:.1%}) in {plural(n['trained_turns'], 'turn')}"
        lines.append(Line((("trained   ", ""),), f"{text}: {' · '.join(trained)}" if trained else text))
        for name, lengths in (("row       ", self.lengths), ("turn      ", self.turn_lengths)):
            stats = " · ".join(f"{key} {lengths[key]:,}" for key in ("min", "median", "p95", "max"))
            lines.append(Line(((name, ""),), f"{stats} {'tokens' if name[0] == 'r' else 'trained tokens'}"))
        return lines

    def _verdict(self) -> Line:
        refused = self.counts["refused_conversations"]
        if refused:
            more = f"; prepare and train would refuse {plural(refused, 'conversation')} as things stand"
            return self.verdict(f"{more} ({plural(self.counts['refused_turns'], 'turn')})")
        return self.verdict("" if self.severities["error"] else "; nothing would be refused")


def _lines(finding: CheckFinding) -> list[Line]:
    style = STYLES[finding.severity]
    name = finding.cause.replace("_", " ")
    head = ((f"{MARKS[finding.severity]} {finding.severity:<8}", style), (f"{finding.count:>7,}  ", "bold"))
    share = "" if finding.share is None else f" ({_percent(finding.share)} of {finding.unit}s)"
    lines = [Line(head, f"{name}: {inline(finding.text)}{share}")]
    if finding.example:
        detail = f": {inline(finding.detail)}" if finding.detail else ""
        lines.append(Line(((" " * 19, ""),), f"{inline(finding.example)}{detail}", "bright_black"))
    if finding.remedy:
        lines.append(Line(((" " * 19, ""), ("→ ", "green")), inline(finding.remedy), "green"))
    return lines


def _percent(share: float) -> str:
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0
