"""The oracle passes lawful rows, written down here by hand, and reports every way of making them unlawful."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests import assets
from tests.oracle import violations

Message = dict[str, Any]
WEATHER = {"name": "weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


@dataclass(frozen=True)
class Row:
    input_ids: list[int]
    weights: list[float]
    turns: list[int]
    outcomes: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A chat, and for every turn the text that the model must emit; a turn that is not in `targets` is `off_prompt`."""

    family: str
    messages: list[Message]
    targets: dict[int, str]
    one_row: tuple[int, ...]
    other_stop: str
    tools: tuple[Message, ...] = ()

    def prompt(self, turn: int, messages: list[Message] | None = None) -> list[int]:
        tokenizer, template, _ = load(self.family)
        history, tools = (messages or self.messages)[:turn], list(self.tools) or None
        options = {"chat_template": template, "add_generation_prompt": True, "return_dict": False}
        return tokenizer.apply_chat_template(history, tools=tools, **options)

    def outcomes(self, exact: tuple[int, ...] | None = None) -> dict[int, str]:
        turns = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        names = {i: "exact" if i in (self.one_row if exact is None else exact) else "split" for i in self.targets}
        return {i: names.get(i, "off_prompt") for i in turns}

    def rows(self) -> list[Row]:
        """One row per turn."""
        return [self.row(self.prompt(i), i, ids(self.family, text)) for i, text in self.targets.items()]

    def row(self, context: list[int], turn: int, targets: list[int]) -> Row:
        n, m = len(context), len(targets)
        return Row(context + targets, [0.0] * n + [1.0] * m, [-1] * n + [turn] * m, self.outcomes())

    def violations(self, rows: list[Row], **options: Any) -> list[str]:
        tokenizer, template, stop_ids = load(self.family)
        options = {"tools": list(self.tools) or None, "stop_ids": stop_ids} | options
        return violations(tokenizer, template, self.messages, rows, **options)


@cache
def load(family: str) -> tuple[PreTrainedTokenizerFast, str, list[int]]:
    folder = assets.tokenizer_dir(family)
    stops = json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return (
        tokenizer,
        (folder / "chat_template.jinja").read_bytes().decode(),
        stops if isinstance(stops, list) else [stops],
    )


def ids(family: str, text: str) -> list[int]:
    return load(family)[0].encode(text, add_special_tokens=False)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def sunny_chat(reasoning: bool) -> list[Message]:
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
    messages = [
        user("Is it sunny in Lima?"),
        answer("", reasoning_content="Ask the tool.", tool_calls=[call]),
        {"role": "tool", "tool_call_id": "call00001", "name": "weather", "content": "sunny"},
        answer("Yes, it is.", reasoning_content="It says so."),
        user("Thanks!"),
        answer("Welcome 你好🙂", reasoning_content="Be kind."),
    ]
    dropped = () if reasoning else ("reasoning_content",)
    return [{key: value for key, value in message.items() if key not in dropped} for message in messages]


TOOLS = ({"type": "function", "function": WEATHER},)
CASES = {
    "qwen3": Case(
        "qwen3",
        sunny_chat(reasoning=True),
        {
            1: "<think>\nAsk the tool.\n</think>\n\n<tool_call>\n"
            '{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call><|im_end|>',
            3: "<think>\nIt says so.\n</think>\n\nYes, it is.<|im_end|>",
            5: "<think>\nBe kind.\n</think>\n\nWelcome 你好🙂<|im_end|>",
        },
        one_row=(1, 3),
        other_stop="<|endoftext|>",
        tools=TOOLS,
    ),
    "chatml": Case(
        "smollm2",
        [user("Is it sunny in Lima?"), answer("Yes, it is."), user("Thanks!"), answer("Welcome 你好🙂")],
        {1: "Yes, it is.<|im_end|>", 3: "Welcome 你好🙂<|im_end|>"},
        one_row=(1, 3),
        other_stop="<|endoftext|>",
    ),
    "llama3": Case(
        "llama3",
        sunny_chat(reasoning=False),
        {
            1: '{"name": "weather", "parameters": {"city": "Lima"}}<|eot_id|>',
            3: "Yes, it is.<|eot_id|>",
            5: "Welcome 你好🙂<|eot_id|>",
        },
        one_row=(1, 3, 5),
        other_stop="<|eom_id|>",
        tools=TOOLS,
    ),
    "gpt-oss": Case(
        "gpt-oss",
        sunny_chat(reasoning=True),
        {
            1: "<|channel|>analysis<|message|>Ask the tool.<|end|><|start|>assistant to=functions.weather"
            '<|channel|>commentary json<|message|>{"city": "Lima"}<|call|>',
            5: "<|channel|>analysis<|message|>Be kind.<|end|><|start|>assistant"
            "<|channel|>final<|message|>Welcome 你好🙂<|return|>",
        },
        one_row=(),
        other_stop="<|end|>",
        tools=TOOLS,
    ),
}


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def says(found: list[str], pattern: str) -> bool:
    return any(re.search(pattern, what) for what in found)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def remask(row: Row, trained: list[int], turn: int | None = None) -> Row:
    """The same ids with another mask."""
    turn = max(row.turns) if turn is None else turn
    places = range(len(row.input_ids))
    weights = [float(t in trained) for t in places]
    return replace(row, weights=weights, turns=[turn if t in trained else -1 for t in places])


