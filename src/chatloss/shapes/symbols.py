"""What stands for the values of a conversation while one is recorded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from chatloss.meter import Meter

if TYPE_CHECKING:
    from chatloss.shapes.recorder import Recorder

__all__ = ["Once", "Pieces", "Symbol", "SymbolMeter", "Unplanned", "holds_symbols"]


class Unplanned(Exception):
    """Something that another conversation of the same shape may not do in the same way."""


class Symbol:
    """A value that another conversation has another of: `value` is that of the one which is recorded.

    `slot` numbers it among the values of a program (-1: a sum of `parts` that nothing has asked for yet). `fixed`: its
    type is the same in all conversations of the shape. `of_tools`: it depends on nothing but the conversation's tools.
    """

    __slots__ = ("_recorder", "fixed", "of_tools", "parts", "slot", "value")

    def __init__(
        self, recorder: Recorder, value: Any, slot: int, fixed: bool, parts: Pieces | None = None, *,
        of_tools: bool = False,
    ) -> None:
        self._recorder = recorder
        self.value, self.slot, self.fixed, self.parts, self.of_tools = value, slot, fixed, parts, of_tools

    def __bool__(self) -> bool:
        return self._recorder.truth(self)

    def __eq__(self, other: object) -> bool:
        """Asked where lists or objects are compared that have it in them."""
        return self._recorder.equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self._recorder.equal(self, other)

    def _unplanned(self, *args: Any) -> NoReturn:
        raise Unplanned("a text was used in a way that is not recorded")

    __str__ = __repr__ = __len__ = __iter__ = __hash__ = __lt__ = __le__ = __gt__ = _unplanned
    __ge__ = __contains__ = __getitem__ = __index__ = __int__ = __float__ = __format__ = __call__ = _unplanned
    __add__ = __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __reversed__ = __fspath__ = _unplanned


Pieces = list[str | Symbol]


class Once:
    """What an iterator gives, for the one loop that goes through it: nothing else may be asked of an iterator."""

    __slots__ = ("items",)

    def __init__(self, items: list[Any]) -> None:
        self.items = items


class SymbolMeter(Meter):
    """A meter that takes a symbol in a list for what it stands for."""

    def _items(self, value: Any) -> list[Any]:
        return super()._items(value) if type(value) is not Symbol else [value.value]


def holds_symbols(value: Any, depth: int = 4) -> bool:
    """Whether there may be symbols in it: what is deeper than `depth` is not looked at."""
    if type(value) is Symbol:
        return True
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    return isinstance(value, list | tuple) and (not depth or any(holds_symbols(one, depth - 1) for one in value))
