"""Seeing a row in a terminal or a notebook: every token as safe text, and why it is or is not trained."""

from __future__ import annotations

import html
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

from chatloss.runs import Run, runs
from chatloss.sample import Decode, Reason, Sample

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

__all__ = ["OUTCOMES", "render_sample", "render_summary", "sample_html", "visible"]

OUTCOMES: Mapping[str, str] = {
    "exact": "lawful in one row together with other turns",
    "split": "lawful in a row of its own, where its context is the one of inference",
    "off_prompt": "inference would never show this prompt before this answer",
    "altered": "the template changed or dropped part of the answer, its reasoning or its calls",
    "unrenderable": "the template cannot render the prompt of this turn",
    "truncated": "does not fit whole into max_length, so it is trained nowhere",
    "switched_off": "switched off by train/weight or by the policy",
    "missing_stop": "nothing the template puts after the answer ends the turn",
    "control_tokens": "its conversation holds text that would become control tokens",
    "unlawful": "one row cannot hold it lawfully, and the row format allows only one",
}

# Drawn as nothing, or as a blank, although Unicode calls them letters, symbols or marks.
_BLANK = frozenset([0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)])
_WHITE = {" ": "·", "\t": "⇥", "\n": "↵", "\r": "␍"}


@lru_cache(maxsize=8192)
def _visible_char(char: str) -> str:
    code, category = ord(char), unicodedata.category(char)
    hidden = code in _BLANK or 0xFE00 <= code <= 0xFE0D or 0xE0100 <= code <= 0xE01EF
    return f"⟨U+{code:04X}⟩" if hidden or category[0] == "C" or category in ("Zl", "Zp", "Zs") else char


def visible(text: str, *, whitespace: bool = True) -> str:
    r"""`text` as it can safely be shown: nothing in it is invisible, moves the cursor, or changes the direction.

    Control, format, direction, private and unassigned characters and odd spaces become ``⟨U+202E⟩``; joiners stay
    inside a word or an emoji. A combining mark at the start gets a circle to sit on. With `whitespace`, space is ``·``,
    tab ``⇥``, newline ``↵`` and return ``␍``; else tab and newline stay, for the caller to lay out.

    >>> visible("a b\n\x1b[31m\u202e")
    'a·b↵⟨U+001B⟩[31m⟨U+202E⟩'
    """
    out = []
    for i, char in enumerate(text):
        joins = char in "\u200c\u200d" and 0 < i < len(text) - 1
        if char in " \t\n" or (char == "\r" and whitespace):
            out.append(_WHITE[char] if whitespace else char)
        elif " " < char < "\x7f" or (joins and (text[i - 1] + text[i + 1]).replace(" ", "\n").isprintable()):
            out.append(char)
        else:
            out.append(_visible_char(char))
    return ("◌" if text and unicodedata.category(text[0])[0] == "M" else "") + "".join(out)


def _inline(text: str) -> str:
    """`text` as part of a heading: on one line, spaces as they are."""
    return visible(text, whitespace=False).replace("\n", "↵").replace("\t", "⇥")


_COLORS = {
    Reason.CONTENT: "green", Reason.REASONING: "magenta", Reason.CALL: "cyan", Reason.STOP: "yellow",
    Reason.HEADER: "blue",
}
_WARN = (Reason.TRUNCATED, Reason.OFF_PROMPT, Reason.ALTERED, Reason.UNRENDERABLE)
_SUBSCRIPT = str.maketrans("-0123456789", "₋₀₁₂₃₄₅₆₇₈₉")


def _name(reason: Reason) -> str:
    return reason.name.lower().replace("_", " ")


def _shown(run: Run, show_ids: bool, whitespace: bool) -> str:
    """A run as one piece of terminal text; a newline in it ends a line. Tokens without text show their ids."""
    if not run.text:
        return "".join(f"⟨#{token}⟩" for token in run.ids)
    lines = [visible(line, whitespace=whitespace).expandtabs(4) for line in run.text.split("\n")]
    text = ("↵\n" if whitespace else "\n").join(lines)
    ids = "₊".join(str(token).translate(_SUBSCRIPT) for token in run.ids) if show_ids else ""
    stem = text.rstrip("\n")
    return stem + ids + text[len(stem) :]


