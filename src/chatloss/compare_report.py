"""What a comparison of reductions found, as JSON, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from chatloss.compare_shares import FilePart, Mover, Part, Shares
from chatloss.findings import Line, Lines, inline, plural
from chatloss.page import Section
from chatloss.reduction import UNITS, Reduction, Unit
from chatloss.sample import Sample

__all__ = ["CompareReport"]

Floats = npt.NDArray[np.float64]

ASSUMPTION = (
    "A share of the loss is a part of the sum of |u·w|/Z over all trained tokens: it assumes that each has the same "
    "nll, and one optimiser step over all of the data."
)
MISTAKEN = (
    "Not reductions, but what many trainers compute: each micro-batch, or each rank of a step of {} rows, divides by "
    "its own trained tokens, and the means count the same, however few those are. What a token weighs then depends on "
    "the rows beside it."
)
FORMATS = {"A": "A: a turn a row", "B": "B: a chat a row", "encoded": "rows as encoded"}
_NAME, _CELL, _LAST = 22, 5, 8
_FILES = 9


@dataclass(frozen=True, slots=True)
class CompareReport:
    """Shares of the loss under every reduction, `token` first, and under the mistaken ways to compute a mean.

    `parts` are the tenths of turns and of conversations by length. ``shares_of(name, unit)`` is float64 [units]: what
    each turn (by conversation and message) or conversation gets, computed anew when asked for.
    """

    counts: Mapping[str, int]
    parts: Mapping[Unit, tuple[Part, ...]]
    files: tuple[FilePart, ...]
    shares: tuple[Shares, ...]
    seed: int
    step_rows: int
    shares_of: Callable[[str, Unit], Floats] = field(repr=False)

    def __getitem__(self, name: str) -> Shares:
        """The shares of that name, such as "turn" or "A: means of 4 rows, shuffled"; raises `KeyError`."""
        for shares in self.shares:
            if shares.name == name:
                return shares
        raise KeyError(name)

    @property
    def reductions(self) -> tuple[Shares, ...]:
        return tuple(shares for shares in self.shares if shares.kind == "reduction")

    @property
    def mistaken(self) -> tuple[Shares, ...]:
        return tuple(shares for shares in self.shares if shares.kind != "reduction")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with stable keys: what `chatloss compare --json` prints."""
        return {
            "assumption": ASSUMPTION, **self.counts, "seed": self.seed, "step_rows": self.step_rows,
            "deciles": {unit: [part.to_dict() for part in self.parts[unit]] for unit in UNITS},
            "files_by_name": [part.to_dict() for part in self.files],
            "reductions": [shares.to_dict() for shares in self.reductions],
            "mistaken": [shares.to_dict() for shares in self.mistaken],
        }

    def weights_by_reduction(self, samples: Sequence[Sample]) -> dict[str, list[Floats]]:
        """What `page.page` takes for these rows: float64 [n] for each, where 1 is what `token` gives a token.

        The rows of a conversation must follow each other and share a source. Reductions that share out the loss as an
        earlier one does are left out.
        """
        chats = [list(rows) for _, rows in groupby(enumerate(samples), lambda at: at[1].source or at[0])]
        out: dict[str, list[Floats]] = {}
        for shares in self._distinct():
            reduction = Reduction.parse(shares.name)
            examples = (reduction.of_example([row for _, row in chat]) for chat in chats)
            out[shares.name] = [weights * shares.factor for example in examples for weights in example.weights]
        return out

    def _distinct(self) -> list[Shares]:
        return [shares for shares in self.reductions if not shares.same_as]

    def _same(self, kept: Sequence[Shares]) -> Iterator[str]:
        """One sentence for each reduction that others are the same as."""
        for shares in self._distinct():
            same = [other.name for other in kept if other.same_as == shares.name]
            if same:
                yield f"The same shares as {shares.name}: {', '.join(same)}."

    def _short_names(self) -> bool:
        """Whether the last parts of the files' paths tell them apart."""
        return len({part.file.rpartition("/")[2] for part in self.files}) == len(self.files)

    def _means(self, rows: str, order: str) -> list[Shares]:
        """The mistaken ones for rows of that format in that order, without those for which the order is another."""
        return [shares for shares in self.mistaken if shares.rows == rows and shares.order in (order, "")]

    def _formats(self) -> list[str]:
        return list(dict.fromkeys(shares.rows for shares in self.mistaken))

    def _format(self, rows: str) -> str:
        return "A = B: a turn a row" if rows == "A" and "B" not in self._formats() else FORMATS[rows]

    def _units(self) -> list[Unit]:
        """Turns, and conversations where these are something else."""
        return ["turn", "conversation"] if self.counts["turns"] > self.counts["conversations"] else ["turn"]

    # -- the terminal ----------------------------------------------------------------------------------------------

    def render(self, *, color: bool = True) -> Lines:
        """The report for a rich console (or `str()`), 80 columns wide."""
        lines = [*self._totals()]
        for unit in self._units():
            lines += [Line(), *self._decile_lines(unit)]
        lines += [Line(), *self._weight_lines()]
        if self.mistaken:
            lines += [Line(), *self._mistaken_lines()]
        for unit in self._units():
            lines += self._mover_lines(unit)
        if len(self.files) > 1:
            lines += [Line(), *self._file_lines()]
        return Lines(lines, color)

    def _totals(self) -> list[Line]:
        n = self.counts
        parts = [plural(n["conversations"], "conversation"), plural(n["turns"], "turn"), plural(n["rows"], "row"),
                 plural(n["trained_tokens"], "trained token")]
        text = " → ".join(parts)
        if n["untrained_conversations"]:
            text += f" ({plural(n['untrained_conversations'], 'conversation')} without any left out)"
        return [Line(text=text, style="bold"), Line(text=ASSUMPTION), *(Line(text=said) for said in self._in_short())]

    def _in_short(self) -> Iterator[str]:
        """What a reader in a hurry wants to know."""
        parts = self.parts["turn"]
        part = parts[0]
        which = f"The shortest tenth of the turns ({_range(part)} tokens)" if len(parts) == 10 else "The shortest turn"
        aliases = {"turn": " (format A)", "conversation": " (format B)"}
        told = [f"{_percent(shares.deciles['turn'][0])}% under {shares.name}{aliases.get(shares.name, '')}"
                for shares in self._distinct() if shares.name in ("token", *UNITS)]
        yield f"{which} has {_percent(part.token_share)}% of the tokens; of the loss it gets {', '.join(told)}."

    def _decile_lines(self, unit: Unit) -> list[Line]:
        parts = self.parts[unit]
        groups = f"tenths of the {unit}s" if len(parts) == 10 else f"every {unit}"
        lines = [Line(text=f"Share of the loss in %, {groups} from short to long", style="bold")]
        lines += [_row("trained tokens, from", [_short(part.low) for part in parts], ""),
                  _row("to", [_short(part.high) for part in parts], ""),
                  _row("share of the tokens", [_percent(part.token_share) for part in parts], "ratio")]
        rows = "B" if unit == "conversation" and "B" in self._formats() else "A"
        means = [shares for shares in self._means(rows, "shuffled") if not shares.same_as]
        for shares in [*self._distinct(), *means]:
            cells = [_percent(share) for share in shares.deciles[unit]]
            lines.append(_row(shares.name.removesuffix(", shuffled"), cells, _times(shares.short_to_long[unit])))
        notes = [_ABOUT_RATIO]
        notes += [f"{self._format(rows)}, shuffled; the means are mistaken, see below."] * bool(means)
        alike = [*(self.reductions if unit == "turn" else ()), *self._means(rows, "shuffled")]
        return [*lines, *(Line(text=text) for text in (*notes, *self._same(alike)))]

    def _weight_lines(self) -> list[Line]:
        head, *body = self._weight_table()
        lines = [Line(text="Weight of one trained token, where `token` gives it 1", style="bold")]
        return [*lines, *(Line(((cells[0][:26].ljust(26), ""),), "".join(cell.rjust(9) for cell in cells[1:]))
                          for cells in (head, *body)), Line(text=_ABOUT_WEIGHTS)]

    def _weight_table(self) -> list[list[str]]:
        head = ["", "lowest", "highest", "spread", "eff.turn", "eff.tok.", "scale"]
        return [head, *([shares.name, _number(shares.lowest), _number(shares.highest), _times(shares.spread),
                         _number(shares.effective["turn"]), _number(shares.effective["token"]), _number(shares.scale)]
                        for shares in self.reductions)]

    def _mistaken_lines(self) -> list[Line]:
        head, orders, *body = self._mistaken_table()
        width = 2 * 9
        lines = [Line(text="Means of means: how unequal they make the tokens", style="bold"),
                 Line(text=f"{MISTAKEN.format(self.step_rows)} {_ABOUT_SPREAD}"),
                 Line(((" " * 24, ""),), "".join(cell.rjust(width) for cell in head[1::2]).rstrip())]
        return lines + [Line(((cells[0].ljust(24), ""),), "".join(cell.rjust(9) for cell in cells[1:]))
                        for cells in (orders, *body)]

    def _mistaken_table(self) -> list[list[str]]:
        formats = self._formats()
        table = [["", *(name for rows in formats for name in (self._format(rows), ""))],
                 ["spread", *("in order", "shuffled") * len(formats)]]
        columns = [self._means(rows, order) for rows in formats for order in ("data", "shuffled")]
        for same in zip(*columns, strict=True):
            what = same[0].name.partition(": ")[2].removesuffix(", shuffled")
            table.append([what, *(_times(shares.spread) for shares in same)])
        return table

    def _mover_lines(self, unit: Unit) -> list[Line]:
        moved = [shares for shares in self._distinct() if shares.gain[unit] and shares.name == unit]
        short = self._short_names()
        lines: list[Line] = []
        for shares in moved:
            title = f"The {unit}s that gain and lose most under `{shares.name}`: % under token → here"
            lines += [Line(), Line(text=title, style="bold")]
            for sign, movers in (("+", shares.gain[unit]), ("-", shares.lose[unit])):
                for mover in movers:
                    lines.append(Line(((f"{sign} {_mover(mover)}  ", ""),), _shortened(mover.where, short)))
        return lines

    def _file_lines(self) -> list[Line]:
        short = self._short_names()
        order = sorted(range(len(self.files)), key=lambda i: -self.files[i].tokens)
        shown, rest = order[:_FILES], order[_FILES:]
        lines = [Line(text="Share of the loss in %, by source file", style="bold")]
        for number, i in enumerate(shown, 1):
            name = _shortened(self.files[i].file, short) or "(unnamed)"
            lines.append(Line(((f"  [{number}] ", ""),), f"{name}: {_holds(self.files[i])}"))
        if rest:
            lines.append(Line(text=f"  [+] {plural(len(rest), 'more file')}"))

        def cells(values: Sequence[float]) -> list[str]:
            more = [sum(values[i] for i in rest)] if rest else []
            return [_percent(value) for value in (*(values[i] for i in shown), *more)]

        heads = [*(f"[{number}]" for number in range(1, len(shown) + 1)), *(["[+]"] if rest else [])]
        tokens = cells([part.token_share for part in self.files])
        lines += [_row("", heads, ""), _row("share of the tokens", tokens, "")]
        return lines + [_row(shares.name, cells(shares.files), "") for shares in self._distinct()]

    # -- the page --------------------------------------------------------------------------------------------------

    def sections(self) -> list[Section]:
        """Tables and curves for `page.page(sections=...)`."""
        out = [Section("Weight of one trained token", f"{ASSUMPTION}\n{_ABOUT_WEIGHTS}", self._weight_table())]
        out += [self._lengths_section(unit) for unit in self._units()]
        if self.mistaken:
            head, orders, *body = self._mistaken_table()
            columns = [f"{a or b}, {order}" for a, b, order in zip(head[1:], head[:-1], orders[1:], strict=True)]
            text = f"{MISTAKEN.format(self.step_rows)}\n{_ABOUT_SPREAD}"
            out.append(Section("Means of means", text, [["spread", *columns], *body]))
        out += [self._movers_section(unit) for unit in self._units()]
        if len(self.files) > 1:
            out.append(self._files_section())
        return [*out, *(self._curve(shares) for shares in self._distinct())]

    def _lengths_section(self, unit: Unit) -> Section:
        parts = self.parts[unit]
        formats = [rows for rows in self._formats() if rows != ("B" if unit == "turn" else "A")] or self._formats()
        means = [shares for rows in formats for shares in self._means(rows, "shuffled")]
        head = ["share of the loss in %", *(_range(part) for part in parts), "ratio, first over last"]
        table = [head, ["share of the tokens", *(_percent(part.token_share) for part in parts), ""]]
        for shares in [*self._distinct(), *(shares for shares in means if not shares.same_as)]:
            cells = [_percent(share) for share in shares.deciles[unit]]
            table.append([shares.name.removesuffix(", shuffled"), *cells, _number(shares.short_to_long[unit])])
        notes = [f"The {unit}s by trained tokens, from short to long. {_ABOUT_RATIO}"]
        notes += [f"{self._format(rows)}, shuffled; the means are mistaken, see below." for rows in formats]
        text = "\n".join([*notes, *self._same([*self.reductions, *means])])
        return Section(f"Share of the loss by length of the {unit}", text, table)

    def _movers_section(self, unit: Unit) -> Section:
        short = self._short_names()
        table = [["reduction", "gains or loses", unit, "trained tokens", "% of the loss under token", "% of it here"]]
        for shares in self._distinct():
            for what, movers in (("gains", shares.gain[unit]), ("loses", shares.lose[unit])):
                table += [[shares.name, what, _shortened(mover.where, short), f"{mover.tokens:,}",
                           _percent(mover.share_under_token, 3), _percent(mover.share, 3)] for mover in movers]
        return Section(f"The {unit}s that gain and lose most", table=table)

    def _files_section(self) -> Section:
        distinct = self._distinct()
        table = [["file", "holds", "share of the tokens", *(shares.name for shares in distinct)]]
        for i, part in enumerate(self.files):
            cells = [_percent(share) for share in (part.token_share, *(shares.files[i] for shares in distinct))]
            table.append([part.file, _holds(part), *cells])
        return Section("Share of the loss in %, by source file", table=table)

    def _curve(self, shares: Shares) -> Section:
        units = np.cumsum([0, *(part.units for part in self.parts["turn"])])
        loss = np.cumsum([0.0, *shares.deciles["turn"]])
        points = zip((100 * units / units[-1]).tolist(), (100 * loss).tolist(), strict=True)
        text = "Across: % of the turns, shortest first. Up: % of the loss that they get together."
        return Section(f"The loss of the shorter turns under {shares.name}", text, curve=list(points))


