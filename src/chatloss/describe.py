"""What a chat template does, found by rendering: what `chatloss template` prints."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from chatloss.describe_fields import content_findings, environment_findings, role_findings, tool_findings
from chatloss.describe_turns import history_findings, prompt_findings, stop_findings
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError
from chatloss.findings import MARKS, SEVERITIES, STYLES, Line, Lines, inline, plural
from chatloss.probes import Probes, TemplateFinding, answer, refusal, user

__all__ = ["TemplateFinding", "TemplateReport", "describe"]

GROUPS = ("template", "prompt", "stop", "history", "content", "tools", "roles", "around")
_SECTIONS: tuple[Callable[[Probes], Iterator[TemplateFinding]], ...] = (
    prompt_findings, stop_findings, history_findings, content_findings, tool_findings, role_findings,
    environment_findings,
)
_SECTIONS_WITHOUT_CHATS = (tool_findings, environment_findings)


@dataclass(frozen=True, slots=True)
class TemplateReport:
    """All findings about one template with one tokenizer, in reading order. `tokenizer` is what it was loaded from."""

    tokenizer: str
    findings: tuple[TemplateFinding, ...]

    def __getitem__(self, name: str) -> TemplateFinding:
        """The finding of that name; raises `KeyError`."""
        for finding in self.findings:
            if finding.name == name:
                return finding
        raise KeyError(name)

    def __contains__(self, name: str) -> bool:
        return any(finding.name == name for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `chatloss template --json` prints."""
        counts = Counter(finding.severity for finding in self.findings)
        return {
            "tokenizer": self.tokenizer,
            "counts": {severity: counts[severity] for severity in SEVERITIES},
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def _rows(self) -> str:
        """The verdict in short: how many rows the turns of each kind of chat take."""
        told = []
        for finding in self.findings:
            if finding.name.startswith("rows_"):
                lost = sum(n for outcome, n in finding.value["outcomes"].items() if outcome not in ("exact", "split"))
                rows, turns = finding.value["rows"], finding.value["turns"]
                shape = finding.name.removeprefix("rows_")
                told.append(f"{shape} {turns} → {rows}" + (f" ({lost} lost)" if lost else ""))
        return f"turns → rows: {' · '.join(told)}" if told else ""

    def render(self, *, color: bool = True, witnesses: bool = True) -> Lines:
        """The report for a rich console (or `str()`), by group; warnings and errors are marked and carry the word."""
        counts = Counter(finding.severity for finding in self.findings)
        told = [plural(counts[severity], severity) for severity in ("error", "warning") if counts[severity]]
        head = " · ".join([f"template of {inline(self.tokenizer)}" if self.tokenizer else "template", *told])
        lines = [Line(text=head, style="bold")]
        if rows := self._rows():
            lines.append(Line(text=rows))
        for group, found in groupby(self.findings, key=lambda finding: finding.group):
            lines += [Line(), Line(text=group, style="bold")]
            for finding in found:
                lines += _lines(finding, witnesses)
        return Lines(lines, color)


def _lines(finding: TemplateFinding, witnesses: bool) -> list[Line]:
    style = STYLES[finding.severity]
    serious = finding.severity != "info"
    mark = f"{MARKS[finding.severity]} " if serious else "  "
    name = finding.name.replace("_", " ")
    text = inline(f"{finding.severity}: {finding.statement}" if serious else finding.statement)
    lines = [Line(((mark, style if serious else ""), (f"{name:<24}", style if serious else "")), text)]
    if witnesses and finding.witness is not None:
        lines.append(Line(((" " * 26, ""),), str(finding.witness), "bright_black"))
    if finding.remedy:
        lines.append(Line(((" " * 26, ""), ("→ ", "green")), inline(finding.remedy), "green"))
    return lines


def describe(encoder: ChatEncoder) -> TemplateReport:
    """What the encoder's template does to chats, each finding with the shortest text that shows it.

    Never raises for what a template does: one that does not compile, or breaks the sandbox's bounds, is a finding.

    >>> from chatloss.demo import tokenizer_directory
    >>> report = describe(ChatEncoder.load(tokenizer_directory()))
    >>> report["generation_prompt"].value, report["rows_plain"].value["rows"]
    ('<|im_start|>assistant\\n', 1)
    """
    findings: list[TemplateFinding] = []
    try:
        probes = Probes.of(encoder)
        refused = _refused(probes)
        findings += refused
        for section in _SECTIONS_WITHOUT_CHATS if refused else _SECTIONS:
            findings += section(probes)
    except ChatlossError as error:
        findings.append(_broken(error))
    order = sorted(findings, key=lambda finding: GROUPS.index(finding.group))
    return TemplateReport(encoder.loaded.name, tuple(order))


def _refused(probes: Probes) -> list[TemplateFinding]:
    """One finding if a question and its answer cannot be rendered: there is little more to find out then."""
    rendering = probes.rendering(user(), answer())
    if rendering.text(len(probes.opening) + 2) is not None:
        return []
    why = refusal(rendering)
    words = f"a question and its answer cannot be rendered: {why}"
    lacking = re.fullmatch(r"'(\w+_token)' is undefined", why)
    remedy = "give another with --chat-template FILE"
    if lacking:
        remedy = f"give the tokenizer that the template belongs to: this one has no {lacking[1]}"
    elif probes.text(user(), answer(), tools=True) is not None:
        words += "; with tools it can"
    return [TemplateFinding("template", "renders", False, words, "error", remedy=remedy)]


def _broken(error: ChatlossError) -> TemplateFinding:
    where = f" ({error.where})" if error.where else ""
    remedy = error.hint or "give another with --chat-template FILE"
    return TemplateFinding("template", "error", error.kind, f"{error.what}{where}", "error", remedy=remedy)
