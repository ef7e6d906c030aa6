"""Write docs/cli.md from --help; `python -m scripts.cli_docs` after changing an option."""

from __future__ import annotations

from pathlib import Path

import click

from chatloss.cli import cli

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"


def render() -> str:
    """The page: every command's help, as the terminal shows it."""
    parts = ["# Command line\n\nMade from `--help` by `make docs`; a test keeps it so.\n"]
    names = cli.list_commands(click.Context(cli))
    commands = [("chatloss", cli), *((f"chatloss {name}", cli.commands[name]) for name in names)]
    for name, command in commands:
        context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
        parts.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```\n")
    parts.append(
        "## Exit codes\n\n| code | meaning |\n| --- | --- |\n| 0 | fine |\n"
        "| 1 | the data or the recipe is invalid, or a check failed |\n| 2 | the command line is wrong |\n"
        "| 3 | an internal error |\n| 130 | interrupted |\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), "utf-8")
