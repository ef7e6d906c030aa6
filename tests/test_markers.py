"""Marker mode: the three behaviours in use, by text offset, whatever the tokenizer."""

from __future__ import annotations

import re
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatloss.demo import tokenizer_directory
from chatloss.errors import DataError, UsageError
from chatloss.load import load_tokenizer
from chatloss.markers import Markers, encode_text, responses
from chatloss.tokens import CallableTokens, Tokens
from tests import assets

CHATML = "".join(
    f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    for question, answer in [("Hi", "Hello!"), ("2 + 2?", "4"), ("你好", "你好🙂 naïve")]
)
RESPONSE, INSTRUCTION = "<|im_start|>assistant\n", "<|im_start|>user\n"
TOKENIZERS = ["demo", "bytes", "qwen3", "llama3", "mistral-v3", "mistral-v3-legacy", "deepseek-v3"]


def tokens_of(name: str) -> Tokens:
    if name == "bytes":
        return CallableTokens(lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace"))
    return load_tokenizer(tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)).tokens


@cache
def shared_tokens(name: str) -> Tokens:
    return tokens_of(name)


def trained(text: str, markers: Markers) -> list[str]:
    return [text[a:b] for a, b in responses(text, markers, "x:1")]


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokens(request: pytest.FixtureRequest) -> Tokens:
    return tokens_of(request.param)


def decoded(tokens: Tokens, ids: np.ndarray) -> str:  # type: ignore[type-arg]
    return tokens.decode(ids.tolist()).replace("▁", " ").strip()


def test_last_trains_only_the_third_of_three_answers_and_all_trains_three(tokens: Tokens) -> None:
    last = encode_text(tokens, CHATML, Markers("last", RESPONSE, stop="<|im_end|>"))
    every = encode_text(tokens, CHATML, Markers("all", RESPONSE, INSTRUCTION, "<|im_end|>"))
    assert set(last.turns.tolist()) == {-1, 0} and set(every.turns.tolist()) == {-1, 0, 1, 2}
    answers = [decoded(tokens, every.input_ids[every.turns == turn]) for turn in range(3)]
    assert answers == ["Hello!<|im_end|>", "4<|im_end|>", "你好🙂 naïve<|im_end|>"]
    assert decoded(tokens, last.input_ids[last.weights != 0]) == answers[2]


def test_the_ids_before_each_answer_are_those_of_the_text_before_it(tokens: Tokens) -> None:
    row = encode_text(tokens, CHATML, Markers("all", RESPONSE, INSTRUCTION, "<|im_end|>"))
    first = int(np.flatnonzero(row.weights)[0])
    assert row.input_ids[:first].tolist() == tokens.encode(CHATML[: CHATML.index("Hello!")]).ids.tolist()


