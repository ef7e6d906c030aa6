"""All renderings in one pass are, character for character, the renderings one by one."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, TemplateError
from chatloss.sandbox import Bounds
from chatloss.template import ChatTemplate
from chatloss.traced import World
from chatloss.traced.loop import Backwards, Loop
from chatloss.traced.varied import Varied
from chatloss.traced.worlds import Worlds
from tests import assets, conformance
from tests.test_sandbox import ESCAPES, EXHAUSTING

Chat = tuple[list[dict[str, Any]], list[dict[str, Any]] | None]

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "call00001", "name": "lookup", "content": text}


CALL = conformance.SHAPES["tools"][0][1]
MIXED: Chat = (
    [{"role": "system", "content": " Sys "}, user("a"), answer("<think>\nhm\n</think>\n\nb"),
     user("<tool_response>\nq"), CALL, result("r1"), result("r2"), answer("ok", reasoning_content="why"),
     user(" end "), answer("")],
    [conformance.LOOKUP],
)
PARTS: Chat = (
    [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in
     (("user", "hello"), ("assistant", "hi there"), ("user", "bye"))], None,
)
SHAPES: dict[str, Chat] = {**conformance.SHAPES, "mixed": MIXED, "parts": PARTS}


def agent(size: int) -> Chat:
    """A chat of `size` messages in which one user's task takes many calls, and a few answers are in between."""
    messages = [{"role": "system", "content": "Work step by step."}, user("Find all words.")]
    while len(messages) < size:
        k = len(messages)
        more = [answer(f"So far {k} words.", reasoning_content=f"Now {k}."), user("Go on.")]
        messages += more if k % 18 == 0 else [CALL, result(f"Word number {k}.")]
    return messages[:size], [conformance.LOOKUP]


def worlds_of(messages: Sequence[dict[str, Any]]) -> list[World]:
    """Every prefix with and without prompt, and answers with another text."""
    found = [World(count, prompt) for count in range(1, len(messages) + 1) for prompt in (False, True)]
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and isinstance(message["content"], str):
            found.append(World(i + 1, False, (i, {**message, "content": f"\u25c8{message['content']}\u25c8"})))
    return found


def alone(template: ChatTemplate, chat: Chat, world: World) -> str | TemplateError:
    try:
        return template.render(world.of(chat[0]), chat[1], add_generation_prompt=world.prompt)
    except TemplateError as error:
        return error


def loaded(text: str) -> ChatTemplate:
    return ChatTemplate(text, SPECIAL, lambda: conformance.CLOCK)


def compare(text: str | ChatTemplate, chat: Chat, worlds: Sequence[World] = ()) -> tuple[int, int]:
    """(renderings of one pass that are proven, all of them); raises where one is not the rendering alone."""
    template = loaded(text) if isinstance(text, str) else text
    worlds = worlds or worlds_of(chat[0])
    found = template.render_all(chat[0], worlds, chat[1])
    for world, one in zip(worlds, found, strict=True):
        if one is not None:
            wanted = alone(template, chat, world)
            assert type(one) is type(wanted)
            assert (one if isinstance(one, str) else str(one)) == (wanted if isinstance(wanted, str) else str(wanted))
    return sum(one is not None for one in found), len(found)


# -- what templates do -------------------------------------------------------------------------------------------------

