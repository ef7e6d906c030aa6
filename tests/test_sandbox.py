"""A hostile template ends in a TemplateError, in bounded time and memory, and reaches nothing outside the sandbox."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from datetime import datetime

import pytest

from chatloss.errors import TemplateError
from chatloss.sandbox import Bounds
from chatloss.template import ChatTemplate

SECONDS = 60
MEMORY = 4 << 30
# Prints how the rendering of the template on stdin ended. The child limits itself before it renders.
CHILD = f"""
import sys
from chatloss.errors import TemplateError
from chatloss.sandbox import Bounds
from chatloss.template import ChatTemplate
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except ImportError:
    pass
messages = [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": "ho"}}]
try:
    template = ChatTemplate(sys.stdin.read(), bounds=Bounds(ticks=int(sys.argv[1])))
    text = template.render(messages, [{{"name": "f"}}])
    print("rendered", len(text), text[:200])
except TemplateError as error:
    print(error.kind, error.what)
"""


def outcome(template: str, ticks: int = Bounds().ticks // 5) -> str:
    """What became of a template in a process of its own, at most SECONDS and MEMORY later."""
    child = [sys.executable, "-c", CHILD, str(ticks)]
    done = subprocess.run(child, input=template, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def grown(step: str, then: str, times: int = 80) -> str:
    """A template that doubles something in a namespace many times over, and then uses it."""
    return f"{{% set ns = namespace(a=['x'], b=['x'], s='x', m={{'k': 1}}) %}}{{% for i in range({times}) %}}{step}{{% endfor %}}{then}"


LISTS = "{% set ns.a = [ns.a, ns.a] %}"
TUPLES = "{% set ns.a = (ns.a, ns.a) %}{% set ns.b = (ns.b, ns.b) %}"
TWINS = "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}{% endfor %}{% endfor %}"
BIG = "{% set big = 'x' * 10000000 %}"


def often(step: str) -> str:
    """A template that takes a step 10 ** 15 times."""
    return f"{LOOPS}{step}{ENDS}"


EXHAUSTING = {
    "nested loops": often("x"),
    "nested loops that write nothing": often(""),
    "loops over filtered items": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "loops with much constant text": f"{{% for a in range(99999) %}}{'y' * 100_000}{{% endfor %}}",
    "loops with many statements": often("{% set x = 1 %}" * 3000),
    "a loop over a string": grown(
        "{% set ns.s = ns.s ~ ns.s %}", "{% for c in ns.s %}{% for d in ns.s %}{% endfor %}{% endfor %}", 20
    ),
    "recursive loops": "{% for x in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "macros that call themselves": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "macros that call themselves twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "call blocks that call themselves twice": "{% macro f(n) %}{% if n %}{% call f(n - 1) %}{% endcall %}{% call f(n - 1) %}"
    "{% endcall %}{% endif %}{% endmacro %}{{ f(60) }}",
    "concatenation": grown("{% set ns.s = ns.s ~ ns.s %}", "{{ ns.s }}"),
    "addition": grown("{% set ns.s = ns.s + ns.s %}", "{{ ns.s }}"),
    "addition of lists": grown("{% set ns.a = ns.a + ns.a %}", "{{ ns.a | length }}"),
    "set blocks": grown("{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}", "{{ ns.s }}"),
    "set blocks of constant text": grown(
        "{% set ns.s %}{{ ns.s }}" + "z" * 1000 + "{{ ns.s }}{% endset %}", "{{ ns.s }}"
    ),
    "generation blocks": grown(
        "{% set ns.s %}{% generation %}{{ ns.s }}{{ ns.s }}{% endgeneration %}{% endset %}", "{{ ns.s }}"
    ),
    "joining": grown("{% set ns.s = [ns.s, ns.s] | join %}", "{{ ns.s }}"),
    "joining by method": grown("{% set ns.s = ns.s.join(['', ns.s, '']) %}", "{{ ns.s }}"),
    "replacing": grown("{% set ns.s = ns.s | replace('x', 'xx') %}", "{{ ns.s }}"),
    "replacing by method": grown("{% set ns.s = ns.s.replace('x', 'xx') %}", "{{ ns.s }}"),
    "replacing with much": BIG + "{{ big | replace('x', new=big) }}",
    "replacing nothing with much": BIG + "{{ big.replace('', big) }}",
    "translating": BIG + "{{ big.translate({120: big}) }}",
    "formatting": grown("{% set ns.s = '%s%s' | format(ns.s, ns.s) %}", "{{ ns.s }}"),
    "formatting by operator": grown("{% set ns.s = '%s%s' % (ns.s, ns.s) %}", "{{ ns.s }}"),
    "formatting by name": BIG + "{{ ('%(a)s' * 100000) % {'a': big} }}",
    "formatting by method": grown("{% set ns.s = '{0}{0}'.format(ns.s) %}", "{{ ns.s }}"),
    "formatting by method, often": BIG + "{{ ('{0}' * 100000).format(big) }}",
    "much kept in a list": BIG
    + "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = ns.a + [big ~ i] %}{% endfor %}",
    "a list that holds itself often": grown(LISTS, "{{ ns.a }}"),
    "a list that holds itself often, as JSON": grown(LISTS, "{{ ns.a | tojson }}"),
    "a list that holds itself often, as a string": grown(LISTS, "{{ ns.a | string | length }}"),
    "a list that holds itself often, concatenated": grown(LISTS, "{{ 'a' ~ ns.a }}"),
    "a list that holds itself often, printed": grown(LISTS, "{{ ns.a | pprint }}"),
    "a list that holds itself often, formatted": grown(LISTS, "{{ '%s' % (ns.a,) }}{{ '%s' | format(ns.a) }}"),
    "a list that holds itself often, converted": grown(LISTS, "{{ '{!r}'.format(ns.a) }}"),
    "a list that holds itself often, joined": grown(LISTS, "{{ ns.a | join }}"),
    "a list that holds itself often, in a mapping": grown("{% set ns.m = {'a': ns.m, 'b': ns.m} %}", "{{ ns.m }}"),
    "a namespace that holds itself often": grown("{% set ns.a = namespace(a=ns.a, b=ns.a) %}", "{{ ns.a }}"),
    "lists compared": grown(TWINS, "{{ ns.a == ns.b }}"),
    "lists ordered": grown(TWINS, "{{ ns.a < ns.b }}"),
    "a list sought in a list": grown(TWINS, "{{ ns.a in [1, ns.b] }}"),
    "a list sought by a test": grown(TWINS, "{{ ns.a is in [1, ns.b] }}"),
    "lists compared by a test": grown(TWINS, "{{ ns.a is eq ns.b }}"),
    "lists compared by a filter": grown(TWINS, "{{ [ns.a] | select('eq', ns.b) | list }}"),
    "lists sorted": grown(TWINS, "{{ [ns.a, ns.b] | sort | length }}"),
    "the greatest of lists": grown(TWINS, "{{ [ns.a, ns.b] | max | length }}"),
    "a list counted": grown(TWINS, "{{ [ns.a].count(ns.b) }}"),
    "a list found": grown(TWINS, "{{ [ns.a].index(ns.b) }}"),
    "tuples as keys": grown(TUPLES, "{{ {ns.a: 1}[ns.b] }}"),
    "tuples made unique": grown(TUPLES, "{{ [ns.a, ns.b] | unique | list | length }}"),
    "tuples looked up": grown(TUPLES, "{{ ns.m.get(ns.a) }}"),
    "tuples as the attribute of a map": grown(TUPLES, "{{ [{}] | map(attribute=ns.a) | list }}"),
    "tuples as the attribute of a map with a default": grown(TUPLES, "{{ [{}] | map(attribute=ns.a, default=1) | list }}"),
    "tuples as the attribute of a selection": grown(TUPLES, "{{ [{}] | selectattr(ns.a) | list }}"),
    "tuples as the attribute of a rejection": grown(TUPLES, "{{ [{}] | rejectattr(ns.a) | list }}"),
    "tuples as the attribute of an order": grown(TUPLES, "{{ [{}, {}] | sort(attribute=ns.a) | list }}"),
    "tuples looked up by subscript": grown(TUPLES, "{{ ns.m[ns.a] }}"),
    "tuples looked up among keys": grown(TUPLES, "{{ ns.a in ns.m }}"),
    "a view of a mapping that holds itself often": grown(
        "{% set ns.m = {'a': ns.m, 'b': ns.m} %}", "{{ ns.m.items() }}"
    ),
    "a format by a test": "{{ '%1000000000d' is odd }}{{ '%1000000000d' is divisibleby(2) }}",
    "a list tested for case": grown(LISTS, "{{ ns.a is lower }}"),
    "lists by filters": grown("{% set ns.a = ['', ''] | map('default', ns.a, true) | list %}", "{{ ns.a }}"),
    "lists by fromkeys": grown("{% set ns.m = dict.fromkeys(['a', 'b'], ns.m) %}", "{{ ns.m }}"),
    "a repeated string": "{{ 'a' * 10 ** 9 }}",
    "a repeated string, in parts": "{{ (('a' * 10 ** 5) * 10 ** 5) | length }}",
    "a string repeated from the left": "{{ 10 ** 9 * 'a' }}",
    "a repeated list": "{{ ([0] * 10 ** 9) | length }}",
    "a repeated tuple": "{{ ((0,) * 10 ** 9) | length }}",
    "repeated bytes": "{{ ('a'.encode() * 10 ** 10) | length }}",
    "wide bytes": "{{ 'a'.encode().ljust(10 ** 10) | length }}",
    "bytes of a number": "{{ (1).to_bytes(10 ** 10, 'big') | length }}",
    "a string repeated by true and big": "{{ ('a' * 10 ** 8) * 10 ** 8 }}",
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a wide % from an argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "a precise %": "{{ '%.1000000000f' % 1 }}",
    "a wide format filter": "{{ '%1000000000d' | format(1) }}{{ '%*d' | format(10 ** 9, 1) }}",
    "a wide format filter on every item": "{{ ['%1000000000d'] | map('format', 1) | list | length }}",
    "a wide format": "{{ '{:>1000000000}'.format(1) }}",
    "a wide format of a mapping": "{{ '{a:>1000000000}'.format_map({'a': 1}) }}",
    "a wide format from an argument": "{{ '{0:>{1}}'.format('a', 10 ** 9) }}",
    "a wide format from a named argument": "{{ '{0:>{w}}'.format('a', w=10 ** 9) }}",
    "a wide format of a safe string": "{{ ('{:>1000000000}' | safe).format(1) }}",
    "ljust": "{{ 'a'.ljust(10 ** 9) }}",
    "rjust": "{{ 'a'.rjust(10 ** 9) }}",
    "center": "{{ 'a'.center(10 ** 9) }}",
    "zfill": "{{ 'a'.zfill(10 ** 9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10 ** 9) }}",
    "many tabs": "{{ ('\t' * 10 ** 7).expandtabs(10000) | length }}",
    "the center filter": "{{ 'a' | center(10 ** 9) }}",
    "the indent filter": "{{ ('a\n' * 10000) | indent(10 ** 9) }}",
    "the indent filter with much": BIG + "{{ ('a\n' * 10000) | indent(big) }}",
    "the tojson filter's indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "a large power": "{{ 2 ** (10 ** 9) }}",
    "powers of powers": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n ** 60 %}{% endfor %}",
    "products of products": "{% set ns = namespace(n=9) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "a large range": "{% for i in range(10 ** 12) %}{% endfor %}",
    "a large range as a list": "{% for i in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "a sought item of a large range": "{% for i in range(99999) %}{{ 1.5 in range(99999) }}{% endfor %}",
    "many prefixes compared": "{% set many = ('x',) * 1000000 %}" + often("{{ 'abc'.startswith(many) }}"),
    "many letters stripped": BIG + often("{{ 'abc'.strip(big) }}"),
    "much searched": BIG + often("{{ 'y' in big }}"),
    "much compared": BIG + "{% set twin = 'x' * 10000000 %}" + often("{{ big == twin }}"),
    "much copied": BIG + often("{{ big[1:] | length }}"),
    "much lowered": BIG + often("{{ big.lower() | length }}{{ (big | upper) | length }}"),
    "much split": BIG + often("{{ big.split('x') | length }}"),
    "much listed": BIG + often("{{ big | list | length }}"),
    "much wrapped": BIG + "{{ big | wordwrap | length }}",
    "much stripped of tags": "{{ ('<!---->' * 1000000) | striptags }}",
    "a batch with a wide fill": "{{ [1] | batch(10 ** 9, 'x') | list | length }}",
    "many slices": "{{ [1] | slice(10 ** 9) | list | length }}",
    "a round beyond all digits": "{{ 1.5 | round(10 ** 9, 'floor') }}",
    "a sum of lists": "{{ ([[1] * 1000] * 100000) | sum(start=[]) | length }}",
    "lipsum": "{{ lipsum(10 ** 9) | length }}",
    "lipsum with long paragraphs": "{{ lipsum(1, true, 10 ** 8, 10 ** 9) | length }}",
    "lipsum by name": "{{ lipsum(n=10 ** 9, max=10 ** 9) | length }}",
    "a wide date": "{{ strftime_now('%1000000000d') | length }}",
    "dates": "{% for i in range(99999) %}{% set x = strftime_now('%Y' * 100000) %}{% endfor %}",
    "deep nesting of lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "deep nesting of brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "deep nesting of blocks": "{% if true %}" * 20_000 + "{% endif %}" * 20_000,
    "deep nesting of loops": "{% for x in [1] %}" * 200 + "{% endfor %}" * 200,
    "a long chain of operators": "{{ 1" + " + 1" * 50_000 + " }}",
    "a long chain of filters": "{{ 1" + " | string" * 50_000 + " }}",
    "a long chain of attributes": "{{ messages" + ".a" * 50_000 + " }}",
    "a constant that is large": "{{ 'a' * 100 * 100 * 100 * 100 * 100 * 100 }}",
    "a constant power": "{{ 9 ** (9 ** 9) }}",
    "constant filters": "{{ 'a' | center(1000000000) | center(1000000000) }}",
}
ESCAPES = {
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "from import": "{% from '/etc/passwd' import x %}{{ x }}",
    "extends": "{% extends '/etc/passwd' %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "classes by subscript": "{{ ''['__class__']['__mro__'][1] }}",
    "classes by filter": "{{ (('' | attr('__class__')) | attr('__mro__'))[1] }}",
    "classes by format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "classes by format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': ''}) }}",
    "classes by a mapped filter": "{{ (messages | map(attribute='__class__') | list)[0].mro() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of the clock": "{{ strftime_now.__globals__['sys'] }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "globals of a cycler": "{{ cycler.__init__.__globals__.os }}",
    "globals of a joiner": "{{ joiner.__init__.__globals__ }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "globals of lipsum": "{{ lipsum.__globals__ }}",
    "globals of dict": "{{ dict.__call__.__globals__ }}",
    "the context": "{{ self._TemplateReference__context }}",
    "underscore names of a namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a generator's frame": "{{ (messages | map('length')).gi_frame.f_globals }}",
    "a list changed": "{{ messages.append({}) }}",
    "a list cleared": "{{ messages.clear() }}",
    "a mapping changed": "{{ messages[0].update({'role': 'x'}) }}",
    "a mapping popped": "{{ messages[0].pop('role') }}",
    "a mapping set": "{{ messages[0].setdefault('x', 1) }}",
    "a tool changed": "{{ tools.append(1) }}{{ tools[0].update(a=1) }}",
}


@pytest.mark.parametrize("template", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_a_template_that_exhausts_time_or_memory_is_stopped(template: str) -> None:
    assert outcome(template).split(" ")[0] in ("bounds", "syntax", "refused")


@pytest.mark.slow
@pytest.mark.parametrize("template", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_such_a_template_is_stopped_by_the_default_bounds_too(template: str) -> None:
    assert outcome(template, Bounds().ticks).split(" ")[0] in ("bounds", "syntax", "refused")


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES.keys())
def test_a_template_reaches_nothing_outside_the_sandbox(template: str) -> None:
    try:
        assert ChatTemplate(template).render([{"role": "user", "content": "hi"}], [{"name": "f"}]) == ""
    except TemplateError:
        pass


def test_what_a_render_uses_is_not_charged_to_the_next() -> None:
    template = ChatTemplate(
        "{% for i in range(90) %}x{% endfor %}", bounds=Bounds(ticks=300, output=200, built=10_000, value=100)
    )
    assert {template.render([{"role": "user", "content": "hi"}]) for _ in range(20)} == {"x" * 90}


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(2000) %}{% endfor %}",
        "{% for i in range(90) %}{{ 'y' * 20 }}{% endfor %}",
        "{{ 'y' * 2000 }}",
        "{{ 'y'.ljust(200) }}",
    ],
)
def test_the_bounds_are_those_given(template: str) -> None:
    with pytest.raises(TemplateError, match=r"more than|wider than") as caught:
        ChatTemplate(template, bounds=Bounds(ticks=1000, output=1000, value=1000, width=100)).render([])
    assert caught.value.kind == "bounds"


def test_a_long_conversation_stays_far_within_the_bounds() -> None:
    template = textwrap.dedent("""
        {%- macro part(text) -%}{{ text | trim }}{%- endmacro -%}
        {%- set ns = namespace(text='', last=-1) -%}
        {%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
        {%- for m in messages -%}
        {%- set ns.text = ns.text ~ m.role ~ ': ' ~ part(m.content.split('</think>')[-1].lstrip('\\n')) ~ '\\n' -%}
        {{ m | tojson if loop.index0 == ns.last }}
        {%- endfor -%}
        {{ ns.text }}""")
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " + "word " * 200} for i in range(1000)]
    assert len(ChatTemplate(template, {}, datetime.now).render(messages)) > 1_000_000
