"""What is replayed for a conversation of a known shape is, character for character, what the template renders."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, TemplateError
from chatloss.sandbox import Bounds
from chatloss.shapes import shapes
from chatloss.shapes.recorder import Recorder
from chatloss.shapes.symbols import Symbol, Unplanned
from chatloss.template import ChatTemplate, _aliased
from chatloss.traced import World
from tests import assets, conformance
from tests.test_sandbox import ESCAPES, EXHAUSTING
from tests.test_traced import SHAPES, SMALL, SPECIAL, Chat, alone, answer, user, worlds_of

WORDS = [
    "", " x ", "<think>\nhm\n</think>\n\nb", "</think>", "<tool_response>\nq\n</tool_response>", "<tool_response>",
    "a\"b'\\n{{x}}", "system", "\n", "user", "Ünï 你好 <b>&amp;</b>", "{\"a\": 1}", "/no_think", "[/INST]",
    "word " * 30, "None", "0", "1", "lookup", "<|im_end|>", "x</think>y<think>", "call00001", "\t tab",
]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first conversation of a shape is recorded."""
    monkeypatch.setattr(shapes, "OFTEN", 1)


def reworded(value: Any, share: float, chance: random.Random) -> Any:
    """`value` with other texts: a `share` of them such as templates ask for."""
    if isinstance(value, str):
        return chance.choice(WORDS) if chance.random() < share else f"{value}{chance.randint(0, 9)}"
    if isinstance(value, dict):
        kept = ("role", "type", "id", "tool_call_id")
        return {key: one if key in kept else reworded(one, share, chance) for key, one in value.items()}
    return [reworded(one, share, chance) for one in value] if isinstance(value, list) else value


def replayed(template: ChatTemplate, chats: list[Chat]) -> int:
    """How many of `chats` were replayed; raises where a rendering is not the one alone."""
    for messages, tools in chats:
        chat = [_aliased(message) for message in messages], tools
        worlds = worlds_of(chat[0])
        for world, one in zip(worlds, template.render_all(chat[0], worlds, tools), strict=True):
            if one is not None:
                wanted = alone(template, chat, world)
                assert type(one) is type(wanted)
                assert one == wanted if isinstance(one, str) else str(one) == str(wanted)
    return template.traced["of a known shape"]


def variants(chat: Chat, count: int, chance: random.Random) -> list[Chat]:
    """The chat, then others of its shape with stranger and stranger words."""
    return [chat, *((reworded(chat[0], k / 2 / count, chance), chat[1]) for k in range(count))]


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(text, SPECIAL, lambda: conformance.CLOCK)


@pytest.mark.parametrize("name", sorted(assets.templates())[::20])
def test_every_chat_of_a_shape_is_rendered_as_alone(name: str) -> None:
    chance = random.Random(name)
    text = assets.templates()[name]
    if isinstance(text, str):
        template = template_of(text)
        for chat in SHAPES.values():
            replayed(template, variants(chat, 3, chance))



@pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "llama3", "gpt-oss"])
def test_chats_of_one_shape_are_replayed(family: str) -> None:
    """Ordinary words lead nowhere else: all chats are replayed."""
    template = ChatEncoder.load(assets.tokenizer_dir(family), clock=lambda: conformance.CLOCK).template
    for name in ("plain", "reasoning", "tools"):
        before = template.traced["of a known shape"]
        replayed(template, variants(SHAPES[name], 5, random.Random(name))[:2] * 3)
        assert template.traced["of a known shape"] == before + 6, name


TEXT = st.one_of(st.sampled_from(WORDS), st.text(max_size=12))


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gpt-oss", "deepseek-v3"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_words_are_rendered_as_alone(family: str, data: st.DataObject) -> None:
    template = loaded(family)
    size = data.draw(st.integers(1, 3))
    messages = [one for _ in range(size) for one in (user(data.draw(TEXT)), answer(data.draw(TEXT)))]
    if data.draw(st.booleans()):
        messages[-1]["reasoning_content"] = data.draw(TEXT)
    replayed(template, [(messages, None)])


_LOADED: dict[str, ChatTemplate] = {}


