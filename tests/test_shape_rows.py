"""Rows that are made by the shape of a conversation are those that are made without."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.encoding import Encoding
from chatloss.errors import ChatlossError
from chatloss.fast_tokens import loaded_with
from chatloss.load import load_tokenizer
from chatloss.pipeline import records
from chatloss.plans import each, plans, spaced
from chatloss.plans import rows as shape_rows
from chatloss.plans.plans import same_rows
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.shapes import shapes
from tests import assets, conformance
from tests.stored import stored, whole
from tests.test_shapes import WORDS, reworded
from tests.test_traced import CALL, SHAPES, answer, result, user

pytest.importorskip("fastokens")
FAMILIES = ["qwen3", "qwen2.5", "llama3", "gpt-oss", "deepseek-v3"]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first conversation of a shape is recorded, and but for the first of a plan these tests alone compare rows."""
    monkeypatch.setattr(shapes, "OFTEN", 1)
    monkeypatch.setattr(spaced, "OFTEN", 1)
    monkeypatch.setattr(plans, "SAMPLE", 10**9)


@cache
def encoder(family: str, **policy: Any) -> ChatEncoder:
    loaded = loaded_with(load_tokenizer(str(assets.tokenizer_dir(family))), "fast")
    # DeepSeek's own template is another one today: it puts a thought into every prompt.
    template = assets.templates()["yujiepan-deepseek-v3-tiny-random"] if family == "deepseek-v3" else None
    return ChatEncoder.load(loaded, template, Policy(**policy), clock=lambda: conformance.CLOCK)


def examined(made: ChatEncoder, conversation: Conversation) -> Encoding:
    """What is made of it among others."""
    ((_, found),) = made.examine_each([conversation])
    if isinstance(found, ChatlossError):
        raise found
    return found


def planned(made: ChatEncoder, messages: list[dict[str, Any]], tools: Any = None) -> int:
    """How many conversations had their rows from a plan so far; raises where this one's differ."""
    conversation = Conversation.from_messages(messages, tools, None, "chats.jsonl:1")
    one, other = examined(made, conversation), made.examine(conversation)
    assert same_rows(one.rows, other.rows), [
        [pair for pair in zip(a.spans, b.spans, strict=False) if pair[0] != pair[1]]
        for a, b in zip(one.rows, other.rows, strict=False)
    ]
    assert (one.outcomes, one.untrained, one.problems) == (other.outcomes, other.untrained, other.problems)
    assert stored(one.rows) == stored(whole(one.rows))
    assert made._plans is not None
    return made._plans.planned


LONGER = [
    "The answer is four, and nothing else is.", "tell me more", "assistant", "end", "think", "\n\nHello", "Hi\n", "<",
    ">", "}", "{\"a\": 1}", "  two  ", "naïve 🙂", "a", "4", "user\nuser", "im_end", "analysis", "<|", "|>", "return",
    "final", "Yes.", "No.", "你好", "<think>x</think>y", "</think>\n\n", "x" * 40, "system", "function",
    "\u00a0", "e\u0301",
]
ORDINARY = ["Tell me more about it, please.", "The capital of France is Paris.", "Fine, thanks!", "- one\n- two\n- 3."]
TEXT = st.one_of(*[st.sampled_from(ORDINARY)] * 7, st.sampled_from([*LONGER, *WORDS]), st.text(max_size=10))
SPACES = st.sampled_from([*[("", "")] * 4, ("", "\n"), ("", "\n\n"), ("\n", "\n"), (" ", " "), ("", "\u3000")])
ARGUMENTS = st.dictionaries(st.sampled_from(["a", "word", "name"]), st.one_of(TEXT, st.integers(0, 12), st.none()),
                            min_size=1, max_size=2)


def called(text: str, arguments: Any) -> dict[str, Any]:
    call = CALL["tool_calls"][0]
    return {**CALL, "content": text, "tool_calls": [
        {**call, "function": {"name": call["function"]["name"], "arguments": arguments}}]}


