"""The Jinja environment that chat templates run in: that of transformers, plus bounds, because templates are untrusted.

Bounded are loop iterations, the characters that a render writes (buffers included), the size of any one string or list
that a template builds, and the widths it may format to. This stops accidents and cheap attacks; it is no substitute for
running a template you distrust in a process of its own.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

__all__ = ["Bounds", "Sandbox"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one render may use: loop iterations, characters written, size of one value, width of one format."""

    ticks: int = 5_000_000
    output: int = 256_000_000
    value: int = 128_000_000
    width: int = 10_000


class Exceeded(TemplateRuntimeError):
    """A bound of the sandbox was hit."""


class _Spent(threading.local):
    """What the render running on this thread has used so far."""

    ticks = 0
    output = 0


class _Generation(Extension):
    """Accepts ``{% generation %}``. Its body is a scope of its own, as in transformers; it renders as if untagged."""

    tags = {"generation"}  # noqa: RUF012 (the name and type that jinja asks for)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _CountLoops(NodeTransformer):
    """Sends every loop's iterable and every ``~`` through the environment, where they are counted."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        # A recursive loop hands its iterable on by itself; the recursion limit bounds it.
        node.iter = nodes.Call(nodes.EnvironmentAttribute("ticked"), [node.iter], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Call(nodes.EnvironmentAttribute("concat_bounded"), node.nodes, [], None, None, lineno=node.lineno)


class _SafeDict:
    """The ``dict`` of templates: builds dicts and nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _SafeNamespace(Namespace):
    """The ``namespace`` of templates: no underscore names, so nothing of Python's internals is reachable."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attrs = dict(*rest, **kwargs)
        for name in attrs:
            _refuse_underscore(name)
        Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        Namespace.__setitem__(self, name, value)


def _refuse_underscore(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set the underscore name {name!r} on a namespace")


# Filters that turn any value into text: a small list that holds itself many times over becomes a huge string.
_TEXT_FILTERS = frozenset(
    "string join tojson pprint format urlencode replace escape e forceescape trim upper lower title capitalize "
    "center indent wordwrap wordcount truncate striptags xmlattr urlize safe reverse".split()
)
_WIDE_METHODS = frozenset("ljust rjust center zfill expandtabs".split())
_DIGITS = re.compile(r"\d{5,}")


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' filters, globals, extensions and options inside `Bounds`, with a clock that tests can freeze."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds) -> None:
        self.bounds = bounds
        self.spent = _Spent()
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalize
        )
        self.filters = {name: self._bounded_filter(name, function) for name, function in self.filters.items()}
        self.filters["tojson"] = self._tojson
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: clock().strftime(self._format_width(form))
        self.globals["dict"] = _SafeDict()
        self.globals["namespace"] = _SafeNamespace
        lipsum: Any = self.globals["lipsum"]
        self.globals["lipsum"] = lambda n=5, *a, **k: lipsum(min(int(n), 100), *a, **k)

    def start(self) -> None:
        """Begin a render on this thread: nothing is spent yet."""
        self.spent.ticks = self.spent.output = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _CountLoops().visit(tree)  # type: ignore[no-any-return]

    # -- what is counted -------------------------------------------------------------------------------------------

    def tick(self, count: int = 1) -> None:
        self.spent.ticks += count
        if self.spent.ticks > self.bounds.ticks:
            raise Exceeded(f"the template ran more than {self.bounds.ticks:,} loop iterations")

    def ticked(self, iterable: Iterable[Any]) -> Iterable[Any]:
        """`iterable`, each item counted. Sized inputs stay sized lists, so `loop.length` needs no second pass."""
        if isinstance(iterable, list | tuple | dict | str):
            # Counted when the loop starts: a `break` may leave some of them unused, which only errs on the safe side.
            self.tick(len(iterable) + 1)
            return iterable
        return self._tick_each(iterable)

    def _tick_each(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self.tick()
            yield item

    def concat_bounded(self, *values: Any) -> str:
        text = "".join([self._text(value) for value in values])
        self._bounded(text)
        return text

    def _finalize(self, value: Any) -> Any:
        text = value if isinstance(value, str) else self._text(value)
        self.spent.output += len(text)
        if self.spent.output > self.bounds.output:
            raise Exceeded(f"the template wrote more than {self.bounds.output:,} characters")
        return text

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            self._weigh(value)
            value = str(value)
        self._bounded(value)
        return str(value)

    def _bounded(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple) and len(value) > self.bounds.value:
            raise Exceeded(f"the template built a value of more than {self.bounds.value:,} items")
        return value

    def _weigh(self, value: Any) -> None:
        """Walk containers as often as writing them out would, and stop at the bound."""
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, Mapping):
                self.tick(len(item) + 1)
                stack.extend(item.values())
            elif isinstance(item, list | tuple):
                self.tick(len(item) + 1)
                stack.extend(item)

    def _format_width(self, form: Any) -> Any:
        if isinstance(form, str) and any(int(width) > self.bounds.width for width in _DIGITS.findall(form)):
            raise Exceeded(f"the template formats wider than {self.bounds.width:,} characters")
        return form

    def _widths(self, values: Iterable[Any]) -> None:
        if any(isinstance(value, int) and abs(value) > self.bounds.width for value in values):
            raise Exceeded(f"the template pads, repeats or formats wider than {self.bounds.width:,}")

    # -- where it is counted ---------------------------------------------------------------------------------------

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            __self.tick(1 + len(owner) // 256)
            if name in _WIDE_METHODS:
                __self._widths(args)
            elif name in ("format", "format_map"):
                __self._format_width(owner)
                __self._widths((*args, *kwargs.values()) if "{:{" in owner or "{}}" in owner else ())
                for value in (*args, *kwargs.values()):
                    __self._weigh(value)
            elif name == "replace" and len(args) >= 2 and isinstance(args[1], str):
                __self._repeat(len(args[1]), owner.count(args[0]) if isinstance(args[0], str) else 0)
            elif name == "join" and args:
                args = (__self._join_parts(owner, args[0]), *args[1:])
        elif not isinstance(__obj, Macro):
            __self.tick()
        return __self._bounded(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self._repeat(len(value), times)
        elif operator == "**" and isinstance(right, int | float) and abs(right) > 64:
            raise Exceeded("the template raises a number to a power above 64")
        elif operator == "%" and isinstance(left, str):
            self._format_width(left)
            self._widths(right if isinstance(right, tuple) and "*" in left else ())
            self._weigh(right)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._repeat(len(left) + len(right), 1)
        return super().call_binop(context, operator, left, right)

    def _repeat(self, size: int, times: int) -> None:
        if size * times > self.bounds.value:
            raise Exceeded(f"the template repeats text to more than {self.bounds.value:,} characters")

    def _join_parts(self, glue: str, parts: Iterable[Any]) -> list[Any]:
        listed = list(parts)
        self._repeat(sum(len(p) for p in listed if isinstance(p, str)) + len(glue) * len(listed), 1)
        return listed

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        environment = self

        def bounded(*args: Any, **kwargs: Any) -> Any:
            # With pass_environment and its like the first argument is jinja's own; ints among the rest are widths.
            environment._widths((*args[1:], *kwargs.values()))
            for value in args:
                if isinstance(value, list | tuple | str):
                    environment.tick(1 + len(value) // 16)
            if name in _TEXT_FILTERS:
                for value in (*args, *kwargs.values()):
                    environment._weigh(value)
            if name == "format" and args:
                environment._format_width(args[0])
            if name == "replace" and len(args) >= 4 and all(isinstance(value, str) for value in args[1:4]):
                environment._repeat(len(args[3]), args[1].count(args[2]))
            result = function(*args, **kwargs)
            return environment._bounded(result)

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(bounded, mark, getattr(function, mark))
        return bounded

    def _tojson(
        self, x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        # Not jinja's own filter: that one escapes HTML, which no model has seen.
        self._widths([indent])
        self._weigh(x)
        text = json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        return str(self._bounded(text))


def _raise_exception(message: Any) -> None:
    raise JinjaError(str(message))