def loaded(family: str) -> ChatTemplate:
    if family not in _LOADED:
        _LOADED[family] = ChatEncoder.load(assets.tokenizer_dir(family), clock=lambda: conformance.CLOCK).template
    return _LOADED[family]


LOOP = "{% for m in messages %}"
# What templates ask of texts, each where another text gives another answer.
ASKED = {
    "its length": LOOP + "{{ m.content|length }}{% if m.content|length > 4 %}long{% endif %}{% endfor %}",
    "its words": LOOP + "{{ m.content.split(' ')[-1] }}{{ m.content.split()|length }}{% endfor %}",
    "its letters": LOOP + "{% for c in m.content %}{{ c }}-{% endfor %}{% endfor %}",
    "its first letter": LOOP + "{{ m.content[0] }}{{ m.content[:2] }}{{ m.content[-1:] }}{% endfor %}",
    "a part of it": LOOP + "{% if 'b' in m.content %}b{% elif m.content is in ['a', 'c'] %}a{% endif %}{% endfor %}",
    "what it is": LOOP + "{{ m.content is string }}{{ m.content is none }}{{ m.content is mapping }}{% endfor %}",
    "its order": LOOP + "{{ m.content < 'b' <= m.role }}{{ m.content == messages[0].content }}{% endfor %}",
    "whether it is there": LOOP + "{{ m.content or 'none' }}{{ m.content and 1 }}{{ not m.content }}{% endfor %}",
    "its truth": LOOP + "{{ 'yes' if m.content else 'no' }}{{ m.content|default('d', true) }}{% endfor %}",
    "a number in it": LOOP + "{{ 'ab'[m.content|int] }}{{ m.content|int + 1 }}{{ 'x' * m.content|length }}{% endfor %}",
    "a key": LOOP + "{{ {'a': 1, 'b': 2}[m.content] }}{{ {'a': 1}.get(m.content, 0) }}{% endfor %}",
    "as a key": LOOP + "{{ {m.content: 1} }}{% endfor %}",
    "in a list": LOOP + "{% set l = [m.content, 'b'] %}{{ l }}{{ l|join('+') }}{{ l|tojson }}{{ l|sort }}{% endfor %}",
    "all messages": "{{ messages }}{{ messages|tojson }}{{ messages|string|length }}",
    "all contents": "{{ messages|map(attribute='content')|join(' ') }}{{ messages|map(attribute='content')|list }}",
    "those with a content": "{{ messages|selectattr('content')|list|length }}",
    "those with this content": "{{ messages|selectattr('content', 'equalto', 'b')|list|length }}",
    "sorted": "{% for m in messages|sort(attribute='content') %}{{ m.content }}{% endfor %}",
    "grouped": "{% for g, l in messages|groupby('content') %}{{ g }}{{ l|length }}{% endfor %}",
    "unique": "{{ messages|map(attribute='content')|unique|list|length }}",
    "a changed loop": LOOP + "{% if loop.changed(m.content) %}{{ m.content }}{% endif %}{% endfor %}",
    "formats":
        LOOP + "{{ '%s|' % m.content }}{{ '{}!'.format(m.content) }}{{ '%5s' | format(m.content) }}{% endfor %}",
    "sums": LOOP + "{{ m.content + 'x' + m.role }}{{ m.content ~ 1 ~ none }}{% endfor %}",
    "a sum that is asked":
        LOOP + "{% set s = m.content + m.role %}{% if s == 'buser' %}!{% endif %}{{ s }}{% endfor %}",
    "filters": LOOP + "{{ m.content|trim|upper|replace('B', 'c')|tojson|indent }}{{ m.content|first }}{% endfor %}",
    "methods": LOOP + "{{ m.content.replace('b', 'c') }}{{ m.content.find('b') }}{{ m.content.zfill(4) }}{% endfor %}",
    "a macro": "{% macro f(t) %}<{{ t }}>{% if t == 'b' %}!{% endif %}{% endmacro %}" + LOOP
               + "{{ f(m.content)|upper }}{{ f(m.content) }}{% endfor %}",
    "a call":
        "{% macro f() %}<{{ caller() }}>{% endmacro %}" + LOOP
        + "{% call f() %}{{ m.content }}{% endcall %}{% endfor %}",
    "a block": LOOP + "{% set x %}{{ m.content }}.{% endset %}{% if x == 'b.' %}!{% endif %}{{ x|trim }}{% endfor %}",
    "a namespace": "{% set ns = namespace(a='') %}" + LOOP + "{% if ns.a == m.content %}={% endif %}"
                   "{% set ns.a = ns.a ~ m.content %}{% endfor %}{{ ns.a }}",
    "a filtered loop": "{% for m in messages if m.content != 'b' %}{{ m.content }}{{ loop.last }}{% endfor %}",
    "a loop that ends at it": LOOP + "{% if m.content == 'b' %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "keys and values": LOOP + "{% for k, v in m.items() %}{{ k }}={{ v }},{% endfor %}{% endfor %}",
    "what is not there":
        LOOP + "{{ m.nothing }}{{ m.content.nothing }}{{ m.get('content') }}{{ m['content'] }}{% endfor %}",
    "a refusal": LOOP + "{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}{{ m.role }}{% endfor %}",
    "a refusal that says it":
        LOOP + "{% if loop.last %}{{ raise_exception('not ' + m.content) }}{% endif %}{% endfor %}",
    "a signed zero": LOOP + "{{ m.content|length * 0.0 }} {{ m.content|length * -0.0 }}{% endfor %}",
    "an error": LOOP + "{{ m.content + 1 }}{% endfor %}",
    "an error of some": LOOP + "{{ 10 // m.content|length }}{% endfor %}",
    "tools": "{% for t in tools or [] %}{{ t.function.name }}{% for k, v in t.function.parameters.properties.items() %}"
             "{{ k }}:{{ v.type }}{% if v.type == 'string' %}s{% endif %}{% endfor %}{{ t|tojson }}{% endfor %}",
    "items": "{% for t in tools %}{% for k, v in t.function.parameters.properties|items %}{{ k }}:{{ v.type }}"
             "{% if loop.last %};{% endif %}{% endfor %}{% endfor %}",
    "an iterator": "{% set p = tools[0].function.parameters.properties %}{% set i = p|items %}{% if i %}!{% endif %}"
                   "{% for k, v in i %}{{ k }}{% endfor %}{% for k, v in i %}{{ v }}{% endfor %}{{ p|items|list }}",
    "an iterator's truth": "{{ 'yes' if tools[0].function.parameters.properties|items else 'no' }}",
    "an iterator that is no argument": LOOP + "{% for k, v in m.content|items %}{{ k }}{% endfor %}{% endfor %}",
    "markup": LOOP + "{{ m.content|safe + '<a>' }}{{ m.content|safe ~ '<b>' }}{{ (m.content|safe ~ '') + '<c>' }}"
                     "{{ ('<' + m.content|safe)|trim|string + '>' }}{{ m.content|safe }}{% endfor %}",
    "in an object": LOOP + "{{ {'a': m.content, 'b': [m.content, 1, ('c', m.content)]}|tojson }}"
                           "{{ {'a': 'b'}|tojson }}{% endfor %}",
    "under a number": LOOP + "{{ {1: m.content}|tojson }}{% endfor %}",
    "a message as JSON": LOOP + "{{ m|tojson }}{{ [m, m.content]|tojson(indent=1) }}{% endfor %}",
    "the same message": LOOP + "{% if m == messages[-1] %}last{% endif %}{{ m in messages[1:] }}{{ m != messages[0] }}"
                        "{{ [m.content] == ['b'] }}{{ messages.index(m) }}{% endfor %}",
    "joined": "{% set ns = namespace(l=[]) %}" + LOOP + "{% set ns.l = ns.l + [m.content] %}{{ ns.l|join('-') }}"
              "{% if ns.l|join == 'ab' %}!{% endif %}{% endfor %}",
    "joined with others": LOOP + "{{ [m.content, 1]|join }}{{ [m.content]|join('<', 'x') }}{% endfor %}",
}
TEXTS = ["a", "b", "", "abcdef", "ab ba", "c", "1", "0", "b ", "\n", "a\"<", "bb"]


