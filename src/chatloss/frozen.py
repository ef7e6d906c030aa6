"""Frozen dataclasses that are made quickly: there are a dozen of them for every conversation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any, TypeVar

__all__ = ["made_quickly"]

T = TypeVar("T")


def made_quickly(cls: type[T]) -> type[T]:
    """A frozen dataclass with slots whose values are put there by the slots themselves: twice as fast.

    What `dataclass` writes asks `object.__setattr__` for each of them, which looks the slot up by its name.

    >>> from dataclasses import dataclass
    >>> @made_quickly
    ... @dataclass(frozen=True, slots=True)
    ... class Point:
    ...     x: int
    ...     y: int = 0
    >>> Point(1)
    Point(x=1, y=0)
    """
    usual: Any = cls.__init__
    names = usual.__code__.co_varnames[1 : usual.__code__.co_argcount]
    if names != tuple(one.name for one in fields(cls)) or hasattr(cls, "__post_init__"):  # type: ignore[arg-type]
        raise TypeError(f"{cls.__name__} does more than to hold what it is given")
    defaults = usual.__defaults__ or ()
    given = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    known: dict[str, Any] = {}
    body = []
    for one in fields(cls):  # type: ignore[arg-type]
        name, value = one.name, one.name
        known[f"_set_{name}"] = getattr(cls, name).__set__
        if one.default_factory is not MISSING:
            known[f"_none_{name}"], known[f"_make_{name}"] = given[name], one.default_factory
            value = f"_make_{name}() if {name} is _none_{name} else {name}"
        body.append(f"    _set_{name}(self, {value})")
    exec(f"def __init__(self, {', '.join(names)}):\n" + "\n".join(body), known)
    made: Callable[..., None] = known["__init__"]
    for same in ("__defaults__", "__annotations__", "__qualname__", "__module__", "__doc__"):
        setattr(made, same, getattr(usual, same))
    cls.__init__ = made  # type: ignore[method-assign]
    return cls
