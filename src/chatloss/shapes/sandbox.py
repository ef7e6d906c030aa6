"""The sandbox of templates, in which everything takes symbols and records what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any, NoReturn

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateRuntimeError
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.utils import Namespace

from chatloss.meter import Bounds
from chatloss.sandbox import CONCATENATED, PLAIN_METHODS, SEARCHED, SHORT, WEIGHED, SafeNamespace, Sandbox, never_folded
from chatloss.shapes.pure import GLOBALS, outlined, pure_macros
from chatloss.shapes.recorder import Recorder, Text
from chatloss.shapes.symbols import Once, Symbol, SymbolMeter, Unplanned
from chatloss.traced.statements import Generator

__all__ = ["RecordingSandbox"]

# Tests of nothing but a value's type.
_TYPE_TESTS = frozenset(
    "string mapping none defined undefined iterable sequence number integer float boolean callable".split()
)
# Filters that are a method of texts.
_METHODS = {"trim": "strip", "upper": "upper", "lower": "lower"}
_TEXT_FILTERS = frozenset("trim upper lower tojson replace string safe".split())
_RANDOM = frozenset(("lipsum", "cycler", "joiner"))


class RecordingSandbox(Sandbox):
    """A sandbox for the code of `traced.statements`, in which `recorder` is what that code calls `W`."""

    code_generator_class = Generator
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])
    intercepted_unops = frozenset(["+", "-"])
    varied = Symbol
    light = frozenset((int, bool, float, type(None)))
    new_buffer = Text
    short = SHORT

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds) -> None:
        super().__init__(clock, bounds, SymbolMeter(bounds))
        self._clock = clock
        self.worlds = self.recorder = Recorder(self.meter)
        self.filters = {name: self._recorded("filter", name, function) for name, function in self.filters.items()}
        for name in (WEIGHED, SEARCHED):
            self.filters[name] = _unweighed(self.filters[name])
        self.filters[CONCATENATED] = never_folded(self._concatenated_symbols)
        self.filters["random"] = _refused
        tests: dict[str, Any] = dict(self.tests)
        self.tests |= {name: self._recorded("test", name, function) for name, function in tests.items()}
        self.globals |= dict.fromkeys(_RANDOM, _refused)
        self.pure: dict[str, Callable[..., Any]] = {}

    def load(self, text: str) -> Template:
        """The template of this text, the only one of this sandbox."""
        if "tools" in text:
            plain = Sandbox(self._clock, self.meter.bounds, self.meter)  # that counts what replays do, too
            plain.filters["random"], plain.tests["sameas"] = _refused, _same
            self.pure = pure_macros(plain, text)
        return self.from_string(text)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return outlined(super()._parse(source, name, filename))

    def _recorded(self, kind: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        recorder, context = self.recorder, hasattr(function, "jinja_pass_arg")
        taken = _once(function) if (kind, name) == ("filter", "items") else function
        of_type, fixed = kind == "test" and name in _TYPE_TESTS, kind == "test" or name in _TEXT_FILTERS

        def recorded(*args: Any, **kwargs: Any) -> Any:
            if name == "tojson" and args:
                args = recorder.listed(args[0]), *args[1:]
                made = None if context else recorder.step_of_tools((kind, name), function, args, kwargs)
                if made is not None:
                    return made
                args = recorder.whole(args[0]), *args[1:]
            if name == "join" and not kwargs and len(args[context:]) <= 2:
                text = self._joined_texts(*args[context:])
                if text is not None:
                    return text
            if not any(type(one) is Symbol for one in (*args, *kwargs.values())):
                return function(*args, **kwargs)
            first = args[0]
            if not context and type(first) is Symbol and first.fixed and len(args) == 1 and not kwargs:
                if of_type:
                    return function(first.value)
                if kind == "filter" and type(first.value) is str:
                    if name == "string":
                        return first
                    if name in _METHODS:
                        return self.method(None, _METHODS[name], first)
            if context:  # which differs from rendering to rendering
                return recorder.step((kind, name), partial(function, first), args[1:], kwargs, fixed)
            return recorder.step((kind, name), taken, args, kwargs, fixed)

        if context:
            recorded.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
        return recorded

    def _joined_texts(self, parts: Any, glue: Any = "") -> str | Symbol | None:
        """The filter `join`, of texts of which some are symbols; None for anything else."""
        if type(parts) is not list or type(glue) is not str:
            return None
        if not any(type(one) is Symbol for one in parts) or not all(map(_is_text, parts)):
            return None
        self.meter.tick(len(parts) + 1)
        return self.recorder.joined([part for one in parts for part in (glue, one)][1:])

    def _concatenated_symbols(self, *values: Any) -> Any:
        if any(type(value) is Symbol for value in values):
            return self.recorder.joined([self._as_text(value) for value in values])
        return self._concatenated(*values)

    def _as_text(self, value: Any) -> str | Symbol:
        """What is written where `value` is."""
        if type(value) is not Symbol:
            return self._finalize(value)
        if type(value.value) is str and value.fixed:
            return value
        return self.recorder.step("text", self._plain_text, (value,), fixed=True)

    def _plain_text(self, value: Any) -> str:
        return "".join(("", self._text(value)))  # of markup, too, to which nothing can be added as it is

    def show(self, buffer: Text, value: Any) -> None:
        buffer.write(1, self._as_text(value))

    def joined(self, buffer: Text) -> Any:
        return self.recorder.joined(buffer.parts)

    def added(self, context: Context, *parts: Any) -> Any:
        total = parts[0]
        for part in parts[1:]:
            total = self.call_binop(context, "+", total, part)
        return total

    def method(self, context: Any, name: str, owner: Any, *args: Any) -> Any:
        if type(owner) is Symbol or any(type(one) is Symbol for one in args):
            fixed = name not in ("split", "rsplit") and type(owner) is Symbol and owner.fixed
            return self.recorder.step(("method", name), _METHOD[name], (owner, *args), fixed=fixed)
        return super().call(context, super().getattr(owner, name), *args)

    def assign(self, space: Any, name: str, value: Any) -> None:
        if not isinstance(space, Namespace):
            raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
        space[name] = self.recorder.kept(value)

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is LoopContext and attribute == "changed":
            raise Unplanned("what a loop gives depends on what it was asked before")
        if type(obj) is Symbol:
            return self.recorder.step(("attribute", attribute), partial(_swapped, super().getattr, attribute), (obj,))
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if type(obj) is Symbol:
            return self.recorder.step("item of", super().getitem, (obj, argument))
        return super().getitem(obj, self.recorder.exactly(argument))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        symbols = any(type(value) is Symbol for value in (__obj, *args, *kwargs.values()))
        if symbols and type(__obj) is not Macro and __obj is not SafeNamespace:
            call = partial(super().call, __context)
            return __self.recorder.step("call", call, (__obj, *args), kwargs)
        pure = __self.pure.get(__obj.name) if type(__obj) is Macro else None
        if pure is not None and all(__context.parent.get(name) is __self.globals[name] for name in GLOBALS):
            made = __self.recorder.step_of_tools(("macro", __obj.name), pure, args, kwargs)
            if made is not None:
                return made
        if __obj is SafeNamespace:
            kwargs = {key: __self.recorder.kept(value) for key, value in kwargs.items()}
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if type(left) is Symbol or type(right) is Symbol:
            if operator == "+" and _is_text(left) and _is_text(right):
                return self.recorder.joined([left, right])
            return self.recorder.step(
                ("operator", operator), partial(super().call_binop, context, operator), (left, right)
            )
        return super().call_binop(context, operator, left, right)

    def call_unop(self, context: Context, operator: str, arg: Any) -> Any:
        if type(arg) is Symbol:
            return self.recorder.step(("unary", operator), partial(super().call_unop, context, operator), (arg,))
        return super().call_unop(context, operator, arg)


def _method(name: str) -> Callable[..., Any]:
    def called(owner: Any, *args: Any) -> Any:
        if type(owner) is not str:
            raise Unplanned("a method of something that is no text")
        return getattr(owner, name)(*args)

    called.__name__ = name
    return called


_METHOD = {name: _method(name) for name in PLAIN_METHODS}


def _swapped(function: Callable[[Any, str], Any], attribute: str, obj: Any) -> Any:
    return function(obj, attribute)


def _is_text(value: Any) -> bool:
    """Whether it is a text in every conversation of the shape."""
    return type(value) is str or (type(value) is Symbol and value.fixed and type(value.value) is str)


def _unweighed(function: Callable[..., Any]) -> Callable[..., Any]:
    def weighed(*args: Any) -> Any:  # numbers of steps bound what is replayed
        return args[-1] if type(args[-1]) is Symbol else function(*args)

    if hasattr(function, "jinja_pass_arg"):
        weighed.jinja_pass_arg = function.jinja_pass_arg  # type: ignore[attr-defined]
    return weighed


def _once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter `items`, of which only a loop can take something."""
    return lambda value: Once([*function(value)])


def _same(value: Any, other: Any) -> bool:
    if other is not None and type(other) is not bool:
        raise Unplanned("whether two values are one, where lists are made again")
    return value is other


def _refused(*args: Any, **kwargs: Any) -> NoReturn:
    raise Unplanned("what it gives is not the same every time")
