"""The fast encoder: ids and offsets of the reference for each tokenizer it takes; given up at the first difference."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from chatloss import fast_tokens
from chatloss import prepare as preparing
from chatloss.chat import Conversation
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import TokenizerError, UsageError
from chatloss.fast_tokens import FlatTokens, Unequal, loaded_with
from chatloss.load import load_tokenizer
from chatloss.policy import Policy
from chatloss.prepare import Job, prepare
from chatloss.remembered import cache_directory
from chatloss.tokens import CallableTokens, FastTokens
from tests import assets
from tests.test_encode_property import CLOCK, PIECES, messages

SLOW = ("qwen2.5", "qwen3.5", "llama4", "gpt-oss", "deepseek-v3", "tekken")
BYTE_LEVEL = ("qwen3", "llama3", "smollm2", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW))
OTHER = tuple(name for name in assets.FAST_TIER if name.startswith(("mistral", "gemma")))


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATLOSS_CACHE", str(tmp_path_factory.mktemp("cache")))


@cache
def both(name: str) -> tuple[FastTokens, FlatTokens]:
    directory = tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)
    loaded = load_tokenizer(directory)
    fast = loaded_with(loaded, "fast").tokens
    assert isinstance(loaded.tokens, FastTokens) and isinstance(fast, FlatTokens)
    return loaded.tokens, fast


def assert_equal(name: str, text: str) -> None:
    reference, fast = both(name)
    for method in ("encode", "encode_segment"):
        a, b = getattr(reference, method)(text), getattr(fast, method)(text)
        for wanted, found in ((a.ids, b.ids), (a.starts, b.starts), (a.ends, b.ends)):
            assert found.dtype == np.int32 and np.array_equal(wanted, found), (method, text)


@pytest.mark.parametrize("name", BYTE_LEVEL)
@settings(max_examples=80)
@given(data=st.data())
def test_ids_and_offsets_are_those_of_the_reference(name: str, data: st.DataObject) -> None:
    added = list(both(name)[0].added)
    piece = st.one_of(st.sampled_from(PIECES), st.sampled_from(added), st.text(max_size=8))
    assert_equal(name, "".join(data.draw(st.lists(piece, max_size=8))))


@pytest.mark.parametrize("name", ["demo", "qwen3", "gpt-oss"])
@settings(max_examples=60)
@given(data=st.data())
def test_places_in_many_texts_are_those_in_each_by_the_reference(name: str, data: st.DataObject) -> None:
    reference, fast = both(name)
    piece = st.one_of(st.sampled_from(PIECES), st.sampled_from(["e\u0301", "🙂", "…"]), st.text(max_size=8))
    texts = data.draw(st.lists(st.lists(piece, min_size=1, max_size=6).map("".join), min_size=1, max_size=5))
    each = [data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=6)) for text in texts]
    counts, chars = np.array([*map(len, each)]), np.concatenate(each).astype(np.int32)
    ids, firsts, starting, holding = fast.encode_at(texts, chars, counts)
    at = 0
    for text, places, (first, last) in zip(texts, each, pairwise(firsts), strict=True):
        wanted, own = reference.encode_segment(text), slice(at, at := at + len(places))
        assert np.array_equal(wanted.ids, ids[first:last]), text
        assert wanted.tokens_at(places) == ((starting[own] - first).tolist(), (holding[own] - first).tolist()), text


def with_added(*tokens: tuple[str, bool]) -> FastTokens:
    """The demonstration's tokenizer with more added tokens, (text, whether it is matched after normalising) each."""
    spec = json.loads((tokenizer_directory() / "tokenizer.json").read_text("utf-8"))
    size = max(spec["model"]["vocab"].values()) + 1000
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "special": True}
    for i, (token, normalized) in enumerate(tokens):
        spec["added_tokens"].append({"id": size + i, "content": token, "normalized": normalized, **plain})
    return FastTokens(Tokenizer.from_str(json.dumps(spec)))


@cache
def overlapping() -> tuple[FastTokens, FlatTokens]:
    """Added tokens that begin, hold and overlap each other."""
    reference = with_added(*((token, False) for token in ("<a>", "<a><b>c", "<b>", "b><", "ab", "abcabc")))
    return reference, FlatTokens(reference)


@pytest.mark.parametrize("late", ["ab", "a<b>c", "bb><", "><", "<x"])
def test_added_tokens_that_it_would_match_in_another_order_are_left_to_the_reference(late: str) -> None:
    reference = with_added(*((token, False) for token in ("<b>", "b><", "<xab>")), (late, True))
    fast = FlatTokens(reference)
    for text in ("ab><b>", "a<b>c", "bb><b>", "abb><", "<xab>", "<b><", "a b c", "<xab"):
        assert np.array_equal(reference.encode(text).ids, fast.encode(text).ids), text
    assert fast.fell_back


