"""The command line: thin commands, heavy imports inside functions. Data on stdout, messages on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from chatloss.errors import ChatlossError, UsageError
from chatloss.options import Source, reading_options

if TYPE_CHECKING:
    from rich.console import Console

    from chatloss.pipeline import Encoded

__all__ = ["cli", "main"]


class _Commands(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _ORDER if name in self.commands]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            close = difflib.get_close_matches(args[0], self.commands, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(self.list_commands(ctx))}"
            raise UsageError(f"there is no command {args[0]!r}", hint=hint) from None


_ORDER = ("demo", "view", "encode", "template", "check", "compare", "train", "verify", "recipes")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="chatloss", message="%(prog)s %(version)s")
def cli() -> None:
    """Chats in; token ids, a weight for every token and a loss out: shown and proven."""


def _console(*, err: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=err, highlight=False, soft_wrap=False)


def _print_json(value: object) -> None:
    import orjson

    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


def _roles(made: Encoded) -> list[str] | None:
    return [message.role for message in made.conversation.messages] if made.conversation else None


def _tell_rejects(rejects: Sequence[Any], counts: Any, rejected: int) -> None:
    """A line a cause on stderr, with the first example of each."""
    seen: set[str] = set()
    for reject in rejects:
        if reject.kind not in seen:
            seen.add(reject.kind)
            count = counts[reject.kind]
            print(f"rejected: {count} row{'s' * (count != 1)} ({reject.kind}): {reject.what}", file=sys.stderr)
            print(f"  --> {reject.where}\nhint: {reject.hint}", file=sys.stderr)


@cli.command()
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
    """Show tokens in colour, with what is trained, by how much and why."""
    from chatloss.pipeline import encodings
    from chatloss.view import render_sample, render_summary

    encoder, reader = source.encoder(), source.reader(lenient=True)
    made: Iterable[Encoded] = encodings(reader, encoder, markers=source.markers(encoder))
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
        findings = [_page_finding(one, problem) for one in shown for problem in one.encoding.problems]
        write_page(html, samples, title=f"chatloss view {' '.join(source.data)}", decode=encoder.decode, roles=roles,
                   findings=findings, rejects=reader.rejects)
        print(f"wrote {html}: {len(samples)} rows of {len(shown)} conversations", file=sys.stderr)
    elif as_json:
        for sample in samples:
            spans = [
                {"start": s.start, "end": s.end, "message": s.message, "weight": s.weight,
                 "reason": s.reason.name.lower(), "text": encoder.decode(sample.input_ids[s.start : s.end].tolist())}
                for s in sample.spans
            ]
            _print_json({**sample.to_dict(), "spans": spans})
    else:
        console = _console()
        for one in shown:
            for sample in one.encoding.rows:
                console.print(render_sample(sample, decode=encoder.decode, show_ids=ids, show_weights=weights,
                                            roles=_roles(one)))
                console.print()
            for problem in one.encoding.problems:
                where = one.conversation.source if one.conversation else ""
                console.print(f"! {where} messages[{problem.message}]: {problem.detail}", style="yellow", markup=False)
                console.print(f"  hint: {problem.remedy}", markup=False)
        console.print(render_summary(samples))
    if row is not None and not shown:
        raise UsageError(f"there is no conversation {row}", hint=f"the data has {reader.n_rows}")
    _tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)


def _page_finding(one: Encoded, problem: Any) -> dict[str, Any]:
    where = one.conversation.source if one.conversation else ""
    severity = "error" if problem.fatal else "warning"
    return {"severity": severity, "cause": f"{problem.cause}: {problem.detail}", "count": 1,
            "example": f"{where} messages[{problem.message}]", "remedy": problem.remedy, "rows": [where]}


@cli.command()
@reading_options
@click.option("--json", "as_json", is_flag=True, help="The only format there is; accepted for clarity.")
def encode(source: Source, as_json: bool) -> None:
    """Print one JSON object per row: source, input_ids, weights, turns, reasons, outcomes."""
    from chatloss.pipeline import encodings

    encoder, reader = source.encoder(), source.reader()
    try:
        for made in encodings(reader, encoder, markers=source.markers(encoder), strict=True):
            for sample in made.encoding.rows:
                _print_json(sample.to_dict())
    finally:
        sys.stdout.flush()
        _tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)


@cli.command()
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
        _print_json(report.to_dict())
    else:
        _console().print(report.render())


@cli.command()
@reading_options
@click.option("--html", metavar="FILE", help="Also write a page with the findings and the rows.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
@click.option("--strict", is_flag=True, help="Exit 1 on warnings too.")
def check(source: Source, html: str | None, as_json: bool, strict: bool) -> None:
    """Audit chats before training: one line per cause, with an example and what settles it."""
    from chatloss.check import check as audit

    encoder, reader = source.encoder(), source.reader(lenient=True)
    kept = 2000 if html else 0
    report = audit(
        reader, encoder, markers=source.markers(encoder), max_rejects=source.max_rejects, keep_samples=kept
    )
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, report.samples, title=f"chatloss check {' '.join(source.data)}", decode=encoder.decode,
                   roles=report.roles, summary=report.summary_for_page(), findings=report.findings_for_page(),
                   rejects=reader.rejects)
        print(f"wrote {html}", file=sys.stderr)
    raise SystemExit(report.exit_code(strict))


@cli.command()
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
        sizes, counts = _numbers(micro_rows, "--micro-rows"), _numbers(ranks, "--ranks")
        report = shares(examples(), micro_rows=sizes, ranks=counts)
    finally:
        _tell_rejects(reader.rejects, reader.reject_counts, reader.n_rejected)
    if as_json:
        _print_json(report.to_dict())
    else:
        _console().print(report.render())
    if html is not None:
        from chatloss.page import write_page

        write_page(html, first, title=f"chatloss compare {' '.join(source.data)}", decode=encoder.decode,
                   sections=report.sections(), weights_by_reduction=report.weights_by_reduction(first),
                   rejects=reader.rejects)
        print(f"wrote {html}", file=sys.stderr)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise UsageError(f"{option} takes numbers, not {text!r}", hint=f"for example {option} 1,2,4")
    return tuple(int(number) for number in numbers)


@cli.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set optim.lr=1e-4.")
@click.option("--fresh", is_flag=True, help="Start anew although the output holds a run.")
def train(recipe: str, settings: tuple[str, ...], fresh: bool) -> None:
    """Train the model that RECIPE (a TOML file) describes; the same command again goes on where it stopped."""
    from chatloss.config import Recipe
    from chatloss.sft import run_recipe

    result = run_recipe(Recipe.load(recipe, settings), fresh=fresh)
    print(f"trained {result.steps} steps; model: {result.model}; metrics: {result.metrics}", file=sys.stderr)


@cli.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--ranks", default="1,2,4", show_default=True, help="Numbers of processes to try, on this machine's CPU.")
@click.option("--json", "as_json", is_flag=True, help="The verdicts as JSON.")
def verify(recipe: str, settings: tuple[str, ...], ranks: str, as_json: bool) -> None:
    """Prove on RECIPE that its gradient is the same however a batch is cut; exit 1 beyond tolerance."""
    from dataclasses import asdict

    from chatloss.config import Recipe
    from chatloss.sft import verify_recipe

    report = verify_recipe(Recipe.load(recipe, settings), _numbers(ranks, "--ranks"))
    if as_json:
        verdicts = [{**asdict(verdict), "passed": verdict.passed} for verdict in report.verdicts]
        _print_json({"passed": report.passed, "verdicts": verdicts, "notes": list(report.notes)})
    else:
        print(report.table())
        for note in report.notes:
            print(f"note: {note}")
    raise SystemExit(0 if report.passed else 1)


@cli.group()
def recipes() -> None:
    """List the recipes that come with chatloss, or copy one."""


@recipes.command("ls")
def recipes_ls() -> None:
    """Name every recipe, with its first line."""
    from chatloss.sft import shipped_recipes

    for name, path in shipped_recipes().items():
        print(f"{name:10} {path.read_text('utf-8').splitlines()[0].lstrip('# ')}")


@recipes.command("cp")
@click.argument("name")
@click.argument("target", default=".")
def recipes_cp(name: str, target: str) -> None:
    """Copy recipe NAME to TARGET (a file or a folder); an existing file is never overwritten."""
    from pathlib import Path

    from chatloss.sft import shipped_recipes

    shipped = shipped_recipes()
    if name not in shipped:
        raise UsageError(f"there is no recipe {name!r}", hint=f"one of {', '.join(shipped)}")
    path = Path(target) / f"{name}.toml" if Path(target).is_dir() else Path(target)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(shipped[name].read_text("utf-8"))
    except FileExistsError:
        raise UsageError(f"{path} exists", hint="name another file") from None
    print(f"wrote {path}", file=sys.stderr)


@cli.command()
@click.option("--output", "-o", default="chatloss-demo", show_default=True, help="Where the report and model go.")
@click.option("--steps", type=click.IntRange(min=1), hidden=True)
def demo(output: str, steps: int | None) -> None:
    """The whole way on built-in chats: check, encode, train a tiny model, report. No network, no arguments."""
    from chatloss.demo import run_demo

    run_demo(output, steps=steps)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process: 0 fine, 1 data or recipe invalid, 2 usage, 3 internal, 130 interrupt."""
    sys.exit(_run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    try:
        given = None if arguments is None else list(arguments)
        code = cli.main(args=given, prog_name="chatloss", standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0) if isinstance(code, int) else 0
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except ChatlossError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except click.exceptions.Abort:
        return _interrupted()
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "chatloss"
        print(UsageError(error.format_message().rstrip("."), hint=f"see {where} --help"), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:
        # The reader of our output went away, as `head` does; nothing more can be said there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(ChatlossError(error.strerror or str(error), where=str(error.filename or ""), hint="check path, space and "
                            "permissions"), file=sys.stderr)
        return 1
    except Exception as error:
        if os.environ.get("CHATLOSS_TRACEBACK"):
            raise
        print(f"error: internal: {type(error).__name__}: {error}", file=sys.stderr)
        print("hint: a bug in chatloss; run again with CHATLOSS_TRACEBACK=1 and report what it prints", file=sys.stderr)
        return 3


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130