def _wrap(pieces: Sequence[tuple[str, str]], width: int) -> list[list[tuple[str, str]]]:
    """Pieces of (text, style) in lines of at most `width` cells, broken at newlines and else between pieces."""
    from rich.cells import cell_len, chop_cells

    lines: list[list[tuple[str, str]]] = [[]]
    room = width
    for text, style in pieces:
        for i, part in enumerate(text.split("\n")):
            if i:
                lines.append([])
                room = width
            for chunk in chop_cells(part, width) if cell_len(part) > width else [part]:
                if cell_len(chunk) > room:
                    lines.append([])
                    room = width
                if chunk:
                    lines[-1].append((chunk, style))
                    room -= cell_len(chunk)
    return lines if lines[-1] or len(lines) == 1 else lines[:-1]


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A rich renderable, laid out for the width of the console it is printed on."""

    lines: Callable[[int], Iterator[list[tuple[str, str]]]]
    color: bool
    width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for line in self.lines(min(self.width or options.max_width, options.max_width)):
            for text, style in line:
                yield Segment(text, console.get_style(style) if style and self.color else None)
            yield Segment.line()


def _turns(sample: Sample) -> dict[int, str]:
    """What became of every assistant message: why it is not trained, else its outcome."""
    return dict(sorted({**sample.outcomes, **sample.untrained}.items()))


def _outcomes(sample: Sample) -> str:
    """``#2 #6 exact, #4 split``"""
    turns = _turns(sample)
    parts = []
    for name in dict.fromkeys(turns.values()):
        where = " ".join(f"#{i}" for i, outcome in turns.items() if outcome == name)
        parts.append(f"{where} {_inline(name).replace('_', ' ')}")
    return ", ".join(parts)


def _role(sample: Sample, message: int, roles: Sequence[str] | None) -> str:
    if message < 0:
        return "outside messages"
    role = roles[message] if roles and message < len(roles) else "assistant" if message in _turns(sample) else ""
    return f"#{message} {_inline(role)}".rstrip()


def render_sample(
    sample: Sample, *, decode: Decode | None = None, show_ids: bool = False, show_weights: bool = False,
    show_whitespace: bool = True, color: bool = True, width: int | None = None, index: int | None = None,
    roles: Sequence[str] | None = None,
) -> RenderableType:
    """One row for a rich console: a block for each message, a line for each span with its reason beside its tokens.

    Trained spans carry ``●`` and a heavy bar, and are underlined and coloured by reason where the console allows it;
    neighbouring tokens differ in boldness. Weights other than 0 and 1 are always shown. `index` (1-based) and `roles`
    (of the conversation's messages) appear in the headings if given. `decode` defaults to the sample's own.

    >>> import numpy as np
    >>> from rich.console import Console
    >>> from chatloss.sample import Span
    >>> row = Sample(np.array([0, 1], np.int32), (Span(0, 1, 0, 0.0, Reason.GENERATION_PROMPT),
    ...              Span(1, 2, 0, 1.0, Reason.CONTENT)), {0: "exact"}, "a.jsonl:1")
    >>> Console(width=60).print(render_sample(row, decode=lambda ids: "".join(["A: ", "yes\\n"][i] for i in ids)))
    a.jsonl:1 · 2 tokens · 1 trained (50.0%) · #0 exact
    #0 assistant
      generation prompt │ A:·
              ● content ┃ yes↵
    """
    found = runs(sample, decode)

    def lines(total: int) -> Iterator[list[tuple[str, str]]]:
        yield from _wrap([(f"row {index} · " if index else "", "bold"), *_header(sample)], total)
        for message, block in groupby(found, key=lambda run: run.message):
            yield [(_role(sample, message, roles), "bold")]
            for (reason, weight), group in groupby(block, key=lambda run: (run.reason, run.weight)):
                yield from _span_lines(list(group), reason, weight, total)

    def _span_lines(group: list[Run], reason: Reason, weight: float, total: int) -> Iterator[list[tuple[str, str]]]:
        shown = "" if weight in (0, 1) and not (show_weights and weight) else f" ×{weight:g}"
        label = ("● " if weight else "") + _name(reason) + shown
        hue = f"bold {_COLORS.get(reason, '')}" if weight else "yellow" if reason in _WARN else "bright_black"
        shades = _shades(reason, weight)
        tokens = [(_shown(run, show_ids, show_whitespace), shades[i % 2]) for i, run in enumerate(group)]
        narrow = total < 48
        if narrow:
            yield [(f"  {label}", hue)]
        gutter = 2 if narrow else max(19, len(label) + 2)
        for i, line in enumerate(_wrap(tokens, max(8, total - gutter - 3))):
            yield [((label if not (i or narrow) else "").rjust(gutter), hue), (" ┃ " if weight else " │ ", hue), *line]

    return _Rendered(lines, color, width)


def _header(sample: Sample) -> list[tuple[str, str]]:
    share = sample.n_trained / max(1, len(sample))
    parts = [_inline(sample.source)] if sample.source else []
    parts += [f"{len(sample):,} tokens", f"{sample.n_trained:,} trained ({share:.1%})"]
    parts += [_outcomes(sample)] if _turns(sample) else []
    return [(part + (" · " if i < len(parts) - 1 else ""), "" if i else "bold") for i, part in enumerate(parts)]


