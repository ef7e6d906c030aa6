"""`check --labels`: the audit of rows that another tool prepared."""

from __future__ import annotations

import sys
from typing import NoReturn

from chatloss.commands.common import console, print_json
from chatloss.errors import UsageError
from chatloss.options import Source

__all__ = ["audit_labels"]


def audit_labels(
    source: Source, labels: tuple[str, ...], chats: tuple[str, ...], html: str | None, as_json: bool, strict: bool
) -> NoReturn:
    """Print the audit, write the page, and exit with what was found."""
    from chatloss.labels.audit import check_labels
    from chatloss.labels.rows import read_labels

    if source.data:
        raise UsageError("DATA and --labels do not go together", hint="give the chats of these rows with --chats")
    encoder = source.encoder()
    rows = read_labels(list(labels), vocabulary=getattr(encoder.loaded.tokens, "size", 0))
    report = check_labels(rows, encoder, max_rejects=source.max_rejects, keep_samples=2000 if html else 0)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, report.samples, title=f"chatloss check --labels {' '.join(labels)}", decode=encoder.decode,
                   roles=report.roles, summary=report.summary_for_page(), findings=report.findings_for_page(),
                   rejects=rows.rejects, peer_weights=report.weights, peer_name="labels")
        print(f"wrote {html}", file=sys.stderr)
    raise SystemExit(report.exit_code(strict))