def span(row: Row, before: int = 0, after: int = 0) -> Row:
    """The mask with its start and its end moved."""
    trained = [t for t, turn in enumerate(row.turns) if turn >= 0]
    return remask(row, list(range(trained[0] + before, trained[-1] + 1 + after)))


def edit(case: Case, row: Row, change: Callable[[str], str]) -> Row:
    """The row of the same turn with other targets."""
    turn = max(row.turns)
    text = change(case.targets[turn])
    assert text != case.targets[turn]
    return case.row(case.prompt(turn), turn, ids(case.family, text))


def extended(case: Case, row: Row, text: str) -> Row:
    """The row with a text after the stop, trained as well."""
    turn = max(row.turns)
    return case.row(case.prompt(turn), turn, ids(case.family, case.targets[turn]) + ids(case.family, text))


def spelled_stop(case: Case, row: Row) -> Row:
    """The stop as characters, each encoded alone, so that it is no control token."""
    turn, text = max(row.turns), case.targets[max(row.turns)]
    start = text.rindex("<|")
    spelled = [t for character in text[start:] for t in ids(case.family, character)]
    return case.row(case.prompt(turn), turn, ids(case.family, text[:start]) + spelled)


def by_character(case: Case, row: Row) -> Row:
    """The same text in other ids."""
    turn, text = max(row.turns), case.targets[max(row.turns)]
    middle = text.index("e")
    targets = ids(case.family, text[:middle]) + ids(case.family, "e") + ids(case.family, text[middle + 1 :])
    assert targets != ids(case.family, text)
    return case.row(case.prompt(turn), turn, targets)


