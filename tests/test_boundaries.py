"""Where the prompt ends and the answer begins: no token straddles it, and nothing is written between the two."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import Unigram

from chatloss.chat import Conversation
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import TemplateError, TokenizerError
from chatloss.load import Loaded, load_tokenizer
from chatloss.policy import Policy
from chatloss.sample import Reason, Sample
from chatloss.tokens import CallableTokens, FastTokens
from tests import assets

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINK = (
    "{% for m in messages %}{% if m.role == 'user' %}Q: {{ m.content }}\n{% else %}A: <think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A: <think>\n{% endif %}"
)
ENDS = [
    *("assistant\n", "### Solution: ", "### Solution:", "Answer: e", "<think>\n", "x\n\n", " ", "  \n ", "\t", "1", "'"),
    *("<|", "é", "e\u0301", "🙂", "你", "\r", "▁", ""),
]
ANSWERS = [
    *("\nfoo", "It", "It is", " It", "  It", "\n\n\nx", "\u0301a", "4", "'s fine", "ssistant", "|im_end|>", "\n", "🙂 naïve"),
    *("好", "\u200dx", "▁x", "", " ", "naïve\n", "\u0301", "\u3000x", "ﬁ"),
]


def plain(end: str, stop: str) -> str:
    """A template that writes `end` behind what the user says and `stop` behind an answer."""
    return "{%% for m in messages %%}{{ m.content }}{{ %r if m.role == 'user' else %r }}{%% endfor %%}" % (end, stop)


@cache
def load(name: str) -> Loaded:
    return load_tokenizer(tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name))


def conversation(*contents: str, **more: Any) -> Conversation:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return Conversation.from_messages([*messages[:-1], {**messages[-1], **more}])


def encode(loaded: Loaded, template: str, chat: Conversation, **policy: Any) -> list[Sample]:
    encoder = ChatEncoder.load(loaded, template, Policy(control_tokens="parity", **policy))
    encoding = encoder.examine(chat)
    assert set(encoding.outcomes.values()) <= {"exact", "split"}, encoding.problems
    for turn in encoding.turns:
        (row,) = [row for row in encoding.rows if turn.index in row.turns]
        context = loaded.tokens.encode(turn.prompt).ids.tolist()
        places = np.flatnonzero(row.turns == turn.index)
        n = len(context)
        assert row.input_ids[:n].tolist() == context, "the context is not what an engine holds"
        assert places[0] == max(n, 1) and places[-1] - places[0] == len(places) - 1
    return encoding.rows


def parts(row: Sample) -> tuple[list[int], list[int]]:
    """(ids before the last trained turn, its ids)."""
    places = np.flatnonzero(row.turns == row.turns.max())
    return row.input_ids[: places[0]].tolist(), row.input_ids[places].tolist()


def texts(loaded: Loaded, ids: Sequence[int]) -> list[str | None]:
    return [loaded.tokens.token_text(i) for i in ids]


# -- the cases that tokenizers are known for -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "llama3", "gpt-oss", "deepseek-v3", "demo"])
def test_a_newline_that_begins_an_answer_does_not_merge_with_the_header(family: str) -> None:
    loaded = load(family)
    (row,) = encode(loaded, CHATML, conversation("Go", "\nfoo"))
    context, target = parts(row)
    assert loaded.tokens.decode(context).endswith("assistant\n")
    assert loaded.tokens.decode(target) == "\nfoo<|im_end|>"
    joint = loaded.tokens.encode(loaded.tokens.decode(context + target)).ids.tolist()
    assert joint[: len(context)] != context, "this tokenizer does not merge newlines: the case shows nothing"


@pytest.mark.parametrize("family", assets.FAST_TIER)
def test_a_space_that_ends_a_prompt_does_not_merge_with_the_answer(family: str) -> None:
    loaded = load(family)
    (row,) = encode(loaded, plain("### Solution: ", "\n### End"), conversation("Go", "It is"))
    context, target = parts(row)
    assert loaded.tokens.decode(context).rstrip("▁ ").endswith("Solution:")
    assert texts(loaded, target)[0] == "It"


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "llama3", "deepseek-v3", "gemma-like", "demo"])
def test_an_empty_think_block_behind_a_think_prompt_is_its_own_segment(family: str) -> None:
    loaded = load(family)
    (row,) = encode(loaded, THINK, conversation("2+2?", "4"))
    context, target = parts(row)
    assert loaded.tokens.decode(context).endswith("<think>\n")
    assert loaded.tokens.decode(target).startswith("\n</think>\n\n4")


@pytest.mark.parametrize("family", ["mistral-v3", "mistral-v3-legacy"])
@pytest.mark.parametrize(("answer", "pieces"), [("It", ["It"]), ("It is", ["It", "▁is"]), (" It", ["▁It"]), ("  x", ["▁", "▁x"])])
def test_no_dummy_prefix_is_written_into_a_split_target(family: str, answer: str, pieces: list[str]) -> None:
    loaded = load(family)
    (row,) = encode(loaded, plain("### Solution: ", "</s>"), conversation("Go", answer))
    assert texts(loaded, parts(row)[1]) == [*pieces, "</s>"]


@pytest.mark.parametrize("family", ["mistral-v3", "mistral-v3-legacy"])
def test_behind_a_control_token_the_tokenizer_does_as_it_always_does(family: str) -> None:
    loaded = load(family)
    (row,) = encode(loaded, plain("[/INST]", "</s>"), conversation("Go", "It is"))
    context, target = parts(row)
    assert context + target == loaded.tokens.encode("Go[/INST]It is</s>").ids.tolist()
    # With text and a control token in a split target, only the text before the token follows something.
    (row,) = encode(loaded, plain("### Solution: ", "</s>"), conversation("Go", "It[INST]is"))
    tail = loaded.tokens.encode("[INST]is</s>").ids.tolist()
    first, *rest = parts(row)[1]
    assert texts(loaded, [first]) == ["It"] and rest == tail


def test_newlines_that_are_added_tokens_do_not_merge_over_the_boundary() -> None:
    loaded = load("gemma-like")
    template = assets.template(assets.NATIVE["gemma-like"]).replace("| trim", "")
    (row,) = encode(loaded, template, conversation("Go", "\nfoo"))
    context, target = parts(row)
    assert texts(loaded, context)[-1] == "\n" == texts(loaded, target)[0]
    assert "\n\n" in texts(loaded, loaded.tokens.encode("model\n\nfoo").ids.tolist())


def test_letters_and_their_marks_are_not_composed_over_the_boundary() -> None:
    loaded = load("qwen3")
    (row,) = encode(loaded, plain("Cafe", "<|im_end|>"), conversation("Go ", "\u0301 noir"))
    context, target = parts(row)
    assert loaded.tokens.decode(context) == "Go Cafe"
    assert loaded.tokens.decode(target) == "\u0301 noir<|im_end|>"
    assert loaded.tokens.decode(loaded.tokens.encode("Go Cafe\u0301").ids.tolist()) == "Go Caf\u00e9"


@pytest.mark.parametrize("family", assets.FAST_TIER)
def test_whatever_ends_a_prompt_and_begins_an_answer_the_context_is_that_of_the_prompt(family: str) -> None:
    loaded = load(family)
    stop = loaded.special_tokens["eos_token"]
    for i, end in enumerate(ENDS):
        for answer in ANSWERS[i % 2 :: 2]:
            rows = encode(loaded, plain(end, stop), conversation("Hi", answer, "?", answer + "b"))
            for row in rows:
                assert loaded.tokens.token_text(int(row.input_ids[-1])) == stop
                assert row.reasons[-1] == Reason.STOP


@pytest.mark.slow
@pytest.mark.parametrize("family", assets.SLOW_TIER)
def test_whatever_ends_a_prompt_holds_for_the_larger_families(family: str) -> None:
    test_whatever_ends_a_prompt_and_begins_an_answer_the_context_is_that_of_the_prompt(family)


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["\n\nfoo", "  foo", "\nfoo"])
def test_whitespace_that_phi_swallows_behind_its_header_is_still_a_target(answer: str) -> None:
    loaded = load("phi3")
    template = assets.template(assets.NATIVE["phi3"])
    (row,) = encode(loaded, template, conversation("Go", answer))
    context, target = parts(row)
    assert texts(loaded, context)[-1] == "<|assistant|>"
    assert texts(loaded, target)[-1] == "<|end|>"
    assert target[:-1] == loaded.tokens.encode_segment(answer).ids.tolist()


@pytest.mark.parametrize("family", ["mistral-v1", "mistral-v3", "llama3"])
def test_a_token_that_holds_any_of_an_answer_is_content_and_not_header(family: str) -> None:
    loaded = load(family)
    template = plain("[/INST]", "</s>").replace("{{ m.content }}", "{{ ' ' + m.content }}")
    (row,) = encode(loaded, template, conversation("What is it?", "It is"))
    assert row.reasons[row.turns == 1].tolist()[:2] == [Reason.CONTENT, Reason.CONTENT]
    assert Reason.HEADER not in row.reasons
    words = [i for i, text in enumerate(texts(loaded, row.input_ids.tolist())) if text in ("▁What", "ĠWhat")]
    assert row.reasons[words].tolist() == [Reason.OTHER_ROLE]
    encoder = ChatEncoder.load(loaded, template, Policy(parts=("reasoning", "calls"), control_tokens="parity"))
    (row,) = encoder.encode(conversation("What is it?", "It is"))
    assert "It" not in loaded.tokens.decode(row.input_ids[row.weights != 0].tolist())


# -- handmade tokenizers ---------------------------------------------------------------------------------------------

FLAGS: list[dict[str, bool]] = [
    {"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True}, {"lstrip": True, "rstrip": True},
    {"rstrip": True, "single_word": True}, {"rstrip": True, "normalized": True},
]  # fmt: skip


@cache
def flagged(flags: tuple[str, ...], special: bool) -> Loaded:
    """The built-in tokenizer with headers and an end that swallow whitespace, match whole words, or are normalised."""
    tokenizer = Tokenizer.from_file(str(tokenizer_directory() / "tokenizer.json"))
    options = dict.fromkeys(flags, True)
    tokens = [AddedToken(text, **{"normalized": False, **options}) for text in ("<|bot|>", "<|human|>", "<|stop|>")]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return Loaded(FastTokens(tokenizer), special_tokens={"eos_token": "<|stop|>"})


HEADERS = (
    "{% for m in messages %}{{ '<|human|>' if m.role == 'user' else '<|bot|>' }}BREAK{{ m.content }}<|stop|>BREAK"
    "{% endfor %}{% if add_generation_prompt %}<|bot|>BREAK{% endif %}"
)


@pytest.mark.parametrize("special", [True, False], ids=["special", "ordinary"])
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: "+".join(flags))
@pytest.mark.parametrize("line", ["\n", "", " "], ids=["newline", "nothing", "space"])
def test_added_tokens_that_swallow_whitespace_leave_the_context_alone(
    flags: dict[str, bool], special: bool, line: str
) -> None:
    loaded = flagged(tuple(flags), special)
    for answer in ("foo", "\nfoo", "  foo", "\n\nfoo\n", "", " ", "\n", "foo ", "_foo_", "é", "\u0301"):
        rows = encode(loaded, HEADERS.replace("BREAK", line), conversation("Go", answer, "On", answer))
        if "single_word" in flags:
            continue  # `foo<|stop|>` holds no stop for such a tokenizer
        for row in rows:
            assert loaded.tokens.token_text(int(row.input_ids[-1])) == "<|stop|>"


def test_whitespace_behind_a_header_that_swallows_it_is_a_target_of_its_own() -> None:
    loaded = flagged(("rstrip",), True)
    prompt, whole = "<|bot|>\n", "<|bot|>\n\n\nfoo"
    ids = loaded.tokens.encode(prompt).ids.tolist()
    assert loaded.tokens.encode(whole).ids.tolist()[: len(ids)] == ids, "ids alone do not show that it straddles"
    (row,) = encode(loaded, HEADERS.replace("BREAK", "\n"), conversation("Go", "\n\nfoo"))
    assert loaded.tokens.decode(parts(row)[1]) == "\n\nfoo<|stop|>"


@cache
def unigram(before_each_word: bool) -> Loaded:
    """A small Unigram tokenizer whose prefix is written before the text, or (XLM-R, T5) before every word."""
    pieces = ["▁", "▁It", "It", "▁is", "is", "▁e", "▁es", "s", "si", "ssi", "stant", "▁fine", "fine", "''", "'", "▁'"]
    letters = [*"abcdefghijklmnopqrstuvwxyzIHA:#0123456789\n"]
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((p, -float(2 + len(p) % 3)) for p in pieces), *((c, -9.0) for c in letters if c not in pieces)]
    tokenizer = Tokenizer(Unigram(vocabulary, unk_id=0))
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always", split=before_each_word)
    steps = [pre_tokenizers.WhitespaceSplit(), metaspace] if before_each_word else [metaspace]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=before_each_word)
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    return Loaded(FastTokens(tokenizer), special_tokens={"eos_token": "</s>"})


@pytest.mark.parametrize("before_each_word", [True, False])
@pytest.mark.parametrize(
    ("end", "answer", "pieces"),
    [
        (": e", "ssi is", ["ssi", "▁is"]),
        ("'", "'s fine", ["'", "s", "▁fine"]),
        (": e", " is", ["▁is"]),
    ],
)
def test_only_the_first_word_of_a_split_target_has_no_prefix(
    before_each_word: bool, end: str, answer: str, pieces: list[str]
) -> None:
    loaded = unigram(before_each_word)
    (row,) = encode(loaded, plain(end, "</s>"), conversation("Hi", answer))
    assert texts(loaded, parts(row)[1]) == [*pieces, "</s>"]


def test_unigram_rows_hold_over_all_boundaries() -> None:
    for before_each_word in (True, False):
        loaded = unigram(before_each_word)
        for end in ENDS:
            for answer in ANSWERS:
                encode(loaded, plain(end, "</s>"), conversation("Hi", answer, "?", answer + "b"))


@pytest.mark.parametrize("family", ["demo", "llama3", "mistral-v3"])
def test_all_tokens_of_a_byte_split_character_share_weight_and_reason(family: str) -> None:
    loaded = load(family)
    rows = encode(loaded, plain("\n", "</s>"), conversation("𒀀?", "a 𒀀𒁀 z"), spans=(("𒁀", 3.0),))
    (row,) = rows
    weighted = row.input_ids[row.weights == 3.0].tolist()
    assert len(weighted) >= 2 and "𒁀" in loaded.tokens.decode(weighted)
    assert set(row.reasons[row.weights == 3.0].tolist()) == {Reason.CONTENT}
    assert sum(span.end - span.start for span in row.spans) == len(row)


# -- tokenizers of every kind ----------------------------------------------------------------------------------------

CHATS = [
    conversation("What is the capital of France?", "Paris.", "And of Peru?", "It is Lima — naïve, 你好🙂!"),
    conversation("Hi", " hello\n", "x", "\ny", "z", ""),
    conversation("Go", "  It is\n\n", "On", "🙂"),
]


def same_rows(a: list[Sample], b: list[Sample]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one.input_ids.tolist() == other.input_ids.tolist()
        for name in ("weights", "turns", "messages", "reasons"):
            assert getattr(one, name).tolist() == getattr(other, name).tolist(), name
        assert one.outcomes == other.outcomes


def without_offsets(loaded: Loaded) -> Loaded:
    tokens = loaded.tokens
    function = CallableTokens(lambda text: tokens.encode(text).ids.tolist(), tokens.decode, tokens.special)
    return Loaded(function, loaded.chat_template, loaded.special_tokens, loaded.stop_ids)


@pytest.mark.parametrize("family", [*assets.FAST_TIER, "demo"])
def test_a_tokenizer_without_offsets_gives_the_same_rows(family: str) -> None:
    loaded = load(family)
    for chat in CHATS[:2]:
        template = loaded.chat_template
        assert isinstance(template, str)
        fast, slow = (
            ChatEncoder.load(each, template, Policy(control_tokens="parity")).examine(chat).rows
            for each in (loaded, without_offsets(loaded))
        )
        same_rows(fast, slow)


@pytest.mark.parametrize("family", ["qwen3", "mistral-v3", "mistral-v3-legacy", "demo", "gemma-like"])
def test_a_tokenizer_without_offsets_holds_at_hard_boundaries(family: str) -> None:
    loaded = without_offsets(load(family))
    for end in ENDS[:9]:
        for answer in ANSWERS[:9]:
            encode(loaded, plain(end, loaded.special_tokens["eos_token"]), conversation("Hi", answer, "?", answer + "b"))


def test_any_function_from_text_to_ids_is_a_tokenizer() -> None:
    def codepoints(text: str) -> list[int]:
        return [ord(character) for character in text]

    encoder = ChatEncoder.load(codepoints, CHATML)
    (row,) = encoder.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nyo 🙂"}])
    trained = "".join(map(chr, row.input_ids[row.weights != 0].tolist()))
    assert trained == "\nyo 🙂<|im_end|>"


@pytest.mark.parametrize(
    "broken", [lambda text: None, lambda text: ["a"], lambda text: [[1, 2]] * 2 + [[3]], lambda text: [2**40], lambda text: [1.5]]
)
def test_a_function_that_returns_no_ids_is_an_error(broken: Callable[[str], Any]) -> None:
    with pytest.raises(TokenizerError, match="no list of ids"):
        ChatEncoder.load(broken, CHATML).encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "y"}])


@pytest.mark.parametrize("family", ["mistral-v3", "smollm2"])
def test_every_way_to_give_a_tokenizer_gives_the_same_rows(family: str) -> None:
    from transformers import AutoTokenizer

    directory, template = assets.tokenizer_dir(family), assets.template(assets.NATIVE[family])
    sources: list[Any] = [
        directory, str(directory), directory / "tokenizer.json", Tokenizer.from_file(str(directory / "tokenizer.json")),
        AutoTokenizer.from_pretrained(directory),
    ]  # fmt: skip
    special = load(family).special_tokens
    for chat in CHATS[:1]:
        rows = []
        for source in sources:
            loaded = load_tokenizer(source)
            encoder = ChatEncoder.load(Loaded(loaded.tokens, None, special, load(family).stop_ids), template)
            rows.append(encoder.encode(chat))
        for other in rows[1:]:
            same_rows(rows[0], other)


@pytest.mark.parametrize("family", ["qwen3", "llama3", "gpt-oss"])
def test_a_transformers_tokenizer_brings_template_special_tokens_and_stops(family: str) -> None:
    from transformers import AutoTokenizer

    directory = assets.tokenizer_dir(family)
    ours, theirs = load(family), load_tokenizer(AutoTokenizer.from_pretrained(directory))
    assert theirs.chat_template == ours.chat_template and theirs.stop_ids == ours.stop_ids
    assert dict(theirs.special_tokens) == dict(ours.special_tokens)
    chat = CHATS[0]
    same_rows(ChatEncoder.load(ours).encode(chat), ChatEncoder.load(theirs).encode(chat))


def test_a_slow_transformers_tokenizer_works_by_encoding_prefixes() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    loaded = load_tokenizer(tokenizer)
    assert isinstance(loaded.tokens, CallableTokens) and "<|im_end|>" in loaded.tokens.special
    (row,) = ChatEncoder.load(loaded, CHATML).encode(CHATS[0])
    assert {int(i) for i in row.turns} == {-1, 1, 3}
    ends = row.input_ids[row.reasons == Reason.STOP].tolist()
    assert ends == [tokenizer.convert_tokens_to_ids("<|im_end|>")] * 2


def test_the_given_tokenizer_object_is_not_changed() -> None:
    tokenizer = Tokenizer.from_file(str(assets.tokenizer_dir("mistral-v3") / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    before = tokenizer.to_str()
    loaded = load_tokenizer(tokenizer)
    assert len(loaded.tokens.encode("one two three four five six seven eight nine ten").ids) > 8
    assert tokenizer.to_str() == before


# -- directories and hubs --------------------------------------------------------------------------------------------


def directory_with(folder: Path, config: dict[str, Any], **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer_directory() / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", **config}), "utf-8")
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize(
    ("config", "files", "expected"),
    [
        ({"chat_template": "a\n"}, {}, "a\n"),
        ({"chat_template": "a\n"}, {"chat_template_DOT_jinja": "b\n"}, "b\n"),
        ({"chat_template": "a\n"}, {"chat_template_DOT_json": '{"chat_template": "c\\n"}'}, "c\n"),
        ({}, {"chat_template_DOT_jinja": "b\r\n"}, "b\r\n"),
        (
            {"chat_template": [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]}, {},
            {"default": "d", "tool_use": "t"},
        ),
        (
            {"chat_template": "d"}, {"additional_chat_templates__rag_DOT_jinja": "r"}, {"default": "d", "rag": "r"},
        ),
        ({}, {}, None),
    ],
)  # fmt: skip
def test_templates_are_read_from_wherever_models_keep_them(
    tmp_path: Path, config: dict[str, Any], files: dict[str, str], expected: Any
) -> None:
    assert load_tokenizer(directory_with(tmp_path / "x", config, **files)).chat_template == expected


def test_the_template_for_tools_serves_conversations_with_tools(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "TOOLS\n" + CHATML}]
    encoder = ChatEncoder.load(directory_with(tmp_path / "x", {"chat_template": named}))
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    texts_seen = [encoder.decode(encoder.encode(messages, tools=given)[0].input_ids) for given in (None, tools)]
    assert [text.startswith("TOOLS") for text in texts_seen] == [False, True]


@pytest.mark.slow
def test_command_r_has_three_templates() -> None:
    loaded = load("command-r")
    assert isinstance(loaded.chat_template, dict) and set(loaded.chat_template) == {"default", "tool_use", "rag"}
    (row,) = ChatEncoder.load(loaded).encode(CHATS[0])
    assert texts(loaded, row.input_ids[row.reasons == Reason.STOP].tolist()) == ["<|END_OF_TURN_TOKEN|>"] * 2


@pytest.mark.parametrize(
    ("generation", "stops"),
    [
        ({"eos_token_id": 2}, [2]), ({"eos_token_id": [2, 1, 2]}, [2, 1]), ({"eos_token_id": None}, []), ({}, []),
        ({"eos_token_id": [True, "2", 10**9, 1]}, [1]),
    ],
)  # fmt: skip
def test_stop_ids_come_from_the_generation_config(tmp_path: Path, generation: dict[str, Any], stops: list[int]) -> None:
    folder = directory_with(tmp_path / "x", {}, generation_config_DOT_json=json.dumps(generation))
    assert list(load_tokenizer(folder).stop_ids) == stops


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda folder: None, "holds no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.model").write_bytes(b"x"), "holds no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
        (lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"), "is not a tokenizer"),
        (lambda folder: directory_with(folder, {}) and (folder / "tokenizer_config.json").write_text("[1]"), "must hold an object"),
        (lambda folder: directory_with(folder, {}) and (folder / "tokenizer_config.json").write_text("{"), "is not JSON"),
        (lambda folder: directory_with(folder, {}) and (folder / "chat_template.jinja").write_bytes(b"\xff"), "is not UTF-8"),
        (lambda folder: directory_with(folder, {"chat_template": 3}), "must be a string or a list"),
    ],
)
def test_a_broken_directory_is_a_clear_error(tmp_path: Path, prepare: Callable[[Path], Any], words: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(TokenizerError, match=words) as caught:
        load_tokenizer(folder)
    assert caught.value.hint or "chat_template" in caught.value.what


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "one-word", "a/b/c", "a\\b"])
def test_what_is_no_path_and_no_hub_id_is_a_clear_error(source: str) -> None:
    with pytest.raises(TokenizerError, match="there is no tokenizer at"):
        load_tokenizer(source)


def test_what_is_no_tokenizer_is_a_clear_error() -> None:
    with pytest.raises(TokenizerError, match="cannot use a int"):
        load_tokenizer(3)


def test_without_a_template_the_error_says_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no chat template") as caught:
        ChatEncoder.load(directory_with(tmp_path / "x", {}))
    assert "--chat-template" in caught.value.hint
    with pytest.raises(TemplateError, match="does not compile"):
        ChatEncoder.load(tokenizer_directory(), "{% for %}").encode(CHATS[0])


OFFLINE = """
import sys
from chatloss.encode import ChatEncoder
from chatloss.errors import TokenizerError
try:
    encoder = ChatEncoder.load(sys.argv[1])
except TokenizerError as error:
    print(error)
else:
    rows = encoder.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "yo"}])
    print(encoder.decode(rows[0].input_ids[rows[0].weights != 0]), encoder.loaded.name, encoder.loaded.stop_ids)
"""


def run_offline(home: Path, repository: str) -> str:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(home / "hub")}
    child = [sys.executable, "-c", OFFLINE, repository]
    done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=120, check=True)
    return done.stdout


def test_a_hub_id_in_the_cache_works_offline(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--acme--tiny"
    revision = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(tokenizer_directory(), repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    assert run_offline(tmp_path, "acme/tiny").startswith("yo<|im_end|> acme/tiny (")


def test_a_hub_id_that_cannot_be_had_says_so(tmp_path: Path) -> None:
    assert "not in the hub cache" in run_offline(tmp_path, "acme/absent")
    assert "error:" in run_offline(tmp_path, "acme/a b")
