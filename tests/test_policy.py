"""Every choice of the policy has its effect, and nothing is cut or left out without a count."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.chat import Conversation
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import DataError, RecipeError
from chatloss.load import Loaded, load_tokenizer
from chatloss.policy import CHOICES, Policy
from chatloss.sample import Reason, Sample
from tests import conformance
from tests.oracle import violations
from tests.test_encode_property import OTHERS, messages

PLAIN = "chat_template.jinja"
REWRITES = "chat_template_rewrites.jinja"
# A template whose prompt opens a reasoning block that its own rendering does not have.
OPENS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""
DROPS = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ 'redacted' if m.role == 'assistant' else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_STOP = """{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "The capital of France is Paris.", "reasoning_content": "Easy."},
    {"role": "user", "content": "And of Peru?"},
    {"role": "assistant", "content": "The capital of Peru is Lima.", "reasoning_content": "Easy too."},
]
CALL = [
    {"role": "user", "content": "When do you open?"},
    {"role": "assistant", "content": "Let me look.", "reasoning_content": "A tool knows.",
     "tool_calls": [{"type": "function", "function": {"name": "opening_hours", "arguments": '{"day": "Monday"}'}}]},
    {"role": "tool", "content": "9 to 17"},
    {"role": "assistant", "content": "From 9 to 17."},
]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load_tokenizer(tokenizer_directory())


def encoder(loaded: Loaded, template: str = PLAIN, **policy: Any) -> ChatEncoder:
    text = (tokenizer_directory() / template).read_text("utf-8") if template.endswith(".jinja") else template
    return ChatEncoder.load(loaded, text, Policy(**policy))


def examine(loaded: Loaded, messages: list[dict[str, Any]], template: str = PLAIN, **policy: Any) -> Encoding:
    return encoder(loaded, template, **policy).examine(Conversation.from_messages(messages))


def trained(row: Sample, turn: int | None = None) -> str:
    mask = row.weights != 0 if turn is None else row.turns == turn
    assert row.decode is not None
    return row.decode(row.input_ids[mask].tolist())


def test_auto_makes_the_fewest_lawful_rows(loaded: Loaded) -> None:
    assert len(examine(loaded, CHAT).rows) == 1
    rewritten = examine(loaded, CHAT, REWRITES)
    assert len(rewritten.rows) == 2 and rewritten.outcomes == {2: "split", 4: "exact"}


def test_per_turn_makes_a_row_for_every_turn_with_the_same_targets(loaded: Loaded) -> None:
    one, each = examine(loaded, CHAT), examine(loaded, CHAT, row_format="per_turn")
    assert len(each.rows) == 2
    for row, turn in zip(each.rows, (2, 4), strict=True):
        assert set(row.turns.tolist()) == {-1, turn}
        assert trained(row, turn) == trained(one.rows[0], turn)
    assert Reason.SPLIT in each.rows[1].reasons


def test_multi_turn_is_refused_where_one_row_cannot_hold_the_turns_and_names_them(loaded: Loaded) -> None:
    with pytest.raises(DataError, match=r"messages\[2\]") as caught:
        encoder(loaded, REWRITES, row_format="multi_turn").encode(CHAT)
    assert "--unlawful keep" in caught.value.hint
    assert len(encoder(loaded, row_format="multi_turn").encode(CHAT)) == 1


def test_unlawful_keep_trains_what_the_one_row_has(loaded: Loaded) -> None:
    row, = encoder(loaded, REWRITES, row_format="multi_turn", unlawful="keep").encode(CHAT)
    assert trained(row, 2) == "The capital of France is Paris.<|im_end|>"
    assert trained(row, 4).startswith("<think>\nEasy too.")


@pytest.mark.parametrize(("turns", "expected"), [("all", {1, 3}), ("last", {3}), ("last_round", {1, 3})])
def test_turns(loaded: Loaded, turns: str, expected: set[int]) -> None:
    rows = examine(loaded, CALL, turns=turns).rows
    assert {int(i) for row in rows for i in row.turns if i >= 0} == expected