def _shades(reason: Reason, weight: float) -> tuple[str, str]:
    if not weight:
        return "bright_black", "dim"
    hue = _COLORS.get(reason, "red")
    return f"underline {hue}", f"underline bold {hue}"


def render_summary(samples: Sequence[Sample], *, color: bool = True, width: int | None = None) -> RenderableType:
    """All rows in a few lines: tokens, trained share, turns by outcome, and every reason with its count and meaning.

    A turn that is in several rows of its conversation is counted once.
    """
    tokens = sum(map(len, samples))
    trained = sum(sample.n_trained for sample in samples)
    turns = {(sample.source or i, turn): o for i, sample in enumerate(samples) for turn, o in _turns(sample).items()}
    counts: Counter[Reason] = Counter()
    for sample in samples:
        for span in sample.spans:
            counts[span.reason] += span.end - span.start

    def lines(total: int) -> Iterator[list[tuple[str, str]]]:
        text = f"{len(samples):,} rows · {tokens:,} tokens · {trained:,} trained ({trained / max(1, tokens):.1%})"
        yield from _wrap([(text, "bold")], total)
        for outcome, count in Counter(turns.values()).most_common():
            shown = _inline(outcome).replace("_", " ")
            yield from row(count, len(turns), f"turns {shown}", OUTCOMES.get(outcome, ""), "", total)
        for reason, count in sorted(counts.items()):
            mark = "● " if reason.trained else ""
            hue = f"underline {_COLORS[reason]}" if reason.trained else "yellow" if reason in _WARN else "bright_black"
            yield from row(count, tokens, mark + _name(reason), reason.explanation, hue, total)

    def row(count: int, of: int, name: str, text: str, hue: str, total: int) -> Iterator[list[tuple[str, str]]]:
        start = [(name.rjust(19), hue), (f" {count:>11,} {count / max(1, of):>6.1%}  ", "")]
        words = [(word + " ", "bright_black") for word in text.split(" ")]
        for i, line in enumerate(_wrap(words, max(20, total - 40))):
            yield [*(start if i == 0 else [(" " * 40, "")]), *line]

    return _Rendered(lines, color, width)


_HTML_LIMIT = 5000
_HTML_HUES = {
    Reason.CONTENT: ("46,160,67", "solid"), Reason.REASONING: ("150,90,220", "dotted"),
    Reason.CALL: ("20,140,190", "dashed"), Reason.STOP: ("205,130,0", "double"), Reason.HEADER: ("90,110,230", "wavy"),
}


def sample_html(sample: Sample, decode: Decode | None = None, *, roles: Sequence[str] | None = None) -> str:
    """The row as an HTML fragment for a notebook: inline styles only, no script, everything from data escaped.

    Legible on light and dark. Hovering a token shows ids, weight and reason. Without a decoder, ids are shown. A row of
    more than 5,000 tokens ends with a line that says how many are left out.
    """
    found = runs(sample, decode)
    out = [
        '<div style="font:13px/1.7 ui-monospace,Menlo,Consolas,monospace;max-width:100ch;overflow-wrap:anywhere">',
        f'<div style="font-family:system-ui,sans-serif">{_escaped("".join(text for text, _ in _header(sample)))}</div>',
    ]
    for message, block in groupby(found[:_HTML_LIMIT], key=lambda run: run.message):
        role = _escaped(_role(sample, message, roles))
        out.append(
            '<div style="border-left:2px solid rgba(128,128,128,.35);margin:.4em 0;padding-left:.8em">'
            f'<div style="font:600 11px system-ui,sans-serif;opacity:.7">{role}</div>'
            '<div dir="auto" style="white-space:pre-wrap;unicode-bidi:plaintext">'
        )
        for (reason, weight), group in groupby(block, key=lambda run: (run.reason, run.weight)):
            out.append(_span_html(list(group), reason, weight))
        out.append("</div></div>")
    if len(found) > _HTML_LIMIT:
        rest = len(sample) - found[_HTML_LIMIT].start
        out.append(f"<div>… and {rest:,} more tokens: see <code>chatloss view --html</code></div>")
    return "".join([*out, "</div>"])


def _span_html(group: list[Run], reason: Reason, weight: float) -> str:
    style = "opacity:.62"
    if weight:
        rgb, line = _HTML_HUES.get(reason, ("215,60,60", "solid"))
        style = f"background:rgba({rgb},.14);text-decoration:underline {line} 2px rgb({rgb});text-underline-offset:4px"
    tokens = []
    for run in group:
        ids = ", ".join(map(str, run.ids))
        title = f"id {ids} · weight {weight:g} · {_name(reason)}, {reason.explanation}"
        tokens.append(f'<span title="{html.escape(title)}">{html.escape(_shown(run, False, True))}</span>')
    return f'<span style="{style}">{"".join(tokens)}</span>'


def _escaped(text: str) -> str:
    return html.escape(_inline(text))
