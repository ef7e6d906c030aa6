"""The reference encoder goes on from the text before: the ids and offsets are those of each text encoded alone."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors

from chatloss.chat import Conversation
from chatloss.cuts import hard_cuts
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.load import load_tokenizer
from chatloss.policy import Policy
from chatloss.reference import Turn
from chatloss.rows import TurnIds, group, turn_ids
from chatloss.tokens import CallableTokens, Encoded, FastTokens
from tests import assets

SLOW = ("qwen2.5", "qwen3.5", "llama4", "gpt-oss", "deepseek-v3", "tekken")
MORE = [name for name in SLOW if name not in assets.FAST_TIER]
FAST = [*assets.FAST_TIER, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
PLAIN = [*"abc<>|\n \t", "hello", "  two", "你好", "🙂", "<|", "\u00a0",
         "e\u0301", "\u0301", "ﬁ", "１２", "assistant\n", "\n\n", "▁"]


@cache
def tokens(name: str) -> FastTokens:
    found = load_tokenizer(tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)).tokens
    assert isinstance(found, FastTokens)
    return found


def assert_same(wanted: Encoded, found: Encoded, text: str) -> None:
    for a, b in ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends)):
        assert a is not None and b is not None and b.dtype == np.int32 and np.array_equal(a, b), text


def alone(own: FastTokens, prompt: str, target: str) -> tuple[Encoded, int | None]:
    """The pair by definition: both texts from scratch, and no token over the boundary."""
    joint, ids = own._alone(prompt + target), own._alone(prompt).ids
    n = len(ids)
    assert joint.starts is not None and joint.ends is not None
    apart = n in (0, len(joint.ids)) or (
        len(joint.ids) > n and joint.starts[n] >= len(prompt) and joint.ends[n - 1] <= len(prompt)
    )
    return joint, n if np.array_equal(joint.ids[:n], ids) and apart else None


def assert_pair(own: FastTokens, prompt: str, target: str) -> None:
    found, wanted = own.encode_pair(prompt, target), alone(own, prompt, target)
    assert_same(wanted[0], found[0], prompt + target)
    assert found[1] == wanted[1], (prompt, target)


def walk(own: FastTokens, data: st.DataObject, pieces: st.SearchStrategy[str]) -> None:
    """Texts that begin like each other, longer and shorter, cut anywhere."""
    text = ""
    for _ in range(data.draw(st.integers(1, 6))):
        text = text[: data.draw(st.integers(0, len(text)))] + "".join(data.draw(st.lists(pieces, max_size=8)))
        at = data.draw(st.integers(0, len(text)))
        assert_pair(own, text[:at], text[at:])


@pytest.mark.parametrize("name", FAST)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_text_that_goes_on_from_another_is_encoded_as_on_its_own(name: str, data: st.DataObject) -> None:
    own = tokens(name)
    names = list(own.added)
    added = st.sampled_from(names[:40] + names[-8:] or ["x"])
    walk(own, data, st.one_of(added, added.map(lambda text: text[: len(text) // 2]), st.sampled_from(PLAIN)))


def branch_off(own: FastTokens, data: st.DataObject, pieces: st.SearchStrategy[str]) -> int:
    """A text and others that go on from parts of it; how many of these there are."""
    texts = st.lists(pieces, min_size=1, max_size=8).map("".join)
    parts = data.draw(st.lists(pieces, min_size=4, max_size=12))
    prompt, target, places = "".join(parts), data.draw(texts), [0, *accumulate(map(len, parts))]
    joint, _ = own.encode_pair(prompt, target)
    others = []
    for _ in range(data.draw(st.integers(1, 6))):
        end, stop = sorted(data.draw(st.tuples(*2 * [st.sampled_from(places)])))
        other = end, prompt[end:stop] + data.draw(st.one_of(st.just(""), texts))
        if other[1] and own.branches(joint, prompt, [other]) is not None:
            others.append(other)
    found = own.branches(joint, prompt, others)
    assert found is not None
    for (end, other), branch in zip(others, found[0], strict=True):
        text, tails = prompt[:end] + other, found[1]
        wanted, context = alone(own, prompt[:end], other)
        assert joint.starts is not None and joint.ends is not None
        assert tails.starts is not None and tails.ends is not None
        if branch.along:
            assert branch.cut == len(text)
        part, more = slice(branch.first, branch.first + branch.size - branch.shared), branch.cut - branch.begin
        assert_same(wanted, Encoded(
            np.concatenate((joint.ids[: branch.shared], tails.ids[part])),
            np.concatenate((joint.starts[: branch.shared], tails.starts[part] + np.int32(more))),
            np.concatenate((joint.ends[: branch.shared], tails.ends[part] + np.int32(more))),
        ), text)
        assert wanted.starts is not None and wanted.ends is not None
        ends_there = branch.context == len(wanted.ids) or (
            wanted.starts[branch.context] >= end >= wanted.ends[branch.context - 1]
        )
        assert context == (branch.context if ends_there else None)
    return len(others)


@pytest.mark.parametrize("name", FAST)
def test_what_goes_on_from_a_part_of_a_text_is_encoded_as_on_its_own(name: str) -> None:
    own = tokens(name)
    names = list(own.added)
    added = st.sampled_from(names[:40] + names[-8:] or ["x"])
    pieces = st.one_of(added, added.map(lambda text: text[: len(text) // 2]), st.sampled_from(PLAIN))
    assert_branches(own, pieces, 60, 10 if own._cuts else 0)


def assert_branches(own: FastTokens, pieces: st.SearchStrategy[str], examples: int, least: int) -> None:
    told = 0

    @settings(max_examples=examples, deadline=None, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        nonlocal told
        told += branch_off(own, data, pieces)

    check()
    assert told >= least


CUTTING = ("qwen3", "llama3", "smollm2", "demo")


@pytest.mark.parametrize("name", CUTTING)
def test_the_usual_tokenizers_cut_hard(name: str) -> None:
    assert tokens(name)._cuts


def with_added(*added: tuple[str, bool], **more: bool) -> FastTokens:
    """The demonstration's tokenizer with more added tokens, (text, whether it is matched after normalising) each."""
    spec = json.loads((tokenizer_directory() / "tokenizer.json").read_text("utf-8"))
    size = max(spec["model"]["vocab"].values()) + 1000
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": True, **more}
    for i, (token, normalized) in enumerate(added):
        spec["added_tokens"].append({"id": size + i, "content": token, "normalized": normalized, **plain})
    return FastTokens(Tokenizer.from_str(json.dumps(spec)))


