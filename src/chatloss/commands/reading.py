"""Commands that read chats: view, encode, template, check, compare."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from chatloss.commands.common import console, numbers, print_json, tell_rejects
from chatloss.commands.labels import audit_labels
from chatloss.errors import UsageError, one_line
from chatloss.options import Source, reading_options

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder
    from chatloss.pipeline import Encoded

__all__ = ["check", "compare", "encode", "template", "view"]


@click.command()
@reading_options
@click.option("--rows", "-n", "count", type=click.IntRange(min=1), default=5, show_default=True, help="Conversations.")
@click.option("--row", type=click.IntRange(min=1), help="Only this conversation (1-based).")
@click.option("--html", metavar="FILE", help="Write a page instead; all rows unless -n is given.")
@click.option("--ids", is_flag=True, help="Show token ids.")
@click.option("--weights", is_flag=True, help="Show every weight.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per row, with the text of every span.")
def view(
    source: Source, count: int, row: int | None, html: str | None, ids: bool, weights: bool, as_json: bool
) -> None:
    """Show tokens in colour, with what is trained, by how much and why. DATA may be a prepared directory."""
    from chatloss.dataset import is_prepared
    from chatloss.pipeline import encodings
    from chatloss.view import render_sample, render_summary

    encoder, reader = source.encoder(), source.reader(lenient=True)
    made: Iterable[Encoded] = encodings(reader, encoder, markers=source.markers(encoder))
    if any(map(is_prepared, source.data)):
        made = _prepared(source, encoder)
    asked = click.get_current_context().get_parameter_source("count")
    if row is not None:
        made = islice(made, row - 1, row)
    elif html is None or asked is not click.core.ParameterSource.DEFAULT:
        made = islice(made, count)
    shown = list(made)
    samples = [sample for one in shown for sample in one.encoding.rows]
    if html is not None:
        from chatloss.page import write_page

        roles = {one.conversation.source: _roles(one) or [] for one in shown if one.conversation}
        untrained = {one.conversation.source: one.encoding.untrained for one in shown if one.conversation}
        write_page(html, samples, title=f"chatloss view {' '.join(source.data)}", decode=encoder.decode, roles=roles,
                   findings=_page_findings(shown), rejects=reader.rejects, untrained=untrained)
        print(f"wrote {html}: {len(samples)} rows of {len(shown)} conversations", file=sys.stderr)
    elif as_json:
        for sample in samples:
            spans = [
                {"start": s.start, "end": s.end, "message": s.message, "weight": s.weight,
                 "reason": s.reason.name.lower(), "text": encoder.decode(sample.input_ids[s.start : s.end].tolist())}
                for s in sample.spans
            ]
            print_json({**sample.to_dict(), "spans": spans})
    else:
        out = console()
        for one in shown:
            for sample in one.encoding.rows:
                out.print(render_sample(sample, decode=encoder.decode, show_ids=ids, show_weights=weights,
                                            roles=_roles(one)))
                out.print()
            for problem in one.encoding.problems:
                where = one.conversation.source if one.conversation else ""
                what = one_line(f"! {problem.where(where)}: {problem.detail}")
                out.print(what, style="yellow", markup=False)
                out.print(f"  hint: {one_line(problem.remedy)}", markup=False)
        out.print(render_summary(samples))
    if row is not None and not shown:
        raise UsageError(f"there is no conversation {row}", hint=f"the data has {reader.n_rows}")
    tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)


def _page_findings(shown: list[Encoded]) -> list[dict[str, Any]]:
    """What the policies do not settle, one finding per cause, with the detail of its first example."""
    found: dict[str, dict[str, Any]] = {}
    for one in shown:
        where = one.conversation.source if one.conversation else ""
        for problem in one.encoding.problems:
            severity = "error" if problem.fatal else "warning"
            first = {"severity": severity, "cause": f"{problem.cause.replace('_', ' ')}: {problem.detail}", "count": 0,
                     "example": problem.where(where), "remedy": problem.remedy, "rows": []}
            finding = found.setdefault(problem.cause, first)
            finding["count"] += 1
            finding["rows"].append(where)
    return list(found.values())


@click.command()
@reading_options
@click.option("--json", "as_json", is_flag=True, help="The only format there is; accepted for clarity.")
def encode(source: Source, as_json: bool) -> None:
    """Print one JSON object per row: source, input_ids, weights, turns, reasons, outcomes."""
    from chatloss.pipeline import encodings

    encoder, reader = source.encoder(), source.reader()
    try:
        for made in encodings(reader, encoder, markers=source.markers(encoder), strict=True):
            for sample in made.encoding.rows:
                print_json(sample.to_dict())
    finally:
        sys.stdout.flush()
        tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)


@click.command()
@click.argument("template")
@click.option("--tokenizer", "-t", help="The tokenizer it is used with, if TEMPLATE is a file.")
@click.option("--json", "as_json", is_flag=True, help="The findings as JSON.")
def template(template: str, tokenizer: str | None, as_json: bool) -> None:
    """Say what a chat template does, with a witness for each finding. TEMPLATE: a tokenizer, or a template file."""
    from pathlib import Path

    from chatloss.describe import describe
    from chatloss.encode import ChatEncoder
    from chatloss.load import Loaded, read_template
    from chatloss.tokens import CallableTokens

    if tokenizer is not None:
        encoder = ChatEncoder.load(tokenizer, Path(template))
    elif Path(template).is_file() and not template.endswith(".json"):
        # Without a tokenizer the texts can still be told: every byte is a token.
        tokens = CallableTokens(lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace"))
        special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        loaded = Loaded(tokens, special_tokens=special, name="bytes")
        encoder = ChatEncoder.load(loaded, read_template(Path(template)))
    else:
        encoder = ChatEncoder.load(template)
    report = describe(encoder)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.render())


@click.command()
@partial(reading_options, data_required=False)
@click.option("--labels", multiple=True, metavar="FILE", help="Rows that another tool prepared, instead of DATA.")
@click.option("--chats", multiple=True, metavar="DATA", help="With --labels: the chats they were made from.")
@click.option("--html", metavar="FILE", help="Also write a page with the findings and the rows.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
def check(
    source: Source, labels: tuple[str, ...], chats: tuple[str, ...], html: str | None, as_json: bool, strict: bool
) -> None:
    """Audit chats before training, or with --labels the rows that another tool made of them.

    One line per cause, with an example and what settles it.
    """
    from chatloss.check import check as audit

    if labels:
        audit_labels(source, labels, chats, html, as_json, strict)
    if not source.data or chats:
        what = "--chats goes with --labels" if chats else "there is nothing to check"
        raise UsageError(what, hint="give chats as DATA, or rows of another tool with --labels FILE [--chats DATA]")
    encoder, reader = source.encoder(), source.reader(lenient=True)
    kept = 2000 if html else 0
    report = audit(
        reader, encoder, markers=source.markers(encoder), max_rejects=source.max_rejects, keep_samples=kept
    )
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, report.samples, title=f"chatloss check {' '.join(source.data)}", decode=encoder.decode,
                   roles=report.roles, summary=report.summary_for_page(), findings=report.findings_for_page(),
                   rejects=reader.rejects, untrained=report.untrained)
        print(f"wrote {html}", file=sys.stderr)
    raise SystemExit(report.exit_code(strict))


@click.command()
@reading_options
@click.option("--html", metavar="FILE", help="Also write a page with tables, curves and the first 500 rows.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--micro-rows", default="1,4,8", show_default=True, help="Rows per micro-batch, for means of means.")
@click.option("--ranks", default="2,4,8", show_default=True, help="Numbers of ranks, for means of rank means.")
def compare(source: Source, html: str | None, as_json: bool, micro_rows: str, ranks: str) -> None:
    """Show the share of the loss that each turn gets under each reduction, and by mistake, by length."""
    from chatloss.compare import compare as shares
    from chatloss.pipeline import encodings

    encoder, reader = source.encoder(), source.reader()
    first: list[Any] = []

    def examples() -> Iterable[list[Any]]:
        for made in encodings(reader, encoder, markers=source.markers(encoder), strict=True):
            if len(first) < 500:
                first.extend(made.encoding.rows)
            yield made.encoding.rows

    try:
        sizes, counts = numbers(micro_rows, "--micro-rows"), numbers(ranks, "--ranks")
        report = shares(examples(), micro_rows=sizes, ranks=counts)
    finally:
        tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, first, title=f"chatloss compare {' '.join(source.data)}", decode=encoder.decode,
                   sections=report.sections(), weights_by_reduction=report.weights_by_reduction(first),
                   rejects=reader.rejects)
        print(f"wrote {html}", file=sys.stderr)



def _prepared(source: Source, encoder: ChatEncoder) -> Iterable[Encoded]:
    """The examples of prepared directories; what they were made of is not in them."""
    from chatloss.dataset import Prepared
    from chatloss.encode import Encoding
    from chatloss.pipeline import Encoded

    for directory in source.data:
        prepared = Prepared(directory, encoder.decode)
        prepared.check_made_with(encoder)
        for rows in prepared:
            yield Encoded(None, Encoding(rows, rows[0].outcomes, rows[0].untrained, ()))


def _roles(made: Encoded) -> list[str] | None:
    return [message.role for message in made.conversation.messages] if made.conversation else None