LOOP = "{% for m in messages %}"
SMALL = {
    "the end of the loop": LOOP + "{{ m.content }}{% if loop.last %}.{% else %},{% endif %}{% endfor %}",
    "a count": LOOP + "{{ loop.index }}/{{ loop.length }}/{{ messages|length }} {% endfor %}",
    "from the back": LOOP + "{{ loop.revindex }}{{ loop.revindex0 }}{% endfor %}",
    "neighbours": LOOP + "{{ loop.previtem.role }}<{{ m.role }}>{{ loop.nextitem.role }};{% endfor %}",
    "neighbours by index":
        LOOP + "{% if loop.index0 and messages[loop.index0 - 1].role == 'user' %}u{% endif %}"
        "{% if messages[loop.index0 + 1] is defined %}{{ messages[loop.index0 + 1].role }}{% endif %}{% endfor %}",
    "the last message": "{{ messages[-1].role }}{{ messages|last }}{{ (messages|last).content }}",
    "the second": "{{ messages[1].content if messages|length > 1 else 'none' }}",
    "a slice": "{% for m in messages[1:] %}{{ loop.index }}{{ m.content }}{{ loop.last }}{% endfor %}",
    "a slice at the end": "{% for m in messages[-2:] %}{{ m.role }}{{ loop.first }}{% endfor %}",
    "backwards": "{% for m in messages[::-1] %}{{ m.role }}{{ loop.index0 }}{{ m.content }}{% endfor %}",
    "where it stands backwards":
        "{% for m in messages[::-1] %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.revindex }}"
        "{{ loop.revindex0 }}{{ loop.length }}{{ loop.cycle('a', 'b') }}<{{ loop.previtem.role }}"
        "{{ loop.nextitem.role }}>{{ messages|length - loop.index }}{{ loop.index0 + 1 > 2 }};{% endfor %}",
    "backwards until a question":
        "{% for m in messages[::-1] %}{% if m.role == 'user' %}{{ loop.index0 }}{% break %}{% endif %}{{ m.role }}"
        "{% if m.role == 'tool' %}{% continue %}{% endif %}{% set last = loop.index %}{{ last }}{% endfor %}!",
    "backwards twice": "{% for m in messages[::-1][::-1] %}{{ m.role }}{{ loop.index0 }}{{ loop.first }}{% endfor %}",
    "backwards in a loop":
        LOOP + "{% for n in messages[::-1] %}{{ n.role[0] }}{{ loop.index0 == loop.length - 1 }}{% endfor %};"
        "{% endfor %}",
    "the last question":
        "{% set ns = namespace(open=true, last=messages|length - 1) %}{% for m in messages[::-1] %}"
        "{% set index = (messages|length - 1) - loop.index0 %}"
        "{% if ns.open and m.role == 'user' and m.content is string and not(m.content.startswith('<')) %}"
        "{% set ns.open = false %}{% set ns.last = index %}{% endif %}{% endfor %}" + LOOP
        + "{{ loop.index0 > ns.last }}{{ ns.last <= loop.index0 }}{{ loop.last or (not loop.last and m.content) }}"
        "{% endfor %}{{ ns.last }}{{ ns.open }}",
    "integers compared":
        "{% set n = messages|length %}{% for i in range(6) %}{{ n < i }}{{ n <= i }}{{ n > i }}{{ n >= i }}{{ n == i }}"
        "{{ n != i }}{{ i < n }}{{ i <= n }}{{ i > n }}{{ i >= n }}{{ i == n }}{{ i != n }}{{ i - n < 0 }}{{ n - n }}"
        "{{ n + 1 - i > n - 1 }}{{ n == true }}{{ n < 2.5 }} {% endfor %}",
    "integers of some":
        "{% set ns = namespace(n=0) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.n = loop.index0 %}"
        "{% elif loop.last %}{% set ns.n = 'x' %}{% endif %}{{ ns.n == 'x' }}{{ ns.n != 0 }}"
        "{{ ns.n is string }}{% endfor %}",
    "texts compared with a number":
        "{% set ns = namespace(n=0) %}" + LOOP + "{% if loop.last and m.role == 'user' %}{% set ns.n = 'x' %}"
        "{% endif %}{{ ns.n < 3 }}{% endfor %}",
    "a long chain":
        LOOP + "{% if loop.last and m.role and m.content and add_generation_prompt and m.role != 'x' "
        "and loop.index0 >= 0 and messages|length and m.role != 'y' and m.role != 'z' and loop.last %}{{ m.role }}"
        "{% endif %}{{ (not loop.last) or '' or m.nothing or add_generation_prompt or 'e' }}{% endfor %}",
    "backwards, filtered": "{% for m in messages|reverse %}{{ m.role }}{% endfor %}",
    "a namespace":
        "{% set ns = namespace(last=-1, n=0) %}" + LOOP + "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
        "{% endif %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.last }}/{{ ns.n }}"
        + LOOP + "{% if loop.index0 > ns.last %}+{% endif %}{{ m.content }}{% endfor %}",
    "a namespace made in a branch":
        LOOP + "{% if loop.last %}{% set ns = namespace(x='a') %}{% else %}{% set ns = namespace(x='b') %}{% endif %}"
        "{% if m.role == 'user' %}{% set ns.x = ns.x ~ 'u' %}{% endif %}{{ ns.x }}{% endfor %}",
    "a namespace with an attribute for some":
        "{% set ns = namespace() %}{% if messages|length > 2 %}{% set ns.x = 1 %}{% endif %}{{ ns.x is defined }}",
    "a variable of a branch":
        "{% set x = 'a' %}{% if messages|length > 2 %}{% set x = 'b' %}{% elif add_generation_prompt %}"
        "{% set x = 'c' %}{% set y = 1 %}{% endif %}{{ x }}{{ y is defined }}{{ y }}",
    "a variable of a loop":
        "{% set x = 0 %}" + LOOP + "{% if loop.last %}{% set x = 1 %}{% endif %}{{ x }}"
        "{% endfor %}{{ x }}",
    "and, or, not":
        LOOP + "{{ (loop.last and m.content) or 'no' }}{{ not loop.last }}{{ loop.last or add_generation_prompt }}"
        "{{ 'x' if loop.last and not add_generation_prompt else 'y' if loop.first }}{% endfor %}",
    "break": LOOP + "{% if loop.index0 == messages|length - 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}end",
    "continue":
        LOOP + "{% if not loop.last and m.role == 'user' %}{% continue %}{% endif %}{{ m.content }}|"
        "{% endfor %}",
    "break in a branch of a branch":
        LOOP + "{% if loop.last %}{% if add_generation_prompt %}{% break %}{% endif %}last {% endif %}{{ m.role }};"
        "{% endfor %}.",
    "a break for all": LOOP + "{{ m.role }}{% break %}{% endfor %}{{ messages|length }}",
    "a loop in a loop": LOOP + "{% for n in messages[loop.index:] %}{{ n.role[0] }}{% endfor %};{% endfor %}",
    "a scan ahead":
        LOOP + "{% set ns = namespace(found=false) %}{% for n in messages[loop.index:] %}"
        "{% if n.role == 'assistant' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{% endfor %}",
    "a chosen loop":
        "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.content }}{{ loop.last }}"
        "{% endfor %}",
    "chosen by what the body changes":
        "{% set ns = namespace(n=0) %}{% for m in messages if ns.n < 2 %}"
        "{% set ns.n = ns.n + 1 %}{{ m.role }}{% endfor %}",
    "a list of namespaces":
        "{% set a = namespace(n=0) %}{% for x in [a, a] if x.n < 1 %}"
        "{% set a.n = 1 %}{{ messages|length }}{% endfor %}",
    "chosen by what varies": "{% for t in ['a', 'b'] if messages|length > 2 %}{{ t }}{% endfor %}",
    "a macro":
        "{% macro show(m, last=false) %}{% if last %}[{{ m.content }}]{% else %}({{ m.content }}){% endif %}"
        "{{ messages|length }}{% endmacro %}" + LOOP + "{{ show(m, loop.last) }}{% endfor %}{{ show(messages[-1]) }}",
    "a macro that asks for its surroundings":
        "{% set ns = namespace(x=0) %}{% macro up() %}{% set ns.x = ns.x + 1 %}{{ ns.x }}{% endmacro %}"
        + LOOP + "{% if loop.last %}{{ up() }}{% endif %}{{ up() }}{% endfor %}",
    "a macro made in a branch":
        "{% if add_generation_prompt %}{% macro f() %}A{% endmacro %}{% else %}"
        "{% macro f() %}B{% endmacro %}{% endif %}{{ f() }}",
    "a call block":
        "{% macro box() %}<{{ caller() }}>{% endmacro %}" + LOOP
        + "{% call box() %}{{ m.content }}{{ loop.last }}{% endcall %}{% endfor %}",
    "a set block": LOOP + "{% set x %}{{ m.role }}{% if loop.last %}!{% endif %}{% endset %}{{ x|upper }}{% endfor %}",
    "tagged answers":
        LOOP + "{% generation %}{{ m.content }}{% if loop.last %}.{% endif %}{% endgeneration %}"
        "{% endfor %}",
    "text kept for later":
        "{% set ns = namespace(out='') %}" + LOOP
        + "{% set ns.out = ns.out + m.role + (';' if not loop.last else '') %}{% endfor %}{{ ns.out }}",
    "lists":
        "{% set x = [messages|length, add_generation_prompt, 'a'] %}{{ x }}{{ x|tojson }}"
        "{{ (1, messages|length) }}",
    "dicts": "{{ {'n': messages|length, 'k': 1}|tojson }}{{ {messages|length: 2}.get(2) }}",
    "filters":
        "{{ messages|map(attribute='role')|join(',') }}"
        "{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "a kept iterator": "{% set r = messages|map(attribute='role') %}{{ r|join }}{{ r|join }}",
    "an iterator of some":
        "{% set r = 'ab'|map('upper') %}{% if add_generation_prompt %}{{ r|join }}{% endif %}{{ r|join }}",
    "arithmetic":
        "{{ messages|length * 2 + 1 - 3 }}{{ messages|length // 2 }}{{ messages|length % 2 }}"
        "{{ -(messages|length) }}",
    "arithmetic that some cannot do": "{{ 10 // (messages|length - 2) }}",
    "comparisons": "{{ 1 < messages|length < 4 }}{{ messages|length in [1, 3] }}{{ 'a' ~ messages|length }}",
    "tests":
        LOOP + "{{ loop.last is true }}{{ m.content is string }}{{ m.name is defined }}"
        "{{ messages|length is odd }}{% endfor %}",
    "unpacking":
        "{% set a, b = messages|length, 2 %}{{ a }}{{ b }}"
        "{% for k, v in messages[-1].items() %}{{ k }}={{ v }}{% endfor %}",
    "ranges": "{% for i in range(messages|length) %}{{ i }}{{ messages[i].role }}{{ loop.last }}{% endfor %}",
    "what some refuse":
        LOOP + "{% if loop.last and m.role == 'user' %}{{ raise_exception('ends in ' + m.role) }}"
        "{% endif %}{{ m.role }}{% endfor %}",
    "what all refuse from a message on":
        LOOP + "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}{{ m.role }}"
        "{% endfor %}",
    "what prompts refuse": "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}{{ messages[0].role }}",
    "what is refused in a value": LOOP + "{{ m.role + (1 if loop.last else '') }}{% endfor %}",
    "a changed loop": LOOP + "{% if loop.changed(m.role) %}{{ m.role }}{% endif %}{% endfor %}",
    "a cycle": LOOP + "{{ loop.cycle('a', 'b') }}{% endfor %}",
    "a joiner": "{% set c = joiner(',') %}" + LOOP + "{{ c() }}{{ m.role }}{% endfor %}",
    "a loop with else": "{% for m in messages[1:] %}{{ m.role }}{% else %}none{% endfor %}",
    "a recursive loop": "{% for m in messages recursive %}{{ m.role }}{{ loop(m.more) if m.more }}{% endfor %}",
    "a filter block": "{% filter upper %}{{ messages|length }}{% endfilter %}",
    "a with block": "{% with x = messages|length %}{{ x }}{% endwith %}",
    "stars": "{{ range(*[1, messages|length])|list }}",
    "spaces": "\n  {%- if messages|length > 1 -%}  a  {%- endif %}  \n{# c #}  b\n",
    "the time": "{{ strftime_now('%Y') }}" + LOOP + "{{ m.role }}{% endfor %}",
    "tools":
        "{% if tools %}{% for t in tools %}{{ t|tojson }}{{ loop.last }}{% endfor %}"
        "{% endif %}{{ messages|length }}",
    "what is not there":
        "{{ nothing }}{{ messages[0].nothing }}{{ messages[0].nothing is none }}" + LOOP + "{{ m.x.y }}"
        "{% endfor %}",
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", ["plain", "mixed", "parts"])
def test_a_construct_gives_every_rendering_what_it_gives_alone(name: str, shape: str) -> None:
    compare(SMALL[name], SHAPES[shape])


LEFT_TO_THE_REFERENCE = {  # what depends on what was given before, and rare statements
    "a kept iterator", "an iterator of some", "a changed loop", "a joiner", "a loop with else", "a recursive loop",
    "a filter block", "a with block", "stars", "chosen by what varies",
    "chosen by what the body changes", "a list of namespaces",
}


@pytest.mark.parametrize("name", SMALL)
def test_all_but_a_few_constructs_are_rendered_in_one_pass(name: str) -> None:
    proven, everything = compare(SMALL[name], SHAPES["plain"])
    if name in LEFT_TO_THE_REFERENCE:
        assert proven < everything
    else:
        assert proven == everything


# -- real templates ----------------------------------------------------------------------------------------------------

CORPUS = sorted(name for name, text in assets.templates().items() if isinstance(text, str))
PARTITIONS = 8


@pytest.mark.parametrize("part", range(PARTITIONS))
def test_real_templates_give_every_rendering_what_they_give_alone(part: int) -> None:
    found: dict[str, list[tuple[int, int]]] = {}
    for name in CORPUS[part::PARTITIONS]:
        template = loaded(assets.templates()[name])  # compiled once for all chats
        for shape, chat in SHAPES.items():
            found.setdefault(shape, []).append(compare(template, chat))
    for shape, of_templates in found.items():
        proven, everything = map(sum, zip(*of_templates, strict=True))
        assert proven > 0.95 * everything, shape


TEXTS = st.sampled_from(
    ["", " ", "a", " b\n", "<think>\nx\n</think>\n\ny", "</think>", "<tool_response>z</tool_response>", "你好 🙂",
     "{{ q }}", "a sentence, long enough to be somebody's"]
)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    role = draw(st.sampled_from(["system", "user", "assistant", "assistant", "tool", "user"]))
    made: dict[str, Any] = {"role": role, "content": draw(TEXTS)}
    if role == "assistant" and draw(st.integers(0, 2)) == 0:
        made["tool_calls"] = [CALL["tool_calls"][0]] * draw(st.integers(1, 2))
    if role == "assistant" and draw(st.integers(0, 2)) == 0:
        made["reasoning_content"] = draw(TEXTS)
    return made if role != "tool" else {**made, "tool_call_id": "call00001", "name": "lookup"}


@given(st.lists(messages(), min_size=1, max_size=9), st.sampled_from(CORPUS), st.booleans(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_chat_under_any_template_is_rendered_as_alone(
    chat: list[dict[str, Any]], name: str, tools: bool, thinking: bool
) -> None:
    template = ChatTemplate(assets.templates()[name], SPECIAL, lambda: conformance.CLOCK)
    given_tools = [conformance.LOOKUP] if tools else None
    worlds, kwargs = worlds_of(chat), {} if thinking else {"enable_thinking": False}
    for world, one in zip(worlds, template.render_all(chat, worlds, given_tools, **kwargs), strict=True):
        if one is not None:
            try:
                wanted = template.render(world.of(chat), given_tools, add_generation_prompt=world.prompt, **kwargs)
            except TemplateError as error:
                assert str(one) == str(error)
            else:
                assert one == wanted


FAMILIES = ("qwen3", "qwen2.5", "llama3", "gpt-oss", "deepseek-v3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_agents_chat_is_rendered_in_one_pass(family: str) -> None:
    chat = agent(120)
    text = (assets.tokenizer_dir(family) / "chat_template.jinja").read_text("utf-8")
    some = [world for world in worlds_of(chat[0]) if world.count % 7 == 0 or world.swap]
    assert compare(text, chat, some) == (len(some), len(some))


# -- mutations: what is left out is seen -------------------------------------------------------------------------------


def one_branch(self: Worlds, choice: Varied, numbered: bool) -> Iterator[Any]:
    yield self.seen(choice)[0][1]


def one_value(self: Worlds, value: Any) -> Any:
    return self.seen(value)[0][1] if type(value) is Varied and value.items is None else value


MUTATIONS: dict[str, tuple[type, str, Any]] = {
    "branches": (Worlds, "branches", one_branch),
    "values": (Worlds, "see", one_value),
    "assignments": (Worlds, "put", lambda self, before, value, scope: value),
    "conditions": (Worlds, "cond", lambda self, test, yes, no: yes() if one_value(self, test) else no()),
    "the last item": (Loop, "last", property(lambda self: self.index == len(self.items.items))),
    "where it begins backwards": (Backwards, "first", property(lambda self: self.at == len(self.items.items) - 1)),
    "the index backwards": (Backwards, "index0", property(lambda self: self.at)),
    "comparisons of integers": (Worlds, "_order", lambda self, value, operator, number: value.ordered()[0][0] < number),
    "tests": (Worlds, "tested", lambda self, test, *args: test(*map(one_value, [self] * len(args), args))),
    "sums": (Varied, "along", classmethod(lambda cls, of, sign, more: of)),
    "the length": (Worlds, "length", lambda self, value: len(value.items)),
    "lookups ahead": (Worlds, "item", lambda self, value, index, none: value.items[index]
                      if index < len(value.items) else none),
    "slices": (Worlds, "rest", lambda self, value, start: Varied.alike(
        list, value.items[start:], value.longer, value.sizes)),
    "leaving a loop": (Worlds, "leave", lambda self, whole: None),
    "refusals": (Worlds, "die", lambda self, mark, error: None),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_without_a_recorder_the_comparison_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTATIONS[name]
    monkeypatch.setattr(owner, attribute, broken)
    monkeypatch.setattr("chatloss.template.SAMPLE", 1)  # nothing is compared on the way
    with pytest.raises(AssertionError):
        for text in SMALL.values():
            for shape in ("plain", "mixed"):
                compare(text, SHAPES[shape])


# -- fail closed -------------------------------------------------------------------------------------------------------


def test_a_bound_that_is_hit_is_told_by_the_rendering_that_hits_it() -> None:
    text = "{% for m in messages %}{% for i in range(400) %}{{ m.content }}{% endfor %}{% endfor %}"
    template = ChatTemplate(text, {}, bounds=Bounds(output=40_000))
    worlds = [World(count) for count in range(1, 7)]
    assert template.render_all(conformance.PLAIN, worlds) == [None] * 6
    with pytest.raises(TemplateError, match="writes more than 40,000"):
        template.render(conformance.PLAIN)
    assert template.render(conformance.PLAIN[:1])


@pytest.mark.parametrize("text", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_what_exhausts_time_or_memory_alone_is_not_served_by_the_one_pass(text: str) -> None:
    template = ChatTemplate(text, bounds=Bounds(ticks=20_000))
    for one in template.render_all([user("hi"), answer("yo")], [World(1), World(2), World(2, True)]):
        assert not isinstance(one, str)


def test_a_long_sum_is_refused_before_it_is_made() -> None:
    text = "{% set a = messages[0].content %}{{ (" + " + ".join(["a"] * 3000) + ")|length }}"
    template = ChatTemplate(text, bounds=Bounds(value=100_000_000, built=200_000_000))
    tracemalloc.start()
    found = template.render_all([user("x" * 1_000_000), answer("yo")], [World(1), World(2)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not any(isinstance(one, str) for one in found)
    assert peak < 1_000_000_000


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES.keys())
def test_the_one_pass_reaches_nothing_outside_the_sandbox(text: str) -> None:
    template = ChatTemplate(text)
    for one in template.render_all([user("hi"), answer("yo")], [World(1), World(2), World(2, True)], [{"name": "f"}]):
        assert one is None or isinstance(one, TemplateError) or one == ""


def test_a_hostile_template_does_not_blow_up_the_code() -> None:
    deep = "(" * 60 + "a" + "".join(f" or (b{i} and c)) if d{i} else e{i})" for i in range(30))
    for text in (f"{{{{ {deep} }}}}", "{% if a %}" + "{% elif b %}x" * 3000 + "{% endif %}"):
        template = ChatTemplate(text)
        assert all(one is None or isinstance(one, str) for one in template.render_all([user("a")], [World(1)]))


def test_a_difference_from_the_rendering_alone_is_an_error_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Worlds, "branches", one_branch)
    template = ChatTemplate(SMALL["the end of the loop"])
    with pytest.raises(ChatlossError, match="differs from the template rendered alone"):
        template.render_all(conformance.PLAIN, [World(2), World(1), World(3)])


def test_off_with_one_flag_and_the_same_rows() -> None:
    directory = assets.tokenizer_dir("qwen3")
    chat = Conversation.from_messages(*MIXED)
    traced, plain = ChatEncoder.load(directory), ChatEncoder.load(directory, trace=False)
    rows: Callable[[ChatEncoder], list[Any]] = lambda encoder: [row.to_dict() for row in encoder.examine(chat).rows]  # noqa: E731
    assert rows(traced) == rows(plain)
    assert traced.template.traced["in one pass"] > 0 and not plain.template.traced
