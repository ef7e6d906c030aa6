"""The sandbox of templates, in which everything takes values that differ between renderings."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn, cast

from jinja2 import pass_context
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace, missing

from chatloss.meter import Bounds
from chatloss.sandbox import DICT_METHODS, SEARCHED, SHORT, SLICED, WEIGHED, SafeNamespace, Sandbox
from chatloss.traced.expressions import LIGHT
from chatloss.traced.loop import Backwards, Loop
from chatloss.traced.statements import Generator
from chatloss.traced.varied import MOST, Buffer, Unproven, Varied
from chatloss.traced.worlds import Worlds

__all__ = ["TracedSandbox"]

_SMALL = 1 << 60
_STATEFUL = frozenset(("cycler", "joiner", "lipsum"))
_LOOP_VALUES = frozenset(name for name in dir(Loop) if not name.startswith("_")) - {"at", "items"}


class TracedSandbox(Sandbox):
    """A sandbox in which everything takes varied values."""

    code_generator_class = Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    intercepted_unops = frozenset(["+", "-"])
    varied = Varied
    light = LIGHT
    new_buffer = Buffer
    short = SHORT

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds) -> None:
        super().__init__(clock, bounds)
        self.worlds = self._new_worlds()
        filters = self.filters
        self.filters = {name: self._lifted(function) for name, function in filters.items()}
        self.filters[SLICED] = pass_context(partial(self._cut, self.filters[SLICED]))
        for name in (WEIGHED, SEARCHED):
            self.filters[name] = self._weighing(filters[name])
        for name in ("length", "count"):
            self.filters[name] = partial(self._count, self.filters[name])
        self.filters["random"] = _stateful
        tests: dict[str, Any] = dict(self.tests)
        self.tests |= {name: self._lifted(function) for name, function in tests.items()}
        self.globals |= dict.fromkeys(_STATEFUL, _stateful)

    def _new_worlds(self) -> Worlds:
        return Worlds(self.meter.tick)

    def _lifted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        worlds = self.worlds

        def lifted(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if type(value) is Varied:
                    return worlds.lift(function, *args, **kwargs)
            return worlds.lift(function, *args, **kwargs) if kwargs else function(*args)

        if hasattr(function, "jinja_pass_arg"):
            lifted.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return lifted

    def _weighing(self, weigh: Callable[..., Any]) -> Callable[..., Any]:
        tick, weighed = self.meter.tick, self.worlds.weighed

        @pass_context
        def weighing(context: Context, value: Any) -> Any:
            if type(value) is str:
                tick(len(value) >> 8)
                return value
            return weighed(weigh, context, value)

        return weighing

    def _cut(self, sliced: Callable[..., Any], context: Context, value: Any, *limits: Any) -> Any:
        fixed = not any(type(limit) is Varied for limit in limits)
        if fixed and type(value) is Varied and value.items is not None:
            if limits == (None, None, -1):
                return self.worlds.backwards(value)
            if limits[1:] == (None, None) and type(limits[0]) is int and limits[0] >= 0:
                return self.worlds.rest(value, limits[0])
        return sliced(context, value, *limits)

    def _count(self, length: Callable[..., Any], value: Any) -> Any:
        return self.worlds.length(value) if type(value) is Varied and value.items is not None else length(value)

    def show(self, buffer: Buffer, value: Any) -> None:
        """Write out a value that the template names."""
        if type(value) is str:
            meter = self.meter
            meter.output += len(value)
            if meter.output > meter.bounds.output:
                meter.write("")
            buffer.write(self.worlds.mask, value)
        elif type(value) is Varied:
            self.worlds.write(buffer, self.worlds.lift(self._finalize, value))
        else:
            buffer.write(self.worlds.mask, self._finalize(value))

    def added(self, context: Context, *parts: Any) -> Any:
        """The sum of `parts` from left to right."""
        # Short sums are not counted, one by one or at once.
        if [*map(type, parts)].count(str) == len(parts) and sum(map(len, parts)) < SHORT:
            return "".join(parts)
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def method(self, context: Context, name: str, owner: Any, *args: Any) -> Any:
        """``owner.name(*args)`` for a method that strings have."""
        if type(owner) is Varied:
            return self.worlds.lift(partial(self.method, context, name), owner, *args)
        if type(owner) is str and len(owner) < SHORT:
            for one in args:
                if type(one) is not str or len(one) >= SHORT:
                    break
            else:
                self.meter.tick(4)
                return getattr(owner, name)(*args)
        return self.call(context, self.getattr(owner, name), *args)

    def joined(self, buffer: Buffer) -> Any:
        found = buffer.texts(self.worlds.mask)
        return found[0][1] if len(found) == 1 else Varied([(mask, text) for mask, text, _ in found])

    def assign(self, space: Any, name: str, value: Any) -> None:
        """``space.name = value`` in the worlds that run."""
        worlds = self.worlds
        if type(space) is Varied:
            worlds.lift(lambda one: self.assign(one, name, worlds.see(value)), space)
            return
        if not isinstance(space, Namespace):
            raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
        _, born = worlds.spaces[id(space)]
        if worlds.mask != born:
            value = worlds.put(_attributes(space).get(name, missing), value, born)
        space[name] = worlds.kept(value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        kind = type(obj)
        if kind is SafeNamespace and not attribute.startswith("_"):
            found = _attributes(obj).get(attribute, missing)
            if type(found) is Varied and found.holes:
                return self.worlds.named(found, partial(self.undefined, obj=obj, name=attribute))
            if found is not missing:
                return found
        if kind is Varied:
            found = missing if attribute in DICT_METHODS else self.worlds.lookup(obj, attribute)
            return self.worlds.lift(self.getattr, obj, attribute) if found is missing else found
        if kind is Loop or kind is Backwards:
            if attribute not in _LOOP_VALUES:
                raise Unproven(f"loop.{attribute}")
            return getattr(obj, attribute)
        if kind is LoopContext and attribute == "changed":
            raise Unproven("loop.changed")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is Varied or type(argument) is Varied:
            if type(obj) is Varied and obj.items is not None and type(argument) is int and argument >= 0:
                return self.worlds.item(obj, argument, self.undefined(obj=[], name=cast(Any, argument)))
            found = self.worlds.lookup(obj, argument) if type(argument) is str else missing
            return self.worlds.lift(self.getitem, obj, argument) if found is missing else found
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        worlds = __self.worlds
        if __obj is SafeNamespace and not any(type(value) is Varied for value in args):
            kwargs = {key: worlds.kept(one) for key, one in kwargs.items()}
            if args or any(key.startswith("_") for key in kwargs):
                made = super().call(__context, __obj, *args, **kwargs)
            else:
                __self.meter.tick(4)
                made = SafeNamespace(**kwargs)
            if len(worlds.spaces) > MOST:
                raise Unproven("too many namespaces")
            worlds.spaces[id(made)] = made, worlds.mask
            return made
        varied = Varied in map(type, (__obj, *args, *kwargs.values()))
        if varied and type(__obj) is not Macro:
            call = partial(__self.call, __context)
            return worlds.lift(call, __obj, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        small = type(left) is int and type(right) is int and -_SMALL < left < _SMALL and -_SMALL < right < _SMALL
        if small and operator in "+-":
            return left + right if operator == "+" else left - right
        if type(left) is Varied or type(right) is Varied:
            if operator in "+-" and _whole(left) and _whole(right):
                return self.worlds.summed(operator, left, right)
            return self.worlds.lift(partial(super().call_binop, context, operator), left, right)
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        if type(arg) is Varied:
            return self.worlds.lift(partial(super().call_unop, context, operator), arg)
        return super().call_unop(context, operator, arg)


def _attributes(space: Namespace) -> dict[str, Any]:
    """What a namespace holds."""
    return object.__getattribute__(space, "_Namespace__attrs")  # type: ignore[no-any-return]


def _whole(value: Any) -> bool:
    return value.whole if type(value) is Varied else type(value) is int


def _stateful(*args: Any, **kwargs: Any) -> NoReturn:
    raise Unproven("what it gives depends on who was given before")