def test_turns_that_are_not_wanted_are_named(loaded: Loaded) -> None:
    encoding = examine(loaded, CHAT, turns="last")
    assert encoding.untrained == {2: "switched_off"}
    assert Reason.SWITCHED_OFF in encoding.rows[0].reasons


def test_another_role_may_be_trained_and_emits_its_own_header(loaded: Loaded) -> None:
    row = examine(loaded, CHAT, roles=("user",)).rows[-1]
    assert trained(row, 3) == "<|im_start|>user\nAnd of Peru?<|im_end|>"
    assert Reason.HEADER in row.reasons[row.turns == 3]


@pytest.mark.parametrize(("parts", "has", "lacks"), [
    (("content",), "Let me look.", "opening_hours"),
    (("calls",), "opening_hours", "A tool knows."),
    (("reasoning",), "A tool knows.", "Let me look."),
])
def test_parts(loaded: Loaded, parts: tuple[str, ...], has: str, lacks: str) -> None:
    row = examine(loaded, CALL, parts=parts).rows[-1]
    text = trained(row, 1)
    assert has in text and lacks not in text and text.endswith("<|im_end|>")
    assert Reason.SWITCHED_OFF in row.reasons


def test_what_a_pattern_matches_gets_its_weight(loaded: Loaded) -> None:
    row = examine(loaded, CHAT, spans=(("Paris", 3.0), ("Lima", 0.0))).rows[0]
    assert "Paris" in row.decode(row.input_ids[row.weights == 3].tolist())  # type: ignore[misc]
    assert "Lima" not in trained(row)


def test_the_data_may_switch_a_message_off_or_weigh_it(loaded: Loaded) -> None:
    chat = [dict(message) for message in CHAT]
    chat[2]["train"], chat[4]["weight"] = False, 0.25
    encoding = examine(loaded, chat)
    assert encoding.untrained == {2: "switched_off"}
    row, = encoding.rows
    assert set(np.unique(row.weights).tolist()) == {0.0, 0.25} and set(row.turns.tolist()) == {-1, 4}


def test_negative_weights_reach_the_row(loaded: Loaded) -> None:
    chat = [dict(message) for message in CHAT]
    chat[4]["weight"] = -1.0
    assert examine(loaded, chat).rows[0].weights.min() == -1.0


def test_off_prompt(loaded: Loaded) -> None:
    chat = [message for message in CHAT if message["role"] != "system"][:2]
    with pytest.raises(DataError, match="inference would not show this prompt") as caught:
        encoder(loaded, OPENS).encode(chat)
    assert "--off-prompt drop|keep|splice" in caught.value.hint
    dropped = examine(loaded, chat, OPENS, off_prompt="drop")
    assert dropped.rows == [] and dropped.outcomes == {1: "off_prompt"} == dropped.untrained
    kept, = encoder(loaded, OPENS, off_prompt="keep").encode(chat)
    assert trained(kept) == "The capital of France is Paris.<|im_end|>"
    spliced, = encoder(
        loaded, OPENS, off_prompt="splice", splice_format="{reasoning_content}\n</think>\n\n{content}"
    ).encode(chat)
    assert trained(spliced) == "Easy.\n</think>\n\nThe capital of France is Paris.<|im_end|>"
    before = spliced.decode(spliced.input_ids[spliced.weights == 0].tolist())  # type: ignore[misc]
    assert before.endswith("<|im_start|>assistant\n<think>\n")


def test_a_splice_format_that_does_not_format_is_an_error(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="does not format"):
        encoder(loaded, OPENS, off_prompt="splice", splice_format="{answer}").encode(CHAT[1:3])


def test_altered(loaded: Loaded) -> None:
    chat = CHAT[1:3]
    with pytest.raises(DataError, match="the rendering lacks the"):
        encoder(loaded, DROPS).encode(chat)
    dropped = examine(loaded, chat, DROPS, altered="drop")
    assert dropped.rows == [] and dropped.untrained == {1: "altered"}
    kept, = encoder(loaded, DROPS, altered="keep").encode(chat)
    assert trained(kept) == "redacted<|im_end|>"


def test_a_short_answer_is_not_found_in_the_header_of_a_template_that_drops_it(loaded: Loaded) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "red"}]
    assert examine(loaded, chat, DROPS).outcomes == {1: "altered"}


