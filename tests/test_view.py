"""What is seen is what is there: texts of tokens, marks of trained spans, and nothing that can attack a terminal."""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from chatloss.errors import TokenizerError
from chatloss.runs import runs
from chatloss.sample import Reason, Sample, Span
from chatloss.view import render_sample, render_summary, sample_html, visible

CORPUS = ["Hello world, this is naïve café text.", "你好，世界。你好吗？", "שלום עולם", "def f(x):\n    return x"]


def _byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def _metaspace() -> Tokenizer:
    """Llama 2's decoder: bytes where the vocabulary ends, and a leading space that decoding strips."""
    letters = sorted({*"▁abcdefghijklmnopqrstuvwxyzH,.你", "▁t", "▁w"})
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters])}
    merges = [("▁", "t"), ("▁", "w")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _wordpiece() -> Tokenizer:
    """A decoder that cleans up spaces, so that a token's text depends on its neighbours."""
    pieces = ["[UNK]", "don", "'", "t", "hello", ".", ",", "##s", "##e", "a"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)
    return tokenizer


TOKENIZERS = {"byte_level": _byte_level(), "metaspace": _metaspace(), "wordpiece": _wordpiece()}
families = pytest.mark.parametrize("family", TOKENIZERS)


def decoder(family: str) -> Callable[[Sequence[int]], str]:
    return lambda ids: TOKENIZERS[family].decode(list(ids), skip_special_tokens=False)


def row(ids: Sequence[int], *spans: Span, **fields: object) -> Sample:
    whole = (Span(0, len(ids), 0, 1.0, Reason.CONTENT),) if len(ids) else ()
    return Sample(np.array(ids, np.int32), spans or whole, **fields)  # type: ignore[arg-type]


def printed(renderable: object, width: int = 80, **options: object) -> str:
    console = Console(file=io.StringIO(), width=width, **options)  # type: ignore[arg-type]
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


CHAT = ["<|start|>", "user\n", "Hi", "<|end|>", "<|start|>", "bot\n", "Hel", "lo ", "you", "<|end|>", "\n"]


def chat(**fields: object) -> Sample:
    spans = (
        Span(0, 2, 0, 0.0, Reason.SCAFFOLD), Span(2, 3, 0, 0.0, Reason.OTHER_ROLE), Span(3, 4, 0, 0.0, Reason.SCAFFOLD),
        Span(4, 6, 1, 0.0, Reason.GENERATION_PROMPT), Span(6, 9, 1, 0.5, Reason.CONTENT),
        Span(9, 10, 1, 1.0, Reason.STOP), Span(10, 11, 1, 0.0, Reason.SCAFFOLD),
    )
    words = {"outcomes": {1: "exact"}, "source": "a.jsonl:1", "decode": lambda ids: "".join(CHAT[i] for i in ids)}
    return row(range(len(CHAT)), *spans, **{**words, **fields})


@families
@given(text=st.text(max_size=60), cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)))
def test_the_texts_of_the_runs_are_the_text_of_the_row(family: str, text: str, cuts: tuple[int, int]) -> None:
    ids = TOKENIZERS[family].encode(text).ids
    ids = ids[cuts[0] : len(ids) - cuts[1]]
    found = runs(row(ids), decoder(family))
    assert "".join(run.text for run in found) == decoder(family)(ids)
    assert [run.start for run in found] == [0, *(run.end for run in found)][: len(found)]
    assert [token for run in found for token in run.ids] == ids


@families
@given(seed=st.integers(0, 2**32), n=st.integers(0, 200))
@settings(max_examples=40)
def test_ids_that_no_text_encodes_to_are_shown_all_the_same(family: str, seed: int, n: int) -> None:
    ids = np.random.default_rng(seed).integers(0, TOKENIZERS[family].get_vocab_size() + 5, n).tolist()
    assert "".join(run.text for run in runs(row(ids), decoder(family))) == decoder(family)(ids)


@given(ids=st.lists(st.integers(0, 5), max_size=40), words=st.lists(st.text(max_size=3), min_size=6, max_size=6))
def test_any_decoder_will_do(ids: list[int], words: list[str]) -> None:
    def plain(ids: Sequence[int]) -> str:
        return "".join(words[i] for i in ids)

    def count(ids: Sequence[int]) -> str:
        return str(len(ids)) if ids else ""

    for strange in (plain, lambda ids: plain(ids)[::-1], lambda ids: plain(ids).strip().upper(), count):
        assert "".join(run.text for run in runs(row(ids), strange)) == strange(ids)