def test_an_added_token_that_begins_before_the_end_of_what_is_shared_counts() -> None:
    reference, fast = overlapping()
    for text in ("hello<a><b>", "hello<a><b>c", "hello<a><b>", "x<b>ab", "x<b>abcabc"):
        assert np.array_equal(reference.encode(text).ids, fast.encode(text).ids), text


@pytest.mark.parametrize("name", ["overlapping", "qwen3", "deepseek-v3"])
@settings(max_examples=100)
@given(data=st.data())
def test_a_text_that_goes_on_from_another_is_encoded_as_on_its_own(name: str, data: st.DataObject) -> None:
    reference, fast = overlapping() if name == "overlapping" else both(name)
    added = list(reference.added)[-6:] if name == "overlapping" else list(reference.added)[:40]
    piece = st.one_of(st.sampled_from(added), st.sampled_from([*"abc<> \n", "hello", "你好", "🙂"]))
    text = ""
    for _ in range(data.draw(st.integers(1, 6))):
        text = text[: data.draw(st.integers(0, len(text)))] + "".join(data.draw(st.lists(piece, max_size=6)))
        wanted, found = reference.encode(text), fast.encode(text)
        for a, b in ((wanted.ids, found.ids), (wanted.starts, found.starts), (wanted.ends, found.ends)):
            assert np.array_equal(a, b), text


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_real_chats_are_encoded_as_by_the_reference(name: str) -> None:
    for data in ("tools_en", "tools_zh", "multilingual"):
        for row in assets.chats(data)[:20]:
            assert_equal(name, json.dumps(row, ensure_ascii=False, indent=1))


@pytest.mark.parametrize("name", ["qwen3", "llama3", pytest.param("gpt-oss", marks=pytest.mark.slow)])
@settings(max_examples=60)
@given(chat=messages())
def test_rows_are_those_of_the_reference(name: str, chat: list[dict[str, Any]]) -> None:
    loaded, policy = load(name), Policy(control_tokens="parity", off_prompt="keep", altered="keep")
    encodings = []
    for tokens in both(name):
        encoder = ChatEncoder.load(fast_tokens.replace(loaded, tokens=tokens), policy=policy, clock=lambda: CLOCK)
        made = encoder.examine(Conversation.from_messages(chat))
        encodings.append(([row.to_dict() | {"spans": row.spans} for row in made.rows], made.outcomes, made.problems))
    assert encodings[0] == encodings[1]


@cache
def load(name: str) -> Any:
    return load_tokenizer(assets.tokenizer_dir(name))


@pytest.mark.parametrize("name", OTHER)
def test_what_it_cannot_do_stays_with_the_reference_and_says_so(name: str) -> None:
    loaded, notes = load_tokenizer(assets.tokenizer_dir(name)), []
    assert loaded_with(loaded, "auto", notes.append) is loaded
    assert len(notes) == 1 and "byte-level" in notes[0]
    with pytest.raises(TokenizerError, match="byte-level"):
        loaded_with(loaded, "fast")


def test_a_function_is_no_tokenizer_json() -> None:
    loaded = load_tokenizer(lambda text: list(text.encode()))
    assert isinstance(loaded_with(loaded, "auto").tokens, CallableTokens)
    with pytest.raises(TokenizerError, match=r"needs a tokenizer\.json"):
        loaded_with(loaded, "fast")
    with pytest.raises(UsageError, match="no encoder 'quick'"):
        loaded_with(loaded, "quick")


def test_text_that_the_normaliser_changes_is_left_to_the_reference() -> None:
    _, fast = both("qwen3")
    before = fast.fell_back
    assert_equal("qwen3", "cafe\u0301 au lait")
    assert fast.fell_back > before


