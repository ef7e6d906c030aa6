"""`check --labels`: the audit of rows that another tool prepared."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from chatloss.commands.common import console, print_json, tell_rejects
from chatloss.errors import TokenizerError, UsageError
from chatloss.options import Source

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder

__all__ = ["audit_labels"]


def audit_labels(
    source: Source, labels: tuple[str, ...], chats: tuple[str, ...], html: str | None, as_json: bool, strict: bool
) -> NoReturn:
    """Print the audit, write the page, and exit with what was found."""
    from chatloss.labels import check_labels, read_labels

    if source.data:
        raise UsageError("DATA and --labels do not go together", hint="give the chats of these rows with --chats")
    encoder = _encoder(source, bool(chats))
    rows = read_labels(list(labels), vocabulary=getattr(encoder.loaded.tokens, "size", 0))
    made_of = replace(source, data=chats).reader(lenient=True) if chats else None
    kept = 2000 if html else 0
    report = check_labels(rows, encoder, chats=made_of, max_rejects=source.max_rejects, keep_samples=kept)
    if as_json:
        print_json(report.to_dict())
    else:
        console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, report.samples, title=f"chatloss check --labels {' '.join(labels)}", decode=encoder.decode,
                   roles=report.roles, summary=report.summary_for_page(), findings=report.findings_for_page(),
                   rejects=rows.rejects, peer_weights=report.weights, peer_name=", ".join(report.columns))
        print(f"wrote {html}", file=sys.stderr)
    if made_of is not None:
        tell_rejects(made_of.rejects, made_of.reject_counts, made_of.n_rejected)
    raise SystemExit(report.exit_code(strict))


def _encoder(source: Source, chats: bool) -> ChatEncoder:
    """The encoder; without a chat template, one that knows nothing of messages, which is enough for rows alone."""
    try:
        return source.encoder()
    except TokenizerError as error:
        if chats or "has no chat template" not in error.what:
            raise
    from chatloss.encode import ChatEncoder

    return ChatEncoder.load(source.tokenizer, "{{ '' }}")
