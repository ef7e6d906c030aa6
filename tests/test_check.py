"""The audit counts every turn once, finds what is planted, and what it advises works."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from chatloss.audit import audit
from chatloss.causes import CAUSES
from chatloss.chat import Conversation, Label, Preference
from chatloss.check import check
from chatloss.check_report import COUNTS, TURN_STATUSES, CheckReport
from chatloss.demo import ASSETS, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import DataError, TemplateError
from chatloss.findings import SEVERITIES
from chatloss.formats import Row
from chatloss.load import load_tokenizer
from chatloss.markers import Markers
from chatloss.page import page
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.tally import Duplicates, Lengths
from tests import assets

LOADED = load_tokenizer(tokenizer_directory())
ENCODER = ChatEncoder.load(LOADED)
MESSY = ASSETS / "messy.jsonl"
BOS: dict[str, Any] = {"special_tokens": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}}


def encoder(policy: Policy | None = None, template: str | None = None) -> ChatEncoder:
    return ChatEncoder.load(LOADED, template, policy)


def chat(*texts: str, source: str = "a.jsonl:1", **more: Any) -> Conversation:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Conversation.from_messages(messages, source=source, **more)


def messages_of(*pairs: tuple[str, str], source: str = "a.jsonl:1") -> Conversation:
    return Conversation.from_messages([{"role": role, "content": text} for role, text in pairs], source=source)


def rows_of(report: CheckReport, cause: str) -> set[int]:
    return {int(source.rpartition(":")[2]) for source in report[cause].rows} if cause in report else set()


# -- what is planted is found ------------------------------------------------------------------------------------------

# What messy.jsonl shows -> the cause that says so. None: nothing that an audit of single answers can know.
SHOWN = {
    "empty answer": "empty_answer", "answer of whitespace only": "empty_answer",
    "exact duplicate of the next row": None, "exact duplicate of the row before": "duplicate_conversation",
    "same answer to another question in the next two rows": None,
    "same answer to another question in the row before and the row after": "duplicate_answer",
    "same answer to another question in the two rows before": "duplicate_answer",
    "same question as in the next row, answers contradict": None,
    "same question as in the row before, answers contradict": None,
    "control tokens in user text": "control_tokens", "control token in an answer": "control_tokens",
    "stop of another model family as text": "foreign_control",
    "already rendered: the content is a whole template": "control_tokens",
    "role label left in the answer": "role_label", "two user messages in a row": "users_in_a_row",
    "two answers in a row": "answers_in_a_row", "answer before any question": "assistant_first",
    "system message in the middle": "system_inside", "ends with the user, nothing to train": "no_turns",
    "no messages": "rejected_field", "every answer has train false, nothing to train": "nothing_trained",
    "answer cut in the middle of a sentence": "maybe_cut", "answer loops": "repeats",
    "reasoning both inline and in its own field": "reasoning_twice", "<think> that is never closed": "unclosed_think",
    "content is a number": "rejected_field", "messages is a string": "rejected_json", "unknown role": "unknown_role",
    "message without content": "rejected_field", "train is a string": "rejected_field",
    "tool arguments are broken JSON": "broken_arguments", "call of a tool that is not offered": "unknown_tool",
    "tool result that no call asked for": "result_without_call", "tool call without a result": "call_without_result",
    "image in the content": "rejected_media", "text decoded with the wrong encoding": "mojibake",
    "replacement characters": "mojibake", "half of a surrogate pair": "rejected_field",
    "broken JSON: the line is cut": "rejected_json", "weight is negative": None,
    "ShareGPT row among OpenAI rows": None,
}  # fmt: skip


def test_every_problem_planted_in_the_messy_file_is_found_in_its_row() -> None:
    report = check(read(MESSY, max_rejects=1.0), ENCODER)
    lines = MESSY.read_text("utf-8").splitlines()
    for row, line in enumerate(lines, 1):
        shown = json.loads(line)["shows"] if line.endswith("}") else "broken JSON: the line is cut"
        cause = SHOWN[shown]
        assert cause is None or row in rows_of(report, cause), (row, shown, cause)
    assert report.counts["input_rows"] == len(lines)


def test_the_demo_chats_have_no_errors_and_no_warnings() -> None:
    report = check(read(ASSETS / "chats.jsonl"), ENCODER)
    assert report.severities == {"error": 0, "warning": 0, "info": len(report.findings)}
    assert report.exit_code(strict=True) == 0


# -- counts ------------------------------------------------------------------------------------------------------------

POLICIES = (
    Policy(), Policy(off_prompt="drop", altered="drop", unrenderable="drop", control_tokens="parity"),
    Policy(off_prompt="keep", altered="keep", row_format="multi_turn", unlawful="keep", missing_stop="leave"),
    Policy(off_prompt="splice", turns="last_round", parts=("content",), row_format="per_turn"),
    Policy(max_length=300, row_format="multi_turn", missing_stop="error"), Policy(max_length=90, overflow="window"),
    Policy(max_length=60, overflow="right"), Policy(max_length=120, overflow="drop", turns="last"),
    Policy(max_length=40, overflow="error", roles=("assistant", "user")),
)


def whole(report: CheckReport, items: list[Conversation], roles: tuple[str, ...]) -> None:
    """The sums that must hold in any report."""
    turns = sum(message.role in roles for item in items for message in item.messages)
    assert sum(report.turns.values()) == report.counts["turns"] == turns
    assert set(report.turns) == set(TURN_STATUSES) and set(report.counts) == set(COUNTS)
    assert sum(report.reasons.values()) == report.counts["tokens"] >= report.counts["trained_tokens"]
    assert report.counts["trained_turns"] <= turns and report.counts["refused_turns"] <= turns
    for finding in report.findings:
        assert finding.severity in SEVERITIES and finding.text and finding.remedy, finding
        assert finding.share is None or 0 < finding.share <= 1, finding
        assert finding.count >= len(finding.rows) > 0 or not finding.example, finding
    order = [(SEVERITIES.index(f.severity), -f.count) for f in report.findings]
    assert order == sorted(order)
    assert json.loads(json.dumps(report.to_dict()))["turns"] == turns


def some_chats(family: str) -> list[Conversation]:
    items: list[Conversation] = []
    for name in ("tools_en", "reasoning_tools", "multilingual"):
        items += [row for row in islice(read(assets.chat_file(name)), 3) if isinstance(row, Conversation)]
    items += [row for row in read(MESSY, max_rejects=1.0) if isinstance(row, Conversation)]
    return items + [row for row in islice(read(ASSETS / "chats.jsonl"), 150, 156) if isinstance(row, Conversation)]


SLOW = ["gpt-oss", "deepseek-v3", "llama3", "mistral-v1", "qwen3.5", "tekken", "smollm2"]


@pytest.mark.parametrize(
    "family", ["qwen3", "mistral-v3", "gemma-like", *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_every_turn_is_counted_once_under_every_policy(family: str) -> None:
    loaded = load_tokenizer(assets.tokenizer_dir(family))
    items = some_chats(family)
    for policy in POLICIES:
        report = check(items, ChatEncoder.load(loaded, None, policy))
        whole(report, items, policy.roles)


words = st.text(st.sampled_from("ab \n") | st.characters(codec="utf-8"), max_size=12)
texts = st.lists(st.sampled_from(["<think>", "</think>", "<|im_end|>", "Yes. ", "```", "</s>", "user:"]) | words,
                 max_size=4).map("".join)
roles = st.sampled_from(["user", "assistant", "assistant", "system", "tool", "critic"])


@given(st.lists(st.tuples(roles, texts), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_conversation_makes_the_audit_raise_or_lose_a_turn(pairs: list[tuple[str, str]]) -> None:
    item = messages_of(*pairs)
    whole(check([item], ENCODER), [item], ("assistant",))


def test_outcomes_of_the_report_are_those_of_the_encoder() -> None:
    items = [row for row in read(ASSETS / "chats.jsonl") if isinstance(row, Conversation)]
    rewriting = encoder(template=str(tokenizer_directory() / "chat_template_rewrites.jinja"))
    report = check(items, rewriting)
    found = [outcome for item in items for outcome in rewriting.examine(item).outcomes.values()]
    assert report.turns["split"] == found.count("split") == report["split"].count > 0
    assert report.turns["exact"] == found.count("exact")
    rows = [row for item in items for row in rewriting.encode(item)]
    assert report.counts["tokens"] == sum(map(len, rows)) and report.counts["rows"] == len(rows)
    assert report.counts["trained_tokens"] == sum(row.n_trained for row in rows)
    assert report.lengths["max"] == max(map(len, rows))


def test_a_conversation_that_cannot_be_used_as_a_whole_has_only_rejected_turns() -> None:
    injected = chat("<|im_end|>", "One.", "Two?", "Three.")
    report = check([injected], ENCODER)
    assert report.turns["rejected"] == 2 and report.counts["refused_turns"] == 2
    found = report["control_tokens"]
    assert (found.severity, found.detail) == ("error", "'<|im_end|>' in messages[0].content")
    assert check([injected], encoder(Policy(control_tokens="parity"))).turns["exact"] == 2


def test_what_the_policy_handles_is_no_error() -> None:
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.role == 'user' }}<|im_end|>"
                "{% endfor %}")
    for choice, severity in (("error", "error"), ("drop", "info"), ("keep", "warning")):
        report = check([chat("Hi", "Hello there.")], encoder(Policy(altered=choice), template))
        assert report.turns["altered"] == 1 and report["altered_content"].severity == severity
    assert "nothing_trained" in check([chat("Hi", "Hello there.")], encoder(Policy(altered="drop"), template))


def test_exit_codes() -> None:
    fine, warned, wrong = [chat("Hi", "Hello.")], [chat("Hi", "")], [chat("Hi", "<|im_start|>")]
    codes = [(check(items, ENCODER).exit_code(), check(items, ENCODER).exit_code(strict=True))
             for items in (fine, warned, wrong)]
    assert codes == [(0, 0), (0, 1), (1, 1)]


def test_a_report_of_nothing_is_still_whole() -> None:
    report = check([], ENCODER)
    whole(report, [], ("assistant",))
    assert "0 input rows" in str(report.render()) and report.lengths["max"] == 0


# -- rejects -----------------------------------------------------------------------------------------------------------


def test_too_many_rejects_are_an_error_with_the_share_that_would_pass() -> None:
    report = check(read(MESSY), ENCODER)
    finding = report["too_many_rejects"]
    assert finding.severity == "error" and finding.count == report.counts["rejected_rows"] == 8
    share = float(finding.remedy.split()[-1])
    lenient = read(MESSY, max_rejects=1.0)
    assert "too_many_rejects" not in check(lenient, ENCODER)
    assert "too_many_rejects" not in check(lenient, ENCODER, max_rejects=share)
    assert "too_many_rejects" in check(lenient, ENCODER, max_rejects=share - 0.01)
    assert report["rejected_field"].count == 5 and report["rejected_field"].severity == "warning"


def test_a_file_that_cannot_be_read_is_no_finding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        check(read(tmp_path / "nowhere.jsonl"), ENCODER)


def test_a_template_that_does_not_compile_is_told_once() -> None:
    with pytest.raises(TemplateError, match="does not compile"):
        check([chat("Hi", "Hello.")] * 3, encoder(template="{% if %}\n{{"))


# -- other rows --------------------------------------------------------------------------------------------------------


def test_both_answers_of_a_pair_are_audited_and_their_prompt_once() -> None:
    prompt = ({"role": "assistant", "content": "Welcome to the library."}, {"role": "user", "content": "Hi</s>"})
    pair = [Conversation.from_messages([*prompt, {"role": "assistant", "content": text}], source="a.jsonl:1")
            for text in ("Yes.", "")]
    items: list[Row] = [Preference(pair[0].messages[:2], *pair, source="a.jsonl:1"), Label(pair[1], True, "a.jsonl:2")]
    report = check(items[:1], ENCODER)
    assert report["foreign_control"].count == 1 and report["foreign_control"].example == "a.jsonl:1 chosen messages[1]"
    assert report["empty_answer"].example == "a.jsonl:1 rejected messages[2]"
    assert report.counts["turns"] == 4 == sum(report.turns.values())
    assert check(items[1:], ENCODER)["empty_answer"].count == 1


def test_plain_text_needs_markers() -> None:
    rows = [{"text": "### Q: 1 + 1?\n### A: 2"}, {"text": "### Q: nothing"}]
    report = check(read(rows), ENCODER)
    assert report["text_rows"].count == 2 and report.exit_code() == 1
    report = check(read(rows), ENCODER, markers=Markers("last", "### A:"))
    assert report.counts["trained_tokens"] > 0 and report.turns["exact"] == 1 and report["no_marker"].count == 1


# -- stops, BOS, tokenizers --------------------------------------------------------------------------------------------


def test_a_template_of_another_model_is_told_by_its_control_texts() -> None:
    loaded = load_tokenizer(assets.tokenizer_dir("qwen3"))
    foreign = ChatEncoder.load(replace(loaded, special_tokens={**loaded.special_tokens, "bos_token": "<|endoftext|>"}),
                               assets.template(assets.NATIVE["llama3"]))
    report = check([chat("Hi", "Hello.")], foreign)
    assert report["stop_not_one_token"].severity == "warning" and "<|eot_id|>" in report["stop_not_one_token"].text
    assert "<|start_header_id|>" in report["control_not_one_token"].text
    native = check([chat("Hi", "Hello.")], ChatEncoder.load(loaded))
    assert not {"stop_not_one_token", "control_not_one_token", "stop_unknown_to_engines"} & {
        finding.cause for finding in native.findings}


@pytest.mark.parametrize(
    ("stop_ids", "eos", "cause"),
    [((2,), "<|im_end|>", None), ((), "<|im_end|>", "stop_not_in_generation_config"),
     ((0,), "<|im_end|>", "stop_not_in_generation_config"), ((0,), "<|endoftext|>", "stop_unknown_to_engines")],
)
def test_a_stop_that_no_engine_knows_is_found(stop_ids: tuple[int, ...], eos: str, cause: str | None) -> None:
    loaded = replace(LOADED, stop_ids=stop_ids, special_tokens={"eos_token": eos})
    report = check([chat("Hi", "Hello.")], ChatEncoder.load(loaded))
    assert {f.cause for f in report.findings} == ({cause} if cause else set())
    assert cause is None or "2" in report[cause].remedy


def test_a_row_that_begins_with_bos_twice_is_found() -> None:
    loaded = replace(LOADED, special_tokens={**LOADED.special_tokens, "bos_token": "<|endoftext|>"})
    template = ("{{ bos_token }}{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
                "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    assert check([chat("Hi", "Hello.")], ChatEncoder.load(loaded, template))["double_bos"].count == 1
    once = template.replace("{{ bos_token }}", "", 1)
    assert "double_bos" not in check([chat("Hi", "Hello.")], ChatEncoder.load(loaded, once))


# -- remedies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["zai-org-GLM-5", "google-gemma-4-31B-it"])
def test_the_template_argument_that_is_advised_settles_it(name: str) -> None:
    loaded, template = load_tokenizer(assets.tokenizer_dir("qwen3")), assets.template(name)
    report = check([chat("Hi", "Hello.")], ChatEncoder.load(replace(loaded, **BOS), template))
    assert report.turns["off_prompt"] == 1 and report.exit_code() == 1
    kwargs = json.loads(report["off_prompt"].remedy.split("'")[1])
    settled = check([chat("Hi", "Hello.")], ChatEncoder.load(replace(loaded, **BOS), template, template_kwargs=kwargs))
    assert settled.turns["exact"] == 1 and settled.exit_code() == 0


def test_the_edit_that_is_advised_settles_it() -> None:
    mistral = ChatEncoder.load(assets.tokenizer_dir("mistral-v3"))
    item = messages_of(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."))
    report = check([item], mistral)
    assert report["off_prompt"].remedy.startswith("put the system text into the first user message")
    assert check([chat("Be brief.\n\nHi", "Hello.")], mistral).exit_code() == 0


@pytest.mark.parametrize(
    ("pairs", "cause"),
    [([("user", "a"), ("user", "b"), ("assistant", "c")], "unrenderable_order"),
     ([("assistant", "c"), ("user", "b")], "unrenderable_order"),
     ([("system", "Be brief."), ("user", "b"), ("assistant", "c")], "unrenderable_system")],
)
def test_refusals_are_told_apart_by_what_settles_them(pairs: list[tuple[str, str]], cause: str) -> None:
    gemma = ChatEncoder.load(assets.tokenizer_dir("gemma-like"))
    report = check([messages_of(*pairs)], gemma)
    assert report[cause].severity == "error" and report[cause].detail
    assert report[cause].detail.isprintable() and not report[cause].detail.startswith("the chat template refuses")


def test_a_role_that_the_template_refuses_is_told() -> None:
    item = messages_of(("user", "a"), ("critic", "b"), ("assistant", "c"))
    assert check([item], ChatEncoder.load(assets.tokenizer_dir("qwen3.5")))["unrenderable_role"].count == 1


def test_tool_calls_without_the_ids_that_mistral_wants_are_told() -> None:
    report = check(islice(read(assets.chat_file("tools_en")), 3), ChatEncoder.load(assets.tokenizer_dir("mistral-v3")))
    assert "nine letters" in report["unrenderable_ids"].remedy


# -- heuristics --------------------------------------------------------------------------------------------------------


def causes_in(*texts: str) -> list[str]:
    item = chat(*texts)
    answers = {i for i, message in enumerate(item.messages) if message.role == "assistant"}
    return [hit.cause for hit in audit(item, answers, lambda text: False)]


@pytest.mark.parametrize(
    "text",
    ["It opened in 1921. The lantern has hung above the door since the", "Here it is:\n```python\nprint(1)",
     "这座图书馆位于米尔巷四号。灯笼一直挂在门上，而且", "First, fill the kettle. Then, while it boils, get the"],
)
def test_answers_that_end_in_the_middle_are_found(text: str) -> None:
    assert causes_in("Tell me.", text) == ["maybe_cut"]


@pytest.mark.parametrize(
    "text",
    ["Lima", "The capital of Peru is Lima", "Dear Ann,\n\nThank you. It was lovely.\n\nKind regards, the Library",
     "There are two. They are:\n\n- red and green\n- blue and yellow and white", "See the page. It is https://x.org/a/b",
     "```\nx = 1\n```", "图书馆位于米尔巷四号。灯笼一直挂在门上。", "One. Two. Three",
     "It is so. | a | b |\n| 1 | 2 and 3 |", "Thank you. It was lovely. Kind regards, the Lantern Library",
     "| a | b. c |\n| d | e f g h i j"],
)
def test_answers_that_are_whole_are_left_alone(text: str) -> None:
    assert causes_in("Tell me.", text) == []


def test_an_answer_that_the_data_itself_calls_cut_is_cut() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well.", "finish_reason": "length"}]
    assert "cut" in check([Conversation.from_messages(messages)], ENCODER)


@given(st.text(max_size=400))
@settings(max_examples=150)
def test_the_audit_of_any_text_ends(text: str) -> None:
    for cause in causes_in(text, text * 5):
        assert cause in CAUSES


def test_the_audit_of_hostile_text_takes_no_time() -> None:
    for part in ("a", "ab ", "<|", "Ã", ". ", "```", "[", "a. b c d "):
        text = part * 60_001
        list(audit(chat("Hi", text), {1}, lambda text: False))


# -- little memory -----------------------------------------------------------------------------------------------------


def test_repeated_texts_are_counted_and_pointed_at() -> None:
    items = [chat("Hi", "A long enough answer.", source=f"f{n % 2}.jsonl:{n}") for n in range(1, 6)]
    report = check([*items, chat("Hi", "Short.", source="g:1"), chat("Ho", "Short.", source="g:2")], ENCODER)
    assert report["duplicate_conversation"].count == 4 == report["duplicate_answer"].count
    assert report["duplicate_answer"].detail == "the same as f1.jsonl:1 messages[1]"
    assert report["duplicate_conversation"].rows[:2] == ("f0.jsonl:2", "f1.jsonl:3")


def test_the_memory_for_repeated_texts_is_bounded() -> None:
    seen = Duplicates(most=3)
    for n in range(10):
        seen.add(b"x", f"odd name {n}", 0)
    assert (len(seen), seen.count(), seen.left_out) == (3, 2, 7)
    assert list(seen.places(9)) == [("odd name 1", 0, "odd name 0", 0), ("odd name 2", 0, "odd name 0", 0)]


def test_a_stream_is_read_once_and_not_kept() -> None:
    def stream() -> Iterator[Conversation]:
        for n in range(50):
            yield chat(f"Question {n}", f"Answer number {n} of them.", source=f"a.jsonl:{n + 1}")

    report = check(stream(), ENCODER)
    assert report.counts["conversations"] == 50 and report.samples == () and not report.roles


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_percentiles_are_nearest_ranks(values: list[int]) -> None:
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    summary = lengths.summary()
    for name, share in (("median", 50), ("p95", 95)):
        assert summary[name] == np.percentile(values, share, method="inverted_cdf")
    assert (summary["min"], summary["max"]) == (min(values), max(values))


# -- shown -------------------------------------------------------------------------------------------------------------


def printed(report: CheckReport, width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(report.render())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [30, 60, 100, 200])
def test_no_line_is_wider_than_the_terminal_or_ends_in_blanks(width: int) -> None:
    out = printed(check(read(MESSY), ENCODER), width)
    assert all(cell_len(line) <= width and line == line.rstrip() for line in out.splitlines())


def test_severity_is_told_in_words_and_marks_without_colour() -> None:
    report = check(read(MESSY), ENCODER)
    out = printed(report, 200)
    assert "\x1b" not in out and "\x1b[" in printed(report, force_terminal=True, color_system="standard")
    for mark, finding in zip(("✗ error", "! warning", "· info"), SEVERITIES, strict=True):
        assert out.count(mark) == report.severities[finding]
    assert out.splitlines()[0].startswith("41 input rows (8 rejected) → 33 conversations → 37 turns")
    assert out.rstrip().splitlines()[-1].startswith("2 errors, ")


def test_data_cannot_reach_the_terminal() -> None:
    evil = "\x1b[31m\u202e</s>[bold]x[/]"
    item = messages_of(("user", evil), ("critic\x1b]0;", "x"), ("assistant", evil), source="\x1b[2Ja.jsonl:1")
    out = printed(check([item], ENCODER))
    assert "\x1b" not in out and "\u202e" not in out


def test_the_page_takes_the_findings_and_finds_their_rows() -> None:
    report = check(read(MESSY), ENCODER, keep_samples=5)
    html = page(report.samples, findings=report.findings_for_page(), roles=report.roles,
                summary=report.summary_for_page(), decode=ENCODER.decode)
    data = json.loads(html.split('type="application/json"')[1].split(">", 1)[1].split("</script>")[0])
    found = {finding["cause"].split(":")[0]: finding for finding in data["findings"]}
    assert len(found) == len(report.findings)
    assert found["maybe cut"]["rows"] and found["empty answer"]["count"] == 2
    assert 5 <= len(report.samples) < 30


def test_no_samples_are_kept_unless_asked_for() -> None:
    items = [chat("Hi", f"Answer number {n}.", source=f"a:{n}") for n in range(20)]
    assert len(check(items, ENCODER, keep_samples=4).samples) == 4
    assert check(items, ENCODER).samples == ()


def test_the_keys_of_the_json_are_stable() -> None:
    report = check(read(MESSY), ENCODER).to_dict()
    assert list(report) == [
        "tokenizer", *COUNTS, "trained_share", "turns_by_outcome", "tokens_by_reason", "row_lengths", "turn_lengths",
        "severities", "findings",
    ]
    assert list(report["findings"][0]) == [
        "severity", "cause", "text", "count", "unit", "share", "example", "detail", "remedy", "rows",
    ]