def test_unrenderable(loaded: Loaded) -> None:
    strict = "{% if not messages %}{{ raise_exception('no history') }}{% endif %}" + OPENS.replace("<think>\n", "")
    chat = [{"role": "assistant", "content": "Welcome!"}, *CHAT[1:3]]
    with pytest.raises(DataError, match="no history"):
        encoder(loaded, strict).encode(chat)
    encoding = examine(loaded, chat, strict, unrenderable="drop", altered="drop")
    assert encoding.untrained[0] == "unrenderable"


def test_control_tokens(loaded: Loaded) -> None:
    chat = [{"role": "user", "content": "say <|im_end|>"}, {"role": "assistant", "content": "no"}]
    with pytest.raises(DataError, match=r"control token '<\|im_end\|>'"):
        encoder(loaded).encode(chat)
    assert examine(loaded, chat).rows == []
    row, = encoder(loaded, control_tokens="parity").encode(chat)
    assert row.input_ids.tolist().count(loaded.tokens.special["<|im_end|>"]) == 3


def test_tags_inside_an_answer_are_no_control_tokens(loaded: Loaded) -> None:
    answer = {"role": "assistant", "content": "<think>a</think>b"}
    encoder(loaded).encode([{"role": "user", "content": "<tool_call>"}, answer])


def test_missing_stop(loaded: Loaded) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "fine"}]
    assert trained(encoder(loaded, NO_STOP).encode(chat)[0]) == "fine<|im_end|>"
    assert trained(encoder(loaded, NO_STOP, missing_stop="leave").encode(chat)[0]).strip() == "fine"
    with pytest.raises(DataError, match="without a stop"):
        encoder(loaded, NO_STOP, missing_stop="error").encode(chat)


LONG = [message for i in range(6) for message in (
    {"role": "user", "content": f"Question {i}: what is {i} plus {i}?"},
    {"role": "assistant", "content": f"{i} plus {i} is {2 * i}."},
)]


def counted(encoding: Encoding) -> None:
    placed = {int(i) for row in encoding.rows for i in row.turns if i >= 0}
    assert placed | set(encoding.untrained) == set(encoding.outcomes) and not placed & set(encoding.untrained)


def test_whole_turns_cuts_behind_the_last_turn_that_fits(loaded: Loaded) -> None:
    encoding = examine(loaded, LONG, max_length=80)
    row, = encoding.rows
    assert len(row) <= 80 and row.weights[-1] == 1 and row.reasons[-1] == Reason.STOP
    assert set(encoding.untrained.values()) == {"truncated"}
    counted(encoding)
    assert any(problem.cause == "too_long" for problem in encoding.problems)


def test_window_leaves_the_oldest_messages_out_and_trains_every_turn_that_fits(loaded: Loaded) -> None:
    chat = [{"role": "system", "content": "Sum."}, *LONG]
    encoding = examine(loaded, chat, max_length=80, overflow="window")
    assert all(len(row) <= 80 for row in encoding.rows) and not encoding.untrained
    counted(encoding)
    whole = {turn: trained(row, turn) for row in examine(loaded, chat).rows for turn in (2, 12)}
    for row in encoding.rows:
        assert row.decode is not None
        text = row.decode(row.input_ids.tolist())
        assert "Sum." in text
        for turn in {int(i) for i in row.turns} & {2, 12}:
            assert trained(row, turn) == whole[turn]


def test_right_cuts_anywhere_and_counts(loaded: Loaded) -> None:
    encoding = examine(loaded, LONG, max_length=75, overflow="right")
    assert [len(row) for row in encoding.rows] == [75]
    assert set(encoding.untrained.values()) == {"truncated"}


def test_drop_leaves_the_whole_row_out_and_counts_its_turns(loaded: Loaded) -> None:
    encoding = examine(loaded, LONG, max_length=80, overflow="drop")
    assert encoding.rows == [] and set(encoding.untrained) == set(encoding.outcomes)


