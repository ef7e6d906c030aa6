"""What `check --labels` finds in rows that other tools really made: ``python -m benchmarks.labels``.

The same 300 tool chats, 150 English and 150 Chinese, three templates. Writes docs/labels.csv, a line for each finding,
and the tables in docs/labels.md.
"""

from __future__ import annotations

import argparse
import csv
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import assets, conformance

from benchmarks.labels_peers import TOOLS, Chat, transformers_tokenizer
from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder, Encoding
from chatloss.labels import check_labels
from chatloss.labels.report import LabelsReport
from chatloss.reader import read

DOCS = Path(__file__).parents[1] / "docs"
TEMPLATES = ("qwen3", "llama3", "gpt-oss")
CHATS = ("tools_en", "tools_zh")


@dataclass(frozen=True, slots=True)
class Result:
    """One tool's rows of one template; `refusal`: its first words where it refuses chats."""

    template: str
    tool: str
    refused: int
    refusal: str
    report: LabelsReport | None


def conversations(count: int) -> list[tuple[Conversation, dict[str, Any]]]:
    """The first `count` chats of each language, with the rows they are read from."""
    found = []
    for name in CHATS:
        rows = zip(read(assets.chat_file(name)), assets.chats(name), strict=True)
        found += [(chat, row) for (chat, row), _ in zip(rows, range(count), strict=False)]
    return found  # type: ignore[return-value]


def results(template: str, chats: list[tuple[Conversation, dict[str, Any]]]) -> Iterator[Result]:
    encoder = ChatEncoder.load(assets.tokenizer_dir(template), clock=lambda: conformance.CLOCK)
    tools = [list(chat.tools) if chat.tools else None for chat, _ in chats]
    given = [Chat(encoder.rendering(chat).messages, tool, row) for (chat, row), tool in zip(chats, tools, strict=True)]
    tokenizer = transformers_tokenizer(template)
    examine, known = encoder.examine, dict[str, Encoding]()  # every tool is compared with the same encodings

    def remembered(chat: Conversation) -> Encoding:
        return known.get(chat.source) or known.setdefault(chat.source, examine(chat))

    object.__setattr__(encoder, "examine", remembered)
    ours = [{"input_ids": row.input_ids, "labels": row.labels} for chat, _ in chats for row in encoder.encode(chat)]
    for tool, make in {"chatloss": lambda *_: iter(ours), **TOOLS}.items():
        try:
            made = list(make(tokenizer, template, given))
        except Exception as error:  # a tool that refuses the template refuses every chat
            made = [" ".join(str(error).split())] * len(given)
        refused = [row for row in made if isinstance(row, str)]
        rows = [row for row in made if not isinstance(row, str)]
        report = check_labels(rows, encoder, chats=[chat for chat, _ in chats]) if rows else None
        yield Result(template, tool, len(refused), refused[0] if refused else "", report)


def table(results: list[Result]) -> str:
    """A table for each template."""
    lines = []
    for template in dict.fromkeys(result.template for result in results):
        lines += [f"### {template}", "", "| rows made by | rows | turns equal to ours | findings (turns or rows) |",
                  "| --- | --- | --- | --- |"]
        for result in (result for result in results if result.template == template):
            lines.append(f"| {result.tool} | {' | '.join(_cells(result))} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _cells(result: Result) -> tuple[str, str, str]:
    words = result.refusal[:90].rstrip().replace("|", "/")
    refused = f"refuses {result.refused} chats: {words}" if result.refused else ""
    if result.report is None:
        return "0", "", refused
    report, shown = result.report, []
    turns = sum(count for name, count in report.differences.items() if name == "equal")
    for finding in report.findings:
        mark = {"error": "**", "warning": "", "info": "_"}[finding.severity]
        if finding.cause != "chat_without_row":  # told as refused
            shown.append(f"{mark}{finding.cause.replace('_', ' ')} {finding.count:,}{mark}")
    told = "; ".join([*shown, *([refused] if refused else [])]) or "none"
    return f"{report.counts['input_rows']:,}", f"{turns:,}", told


def write_csv(results: list[Result], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["template", "tool", "rows", "refused", "turns_equal", "severity", "finding", "unit", "count",
                      "share"])
        for result in results:
            report = result.report
            head = [result.template, result.tool, report.counts["input_rows"] if report else 0, result.refused,
                    report.differences.get("equal", 0) if report else 0]
            out.writerows([*head, f.severity, f.cause, f.unit, f.count, f"{f.share or 0:.4f}"]
                          for f in (report.findings if report else ()))
            if report is None or not report.findings:
                out.writerow([*head, "", "refused" if report is None else "none", "", "", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, default=150, help="of each language")
    parser.add_argument("--print", action="store_true", help="print the tables and write nothing")
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    conformance.freeze_clock()
    chats = conversations(given.chats)
    found = [result for template in TEMPLATES for result in results(template, chats)]
    text = table(found)
    if given.print:
        print(text)
        return
    write_csv(found, DOCS / "labels.csv")
    page = DOCS / "labels.md"
    head, _, rest = page.read_text("utf-8").partition("<!-- tables -->\n")
    page.write_text(f"{head}<!-- tables -->\n\n{text}\n\n<!-- end -->{rest.partition('<!-- end -->')[2]}", "utf-8")


if __name__ == "__main__":
    main()
