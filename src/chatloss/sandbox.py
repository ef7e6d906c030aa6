"""The Jinja environment that chat templates run in: that of transformers, plus bounds, because templates are untrusted.

Counted are the steps that a render takes (loops, calls, and every walk over a long value), the characters that it
writes, the memory of the values that it builds, and the widths it formats to. This stops accidents and cheap attacks;
it is no substitute for running a template you distrust in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from string import Formatter
from typing import Any, NoReturn

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from markupsafe import EscapeFormatter, Markup

from chatloss.meter import Bounds, Exceeded, Meter
from chatloss.tojson import tojson

__all__ = ["Bounds", "Exceeded", "SafeNamespace", "Sandbox"]


class _Generation(Extension):
    """Accepts ``{% generation %}``. Its body is a scope of its own, as in transformers; it renders as if untagged."""

    tags = {"generation"}  # noqa: RUF012 (the name and type that jinja asks for)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


# Filters that only `_Count` writes into a template: jinja compiles a filter to a plain call, and no name has a space.
TICK, EACH, WEIGHED, SLICED, CONCATENATED = " tick", " each", " weighed", " sliced", " concatenated"
SEARCHED = " searched"


class _Count(NodeTransformer):
    """Has loops, macro bodies, ``~``, slices, comparisons and keys counted."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        cost = _cost(node.body)
        self.generic_visit(node)
        if node.recursive:  # such a loop hands other iterables on to itself
            node.body.insert(0, _tick(8 + cost, node))
        node.iter = _filter(EACH, node.iter, nodes.Const(cost))
        return node

    def visit_Macro(self, node: nodes.Macro | nodes.CallBlock) -> nodes.Node:
        cost = 8 + _cost(node.body)
        self.generic_visit(node)
        node.body.insert(0, _tick(cost, node))
        return node

    visit_CallBlock = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(CONCATENATED, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            node.arg = node.arg if _constant(node.arg) else _filter(WEIGHED, node.arg)
            return node
        limits = (node.arg.start, node.arg.stop, node.arg.step)
        return _filter(SLICED, node.node, *(nodes.Const(None) if limit is None else limit for limit in limits))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        left = node.expr
        for operand in node.ops:
            right = operand.expr
            # Comparing with a constant takes no longer than the constant; searching is as long as what is searched.
            if not (_constant(right) or (_constant(left) and operand.op not in ("in", "notin"))):
                if left is node.expr:
                    node.expr = _filter(WEIGHED, left)
                operand.expr = _filter(SEARCHED if operand.op in ("in", "notin") else WEIGHED, right)
            left = right
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Node:
        self.generic_visit(node)
        if not _constant(node.key):
            node.key = _filter(WEIGHED, node.key)
        return node


def _filter(name: str, value: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _tick(cost: int, node: nodes.Node) -> nodes.Node:
    return nodes.ExprStmt(_filter(TICK, nodes.Const(cost, lineno=node.lineno)), lineno=node.lineno)


def _cost(body: list[nodes.Node]) -> int:
    """The steps that one run through a body takes, its inner loops not counted."""
    found = [node for statement in body for node in (statement, *statement.find_all(nodes.Node))]
    return 1 + (len(found) + sum(len(node.data) for node in found if isinstance(node, nodes.TemplateData))) // 32


def _constant(node: nodes.Node) -> bool:
    items = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    return all(isinstance(item, nodes.Const) for item in items)


class _SafeDict:
    """The ``dict`` of templates: builds dicts and nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class SafeNamespace(Namespace):
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


class _Formatter(SandboxedFormatter):
    """``str.format`` that measures what it formats, and the widths it formats to once they are known."""

    def __init__(self, env: Sandbox, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self._meter = env.meter

    def convert_field(self, value: Any, conversion: Any) -> Any:
        return super().convert_field(self._meter.weighed(value), conversion)

    def format_field(self, value: Any, format_spec: str) -> Any:
        return self._meter.spend(super().format_field(value, self._meter.narrow(format_spec)))


class _EscapeFormatter(_Formatter, EscapeFormatter):
    """The same for text that is marked as safe."""


_COLLECTIONS = frozenset((str, dict, list, tuple))
# Filters that read all of their input at once: an iterator is read here, counted, and handed on as a list.
_EAGER = frozenset("join list sum sort unique min max groupby batch slice reverse last string pprint".split())
# Filters that do not look into their input.
_SHALLOW = frozenset("map select reject selectattr rejectattr first default d attr length count items safe".split())
# Filters that are slow.
_SLOW = frozenset("striptags wordwrap urlize title wordcount".split())
# Where a filter's width stands: the index among its arguments, and its name.
_WIDTHS = {"center": (1, "width"), "indent": (1, "width"), "batch": (1, "linecount"), "slice": (1, "slices"),
           "round": (1, "precision"), "tojson": (2, "indent")}
_WIDE_METHODS = frozenset("ljust rjust center zfill expandtabs to_bytes".split())
# What is done to texts so short that neither the result nor the time it takes need be counted.
SHORT = 1024
PLAIN_METHODS = frozenset("strip lstrip rstrip startswith endswith split rsplit upper lower title capitalize".split())
_PLAIN_FILTERS = frozenset("trim string safe upper lower length default d tojson".split())
DICT_METHODS = frozenset(dir(dict))
_PLAIN_VALUES = frozenset((str, int, bool, float, list, dict))
_LOOP_VALUES = frozenset("first last index index0 revindex revindex0 length".split())
_NUMERIC_TESTS = frozenset("odd even divisibleby".split())
_READING_TESTS = frozenset("== eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le in lower upper".split())

Before = Callable[[str, list[Any], dict[str, Any]], None]


class Sandbox(ImmutableSandboxedEnvironment):
    """transformers' filters, globals, extensions and options inside `Bounds`, with a clock that tests can freeze."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, clock: Callable[[], datetime], bounds: Bounds, meter: Meter | None = None) -> None:
        self.meter = meter = meter or Meter(bounds)
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=self._finalize
        )
        self.filters["tojson"] = tojson
        self.filters = {name: self._bounded(name, function, self._before) for name, function in self.filters.items()}
        tests: dict[str, Any] = dict(self.tests)
        for name in _NUMERIC_TESTS | _READING_TESTS:
            self.tests[name] = self._bounded(name, tests[name], self._before_test)
        own: dict[str, Callable[..., Any]] = {
            TICK: meter.tick, EACH: meter.each, WEIGHED: meter.weighed, SLICED: self._sliced,
            CONCATENATED: self._concatenated, SEARCHED: self._searched,
        }
        self.filters |= {name: never_folded(function) for name, function in own.items()}
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: clock().strftime(meter.narrow(form))
        self.globals["dict"] = _SafeDict()
        self.globals["namespace"] = SafeNamespace
        lipsum: Any = self.globals["lipsum"]
        self.globals["lipsum"] = lambda *args, **kwargs: lipsum(*_few(args), **_few(kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Count().visit(tree)  # type: ignore[no-any-return]

    def handle_exception(self, source: str | None = None) -> NoReturn:
        # jinja's own compiles code to make a traceback through the template, for every conversation that is refused.
        error = sys.exc_info()[1]
        assert error is not None
        raise error

    def _finalize(self, value: Any) -> str:
        return self.meter.write(value if type(value) is str else self._text(value))

    def _text(self, value: Any) -> str:
        return value if isinstance(value, str) else str(self.meter.weighed(value))

    def _concatenated(self, *values: Any) -> str:
        texts = [self._text(value) for value in values]
        self.meter.at_most(sum(map(len, texts)))
        return str(self.meter.spend("".join(texts)))

    def _sliced(self, value: Any, *limits: Any) -> Any:
        if isinstance(value, list | tuple | str):
            self.meter.tick(len(value) >> 8)
        return self.meter.spend(value[slice(*limits)])

    def _searched(self, value: Any) -> Any:
        # A key is looked up in a dict at once.
        return value if type(value) is dict else self.meter.weighed(value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """What jinja's own does. Filters that take an attribute come here too, and may hash a large tuple often."""
        if type(obj) is dict and type(argument) is str and argument in obj:
            return obj[argument]
        return super().getitem(obj, self.meter.weighed(argument) if isinstance(argument, tuple) else argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """What jinja's own does, sooner for what templates mostly read: keys of messages, where a loop stands."""
        kind = type(obj)
        if kind is dict and attribute not in DICT_METHODS:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if (kind is LoopContext and attribute in _LOOP_VALUES) or (kind is str and attribute in PLAIN_METHODS):
            return getattr(obj, attribute)
        if kind is SafeNamespace and not attribute.startswith("_"):
            value = getattr(obj, attribute, None)
            if type(value) in _PLAIN_VALUES:
                return value
        return super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text = value.__self__
        formatter: Formatter = (
            _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)
        )

        def formatted(*args: Any, **kwargs: Any) -> str:
            self.meter.tick(len(text) >> 4)
            if value.__name__ == "format_map":
                (kwargs,) = args
                args = ()
            return type(text)(formatter.vformat(text, args, kwargs))  # type: ignore[no-any-return]

        return formatted

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.meter.tick(4)
        owner = getattr(__obj, "__self__", None)
        plain = type(owner) is str and len(args) < 2 and __obj.__name__ in PLAIN_METHODS
        if plain and all(type(text) is str and len(text) < SHORT for text in (owner, *args)):
            return super().call(__context, __obj, *args, **kwargs)
        if isinstance(owner, str | bytes | int | list | tuple | dict | _SafeDict):
            args = __self._before_method(owner, __obj.__name__, args, kwargs)
        return __self.meter.spend(super().call(__context, __obj, *args, **kwargs))

    def _before_method(
        self, owner: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Any, ...]:
        meter = self.meter
        if isinstance(owner, str | bytes) or name in ("count", "index"):
            meter.weighed(owner)
        for value in args:
            meter.weighed(value)
        if name in _WIDE_METHODS:
            meter.widths((*args, *kwargs.values()))
        if isinstance(owner, str | bytes) and args:
            if name == "replace" and len(args) >= 2:
                meter.replaced(owner, *args[:2])
            elif name == "translate":
                meter.translated(owner, args[0])
            elif name == "expandtabs":
                meter.expanded(owner, args[0])
            elif name == "join":
                return (meter.joined(owner, args[0]), *args[1:])
        return args

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is type(right) is str and len(left) + len(right) < SHORT:
            return left + right
        self.meter.operated(operator, left, right)
        return self.meter.spend(super().call_binop(context, operator, left, right))

    def _before(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        """Count what filter `name` is about to do with `args`, the first of which is what it filters."""
        meter, value = self.meter, args[0] if args else None
        if name == "tojson" and type(value) is dict and len(args) == 1 and not kwargs:  # the usual
            meter.size(value)
            meter.tick(len(value) >> 4)
            return
        plain = type(value) in _COLLECTIONS  # which is known sooner than it is asked
        if not plain and isinstance(value, Iterator):
            args[0] = value = list(meter.each(value)) if name in _EAGER else meter.each(value)
        if name not in _SHALLOW:
            for given in (*args, *kwargs.values()):
                meter.weighed(given)
        if plain or isinstance(value, Collection):
            meter.tick(len(value) >> 4)  # type: ignore[arg-type]
        at, width = _WIDTHS.get(name, (len(args), ""))
        wide = args[at] if at < len(args) else kwargs.get(width)
        if wide is not None:
            meter.widths([wide])
        if name == "indent" and isinstance(wide, str) and isinstance(value, str):
            meter.at_most(len(value) + len(wide) * value.count("\n"))
        elif name == "format":
            meter.formatted(value, kwargs or tuple(args[1:]))
        elif name == "replace":
            old, new = (args[i] if i < len(args) else kwargs.get(key) for i, key in ((1, "old"), (2, "new")))
            meter.replaced(value, old, new)
        elif name == "join" and isinstance(value, Iterable):
            args[0] = meter.joined(args[1] if len(args) > 1 else kwargs.get("d", ""), value)
        elif name == "sum" and isinstance(value, Collection):
            meter.summed(value)
        elif name in _SLOW and isinstance(value, str):
            meter.slow(value)

    def _before_test(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        for value in args:
            self.meter.weighed(value)
        if name in _NUMERIC_TESTS and args:
            self.meter.formatted(args[0], args[1] if len(args) > 1 else 2)

    def _bounded(self, name: str, function: Callable[..., Any], before: Before) -> Callable[..., Any]:
        own = 1 if hasattr(function, "jinja_pass_arg") else 0  # the first argument is jinja's then
        plain = name in _PLAIN_FILTERS

        def bounded(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick(2)
            if plain and len(args) == own + 1 and type(args[own]) is str and len(args[own]) < SHORT:
                return function(*args, **kwargs)
            given = list(args[own:])
            before(name, given, kwargs)
            return self.meter.spend(function(*args[:own], *given, **kwargs))

        for mark in ("jinja_pass_arg", "jinja_async_variant"):
            if hasattr(function, mark):
                setattr(bounded, mark, getattr(function, mark))
        return bounded


def never_folded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that the compiler does not evaluate, because it might depend on the context."""

    @pass_context
    def counted(context: Context, *args: Any) -> Any:
        return function(*args)

    return counted


def _few(counts: Any) -> Any:
    values = counts.values() if isinstance(counts, dict) else counts
    if any(isinstance(count, int) and count > 100 for count in values):
        raise Exceeded("the template asks for more than 100 words or paragraphs")
    return counts


def _raise_exception(message: Any) -> None:
    raise JinjaError(str(message))
