"""Long conversations are recorded in one pass, and have the rows they have without."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import Any

import pytest

from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError
from chatloss.plans import spaced
from chatloss.sandbox import Bounds
from chatloss.shapes import shapes
from chatloss.shapes.recorder import Recorder
from chatloss.shapes.symbols import Symbol
from chatloss.shapes.together import SymbolBuffer, SymbolWorlds
from chatloss.template import ChatTemplate
from chatloss.traced import World
from tests import assets, conformance
from tests.test_sandbox import ESCAPES, EXHAUSTING
from tests.test_shape_rows import FAMILIES, at_once, called, encoder, planned
from tests.test_shapes import ASKED, LOOP, chats_of, replayed, reworded, template_of, variants
from tests.test_traced import SHAPES, SMALL, answer, result, user

__all__ = ["at_once"]  # for every test here
Messages = list[dict[str, Any]]
SAID = ["It is four", "Tell me more", "Why is that", "Nobody knows it", "- one\n- two", "你好 there", "x < y"]


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short conversations are recorded as long ones are, and another part of a template at once."""
    monkeypatch.setattr(shapes, "SMALL", 0)
    monkeypatch.setattr(shapes, "PATIENCE", 1)


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("name", sorted(assets.templates())[7::40])
def test_every_chat_of_a_shape_is_rendered_as_alone(name: str) -> None:
    chance, text = random.Random(name), assets.templates()[name]
    if isinstance(text, str):
        template = template_of(text)
        for chat in SHAPES.values():
            replayed(template, variants(chat, 3, chance))


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("text", [*ASKED.values(), *SMALL.values()], ids=[*ASKED, *SMALL])
def test_whatever_is_asked_of_a_text_decides(text: str) -> None:
    replayed(template_of(text), list(chats_of(random.Random(7))))


