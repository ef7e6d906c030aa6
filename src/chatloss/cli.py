"""The command line: one group of commands, and what becomes of errors. Data on stdout, messages on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from chatloss.commands import preparing, reading, training
from chatloss.errors import ChatlossError, UsageError, one_line

__all__ = ["cli", "main"]


class _Commands(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [str(command.name) for command in _COMMANDS]

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError:
            import difflib

            close = difflib.get_close_matches(args[0], self.commands, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(self.list_commands(ctx))}"
            raise UsageError(f"there is no command {args[0]!r}", hint=hint) from None


_COMMANDS: tuple[click.Command, ...] = (
    training.demo, reading.view, reading.encode, reading.template, reading.check, reading.compare, preparing.prepare,
    training.train, training.verify, training.recipes,
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="chatloss", message="%(prog)s %(version)s")
def cli() -> None:
    """Chats in; token ids, a weight for every token and a loss out: shown and proven."""


for _command in _COMMANDS:
    cli.add_command(_command)


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
        print(f"error: internal: {type(error).__name__}: {one_line(str(error))}", file=sys.stderr)
        print("hint: a bug in chatloss; run again with CHATLOSS_TRACEBACK=1 and report what it prints", file=sys.stderr)
        return 3


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130
