"""Macros that are functions of their arguments: whatever they are given, a recording may call them as one step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from typing import Any

from jinja2 import Template, nodes

from chatloss.kept import Kept, exact
from chatloss.meter import Meter
from chatloss.sandbox import Sandbox

__all__ = ["GLOBALS", "OfTools", "outlined", "pure_macros"]

# What a macro may name beside its own: these give the same every time, as long as a conversation has no such variable.
GLOBALS = frozenset(("dict", "namespace", "raise_exception", "range"))
_LOOP = "tools_loop_"
_MOST_MACROS = 64  # each may be looked at once for each of them


def pure_macros(sandbox: Sandbox, text: str) -> dict[str, Callable[..., Any]]:
    """The macros of a template, by name, that read nothing but their arguments; they run in `sandbox`.

    A macro of such a name is always the one macro: it stands at the top, and nothing else is ever assigned to the name.
    The pure macros that it calls are defined before anybody can call it: they stand before it, or after it with nothing
    but macros in between. So a template of these macros alone has the same ones.
    """
    found, _ = _pure_in(outlined(sandbox._parse(text, None, None)))
    if not found:
        return {}
    alone = nodes.Template([*found], lineno=1)
    alone.set_environment(sandbox)
    template = Template.from_code(sandbox, sandbox.compile(alone), sandbox.make_globals(None))
    context = template.new_context()
    for _ in template.root_render_func(context):
        pass
    return {node.name: partial(sandbox.call, context, context.vars[node.name]) for node in found}


class OfTools:
    """A function of tools and scalars alone. Chats come with the same tools again and again."""

    def __init__(self, name: Any, function: Callable[..., str], meter: Meter, kept: Kept) -> None:
        self._name, self._function, self._meter, self._kept = name, function, meter, kept

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        of = exact((self._name, args, kwargs))
        if of is None:
            return self._function(*args, **kwargs)
        self._meter.tick(len(of) >> 4)
        found = self._kept.texts.get(of)
        if found is None:
            return self._kept.keep(of, self._function(*args, **kwargs))
        self._meter.spend(found)
        return found


def outlined(tree: nodes.Template) -> nodes.Template:
    """`tree`, its loops over tools turned into macros of `tools` where they read nothing else and ask something.

    What a loop assigns nobody sees, and what it writes is written by the call, so that the text stays the same.
    """
    names = {name.name for name in tree.find_all(nodes.Name)} | {macro.name for macro in tree.find_all(nodes.Macro)}
    if any(name.startswith(_LOOP) for name in names):
        return tree
    found, known = _pure_in(tree)
    made: list[nodes.Macro] = []
    body: list[nodes.Node] = []
    for node in tree.body:
        if any(node is one for one in found):
            known.add(node.name)  # type: ignore[attr-defined]
        before, statements = len(made), _outline([node], known, made)
        body += [*made[before:], *statements]
    tree.body = body
    return tree


def _outline(body: list[nodes.Node], known: set[str], made: list[nodes.Macro]) -> list[nodes.Node]:
    """The statements of `body`, calls in place of the loops that are `made` macros."""
    for i, node in enumerate(body):
        if isinstance(node, nodes.If):
            for one in (node, *node.elif_):
                one.body = _outline(one.body, known, made)
            node.else_ = _outline(node.else_, known, made)
        elif isinstance(node, nodes.For) and any(name.name == "tools" for name in node.iter.find_all(nodes.Name)):
            macro = nodes.Macro(f"{_LOOP}{len(made)}", [nodes.Name("tools", "param")], [], [node], lineno=node.lineno)
            asks = any(node.find(kind) is not None for kind in (nodes.If, nodes.For, nodes.CondExpr))
            if asks and _is_pure(macro, known):
                made.append(macro)
                called, given = nodes.Name(macro.name, "load"), nodes.Name("tools", "load")
                call = nodes.Call(called, [given], [], None, None, lineno=node.lineno)
                body[i] = nodes.Output([call], lineno=node.lineno)
    return body


def _pure_in(tree: nodes.Template) -> tuple[list[nodes.Macro], set[str]]:
    """The macros that are pure, and the globals that they may name."""
    assigned = Counter(name.name for name in tree.find_all(nodes.Name) if name.ctx != "load")
    assigned.update(macro.name for macro in tree.find_all(nodes.Macro))
    constant = {name for name in GLOBALS if name not in assigned}
    known = set(constant)
    found: list[nodes.Macro] = []
    if sum(isinstance(node, nodes.Macro) for node in tree.body) > _MOST_MACROS:
        return found, constant
    statements = [node for node in tree.body if not _is_text(node)]
    for are_macros, group in groupby(statements, lambda node: isinstance(node, nodes.Macro)):
        macros = {node.name: node for node in group if isinstance(node, nodes.Macro) and assigned[node.name] == 1}
        while are_macros and (impure := [one for one in macros if not _is_pure(macros[one], known | macros.keys())]):
            for name in impure:
                del macros[name]
        known |= macros.keys()
        found += macros.values()
    return found, constant


class _Impure(Exception):
    """Something that may depend on more than the arguments, or change more than what is the macro's own."""


def _is_text(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Output) and all(isinstance(one, nodes.TemplateData) for one in node.nodes)


def _is_pure(node: nodes.Macro, known: set[str]) -> bool:
    """Whether it reads nothing but its arguments and what is `known` to be the same always."""
    try:
        for value in node.defaults:
            _check(value, known)
        _run(node.body, known | {name.name for name in node.args})
    except _Impure:
        return False
    return True


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