@pytest.mark.parametrize("family", ["byte_level", "metaspace"])
def test_characters_made_of_several_tokens_stay_whole(family: str) -> None:
    text = "你好🙂 naïve שלום ☃"
    found = runs(row(TOKENIZERS[family].encode(text).ids), decoder(family))
    assert all("\ufffd" not in run.text for run in found)
    split = [run for run in found if len(run.ids) > 1]
    assert split and all(len(run.text.strip()) == 1 for run in split), "no more tokens than a character takes"


def test_a_replacement_character_of_the_data_is_not_mistaken_for_a_broken_one() -> None:
    ids = TOKENIZERS["byte_level"].encode("a\ufffdb\ufffd\ufffdc").ids
    found = runs(row(ids), decoder("byte_level"))
    assert [run.text for run in found] == ["a", "\ufffd", "b", "\ufffd", "\ufffd", "c"]


def test_a_row_cut_inside_a_character_ends_in_a_replacement_character() -> None:
    ids = TOKENIZERS["byte_level"].encode("ok 🙃").ids[:-1]
    assert runs(row(ids), decoder("byte_level"))[-1].text == "\ufffd"


def test_a_span_that_begins_inside_a_character_keeps_its_own_weight() -> None:
    parts = {0: b"\xe4", 1: b"\xbd\xa0", 2: b"!"}
    two = row([0, 1, 2], Span(0, 1, 0, 0.0, Reason.SCAFFOLD), Span(1, 3, 0, 1.0, Reason.CONTENT))
    found = runs(two, lambda ids: b"".join(parts[i] for i in ids).decode(errors="replace"))
    assert [(run.text, run.weight) for run in found] == [("你", 0.0), ("", 1.0), ("!", 1.0)]


@pytest.mark.parametrize("kind", ["text", "characters", "garbage", "reversed", "empty"])
def test_cutting_a_long_row_into_runs_is_linear(kind: str) -> None:
    decode, n, seen = decoder("byte_level"), 20_000, 0
    good = TOKENIZERS["byte_level"].encode("Hello 你好🙂 don't\n" * 2000).ids[:n]
    odd = TOKENIZERS["byte_level"].encode("🙃☂" * n).ids[:n]
    ids = {"text": good, "characters": odd, "garbage": sorted(odd), "reversed": good, "empty": [10_000] * n}[kind]

    def counting(ids: Sequence[int]) -> str:
        nonlocal seen
        seen += len(ids)
        return decode(ids)[::-1] if kind == "reversed" else decode(ids)

    assert "".join(run.text for run in runs(row(ids), counting)) == counting(ids)
    assert seen < 60 * n


def test_a_decoder_that_fails_is_an_error_that_names_the_row() -> None:
    with pytest.raises(TokenizerError, match=r"a\.jsonl:7") as caught:
        runs(row([1, -100], source="a.jsonl:7"), decoder("byte_level"))
    assert caught.value.hint


