"""Commands that compute gradients: train, verify, recipes, demo."""

from __future__ import annotations

import sys

import click

from chatloss.commands.common import numbers, print_json
from chatloss.errors import UsageError

__all__ = ["demo", "recipes", "train", "verify"]


@click.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, e.g. --set optim.lr=1e-4.")
@click.option("--fresh", is_flag=True, help="Start anew although the output holds a run.")
def train(recipe: str, settings: tuple[str, ...], fresh: bool) -> None:
    """Train the model that RECIPE (a TOML file) describes; the same command again goes on where it stopped."""
    from chatloss.config import Recipe
    from chatloss.sft import run_recipe

    result = run_recipe(Recipe.load(recipe, settings), fresh=fresh)
    print(f"trained {result.steps} steps; model: {result.model}; metrics: {result.metrics}", file=sys.stderr)


@click.command()
@click.argument("recipe")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--ranks", default="1,2,4", show_default=True, help="Numbers of processes to try, on this machine's CPU.")
@click.option("--json", "as_json", is_flag=True, help="The verdicts as JSON.")
def verify(recipe: str, settings: tuple[str, ...], ranks: str, as_json: bool) -> None:
    """Prove on RECIPE that its gradient is the same however a batch is cut; exit 1 beyond tolerance."""
    from dataclasses import asdict

    from chatloss.config import Recipe
    from chatloss.sft import verify_recipe

    report = verify_recipe(Recipe.load(recipe, settings), numbers(ranks, "--ranks"))
    if as_json:
        verdicts = [{**asdict(verdict), "passed": verdict.passed} for verdict in report.verdicts]
        print_json({"passed": report.passed, "verdicts": verdicts, "notes": list(report.notes)})
    else:
        print(report.table())
        for note in report.notes:
            print(f"note: {note}")
    raise SystemExit(0 if report.passed else 1)


@click.group()
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


@click.command()
@click.option("--output", "-o", default="chatloss-demo", show_default=True, help="Where the report and model go.")
@click.option("--steps", type=click.IntRange(min=1), hidden=True)
def demo(output: str, steps: int | None) -> None:
    """The whole way on built-in chats: check, encode, train a tiny model, report. No network, no arguments."""
    from chatloss.demo import run_demo

    run_demo(output, steps=steps)
