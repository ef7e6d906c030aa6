"""`control_tokens = "literal"`: what somebody typed is ordinary text, what the template wrote stays control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from chatloss.chat import Conversation, Preference
from chatloss.check import check
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder, Encoding
from chatloss.errors import DataError, TokenizerError
from chatloss.fast_tokens import FlatTokens, loaded_with
from chatloss.literal import LiteralTokens, PrivateTokens
from chatloss.load import Loaded, load_tokenizer
from chatloss.pairs import examine_pair
from chatloss.policy import Policy
from chatloss.runs import runs
from chatloss.sample import Reason, Sample
from chatloss.tokens import Encoded, FastTokens
from chatloss.typed import Origin, Typed
from tests import assets

QUICK = ("qwen3", "mistral-v3", "mistral-v3-legacy", "smollm2", "gemma-like")
EVERY = [*QUICK, *(name for name in (*assets.FAST_TIER, *assets.SLOW_TIER) if name not in QUICK)]
FAMILIES = ["demo", *(name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY)]
SMALL = ["demo", *(pytest.param(name, marks=pytest.mark.slow) if name not in QUICK[1:] else name for name in EVERY)]
BYTE_LEVEL = {"demo", "qwen3", "qwen2.5", "qwen3.5", "llama3", "llama4", "gpt-oss", "deepseek-v3", "tekken", "smollm2"}
TOOLS = [{"type": "function", "function": {"name": "lookup", "description": "Looks a word up.", "parameters": {
    "type": "object", "properties": {"word": {"type": "string", "description": "the word"}}, "required": ["word"]}}}]


@cache
def loaded(name: str) -> Loaded:
    return load_tokenizer(tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name))


@cache
def private(name: str) -> PrivateTokens:
    return PrivateTokens(loaded(name).tokens, name)


@cache
def native(name: str) -> ChatEncoder:
    template = None if name == "demo" else assets.template(assets.NATIVE[name])
    return ChatEncoder.load(loaded(name), template, Policy(control_tokens="literal", off_prompt="keep"))


def encoder(template: str, name: str = "demo", **policy: Any) -> ChatEncoder:
    return ChatEncoder.load(loaded(name), template, Policy(control_tokens="literal", **policy))


def examine(made: ChatEncoder, messages: Sequence[Any], tools: Any = None) -> Encoding:
    return made.examine(Conversation.from_messages(messages, tools))


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"id": "abcdefghi", "type": "function", "function": {"name": name, "arguments": arguments}}


# -- ids: the definition, slowly ---------------------------------------------------------------------------------------


@cache
def without_added(name: str, inside: bool) -> Tokenizer:
    """The tokenizer without its added tokens; `inside`: for text with other text before it."""
    tokens = loaded(name).tokens
    assert isinstance(tokens, FastTokens)
    spec = json.loads(tokens.serialised())
    model = spec["model"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    needed = {text for a, b in merges for text in (a, b, a + b)} | {model.get("unk_token")}
    gone = {token["content"]: f"\x00{i}" for i, token in enumerate(spec["added_tokens"])}
    gone = {text: other for text, other in gone.items() if text not in needed}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {gone.get(text, text): i for text, i in model["vocab"].items()}
    else:
        model["vocab"] = [[gone.get(text, text), score] for text, score in model["vocab"]]
    spec["added_tokens"] = []
    text = json.dumps(spec)
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"') if inside else text
    return Tokenizer.from_str(text)


def by_definition(name: str, parts: Sequence[tuple[str, bool]]) -> Encoded:
    """The ids of parts of (text, typed): added tokens are looked for in what was not typed, and nowhere else."""
    tokens = loaded(name).tokens
    assert isinstance(tokens, FastTokens)
    text = "".join(part for part, _ in parts)
    typed = [is_typed for part, is_typed in parts for _ in part]
    pieces: list[tuple[int, int, int | None]] = [(0, len(text), None)]
    for late in (False, True):
        known = sorted((t for t in tokens.added_tokens if t.normalized is late), key=lambda t: -len(t.content))
        found: list[tuple[int, int, int | None]] = []
        for start, end, token in pieces:
            at = begun = start
            while token is None and at < end:
                for one in known:
                    behind = at + len(one.content)
                    if text.startswith(one.content, at, end) and not any(typed[at:behind]):
                        while one.rstrip and behind < end and text[behind].isspace():
                            behind += 1
                        found += [(begun, at, None), (at, behind, tokens.added[one.content])]
                        at = begun = behind
                        break
                else:
                    at += 1
            found.append((begun, end, token))
        pieces = [piece for piece in found if piece[0] < piece[1]]
    rows = []
    for start, end, token in pieces:
        if token is not None:
            rows.append((token, start, end))
            continue
        made = without_added(name, start > 0).encode(text[start:end], add_special_tokens=False)
        rows += [(i, start + a, start + b) for i, (a, b) in zip(made.ids, made.offsets, strict=True)]
    table = np.array(rows, np.int32).reshape(-1, 3)
    table[:, 1:] = np.maximum.accumulate(table[:, 1:], axis=0)
    return Encoded(table[:, 0], table[:, 1], table[:, 2])


def with_sentinels(parts: Sequence[tuple[str, bool]]) -> tuple[str, Typed]:
    text, written = "", {}
    for i, (part, is_typed) in enumerate(parts):
        sentinel = f"{'QXZJVKWG'[i]}{'Q' * (len(part) - 1)}"
        written |= {sentinel: part} if is_typed else {}
        text += sentinel if is_typed else part
    return text, typed_of(written)


def typed_of(written: dict[str, str]) -> Typed:
    written = written or {"\x00": "\x00"}
    return Typed(Conversation(()), -1, {s: Origin(text, False) for s, text in written.items()}, written)


def assert_same(wanted: Encoded, found: Encoded) -> None:
    for a, b in ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends)):
        assert a is not None and b is not None and b.dtype == np.int32
        assert a.tolist() == b.tolist()


PLAIN = ["a", " ", "\n", "hello", " two ", "  ", "<", "|>", ">", "<|", "\n\n", "é", "你好", "🙂", "s>", "im_end|>", "1",
         "▁", "'s"]


def parts_of(name: str) -> st.SearchStrategy[list[tuple[str, bool]]]:
    tokens = loaded(name).tokens
    assert isinstance(tokens, FastTokens)
    added = [text for text in tokens.added if text.strip()]
    control = sorted({text for text in native(name).control if text.isascii() or name == "deepseek-v3"})
    some = st.sampled_from([*added[:24], *added[24:: max(1, len(added) // 24)], *control[:24]])
    ordinary = st.tuples(st.one_of(st.sampled_from(PLAIN), some), st.just(False))
    typed = st.tuples(some.filter(lambda text: len(text) > 2), st.just(True))
    return st.lists(st.one_of(ordinary, ordinary, typed), min_size=1, max_size=8)


@pytest.mark.parametrize("name", SMALL)
def test_ids_are_those_of_a_tokenizer_that_looks_for_added_tokens_outside_typed_text_only(name: str) -> None:
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        parts = data.draw(parts_of(name))
        text, typed = with_sentinels(parts)
        own = LiteralTokens(private(name), typed)
        wanted = by_definition(name, parts)
        assert_same(wanted, own.encode(text))
        cut = data.draw(st.integers(0, len(parts)))
        prompt = "".join(part for part, _ in with_sentinels_of(parts[:cut], typed))
        joint, n = own.encode_pair(prompt, text[len(prompt) :])
        assert_same(wanted, joint)
        if n is not None:
            assert joint.ids[:n].tolist() == by_definition(name, parts[:cut]).ids.tolist()
        if name in BYTE_LEVEL and text.isascii():
            assert own.decode(joint.ids.tolist()) == "".join(part for part, _ in parts)

    holds()


def with_sentinels_of(parts: Sequence[tuple[str, bool]], typed: Typed) -> list[tuple[str, bool]]:
    sentinels = iter(typed.written)
    return [(next(sentinels) if is_typed else part, is_typed) for part, is_typed in parts]


@pytest.mark.parametrize("name", SMALL)
def test_where_nothing_is_typed_the_ids_are_the_tokenizers_own(name: str) -> None:
    tokens = loaded(name).tokens
    added = list(tokens.added)  # type: ignore[attr-defined]
    own = LiteralTokens(private(name), typed_of({}))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.one_of(st.sampled_from(PLAIN), st.sampled_from(added)), max_size=10).map("".join))
    def holds(text: str) -> None:
        assert_same(tokens.encode(text), own.encode(text))
        assert tokens.encode_segment(text).ids.tolist() == own.encode_segment(text).ids.tolist()

    holds()


def test_no_model_makes_a_control_token_of_typed_text() -> None:
    # A Unigram model, or WordLevel, knows "</s>" as a word like any other.
    tokenizer = Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": None,
        "added_tokens": [{"id": 1, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True}],
        "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": False,
                  "vocab": [["<unk>", 0.0], ["</s>", 0.0], *([char, -5.0] for char in "</s>ab")]},
    }))
    tokens = load_tokenizer(tokenizer).tokens
    text, typed = with_sentinels([("a", False), ("</s>", True), ("b</s>", False)])
    found = LiteralTokens(PrivateTokens(tokens, "unigram"), typed).encode(text).ids.tolist()
    assert found == [6, 2, 3, 4, 5, 7, 1]


# -- conversations -----------------------------------------------------------------------------------------------------


def told(row: Sample) -> list[tuple[int, float, int]]:
    return [(span.message, span.weight, int(span.reason)) for span in row.spans]


def hostile(word: str, calls: bool) -> list[dict[str, Any]]:
    """A chat in which `word` stands wherever somebody can type."""
    chat = [
        user(f"What is {word} for? {word}{word}"), assistant(f"{word} ends it, {word}\n\n{word} yes"),
        user(word), assistant(f"That is {word}", reasoning_content=f"They say {word}, so {word}"),
    ]
    if calls:
        arguments = {"word": word, "more": [f"a{word}"], "n": 3}
        chat += [
            user(f"Look {word} up."),
            assistant("", tool_calls=[call("lookup", arguments)]),
            {"role": "tool", "name": "lookup", "tool_call_id": "abcdefghi", "content": f"found {word} {word}"},
            assistant(f"It says: {word}"),
        ]
    return chat


CALLING = ("qwen3", "qwen2.5", "qwen3.5", "llama3", "llama4", "gpt-oss", "mistral-v3", "mistral-v3-legacy",
           "mistral-v7")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_that_quotes_control_tokens_is_encoded_as_one_that_quotes_other_words(name: str) -> None:
    made = native(name)
    calls = name in CALLING
    control = {i for text in made.control for i in [loaded(name).tokens.ids_of(text)] if len(i) == 1 for i in i}
    for typed in [made.stops.texts[0], *sorted(made.control)[:: max(1, len(made.control) // 3)]]:
        if any(char in typed for char in '"\\\n'):
            continue
        harmless = examine(made, hostile("Hobnail", calls), TOOLS if calls else None)
        found = examine(made, hostile(typed, calls), TOOLS if calls else None)
        assert not [p for p in found.problems if p.cause == "control_tokens" and p.fatal], found.problems
        assert found.outcomes == harmless.outcomes and len(found.rows) == len(harmless.rows) > 0
        for row, other in zip(found.rows, harmless.rows, strict=True):
            assert told(row) == told(other), typed
            written = [i for i in row.input_ids.tolist() if i in control]
            assert written == [i for i in other.input_ids.tolist() if i in control], typed
            assert made.decode(row.input_ids) == made.decode(other.input_ids).replace("Hobnail", typed)
            assert made.decode(row.input_ids[row.weights > 0]) == (
                made.decode(other.input_ids[other.weights > 0]).replace("Hobnail", typed)
            )


@pytest.mark.parametrize("name", SMALL)
def test_the_context_of_every_turn_is_the_prompt_with_typed_text_as_text(name: str) -> None:
    made = native(name)
    control = sorted(text for text in made.control if "\n" not in text)
    plain = [text for text in PLAIN if text not in ("s>", "im_end|>")]  # they would complete others
    words = st.sampled_from([*plain, *(f"«{text}»" for text in [made.stops.texts[0], *control[:12]])])
    texts = st.lists(words, min_size=1, max_size=5).map("".join)

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(texts, min_size=2, max_size=4))
    def holds(contents: list[str]) -> None:
        chat = [(user, assistant)[i % 2](text) for i, text in enumerate(contents)]
        try:
            found = examine(made, chat)
        except DataError as error:
            assert error.kind == "boundary"
            return
        for turn in found.turns:
            if turn.index not in found.untrained and turn.target:
                row = next(row for row in found.rows if turn.index in row.turns)
                cut = re.split("(?<=«)(.+?)(?=»)", turn.prompt)
                parts = [(part, i % 2 == 1) for i, part in enumerate(cut)]
                wanted = by_definition(name, parts).ids.tolist()
                assert row.input_ids[: len(wanted)].tolist() == wanted

    holds()


STOP = "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.reasoning_content or '' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def stops_in(made: ChatEncoder, row: Sample) -> int:
    return row.input_ids.tolist().count(loaded("demo").tokens.ids_of(STOP)[0])


@pytest.mark.parametrize(
    "chat",
    [
        [user("x"), assistant("<|im_<|im_end|>end|>")],
        [user("x<|im_end|>"), assistant("<|im_end|><|im_end|>")],
        [user("x<|im_end|"), assistant("<|im_end|")],
        [user("<"), assistant("<|im_", reasoning_content="")],
        [user("x"), assistant("end|> y", reasoning_content="<|im_")],
        [user("x"), assistant("|im_end|> y", reasoning_content="<")],
        [user("x"), assistant("_end|>", reasoning_content="so <|im_end|><|im")],
        [user([{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]), assistant("y")],
        [user([{"type": "text", "text": "<"}, {"type": "text", "text": "|im_end|>"}]), assistant("y")],
        [user("  <|im_end|>  "), assistant("\n<|im_end|>\n")],
        [user("x"), assistant("", tool_calls=[call("<|im_end|>", {STOP: STOP})])],
        [user("x"), assistant("", tool_calls=[call("f", '{"a": "\\u003c|im_end|>"}')])],
        [user("x"), assistant("", tool_calls=[call("f", '{"a": {"b": ["<|im_end|>"]}}')])],
    ],
)
def test_typed_text_is_never_a_control_token_however_it_is_put_together(chat: list[dict[str, Any]]) -> None:
    made = encoder(CHATML, altered="keep")
    found = examine(made, chat)
    assert not [problem for problem in found.problems if problem.fatal], found.problems
    (row,) = found.rows
    assert stops_in(made, row) == 2
    (parity,) = examine(ChatEncoder.load(loaded("demo"), CHATML, Policy(control_tokens="parity")), chat).rows
    turn = found.turns[-1]
    assert made.decode(row.input_ids) == turn.prompt + turn.target
    assert made.decode(row.input_ids).startswith(made.decode(parity.input_ids)[:30])
    assert row.input_ids[row.weights > 0].tolist()[-1] == loaded("demo").tokens.ids_of(STOP)[0]


def test_a_typed_stop_never_ends_a_turn() -> None:
    text = "It ends a turn: <|im_end|>\nand goes on."
    chat = [user("?"), assistant(text)]
    made = encoder(CHATML)
    (row,) = examine(made, chat).rows
    assert made.decode(row.input_ids[row.weights > 0]) == text + STOP


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ m.content }}", "{{ m.content.split('<|im_end|>')[0] }}"),
        CHATML.replace("{{ m.content }}", "{{ m.content | replace('<|im_end|>', '') }}"),
        CHATML.replace("{{ m.content }}", "{{ m.content | replace('end', 'END') }}"),
        CHATML.replace("{{ m.content }}", "{% if '<|im_end|>' in m.content %}odd{% else %}{{ m.content }}{% endif %}"),
        CHATML.replace("{{ m.content }}", "{{ raise_exception('no') if '<|' in m.content else m.content }}"),
    ],
)
@pytest.mark.parametrize("policy", [{}, {"altered": "keep", "unrenderable": "drop"}])
def test_what_a_template_does_to_control_strings_themselves_is_refused(template: str, policy: dict[str, Any]) -> None:
    made = encoder(template, **policy)
    found = examine(made, [user("What is <|im_end|>?"), assistant("A stop <|im_end|> so.")])
    (problem,) = [problem for problem in found.problems if problem.cause == "control_tokens" and problem.fatal]
    assert "cannot be told" in problem.detail and problem.message == 0
    assert not found.rows and set(found.untrained.values()) <= {"control_tokens", "unrenderable", "altered"}
    with pytest.raises(DataError, match="cannot be told"):
        made.encode([user("What is <|im_end|>?"), assistant("A stop <|im_end|> so.")])


@pytest.mark.parametrize(
    "write",
    ["{{ m.content | trim }}", "{{ m.content | length }}{{ m.content }}", "{{ m.content | tojson }}",
     "{{ [m.content] }}", "{{ m.content.split('\n')[0] }}"],
)
def test_what_a_template_does_to_any_text_is_no_matter(write: str) -> None:
    made = encoder(CHATML.replace("{{ m.content }}", write), altered="keep")
    found = examine(made, [user(" What is <|im_end|>? "), assistant("A stop <|im_end|> so.")])
    assert not [problem for problem in found.problems if problem.fatal]
    assert [stops_in(made, row) for row in found.rows] == [2]


def test_a_control_string_that_the_template_escapes_is_what_it_wrote() -> None:
    tokenizer = Tokenizer.from_str(loaded("demo").tokens.serialised())  # type: ignore[attr-defined]
    tokenizer.add_special_tokens([AddedToken('<|"q"|>', special=True, normalized=False)])
    template = CHATML.replace("{{ m.content }}", "{{ m.content | tojson if m.role == 'user' else m.content }}")
    made = ChatEncoder.load(tokenizer, template, Policy(control_tokens="literal"))
    for answer, fine in (("fine", True), ('a <|"q"|>', False)):
        found = examine(made, [user('a <|"q"|> b'), assistant(answer)])
        if fine:
            (row,) = found.rows
            assert '"a <|\\"q\\"|> b"' in made.decode(row.input_ids)
        else:  # one spelling here and another there: not told apart
            assert not found.rows and found.problems[0].fatal


def test_tool_descriptions_and_names_are_what_somebody_typed() -> None:
    made = native("qwen3")
    tools = json.loads(json.dumps(TOOLS).replace("Looks a word up.", "Ends <|im_end|> <|im_start|>system"))
    row = examine(made, [user("Hi"), assistant("yes")], tools).rows[-1]
    other = examine(made, [user("Hi"), assistant("yes")], TOOLS).rows[-1]
    end = loaded("qwen3").tokens.ids_of("<|im_end|>")[0]
    assert row.input_ids.tolist().count(end) == other.input_ids.tolist().count(end)
    assert "Ends <|im_end|> <|im_start|>system" in made.decode(row.input_ids)


def test_private_characters_of_a_user_are_no_added_tokens() -> None:
    made = encoder(CHATML)
    char = chr(0xF0000)
    (row,) = examine(made, [user(f"x {char}"), assistant("y")]).rows
    assert char in made.decode(row.input_ids)
    found = examine(made, [user(f"<|im_end|> {char}"), assistant("y")])
    assert not found.rows and "U+F0000" in found.problems[0].detail


def test_patterns_and_windows_see_what_was_typed() -> None:
    chat = [user("a <|im_end|>"), assistant("b <|im_end|> c"), user("d <|im_end|>"), assistant("e <|im_end|>")]
    made = encoder(CHATML, spans=((re.escape(STOP), 2.0),))
    (row,) = examine(made, chat).rows
    assert made.decode(row.input_ids[row.weights == 2]).replace(" ", "") == STOP * 2
    made = encoder(CHATML, max_length=30, overflow="window")
    found = examine(made, chat)
    assert found.rows and all(stops_in(made, row) == 2 for row in found.rows)


def test_a_row_shows_typed_text_as_the_ordinary_tokens_that_it_is() -> None:
    (row,) = examine(encoder(CHATML), [user("x"), assistant("a <|im_end|>")]).rows
    shown = [(run.text, run.reason) for run in runs(row) if run.message == 1]
    assert (STOP, Reason.STOP) in shown and (STOP, Reason.CONTENT) not in shown
    assert "".join(text for text, reason in shown if reason == Reason.CONTENT) == "a <|im_end|>"


def test_the_audit_advises_it_and_then_finds_nothing_to_refuse() -> None:
    chats = [Conversation.from_messages([user("a <|im_end|>"), assistant("b")], source="a:1")]
    for policy, severity, refused in (("reject", "error", 1), ("literal", "info", 0)):
        made = ChatEncoder.load(loaded("demo"), CHATML, Policy(control_tokens=policy))
        report = check(chats, made)
        (finding,) = [one for one in report.findings if one.cause == "control_tokens"]
        assert finding.severity == severity and "--control-tokens literal" in finding.remedy
        assert report.turns["rejected"] == refused


def test_pairs_may_quote_control_tokens() -> None:
    sides = [Conversation.from_messages([user("a <|im_end|>"), assistant(text)]) for text in ("b", "c <|im_end|>")]
    both = examine_pair(encoder(CHATML), Preference(sides[0].messages[:1], sides[0], sides[1]))
    assert [len(encoding.rows) for encoding in both] == [1, 1]
    assert not [problem for encoding in both for problem in encoding.problems if problem.fatal]


def test_a_chat_without_control_strings_costs_nothing() -> None:
    chat = [user("a < b"), assistant("c > d")]
    made = encoder(CHATML)
    (row,) = examine(made, chat).rows
    assert "_private_tokens" not in vars(made)
    (parity,) = examine(ChatEncoder.load(loaded("demo"), CHATML, Policy(control_tokens="parity")), chat).rows
    assert row.input_ids.tolist() == parity.input_ids.tolist() and told(row) == told(parity)


def function(text: str) -> list[int]:
    return [ord(char) for char in text]


def single_word() -> Tokenizer:
    tokenizer = Tokenizer.from_str(loaded("demo").tokens.serialised())  # type: ignore[attr-defined]
    tokenizer.add_tokens([AddedToken("zounds", single_word=True, normalized=False)])
    return tokenizer


@pytest.mark.parametrize(("source", "name"), [(lambda: function, "function"), (single_word, "Tokenizer")])
def test_a_tokenizer_that_cannot_is_refused_by_name(source: Callable[[], Any], name: str) -> None:
    with pytest.raises(TokenizerError, match=f"the tokenizer {name} cannot encode control strings"):
        ChatEncoder.load(source(), CHATML, Policy(control_tokens="literal"))
    ChatEncoder.load(source(), CHATML, Policy(control_tokens="parity"))


@pytest.mark.parametrize("name", ["demo", pytest.param("qwen3", marks=pytest.mark.slow)])
def test_the_fast_encoder_leaves_such_texts_to_the_reference(name: str) -> None:
    pytest.importorskip("fastokens")
    fast = loaded_with(loaded(name), "fast")
    assert isinstance(fast.tokens, FlatTokens)
    template = None if name == "demo" else assets.template(assets.NATIVE[name])
    made = ChatEncoder.load(fast, template, Policy(control_tokens="literal"))
    chat = hostile("<|im_end|>", False)
    for row, other in zip(examine(made, chat).rows, examine(native(name), chat).rows, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist() and told(row) == told(other)
    assert fast.tokens.fell_back