@st.composite
def chats(draw: Callable[..., Any]) -> tuple[list[dict[str, Any]], Any]:
    """Of few shapes, so that most are replayed, and of any words."""
    messages = [{"role": "system", "content": draw(TEXT)}] if draw(st.booleans()) else []
    tools, rounds = draw(st.booleans()), draw(st.integers(1, 3))
    for _ in range(rounds):
        messages.append(user(draw(TEXT)))
        if tools:
            messages += [called(draw(TEXT), draw(ARGUMENTS)), result(draw(TEXT))]
        messages.append(answer(draw(TEXT)))
    if draw(st.booleans()):
        for message in messages:
            if message["role"] == "assistant":
                message["reasoning_content"] = draw(TEXT)
    before, behind = draw(SPACES)
    for message in messages:
        if message["content"]:
            message["content"] = f"{before}{message['content']}{behind}"
    return messages, [conformance.LOOKUP] if tools else None


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(chat=chats())
def test_any_words_have_the_same_rows(family: str, chat: tuple[list[dict[str, Any]], Any]) -> None:
    planned(encoder(family), *chat)


@pytest.mark.parametrize("policy", [
    {"row_format": "per_turn"}, {"turns": "last"}, {"turns": "last_round"}, {"parts": ("content",)},
    {"control_tokens": "parity"}, {"roles": ("assistant", "tool")}, {"row_format": "multi_turn", "unlawful": "keep"},
    {"max_length": 60}, {"max_length": 80, "overflow": "window"}, {"max_length": 60, "overflow": "drop"},
], ids=str)
@pytest.mark.parametrize("family", ["qwen3", "llama3"])
@settings(max_examples=40, deadline=None)
@given(chat=chats())
def test_under_any_policy(family: str, policy: dict[str, Any], chat: tuple[list[dict[str, Any]], Any]) -> None:
    planned(encoder(family, **policy), *chat)


PLANNED = [*((family, shape) for family in FAMILIES for shape in ("plain", "system")), ("qwen3", "tools"),
           ("qwen2.5", "tools"), ("qwen3", "reasoning"), ("gpt-oss", "reasoning")]


@pytest.mark.parametrize(("family", "shape"), PLANNED)
def test_ordinary_words_are_planned(family: str, shape: str) -> None:
    """Else the tests above would show nothing."""
    known, chance = encoder(family), random.Random(shape)
    made = ChatEncoder.load(known.loaded, known.template.source, clock=lambda: conformance.CLOCK)
    messages, tools = SHAPES[shape]
    before = planned(made, messages, tools)
    for _ in range(12):
        last = planned(made, reworded(messages, 0.0, chance), tools)
    assert last >= before + 6


def test_wishes_of_the_data_are_heeded() -> None:
    made, chance = encoder("qwen2.5"), random.Random(5)
    messages, tools = SHAPES["plain"]
    made = ChatEncoder.load(made.loaded)
    for wish in ({"train": False}, {}, {"weight": 0.5}, {"train": True}, {}):
        for _ in range(3):
            some = reworded(messages, 0.0, chance)
            some[1].update(wish)
            planned(made, some, tools)