@cache
def nested() -> FastTokens:
    return with_added(*((token, False) for token in ("<a>", "<a><b>c", "<b>", "b><", "ab", "abcabc")))


@cache
def late() -> FastTokens:
    return with_added(("<a>", False), ("<a><b>", False), *((token, True) for token in ("cc", "ccd|", "~")))


@cache
def late_and_overlapping() -> FastTokens:
    return with_added(("<b>", False), ("b><", False), ("<xab>", False), ("ab<", True), ("><", True))


OVERLAPPING = [
    "<a>", "<b>", "<a><b>", "c", "b><", "ab", "abc", "x", "<", ">", "<xab", "cc", "d|", "cd", "~", " ", "ccd",
]


@pytest.mark.parametrize("own", [nested, late, late_and_overlapping])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_added_tokens_that_begin_hold_and_overlap_each_other(own: object, data: st.DataObject) -> None:
    assert callable(own)
    walk(own(), data, st.sampled_from(OVERLAPPING))


@pytest.mark.parametrize("own", [nested, late, late_and_overlapping])
def test_what_goes_on_among_added_tokens_that_overlap_is_encoded_as_on_its_own(own: object) -> None:
    assert callable(own)
    assert_branches(own(), st.sampled_from(OVERLAPPING), 200, 10)


def test_tokens_matched_late_are_cuts_only_where_they_overlap_none_and_nothing_is_normalised() -> None:
    assert "cc" in late()._cuts.values()
    assert set(late_and_overlapping()._cuts.values()).isdisjoint({"ab<", "><"})


def small(**parts: object) -> Tokenizer:
    """A tokenizer of words, with an added token for the unknown."""
    vocab = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "▁a": 4, "▁b": 5, "▁": 6}
    made = Tokenizer(models.WordPiece(vocab, unk_token="<unk>", continuing_subword_prefix=""))
    for name, part in parts.items():
        setattr(made, name, part)
    made.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<s>", normalized=False)])
    return made


