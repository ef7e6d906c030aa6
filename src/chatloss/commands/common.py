"""What commands share: how they print, and how they tell of rejects."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from chatloss.errors import UsageError, one_line

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console", "numbers", "print_json", "tell_rejects"]


def console(*, err: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=err, highlight=False, soft_wrap=False)


def print_json(value: object) -> None:
    import orjson

    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))


def tell_rejects(rejects: Sequence[Any], counts: Any, rejected: int) -> None:
    """A line a cause on stderr, with the first example of each."""
    seen: set[str] = set()
    for reject in rejects:
        if reject.kind not in seen:
            seen.add(reject.kind)
            count = counts[reject.kind]
            print(f"rejected: {count} row{'s' * (count != 1)} ({reject.kind}): {one_line(reject.what)}",
                  file=sys.stderr)
            print(f"  --> {one_line(reject.where)}\nhint: {one_line(reject.hint)}", file=sys.stderr)


def numbers(text: str, option: str) -> tuple[int, ...]:
    numbers = text.split(",")
    if not all(number.strip().isdigit() and int(number) > 0 for number in numbers):
        raise UsageError(f"{option} takes numbers, not {text!r}", hint=f"for example {option} 1,2,4")
    return tuple(int(number) for number in numbers)