def chats_of(chance: random.Random) -> Iterator[Chat]:
    for _ in range(40):
        messages = [user(chance.choice(TEXTS)), answer(chance.choice(TEXTS)), user(chance.choice(TEXTS))]
        tool = {"name": chance.choice(TEXTS), "parameters": {"properties": {
            name: {"type": chance.choice(["string", "number"])} for name in chance.sample(["x", "y", "z"], 2)}}}
        yield messages, [{"type": "function", "function": tool}]


@pytest.mark.parametrize("text", [*ASKED.values(), *SMALL.values()], ids=[*ASKED, *SMALL])
def test_whatever_is_asked_of_a_text_decides(text: str) -> None:
    replayed(template_of(text), list(chats_of(random.Random(7))))


def test_small_templates_are_replayed_too() -> None:
    """Else the test above would show nothing."""
    served = [replayed(template_of(text), list(chats_of(random.Random(7)))) for text in ASKED.values()]
    assert sum(n > 0 for n in served) > 25
    assert sum(n > 30 for n in served) > 12


@pytest.mark.parametrize("broken", ["_guard", "exactly"])
def test_a_guard_that_is_not_kept_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: without guards a chat is taken for another."""
    given_up = {"_guard": lambda *_: None, "exactly": lambda _, value: getattr(value, "value", value)}
    monkeypatch.setattr(Recorder, broken, given_up[broken])
    with pytest.raises((AssertionError, ChatlossError)):
        for text in ASKED.values():
            replayed(template_of(text), list(chats_of(random.Random(7))))


def test_a_shape_is_recorded_once_it_is_often_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "OFTEN", 5)
    template = template_of(LOOP + "{{ m.content }}{% endfor %}")
    assert [replayed(template, [([user(f"hi {k}"), answer("yo")], None)]) for k in range(7)] == [0, 0, 0, 0, 1, 2, 3]


def test_what_cannot_be_recorded_is_seldom_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(shapes.Shapes, "_record", lambda *_: tried.append(1))
    monkeypatch.setattr(shapes, "OFTEN", 4)
    template = template_of(LOOP + "{{ m.content }}{% endfor %}")
    replayed(template, [([user(f"hi {k}"), answer("yo")], None) for k in range(300)])
    assert len(tried) == 2 + 300 // (shapes.LATER + 4) - 1


def test_another_part_of_the_template_is_another_recording() -> None:
    template = template_of(LOOP + "{% if 'b' in m.content %}B{% endif %}{{ m.content }}{% endfor %}")
    assert replayed(template, [([user(word), answer(word)], None) for word in "abab"]) == 4


def test_no_flag_no_shapes() -> None:
    template = ChatTemplate(LOOP + "{{ m.content }}{% endfor %}", trace=False)
    assert template.render_all([user("hi"), answer("yo")], [World(2)]) == [None]
    assert not template.traced


def test_a_time_that_goes_on_is_not_recorded() -> None:
    text = "{{ strftime_now('%f') }}" + LOOP + "{{ m.content }}{% endfor %}"
    assert replayed(template_of(text), [([user("hi")], None)] * 2) == 2
    template = ChatTemplate(text)
    for _ in range(3):
        template.render_all([user("hi")], [World(1)])
    assert not template.traced["of a known shape"]


@pytest.mark.parametrize("text", EXHAUSTING.values(), ids=EXHAUSTING.keys())
def test_what_exhausts_time_or_memory_alone_is_not_recorded(text: str) -> None:
    template = ChatTemplate(text, bounds=Bounds(ticks=20_000))
    for _ in range(2):
        for one in template.render_all([user("hi"), answer("yo")], [World(1), World(2), World(2, True)]):
            assert not isinstance(one, str)


@pytest.mark.parametrize("text", ESCAPES.values(), ids=ESCAPES.keys())
def test_a_recording_reaches_nothing_outside_the_sandbox(text: str) -> None:
    template = ChatTemplate(text)
    for _ in range(2):
        for one in template.render_all(
            [user("hi"), answer("yo")], [World(1), World(2), World(2, True)], [{"name": "f"}]
        ):
            assert one is None or isinstance(one, TemplateError) or one == ""


def test_a_replay_is_metered() -> None:
    """What costs little with the texts of the recording may cost much with others."""
    text = LOOP + "{{ m.content.replace('a', m.content) }}{% endfor %}"
    template = ChatTemplate(text, bounds=Bounds(value=10_000))
    assert template.render_all([user("ab")], [World(1)]) == ["abb"]
    for one in template.render_all([user("a" * 5000)], [World(1)]):
        assert not isinstance(one, str)


DOUBLED = "{% set ns = namespace(x=messages[0].content) %}" \
          "{% for i in range(8) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"


@pytest.mark.parametrize("text", [
    DOUBLED + "{{ ns.x|length }}", DOUBLED + "{{ ns.x }}",
    "{% for i in range(300) %}{{ messages[0].content }}{% endfor %}",
])
def test_sums_and_what_is_written_are_metered_in_a_replay(text: str) -> None:
    template = ChatTemplate(text, bounds=Bounds(value=20_000, output=20_000))
    assert [type(one) for one in template.render_all([user("ab")], [World(1)])] == [str]
    assert template.traced["of a known shape"] == 1
    for one in template.render_all([user("a" * 500)], [World(1)]):
        assert not isinstance(one, str)
    assert template.traced["of a known shape"] == 1


def test_shapes_that_are_kept_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "KNOWN", 8)
    monkeypatch.setattr(shapes, "RECORDED", 4)
    template = template_of(LOOP + "{{ m.content }}{% endfor %}")
    replayed(template, [([user("hi"), *([answer("yo")] * k)], None) for k in range(20)])
    known = template._local.shapes["default"]
    assert known is not None and len(known._shapes) <= 4 and len(known._seen) <= 8


def test_recordings_that_are_kept_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    often = template_of("{% for i in range(5000) %}{{ messages[0].content }}{% endfor %}")
    assert replayed(often, [([user("hi")], None)] * 3) == 0
    monkeypatch.setattr(shapes, "KEPT", 40)
    template = template_of(LOOP + "{{ m.content }}{% endfor %}")
    replayed(template, [([user("hi"), *([answer("yo")] * k)], None) for k in range(5)])
    known = template._local.shapes["default"]
    assert known is not None and sum(one.size for each in known._shapes.values() for one in each) <= 40


def test_variables_that_are_equal_and_written_otherwise_are_other_shapes() -> None:
    template = template_of("{{ x }}" + LOOP + "{{ m.content }}{% endfor %}")
    for value in (0.0, -0.0, 0, False, 0.0, -0.0):
        assert template.render_all([user("hi")], [World(1)], x=value) == [f"{value}hi"]


def test_a_refusal_that_is_not_the_templates_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is the first of a recording nobody has been told of it yet: the recording is given up."""
    template = template_of(LOOP + "{{ m.content + 1 }}{% endfor %}")
    monkeypatch.setattr("chatloss.template.SAMPLE", 2)
    assert replayed(template, [([user("hi")], None)] * 2) == 2
    monkeypatch.setattr(ChatTemplate, "render", lambda *_, **__: "fine")
    with pytest.raises(ChatlossError, match="differs"):
        for _ in range(2):
            template.render_all([user("hi")], [World(1)])


def test_a_symbol_is_of_no_use_once_the_recording_is_over() -> None:
    recorder = Recorder(shapes.RecordingSandbox(lambda: conformance.CLOCK, Bounds()).meter)
    symbol = recorder.leaf("a")
    assert bool(symbol)
    recorder.end()
    for use in (bool, str, len, hash, repr, iter, lambda one: one == "a", lambda one: one + "b"):
        with pytest.raises(Unplanned):
            use(symbol)
    assert type(symbol) is Symbol


def test_the_same_rows_with_and_without() -> None:
    directory = assets.tokenizer_dir("qwen3")
    with_shapes, without = ChatEncoder.load(directory), ChatEncoder.load(directory, trace=False)
    chance = random.Random(3)
    chats = [one for name in ("plain", "tools", "reasoning") for one in variants(SHAPES[name], 6, chance)]
    for messages, tools in chats:
        conversation = Conversation.from_messages(messages, tools)
        one, other = with_shapes.examine(conversation), without.examine(conversation)
        assert [row.to_dict() for row in one.rows] == [row.to_dict() for row in other.rows]
        assert (one.outcomes, one.problems, one.turns) == (other.outcomes, other.problems, other.turns)
    assert with_shapes.template.traced["of a known shape"]