Mutation = Callable[[Case, Row], Row]
MUTATIONS: dict[str, tuple[Mutation, str]] = {
    "mask shifted to the left": (lambda case, row: span(row, -1, -1), "does not begin after its prompt"),
    "mask shifted to the right": (lambda case, row: span(extended(case, row, "\n"), 1, 0), "does not begin"),
    "first token untrained": (lambda case, row: span(row, 1), "does not begin"),
    "generation prompt trained": (lambda case, row: span(row, -3), "does not begin after its prompt"),
    "stop untrained": (lambda case, row: span(row, 0, -1), "not what the model must emit"),
    "stop left out": (lambda case, row: edit(case, row, lambda text: text[: text.rindex("<|")]), "must emit"),
    "another stop": (
        lambda case, row: edit(case, row, lambda text: text[: text.rindex("<|")] + case.other_stop),
        "must emit",
    ),
    "stop spelled out": (spelled_stop, "must emit"),
    "stop twice": (
        lambda case, row: extended(case, row, re.findall(r"<\|\w+\|>", case.targets[max(row.turns)])[-1]),
        "must emit",
    ),
    "newline after the stop": (lambda case, row: extended(case, row, "\n"), "must emit"),
    "trained past the stop": (lambda case, row: extended(case, row, "\n<|im_start|>user\n"), "must emit"),
    "hole in the middle": (
        lambda case, row: remask(row, [t for t, i in enumerate(row.turns) if i >= 0 and t != len(row.turns) - 3]),
        "not one run",
    ),
    "other ids for the same text": (by_character, "must emit"),
    "answer cut": (lambda case, row: edit(case, row, lambda text: text.replace("e", "", 1)), "must emit"),
    "space before the answer": (lambda case, row: edit(case, row, lambda text: " " + text), "must emit"),
    "context without its first token": (
        lambda case, row: replace(row, input_ids=row.input_ids[1:], weights=row.weights[1:], turns=row.turns[1:]),
        "does not begin after its prompt",
    ),
    "context without its last token": (
        lambda case, row: case.row(case.prompt(max(row.turns))[:-1], max(row.turns), row.input_ids[-5:]),
        "does not begin after its prompt",
    ),
    "another question": (
        lambda case, row: case.row(
            case.prompt(max(row.turns), [user("Is it hot in Cusco?"), *case.messages[1:]]),
            max(row.turns),
            ids(case.family, case.targets[max(row.turns)]),
        ),
        "does not begin after its prompt",
    ),
    "a token of the user": (
        lambda case, row: replace(row, weights=[0.0, 0.0, 1.0, *row.weights[3:]], turns=[-1, -1, 0, *row.turns[3:]]),
        "message 0 must not be trained",
    ),
    "a token of the user, said to be the turn's": (
        lambda case, row: replace(
            row, weights=[0.0, 0.0, 1.0, *row.weights[3:]], turns=[-1, -1, max(row.turns), *row.turns[3:]]
        ),
        "does not begin after its prompt",
    ),
    "position 0": (
        lambda case, row: replace(row, weights=[1.0, *row.weights[1:]], turns=[max(row.turns), *row.turns[1:]]),
        "position 0 is trained",
    ),
    "a weight without a turn": (
        lambda case, row: replace(row, weights=[0.0, 1.0, *row.weights[2:]]),
        "weights and turns disagree",
    ),
    "a turn without a weight": (
        lambda case, row: replace(row, weights=[*row.weights[:-1], 0.0]),
        "weights and turns disagree",
    ),
    "another turn's number": (
        lambda case, row: replace(row, turns=[i if i < 0 else next(iter({*case.targets} - {i})) for i in row.turns]),
        "must emit|does not begin",
    ),
    "turns too short": (lambda case, row: replace(row, turns=row.turns[1:]), "weights and turns disagree"),
    "ids too long": (lambda case, row: replace(row, input_ids=[*row.input_ids, 0]), "ragged"),
}


@every_case
@pytest.mark.parametrize("row_format", [None, "per_turn"])
def test_lawful_rows_pass(case: Case, row_format: str | None) -> None:
    assert case.violations(case.rows(), row_format=row_format) == []


@every_case
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_of_every_row_is_reported(case: Case, mutation: str) -> None:
    mutate, report = MUTATIONS[mutation]
    for r, row in enumerate(case.rows()):
        rows = case.rows()
        rows[r] = mutate(case, row)
        found = case.violations(rows)
        assert says(found, report), (mutation, case.family, r, found)


def merged(case: Case, turns: tuple[int, ...]) -> Row:
    """One row for these turns: the row of the last, with the others trained where they are in its context."""
    rows = [case.row(case.prompt(i), i, ids(case.family, case.targets[i])) for i in turns]
    whole = rows[-1]
    for row in rows[:-1]:
        n = len(row.input_ids)
        turns_of = [max(pair) for pair in zip(row.turns, whole.turns, strict=False)] + whole.turns[n:]
        whole = replace(whole, turns=turns_of, weights=[float(i >= 0) for i in turns_of])
    return whole


@pytest.mark.parametrize(("name", "rows"), [("qwen3", [(1, 3), (5,)]), ("chatml", [(1, 3)]), ("llama3", [(1, 3, 5)])])
def test_the_fewest_rows_pass_and_one_row_per_turn_is_too_many_for_auto(name: str, rows: list[tuple[int, ...]]) -> None:
    case = CASES[name]
    assert case.violations([merged(case, turns) for turns in rows], row_format="auto") == []
    assert says(case.violations(case.rows(), row_format="auto"), "[23] rows, but auto")
    assert says(case.violations([merged(case, turns) for turns in rows], row_format="per_turn"), "row")


