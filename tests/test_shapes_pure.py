"""Macros of tools that are one step of a recording: which are, and that what they give is what they give alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError
from chatloss.sandbox import Bounds
from chatloss.shapes import pure, shapes
from chatloss.template import ChatTemplate
from chatloss.traced import World
from tests import assets, conformance
from tests.test_shapes import LOOP, at_once, chats_of, loaded, replayed, template_of
from tests.test_traced import answer, user

__all__ = ["at_once"]

SAID = LOOP + "{{ m.content }}{% endfor %}"
WALK = ("{% for k, v in t.parameters.properties.items() %}{{ k }}:{{ v.type }}"
        "{% if v.type == 'string' %}s{% endif %}{% endfor %}")
COUNTED = WALK.replace("{{ k }}", "{% set n.c = n.c + 1 %}{{ n.c }}")
CHOSEN = "{% set f = f if messages[0].content == 'b' else g %}"
CALL = "{% call f(t.function) %}{{ messages[0].content }}{% endcall %}"


def macro(body: str, parameters: str = "t", before: str = "") -> str:
    """A template that writes what a macro gives of every tool, and the messages."""
    made = f"{{% macro f({parameters}) %}}{body}{{% endmacro %}}"
    return before + made + "{% for t in tools or [] %}{{ f(t.function) }}{% endfor %}" + SAID


PURE = {
    "a walk": macro(WALK),
    "its own variables": macro("{% set x = t.name %}{% if x == 'a' %}{% set x = 'b' %}{% endif %}{{ x }}" + WALK),
    "of all branches": macro("{% if t.name == 'a' %}{% set x = 1 %}{% else %}{% set x = 2 %}{% endif %}{{ x }}"),
    "its own namespace": macro("{% set n = namespace(c=0) %}" + COUNTED),
    "a block": macro("{% set x %}{{ t.name }}{{ t|tojson }}{% endset %}{% if x == 'b' %}!{% endif %}{{ x }}"),
    "itself": macro("{{ t }}{% if n %}{{ f(t.name, n - 1) }}{{ range(n)|list }}{% endif %}", "t, n=2"),
    "another one": macro(
        "{{ g(t.name) }}" + WALK, before="{% macro g(x) %}<{{ x }}{% if x == 'b' %}!{% endif %}>{% endmacro %}"),
    "each other": macro("{{ g(t) }}{{ t.name }}").replace(
        "{% for t in tools", "\n{% macro g(t) %}{{ t or f(t) }}" + WALK + "{% endmacro %}{% for t in tools"),
    "a refusal": macro("{% if t.name == 'b' %}{{ raise_exception('no ' + t.name) }}{% endif %}" + WALK),
    "an error": macro("{{ 1 // t.name|length }}{{ t.parameters.properties.x.type }}"),
    "a loop that ends": macro(WALK.replace("{{ k }}", "{% if k == 'y' %}{% break %}{% endif %}{{ loop.index }}")),
    "all tools": "{% macro f(l) %}{% for t in l %}{{ loop.index }}{% set t = t.function %}" + WALK + "{% endfor %}"
                 "{{ l|tojson }}{% endmacro %}{{ f(tools) if tools }}{{ f(l=tools[1:]) }}" + SAID,
}
IMPURE = {
    "a message": macro("{{ messages[0].content }}" + WALK),
    "what is given": macro("{{ bos_token }}" + WALK),
    "a variable": macro("{{ x }}" + WALK, before="{% set x = messages[-1].content %}"),
    "a variable of some": macro(
        "{% if t.name == 'a' %}{% set x = 1 %}{% endif %}{{ x }}", before="{% set x = messages|length %}"),
    "a variable before it is set": macro("{{ x }}{% set x = 1 %}", before="{% set x = messages|length %}"),
    "a variable of a loop": macro(WALK.replace("{{ k }}", "{% set x = k %}") + "{{ x }}", before="{% set x = 1 %}"),
    "a default": macro(WALK + "{{ x }}", "t, x=messages|length"),
    "the prompt": macro("{% if add_generation_prompt %}!{% endif %}" + WALK),
    "a namespace": macro(COUNTED, before="{% set n = namespace(c=messages|length) %}"),
    "a namespace that it counts in": macro("{% set n.c = 1 %}" + WALK, before="{% set n = namespace(c=0) %}"),
    "an impure macro": macro("{{ g() }}" + WALK, before="{% macro g() %}{{ messages[0].content }}{% endmacro %}"),
    "a later macro": macro("{{ g() }}" + WALK) + "{% macro g() %}{% endmacro %}",
    "a macro after a call": macro("{{ g is defined }}" + WALK).replace(
        "{% for t in tools", "{{ f({}) }}{% macro g() %}{% endmacro %}{% for t in tools"),
    "a later impure macro": macro("{{ g() }}" + WALK).replace(
        "{% for t in tools", "{% macro g() %}{{ messages[0].content }}{% endmacro %}{% for t in tools"),
    "a macro of two": macro(WALK, before="{% if messages|length > 1 %}{% macro f(t) %}{% endmacro %}{% endif %}"),
    "another name for it": macro(WALK).replace("{% for t in tools", CHOSEN + "{% for t in tools"),
    "its caller": macro("{{ caller() }}" + WALK).replace("{{ f(t.function) }}", CALL),
    "a name of another thing": macro("{{ range(2) }}" + WALK, before="{% set range = messages[0].content.split %}"),
    "more arguments": macro("{{ varargs }}" + WALK),
    "a time": macro("{{ strftime_now('%Y') }}" + WALK),
    "a loop around": macro("{{ loop.index }}" + WALK),
}


@pytest.mark.parametrize("text", [*PURE.values(), *IMPURE.values()], ids=[*PURE, *IMPURE])
def test_macros_of_tools(text: str) -> None:
    sandbox = shapes.RecordingSandbox(lambda: conformance.CLOCK, Bounds())
    sandbox.load(text)
    assert ("f" in sandbox.pure) == (text in PURE.values())
    served = replayed(template_of(text), list(chats_of(random.Random(7))))
    assert served > 35 or text not in PURE.values()


def test_a_macro_that_is_not_pure_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail."""
    monkeypatch.setattr(pure, "_check", lambda *_: None)
    with pytest.raises((AssertionError, ChatlossError)):
        for text in IMPURE.values():
            replayed(template_of(text), list(chats_of(random.Random(7))))


