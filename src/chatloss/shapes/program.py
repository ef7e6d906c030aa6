"""The steps and guards of a recording as a Python function of the values that a conversation has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from keyword import iskeyword
from typing import Any

from chatloss.shapes.recorder import Recorder, Step
from chatloss.shapes.symbols import Symbol, Unplanned

__all__ = ["Program"]

Run = Callable[[Sequence[Any]], tuple[Any, ...] | None]


class Program:
    """What a recording did with `leaves` values, to be done with others; `wanted` are the symbols that it gives.

    The code holds names and no text of a template or conversation: values are handed to it.
    """

    def __init__(self, recorder: Recorder, leaves: int, wanted: Sequence[Symbol]) -> None:
        for symbol in wanted:
            recorder.plain_value(symbol)  # sums that nobody asked for are steps now
        self._names: dict[str, Any] = {}
        given = "".join(f"v{i}, " for i in range(leaves))
        lines = ["def run(leaves):", f"    {given or '()'} = leaves", *(self._line(step) for step in recorder.steps)]
        lines.append(f"    return ({''.join(f'v{one.slot}, ' for one in wanted)})")
        exec(compile("\n".join(lines), "<shape>", "exec"), self._names)
        self.run: Run = self._names["run"]

    def _line(self, step: Step) -> str:
        slot, function, args, kwargs = step
        if slot < 0:
            value = self._value(args[0])
            if kwargs:  # only its truth counts
                return f"    if {'not ' if function else ''}{value}: return None"
            return f"    if {value} != {self._value(function)}: return None"
        given = [self._value(one) for one in args]
        if any(not name.isidentifier() or iskeyword(name) for name in kwargs or ()):
            raise Unplanned("a name that Python would read as something else")
        given += [f"{name}={self._value(one)}" for name, one in (kwargs or {}).items()]
        return f"    v{slot} = {self._value(function)}({', '.join(given)})"

    def _value(self, value: Any) -> str:
        if type(value) is Symbol:
            return f"v{value.slot}"
        name = f"c{len(self._names)}"
        self._names[name] = value
        return name
