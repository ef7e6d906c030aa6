"""jinja's compiler, with expressions that take values which differ between renderings (`worlds`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, optimizeconst
from jinja2.idtracking import VAR_LOAD_PARAMETER

from chatloss.sandbox import DICT_METHODS, PLAIN_METHODS, SEARCHED, WEIGHED

__all__ = ["LIGHT", "Expressions", "Unsupported"]

LIGHT = frozenset((int, bool, float, type(None)))
_COMPARE = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
# Filters whose results are iterators.
_LAZY = frozenset("map select reject selectattr rejectattr unique batch slice items reverse".split())

# What a test without arguments is in Python.
_TESTS = {
    "string": "isinstance({0}, str)", "none": "{0} is None", "true": "{0} is True", "false": "{0} is False",
    "defined": "not isinstance({0}, Undefined)", "undefined": "isinstance({0}, Undefined)",
}
# Filters of texts, as methods: on short texts the sandbox only counts them.
_TEXT_FILTERS = {"trim": ".strip()", "upper": ".upper()", "lower": ".lower()", "string": ""}
_MOST_JOINED = 8
_LOOP_VALUES = frozenset("first last index index0 revindex revindex0 length previtem nextitem".split())


class Unsupported(Exception):
    """A template that holds something traced code is not made for."""


class Expressions(CodeGenerator):
    """Writes expressions for varied operands.

    Operators that take no function are written twice: as they are, and, for varied operands, as a call of `Worlds`
    whose later operands are functions. Within those only the calls are written, or code would double at every level.
    `varies`: how the code asks whether a value, by its type, is one of those operands.
    """

    varies = "is V"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._within = 0  # functions of operands
        self._ifs = [0]  # branches since the variables' scope began
        self._loops = 0
        self._written = 0
        self._assigned: set[str] = set()
        self._varying: set[str] = set()

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        # What is neither given by world nor ever assigned is the same for all.
        self._assigned = {name.name for name in node.find_all(nodes.Name) if name.ctx != "load"}
        self._assigned |= {macro.name for macro in node.find_all(nodes.Macro)}
        self._varying = {"messages", "add_generation_prompt", *self._assigned}
        super().visit_Template(node, frame)

    def _chosen(self, name: str, test: Callable[[], None], yes: Callable[[], None], no: Callable[[], None]) -> None:
        """``yes if test else no``; for "both" and "either" one of them is `test` itself, and is not written again."""
        value = self.temporary_identifier()
        others = {"cond": (yes, no), "both": (yes,), "either": (no,)}[name]
        if self._within:
            self.write(f"W.{name}(")
            test()
        else:
            self.write(f"(W.{name}({value}")
            # Python evaluates the condition, which sets the value, before this.
        if self._within:
            for other in others:
                self.write(", lambda: ")
                other()
            self.write(")")
            return
        self._within += 1
        for other in others:
            self.write(", lambda: ")
            other()
        self._within -= 1
        self.write(f") if type({value} := ")
        test()
        self.write(f") {self.varies} else ")
        if name == "cond":
            yes()
            self.write(f" if {value} else ")
            no()
        elif name == "both":
            self.write(f"{value} and ")
            yes()
        else:
            self.write(f"{value} or ")
            no()
        self.write(")")

    @optimizeconst
    def visit_And(self, node: nodes.BinExpr, frame: Frame) -> None:
        first, *rest = _chain(nodes.And, node)
        self._chosen("both", lambda: self.visit(first, frame), lambda: self._joined("both", rest, frame), lambda: None)

    @optimizeconst
    def visit_Or(self, node: nodes.BinExpr, frame: Frame) -> None:
        first, *rest = _chain(nodes.Or, node)
        others: Callable[[], None] = lambda: self._joined("either", rest, frame)  # noqa: E731
        self._chosen("either", lambda: self.visit(first, frame), lambda: None, others)

    def _joined(self, name: str, parts: list[nodes.Expr], frame: Frame) -> None:
        """``parts[0] and parts[1] and ...``, or the same with "or"."""
        if len(parts) == 1:
            self.visit(parts[0], frame)
            return
        rest: Callable[[], None] = lambda: self._joined(name, parts[1:], frame)  # noqa: E731
        self._chosen(name, lambda: self.visit(parts[0], frame), rest, rest)

    @optimizeconst
    def visit_Neg(self, node: nodes.UnaryExpr, frame: Frame) -> None:
        if isinstance(node.node, nodes.Const) and type(node.node.value) is int:
            self.write(f"(-{node.node.value})")
        else:
            super().visit_Neg(node, frame)

    @optimizeconst
    def visit_CondExpr(self, node: nodes.CondExpr, frame: Frame) -> None:
        frame = frame.soft()

        def otherwise() -> None:
            if node.expr2 is not None:
                self.visit(node.expr2, frame)
            else:
                self.write("cond_expr_undefined('the inline if-expression has no else section')")

        self._chosen(
            "cond", lambda: self.visit(node.test, frame), lambda: self.visit(node.expr1, frame), otherwise
        )

    @optimizeconst
    def visit_Not(self, node: nodes.UnaryExpr, frame: Frame) -> None:
        self._named(node.node, frame, "(W.negated({0}) if type({0} := ", f") {self.varies} else not {{0}})")

    @optimizeconst
    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        if any(True for one in node.ops[1:] for _ in one.find_all(nodes.Call)):
            raise Unsupported("a call that a chain of comparisons may leave out")
        # A constant does not vary and need not be kept.
        operands = [_unweighed(one) for one in (node.expr, *(one.expr for one in node.ops))]
        names = ["" if isinstance(one, nodes.Const) else self.temporary_identifier() for one in operands]
        texts = [name or repr(cast(nodes.Const, one).value) for name, one in zip(names, operands, strict=True)]
        rest = zip(node.ops, texts[1:], strict=True)
        plain = texts[0] + "".join(f" {_COMPARE[one.op]} {text}" for one, text in rest)
        given = ", ".join(filter(None, names))
        operator = _COMPARE[node.ops[0].op]
        if len(node.ops) == 1 and all(names) and "in" not in operator:
            self.write(f"(W.compared(lambda {given}: {plain}, {operator!r}, {given}) if ")
        else:
            self.write(f"(W.tested(lambda {given}: {plain}, {given}) if ")
        for i, (operand, name) in enumerate((o, n) for o, n in zip(operands, names, strict=True) if n):
            self.write(f"{' | ' if i else ''}(type({name} := ")
            self.visit(operand, frame)
            self.write(f") {self.varies})")
        self.write(f" else {plain})")

    @optimizeconst
    def visit_Add(self, node: nodes.BinExpr, frame: Frame) -> None:
        parts: list[nodes.Expr] = []
        left: nodes.Expr = node
        while isinstance(left, nodes.Add):
            parts.append(left.right)
            left = left.left
        self.write("added(context")
        for part in (left, *reversed(parts)):
            self.write(", ")
            self.visit(part, frame)
        self.write(")")

    def visit_Name(self, node: nodes.Name, frame: Frame) -> None:
        if node.ctx != "load":
            super().visit_Name(node, frame)
            return
        if node.name not in self._varying:
            super().visit_Name(node, frame)
            return
        ref = frame.symbols.ref(node.name)
        load = frame.symbols.find_load(ref)
        self.write(f"(W.name({ref}, {node.name!r}, undefined) if type({ref}) {self.varies} else ")
        if load is not None and load[0] == VAR_LOAD_PARAMETER and not self.parameter_is_undeclared(ref):
            self.write(f"{ref})")
        else:
            self.write(f"undefined(name={node.name!r}) if {ref} is missing else {ref})")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._made("list", node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._made("tuple", node.items, frame)
        else:
            super().visit_Tuple(node, frame)

    def _made(self, kind: str, items: list[nodes.Expr], frame: Frame) -> None:
        plain = all(isinstance(item, nodes.Const) for item in items)
        self.write("" if plain else f"W.made({kind}, ")
        self.write("[" if kind == "list" or not plain else "(")
        for item in items:
            self._settled(item, frame)
            self.write(", ")
        self.write("]" if kind == "list" or not plain else ")")
        self.write("" if plain else ")")

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self.write("W.made_dict([")
        for part in ("key", "value"):
            for item in node.items:
                self._settled(getattr(item, part), frame)
                self.write(", ")
            self.write("], [" if part == "key" else "])")

    @optimizeconst
    def visit_Getattr(self, node: nodes.Getattr, frame: Frame) -> None:
        if isinstance(node.node, nodes.Name) and node.node.name == "loop" and node.attr in _LOOP_VALUES:
            ref = frame.symbols.ref("loop")
            load = frame.symbols.find_load(ref)
            if "loop" not in self._varying and load is not None and load[0] == VAR_LOAD_PARAMETER:
                self.write(f"{ref}.{node.attr}")
                return
        self._lookup("getattribute", node.node, node.attr, node.attr not in DICT_METHODS, frame)

    @optimizeconst
    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            raise Unsupported("a slice that is not counted")
        if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
            self._lookup("getitem", node.node, node.arg.value, True, frame)
            return
        self.write("getitem(")
        self.visit(node.node, frame)
        self.write(", ")
        self.visit(node.arg, frame)
        self.write(")")

    def _lookup(self, function: str, node: nodes.Expr, key: str, as_key: bool, frame: Frame) -> None:
        if not as_key:
            self.write(f"{function}(")
            self.visit(node, frame)
            self.write(f", {key!r})")
            return
        value = self.temporary_identifier()
        self.write(f"({value}[{key!r}] if type({value} := ")
        self.visit(node, frame)
        self.write(f") is dict and {key!r} in {value} else {function}({value}, {key!r}))")

    def signature(
        self, node: nodes.Call | nodes.Filter | nodes.Test, frame: Frame, extra_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise Unsupported("* or ** in a call")
        if any(iskeyword(cast(nodes.Keyword, one).key) for one in node.kwargs):
            raise Unsupported("a Python keyword as a name")
        for one in node.args:
            self.write(", ")
            self._settled(one, frame)
        for named in node.kwargs:
            self.write(", ")
            self.visit(named, frame)
        for key, value in (extra_kwargs or {}).items():
            self.write(f", {key}={value}")

    def visit_Keyword(self, node: nodes.Keyword, frame: Frame) -> None:
        self.write(f"{node.key}=")
        self._settled(node.value, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        of = node.node
        if isinstance(of, nodes.Getattr) and of.attr in PLAIN_METHODS and len(node.args) < 2 and not node.kwargs:
            self.write(f"method(context, {of.attr!r}, ")
            self.visit(of.node, frame)
            self.signature(node, frame)
            self.write(")")
            return
        self.write("call(context, ")
        self.visit(node.node, frame)
        self.signature(node, frame, {"caller": "caller"} if forward_caller else None)
        self.write(")")

    @optimizeconst
    def visit_Filter(self, node: nodes.Filter, frame: Frame) -> None:
        if node.node is None:
            raise Unsupported("a filter of a block")
        function = self.filters[node.name]
        if node.name in (WEIGHED, SEARCHED):  # numbers and truth weigh nothing
            after = f") in LIGHT else {function}(context, {{0}}))"
            self._named(node.node, frame, "({0} if type({0} := ", after)
            return
        if node.name in _TEXT_FILTERS and not node.args and not node.kwargs:
            before = f"(tick(2) or {{0}}{_TEXT_FILTERS[node.name]} if type({{0}} := "
            self._named(node.node, frame, before, f") is str and len({{0}}) < SHORT else {function}({{0}}))")
            return
        super().visit_Filter(node, frame)

    @optimizeconst
    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        if node.name in _TESTS and not node.args and not node.kwargs:
            before = f"(W.tested(lambda {{0}}: {_TESTS[node.name]}, {{0}}) if type({{0}} := "
            self._named(node.node, frame, before, f") {self.varies} else {_TESTS[node.name]})")
            return
        super().visit_Test(node, frame)

    def _named(self, node: nodes.Node, frame: Frame, before: str, after: str) -> None:
        """Write a node between two texts of code, in which ``{0}`` is a variable that holds its value."""
        value = self.temporary_identifier()
        self.write(before.format(value))
        self.visit(node, frame)
        self.write(after.format(value))

    def _settled(self, node: nodes.Node, frame: Frame) -> None:
        """An expression whose value is kept, and so must not be an iterator, which only one world could go through."""
        lazy = any(one.name in _LAZY for one in node.find_all(nodes.Filter)) \
            or (isinstance(node, nodes.Filter) and node.name in _LAZY)
        self.write("W.settled(" if lazy else "")
        self.visit(node, frame)
        self.write(")" if lazy else "")


def _unweighed(node: nodes.Expr) -> nodes.Expr:
    """A constant that weighs nothing without the filter that weighs it."""
    if isinstance(node, nodes.Filter) and node.name in (WEIGHED, SEARCHED) and isinstance(node.node, nodes.Const):
        value = node.node.value
        return node.node if type(value) in LIGHT or (type(value) is str and len(value) < 256) else node
    return node


def _chain(kind: type[nodes.BinExpr], node: nodes.Expr) -> list[nodes.Expr]:
    """The operands of a few nested "and"s or "or"s, from left to right: the rest is written once for each of them."""
    parts: list[nodes.Expr] = []
    while isinstance(node, kind) and len(parts) < _MOST_JOINED:
        parts.append(node.right)
        node = node.left
    return [node, *reversed(parts)]
