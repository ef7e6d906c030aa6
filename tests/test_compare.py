"""Shares of the loss against a computation token by token, and the theorems that must hold whatever the data."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from chatloss.batch import epoch_order
from chatloss.compare import REDUCTIONS, CompareReport, compare
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import DataError, RecipeError
from chatloss.page import page
from chatloss.pipeline import examples
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.reduction import UNITS, Reduction
from chatloss.sample import Reason, Sample, Span
from tests.synthetic import chat, chats, decode, per_turn

WEIGHTS = st.sampled_from([1.0, 1.0, 1.0, 0.5, 2.0, -1.0, 0.0])


@st.composite
def examples_of_many_kinds(draw: st.DrawFn) -> list[list[Sample]]:
    """Conversations with uneven turns and user weights, in one row, one a turn, or in between; from several files."""
    out = []
    for seed in range(draw(st.integers(1, 7))):
        turns = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(2, 30)), min_size=1, max_size=4))
        rows = chat(turns, seed, draw(st.lists(WEIGHTS, min_size=len(turns), max_size=len(turns))))
        how = draw(st.sampled_from(["one", "each", "some"]))
        if how == "each" or (how == "some" and len(turns) > 2):
            apart = per_turn(rows)
            rows = apart if how == "each" else [*apart[1:], apart[0]]
        source = f"{draw(st.sampled_from(['a.jsonl', 'dir/b.jsonl']))}:{seed + 1}"
        out.append([Sample(row.input_ids, row.spans, row.outcomes, source) for row in rows])
    return out


def trains(data: list[list[Sample]]) -> bool:
    return any((row.weights[1:] != 0).any() for rows in data for row in rows)


def answers(*lengths: int, source: str = "a.jsonl") -> list[list[Sample]]:
    """Conversations of one turn with so many trained tokens."""
    return [[Sample(np.zeros(n + 1, np.int32), (Span(0, 1, 0, 0.0, Reason.OTHER_ROLE), Span(1, n + 1, 1, 1.0,
             Reason.CONTENT)), {1: "exact"}, f"{source}:{i}")] for i, n in enumerate(lengths, 1)]


def tokens_of(data: list[list[Sample]]) -> list[tuple[int, int, int, float]]:
    """(conversation, message, row in it, u) of every trained token."""
    out = []
    for c, rows in enumerate(data):
        for r, row in enumerate(rows):
            for t in range(1, len(row)):
                if row.weights[t] != 0:
                    out.append((c, int(row.messages[t]), r, float(row.weights[t])))
    return out


def rows_in(data: list[list[Sample]], rows: str) -> list[list[int]]:
    """Indices into `tokens_of`, row by row, in a row format."""
    key = {"A": lambda t: t[:2], "B": lambda t: t[:1], "encoded": lambda t: (t[0], t[2])}[rows]
    found: dict[Any, list[int]] = defaultdict(list)
    for i, token in enumerate(tokens_of(data)):
        found[key(token)].append(i)
    return [found[at] for at in sorted(found)]


def brute_force(data: list[list[Sample]], report: CompareReport, name: str) -> list[float]:
    """|u w| / Z of every trained token, one by one."""
    tokens, way = tokens_of(data), report[name]
    if way.kind == "reduction":
        made = [Reduction.parse(name).of_example(rows) for rows in data]
        z = sum(example.denominator for example in made)
        weights = np.concatenate([row for example in made for row in example.weights])
        return [abs(float(weight)) / z for weight in weights if weight]
    rows = rows_in(data, way.rows)
    if way.order == "shuffled":
        rows = [rows[i] for i in epoch_order(len(rows), report.seed, 0)]
    share = [0.0] * len(tokens)
    if way.kind == "micro_batch_means":
        batches = [rows[i : i + way.size] for i in range(0, len(rows), way.size)]
        for batch in batches:
            n = sum(map(len, batch))
            for i in (i for row in batch for i in row):
                share[i] = abs(tokens[i][3]) / n / len(batches)
        return share
    for start in range(0, len(rows), report.step_rows):
        step = rows[start : start + report.step_rows]
        ranks = [step[rank :: way.size] for rank in range(way.size) if step[rank :: way.size]]
        for rank in ranks:
            n = sum(map(len, rank))
            for i in (i for row in rank for i in row):
                share[i] = abs(tokens[i][3]) / n / len(ranks) * sum(map(len, step)) / len(tokens)
    return share


@settings(max_examples=40)
@given(examples_of_many_kinds().filter(trains), st.integers(0, 3))
def test_shares_are_those_of_a_computation_token_by_token(data: list[list[Sample]], seed: int) -> None:
    report = compare(data, micro_rows=(1, 2, 3), ranks=(1, 2, 4), seed=seed, step_rows=5,
                     reductions=(*REDUCTIONS, "power:-0.5:turn"))
    tokens = tokens_of(data)
    turns = sorted({token[:2] for token in tokens})
    for way in report.shares:
        share = brute_force(data, report, way.name)
        total = math.fsum(share)
        assert way.scale == pytest.approx(total, rel=1e-12)
        by_turn, by_chat, by_file = (defaultdict[Any, float](float) for _ in range(3))
        for (c, m, _, _), part in zip(tokens, share, strict=True):
            by_turn[c, m] += part / total
            by_chat[c] += part / total
            by_file[data[c][0].source.rpartition(":")[0]] += part / total
        want = {"turn": [by_turn[t] for t in turns], "conversation": [by_chat[c] for c in sorted(by_chat)]}
        for unit in UNITS:
            np.testing.assert_allclose(report.shares_of(way.name, unit), want[unit], rtol=1e-12)
            assert way.effective[unit] == pytest.approx(1 / sum(s * s for s in want[unit]), rel=1e-12)
            assert math.fsum(way.deciles[unit]) == pytest.approx(1, rel=1e-12)
        assert way.effective["token"] == pytest.approx(total**2 / sum(s * s for s in share), rel=1e-12)
        np.testing.assert_allclose(way.files, [by_file[part.file] for part in report.files], rtol=1e-12)
        under_token = sum(abs(token[3]) for token in tokens)
        relative = [part / total * under_token / abs(token[3]) for token, part in zip(tokens, share, strict=True)]
        assert (way.lowest, way.highest) == pytest.approx((min(relative), max(relative)), rel=1e-12)
        assert way.spread == pytest.approx(max(relative) / min(relative), rel=1e-12)


@settings(max_examples=40)
@given(examples_of_many_kinds().filter(trains))
def test_tenths_and_movers_are_those_of_the_shares(data: list[list[Sample]]) -> None:
    report = compare(data)
    tokens = tokens_of(data)
    for unit, size in (("turn", 2), ("conversation", 1)):
        keys = sorted({token[:size] for token in tokens})
        lengths = [sum(token[:size] == key for token in tokens) for key in keys]
        order = sorted(range(len(keys)), key=lambda i: lengths[i])  # stable
        groups = np.array_split(np.arange(len(keys)), 1) if len(keys) == 1 else [
            [rank for rank in range(len(keys)) if rank * min(10, len(keys)) // len(keys) == g]
            for g in range(min(10, len(keys)))
        ]
        parts = report.parts[unit]
        assert [part.units for part in parts] == [len(group) for group in groups]
        assert sum(part.tokens for part in parts) == len(tokens)
        for way in report.shares:
            shares, base = report.shares_of(way.name, unit), report.shares_of("token", unit)
            want = [sum(shares[order[rank]] for rank in group) for group in groups]
            np.testing.assert_allclose(way.deciles[unit], want, rtol=1e-12)
            first, last = ([shares[order[r]] / base[order[r]] for r in groups[g]] for g in (0, -1))
            if len(keys) <= 10:
                assert way.short_to_long[unit] == pytest.approx(first[0] / last[-1], rel=1e-9)
            gained = sorted(range(len(keys)), key=lambda i: -(shares[i] - base[i]))
            for sign, movers, ranked in ((1, way.gain[unit], gained), (-1, way.lose[unit], gained[::-1])):
                assert [sign * (m.share - m.share_under_token) for m in movers] == pytest.approx(
                    [sign * (shares[i] - base[i]) for i in ranked[: len(movers)]], rel=1e-9)
                assert all(sign * (m.share - m.share_under_token) > 0 for m in movers)
                for mover in movers:
                    pair = mover.share, mover.share_under_token
                    found = [i for i in range(len(keys)) if (shares[i], base[i]) == pair]
                    assert any(data[keys[i][0]][0].source in mover.where and lengths[i] == mover.tokens for i in found)


# -- theorems ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=5), min_size=1, max_size=12))
def test_each_reduction_shares_out_what_its_name_says(counts: list[list[int]]) -> None:
    report = compare(chat([(3, n) for n in turns], seed=i) for i, turns in enumerate(counts))
    n = np.array([n for turns in counts for n in turns])
    m = np.array([sum(turns) for turns in counts])
    np.testing.assert_allclose(report.shares_of("turn", "turn"), 1 / len(n))
    np.testing.assert_allclose(report.shares_of("conversation", "conversation"), 1 / len(m))
    np.testing.assert_allclose(report.shares_of("token", "turn"), n / n.sum())
    np.testing.assert_allclose(report.shares_of("token", "conversation"), m / m.sum())
    np.testing.assert_allclose(report.shares_of("power:0.5:conversation", "conversation"), m**0.5 / (m**0.5).sum())
    for name in ("sum:turn", "sum:conversation", "constant:1024:turn"):
        assert report[name].same_as == "token"
    assert report["sum:turn"].scale == pytest.approx(n.mean())
    assert report["constant:1024:turn"].scale == pytest.approx(n.mean() / 1024)
    assert report["turn"].effective["turn"] == pytest.approx(len(n))
    assert all(way.deciles[unit] and math.fsum(way.deciles[unit]) == pytest.approx(1) and math.fsum(way.files) ==
               pytest.approx(1) for way in report.shares for unit in UNITS)


@settings(max_examples=40)
@given(examples_of_many_kinds().filter(trains))
def test_means_of_single_rows_are_formats_a_and_b_of_the_literature(data: list[list[Sample]]) -> None:
    report = compare(data)
    np.testing.assert_allclose(report.shares_of("A: means of 1 row", "turn"), report.shares_of("turn", "turn"))
    if "B: means of 1 row" in {way.name for way in report.shares}:
        conversations = report.shares_of("conversation", "turn")
        np.testing.assert_allclose(report.shares_of("B: means of 1 row", "turn"), conversations)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_means_of_micro_batches_and_ranks_with_equally_many_tokens_are_the_token_mean(size: int) -> None:
    report = compare(answers(*[7] * 64), micro_rows=[size], ranks=[size])
    assert report.mistaken
    for way in report.mistaken:
        assert way.same_as == "token"
        assert way.spread == pytest.approx(1)
    # Rows may be uneven as long as what is grouped is even.
    paired = compare(answers(*[5, 9] * 32), micro_rows=[2], ranks=[])
    assert paired["A: means of 2 rows"].same_as == "token"
    assert paired["A: means of 2 rows, shuffled"].spread > 1


@settings(max_examples=30)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 8))
def test_one_rank_or_one_micro_batch_is_the_token_mean(lengths: list[int], step_rows: int) -> None:
    report = compare(answers(*lengths), micro_rows=[len(lengths)], ranks=[1], step_rows=step_rows)
    assert all(way.same_as == "token" for way in report.mistaken)


def test_a_token_beside_ten_weighs_99_times_one_beside_990() -> None:
    report = compare(answers(10, 990), micro_rows=[1, 2], ranks=[2])
    for name in ("A: means of 1 row", "A: means of 2 ranks", "turn"):
        assert report[name].spread == pytest.approx(99)
        assert report[name].deciles["turn"] == pytest.approx((0.5, 0.5))
    assert report["A: means of 2 rows"].spread == 1
    assert report["token"].deciles["turn"] == pytest.approx((0.01, 0.99))


def test_a_step_keeps_its_share_whatever_its_ranks_do() -> None:
    report = compare(answers(*range(1, 12)), micro_rows=[], ranks=[3], step_rows=4)
    shares, base = report.shares_of("A: means of 3 ranks", "turn"), report.shares_of("token", "turn")
    for start in (0, 4, 8):
        assert shares[start : start + 4].sum() == pytest.approx(base[start : start + 4].sum())
    assert not np.allclose(shares, base)


def test_the_order_of_means_is_that_of_the_data_or_of_the_seed() -> None:
    data = answers(*range(1, 60))
    one, again, other = compare(data), compare(data), compare(data, seed=1)
    assert one.to_dict() == again.to_dict()
    name = "A: means of 4 rows"
    assert one[name].to_dict() == other[name].to_dict()
    assert one[f"{name}, shuffled"].to_dict() != other[f"{name}, shuffled"].to_dict()


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(2, 20), min_size=1, max_size=4), min_size=1, max_size=8))
def test_the_row_format_of_the_input_changes_no_reduction_and_neither_format(counts: list[list[int]]) -> None:
    whole = [chat([(3, n) for n in turns], seed=i) for i, turns in enumerate(counts)]
    one, apart = compare(whole), compare(per_turn(rows) for rows in whole)
    for way in one.shares:
        assert way.to_dict() == apart[way.name].to_dict()


def test_rows_as_encoded_are_a_format_of_their_own_only_if_they_are_neither() -> None:
    whole = [chat([(3, 4), (2, 5), (1, 6)], seed=i) for i in range(3)]
    mixed = [whole[0], per_turn(whole[1]), whole[2]]
    formats = [{way.rows for way in compare(data).mistaken} for data in (whole, mixed, answers(3, 4))]
    assert formats == [{"A", "B"}, {"A", "B", "encoded"}, {"A"}]


# -- edges -------------------------------------------------------------------------------------------------------------


def test_what_trains_nothing_is_left_out_and_counted() -> None:
    nothing = [Sample(np.zeros(3, np.int32), (Span(0, 3, 0, 0.0, Reason.OTHER_ROLE),), {}, "a.jsonl:9")]
    first = [Sample(np.zeros(1, np.int32), (Span(0, 1, 0, 1.0, Reason.CONTENT),), {}, "a.jsonl:8")]  # position 0 only
    with_them = compare([nothing, answers(3)[0], first, answers(5)[0], []])
    assert with_them.counts["untrained_conversations"] == 3
    assert with_them.counts | {"untrained_conversations": 0} == compare(answers(3, 5)).counts
    assert [way.to_dict() for way in with_them.shares if way.rows] != []
    np.testing.assert_array_equal(with_them.shares_of("A: means of 1 row", "turn"), [0.5, 0.5])
    with pytest.raises(DataError, match="nothing is trained"):
        compare([nothing, first])


def test_user_weights_change_shares_and_no_spread() -> None:
    data = [chat([(2, 4)], 0, [0.5]), chat([(2, 4)], 1, [-2.0])]
    report = compare(data)
    np.testing.assert_allclose(report.shares_of("token", "turn"), [0.2, 0.8])
    np.testing.assert_allclose(report.shares_of("turn", "turn"), [0.2, 0.8])
    assert report["turn"].spread == 1
    with pytest.raises(DataError, match="not finite"):
        compare([chat([(2, 4)], 0, [math.inf])])


def test_mistakes_in_the_call_are_told() -> None:
    with pytest.raises(RecipeError, match="did you mean 'turn'"):
        compare(answers(3), reductions=["turm"])
    with pytest.raises(RecipeError, match="too large or too small"):
        compare(answers(3, 400), reductions=["power:5000:turn"])
    for wrong in ({"micro_rows": [0]}, {"ranks": [-1]}, {"step_rows": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            compare(answers(3), **wrong)


def test_a_weight_beyond_all_numbers_is_null_in_json_and_told_on_the_terminal() -> None:
    report = compare(answers(1, 400), reductions=["power:200:turn"])
    assert report["power:200:turn"].spread == math.inf
    assert report.to_dict()["reductions"][1]["spread"] is None
    assert "∞×" in str(report.render())


def test_memory_does_not_grow_with_tokens() -> None:
    def long() -> Iterator[list[Sample]]:
        for _ in range(100):
            yield answers(100_000)[0]

    tracemalloc.start()
    try:
        compare(long())
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


# -- what is shown -----------------------------------------------------------------------------------------------------


def demo(**policy: Any) -> Iterator[list[Sample]]:
    encoder = ChatEncoder.load(tokenizer_directory(), policy=Policy(**policy))
    return (made.encoding.rows for made in examples(read(str(chats_file())), encoder))


KEYS = ["assumption", "conversations", "turns", "rows", "trained_tokens", "files", "untrained_conversations", "seed",
        "step_rows", "deciles", "files_by_name", "reductions", "mistaken"]
WAY = ["name", "kind", "row_format", "size", "order", "same_as", "scale", "lowest", "highest", "spread", "effective",
       "deciles", "short_to_long", "files", "gain", "lose"]


def test_json_has_stable_keys_and_survives_the_trip() -> None:
    made = compare(demo()).to_dict()
    assert list(made) == KEYS
    assert all(list(way) == WAY for way in [*made["reductions"], *made["mistaken"]])
    assert orjson.loads(orjson.dumps(made)) == json.loads(json.dumps(made, allow_nan=False))
    mover = made["reductions"][1]["gain"]["turn"][0]
    assert list(mover) == ["where", "tokens", "share", "share_under_token"]
    assert "chats.jsonl:" in mover["where"] and mover["where"].endswith("]")


def printed(report: CompareReport, width: int = 80, **options: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, **options).print(report.render())
    return out.getvalue()


REPORTS = {
    "demo": lambda: compare(demo()),
    "one": lambda: compare(answers(5)),
    "single turns": lambda: compare(answers(*range(1, 40))),
    "many files": lambda: compare([row for i in range(14) for row in answers(i + 1, 3, source=f"a b/日本語{i}.jsonl")]),
    "same names": lambda: compare([*answers(3, source="a/x.jsonl"), *answers(500, source="b/x.jsonl")]),
    "encoded": lambda: compare(per_turn(rows) if i % 2 else rows for i, rows in enumerate(chats(30, 3))),
    "nothing mistaken": lambda: compare(chats(30, 3), micro_rows=(), ranks=()),
    "long names": lambda: compare(chats(30, 3), reductions=["power:0.123456:conversation", "constant:1e9:turn"]),
    "nameless": lambda: compare([Sample(row.input_ids, row.spans) for row in rows] for rows in chats(12, 1)),
    "long turns": lambda: compare(answers(*[1, 20_000, 3_000_000] * 5)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_the_report_fits_80_columns_and_needs_no_colour(name: str) -> None:
    report = REPORTS[name]()
    plain = printed(report)
    assert max(map(cell_len, plain.splitlines())) <= 80
    assert all(line == line.rstrip() for line in plain.splitlines())
    coloured = printed(report, force_terminal=True, color_system="standard", no_color=True)
    assert "\x1b[3" not in coloured
    assert max(map(cell_len, printed(report, 40).splitlines())) <= 40
    table = next(i for i, line in enumerate(plain.splitlines()) if line.startswith("share of the tokens"))
    header, body = plain.splitlines()[table - 1], plain.splitlines()[table + 1]
    assert len(header.split()) - 1 == len(body.split()) - 2 == len(report.parts["turn"])


def test_every_reduction_and_every_wrong_mean_is_in_the_report() -> None:
    report = REPORTS["encoded"]()
    text = " ".join(printed(report).split())
    for way in report.reductions:
        assert way.name in text
    for words in ("means of 1 row", "means of 8 rows", "means of 8 ranks", "A: a turn a row", "rows as encoded",
                  "The same shares as turn: A: means of 1 row.", "assumes that each has the same nll"):
        assert words in text


def test_files_with_the_same_name_are_told_apart() -> None:
    assert "a/x.jsonl:1 messages[1]" in printed(REPORTS["same names"]())
    report = REPORTS["many files"]()
    assert "[+] 5 more files" in printed(report)
    assert sum(part.tokens for part in report.files) == report.counts["trained_tokens"]


@pytest.mark.parametrize("name", REPORTS)
def test_sections_and_weights_fit_the_page(name: str) -> None:
    report = REPORTS[name]()
    sections = report.sections()
    for section in sections:
        assert section.table or section.curve
        assert len({len(line) for line in section.table}) <= 1
        assert all(isinstance(cell, str) for line in section.table for cell in line)
    curves = [section.curve for section in sections if section.curve]
    assert all(curve[0] == (0.0, 0.0) and curve[-1] == pytest.approx((100.0, 100.0)) for curve in curves)
    assert page([], sections=sections)


def test_weights_of_shown_rows_are_their_shares_in_the_whole() -> None:
    data = [per_turn(rows) if i % 2 else rows for i, rows in enumerate(chats(9, 4))]
    report = compare(data)
    shown = [row for rows in data[2:6] for row in rows]
    weights = report.weights_by_reduction(shown)
    assert list(weights) == [way.name for way in report.reductions if not way.same_as]
    for name, lines in weights.items():
        shares = iter(np.split(report.shares_of(name, "conversation"), len(data))[2:6])
        for rows in data[2:6]:
            here, lines = lines[: len(rows)], lines[len(rows) :]
            want = float(next(shares)[0]) * report.counts["trained_tokens"]
            assert sum(float(np.sum(line)) for line in here) == pytest.approx(want, rel=1e-12)
    for row, line in zip(shown, weights["token"], strict=True):
        np.testing.assert_array_equal(line, row.weights)
    assert page(shown, decode=decode, weights_by_reduction=weights, sections=report.sections())


def test_the_demo_chats_show_what_format_a_and_format_b_do() -> None:
    report = compare(demo(row_format="per_turn"))
    assert report.counts["turns"] == report.counts["rows"] > report.counts["conversations"]
    token, turn, conversation = (report[name].deciles["turn"][0] for name in ("token", "turn", "conversation"))
    assert token < conversation < turn
    assert report["turn"].deciles["turn"] == pytest.approx([0.1] * 10, abs=0.005)
    assert report["A: means of 4 rows, shuffled"].spread > 5