def test_overflow_error_is_an_error(loaded: Loaded) -> None:
    with pytest.raises(DataError, match="max_length is 80"):
        encoder(loaded, max_length=80, overflow="error").encode(LONG)


def test_formats_are_probed_and_may_be_forced(loaded: Loaded) -> None:
    parts_only = """{% for m in messages %}<|im_start|>{{ m.role }}
{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a longer answer, for once"}]
    assert trained(encoder(loaded, parts_only).encode(chat)[0]) == "a longer answer, for once<|im_end|>"
    assert examine(loaded, chat, parts_only, content_format="string").outcomes == {1: "altered"}
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    typed = [chat[0], {"role": "assistant", "content": parts}]
    assert trained(encoder(loaded).encode(typed)[0]) == "one\ntwo<|im_end|>"
    for forced, kind in (("auto", dict), ("object", dict), ("string", str)):
        shown = encoder(loaded, tool_arguments=forced).rendering(Conversation.from_messages(CALL)).messages[1]
        assert isinstance(shown["tool_calls"][0]["function"]["arguments"], kind)


def test_every_choice_is_named_with_a_suggestion() -> None:
    for name, choices in CHOICES.items():
        for choice in choices:
            assert getattr(Policy.from_dict({name: choice}), name) == choice
        with pytest.raises(RecipeError, match=r"did you mean|has no choice"):
            Policy.from_dict({name: choices[0] + "x"})
    with pytest.raises(RecipeError, match="no policy named") as caught:
        Policy.from_dict({"row_fromat": "auto"})
    assert "row_format" in caught.value.hint


# -- unlawful rows, by wish -------------------------------------------------------------------------------------------

# Past answers end with another token than the one the model must emit, as in gpt-oss.
PAST = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{{ '<|im_end|>' if loop.last or m.role != 'assistant' else '<|past|>' }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# Every message is numbered from the end, so no prompt is a prefix of any answer.
NUMBERED = """{% for m in messages %}<|im_start|>{{ m.role }}{{ loop.revindex }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ASKED = [
    {"role": "user", "content": f"What? {OTHERS}"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": f"{OTHERS} Did you say a, or that it is so, indeed? {OTHERS}"},
    {"role": "assistant", "content": "It is so, indeed."},
    {"role": "user", "content": f"It is so, indeed. {OTHERS}"},
    {"role": "assistant", "content": ""},
]


@pytest.mark.parametrize("template", [PAST, NUMBERED, OPENS, REWRITES, DROPS])
@pytest.mark.parametrize("row_format", ["multi_turn", "auto", "per_turn"])
def test_what_others_say_is_never_trained_whatever_is_kept(loaded: Loaded, template: str, row_format: str) -> None:
    encoding = examine(
        loaded, ASKED, template, row_format=row_format, unlawful="keep", off_prompt="keep", altered="keep"
    )
    counted(encoding)
    for row in encoding.rows:
        assert OTHERS not in trained(row)
        for turn in {int(i) for i in row.turns if i >= 0}:
            said = trained(row, turn).replace("<|im_end|>", "").strip()
            assert said.removeprefix("<think>\n\n</think>").strip() in (ASKED[turn]["content"], "redacted")


def test_a_call_that_is_kept_off_its_prompt_is_not_sought_in_what_a_tool_says(loaded: Loaded) -> None:
    template = OPENS.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}{% for c in m.tool_calls or [] %}"
                             "{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}")
    call = {"type": "function", "function": {"name": "find", "arguments": {"n": 3}}}
    chat = [
        {"role": "user", "content": f"find 3 {OTHERS}"}, {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "find", "content": f"3 {OTHERS}"}, {"role": "user", "content": f"find 3, {OTHERS}"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]  # fmt: skip
    for row_format in ("multi_turn", "auto"):
        encoding = examine(loaded, chat, template, row_format=row_format, unlawful="keep", off_prompt="keep")
        counted(encoding)
        said = {trained(row, turn).strip() for row in encoding.rows for turn in (1, 4) if turn in row.turns}
        assert said == {'find({"n": 3})<|im_end|>'}


def test_a_stop_that_stands_in_another_message_is_not_trained_as_this_one(loaded: Loaded) -> None:
    row, = examine(loaded, ASKED, PAST, row_format="multi_turn", unlawful="keep").rows
    assert [trained(row, turn) for turn in (1, 3, 5)] == ["a", "It is so, indeed.", "<|im_end|>"]


def test_unlawful_turns_are_split_and_count_where_nothing_of_them_stands(loaded: Loaded) -> None:
    kept = examine(loaded, CHAT, REWRITES, row_format="multi_turn", unlawful="keep")
    assert kept.outcomes == {2: "split", 4: "exact"} and not kept.untrained
    refused = examine(loaded, CHAT, REWRITES, row_format="multi_turn")
    assert refused.outcomes == {2: "split", 4: "exact"} and refused.untrained == {2: "split"}
    cut = examine(loaded, CHAT, REWRITES, row_format="multi_turn", unlawful="keep", max_length=30, overflow="right")
    counted(replace(cut, untrained={4: "truncated"}))


def test_a_quotation_of_a_dropped_answer_is_the_user_s_text(loaded: Loaded) -> None:
    shown = "{{ m.content if loop.last or m.role != 'assistant' else '' }}"
    forgets = PAST.replace("<|past|>", "<|im_end|>").replace("{{ m.content }}", shown)
    row = examine(loaded, [*ASKED[:5], {"role": "assistant", "content": "Yes."}], forgets).rows[-1]
    places = row.messages == 4
    assert row.decode is not None and "It is so, indeed." in row.decode(row.input_ids[places].tolist())
    assert set(row.reasons[places].tolist()) <= {Reason.OTHER_ROLE, Reason.SCAFFOLD}


@pytest.mark.parametrize(("pattern", "weight", "texts"), [
    ("capital", 2.0, [" capital", " capital"]),
    (r"\w+ is", -1.0, ["France is", "Peru is"]),
    ("x*", 5.0, []),
    ("Easy|capital", 0.5, ["Easy", "capital"]),
    ("<think>", 3.0, ["<think>"]),
    ("nothing of this", 9.0, []),
])
def test_every_match_of_a_pattern_is_weighed_whole(
    loaded: Loaded, pattern: str, weight: float, texts: list[str]
) -> None:
    row = examine(loaded, CHAT, spans=((pattern, weight),)).rows[0]
    assert row.decode is not None
    weighed = row.decode(row.input_ids[row.weights == weight].tolist())
    assert all(text.strip() in weighed for text in texts) and bool(texts) == bool(weighed)


def test_of_two_patterns_the_later_one_holds(loaded: Loaded) -> None:
    row = examine(loaded, CHAT, spans=((".+", 0.5), ("Paris", 2.0))).rows[0]
    assert row.decode is not None
    assert row.decode(row.input_ids[row.weights == 2.0].tolist()).strip() == "Paris"
    assert {0.0, 0.5, 1.0, 2.0} == set(row.weights.tolist())


def test_only_what_matches_is_trained_where_all_parts_are_off(loaded: Loaded) -> None:
    row = examine(loaded, CHAT, parts=(), spans=(("Lima", 1.0),)).rows[0]
    assert trained(row).replace("<|im_end|>", "").strip() == "Lima"


# -- every policy, many chats -----------------------------------------------------------------------------------------


@st.composite
def policies(draw: st.DrawFn) -> dict[str, Any]:
    policy: dict[str, Any] = {
        name: draw(st.sampled_from(CHOICES[name])) for name in ("row_format", "turns", "missing_stop", "overflow")
    }
    policy |= {"control_tokens": "parity", "max_length": draw(st.sampled_from([0, 1, 20, 40, 80]))}
    if draw(st.integers(0, 3)) == 0:
        policy["parts"] = tuple(draw(st.sets(st.sampled_from(["reasoning", "content", "calls"]))))
    if draw(st.integers(0, 3)) == 0:
        patterns = st.sampled_from([r"\w+", "a", "x*", "\n", "[^ ]+$", "\U0001f642"])
        policy["spans"] = tuple(draw(st.lists(st.tuples(patterns, st.sampled_from([0.0, 2.0, -1.0])), max_size=2)))
    return policy


WISHES = st.sampled_from([None, True, False, 0.0, 0.5, -1.0])


@cache
def peer(template: str) -> tuple[Loaded, Any, str]:
    from transformers import AutoTokenizer

    text = (tokenizer_directory() / template).read_text("utf-8")
    return load_tokenizer(tokenizer_directory()), AutoTokenizer.from_pretrained(tokenizer_directory()), text


@dataclass(frozen=True)
class Shown:
    """What the oracle looks at."""

    input_ids: Any
    weights: Any
    turns: Any
    outcomes: Any


@pytest.mark.parametrize("template", [PLAIN, REWRITES])
@settings(max_examples=150)
@given(chat=messages(), policy=policies(), wishes=st.lists(WISHES, max_size=9))
def test_every_policy_is_lawful_and_counts_every_turn(
    template: str, chat: list[dict[str, Any]], policy: dict[str, Any], wishes: list[Any]
) -> None:
    shared, tokenizer, text = peer(template)
    for message, wish in zip(chat, wishes, strict=False):
        message |= {} if wish is None else {"train": wish} if isinstance(wish, bool) else {"weight": wish}
    tools = [conformance.LOOKUP] if any("tool_calls" in message for message in chat) else None
    conversation = Conversation.from_messages(chat, tools)
    made = ChatEncoder.load(shared, text, Policy(**policy))
    encoding = made.examine(conversation)
    placed = {int(i) for row in encoding.rows for i in row.turns if i >= 0}
    partial = set(encoding.outcomes) if {"parts", "spans"} & set(policy) else set()
    right = policy["overflow"] == "right"
    assert not placed & set(encoding.untrained) or right
    lonely = any(len(row) <= 1 for row in encoding.rows)
    assert set(encoding.outcomes) <= placed | set(encoding.untrained) | partial or lonely or not encoding.rows
    assert all(not policy["max_length"] or len(row) <= policy["max_length"] for row in encoding.rows)
    assert all(row.untrained == encoding.untrained for row in encoding.rows)
    assert all(OTHERS not in trained(row) for row in encoding.rows)
    if right:
        return
    seen = made.rendering(conversation).messages
    how: dict[str, Any] = {"tools": tools, "stop_ids": shared.stop_ids, "missing_stop": policy["missing_stop"]}
    if policy["overflow"] != "window" or not policy["max_length"]:
        how["untrained"] = set(encoding.untrained)
        found = violations(tokenizer, text, seen, encoding.rows, partial=partial, **how)
        # With turns cut or refused fewer rows are left than the outcomes tell of.
        assert not [what for what in found if "one row" not in what]
        return
    for row in encoding.rows:
        window = sorted({int(i) for i in row.messages if i >= 0})
        whole = Conversation(tuple(conversation.messages[i] for i in window), conversation.tools)
        turns = np.array([window.index(i) if i >= 0 else -1 for i in row.turns])
        inside = {window.index(i) for i in window if i in {int(j) for j in row.turns}}
        outcomes = ChatEncoder.load(shared, text, Policy(control_tokens="parity")).examine(whole).outcomes
        shown = Shown(row.input_ids, row.weights, turns, outcomes)
        out = {i for i, m in enumerate(whole.messages) if m.role == "assistant" and i not in inside}
        if partial:  # a turn of which no part is trained is in no row, and yet no turn that is left out
            out = {window.index(i) for i in encoding.untrained if i in window}
        how |= {"partial": set(range(len(window))) if partial else set(), "untrained": out}
        found = violations(tokenizer, text, made.rendering(whole).messages, [shown], **how)
        assert not [what for what in found if "one row" not in what], found


@pytest.mark.parametrize("overflow", CHOICES["overflow"])
def test_a_row_of_exactly_the_limit_fits(loaded: Loaded, overflow: str) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    n = len(examine(loaded, chat).rows[0])
    for length in (1, 2, n - 1, n, n + 1, 1000):
        encoding = examine(loaded, chat, max_length=length, overflow=overflow)
        assert bool(encoding.untrained) == (length < n)
        assert bool(encoding.rows) == (length >= n or overflow == "right")
        assert all(len(row) <= length for row in encoding.rows)
