"""What audits have in common: severities, the place in a text that shows a finding, and lines for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chatloss.view import visible

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["MARKS", "SEVERITIES", "STYLES", "Line", "Lines", "Witness", "inline", "plural", "quoted", "witness"]

SEVERITIES = ("error", "warning", "info")
MARKS = {"error": "✗", "warning": "!", "info": "·"}
STYLES = {"error": "bold red", "warning": "bold yellow", "info": "cyan"}
AROUND = 28
LONGEST = 72


@dataclass(frozen=True, slots=True)
class Witness:
    """An excerpt of rendered text; [start, end) is the place in it that shows the finding.

    >>> str(Witness("a\\nb", 1, 2))
    'a⟦↵⟧b'
    """

    text: str
    start: int = 0
    end: int = 0

    def __str__(self) -> str:
        before, place, after = self.text[: self.start], self.text[self.start : self.end], self.text[self.end :]
        return f"{inline(before)}⟦{inline(place)}⟧{inline(after)}"

    def to_dict(self) -> dict[str, object]:
        return {"text": self.text, "start": self.start, "end": self.end}


def witness(text: str, start: int, end: int, around: int = AROUND) -> Witness:
    """The shortest excerpt of `text` that shows [start, end): a little before it, a little after, its middle left out.

    >>> str(witness("one two three four five", 8, 13, around=4))
    '…two ⟦three⟧ fou…'
    """
    start = max(0, min(start, len(text)))
    end = max(start, min(end, len(text)))
    before = text[max(0, start - around) : start]
    before = ("…" if start > around else "") + before
    place = text[start:end]
    if len(place) > LONGEST:
        place = f"{place[: LONGEST // 2]} … {place[-LONGEST // 2 :]}"
    after = text[end : end + around] + ("…" if end + around < len(text) else "")
    return Witness(before + place + after, len(before), len(before) + len(place))


def inline(text: str) -> str:
    """`text` from anywhere as part of one line: nothing in it is invisible but plain spaces."""
    return visible(text, whitespace=False).replace("\n", "↵").replace("\t", "⇥")


def quoted(text: str, longest: int = LONGEST) -> str:
    """`text` for a sentence: what is inside the marks is exactly the text, newlines shown.

    >>> quoted("<think>\\n")
    '‹<think>↵›'
    """
    short = text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
    return f"‹{inline(short)}›"


def plural(count: int, noun: str) -> str:
    """
    >>> plural(1, "row"), plural(1200, "reply")
    ('1 row', '1,200 replies')
    """
    if count == 1:
        return f"1 {noun}"
    return f"{count:,} {noun[:-1]}ies" if noun.endswith("y") else f"{count:,} {noun}s"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a report: a `head` of (text, style) pieces, and text behind it that wraps below its own beginning."""

    head: tuple[tuple[str, str], ...] = ()
    text: str = ""
    style: str = ""


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines for a rich console, wrapped to its width without trailing blanks; `str()` lays them out for 100 columns.

    >>> print(Lines([Line((("!  ", ""),), "a remark that is wrapped where it has to be")]).layout(30))
    !  a remark that is wrapped
       where it has to be
    """

    lines: Sequence[Line] = field(default_factory=list)
    color: bool = True

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.segment import Segment

        for pieces in self._laid_out(options.max_width):
            for text, style in pieces:
                yield Segment(text, console.get_style(style) if style and self.color else None)
            yield Segment.line()

    def __str__(self) -> str:
        return self.layout()

    def layout(self, width: int = 100) -> str:
        """The lines as plain text."""
        return "\n".join("".join(text for text, _ in pieces) for pieces in self._laid_out(width))

    def _laid_out(self, width: int) -> Iterator[list[tuple[str, str]]]:
        from rich.cells import cell_len

        for line in self.lines:
            hang = sum(cell_len(text) for text, _ in line.head)
            head = list(line.head)
            if hang > width // 2:  # a narrow terminal: the text goes below its head
                if "".join(text for text, _ in head).strip():
                    yield _trimmed(head)
                hang = 2
                head = [("  ", "")]
            for part in _wrap(line.text, max(8, width - hang)):
                yield _trimmed([*head, (part, line.style)])
                head = [(" " * hang, "")]


def _trimmed(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pieces without blanks at their end."""
    while pieces and not pieces[-1][0].strip():
        pieces = pieces[:-1]
    return [*pieces[:-1], (pieces[-1][0].rstrip(), pieces[-1][1])] if pieces else []


def _wrap(text: str, width: int) -> list[str]:
    """`text` in parts of at most `width` cells, broken at spaces where there are any."""
    from rich.cells import cell_len, chop_cells

    parts: list[str] = []
    for word in text.split(" "):
        if parts and cell_len(parts[-1]) + 1 + cell_len(word) <= width:
            parts[-1] += f" {word}"
        elif cell_len(word) <= width:
            parts.append(word)
        else:
            parts += chop_cells(word, width)
    return [part.rstrip() for part in parts] or [""]