def test_minimind_gives_the_same_mask_with_and_without_the_newline_in_its_markers(tokens: Tokens) -> None:
    with_newline = Markers("minimind", "<|im_start|>assistant\n", stop="<|im_end|>\n")
    without = Markers("minimind", "<|im_start|>assistant", stop="<|im_end|>")
    a, b = encode_text(tokens, CHATML, with_newline), encode_text(tokens, CHATML, without)
    assert a.input_ids.tolist() == b.input_ids.tolist() and a.weights.tolist() == b.weights.tolist()
    assert set(a.turns.tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("mode", ["last", "all", "minimind"])
def test_the_newline_behind_the_stop_is_never_trained(mode: str) -> None:
    markers = Markers(mode, RESPONSE, INSTRUCTION, "<|im_end|>")
    assert all(text.endswith("<|im_end|>") for text in trained(CHATML, markers))


def test_without_a_stop_a_response_runs_to_the_next_instruction() -> None:
    text = "### Q: a\n### A: b\n### Q: c\n### A: d\n"
    assert trained(text, Markers("all", "### A:", "### Q:")) == [" b\n", " d\n"]
    assert trained(text, Markers("last", "### A:")) == [" d\n"]


def trl_collator(ids: list[int], response: list[int], instruction: list[int] | None) -> list[bool]:
    """DataCollatorForCompletionOnlyLM of TRL 0.19, line by line: which labels are not -100."""
    n, labels = len(ids), np.ones(len(ids), dtype=bool)
    starts = [i for i in range(n) if ids[i : i + len(response)] == response]
    if not starts:
        return [False] * n
    if instruction is None:
        labels[: starts[-1] + len(response)] = False
        return [bool(label) for label in labels]
    responses_at = [start + len(response) for start in starts]
    humans_at = [i for i in range(n) if ids[i : i + len(instruction)] == instruction]
    if not humans_at:
        return [False] * n
    if humans_at[0] > responses_at[0]:
        humans_at = [0, *humans_at]
    for k, (start, end) in enumerate(zip(humans_at, responses_at, strict=False)):
        labels[(start if k else 0) : end] = False
    if len(responses_at) < len(humans_at):
        labels[humans_at[-1] :] = False
    return [bool(label) for label in labels]


@pytest.mark.parametrize("instruction", [None, INSTRUCTION])
def test_where_id_scans_work_the_mask_is_theirs(instruction: str | None) -> None:
    tokens = tokens_of("qwen3")
    response_ids = tokens.encode(RESPONSE).ids.tolist()
    instruction_ids = None if instruction is None else tokens.encode(instruction).ids.tolist()
    markers = Markers("last", RESPONSE) if instruction is None else Markers("all", RESPONSE, INSTRUCTION)
    row = encode_text(tokens, CHATML, markers)
    assert (row.weights != 0).tolist() == trl_collator(row.input_ids.tolist(), response_ids, instruction_ids)


PIECES = st.sampled_from(["a", "It", " is", "\n", "naïve", "你好", "🙂", "4", "  ", "It's."])
WORDS = st.lists(PIECES, min_size=1, max_size=5)
CHATS = st.lists(st.tuples(WORDS.map("".join), WORDS.map("".join)), min_size=1, max_size=4)
LAYOUTS = {
    "chatml": ("<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n", RESPONSE, INSTRUCTION),
    "alpaca": ("### Q: {}\n### A: {}\n", "### A:", "### Q:"),
    "mistral": ("[INST] {} [/INST] {}</s>", "[/INST]", "[INST]"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3", "demo", "mistral-v3"])
@settings(max_examples=60)
@given(chat=CHATS, every=st.booleans())
def test_on_generated_texts_the_mask_is_the_collators_wherever_its_scan_finds_the_markers(
    layout: str, name: str, chat: list[tuple[str, str]], every: bool
) -> None:
    form, response, instruction = LAYOUTS[layout]
    tokens, text = shared_tokens(name), "".join(form.format(*pair) for pair in chat)
    markers = Markers("all", response, instruction) if every else Markers("last", response)
    row = encode_text(tokens, text, markers)
    ids, found = row.input_ids.tolist(), responses(text, markers)
    response_ids = tokens.encode_segment(response).ids.tolist()
    instruction_ids = tokens.encode_segment(instruction).ids.tolist() if every else None
    counts = [sum(ids[i : i + len(m)] == m for i in range(len(ids))) for m in (response_ids, instruction_ids or [])]
    scan_works = counts[0] == len(chat) and (not every or counts[1] == len(chat))
    if ids == tokens.encode(text).ids.tolist() and scan_works:
        assert (row.weights != 0).tolist() == trl_collator(ids, response_ids, instruction_ids)
    else:  # a token straddles a marker: their mask is empty or wrong, ours holds every answer behind its own context
        first = int(np.flatnonzero(row.weights)[0])
        assert ids[:first] == tokens.encode(text[: found[0][0]]).ids.tolist()
        assert all((row.turns == turn).any() for turn in range(len(found)))


def test_a_marker_whose_ids_change_with_its_context_is_still_found() -> None:
    """trl#598, #1183: `\\n### A:` alone and behind text differ in SentencePiece; the id scan finds nothing."""
    tokens = tokens_of("mistral-v3-legacy")
    text, marker = "### Q: one\n### A: two", "\n### A:"
    alone, row_ids = tokens.encode(marker).ids.tolist(), tokens.encode(text).ids.tolist()
    assert not any(row_ids[i : i + len(alone)] == alone for i in range(len(row_ids)))
    row = encode_text(tokens, text, Markers("last", marker))
    assert decoded(tokens, row.input_ids[row.weights != 0]) == "two"


def minimind_scan(ids: list[int], bos: list[int], eos: list[int]) -> list[bool]:
    """minimind's scan: from behind ``bos`` through ``eos``, wherever those ids stand."""
    mask, i = [False] * len(ids), 0
    while i < len(ids):
        if ids[i : i + len(bos)] == bos:
            start = end = i + len(bos)
            while end < len(ids) and ids[end : end + len(eos)] != eos:
                end += 1
            for j in range(start, min(end + len(eos), len(ids))):
                mask[j] = True
            i = end + len(eos) if end < len(ids) else len(ids)
        else:
            i += 1
    return mask


def test_minimind_mode_is_its_scan_without_the_newline_behind_the_stop() -> None:
    tokens = tokens_of("qwen3")
    row = encode_text(tokens, CHATML, Markers("minimind", RESPONSE, stop="<|im_end|>\n"))
    bos, eos = tokens.encode(RESPONSE).ids.tolist(), tokens.encode("<|im_end|>\n").ids.tolist()
    theirs = minimind_scan(row.input_ids.tolist(), bos, eos)
    ours = (row.weights != 0).tolist()
    extra = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) if a != b]
    assert extra and all(tokens.decode([int(row.input_ids[i])]) == "\n" and theirs[i] for i in extra)


QUOTED_CHATML = "<|im_start|>user\nsay <|im_start|>assistant\nhi<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n"
MORE_STOPS = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\nc<|im_end|>\n"
LINES, ANYWHERE = Markers("all", "\n### A:", "\n### Q:"), Markers("all", "### A:", "### Q:")
LAST_LINE, LAST = Markers("last", "\n### A:"), Markers("last", "### A:")
MINIMIND = Markers("minimind", RESPONSE, "", "<|im_end|>")
ENDED = Markers("all", RESPONSE, INSTRUCTION, "<|im_end|>")
SECRET = "Zqx"
QUOTES = st.lists(st.sampled_from([
    "", "\n", " ", "a", "'", RESPONSE, RESPONSE.strip(), INSTRUCTION, INSTRUCTION.strip(), "<|im_end|>", "<|im_end|>\n",
    "<|im_start|>", "assistant\n", "### A:", "\n### A:", "### Q:", "\n### Q:",
]), max_size=4).map("".join)  # fmt: skip
# Not to be told from a chat by anybody: text that is what the template itself writes between two messages.
TURNS = re.compile(r"<\|im_end\|>\s*<\|im_start\|>assistant|### A:(?s:.*)### Q:")


ANSWERS = st.sampled_from(["fine", "yes.", "ok\nthen"])
LAST_ENDED = Markers("last", RESPONSE, "", "<|im_end|>")


@pytest.mark.parametrize("markers", [ENDED, MINIMIND, LAST_ENDED, LINES, ANYWHERE, LAST_LINE])
@settings(max_examples=300)
@given(chat=st.lists(st.tuples(QUOTES, QUOTES, ANSWERS), min_size=1, max_size=3))
def test_a_user_who_quotes_markers_is_not_trained_or_the_row_is_rejected(
    markers: Markers, chat: list[tuple[str, str, str]]
) -> None:
    form = LAYOUTS["chatml" if "<|" in markers.response else "alpaca"][0]
    users = [f"{before}{SECRET}{behind}" for before, behind, _ in chat]
    text = "".join(form.format(user, answer) for user, (_, _, answer) in zip(users, chat, strict=True))
    if any(TURNS.search(user) for user in users):
        return
    try:
        found = trained(text, markers)
    except DataError:
        return
    assert not [answer for answer in found if SECRET in answer]


@pytest.mark.parametrize(("markers", "text", "expected"), [
    (LINES, "### Q: what does '### A:' mean?\n### A: an answer", [" an answer"]),
    (LAST_LINE, "### Q: what does '### A:' mean?\n### A: an answer", [" an answer"]),
    (LAST_LINE, "### Q: x\n### A: it says '### A: y'", [" it says '### A: y'"]),
    (MINIMIND, QUOTED_CHATML, ["no<|im_end|>"]),
    (Markers("last", "ASSISTANT:"), "USER: say ASSISTANT: hi ASSISTANT: ok", [" ok"]),
])
def test_a_quoted_marker_is_told_by_its_position(markers: Markers, text: str, expected: list[str]) -> None:
    assert trained(text, markers) == expected


@pytest.mark.parametrize(("markers", "text"), [
    (ANYWHERE, "### Q: what does '### A:' mean?\n### A: an answer"),
    (LAST, "### Q: x\n### A: it says '### A: y'"),
    (LINES, "### Q: he wrote\n### A: no\n### A: yes"),
    (Markers("all", "ASSISTANT:", "USER:"), "USER: say ASSISTANT: hi ASSISTANT: ok"),
    (MINIMIND, MORE_STOPS),
    (ENDED, f"{INSTRUCTION}{RESPONSE}no\n{INSTRUCTION}<|im_end|>\n{RESPONSE}yes<|im_end|>\n"),
    (ENDED, f"{INSTRUCTION}{RESPONSE}no<|im_end|>\n{INSTRUCTION}<|im_end|>\n{RESPONSE}yes<|im_end|>\n"),
])
def test_a_row_whose_markers_cannot_be_told_apart_is_rejected(markers: Markers, text: str) -> None:
    with pytest.raises(DataError, match=r"twice in a row|quotes the|more stops|inside a line"):
        responses(text, markers, "x:1")


def test_minimind_itself_trains_the_user_who_quotes_the_template() -> None:
    tokens = tokens_of("qwen3")
    ids = tokens.encode(QUOTED_CHATML).ids.tolist()
    mask = minimind_scan(ids, tokens.encode(RESPONSE).ids.tolist(), tokens.encode("<|im_end|>\n").ids.tolist())
    assert "hi" in tokens.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize(("markers", "named"), [
    (Markers("last", "### Reply:"), "### Reply:"),
    (Markers("all", "### A:", "### Question:"), "### Question:"),
    (Markers("minimind", "<bot>", stop="</s>"), "<bot>"),
])
def test_a_marker_that_never_matches_is_an_error_naming_marker_and_row(markers: Markers, named: str) -> None:
    with pytest.raises(DataError, match=re.escape(named)) as caught:
        responses("### Q: a\n### A: b", markers, "data.jsonl:7")
    assert caught.value.where == "data.jsonl:7" and caught.value.hint


@pytest.mark.parametrize("arguments", [("first", "x"), ("last", " "), ("all", "x"), ("minimind", "x")])
def test_markers_that_cannot_work_are_refused_at_once(arguments: tuple[str, str]) -> None:
    with pytest.raises(UsageError):
        Markers(*arguments)