_ABOUT_WEIGHTS = (
    "spread: highest over lowest. eff.: how many equal turns, and tokens, would carry the loss as evenly (Kish). "
    "scale: the loss if every nll is 1, which learning rate and clipping see."
)
_ABOUT_RATIO = "ratio: weight of a token in the first column over one in the last."
_ABOUT_SPREAD = "spread: weight of the heaviest trained token over the lightest; 1× is right."


def _row(name: str, cells: Sequence[str], last: str) -> Line:
    head = name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"
    text = "".join(cell.rjust(_CELL) for cell in cells) + (last.rjust(_LAST) if last else "")
    return Line(((head.ljust(_NAME), ""),), text)


def _shortened(where: str, short: bool) -> str:
    return inline(where.rpartition("/")[2] if short else where)


def _holds(part: FilePart) -> str:
    parts = (plural(part.conversations, "conversation"), plural(part.turns, "turn"), plural(part.tokens, "token"))
    return ", ".join(parts)


def _range(part: Part) -> str:
    return f"{part.low:,}" if part.low == part.high else f"{part.low:,}–{part.high:,}"


def _mover(mover: Mover) -> str:
    times = _times(mover.share / mover.share_under_token)
    shares = f"{_percent(mover.share_under_token, 2):>5} → {_percent(mover.share, 2):>5}"
    return f"{shares} {times:>7} {_short(mover.tokens):>5} tok"