@pytest.mark.parametrize("name", ["qwen3", "gpt-oss"])
def test_turns_that_rewritten_history_parts_cannot_share_a_row(name: str) -> None:
    case = CASES[name]
    outcomes = case.outcomes(exact=tuple(case.targets))
    rows = [replace(row, outcomes=outcomes) for row in case.rows()]
    assert says(case.violations(rows), "cannot share one row")
    together = replace(merged(case, tuple(case.targets)), outcomes=outcomes)
    assert says(case.violations([together]), "must emit|does not begin")


def test_a_split_turn_in_the_one_row_is_reported() -> None:
    case = CASES["qwen3"]
    rows = [replace(merged(case, turns), outcomes=case.outcomes(exact=(1, 5))) for turns in [(1, 3), (5,)]]
    assert says(case.violations(rows), "not exact")


@every_case
def test_a_turn_in_two_rows_or_in_none_is_reported(case: Case) -> None:
    rows = case.rows()
    for r, turn in enumerate(case.targets):
        assert f"row {len(rows)}: turn {turn} is trained in another row too" in case.violations([*rows, rows[r]])
        assert f"turn {turn} is reachable, but in no row" in case.violations(rows[:r] + rows[r + 1 :])


@every_case
def test_every_wrong_outcome_is_reported(case: Case) -> None:
    names = {"exact", "split", "off_prompt", "altered", "unrenderable", "other", None}
    for turn, right in case.outcomes().items():
        reached = {"exact", "split"} if right in ("exact", "split") else {right}
        for name in names - reached:
            outcomes = {i: claim for i, claim in (case.outcomes() | {turn: name}).items() if claim}
            found = case.violations([replace(row, outcomes=outcomes) for row in case.rows()])
    assert says(found, f"^turn {turn} is {name}, not "), (turn, name, found)


@every_case
def test_rows_that_disagree_on_outcomes_are_reported(case: Case) -> None:
    first, *others = case.rows()
    found = case.violations([replace(first, outcomes={**first.outcomes, 99: "exact"}), *others])
    assert "the rows do not agree on the outcomes" in found


@every_case
def test_without_rows_every_reachable_turn_is_reported(case: Case) -> None:
    assert case.violations([]) == [f"turn {turn} is reachable, but in no row" for turn in case.targets]


@pytest.mark.parametrize(
    ("name", "turn", "change"),
    [
        ("qwen3", 1, lambda text: text[: text.index("<tool_call>")] + "<|im_end|>"),
        ("qwen3", 1, lambda text: text.replace("Ask the tool.", "")),
        ("qwen3", 3, lambda text: "<think>\n\n</think>\n\nYes, it is.<|im_end|>"),
        ("qwen3", 3, lambda text: "Yes, it is.<|im_end|>"),
        ("llama3", 1, lambda text: "<|eot_id|>"),
        ("llama3", 1, lambda text: text.replace("Lima", "Quito")),
        ("gpt-oss", 1, lambda text: text[: text.index("<|end|>")] + "<|end|>"),
        ("gpt-oss", 5, lambda text: text[text.index("<|channel|>final") :]),
    ],
)
def test_a_turn_without_its_call_or_its_reasoning_is_reported(
    name: str, turn: int, change: Callable[[str], str]
) -> None:
    case = CASES[name]
    rows = [edit(case, row, change) if max(row.turns) == turn else row for row in case.rows()]
    assert says(case.violations(rows), "must emit")


@pytest.mark.parametrize(
    ("name", "turn", "between"),
    [
        ("qwen3", 3, "\n<|im_start|>user\nThanks!<|im_end|>\n<|im_start|>assistant\n"),
        (
            "gpt-oss",
            1,
            '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"sunny"<|end|><|start|>assistant'
            "<|channel|>final<|message|>Yes, it is.<|end|><|start|>user<|message|>Thanks!<|end|><|start|>assistant",
        ),
    ],
)
def test_a_context_that_keeps_the_reasoning_of_an_earlier_turn_is_reported(name: str, turn: int, between: str) -> None:
    case = CASES[name]
    context = case.prompt(turn) + ids(case.family, case.targets[turn] + between)
    *others, _ = case.rows()
    assert context != case.prompt(5)
    found = case.violations([*others, case.row(context, 5, ids(case.family, case.targets[5]))])
    assert f"row {len(others)}: turn 5 does not begin after its prompt" in found