@pytest.mark.parametrize("parts", [
    {"pre_tokenizer": pre_tokenizers.Whitespace()},
    {"normalizer": normalizers.NFKC(), "pre_tokenizer": pre_tokenizers.Whitespace()},
    {"normalizer": normalizers.Sequence([normalizers.Strip(), normalizers.Prepend("▁")])},
    {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="always")},
    {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    {"post_processor": processors.ByteLevel(trim_offsets=True), "pre_tokenizer": pre_tokenizers.ByteLevel()},
], ids=["words", "nfkc", "prepend", "always", "first", "trim"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_unknown_words_and_normalised_text_are_no_cuts(parts: dict[str, object], data: st.DataObject) -> None:
    own = FastTokens(small(**parts))
    walk(own, data, st.sampled_from(["<unk>", "<s>", "a", "b", " ", "zz", "＜s＞", "<", "s>", "▁", "ａ"]))


@pytest.mark.parametrize("parts", [
    {"pre_tokenizer": pre_tokenizers.Metaspace(prepend_scheme="first")},
    {"post_processor": processors.ByteLevel(trim_offsets=True)},
], ids=["first", "trim"])
def test_what_looks_at_the_whole_text_cuts_nowhere(parts: dict[str, object]) -> None:
    made = small(**parts)
    assert not hard_cuts(made, made.get_added_tokens_decoder())


@pytest.mark.parametrize("name", ["lstrip", "rstrip", "single_word"])
def test_added_tokens_that_look_around_themselves_cut_nothing(name: str) -> None:
    assert not with_added(("<a>", False), **{name: True})._cuts


def test_kept_ids_cannot_be_written_to_and_rows_are_their_own() -> None:
    own = tokens("demo")
    text = "<|im_start|>user\nHi<|im_end|>\n"
    found = own.encode(text)
    with pytest.raises(ValueError, match="read-only"):
        found.ids[0] = 0
    (row,) = ChatEncoder.load(tokenizer_directory()).encode(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    )
    row.input_ids[:] = 0
    assert_same(own._alone(text), own.encode(text), text)


def test_each_answer_of_a_long_chat_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    one = FastTokens._alone

    def counted(self: FastTokens, text: str) -> Encoded:
        nonlocal encoded
        encoded += len(text)
        return one(self, text)

    monkeypatch.setattr(FastTokens, "_alone", counted)
    encoder = ChatEncoder.load(tokenizer_directory())
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"number {i} " * 20} for i in range(60)]
    (row,) = encoder.encode(messages)
    encoded = 0
    encoder.examine(Conversation.from_messages(messages))
    assert encoded < 1.1 * len(encoder.decode(row.input_ids))


# -- which turns share a row --


def turn(index: int, ids: list[int], context: int) -> TurnIds:
    made = np.array(ids, np.int32)
    return TurnIds(Turn(index, "reachable"), "", made, context, None, None, True, CallableTokens(list))


def by_definition(turns: list[TurnIds]) -> list[list[int]]:
    rows, left = [], sorted(turns, key=lambda t: (len(t.ids), t.turn.index))
    while left:
        base = left.pop()
        members = [t for t in left if len(t.ids) <= base.context and base.ids[: len(t.ids)].tolist() == t.ids.tolist()]
        left = [t for t in left if t not in members]
        rows.append(sorted(t.turn.index for t in [*members, base]))
    return sorted(rows, key=lambda row: row[-1])


@given(st.lists(st.tuples(st.lists(st.integers(0, 1), max_size=6), st.integers(0, 6)), max_size=8))
@example([([0, 1], 0), ([0, 1], 2), ([0, 1, 1], 2)])
def test_rows_are_the_longest_turns_with_all_that_they_begin_with(made: list[tuple[list[int], int]]) -> None:
    turns = [turn(i, ids, min(context, len(ids))) for i, (ids, context) in enumerate(made)]
    assert [[t.turn.index for t in row] for row in group(turns, "auto")] == by_definition(turns)
    assert [[t.turn.index for t in row] for row in group(turns, "per_turn")] == [[t.turn.index] for t in turns]


def test_a_turn_alone_is_encoded_as_among_others() -> None:
    encoder = ChatEncoder.load(tokenizer_directory(), policy=Policy(control_tokens="parity"))
    chat = Conversation.from_messages([{"role": ("user", "assistant")[i % 2], "content": f"x {i}"} for i in range(6)])
    turns = encoder.examine(chat).turns
    for t in turns:
        fresh = turn_ids(load_tokenizer(tokenizer_directory()).tokens, t)
        used = turn_ids(encoder.tokens, t)
        assert used.ids.tolist() == fresh.ids.tolist() and used.context == fresh.context


@pytest.mark.parametrize(("early", "late", "one", "other"), [
    (["xy"], ["<a>", "<a>x"], "hello<a>xy", "hello<a>xz"),
    (["rs"], ["<a>", "q<a>r"], "q<a>rs", "q<a>rt"),
])
def test_an_added_token_may_stand_where_another_one_gave_way(
    early: list[str], late: list[str], one: str, other: str
) -> None:
    """Tokens that are matched late give way to those matched early; what they leave is matched by others."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_tokens([AddedToken(text, normalized=False) for text in early])
    made.add_tokens([AddedToken(text, normalized=True) for text in late])
    tokens = FastTokens(made)
    for text in (one, other, one):
        assert tokens.encode(text).ids.tolist() == made.encode(text).ids


def test_a_token_matched_late_is_a_cut_where_it_gives_way_to_none() -> None:
    tokens = FastTokens(Tokenizer.from_file(str(assets.tokenizer_dir("deepseek-v3") / "tokenizer.json")))
    assert "<｜Assistant｜>" in tokens._cuts.values()
