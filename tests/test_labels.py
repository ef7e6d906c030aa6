"""Rows that another tool prepared: reading them, telling what their tokens are, and what of them is trained."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from benchmarks.labels_peers import RESPONSE
from click.testing import CliRunner

from chatloss.chat import Conversation
from chatloss.cli import cli
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, DataError
from chatloss.labels import check_labels
from chatloss.labels.difference import DIFFERENCE_CAUSES
from chatloss.labels.findings import LABEL_CAUSES
from chatloss.labels.reconstruct import Document, Kind, Reconstructor
from chatloss.labels.report import LabelsReport
from chatloss.labels.rows import read_labels
from chatloss.labels.structure import Structure
from chatloss.sample import Reason, Sample
from tests import assets, conformance

Row = dict[str, Any]
FAMILIES = ["demo", "qwen3", "qwen2.5", "llama3", "mistral-v3", "gpt-oss", "gemma-like", "deepseek-v3", "smollm2"]


@cache
def encoder_of(name: str) -> ChatEncoder:
    directory = tokenizer_directory() if name == "demo" else assets.tokenizer_dir(name)
    return ChatEncoder.load(directory, clock=lambda: conformance.CLOCK)


@cache
def reconstructor_of(name: str) -> Reconstructor:
    encoder = encoder_of(name)
    return Reconstructor(Structure.of(encoder), encoder.decode, encoder.loaded.tokens.added)  # type: ignore[attr-defined]


def samples(name: str, shape: str = "plain") -> list[Sample]:
    messages, tools = conformance.SHAPES[shape]
    return encoder_of(name).examine(Conversation.from_messages(messages, tools, source="chats:1")).rows


def row_of(sample: Sample, mask: Any = None) -> Row:
    on = sample.weights != 0 if mask is None else np.asarray(mask, np.bool_)
    return {"input_ids": sample.input_ids, "labels": np.where(on, sample.input_ids, -100)}


def audited(name: str, rows: list[Row], **options: Any) -> LabelsReport:
    return check_labels(rows, encoder_of(name), **options)


def causes(report: LabelsReport) -> dict[str, int]:
    return {finding.cause: finding.count for finding in report.findings}


# -- reading -----------------------------------------------------------------------------------------------------------

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 10], "labels": [-100, 10]}]


def jsonl(rows: list[Row]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{**row, "messages": "not read"} for row in ROWS]), path)


def write_arrow(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


def write_directory(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(path)


@pytest.mark.parametrize(("name", "write"), [
    ("rows.jsonl", lambda path: path.write_bytes(jsonl(ROWS))),
    ("rows.json", lambda path: path.write_text(json.dumps(ROWS))),
    ("rows.jsonl.gz", lambda path: path.write_bytes(gzip.compress(jsonl(ROWS)))),
    ("rows.jsonl.zst", lambda path: path.write_bytes(zstandard.compress(jsonl(ROWS)))),
    ("rows.parquet", write_parquet), ("rows.arrow", write_arrow), ("prepared", write_directory),
])
def test_every_format_gives_the_same_rows(name: str, write: Callable[[Path], Any], tmp_path: Path) -> None:
    write(tmp_path / name)
    found = list(read_labels(tmp_path / name))
    assert [row.ids.tolist() for row in found] == [row["input_ids"] for row in ROWS]
    assert [row.weights.tolist() for row in found] == [[0, 0, 1, 1], [0, 1]]
    assert [row.source for row in found] == [f"{tmp_path / name}:1", f"{tmp_path / name}:2"]


def test_a_dataset_and_any_iterable_of_mappings_are_read() -> None:
    import datasets

    arrays = [{name: np.array(values) for name, values in row.items()} for row in ROWS]
    for data in (datasets.Dataset.from_list(ROWS), iter(ROWS), arrays):
        assert [row.weights.tolist() for row in read_labels(data)] == [[0, 0, 1, 1], [0, 1]]


@pytest.mark.parametrize(("row", "column", "weights"), [
    ({"loss_mask": [0, 1, 1]}, "loss_mask", [0, 1, 1]),
    ({"assistant_masks": [0, 1, 1], "completion_mask": [0, 0, 1]}, "assistant_masks x completion_mask", [0, 0, 1]),
    ({"labels": [-100, -100, 7], "loss_mask": [1, 1, 1]}, "labels", [0, 0, 1]),
    ({"loss_scale": [0, 0.5, 2]}, "loss_scale", [0, 0.5, 2]),
    ({"labels": [-100, 6, 7], "loss_scale": [1, 0.5, 0]}, "labels x loss_scale", [0, 0.5, 0]),
])
def test_the_column_that_was_read_is_told(row: Row, column: str, weights: list[float]) -> None:
    found, = read_labels([{"input_ids": [5, 6, 7], **row}])
    assert (found.column, found.weights.tolist()) == (column, weights)


@pytest.mark.parametrize(("row", "kind", "where", "words"), [
    ({"labels": [-100, 6]}, "length", "labels", "2 values for 3 ids"),
    ({"labels": [1, 2, 3]}, "labels", "labels[0]", "neither -100 nor the id 5"),
    ({"labels": [0, 0, 7]}, "labels", "labels[0]", "label 0"),
    ({"loss_mask": [0, 2, 1]}, "mask", "loss_mask[1]", "loss_mask is 2"),
    ({"loss_scale": [0, -1, 1]}, "mask", "loss_scale[1]", "is -1"),
    ({"labels": [-100, "x", 7]}, "field", "labels", "not integers"),
    ({"labels": [[-100, 6, 7]]}, "field", "labels", "flat list"),
    ({}, "field", "", "nothing says which ids"),
    ({"input_ids": [5, 6, 99], "labels": [-100, 6, 99]}, "ids", "input_ids[2]", "id 99 is no token"),
    ({"input_ids": [5, -200, 7], "labels": [-100, -100, 7]}, "ids", "input_ids[1]", "id -200"),
    ({"labels": [-100, 6, 7], "position_ids": [0, 1, 5]}, "position_ids", "position_ids[2]", "5 follows 1"),
    ({"labels": [-100, 6, 7], "seq_lengths": [2, 2]}, "length", "seq_lengths", "add up to 4 for 3 ids"),
])
def test_a_row_that_cannot_be_read_is_rejected_with_its_field(row: Row, kind: str, where: str, words: str) -> None:
    reader = read_labels([{"input_ids": [5, 6, 7], **row}], vocabulary=50)
    assert list(reader) == []
    reject, = reader.rejects
    assert reject.kind == kind and words in reject.what and reject.hint
    assert reject.where == f"<list>:1 {where}".strip()


def test_what_is_no_data_at_all_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    paths = [tmp_path / name for name in ("none.jsonl", "", "empty.jsonl", "cut.parquet")]
    for data in (*paths, {"input_ids": [1]}):
        with pytest.raises(DataError) as caught:
            list(read_labels(data))
        assert caught.value.hint


@pytest.mark.parametrize("layout", [
    {"position_ids": [0, 1, 2, 0, 1, 0]}, {"seq_lengths": [3, 2, 1]}, {"attention_mask": [1, 1, 1, 2, 2, 3]},
])
def test_packed_rows_are_split_into_documents(layout: Row) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    row, = read_labels([{"input_ids": ids, "labels": ids, **layout}])
    assert row.starts.tolist() == [0, 3, 5] and row.said


def test_padding_on_either_side_belongs_to_nobody() -> None:
    ids = [0, 0, 5, 6, 7, 0]
    attended = {"attention_mask": [0, 0, 1, 1, 1, 0], "position_ids": [1, 1, 0, 1, 2, 1]}
    row, = read_labels([{"input_ids": ids, "labels": [-100, -100, -100, 6, 7, -100], **attended}])
    assert row.padding.tolist() == [True, True, False, False, False, True] and row.starts.tolist() == [2]


# -- what the tokens are -----------------------------------------------------------------------------------------------


def reasons_of(document: Document) -> list[bool]:
    return [Kind(int(kind)).expected for kind in document.kinds]


@pytest.mark.parametrize("shape", ["plain", "system", "tools", "reasoning"])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_a_lawful_row_exactly_the_trained_tokens_are_told_to_be_the_models_own(name: str, shape: str) -> None:
    for sample in samples(name, shape):
        document = reconstructor_of(name).document(sample.input_ids)
        expected = np.array(reasons_of(document))
        last = document.turns[-1]
        trained = sample.weights != 0
        assert (expected[last.answer :] == trained[last.answer :]).all(), "the turn that the row is made for"
        assert not (trained & ~expected).any(), "nothing trained is taken for another's text"
        assert "".join(document.text_of(i, i + 1) for i in range(len(document.ids))) == document.text


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gpt-oss"])
def test_on_real_tool_chats_the_reconstruction_finds_every_answer(name: str) -> None:
    from benchmarks.labels import conversations

    for chat, _ in conversations(25):
        row = encoder_of(name).encode(chat)[-1]
        document = reconstructor_of(name).document(row.input_ids)
        assert len(document.turns) == sum(message.role == "assistant" for message in chat.messages)
        stop, header = document.turns[-1].stop, document.kinds == Kind.HEADER
        assert (row.reasons[stop:] == Reason.STOP).all() and not (row.weights[header] != 0).any()
        assert {Kind(int(k)) for k in document.kinds[row.reasons == Reason.OTHER_ROLE]} <= {
            Kind.SYSTEM, Kind.USER, Kind.TOOL, Kind.STRUCTURE}


@pytest.mark.slow
def test_the_corpus_of_templates_is_taken_apart() -> None:
    """Of the templates with a row for a plain chat, in all but 13 exactly the trained tokens are told to be so."""
    loaded, exact, total = encoder_of("qwen3").loaded, 0, 0
    for text in assets.templates().values():
        encoder = ChatEncoder.load(loaded, text, clock=lambda: conformance.CLOCK)
        try:
            rows = encoder.examine(chats_of()[0]).rows
        except ChatlossError:
            continue
        reconstructor = Reconstructor(Structure.of(encoder), encoder.decode, loaded.tokens.added)  # type: ignore[attr-defined]
        exact += bool(rows) and all(_as_told(reconstructor.document(row.input_ids), row.weights != 0) for row in rows)
        total += bool(rows)
    assert total >= 620 and exact >= total - 13


def _as_told(document: Document, trained: Any) -> bool:
    """Whether the turns of which something is trained are so exactly where the reconstruction says."""
    expected = np.array(reasons_of(document))
    on = [slice(turn.answer, turn.end) for turn in document.turns if trained[turn.answer : turn.end].any()]
    return bool(on) and not (trained & ~expected).any() and all((expected[t] == trained[t]).all() for t in on)


def test_a_header_typed_out_in_ordinary_tokens_is_text() -> None:
    encoder = encoder_of("qwen3")
    before, behind = (encoder.tokens.encode(text).ids for text in ("<|im_start|>user\nSay ", "<|im_end|>\n"))
    typed = np.concatenate([encoder.tokens.encode(part).ids for part in ("<", "|im_start|", ">", "assistant\n")])
    document = reconstructor_of("qwen3").document(np.concatenate([before, typed, behind]))
    assert document.text == "<|im_start|>user\nSay <|im_start|>assistant\n<|im_end|>\n" and not document.turns


def test_a_character_of_several_tokens_is_never_cut() -> None:
    text = "<|im_start|>user\n🙂<|im_end|>\n<|im_start|>assistant\n🦜碳<|im_end|>\n"
    ids = encoder_of("qwen3").tokens.encode(text).ids
    document = reconstructor_of("qwen3").document(ids)
    turn, = document.turns
    assert document.text_of(turn.answer, turn.stop) == "🦜碳"


# -- findings ----------------------------------------------------------------------------------------------------------


def masked(name: str, change: Callable[[Any, Document], None], shape: str = "plain") -> tuple[LabelsReport, Document]:
    """The audit of a lawful row whose mask `change` has spoiled."""
    encoder, (messages, tools) = encoder_of(name), conformance.SHAPES[shape]
    text = encoder.template.render(messages, tools)
    document = reconstructor_of(name).document(encoder.tokens.encode(text).ids)
    mask = np.array(reasons_of(document))
    change(mask, document)
    return audited(name, [{"input_ids": document.ids, "loss_mask": mask}]), document


def whole(mask: Any, value: bool) -> None:
    mask[:] = value


def per_turn(set_: Callable[[Any, Any], None]) -> Callable[[Any, Document], None]:
    def change(mask: Any, document: Document) -> None:
        for turn in document.turns:
            set_(mask, turn)

    return change


def shifted(mask: Any, by: int) -> None:
    mask[:] = np.roll(mask, by)


SPOILED: dict[str, Callable[[Any, Document], None]] = {
    "stop_untrained": per_turn(lambda mask, turn: mask.__setitem__(slice(turn.stop, turn.end), False)),
    "headers_trained": per_turn(lambda mask, turn: mask.__setitem__(slice(turn.header, turn.answer), True)),
    "prompt_tokens_trained": per_turn(lambda mask, turn: mask.__setitem__(slice(turn.answer - 1, turn.answer), True)),
    "past_stop": lambda mask, document: mask.__setitem__(document.kinds == Kind.AFTER_STOP, True),
    "user_trained": lambda mask, document: mask.__setitem__(document.kinds == Kind.USER, True),
    "structure_trained": lambda mask, document: mask.__setitem__(document.kinds == Kind.STRUCTURE, True),
    "everything_trained": lambda mask, _: whole(mask, True),
    "nothing_trained": lambda mask, _: whole(mask, False),
    "answer_start_untrained": per_turn(lambda mask, turn: mask.__setitem__(turn.answer, False)),
    "answer_gaps": per_turn(lambda mask, turn: mask.__setitem__(turn.answer + 2, False)),
    "only_last_turn": lambda mask, document: mask.__setitem__(slice(0, document.turns[-1].header), False),
    "turns_untrained": lambda mask, document: mask.__setitem__(slice(document.turns[-1].header, None), False),
    "mask_shifted_right": lambda mask, _: shifted(mask, 1),
    "mask_shifted_left": lambda mask, _: shifted(mask, -1),
}


@pytest.mark.parametrize("cause", SPOILED)
def test_a_spoiled_mask_is_told_by_its_name_and_by_no_other(cause: str) -> None:
    report, document = masked("qwen2.5", SPOILED[cause])
    found = set(causes(report)) - {"first_token"}
    assert found == {cause}
    turns = report[cause].unit == "turn" and cause != "turns_untrained"
    assert report[cause].count == (len(document.turns) if turns else 1)
    assert report[cause].example == "<list>:1" and "⟦" in report[cause].detail and report[cause].remedy


@pytest.mark.parametrize("name", FAMILIES)
def test_lawful_rows_have_no_finding_beyond_what_rows_of_their_own_mean(name: str) -> None:
    rows = [row_of(sample) for shape in conformance.SHAPES for sample in samples(name, shape)]
    meant = {"only_last_turn", "turns_untrained", "empty_think_trained", "other_stop"}
    assert set(causes(audited(name, rows))) <= meant


def test_labels_that_are_shifted_already_are_told_and_then_read_as_meant() -> None:
    sample, = samples("llama3")
    labels = np.append(sample.labels[1:], -100)
    report = audited("llama3", [{"input_ids": sample.input_ids, "labels": labels}])
    assert causes(report) == {"labels_shifted": 1} and report.exit_code() == 1
    assert report.counts["trained_tokens"] == sample.n_trained


def test_an_end_label_in_place_of_the_next_header_is_a_convention_and_no_reject() -> None:
    sample, = samples("llama3")
    labels = sample.labels
    labels[np.flatnonzero(np.diff((labels != -100).astype(int)) == -1)[0] + 1] = 128009
    report = audited("llama3", [{"input_ids": sample.input_ids, "labels": labels}])
    assert causes(report) == {"label_differs": 1}


def test_tool_and_system_text_and_padding_are_told_apart() -> None:
    sample = samples("llama3", "tools")[-1]
    document = reconstructor_of("llama3").document(sample.input_ids)
    for kind, cause in ((Kind.TOOL, "tool_trained"), (Kind.SYSTEM, "system_trained")):
        mask = (sample.weights != 0) | (document.kinds == kind)
        assert set(causes(audited("llama3", [row_of(sample, mask)]))) == {cause}
    row = row_of(sample)
    padded = {"input_ids": [*row["input_ids"], 128004, 128004], "labels": [*row["labels"], 128004, 128004],
              "attention_mask": [1] * len(sample) + [0, 0]}
    assert set(causes(audited("llama3", [padded]))) == {"padding_trained"}


def test_padding_is_told_from_the_pad_token_where_nothing_says_so() -> None:
    pad = encoder_of("qwen2.5").tokens.ids_of("<|endoftext|>")
    sample = samples("qwen2.5")[-1]
    for left, right, told in ((0, 3, set()), (3, 0, set()), (0, 2, {"padding_trained"})):
        ids = np.array(pad * left + sample.input_ids.tolist() + pad * right)
        labels = np.array([-100] * left + sample.labels.tolist() + (pad if told else [-100]) * right)
        assert set(causes(audited("qwen2.5", [{"input_ids": ids, "labels": labels}]))) == told


def test_rows_of_nothing_are_told() -> None:
    rows = [{"input_ids": [], "labels": []}, {"input_ids": [5, 5], "labels": [-100, 5], "attention_mask": [0, 0]}]
    assert causes(audited("qwen2.5", rows)) == {"empty_row": 2, "padding_trained": 1}


def test_padding_on_the_left_changes_no_comparison() -> None:
    row, = samples("llama3")
    padded = {"input_ids": [128004] * 3 + row.input_ids.tolist(), "labels": [-100] * 3 + row.labels.tolist()}
    for more in ({}, {"attention_mask": [0] * 3 + [1] * len(row)}):
        report = audited("llama3", [{**padded, **more}], chats=chats_of())
        assert causes(report) == {} and report.differences == {"equal": 3}


def packed(*rows: Row, **layout: Any) -> Row:
    joined = {name: np.concatenate([row[name] for row in rows]) for name in ("input_ids", "labels")}
    return {**joined, **layout}


def test_packs_are_audited_document_by_document() -> None:
    sample, = samples("llama3")
    row, size = row_of(sample), len(sample)
    bare = {**row, "labels": np.where(np.arange(size) == 0, row["input_ids"], row["labels"])}
    restart, on = [*range(size), *range(size)], [*range(2 * size)]
    assert causes(audited("llama3", [packed(row, row, position_ids=restart)])) == {}
    assert causes(audited("llama3", [packed(row, bare, position_ids=restart)])) == {"cross_document": 1}
    assert causes(audited("llama3", [packed(row, row, position_ids=on)])) == {"positions_run_on": 1}
    assert causes(audited("llama3", [packed(row, row)])) == {"several_documents": 1}
    assert causes(audited("llama3", [bare])) == {"first_token": 1}
    report = audited("llama3", [packed(row, bare, seq_lengths=[size, size])])
    assert report["cross_document"].example == "<list>:1 document 2"


def test_a_pack_that_cuts_chats_apart_is_told() -> None:
    encoder, (messages, _) = encoder_of("qwen2.5"), conformance.SHAPES["system"]
    text = encoder.template.render(messages)
    ids = encoder.tokens.encode(text + text).ids
    document = reconstructor_of("qwen2.5").document(ids)
    mask = np.array(reasons_of(document))
    assert causes(audited("qwen2.5", [{"input_ids": ids, "loss_mask": mask}])) == {"several_documents": 1}
    cut = document.turns[0].answer + 2
    row = {"input_ids": ids[cut : len(ids) // 2], "loss_mask": mask[cut : len(ids) // 2]}
    assert set(causes(audited("qwen2.5", [row]))) == {"cut_row", "first_token"}


def test_rows_of_another_template_are_told_and_stops_still_looked_at() -> None:
    text = "### Question: what?\n### Answer: this<|eot_id|>"
    ids = encoder_of("llama3").tokens.encode(text).ids
    labels = np.where(np.arange(len(ids)) >= len(ids) - 2, ids, -100)
    labels[-1] = -100
    assert set(causes(audited("llama3", [{"input_ids": ids, "labels": labels}]))) == {"unrecognised", "stop_untrained"}


def test_rejects_are_findings_and_too_many_are_an_error() -> None:
    sample, = samples("demo")
    rows = [row_of(sample), {"input_ids": [1, 2], "labels": [1]}]
    report = audited("demo", rows)
    assert causes(report) == {"rejected_length": 1, "too_many_rejects": 1}
    assert report["rejected_length"].example == "<list>:2" and report.counts["rejected_rows"] == 1
    assert set(causes(audited("demo", rows, max_rejects=0.5))) == {"rejected_length"}


# -- beside the chats --------------------------------------------------------------------------------------------------


def chats_of(shape: str = "plain") -> list[Conversation]:
    messages, tools = conformance.SHAPES[shape]
    return [Conversation.from_messages(messages, tools, source="chats:1")]


@pytest.mark.parametrize("shape", ["plain", "system", "tools", "reasoning"])
@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_rows_are_equal_turn_by_turn(name: str, shape: str) -> None:
    rows = samples(name, shape)
    if rows:
        report = audited(name, [row_of(row) for row in rows], chats=chats_of(shape))
        trained = {(i, int(turn)) for i, row in enumerate(rows) for turn in set(row.turns.tolist()) - {-1}}
        assert report.differences == {"equal": len(trained)}
        assert report.tokens["theirs only"] == report.tokens["ours only"] == 0


def test_each_difference_has_its_name() -> None:
    encoder, (chat,) = encoder_of("qwen3"), chats_of()
    first, *_, last = encoder.encode(chat)
    assert audited("qwen3", [row_of(last)], chats=[chat]).differences == {"turn_lost": 2, "equal": 1}

    ids = last.input_ids
    everything = np.array(reasons_of(reconstructor_of("qwen3").document(ids)))
    found = audited("qwen3", [row_of(last, everything)], chats=[chat])
    assert found.differences == {"reasoning_missing": 2, "equal": 1}

    system = encoder.tokens.encode("<|im_start|>system\nOther.<|im_end|>\n").ids
    row = {"input_ids": np.concatenate([system, ids]), "labels": np.append(np.full(len(system), -100), last.labels)}
    assert audited("qwen3", [row], chats=[chat]).differences == {"turn_lost": 2, "context_differs": 1}

    report = audited("qwen3", [row_of(first)], chats=[Conversation.from_messages(conformance.SHAPES["tools"][0])])
    assert set(causes(report)) == {"unmatched", "chat_without_row"}


def test_rows_are_matched_whatever_their_order_and_how_alike_the_chats_are() -> None:
    encoder = encoder_of("llama3")
    ask = {"role": "user", "content": "Go on, please."}
    chats = [Conversation.from_messages([ask, {"role": "assistant", "content": "Yes."}, ask,
                                         {"role": "assistant", "content": f"It is {i}."}], source=f"c:{i}")
             for i in range(8)]
    rows = [row_of(row) for i in (3, 0, 1, 7, 2, 5, 4, 6) for row in encoder.encode(chats[i])]
    assert audited("llama3", rows, chats=chats).differences == {"equal": 16}
    assert audited("llama3", rows[:4], chats=chats).differences["chats without a row"] == 4


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> Any:
    return CliRunner().invoke(cli, ["check", "--tokenizer", str(tokenizer_directory()), *arguments])


@pytest.fixture(scope="module")
def demo_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chatloss.reader import read

    encoder, path = encoder_of("demo"), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [row for chat in list(read(str(chats_file())))[:20] for row in encoder.encode(chat)]  # type: ignore[arg-type]
    spoiled = [np.where(row.reasons == Reason.STOP, -100, row.labels).tolist() for row in rows]
    path.write_bytes(jsonl([{"input_ids": row.input_ids.tolist(), "labels": labels}
                            for row, labels in zip(rows, spoiled, strict=True)]))
    return path


def test_the_command_prints_json_and_exits_1_on_errors(demo_rows: Path) -> None:
    result = command("--labels", str(demo_rows), "--chats", str(chats_file()), "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == 1 and told["severities"]["error"] == 1
    assert told["findings"][0]["cause"] == "stop_untrained" and told["columns"] == {"labels": told["input_rows"]}
    assert told["tokens_by_kind"]["stop"]["trained"] == 0 and told["differences"]["stop_untrained"] == told["turns"]


def test_the_command_writes_a_page_with_both_masks(demo_rows: Path, tmp_path: Path) -> None:
    result = command("--labels", str(demo_rows), "--html", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert result.exit_code == 1 and "stop untrained" in result.stdout and "trained by labels" in result.stdout
    assert '"peer":"labels"' in page and "stop untrained" in page


def test_a_tokenizer_without_a_template_is_enough_for_what_does_not_depend_on_messages(
    demo_rows: Path, tmp_path: Path
) -> None:
    for path in tokenizer_directory().iterdir():
        if path.suffix == ".json":
            config = json.loads(path.read_text("utf-8"))
            config.pop("chat_template", None)
            (tmp_path / path.name).write_text(json.dumps(config))
    result = CliRunner().invoke(cli, ["check", "--labels", str(demo_rows), "--tokenizer", str(tmp_path), "--json"])
    told = [finding["cause"] for finding in json.loads(result.stdout)["findings"]]
    assert told == ["stop_untrained", "no_template"]


@pytest.mark.parametrize("arguments", [["data.jsonl", "--labels", "x"], ["data.jsonl", "--chats", "x"], []])
def test_what_does_not_go_together_is_a_usage_error(arguments: list[str]) -> None:
    result = command(*arguments)
    assert result.exit_code == 2 or getattr(result.exception, "exit_code", 0) == 2


def test_the_page_of_the_docs_explains_every_finding() -> None:
    text = (Path(__file__).parents[1] / "docs" / "labels.md").read_text("utf-8")
    for name, cause in {**LABEL_CAUSES, **DIFFERENCE_CAUSES}.items():
        assert f"| `{name}` | {cause.severity} | {cause.text} | {cause.remedy} |" in text, name


def test_markers_of_the_benchmark_are_those_of_the_templates() -> None:
    for name, response in RESPONSE.items():
        assert response.rstrip("\n") in {opener.text.rstrip("\n") for opener in Structure.of(encoder_of(name)).openers}
