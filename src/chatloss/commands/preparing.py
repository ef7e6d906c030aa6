"""The command that makes training rows of chats once and for all: prepare."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from chatloss.commands.common import console
from chatloss.errors import UsageError
from chatloss.options import Source, reading_options

if TYPE_CHECKING:
    from chatloss.manifest import Counts
    from chatloss.prepare import Progress

__all__ = ["prepare"]


@click.command()
@reading_options
@click.option("--output", "-o", required=True, metavar="DIR", help="The directory to make, or to go on with.")
@click.option("--workers", "-j", type=click.IntRange(min=1), default=1, show_default=True, help="Processes.")
@click.option("--ray", metavar="ADDRESS", help="Run on a Ray cluster instead: its address, auto, or local.")
@click.option("--export", type=click.Choice(("rows", "labels")), default="rows", show_default=True,
              help="All that a row holds, or input_ids and labels for other trainers.")
@click.option("--encoder", type=click.Choice(("auto", "reference", "fast")), default="auto", show_default=True,
              help="How ids are made, never which: fastokens where it is shown to be equal, or tokenizers.")
@click.option("--fresh", is_flag=True, help="Start anew although the directory holds something.")
def prepare(source: Source, output: str, workers: int, ray: str | None, export: str, encoder: str, fresh: bool) -> None:
    """Encode DATA into a directory of Parquet shards; the same command again goes on where it stopped."""
    from pathlib import Path

    from chatloss import prepare as preparing
    from chatloss.cluster import on_ray
    from chatloss.load import read_template
    from chatloss.policy import Policy

    if not 0 <= source.max_rejects <= 1:
        what = f"a share is between 0 and 1, not {source.max_rejects}"
        raise UsageError(what, where="--max-rejects", hint="for example 0.01")
    template = source.chat_template
    job = preparing.Job(
        tokenizer=source.tokenizer, chat_template=None if template is None else read_template(Path(template)),
        template_kwargs=source.template_kwargs, policy=Policy.from_dict(source.policy),
        markers=source.markers(source.encoder()) if source.response_template else None, export=export,
        backend=encoder, trace=source.trace,
    )
    manifest = preparing.prepare(
        source.data, output, job, input_format=source.input_format, max_rejects=source.max_rejects, workers=workers,
        fresh=fresh, progress=_progress, note=lambda text: print(f"note: {text}", file=sys.stderr),
        runner=None if ray is None else on_ray(ray),
    )
    counts = manifest["counts"]
    turns = ", ".join(f"{n:,} {name}" for name, n in counts["outcomes"].items())
    kinds = {"conversations": "conversations", "pairs": "pairs", "judged": "judged answers"}
    held = " and ".join(f"{counts[kind]:,} {name}" for kind, name in kinds.items() if counts[kind]) or "nothing"
    print(f"{output}: {counts['rows']:,} rows of {held}, {counts['tokens']:,} tokens, {counts['trained']:,} trained; "
          f"turns: {turns or 'none'}", file=sys.stderr)
    if counts["untrained"]:
        why = ", ".join(f"{n:,} {name}" for name, n in counts["untrained"].items())
        print(f"untrained messages: {why}", file=sys.stderr)
    if counts["rejected"]:
        causes = ", ".join(f"{n:,} {kind}" for kind, n in counts["rejected"].items())
        print(f"rejected {sum(counts['rejected'].values()):,} of {counts['records']:,} rows ({causes}); see "
              f"{output}/rejects.jsonl", file=sys.stderr)


def _progress(total: int) -> Progress:
    """A bar with rate and time left on a terminal, nothing elsewhere. `total`: bytes to read, 0 if not known."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    shown = console(err=True)
    bar = Progress(
        BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=shown, disable=not shown.is_terminal, transient=True,
    )
    task = bar.add_task("", total=total or None)
    seen = [0, 0]

    def done(size: int, counts: Counts) -> None:
        seen[0] += counts.conversations + counts.pairs + counts.judged
        seen[1] += sum(counts.rejected.values())
        text = f"{seen[0]:,} examples" + (f", {seen[1]:,} rejected" if seen[1] else "")
        bar.update(task, advance=size, description=text)

    bar.start()
    click.get_current_context().call_on_close(bar.stop)
    return done