def test_a_token_that_swallows_whitespace_is_left_to_the_reference(tmp_path: Path) -> None:
    shutil.copytree(assets.tokenizer_dir("smollm2"), tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    spec = json.loads(path.read_text("utf-8"))
    for token in spec["added_tokens"]:
        token["rstrip"] = token["lstrip"] = True
    path.write_text(json.dumps(spec), "utf-8")
    loaded = load_tokenizer(path)
    fast = loaded_with(loaded, "auto").tokens
    for text in ("a <|im_start|>  b", "a<|im_start|>b", "\n<|im_end|>\n"):
        assert np.array_equal(fast.encode(text).ids, loaded.tokens.encode(text).ids)
        assert np.array_equal(fast.encode(text).starts, loaded.tokens.encode(text).starts)


# -- a difference --


class Wrong(FlatTokens):
    """Differs from the reference on texts that hold a word."""

    word = "\n"

    def _flat(self, texts: Sequence[str]) -> Any:
        found = super()._flat(texts)
        if found is not None and any(self.word in text for text in texts) and len(found[0].ids):
            found = fast_tokens.Encoded(found[0].ids[::-1].copy(), found[0].starts, found[0].ends), found[1]
        return found


def test_a_difference_at_load_keeps_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, notes = load_tokenizer(tokenizer_directory()), []
    monkeypatch.setattr(fast_tokens, "FlatTokens", Wrong)
    assert loaded_with(loaded, "auto", notes.append) is loaded and "differs from the reference" in notes[0]
    with pytest.raises(TokenizerError, match="differs"):
        loaded_with(loaded, "fast")


def test_a_difference_later_on_redoes_with_the_reference_what_was_affected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "shard_bytes", lambda inputs: 8192)
    job = Job(str(tokenizer_directory()))
    prepare([str(chats_file())], tmp_path / "reference", job)
    # Wrong from the first chat on, and seen only when a later text is sampled.
    monkeypatch.setattr(Wrong, "word", "<|im_start|>user\n")
    monkeypatch.setattr(fast_tokens, "FlatTokens", Wrong)
    monkeypatch.setattr(preparing, "FlatTokens", Wrong)
    monkeypatch.setattr(fast_tokens, "SAMPLE", 64)
    notes: list[str] = []
    fast = fast_tokens.replace(job, backend="fast")
    prepare([str(chats_file())], tmp_path / "fast", fast, note=notes.append)
    assert len(notes) == 1 and "with the reference" in notes[0]
    for path in (tmp_path / "reference").rglob("*.*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "fast" / path.relative_to(tmp_path / "reference")).read_bytes()


def test_prepared_bytes_are_the_same_with_either_encoder(tmp_path: Path) -> None:
    for backend in ("reference", "fast"):
        prepare([str(chats_file())], tmp_path / backend, Job(str(tokenizer_directory()), backend=backend))
    one, two = ([p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*")) if p.is_file()]
                for name in ("reference", "fast"))
    assert one == two


def test_unequal_tells_the_text() -> None:
    assert "'abc'" in str(Unequal("abc")) and isinstance(Tokenizer, type)


# -- the check at load --


def checks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are compared from now on."""
    seen: list[str] = []
    compare = FlatTokens._compare

    def seeing(self: FlatTokens, text: str, found: Any) -> None:
        seen.append(text)
        compare(self, text, found)

    monkeypatch.setattr(FlatTokens, "_compare", seeing)
    return seen


def demo() -> FlatTokens:
    tokens = loaded_with(load_tokenizer(tokenizer_directory()), "fast").tokens
    assert isinstance(tokens, FlatTokens)
    return tokens


def test_a_tokenizer_is_checked_once_and_again_when_anything_it_depends_on_has_changed(
    monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = checks(monkeypatch)
    demo()
    assert len(seen) > len(fast_tokens.TEXTS)
    seen.clear()
    demo()
    assert not seen
    for change in ("chatloss", "fastokens", "tokenizers"):
        with monkeypatch.context() as later:
            later.setattr(fast_tokens, "version", lambda name, change=change: "0" if name == change else "1")
            demo()
            assert seen
            seen.clear()
    FlatTokens(with_added(("<new>", False)))
    assert seen


@pytest.mark.parametrize("content", ["", "[", "null", "[]", '{"tokenizer": "another"}', "\x00"])
def test_a_record_that_cannot_be_read_is_none(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    demo()
    (record,) = (cache_directory() / "equal").iterdir()
    record.write_text(content)
    seen = checks(monkeypatch)
    demo()
    assert seen and json.loads(record.read_text())["fastokens"]


def test_without_a_place_to_write_it_is_checked_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CHATLOSS_CACHE", str(tmp_path / "file" / "below"))
    seen = checks(monkeypatch)
    demo()
    demo()
    assert len(seen) == 2 * len(set(seen))


def test_a_difference_is_not_remembered_as_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokens, "FlatTokens", Wrong)
    for _ in range(2):
        with pytest.raises(TokenizerError, match="differs"):
            loaded_with(load_tokenizer(tokenizer_directory()), "fast")
    assert not list(cache_directory().rglob("*.json"))


def test_the_cache_is_where_the_user_or_the_platform_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATLOSS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_directory() == Path("/somewhere/chatloss")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert cache_directory().is_relative_to(Path.home())