def test_a_condition_that_is_not_kept_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests can fail."""
    made, chance = ChatEncoder.load(encoder("qwen3").loaded), random.Random(1)
    messages = [user("tell me more"), answer("The answer is four."), user("And more?"), answer("Five it is, then.")]
    for _ in range(4):
        before = planned(made, reworded(messages, 0.0, chance))
    assert before
    monkeypatch.setattr(shape_rows, "_as_told", lambda *_: True)
    with pytest.raises(AssertionError):
        for word in (*LONGER, *WORDS):
            planned(made, [user(word), answer("The answer"), user("And?"), answer("Five.")])
            planned(made, [user("one"), answer(word), user("And?"), answer("Five.")])


def test_a_difference_is_an_error_and_not_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    made, chance = ChatEncoder.load(encoder("qwen2.5").loaded), random.Random(1)
    messages, _ = SHAPES["plain"]
    for _ in range(4):
        planned(made, reworded(messages, 0.0, chance))
    monkeypatch.setattr(plans, "SAMPLE", 2)
    monkeypatch.setattr(each, "same_encodings", lambda *_: False)
    with pytest.raises(ChatlossError, match="rows by shape differ"):
        for _ in range(2):
            examined(made, Conversation.from_messages(reworded(messages, 0.0, chance)))


def test_a_plan_is_not_made_of_a_lucky_chat() -> None:
    """The answer "return" is found again in the stop behind it, which tells otherwise where its message ends."""
    made, chance = ChatEncoder.load(encoder("gpt-oss").loaded, clock=lambda: conformance.CLOCK), random.Random(1)
    messages = [user("Tell me more."), answer("return"), user("assistant"), answer("There is no more."), user("Why?"),
                answer("end")]
    planned(made, messages)
    planned(made, messages)
    assert made._plans is not None and not [one for one in made._plans._tried.values() if one.plan]
    for _ in range(4):
        planned(made, reworded(messages, 0.0, chance))


def test_the_first_rows_of_a_plan_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    made, chance = ChatEncoder.load(encoder("qwen2.5").loaded), random.Random(1)
    monkeypatch.setattr(each, "same_encodings", lambda *_: False)
    with pytest.raises(ChatlossError, match="rows by shape differ"):
        for _ in range(4):
            examined(made, Conversation.from_messages(reworded(SHAPES["plain"][0], 0.0, chance)))
    assert made._plans is not None and made._plans.planned == 1


def test_plans_end_with_their_recordings() -> None:
    made, chance = ChatEncoder.load(encoder("qwen2.5").loaded), random.Random(1)
    for _ in range(4):
        planned(made, reworded(SHAPES["plain"][0], 0.0, chance))
    known, plans_of = made.template._local.shapes["default"], made._plans
    assert known is not None and plans_of is not None and len(plans_of._tried) == 1
    known._shapes.clear()
    gc.collect()
    assert not len(plans_of._tried)


def test_no_trace_no_plans() -> None:
    made = ChatEncoder.load(encoder("qwen3").loaded, trace=False)
    for _ in range(3):
        examined(made, Conversation.from_messages(SHAPES["plain"][0]))
    assert made._plans is None or not made._plans.planned


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(some=st.lists(chats(), min_size=2, max_size=16))
def test_conversations_among_others_have_the_same_rows(family: str, some: list[tuple[Any, Any]]) -> None:
    """Many are encoded together: none may get what is another's."""
    made = encoder(family)
    given = [Conversation.from_messages(*chat, None, f"chats.jsonl:{i}") for i, chat in enumerate(some, 1)]
    for conversation, (back, found) in zip(given, made.examine_each(given), strict=True):
        wanted = made.examine(conversation)
        assert back is conversation and isinstance(found, Encoding)
        assert same_rows(found.rows, wanted.rows)
        assert (found.outcomes, found.untrained, found.problems) == (wanted.outcomes, wanted.untrained, wanted.problems)