def _harmless(text: str) -> bool:
    return all(c in "\n\u200c\u200d" or (unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029") for c in text)


CONTROLS = "\x1b\x07\r\t\n\x9b\u202e\u2066\u2028\u200d\ufeff<>&\"'{}"
hostile = st.text(st.characters(codec=None, categories=None) | st.sampled_from(CONTROLS))


@given(hostile, st.booleans())
def test_visible_text_has_nothing_invisible_in_it(text: str, whitespace: bool) -> None:
    shown = visible(text, whitespace=whitespace)
    assert _harmless(shown.replace("\t", "")) and (not whitespace or not re.search(r"\s", shown))


def test_joiners_stay_inside_words_and_emoji_only() -> None:
    assert visible("👨\u200d👩") == "👨\u200d👩"
    assert visible("\u200dx") == "⟨U+200D⟩x"
    assert visible("a \u200d b") == "a·⟨U+200D⟩·b"
    assert visible("\u0301x") == "◌\u0301x"
    assert visible("a\U000e0041b\u3164") == "a⟨U+E0041⟩b⟨U+3164⟩"


@given(hostile, st.integers(10, 120), st.booleans(), st.booleans())
def test_no_row_can_reach_the_terminal_or_leave_its_width(text: str, width: int, ids: bool, whitespace: bool) -> None:
    fields = {"source": text[:20], "outcomes": {0: text[:9]}, "untrained": {1: text[:5]}}
    sample = row([0], decode=lambda ids: text * len(ids), **fields)
    one = render_sample(sample, show_ids=ids, show_whitespace=whitespace, roles=[text[:9]])
    for view in (one, render_summary([sample])):
        out = printed(view, width)
        assert _harmless(out)
    assert all(cell_len(line) <= max(width, 32) for line in printed(render_sample(sample), width).splitlines())


def test_wide_characters_are_wrapped_by_the_cells_they_take() -> None:
    sample = row([0], decode=lambda ids: "漢字🙂" * 40)
    assert max(cell_len(line) for line in printed(render_sample(sample), 60).splitlines()) <= 60


def test_trained_spans_are_recognisable_without_colour() -> None:
    lines = printed(render_sample(chat(), color=False)).splitlines()
    assert lines[:2] == ["a.jsonl:1 · 11 tokens · 4 trained (36.4%) · #1 exact", "#0"]
    assert [line.split(" ┃ ")[1] for line in lines if "●" in line] == ["Hello·you", "<|end|>"]
    assert [line.split("●")[1].split("┃")[0].strip() for line in lines if "●" in line] == ["content ×0.5", "stop"]
    assert not any("┃" in line for line in lines if "scaffold" in line or "prompt" in line)


def test_with_no_color_only_underline_and_weight_of_type_remain() -> None:
    out = printed(render_sample(chat()), force_terminal=True, no_color=True)
    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", out) for code in found.split(";")}
    assert "4" in codes and codes <= {"", "0", "1", "2", "4"}
    assert "\x1b[" not in printed(render_sample(chat(), color=False), force_terminal=True)


def test_ids_weights_roles_and_whitespace_are_shown_when_asked_for() -> None:
    plain = printed(render_sample(chat()))
    full = printed(render_sample(chat(), show_ids=True, show_weights=True, roles=["user", "assistant"], index=3))
    assert "Hel₆lo·₇you₈" in full and "stop ×1" in full and "#0 user" in full and full.startswith("row 3 · a.jsonl:1")
    assert "₆" not in plain and "stop ×1" not in plain and "#1 assistant" in plain
    assert "Hello you" in printed(render_sample(chat(), show_whitespace=False))
    assert "user↵" in plain


def test_a_row_without_a_decoder_shows_ids() -> None:
    assert "⟨#8⟩" in printed(render_sample(chat(decode=None)))
    assert "⟨#8⟩" in sample_html(chat(decode=None))


def test_untrained_turns_say_why() -> None:
    out = printed(render_sample(chat(outcomes={1: "exact", 3: "exact", 5: "off_prompt"}, untrained={3: "truncated"})))
    assert "#1 exact, #3 truncated, #5 off prompt" in out


def test_the_summary_counts_a_turn_of_two_rows_once() -> None:
    rows = [chat(), chat(outcomes={1: "exact", 3: "split"}), chat(source="a.jsonl:2", outcomes={1: "altered"})]
    out = printed(render_summary(rows), 120)
    assert out.startswith("3 rows · 33 tokens · 12 trained (36.4%)")
    assert re.search(r"turns exact\s+1\s+33.3%", out) and re.search(r"turns altered\s+1 ", out)
    assert re.search(r"● content\s+9\s+27.3%\s+trained: the answer itself", out)


def test_a_width_beyond_the_console_loses_nothing() -> None:
    assert printed(render_summary([chat()], width=200), 70) == printed(render_summary([chat()]), 70)
    assert printed(render_summary([chat()]), 70).split()[-3:] == ["another", "role's", "text"]


def test_an_empty_row_and_no_rows_can_be_seen() -> None:
    assert "0 tokens" in printed(render_sample(row([]))) and "0 rows" in printed(render_summary([]))
    assert "0 tokens" in sample_html(row([]))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "title", "dir"}

    def handle_data(self, data: str) -> None:
        self.text += data


@given(hostile)
def test_the_notebook_fragment_holds_the_data_as_text_only(text: str) -> None:
    fragment = sample_html(row([0], decode=lambda ids: text, source=text[:30], outcomes={0: text}), roles=[text])
    reader = _Reader()
    reader.feed(fragment)
    reader.close()
    assert reader.tags <= {"div", "span", "code"} and _harmless(fragment) and "<script" not in fragment
    if text:
        assert "↵\n".join(map(visible, text.split("\n"))).expandtabs(4) in reader.text


def test_a_notebook_shows_a_row_and_says_what_it_leaves_out() -> None:
    assert "Hel" in chat()._repr_html_() and 'title="id 6 · weight 0.5 · content' in chat()._repr_html_()
    assert "and 1,000 more tokens" in sample_html(row([0] * 6000), lambda ids: "x" * len(ids))