@pytest.mark.usefixtures("in_one_pass")
def test_small_templates_are_replayed_too() -> None:
    """Else the test above would show nothing."""
    served = [replayed(template_of(text), list(chats_of(random.Random(7)))) for text in ASKED.values()]
    assert sum(n > 0 for n in served) > 25
    assert sum(n > 30 for n in served) > 12


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("broken", ["guard", "mask", "test"])
def test_what_is_broken_is_noticed(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail: without guards, or where worlds are mixed up, a chat is taken for another."""
    write = SymbolBuffer.write
    if broken == "guard":
        monkeypatch.setattr(Recorder, "_guard", lambda *_: None)
    elif broken == "mask":
        monkeypatch.setattr(SymbolBuffer, "write", lambda self, mask, text: write(self, -1, text))
    else:
        plain = lambda _, test, *args: test(*(getattr(one, "value", one) for one in args))  # noqa: E731
        monkeypatch.setattr(SymbolWorlds, "_asked", plain)
    with pytest.raises((AssertionError, ChatlossError)):
        for text in [*ASKED.values(), *SMALL.values()]:
            replayed(template_of(text), list(chats_of(random.Random(7))))


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("text", [*EXHAUSTING.values(), *ESCAPES.values()], ids=[*EXHAUSTING, *ESCAPES])
def test_what_exhausts_or_escapes_alone_does_neither_here(text: str) -> None:
    template = ChatTemplate(text, bounds=Bounds(ticks=20_000, built=10**8))
    for _ in range(2):
        for one in template.render_all([user("hi"), answer("yo")], [World(1), World(2), World(2, True)]):
            assert not isinstance(one, str) or not one


def test_recordings_are_small_and_hold_no_text() -> None:
    """Of 200 messages the renderings would be 20,000 texts, each with all before it."""
    text = LOOP + "<{{ m.role }}>{{ m.content }}{% if loop.last %}.{% endif %}{% endfor %}"
    text += "{% if messages|length > 150 %}{{ raise_exception('too long') }}{% endif %}"
    template, words = template_of(text), "secret words"
    messages = [one for _ in range(100) for one in (user(words), answer(words))]
    for _ in range(2):
        template.render_all(messages, [World(k, k % 2 == 1) for k in range(1, 201)])
    known = template._local.shapes["default"]
    assert known is not None
    ((recording,),) = known._shapes.values()
    assert recording.size < 3000
    assert not any(words in one for one in recording.texts)
    refusals = [one for one in recording.worlds.values() if isinstance(one, Exception)]
    assert len(refusals) == 50 and all(one.__traceback__ is one.__context__ is None for one in refusals)


@pytest.mark.parametrize("small", [0, 32])
@pytest.mark.parametrize("family", ["qwen3", "llama3", "gpt-oss", "asked"])
def test_nothing_of_a_conversation_is_kept(family: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SMALL", small)
    texts, kept = ASKED.values() if family == "asked" else [encoder(family).template.source], []
    mine = f"of {family} {small}"  # other tests have conversations, too
    for text in texts:
        kept.append(template_of(str(text)))
        chat = [user(f"Hi {mine}"), {**answer(f"Yo {mine}"), "reasoning_content": mine}, user(f"So {mine}")]
        assert replayed(kept[-1], [(chat, [conformance.LOOKUP])] * 2) or family == "asked"
    del chat
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is Symbol and mine in str(one.value)]


def test_a_rendering_of_too_many_parts_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatloss.shapes.together.MOST", 50)
    template = template_of(LOOP + "{{ m.role }}{{ m.content }}{% endfor %}")
    chat = [one for _ in range(30) for one in (user("a"), answer("b"))], None
    assert replayed(template, [chat, chat]) == 0


def agents(kind: str, size: int, chance: random.Random) -> Iterator[Messages]:
    """Long chats of one shape."""
    while True:
        made: Messages = [{"role": "system", "content": "You are an agent."}, user("Begin, please.")]
        while len(made) < size:
            said = f"{chance.choice(SAID)} ({len(made)}, {chance.randint(0, 99)})."
            if kind == "tools":
                made += [called(said, {"word": said}), result(said)]
            else:
                made += [answer(said), user(said)]
            if kind == "reasoning":
                made[-2]["reasoning_content"] = f"Let me think about {chance.randint(0, 99)}."
        yield [*made, answer("That is all.")]


@pytest.mark.parametrize(("family", "kind"), [
    *((family, "plain") for family in FAMILIES), ("qwen3", "reasoning"), ("gpt-oss", "reasoning"), ("qwen3", "tools"),
    ("qwen2.5", "tools"),
])
def test_long_chats_are_planned(family: str, kind: str) -> None:
    made, chance = fresh(family), random.Random(family)
    chats, tools = agents(kind, 44, chance), [conformance.LOOKUP] if kind == "tools" else None
    counts = [planned(made, next(chats), tools) for _ in range(5)]
    assert counts == [0, 1, 2, 3, 4]


def test_long_shapes_that_do_not_come_again_are_seldom_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each message of an agent may have a text or not, which templates ask: recording takes as long as six chats."""
    tried = []
    record = shapes.Shapes._record
    monkeypatch.setattr(shapes.Shapes, "_record", lambda *args: (tried.append(1), record(*args))[1])
    template, chance = template_of(LOOP + "{% if m.content %}{{ m.content }}{% endif %}{% endfor %}"), random.Random(1)
    for _ in range(120):
        messages = [user(chance.choice(["", "hi"])) for _ in range(40)]
        assert template.render_all(messages, [World(40)]) == ["".join(one["content"] for one in messages)]
    assert len(tried) == 6  # the 1st, and then after 2, 4, 8 ...


@pytest.mark.parametrize("family", FAMILIES)
def test_long_chats_of_any_words_have_the_same_rows(family: str) -> None:
    made, chance = fresh(family), random.Random(family)
    for kind in ("plain", "reasoning"):
        chats = agents(kind, 36, chance)
        for k in range(6):
            planned(made, reworded(next(chats), k / 100, chance))


def fresh(family: str) -> ChatEncoder:
    known = encoder(family)
    return ChatEncoder.load(known.loaded, known.template.source, clock=lambda: conformance.CLOCK)


@pytest.mark.parametrize("family", FAMILIES)
def test_space_at_the_end_of_any_text_is_served_by_the_plan_for_none(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pattern of space hardly comes twice in long chats."""
    monkeypatch.setattr(spaced, "OFTEN", 10**9)  # no plan for any pattern but none
    made, chance = fresh(family), random.Random(family)
    chats, counts = agents("plain", 40, chance), []
    for k in range(12):
        messages = next(chats)
        # DeepSeek's template writes nothing behind what a user says: space is a span of its own there.
        spaced_out = messages[2::2] if family == "deepseek-v3" else messages[1:]
        for message in spaced_out if k else ():
            message["content"] += chance.choice(["", "\n", "\n\n", " ", " \n", "\u3000", "\t"])
        counts.append(planned(made, messages))
    assert counts[-1] >= 9
