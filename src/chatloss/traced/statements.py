"""jinja's compiler, taught to write code that computes with the values of many renderings at once (`worlds`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jinja2 import nodes
from jinja2.compiler import Frame, MacroRef

from chatloss.sandbox import EACH, SEARCHED, WEIGHED
from chatloss.traced.expressions import Expressions, Unsupported

__all__ = ["Generator"]

_MOST_BRANCHES = 32
_MOST_CODE = 1_500_000


class Generator(Expressions):
    """Writes statements for values that vary: branches for the worlds that take them, assignments for those that run.

    Raises `Unsupported` for what it does not know how to write.
    """

    def write(self, x: str) -> None:
        # Nested operators are written twice: a hostile template could fill the memory so.
        self._written += len(x)
        if self._written > _MOST_CODE:
            raise Unsupported("its code is too long")
        super().write(x)

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
        self.writeline("LIGHT, SHORT = environment.light, environment.short")
        self.writeline("tick = environment.meter.tick")
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
    def _scope(self) -> Iterator[None]:
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
        self.writeline(f"for {branch} in (W.branches({test}, {bool(node.elif_)}) if type({test} := ", node)
        bodies = [node.body, *(one.body for one in node.elif_)]
        if len(bodies) > _MOST_BRANCHES:
            raise Unsupported("a chain of elif")
        if node.elif_:
            self._choice([one.test for one in (node, *node.elif_)], 0, soft)
        else:
            self.visit(node.test, soft)
        self.write(f") {self.varies} else ({test},)):")
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
        elif any(map(_raises, [*bodies, node.else_])):
            self.writeline("W.somebody()")

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
        if _raises(body):
            self._risk(body, frame)
        else:
            self.blockvisit(body, frame)

    def _risk(self, body: list[nodes.Node], frame: Frame) -> None:
        """Code that may raise something, which ends none but the worlds that run it."""
        mark, error = self.temporary_identifier(), self.temporary_identifier()
        self.writeline(f"{mark} = W.mark()")
        self.writeline("try:")
        self.indent()
        self.blockvisit(body, frame)
        self.outdent()
        self.writeline(f"except Exception as {error}:")
        self.indent()
        self.writeline(f"W.die({mark}, {error})")
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
        assert isinstance(node.iter, nodes.Filter) and node.iter.name == EACH
        cost = cast(nodes.Const, node.iter.args[0]).value
        chosen = ""
        if node.test:
            chosen = self._loop_filter(node, loop_frame, test_frame, cost)
        if loop:
            self.writeline(f"{loop} = missing")
        self.writeline("for ", node)
        # A varied item of several parts is unpacked part by part.
        item = self.temporary_identifier() if isinstance(node.target, nodes.Tuple) else ""
        if item:
            self.write(item)
        else:
            self.visit(node.target, loop_frame)
        leaving = _leaves(node) or not self._loops  # in the outermost loop worlds may die
        self.write(f"{f', {loop}' if loop else ''} in W.loop(")
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

    def _loop_filter(self, node: nodes.For, loop_frame: Frame, test_frame: Frame, cost: int) -> str:
        """The function that chooses the items of ``for x in y if z``, as a list.

        jinja chooses each item when its turn comes, so the test may depend on nothing that the body can change: what a
        namespace holds, or what a macro does. A variable of its own cannot, for the body's are others.
        """
        assert node.test is not None
        changing = self._assigned - {name.name for name in _names(node.target)}
        if any(name.name in changing for part in _opaque(node.test) for name in _names(part)):
            raise Unsupported("a loop chooses its items by what may change")
        name = self.temporary_identifier()
        test_frame.symbols.analyze_node(node, for_branch="test")
        self.writeline(f"def {name}(values):", node.test)
        self.indent()
        self.writeline("found = []")
        self.enter_frame(test_frame)
        self.writeline("for ")
        self.visit(node.target, loop_frame)
        self.write(f" in W.loop(values, {cost}, False, False):")
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
                self.writeline(f"{ref} = {value} if W.mask == {scope} else W.put({ref}, {value}, {scope})")
            else:
                self.writeline(f"{ref} = {value}")

    def _unpack(self, target: nodes.Tuple, value: str, frame: Frame) -> None:
        parts = [self.temporary_identifier() for _ in target.items]
        unpacked = f"W.unpacked({value}, {len(parts)}) if type({value}) {self.varies} else {value}"
        self.writeline(f"{', '.join(parts)}, = {unpacked}")
        for part, item in zip(parts, target.items, strict=True):
            self._store(item, part, frame)


def _raises(body: list[nodes.Node]) -> bool:
    """Whether a branch itself says that it raises."""
    return any(
        isinstance(call.node, nodes.Name) and call.node.name == "raise_exception"
        for statement in body if isinstance(statement, nodes.Output | nodes.ExprStmt)
        for call in statement.find_all(nodes.Call)
    )


def _leaves(node: nodes.Node) -> bool:
    """Whether it holds ``break`` or ``continue``."""
    return any(True for kind in (nodes.Break, nodes.Continue) for _ in node.find_all(kind))


def _opaque(node: nodes.Node) -> Iterator[nodes.Node]:
    """The parts of a test that do more than compare values."""
    counted = isinstance(node, nodes.Filter) and node.name in (WEIGHED, SEARCHED)
    plain = (nodes.Name, nodes.Const, nodes.Compare, nodes.Operand, nodes.And, nodes.Or, nodes.Not)
    if counted or isinstance(node, plain):
        for part in node.iter_child_nodes():
            yield from _opaque(part)
    else:
        yield node


def _names(node: nodes.Node) -> Iterator[nodes.Name]:
    if isinstance(node, nodes.Name):
        yield node
    yield from node.find_all(nodes.Name)