def _percent(share: float, places: int = 1) -> str:
    """A share in percent, at most four or five characters.

    >>> [_percent(share) for share in (0.0, 0.0001, 0.0123, 0.123, 1.0)]
    ['0', '<0.1', '1.2', '12.3', '100']
    """
    if 0 < share < 0.5 * 10 ** -(places + 2):
        return f"<{10**-places:.{places}f}"
    text = f"{100 * share:.{places}f}"
    return "0" if not share else "100" if text.startswith("100") else text


def _short(count: int) -> str:
    """At most four characters up to a hundred million.

    >>> _short(9999), _short(12345), _short(4_500_000)
    ('9999', '12k', '4M')
    """
    return str(count) if count < 10_000 else f"{count // 1000}k" if count < 1_000_000 else f"{count // 1_000_000}M"


def _number(value: float) -> str:
    """
    >>> [_number(value) for value in (1.0, 0.01234, 123.4, 12345.6, math.inf)]
    ['1', '0.012', '123', '12,346', '∞']
    """
    if math.isinf(value):
        return "∞"
    if value >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}" if value >= 1 else f"{value:.2g}"


def _times(value: float) -> str:
    """
    >>> _times(1.0 + 1e-12), _times(99.0), _times(math.inf)
    ('1×', '99×', '∞×')
    """
    return f"{_number(value)}×"
