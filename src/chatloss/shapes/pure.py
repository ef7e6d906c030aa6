"""Macros that are functions of their arguments: whatever they are given, a recording may call them as one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from jinja2 import Template, nodes

from chatloss.sandbox import Sandbox

__all__ = ["GLOBALS", "pure_macros"]

# What a macro may name beside its own: these give the same every time, as long as a conversation has no such variable.
GLOBALS = frozenset(("dict", "namespace", "raise_exception", "range"))


def pure_macros(sandbox: Sandbox, text: str) -> dict[str, Callable[..., Any]]:
    """The macros of a template, by name, that read nothing but their arguments; they run in `sandbox`.

    A macro of such a name is always the one macro: it stands at the top, and nothing else is ever assigned to the name.
    The pure macros that it calls are defined before it, hence whenever it is. So a template of these macros alone has
    the same ones.
    """
    tree = sandbox._parse(text, None, None)
    assigned = Counter(name.name for name in tree.find_all(nodes.Name) if name.ctx != "load")
    assigned.update(macro.name for macro in tree.find_all(nodes.Macro))
    known = {name for name in GLOBALS if name not in assigned}
    found: list[nodes.Macro] = []
    for node in tree.body:
        if isinstance(node, nodes.Macro) and assigned[node.name] == 1:
            try:
                _check_macro(node, known | {node.name})
            except _Impure:
                continue
            found.append(node)
            known.add(node.name)
    if not found:
        return {}
    alone = nodes.Template(found, lineno=1)
    alone.set_environment(sandbox)
    template = Template.from_code(sandbox, sandbox.compile(alone), sandbox.make_globals(None))
    context = template.new_context()
    for _ in template.root_render_func(context):
        pass
    return {node.name: partial(sandbox.call, context, context.vars[node.name]) for node in found}


class _Impure(Exception):
    """Something that may depend on more than the arguments, or change more than what is the macro's own."""


def _check_macro(node: nodes.Macro, known: set[str]) -> None:
    for value in node.defaults:
        _check(value, known)
    _run(node.body, known | {name.name for name in node.args})


def _run(body: Iterable[nodes.Node], own: set[str]) -> set[str]:
    """`own`, the names that surely are the macro's, after `body` too; raises `_Impure` for anything else."""
    for node in body:
        if isinstance(node, nodes.Output | nodes.ExprStmt):
            _check(node, own)
        elif isinstance(node, nodes.Assign):
            _check(node.node, own)
            _check(node.target, own)  # a namespace that it assigns is its own
            own |= _targets(node.target)
        elif isinstance(node, nodes.AssignBlock):
            _run(node.body, set(own))
            if node.filter is not None:
                _check(node.filter, own)
            _check(node.target, own)
            own |= _targets(node.target)
        elif isinstance(node, nodes.If):
            _check(node.test, own)
            for one in node.elif_:
                _check(one.test, own)
            bodies = node.body, *(one.body for one in node.elif_), node.else_
            own |= set.intersection(*(_run(one, set(own)) for one in bodies))
        elif isinstance(node, nodes.For) and not node.recursive and not node.else_:
            _check(node.iter, own)
            inside = own | _targets(node.target)
            if node.test is not None:
                _check(node.test, inside - {"loop"})
            _run(node.body, inside | {"loop"})
        elif not isinstance(node, nodes.Break | nodes.Continue):
            raise _Impure
    return own


def _check(value: nodes.Node, own: set[str]) -> None:
    for node in (value, *value.find_all(nodes.Node)):
        reads = isinstance(node, nodes.Name | nodes.NSRef) and getattr(node, "ctx", "load") == "load"
        if reads and node.name not in own:  # type: ignore[attr-defined]
            raise _Impure


def _targets(target: nodes.Node) -> set[str]:
    names = {target.name} if isinstance(target, nodes.Name) else set()
    return names | {name.name for name in target.find_all(nodes.Name)}