def test_parts_of_a_turn_may_be_trained_only_if_the_caller_says_so() -> None:
    case = CASES["qwen3"]
    rows = case.rows()
    trained = [t for t, i in enumerate(rows[1].turns) if i >= 0]
    rows[1] = remask(rows[1], trained[4:8])
    assert says(case.violations(rows), "does not begin")
    assert case.violations(rows, partial={3}) == []
    assert case.violations([rows[0], rows[2]], partial={3}) == []
    assert says(case.violations([remask(rows[0], [2]), *rows[1:]], partial={1, 3}), "does not begin")
    shortened = replace(rows[1], **{f: getattr(rows[1], f)[:-1] for f in ("input_ids", "weights", "turns")})
    assert says(case.violations([rows[0], shortened, rows[2]], partial={3}), "must emit")


def test_a_message_that_is_switched_off_must_not_be_trained() -> None:
    case = CASES["qwen3"]
    rows = case.rows()
    assert "row 1: message 3 must not be trained: untrained" in case.violations(rows, untrained=[3])
    assert case.violations([rows[0], rows[2]], untrained=[3]) == []


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADER_LEFT_TO_THE_MODEL = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ALWAYS_A_GENERATION_PROMPT = HEADER_LEFT_TO_THE_MODEL + "<|im_start|>assistant{{ '\n' }}"
ALPACA = (
    "{% for m in messages %}{% if m.role == 'user' %}### Problem: {{ m.content }}\n### Solution: "
    "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
GLM = (
    "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function %}<tool_call>{{ f.name }} {{ f.arguments.city }}"
    "</tool_call>{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}{{ p.text }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Lima"}}}
GO = [user("Go")]


