"""jinja's compiler, taught to write code that computes with the values of many renderings at once (`worlds`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame, MacroRef, optimizeconst
from jinja2.idtracking import VAR_LOAD_PARAMETER

from chatloss.sandbox import DICT_METHODS, EACH, PLAIN_METHODS, SEARCHED, WEIGHED

__all__ = ["Generator", "Unsupported"]

_COMPARE = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
# Filters whose results are iterators.
_LAZY = frozenset("map select reject selectattr rejectattr unique batch slice items reverse".split())

# What a test without arguments is in Python.
_TESTS = {
    "string": "isinstance({0}, str)", "none": "{0} is None", "true": "{0} is True", "false": "{0} is False",
    "defined": "not isinstance({0}, Undefined)", "undefined": "isinstance({0}, Undefined)",
}
_LOOP_VALUES = frozenset("first last index index0 revindex revindex0 length previtem nextitem".split())


class Unsupported(Exception):
    """A template that holds something traced code is not made for."""


class Generator(CodeGenerator):
    """jinja's compiler, with everything that may meet a varied value made ready for it.

    Operators that take no function are written twice: as they are, and, for varied operands, as a call of `Worlds`
    whose later operands are functions. Within those only the calls are written, or code would double at every level.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._within = 0  # functions of operands
        self._ifs = [0]  # branches since the variables' scope began
        self._loops = 0
        self._varying = {"messages", "add_generation_prompt"}

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        # What is neither given by world nor ever assigned is the same for all.
        self._varying |= {name.name for name in node.find_all(nodes.Name) if name.ctx != "load"}
        self._varying |= {macro.name for macro in node.find_all(nodes.Macro)}
        super().visit_Template(node, frame)

    # -- frames ----------------------------------------------------------------------------------------------------

    def write_commons(self) -> None:
        super().write_commons()
        self.writeline("W = environment.worlds")
        self.writeline("V = environment.varied")
        self.writeline("getattribute = environment.getattr")
        self.writeline("getitem = environment.getitem")
        self.writeline("show = environment.show")
        self.writeline("added = environment.added")
        self.writeline("method = environment.method")
        self.writeline("write = W.write")
        self.writeline("new_buffer = environment.new_buffer")
        self.writeline("call = environment.call")
        self.writeline("LIGHT = environment.light")
        self.writeline("concat = environment.joined")
        self.writeline("buffer_0 = W.buffer")
        self.writeline("scope = W.mask")

    def start_write(self, frame: Frame, node: nodes.Node | None = None) -> None:
        self.writeline(f"write({frame.buffer or 'buffer_0'}, ", node)

    def end_write(self, frame: Frame) -> None:
        self.write(")")

    def buffer(self, frame: Frame) -> None:
        frame.buffer = self.temporary_identifier()
        self.writeline(f"{frame.buffer} = new_buffer()")

    @contextmanager
    def _scope(self, begun: bool = True) -> Iterator[None]:
        """Code whose variables are its own: outside of it nobody sees what it assigns."""
        self._ifs.append(0)
        yield
        self._ifs.pop()

    def pop_assign_tracking(self, frame: Frame) -> None:
        self._assign_stack.pop()  # exported names are of use to imports and blocks only

    # -- statements ------------------------------------------------------------------------------------------------

    def _refuse(self, node: nodes.Node, *args: Any, **kwargs: Any) -> None:
        raise Unsupported(type(node).__name__)

    visit_Block = visit_Extends = visit_Include = visit_Import = visit_FromImport = _refuse
    visit_OverlayScope = visit_EvalContextModifier = visit_ScopedEvalContextModifier = _refuse
    visit_With = visit_Scope = visit_FilterBlock = _refuse

    def visit_Output(self, node: nodes.Output, frame: Frame) -> None:
        target = frame.buffer or "buffer_0"
        for child in node.nodes:
            data = isinstance(child, nodes.TemplateData)
            self.writeline(f"{'write' if data else 'show'}({target}, ", child)
            self.visit(child, frame)
            self.write(")")

    def visit_If(self, node: nodes.If, frame: Frame) -> None:
        branch, soft = self.temporary_identifier(), frame.soft()
        test = self.temporary_identifier()
        self.writeline(f"for {branch} in (W.branches({test}) if type({test} := ", node)
        bodies = [node.body, *(one.body for one in node.elif_)]
        if node.elif_:
            self._choice([one.test for one in (node, *node.elif_)], 0, soft)
        else:
            self.visit(node.test, soft)
        self.write(f") is V else ({test},)):")
        self.indent()
        self._ifs[-1] += 1
        for i, body in enumerate([*bodies, node.else_]):
            if i == len(bodies):
                if not body:
                    break
                self.writeline("else:")
            elif node.elif_:
                self.writeline(f"{'elif' if i else 'if'} {branch} == {i}:")
            else:
                self.writeline(f"if {branch}:")
            self.indent()
            self._body(body, soft)
            self.outdent()
        self._ifs[-1] -= 1
        self.outdent()
        if self._loops and _leaves(node):
            self.writeline("if not W.mask: continue")

    def _choice(self, tests: Sequence[nodes.Node], i: int, frame: Frame) -> None:
        """The number of the first of `tests` that holds, from `i` on."""
        if i == len(tests):
            self.write(str(i))
            return
        self._chosen(
            "cond", lambda: self.visit(tests[i], frame), lambda: self.write(str(i)),
            lambda: self._choice(tests, i + 1, frame),
        )

    def _body(self, body: list[nodes.Node], frame: Frame) -> None:
        """A branch. If it says that it raises, the worlds that take it die alone."""
        raises = any(
            isinstance(call.node, nodes.Name) and call.node.name == "raise_exception"
            for statement in body if isinstance(statement, nodes.Output | nodes.ExprStmt)
            for call in statement.find_all(nodes.Call)
        )
        if raises:
            self._risk(body, frame)
        else:
            self.blockvisit(body, frame)

    def _risk(self, body: list[nodes.Node], frame: Frame) -> None:
        """Code that may raise something, which ends none but the worlds that run it."""
        mask, error = self.temporary_identifier(), self.temporary_identifier()
        self.writeline(f"{mask} = W.mask")
        self.writeline("try:")
        self.indent()
        self.blockvisit(body, frame)
        self.outdent()
        self.writeline(f"except Exception as {error}:")
        self.indent()
        self.writeline(f"W.die({mask}, {error})")
        self.outdent()

    def visit_Break(self, node: nodes.Break, frame: Frame) -> None:
        self.writeline("W.leave(True)", node)
        self.writeline("continue")

    def visit_Continue(self, node: nodes.Continue, frame: Frame) -> None:
        self.writeline("W.leave(False)", node)
        self.writeline("continue")

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        if node.recursive or node.else_:
            raise Unsupported("a recursive loop, or one with else")
        loop_frame, test_frame = frame.inner(), frame.inner()
        loop_frame.loop_frame = True
        extended = any(name.name == "loop" for part in node.body for name in _names(part))
        loop = loop_frame.symbols.declare_parameter("loop") if extended else None
        loop_frame.symbols.analyze_node(node, for_branch="body")
        if any(name.ctx == "store" and name.name == "loop" for name in node.find_all(nodes.Name)):
            raise Unsupported("an assignment to loop")
        chosen = ""
        if node.test:
            chosen = self._loop_filter(node, loop_frame, test_frame)
        if loop:
            self.writeline(f"{loop} = missing")
        self.writeline("for ", node)
        # A varied item of several parts is unpacked part by part.
        item = self.temporary_identifier() if isinstance(node.target, nodes.Tuple) else ""
        if item:
            self.write(item)
        else:
            self.visit(node.target, loop_frame)
        leaving = _leaves(node)
        self.write(f"{f', {loop}' if loop else ''} in W.loop(")
        assert isinstance(node.iter, nodes.Filter) and node.iter.name == EACH
        cost = cast(nodes.Const, node.iter.args[0]).value
        if chosen:
            self.write(f"W.lift({chosen}, ")
        values = node.iter.node
        assert values is not None
        self.visit(values, frame)
        self.write(f"{')' if chosen else ''}, {cost}, {extended}, {leaving}):")
        self.indent()
        self.enter_frame(loop_frame)
        if item:
            self.newline()
            self._unpack(cast(nodes.Tuple, node.target), item, loop_frame)
        self._loops += 1
        with self._scope():
            self.writeline(f"scope_{len(self._ifs)} = W.mask")
            if self._loops == 1:
                self._risk(node.body, loop_frame)
            else:
                self.blockvisit(node.body, loop_frame)
        self._loops -= 1
        self.outdent()
        self.leave_frame(loop_frame)

    def _loop_filter(self, node: nodes.For, loop_frame: Frame, test_frame: Frame) -> str:
        """The function that chooses the items of ``for x in y if z``, as a list."""
        assert node.test is not None
        name = self.temporary_identifier()
        test_frame.symbols.analyze_node(node, for_branch="test")
        self.writeline(f"def {name}(values):", node.test)
        self.indent()
        self.writeline("found = []")
        self.enter_frame(test_frame)
        self.writeline("for ")
        self.visit(node.target, loop_frame)
        self.write(" in values:")
        self.indent()
        self.writeline("if W.plain(", node.test)
        self.visit(node.test, test_frame)
        self.write("): found.append(")
        self.visit(node.target, loop_frame)
        self.write(")")
        self.outdent()
        self.writeline("return found")
        self.outdent()
        return name

    def macro_body(self, node: nodes.Macro | nodes.CallBlock, frame: Frame) -> tuple[Frame, MacroRef]:
        loops, self._loops = self._loops, 0
        with self._scope():
            self._macro_scope = f"scope_{len(self._ifs)}"
            made = super().macro_body(node, frame)
        self._loops = loops
        return made

    def push_parameter_definitions(self, frame: Frame) -> None:
        super().push_parameter_definitions(frame)
        self.writeline(f"{self._macro_scope} = W.mask")

    def visit_Macro(self, node: nodes.Macro, frame: Frame) -> None:
        macro_frame, macro_ref = self.macro_body(node, frame)
        name = self.temporary_identifier()
        self.writeline(f"{name} = ")
        self.macro_def(macro_ref, macro_frame)
        self.newline()
        self._store(nodes.Name(node.name, "store"), name, frame)

    def visit_Assign(self, node: nodes.Assign, frame: Frame) -> None:
        self.push_assign_tracking()
        value = self.temporary_identifier()
        self.writeline(f"{value} = ", node)
        self._settled(node.node, frame)
        self.newline()
        self._store(node.target, value, frame)
        self.pop_assign_tracking(frame)

    def visit_AssignBlock(self, node: nodes.AssignBlock, frame: Frame) -> None:
        self.push_assign_tracking()
        block_frame = frame.inner()
        block_frame.symbols.analyze_node(node)
        self.enter_frame(block_frame)
        self.buffer(block_frame)
        with self._scope():
            self.writeline(f"scope_{len(self._ifs)} = W.mask")
            self.blockvisit(node.body, block_frame)
        value = self.temporary_identifier()
        self.writeline(f"{value} = ", node)
        if node.filter is not None:
            self.visit_Filter(node.filter, block_frame)
        else:
            self.write(f"concat({block_frame.buffer})")
        self.newline()
        self._store(node.target, value, frame)
        self.pop_assign_tracking(frame)
        self.leave_frame(block_frame)

    def _store(self, target: nodes.Node, value: str, frame: Frame) -> None:
        """Assign the Python variable `value` to `target`, in the worlds that run."""
        if isinstance(target, nodes.Tuple):
            self._unpack(target, value, frame)
        elif isinstance(target, nodes.NSRef):
            self.writeline(f"environment.assign({frame.symbols.ref(target.name)}, {target.attr!r}, {value})")
        else:
            assert isinstance(target, nodes.Name)
            ref = frame.symbols.ref(target.name)
            if self._ifs[-1]:
                scope = f"scope_{len(self._ifs)}" if len(self._ifs) > 1 else "scope"
                self.writeline(f"{ref} = {value} if W.mask == {scope} else W.put({ref}, {value})")
            else:
                self.writeline(f"{ref} = {value}")

    def _unpack(self, target: nodes.Tuple, value: str, frame: Frame) -> None:
        parts = [self.temporary_identifier() for _ in target.items]
        self.writeline(f"{', '.join(parts)}, = W.unpacked({value}, {len(parts)}) if type({value}) is V else {value}")
        for part, item in zip(parts, target.items, strict=True):
            self._store(item, part, frame)

    # -- expressions -----------------------------------------------------------------------------------------------

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
        self.write(") is V else ")
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
        self._chosen(
            "both", lambda: self.visit(node.left, frame), lambda: self.visit(node.right, frame), lambda: None
        )

    @optimizeconst
    def visit_Or(self, node: nodes.BinExpr, frame: Frame) -> None:
        self._chosen(
            "either", lambda: self.visit(node.left, frame), lambda: None, lambda: self.visit(node.right, frame)
        )

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
        value = self.temporary_identifier()
        self.write(f"(W.negated({value}) if type({value} := ")
        self.visit(node.node, frame)
        self.write(f") is V else not {value})")

    @optimizeconst
    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        # A constant does not vary and need not be kept.
        operands = [node.expr, *(one.expr for one in node.ops)]
        names = ["" if isinstance(one, nodes.Const) else self.temporary_identifier() for one in operands]
        texts = [name or repr(cast(nodes.Const, one).value) for name, one in zip(names, operands, strict=True)]
        rest = zip(node.ops, texts[1:], strict=True)
        plain = texts[0] + "".join(f" {_COMPARE[one.op]} {text}" for one, text in rest)
        given = ", ".join(filter(None, names))
        self.write(f"(W.lift(lambda {given}: {plain}, {given}) if ")
        for i, (operand, name) in enumerate((o, n) for o, n in zip(operands, names, strict=True) if n):
            self.write(f"{' | ' if i else ''}(type({name} := ")
            self.visit(operand, frame)
            self.write(") is V)")
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
        self.write(f"(W.name({ref}, {node.name!r}, undefined) if type({ref}) is V else ")
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

    def visit_Keyword(self, node: nodes.Keyword, frame: Frame) -> None:
        self.write(f"{node.key}=")
        self._settled(node.value, frame)

    def visit_Call(self, node: nodes.Call, frame: Frame, forward_caller: bool = False) -> None:
        if any(isinstance(one, nodes.Filter) and one.name in _LAZY for one in node.args):
            raise Unsupported("a call with an iterator")
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise Unsupported("a call with * or **")
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
        if node.dyn_args is not None or node.dyn_kwargs is not None or node.node is None:
            raise Unsupported("a filter with * or **")
        if node.name in (WEIGHED, SEARCHED):  # numbers and truth weigh nothing
            value = self.temporary_identifier()
            self.write(f"({value} if type({value} := ")
            self.visit(node.node, frame)
            self.write(f") in LIGHT else {self.filters[node.name]}(context, {value}))")
            return
        super().visit_Filter(node, frame)

    @optimizeconst
    def visit_Test(self, node: nodes.Test, frame: Frame) -> None:
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            raise Unsupported("a test with * or **")
        if node.name in _TESTS and not node.args and not node.kwargs:
            value = self.temporary_identifier()
            self.write(f"(W.lift({self.tests[node.name]}, {value}) if type({value} := ")
            self.visit(node.node, frame)
            self.write(f") is V else {_TESTS[node.name].format(value)})")
            return
        super().visit_Test(node, frame)

    def _settled(self, node: nodes.Node, frame: Frame) -> None:
        """An expression whose value is kept, and so must not be an iterator, which only one world could go through."""
        lazy = any(one.name in _LAZY for one in node.find_all(nodes.Filter)) \
            or (isinstance(node, nodes.Filter) and node.name in _LAZY)
        self.write("W.settled(" if lazy else "")
        self.visit(node, frame)
        self.write(")" if lazy else "")


def _leaves(node: nodes.Node) -> bool:
    """Whether it holds ``break`` or ``continue``."""
    return any(True for kind in (nodes.Break, nodes.Continue) for _ in node.find_all(kind))


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)