INLINE = "{% for t in tools or [] %}{% set t = t.function %}" + WALK + "{% endfor %}" + SAID
LOOPS = {
    "a walk": INLINE,
    "a walk where tools are": "{% if tools %}{% set tools = tools[:1] %}" + INLINE + "{% endif %}",
    "a macro before": "{% macro g(x) %}{{ x.type or 'b' }}{% endmacro %}" + INLINE.replace("v.type }}", "g(v) }}"),
    "its own count": INLINE.replace("{% set t =", "{% set n = namespace(c=0) %}{% set n.c = n.c + 1 %}{% set t ="),
    "its end": INLINE.replace("{{ k }}", "{% if v.type == 'number' %}{% break %}{% endif %}"),
}
NO_LOOPS = {
    "a count": "{% set n = namespace(c=0) %}" + INLINE.replace("{{ k }}", "{% set n.c = n.c + 1 %}") + "{{ n.c }}",
    "a message": INLINE.replace("{{ k }}", "{{ messages[0].content }}"),
    "a variable": "{% set x = messages|length %}" + INLINE.replace("{{ k }}", "{{ x }}"),
    "a loop around": LOOP + INLINE.replace("{{ k }}", "{{ loop.index }}") + "{{ loop.index }}{% endfor %}",
    "its name": "{% macro tools_loop_0() %}{{ messages }}{% endmacro %}" + INLINE,
    "what is given": INLINE.replace("tools or []", "nothing or tools"),
    "a later macro": INLINE.replace("{{ k }}", "{{ g }}") + "{% macro g() %}{% endmacro %}",
}


@pytest.mark.parametrize("text", [*LOOPS.values(), *NO_LOOPS.values()], ids=[*LOOPS, *NO_LOOPS])
def test_loops_over_tools(text: str) -> None:
    sandbox = shapes.RecordingSandbox(lambda: conformance.CLOCK, Bounds())
    sandbox.load(text)
    assert ("tools_loop_0" in sandbox.pure) == (text in LOOPS.values())
    served = replayed(template_of(text), [*chats_of(random.Random(7)), ([user("hi")], None), ([user("b")], [])])
    assert served > 35 or text not in LOOPS.values()


@pytest.mark.parametrize("asked", ["tools|tojson", "tools[:1]|tojson(indent=2)", "tools|tojson|length"])
def test_all_tools_at_once(asked: str) -> None:
    assert replayed(template_of(f"{{{{ {asked} }}}}{SAID}"), list(chats_of(random.Random(7)))) > 35