@cache
def with_headers(rstrip: bool) -> PreTrainedTokenizerFast:
    """Qwen's vocabulary with the role headers of GLM and Phi."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(assets.tokenizer_dir("qwen3"))
    names = ("<|user|>", "<|assistant|>", "<|observation|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, rstrip=rstrip, normalized=False) for name in names], special_tokens=True)
    return tokenizer


def turn_violations(
    tokenizer: PreTrainedTokenizerFast,
    template: str,
    messages: list[Message],
    prompt: str | list[int],
    targets: str | list[int],
    **options: Any,
) -> list[str]:
    """What is wrong with a row that trains the last message alone; texts are encoded each by itself."""
    parts = [tokenizer.encode(p, add_special_tokens=False) if isinstance(p, str) else p for p in (prompt, targets)]
    turn, (n, m) = len(messages) - 1, map(len, parts)
    row = Row([*parts[0], *parts[1]], [0.0] * n + [1.0] * m, [-1] * n + [turn] * m, {turn: "exact"})
    return violations(tokenizer, template, messages, [row], untrained=range(turn), **options)


def test_a_token_across_the_boundary_makes_the_rest_a_segment_of_its_own() -> None:
    tokenizer, messages = load("qwen2.5")[0], [*GO, answer("\nfoo")]
    prompt, rest = "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n", "\nfoo<|im_end|>"
    assert turn_violations(tokenizer, CHATML, messages, prompt, rest) == []
    joint = tokenizer.encode(prompt + rest, add_special_tokens=False)
    context = tokenizer.encode(prompt, add_special_tokens=False)
    assert joint[: len(context)] != context
    for cut in (len(context) - 1, len(context)):
        assert says(turn_violations(tokenizer, CHATML, messages, joint[:cut], joint[cut:]), "does not begin")
    assert says(turn_violations(tokenizer, CHATML, messages, prompt, "foo<|im_end|>"), "must emit")
    plain = [t for character in rest for t in tokenizer.encode(character, add_special_tokens=False)]
    assert says(turn_violations(tokenizer, CHATML, messages, prompt, plain), "must emit")


@pytest.mark.parametrize("family", ["mistral-v3", "mistral-v3-legacy"])
def test_targets_have_no_dummy_prefix(family: str) -> None:
    tokenizer, messages = load(family)[0], [*GO, answer("It is")]
    prompt = "### Problem: Go\n### Solution: "
    right = [*tokenizer.convert_tokens_to_ids(["It", "▁is", "<0x0A>"]), tokenizer.eos_token_id]
    assert turn_violations(tokenizer, ALPACA, messages, prompt, right) == []
    dummy = [*tokenizer.convert_tokens_to_ids(["▁It", "▁is", "<0x0A>"]), tokenizer.eos_token_id]
    assert says(turn_violations(tokenizer, ALPACA, messages, prompt, dummy), "must emit")


def test_whitespace_swallowed_by_a_header_is_still_a_target() -> None:
    tokenizer, messages = with_headers(rstrip=True), [*GO, answer("\n\nfoo")]
    prompt, rest = "<|user|>\nGo<|end|>\n<|assistant|>\n", "\n\nfoo<|end|>"
    context, joint = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, prompt + rest))
    assert joint[: len(context)] == context
    assert turn_violations(tokenizer, PHI, messages, prompt, rest) == []
    assert says(turn_violations(tokenizer, PHI, messages, prompt, joint[len(context) :]), "must emit")


def test_the_stop_is_the_first_control_token_after_the_answer() -> None:
    tokenizer, messages, prompt = (
        with_headers(rstrip=False),
        [*GO, answer("foo")],
        "<|user|>\nGo<|end|>\n<|assistant|>\n",
    )
    end, both = tokenizer.convert_tokens_to_ids("<|end|>"), "foo<|end|>\n<|im_end|>"
    assert turn_violations(tokenizer, PHI, messages, prompt, "foo<|end|>") == []
    assert says(turn_violations(tokenizer, PHI, messages, prompt, both), "must emit")
    assert says(turn_violations(tokenizer, PHI, messages, prompt, both, stop_ids=[end]), "must emit")
    known = [tokenizer.eos_token_id]
    assert turn_violations(tokenizer, PHI, messages, prompt, both, stop_ids=known) == []


@pytest.mark.parametrize(
    ("message", "text", "stop", "wrong"),
    [
        (answer("foo"), "foo", "<|user|>", "<|observation|>"),
        (answer("", tool_calls=[CALL]), "<tool_call>weather Lima</tool_call>", "<|observation|>", "<|user|>"),
    ],
)
@pytest.mark.parametrize("stops", [[], ["<|endoftext|>", "<|user|>", "<|observation|>"]])
def test_a_template_that_emits_no_stop_has_the_next_header_appended(
    message: Message, text: str, stop: str, wrong: str, stops: list[str]
) -> None:
    tokenizer, messages, prompt = with_headers(rstrip=False), [*GO, message], "<|user|>\nGo<|assistant|>\n"

    def check(targets: str, **options: Any) -> list[str]:
        stop_ids = tokenizer.convert_tokens_to_ids(stops)
        return turn_violations(tokenizer, GLM, messages, prompt, targets, stop_ids=stop_ids, **options)

    assert check(text + stop) == []
    for targets in (text, text + wrong, text + "<|endoftext|>", text + "<|im_end|>", text + stop + stop):
        assert says(check(targets), "must emit"), targets
    assert check(text, missing_stop="leave") == []
    assert says(check(text + stop, missing_stop="leave"), "must emit")
    assert says(check(text + stop, missing_stop="error"), "must emit")


def test_without_any_header_token_the_generation_config_or_the_tokenizer_names_the_stop() -> None:
    tokenizer, messages, prompt = load("qwen3")[0], [*GO, answer("foo")], "### Problem: Go\n### Solution:"
    template, end = ALPACA.replace("Solution: ", "Solution:"), tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert turn_violations(tokenizer, template, messages, prompt, "foo\n<|im_end|>") == []
    assert says(turn_violations(tokenizer, template, messages, prompt, "foo\n<|endoftext|>"), "must emit")
    assert turn_violations(tokenizer, template, messages, prompt, "foo\n<|endoftext|>", stop_ids=[end]) == []
    assert says(turn_violations(tokenizer, template, messages, prompt, "foo\n", stop_ids=[end]), "must emit")


@pytest.mark.parametrize("answered", ["foo\n", "foo"])
def test_an_appended_stop_may_follow_the_answer_or_the_whitespace_after_it(answered: str) -> None:
    tokenizer, prompt, template = load("qwen3")[0], "### Problem: Go\n### Solution:", ALPACA.replace("on: ", "on:")
    assert turn_violations(tokenizer, template, [*GO, answer("foo")], prompt, answered + "<|im_end|>") == []
    found = turn_violations(tokenizer, template, [*GO, answer("foo  ")], prompt, answered + "<|im_end|>")
    assert says(found, "must emit")


@pytest.mark.parametrize(("stop", "after"), [("<|im_end|>", "\n"), ("<end_of_turn>", "\n"), ("</s>", "")])
def test_a_stop_that_the_vocabulary_lacks_is_a_sequence_of_tokens(stop: str, after: str) -> None:
    tokenizer, prompt = load("gpt-oss")[0], "user\nGo" + stop + after + "model\n"
    template = (
        "{% for m in messages %}{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content }}"
        + stop
        + repr(after).join(("{{ ", " }}"))
        + "{% endfor %}{% if add_generation_prompt %}model{{ '\n' }}{% endif %}"
    )
    messages = [*GO, answer("foo")]
    assert len(tokenizer.encode(stop, add_special_tokens=False)) > 1
    assert turn_violations(tokenizer, template, messages, prompt, "foo" + stop) == []
    for wrong in ("foo", "foo" + stop + "\nuser", "foo<|return|>", "foo" + stop[:-1], "foo" + stop + "<|return|>"):
        assert says(turn_violations(tokenizer, template, messages, prompt, wrong), "must emit"), wrong


def test_a_stop_that_the_answer_quotes_does_not_end_it() -> None:
    tokenizer, messages = load("qwen3")[0], [*GO, answer("Write <|im_end|> to stop.")]
    prompt = "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    assert turn_violations(tokenizer, CHATML, messages, prompt, "Write <|im_end|> to stop.<|im_end|>") == []
    assert says(turn_violations(tokenizer, CHATML, messages, prompt, "Write <|im_end|>"), "must emit")


def test_a_generation_prompt_after_the_answer_is_no_target() -> None:
    tokenizer, messages, template = load("qwen3")[0], [*GO, answer("foo")], ALWAYS_A_GENERATION_PROMPT
    prompt = "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    assert turn_violations(tokenizer, template, messages, prompt, "foo<|im_end|>") == []
    past = "foo<|im_end|>\n<|im_start|>assistant\n"
    assert says(turn_violations(tokenizer, template, messages, prompt, past), "must emit")


def test_a_header_that_the_generation_prompt_leaves_to_the_model_is_a_target() -> None:
    tokenizer, messages, template = load("qwen3")[0], [*GO, answer("foo")], HEADER_LEFT_TO_THE_MODEL
    prompt, header = "<|im_start|>user\nGo<|im_end|>\n", "<|im_start|>assistant\n"
    assert turn_violations(tokenizer, template, messages, prompt, header + "foo<|im_end|>") == []
    assert says(turn_violations(tokenizer, template, messages, prompt + header, "foo<|im_end|>"), "does not begin")


def test_typed_parts_and_decomposed_letters_pass() -> None:
    tokenizer, prompt = load("qwen3")[0], "<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n"
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in [*GO, answer("foo")]]
    assert turn_violations(tokenizer, PARTS, parts, prompt, "foo<|im_end|>") == []
    decomposed = "cafe\u0301 naive\u0308"
    assert turn_violations(tokenizer, CHATML, [*GO, answer(decomposed)], prompt, decomposed + "<|im_end|>") == []


def test_the_first_token_of_an_empty_prompt_is_the_only_target_that_is_not_trained() -> None:
    tokenizer, template = load("qwen3")[0], HEADER_LEFT_TO_THE_MODEL
    targets = ids("qwen3", "<|im_start|>assistant\nfoo<|im_end|>")
    row = Row(targets, [0.0] + [1.0] * (len(targets) - 1), [-1] + [0] * (len(targets) - 1), {0: "exact"})
    assert violations(tokenizer, template, [answer("foo")], [row]) == []
    assert says(turn_violations(tokenizer, template, [answer("foo")], [], targets), "position 0")


@pytest.mark.parametrize(
    ("family", "messages", "turn", "outcome"),
    [
        ("llama3", [*GO, answer("foo", reasoning_content="Because.")], 1, "altered"),
        ("llama3", [*GO, answer("foo", thinking="Because.")], 1, "altered"),
        ("llama3", [*GO, answer("foo", tool_calls=[CALL])], 1, "altered"),
        ("smollm2", [*GO, answer("foo", tool_calls=[CALL])], 1, "altered"),
        ("mistral-v3", [*GO, answer("a", tool_calls=[CALL | {"id": "call00001"}])], 1, "altered"),
        ("mistral-v3", [{"role": "system", "content": "Be kind."}, *GO, answer("foo")], 2, "off_prompt"),
        ("qwen3.5", [*GO, answer("foo", reasoning_content="Because.")], 1, "off_prompt"),
        ("qwen3", [answer("foo"), user("Go on")], 0, "unrenderable"),
        ("gemma-like", [{"role": "system", "content": "Be kind."}, *GO, answer("foo")], 2, "unrenderable"),
    ],
)
def test_what_cannot_be_reached_is_not_asked_for(family: str, messages: list[Message], turn: int, outcome: str) -> None:
    tokenizer, template, stop_ids = load(family)
    assert violations(tokenizer, template, messages, [], stop_ids=stop_ids) == []
    for trained in ([], [turn]):
        weights, turns = [0.0, 0.0, float(bool(trained))], [-1, -1, *(trained or [-1])]
        found = violations(tokenizer, template, messages, [Row([1, 2, 3], weights, turns, {turn: outcome})])
        assert bool(found) == bool(trained), found


@pytest.mark.parametrize(
    ("rendered", "kept"),
    [
        ("{{ c.name }}({{ c.arguments | tojson }})", True),
        ("{{ c.arguments }} {{ c.name }}", True),
        ("{{ c.name }}{% for k, v in c.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}", True),
        ("{{ c.name }}({{ c.arguments | tojson(ensure_ascii=true) }})", True),
        ("{{ c.arguments | tojson }}", False),
        ("{{ c.name }}", False),
        ("{{ c.name }}({{ c.arguments | string | upper }})", False),
        ("{{ c.name }} {{ {'a': c.arguments.a, 'b': c.arguments.b} }}", False),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_a_call_holds_its_name_and_every_leaf_argument(rendered: str, kept: bool, before: bool) -> None:
    arguments = {"a": 'caf\u00e9 "x"\n', "b": [1, 2.5, None], "c": {"d": True, "e": "it's"}}
    message = answer("Wait.", tool_calls=[{"function": {"name": "weather", "arguments": arguments}}])
    calls = "{% for t in m.tool_calls or [] %}{% set c = t.function %}" + rendered + "{% endfor %}"
    template = CHATML.replace("{{ m.content }}", calls + "{{ m.content }}" if before else "{{ m.content }}" + calls)
    found = violations(load("qwen3")[0], template, [*GO, message], [])
    assert found == (["turn 1 is reachable, but in no row"] if kept else [])


@pytest.mark.parametrize(
    ("content", "rendered", "kept"),
    [
        ("<think>\nBecause.\n</think>\n\nfoo", "{{ m.content }}", True),
        ("<think>\nBecause.\n</think>\n\nfoo", "{{ m.content.split('</think>')[-1] }}", False),
        ("<think>\nBecause.\n</think>\n\nfoo", "{{ m.content.split('</think>')[0] }}", False),
        (
            "<think>\nBecause.\n</think>\n\nfoo",
            "({{ m.content.split('</think>')[0][8:-1] }}) {{ m.content[-3:] }}",
            True,
        ),
        ("  foo  ", "{{ m.content | trim }}", True),
        ("foo\n\nbar", "{{ m.content | replace('\\n\\n', '\\n') }}", False),
        ("foo", "", False),
    ],
)
def test_an_answer_and_its_inline_reasoning_hold_but_for_whitespace_at_their_ends(
    content: str, rendered: str, kept: bool
) -> None:
    template = CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}Go{% else %}" + rendered + "{% endif %}")
    found = violations(load("qwen3")[0], template, [*GO, answer(content)], [])
    assert found == (["turn 1 is reachable, but in no row"] if kept else [])