def test_any_number_ahead_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, given = random.Random(3), []
    for k in range(120):
        messages, tools = SHAPES[("plain", "tools", "system", "reasoning")[k % 4]]
        given.append(Conversation.from_messages(reworded(messages, 0.2, chance), tools, None, f"chats.jsonl:{k + 1}"))
    found = []
    for ahead, tokens in ((1, 2**16), (7, 2**16), (64, 2**16), (64, 300)):
        monkeypatch.setattr(each, "AHEAD", ahead)
        monkeypatch.setattr(each, "AHEAD_TOKENS", tokens)
        made = ChatEncoder.load(encoder("qwen3").loaded)
        encodings = [one for _, one in made.examine_each(iter(given)) if isinstance(one, Encoding)]
        assert len(encodings) == len(given) and made._plans is not None and made._plans.planned > 10
        found.append([one.rows for one in encodings])
    assert all(same_rows(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_rows_whose_turns_a_longer_row_has_are_not_planned_where_it_is_shorter() -> None:
    """gpt-oss drops the thought of an answer from history: with a long one, that answer's row is the longest."""
    made, chance = ChatEncoder.load(encoder("gpt-oss").loaded, clock=lambda: conformance.CLOCK), random.Random(2)

    def chat(thought: str) -> list[dict[str, Any]]:
        words = [user("What is the word for it?"), {**CALL, "content": None}, result("It is four."),
                 answer("The word is four."), user("Thanks for that."), answer("You are welcome.")]
        words = reworded(words, 0.0, chance)
        return [{**m, "reasoning_content": thought} if i == 3 else m for i, m in enumerate(words)]

    before = [planned(made, chat("I know it now."), [conformance.LOOKUP]) for _ in range(6)][-1]
    assert before >= 2 and made._plans is not None
    plan, = (one.plan for one in made._plans._tried.values())
    assert isinstance(plan, shape_rows.RowPlan) and plan.longer
    assert planned(made, chat("It takes a while to say" * 20), [conformance.LOOKUP]) == before
    plan.longer = ()
    with pytest.raises(AssertionError):
        planned(made, chat("It takes a while to say" * 20), [conformance.LOOKUP])


def test_what_the_template_refuses_in_every_turn_is_known_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSeek's adds the text of a call to its own, and there is none."""
    known, chance = encoder("deepseek-v3"), random.Random(4)
    made = ChatEncoder.load(known.loaded, known.template.source)
    silent = {**CALL, "content": None}

    def chat() -> list[dict[str, Any]]:
        return reworded([user("What is the word?"), silent, result("four"), answer("It is four.")], 0.0, chance)

    for _ in range(8):
        last = planned(made, chat(), [conformance.LOOKUP])
    assert last >= 4
    refused = examined(made, Conversation.from_messages(chat(), [conformance.LOOKUP]))
    assert [problem.cause for problem in refused.problems] == ["unrenderable"] * 2 and not refused.rows
    wish = chat()
    wish[1] = {**wish[1], "train": False}
    assert planned(made, wish, [conformance.LOOKUP]) == last + 1
    monkeypatch.setattr(plans, "SAMPLE", 1)
    monkeypatch.setattr(each, "same_encodings", lambda *_: False)
    with pytest.raises(ChatlossError, match="rows by shape differ"):
        examined(made, Conversation.from_messages(chat(), [conformance.LOOKUP]))


def test_what_the_template_refuses_in_some_turns_leaves_the_rows_of_others_to_a_plan() -> None:
    known, chance = encoder("deepseek-v3"), random.Random(5)
    made = ChatEncoder.load(known.loaded, known.template.source)
    silent = {**CALL, "content": None}

    def chat() -> list[dict[str, Any]]:
        return reworded([user("What is it about?"), answer("It is about a word."), user("What is the word?"), silent,
                         result("four"), answer("It is four.")], 0.0, chance)

    for _ in range(8):
        last = planned(made, chat(), [conformance.LOOKUP])
    assert last >= 4
    found = examined(made, Conversation.from_messages(chat(), [conformance.LOOKUP]))
    assert [problem.message for problem in found.problems] == [3, 5] and len(found.rows) == 1
    assert found.outcomes == {1: "exact", 3: "unrenderable", 5: "unrenderable"}


@pytest.mark.parametrize(
    ("roles", "learnt", "others"),
    [
        (["system", "system", "user"], ["Be kind.", "Be brief.", "What is it?"], [["é", "Be brief.", "What is it?"]]),
        (["system", "user"], ["Be kind.", " lead"], [["Be kind.", " x "]]),
        (["user", "system", "user"], ["more code three.", "code.", "And now?"],
         [["more code three.", "code.", "word code."], ["x", "code.", "word code."]]),
    ],
    ids=["a scaffold within a token", "a text that ends with its piece", "messages in another order"],
)
def test_luck_that_others_need_not_have_is_in_no_plan(
    roles: list[str], learnt: list[str], others: list[list[str]]
) -> None:
    """Found by review. DeepSeek's template writes all system messages first, with empty lines between them."""
    known = encoder("deepseek-v3")
    made = ChatEncoder.load(known.loaded, known.template.source)
    for words in (learnt, learnt, learnt, *others):
        messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=True)]
        planned(made, [*messages, answer("It is four.")])


def test_a_difference_ends_the_run_and_rejects_no_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, chance, path = ChatEncoder.load(encoder("qwen2.5").loaded), random.Random(1), tmp_path / "chats.jsonl"
    rows = [{"messages": reworded(SHAPES["plain"][0], 0.0, chance)} for _ in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    monkeypatch.setattr(each, "same_encodings", lambda *_: False)
    reader = read(str(path), max_rejects=1.0)
    with pytest.raises(ChatlossError, match="rows by shape differ"):
        list(records(reader, made, ahead=True))
    assert not reader.n_rejected


def test_little_is_held_of_conversations_that_wait() -> None:
    """Neither the prompts of all turns, nor what a template held when it raised."""
    shout = ("{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    made = ChatEncoder.load(encoder("qwen2.5").loaded, shout)
    chat = [one for k in range(20) for one in (user(f"Say {k}, please."), answer("as you wish " * 20))]
    for _, found in made.examine_each([Conversation.from_messages(chat)] * 3):
        assert isinstance(found, Encoding) and found.problems and not found.turns
    taken = []

    def given() -> Iterator[Conversation]:
        for k in range(6):
            taken.append(k)
            yield Conversation.from_messages([user(f"Hello {k}."), answer("Hi there.")])

    huge = "{{ 'a' * 1000000000 if messages[0].content.endswith('2.') }}"
    made = ChatEncoder.load(encoder("qwen2.5").loaded, huge + shout)
    for (_, found), k in zip(made.examine_each(given()), range(6), strict=True):
        assert isinstance(found, ChatlossError) == (k == 2)
        assert taken[-1] == (2 if k <= 2 else 5)