def test_chance_is_not_recorded() -> None:
    """Nor whether two lists are one."""
    chats = [([user("hi")], [{"function": {"name": "f"}}])]
    for text in (macro("{{ [1, 2, t.name]|random }}"), macro("{{ [[t.name]]|map('random')|list }}"),
                 "{% macro f(a, b) %}{{ a is sameas b }}{% endmacro %}{{ f(tools, tools[:]) }}"):
        template = template_of(text)
        for messages, tools in chats * 2:
            assert template.render_all(messages, [World(1)], tools) is not None
        assert not template.traced["of a known shape"]


def test_a_macro_of_messages_is_recorded_whole() -> None:
    """Its texts stay pieces of their own."""
    template = template_of("{% macro f(t) %}<{{ t }}>{% endmacro %}" + LOOP + "{{ f(m.content) }}{% endfor %}")
    assert replayed(template, [([user("a"), answer("b")], [{"a": 1}])] * 2) == 2
    _, texts = template.recall([user("c"), answer("d")], [{"a": 1}]) or (None, ())
    assert {"c", "d"} < {*texts}


def test_a_conversation_may_have_a_variable_of_the_name_of_a_global() -> None:
    template = template_of(macro("{{ namespace }}" + WALK))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}
    for name in "xxyy":
        assert template.render_all([user("hi")], [World(1)], [tool], namespace=name) == [f"{name}hi"]


def test_a_macro_is_metered_where_it_is_replayed() -> None:
    template = ChatTemplate(macro("{{ t.name.replace('a', t.name) }}"), bounds=Bounds(value=10_000))
    for name, served in (("ab", True), ("b" * 100, True), ("a" * 5000, False), ("b", True)):
        (one,) = template.render_all([user("hi")], [World(1)], [{"type": "function", "function": {"name": name}}])
        assert isinstance(one, str) == served


KEYS = "type items properties enum oneOf default description required nullable".split()
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.text(max_size=5), st.sampled_from(["string", "array"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ), max_leaves=20,
)


@settings(max_examples=80, deadline=None)
@given(properties=st.dictionaries(st.sampled_from(["a", "b", "type"]), JSON, max_size=3), more=JSON)
def test_any_tools_are_rendered_as_alone(properties: Any, more: Any) -> None:
    parameters = {"type": "object", "properties": properties, "required": more}
    tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
    replayed(loaded("gpt-oss"), [([user("hi"), answer("yo")], [tool])])


def test_chats_of_other_schemas_are_of_one_shape() -> None:
    template = ChatEncoder.load(assets.tokenizer_dir("gpt-oss"), clock=lambda: conformance.CLOCK).template
    chance = random.Random(5)

    def schema(depth: int) -> dict[str, Any]:
        kind = chance.choice(["string", "number", "array", "object"][: 4 if depth else 2])
        more: dict[str, Any] = chance.choice([{"description": "d"}, {"nullable": True}, {}])
        if kind in ("array", "object"):
            inner = schema(depth - 1)
            return {"type": kind, **more, **({"items": inner} if kind == "array" else {"properties": {"k": inner}})}
        return {"type": kind, **more}

    for _ in range(30):
        parameters = {"type": "object", "properties": {name: schema(3) for name in "abcdef"[: chance.randint(1, 6)]}}
        tool = {"type": "function", "function": {"name": "f", "description": "d", "parameters": parameters}}
        replayed(template, [([user("hi"), answer("yo")], [tool])])
    assert template.traced["of a known shape"] == 30


def test_refusals_are_compared_where_a_recording_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    text = LOOP + "{{ m.content + 'x' }}{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}{% endfor %}"
    template, rendered = template_of(text), 0
    whole = ChatTemplate.render

    def render(self: ChatTemplate, *args: Any, **kwargs: Any) -> str:
        nonlocal rendered
        rendered += 1
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", render)
    for k in range(5):
        made = template.render_all([user(f"a{k}"), user("b")], [World(1), World(2)])
        assert made[0] == f"a{k}x" and "no b" in str(made[1])
        assert rendered == 2
    assert template.traced["of a known shape"] == 5


def test_a_recording_that_refuses_what_the_template_renders_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    template = template_of(LOOP + "{{ m.content }}{% endfor %}")

    def render(self: shapes.Shapes, *args: Any) -> list[Exception]:
        self.fresh = True
        return [ValueError("no")]

    monkeypatch.setattr(shapes.Shapes, "render", render)
    assert template.render_all([user("a")], [World(1)]) == [None]
    assert template.render_all([user("a")], [World(1)]) == ["a"]
