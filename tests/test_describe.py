"""What is said of a template is what it does: checked against renderings, against the encoder, and over the corpus."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from chatloss.demo import tokenizer_directory
from chatloss.describe import TemplateReport, describe
from chatloss.encode import ChatEncoder
from chatloss.findings import SEVERITIES
from chatloss.load import load_tokenizer
from chatloss.probes import ANSWER, QUESTION, Probes, TemplateFinding, answer, thinking_tags, user
from chatloss.sample import Reason
from chatloss.switches import kwargs_read
from tests import assets

DEMO = load_tokenizer(tokenizer_directory())
CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LAST = "(loop.last and m.role == 'assistant')"
# Every special token that a template may write, so that a foreign tokenizer refuses nothing.
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "unk_token": "<unk>", "sep_token": "<sep>"}


def native(family: str, **more: Any) -> TemplateReport:
    return describe(ChatEncoder.load(assets.tokenizer_dir(family), **more))


def of(template: str, **more: Any) -> TemplateReport:
    return describe(ChatEncoder.load(DEMO, template, **more))


def values(report: TemplateReport, *names: str) -> dict[str, Any]:
    return {name: report[name].value if name in report else "-" for name in names}


# -- families that are known -------------------------------------------------------------------------------------------

KNOWN: dict[str, dict[str, Any]] = {
    "qwen3": {
        "generation_prompt": "<|im_start|>assistant\n", "emitted_header": "<think>\n\n</think>\n\n",
        "prompt_reasoning": "none", "after_stop": "\n", "past_stop": "same", "past_reasoning": "dropped",
        "reasoning_content": "reasoning_content", "inline_think": "rewritten", "tool_calls": "object",
        "content_with_calls": "kept", "parallel_calls": "kept", "developer_role": "dropped", "system_role": "rendered",
        "assistant_first": "refused", "two_users": "rendered", "template_kwargs": ["enable_thinking"], "date": "-",
        "content_whitespace": "kept", "control_tokens": {}, "generation_tags": "-", "bos": "-",
    },
    "llama3": {
        "generation_prompt": "<|start_header_id|>assistant<|end_header_id|>\n\n", "emitted_header": "",
        "after_stop": "", "past_stop": "same", "reasoning_content": None, "content_whitespace": "both",
        "parallel_calls": "refused", "bos": "written", "inline_think": "kept",
    },
    "gpt-oss": {
        "generation_prompt": "<|start|>assistant", "emitted_header": "<|channel|>final<|message|>",
        "past_stop": "differs", "past_reasoning": "dropped", "date": True, "parallel_calls": "only one",
        "developer_role": "rendered", "prompt_reasoning": "none",
    },
    "mistral-v3": {
        "generation_prompt": "", "emitted_header": " ", "system_place": "moves", "two_users": "refused",
        "content_with_calls": "only call", "bos": "written", "developer_role": "refused", "tools": "rendered",
        "system_role": "rendered inside the user's message",
    },
    "deepseek-v3": {"prompt_reasoning": "open", "tool_calls": "string", "inline_think": "dropped", "tools": "ignored"},
    "gemma-like": {
        "generation_prompt": "<start_of_turn>model\n", "system_role": "refused", "two_users": "refused",
        "content_whitespace": "both", "tool_calls": None,
    },
    "phi3": {"past_stop": "same", "emitted_header": "", "system_role": "rendered"},
}
SLOW_FAMILIES = set(assets.SLOW_TIER)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW_FAMILIES else f for f in KNOWN]
)
def test_what_is_known_of_a_family_is_found(family: str) -> None:
    assert values(native(family), *KNOWN[family]) == KNOWN[family]


@pytest.mark.parametrize(
    ("family", "answer_stop", "call_stop"),
    [("qwen3", "<|im_end|>", "<|im_end|>"), ("gpt-oss", "<|return|>", "<|call|>"),
     ("llama3", "<|eot_id|>", "<|eot_id|>"), ("mistral-v3", "</s>", "</s>")],
)
def test_stops_are_named_with_their_ids_and_who_stops_at_them(family: str, answer_stop: str, call_stop: str) -> None:
    encoder = ChatEncoder.load(assets.tokenizer_dir(family))
    report = describe(encoder)
    for name, text in (("stop_of_answer", answer_stop), ("stop_of_call", call_stop)):
        value = report[name].value
        assert value["text"] == text and value["ids"] == encoder.loaded.tokens.ids_of(text)
        assert value["generation_config"] and report[name].severity == "info"


def test_a_template_that_rewrites_history_shows_where() -> None:
    report = describe(ChatEncoder.load(DEMO, tokenizer_directory() / "chat_template_rewrites.jinja"))
    assert report["rows_plain"].value == {"turns": 3, "rows": 1, "outcomes": {"exact": 3}}
    assert report["rows_reasoning"].value == {"turns": 2, "rows": 2, "outcomes": {"split": 1, "exact": 1}}
    shown = report["rows_reasoning"].witness
    assert shown is not None and shown.text[shown.start : shown.end].startswith("It measures light.")
    assert "‹<think>↵" in report["rows_reasoning"].statement


# -- each behaviour, planted -------------------------------------------------------------------------------------------

PLANTED: dict[str, tuple[str, str, Any]] = {
    "no generation prompt": (CHATML.split("{% if")[0], "generation_prompt", ""),
    "the model emits its header": (CHATML.split("{% if")[0], "emitted_header", "<|im_start|>assistant\n"),
    "the prompt opens reasoning": (CHATML.replace("assistant\n", "assistant\n<think>\n"), "prompt_reasoning", "open"),
    "an empty think block": (CHATML.replace("assistant\n", "assistant\n<think></think>"), "prompt_reasoning", "closed"),
    "answers are stripped": (CHATML.replace("m.content", "m.content | trim"), "content_whitespace", "both"),
    "answers lose their end": (CHATML.replace("m.content", "m.content.rstrip()"), "content_whitespace", "trailing"),
    "answers lose their start": (CHATML.replace("m.content", "m.content.lstrip()"), "content_whitespace", "leading"),
    "typed parts": (CHATML.replace("m.content", "m.content[0].text"), "content_format", "parts"),
    "the answer is lost": (CHATML.replace("m.content", "'' if m.role == 'assistant' else m.content"), "content_format",
                           None),
    "no stop at the end": (CHATML.replace("<|im_end|>\n", "{% if not " + LAST + "%}<|im_end|>\n{% endif %}"),
                           "last_stop", "appended"),
    "another stop at the end": (
        CHATML.replace("<|im_end|>\n", "{{ '<|endoftext|>' if " + LAST + " else '<|im_end|>\n' }}"), "past_stop",
        "differs"),
    "today's date": ("{{ strftime_now('%Y-%m-%d') }}" + CHATML, "date", True),
    "chance": ("{{ range(10**5) | random }}" + CHATML, "deterministic", False),
    "generation tags": (CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
                        "generation_tags", True),
    "an argument": ("{{ persona }}" + CHATML, "template_kwargs", ["persona"]),
    "no system message": ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML,
                          "system_role", "refused"),
    "system dropped": (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"),
                       "system_role", "dropped"),
    "a system message is needed": (
        "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML,
        "needs_system", True),
    "think dropped": (CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "inline_think", "dropped"),
    "BOS twice": ("<|endoftext|>" * 2 + CHATML, "bos", "twice"),
    "a foreign control text": (CHATML.replace("<|im_start|>", "<|beginning|>"), "control_tokens", {"<|beginning|>": 5}),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_behaviour_is_found(what: str) -> None:
    template, name, value = PLANTED[what]
    loaded = replace(DEMO, special_tokens={**DEMO.special_tokens, "bos_token": "<|endoftext|>"})
    report = describe(ChatEncoder.load(loaded, template))
    found = report[name].value
    assert (list(found) == list(value)) if name == "control_tokens" else found == value
    plain = describe(ChatEncoder.load(loaded, CHATML))
    assert name not in plain or plain[name].value != value, "the plain template does not do so"


def test_the_plain_template_has_no_warnings() -> None:
    assert {finding.severity for finding in of(CHATML).findings if finding.name != "tools"} == {"info"}


def test_named_templates_are_told() -> None:
    report = describe(ChatEncoder.load(DEMO, {"default": CHATML, "tool_use": CHATML + "tools"}))
    assert report["named_templates"].value == ["default", "tool_use"]


def test_the_clock_of_the_encoder_is_the_one_that_is_asked() -> None:
    report = of("{{ strftime_now('%Y') }}" + CHATML, clock=lambda: datetime(2031, 1, 2))
    shown = report["date"].witness
    assert shown is not None and "2031" in shown.text


def test_template_arguments_change_what_is_said() -> None:
    directory = assets.tokenizer_dir("qwen3")
    off = describe(ChatEncoder.load(directory, template_kwargs={"enable_thinking": False}))
    assert off["prompt_reasoning"].value == "closed" and off["emitted_header"].value == ""
    assert "enable_thinking" in native("qwen3")["emitted_header"].remedy


# -- hostile templates -------------------------------------------------------------------------------------------------

HOSTILE = {
    "not a template": ("{% if %}", "error"), "unclosed": ("{{ messages", "error"),
    "endless": ("{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}", None),
    "huge": ("{{ 'x' * 10**10 }}", None), "recursive": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", None),
    "always refuses": ("{{ raise_exception('no\x1b[31m') }}", "renders"), "undefined": ("{{ a.b.c }}", "renders"),
    "empty": ("", None), "constant": ("constant", None), "only the prompt": ("{{ add_generation_prompt }}", None),
    "lies": ("{{ messages | length }}{% if messages | length == 2 %}" + ANSWER + "{% endif %}", None),
    "changes its messages": ("{% set _ = messages.append(1) %}", None), "sorts": ("{{ messages | sort }}", None),
    "control characters": ("\x1b]0;evil\x07{{ messages[0].content }}\u202e", None),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_template_is_described_and_never_raises(what: str) -> None:
    template, name = HOSTILE[what]
    report = describe(ChatEncoder.load(DEMO, {"default": template}))
    assert report.findings and json.dumps(report.to_dict())
    assert name is None or report[name].severity == "error"
    out = printed(report, 80)
    assert "\x1b" not in out and "\u202e" not in out and "\x07" not in out


def test_a_template_without_a_default_is_described() -> None:
    report = describe(ChatEncoder.load(DEMO, {"rag": CHATML, "tool_use": CHATML}))
    assert report["error"].severity == "error" and "none named default" in report["error"].statement


# -- over the corpus ---------------------------------------------------------------------------------------------------

NAMES = sorted(assets.templates())


def corpus(names: list[str]) -> Iterator[tuple[str, ChatEncoder, TemplateReport]]:
    loaded = load_tokenizer(assets.tokenizer_dir("qwen3"))
    loaded = replace(loaded, special_tokens={**loaded.special_tokens, **SPECIAL})
    for name in names:
        encoder = ChatEncoder.load(loaded, {"default": assets.templates()[name]}, clock=lambda: datetime(2026, 1, 2))
        yield name, encoder, describe(encoder)


def sound(name: str, encoder: ChatEncoder, report: TemplateReport) -> None:
    """What must hold of the report of any template."""
    names = [finding.name for finding in report.findings]
    assert len(set(names)) == len(names) > 3, (name, names)
    assert "error" not in names, (name, report["error"])
    for finding in report.findings:
        assert finding.severity in SEVERITIES and finding.statement, (name, finding)
        shown = finding.witness
        assert shown is None or 0 <= shown.start <= shown.end <= len(shown.text) <= 400, (name, finding)
    assert json.loads(json.dumps(report.to_dict()))["findings"]
    assert all(cell_len(line) <= 90 for line in report.render().layout(90).splitlines()), name
    agrees_with_the_encoder(name, encoder, report)


def agrees_with_the_encoder(name: str, encoder: ChatEncoder, report: TemplateReport) -> None:
    """Header, prompt and rows as the rows themselves have them."""
    if "renders" in report:
        return
    probes = Probes.of(encoder)
    at = len(probes.opening) + 1
    conversation = probes.chat(user(), answer())
    prompt = report["generation_prompt"].value
    if prompt:
        text = probes.rendering(user()).text(at, True)
        assert text is not None and text.endswith(prompt), name
    encoding = probes.encoder.examine(conversation)
    reachable = encoding.outcomes[at] in ("exact", "split")
    if "emitted_header" in report:
        assert reachable and prompt is not None, name
        row = next(row for row in encoding.rows if (row.turns == at).any())
        said, written = report["emitted_header"].value, (row.reasons == Reason.HEADER).any()
        assert bool(said) or not written, name
    lost = [o for o in report["rows_plain"].value["outcomes"] if o not in ("exact", "split")]
    assert (report["rows_plain"].severity == "error") == bool(lost), name


def test_a_sample_of_the_corpus_is_described_soundly() -> None:
    for name, encoder, report in corpus(NAMES[::40]):
        sound(name, encoder, report)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_the_whole_corpus_is_described_soundly(part: int) -> None:
    for name, encoder, report in corpus(NAMES[part::8]):
        sound(name, encoder, report)


@pytest.mark.slow
def test_every_switch_that_is_advised_brings_the_turns_back() -> None:
    advised = 0
    for name, encoder, report in corpus(NAMES):
        if "rows_plain" not in report or not report["rows_plain"].remedy.startswith("--template-kwargs"):
            continue
        advised += 1
        kwargs = json.loads(report["rows_plain"].remedy.split("'")[1])
        again = describe(replace(encoder, template_kwargs=kwargs))
        assert set(again["rows_plain"].value["outcomes"]) <= {"exact", "split"}, (name, kwargs)
    assert advised >= 24


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "read"),
    [("Qwen-Qwen3-0.6B@a55ee1", ["enable_thinking"]),
     ("openai-gpt-oss-120b", ["builtin_tools", "model_identity", "reasoning_effort"]),
     ("meta-llama-Llama-3.1-8B-Instruct", ["builtin_tools", "custom_tools", "date_string", "tools_in_user_message"]),
     ("google-gemma-2-2b-it", [])],
)
def test_the_arguments_that_a_template_reads(name: str, read: list[str]) -> None:
    assert kwargs_read(assets.templates()[name]) == read


def test_arguments_of_broken_templates_are_none() -> None:
    assert kwargs_read({"default": "{% if %}", "tool_use": "{{ mood }}"}) == ["mood"]


@pytest.mark.parametrize(
    ("text", "tags"),
    [("<think>", (1, 0)), ("<|START_THINKING|>", (1, 0)), ("[THINK]", (1, 0)), ("<think></think>", (1, 1)),
     ("</thought>", (0, 1)), ("<seed:think>", (1, 0)), ("<|im_start|>assistant", (0, 0)), ("I think > you <", (0, 0))],
)
def test_reasoning_tags_of_every_family_are_known(text: str, tags: tuple[int, int]) -> None:
    assert thinking_tags(text) == tags


def test_probes_open_with_a_system_message_only_where_it_is_needed() -> None:
    assert Probes.of(ChatEncoder.load(DEMO)).opening == ()
    needy = "{% if messages[0].role != 'system' %}{{ raise_exception('x') }}{% endif %}" + CHATML
    assert len(Probes.of(ChatEncoder.load(DEMO, needy)).opening) == 1
    assert QUESTION in str(Probes.of(ChatEncoder.load(DEMO, needy)).text(user(), answer()))


# -- shown -------------------------------------------------------------------------------------------------------------


def printed(report: TemplateReport, width: int, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(report.render())
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_no_line_is_wider_than_the_terminal_or_ends_in_blanks(width: int) -> None:
    out = printed(native("gpt-oss"), width)
    assert all(cell_len(line) <= width and line == line.rstrip() for line in out.splitlines())


def test_every_finding_is_shown_with_its_witness_and_remedy() -> None:
    report = native("mistral-v3")
    out = " ".join(printed(report, 400).split())
    for finding in report.findings:
        assert " ".join(finding.name.replace("_", " ").split()) in out
        assert finding.witness is None or " ".join(str(finding.witness).split()) in out
        assert not finding.remedy or f"→ {' '.join(finding.remedy.split())}" in out
    assert out.startswith("template of ") and "turns → rows: plain 3 → 1" in out


def test_severity_is_told_in_words_without_colour() -> None:
    out = printed(native("deepseek-v3"), 100)
    assert "\x1b" not in out and "✗ rows plain" in out and "error: 3 of 3 turns" in out
    assert "\x1b[" in printed(native("deepseek-v3"), 100, force_terminal=True, color_system="standard")


def test_the_keys_of_the_json_are_stable() -> None:
    report = of(CHATML).to_dict()
    assert list(report) == ["tokenizer", "counts", "findings"] and list(report["counts"]) == list(SEVERITIES)
    assert list(report["findings"][0]) == ["group", "name", "value", "statement", "severity", "witness", "remedy"]
    assert list(report["findings"][0]["witness"]) == ["text", "start", "end"]


def test_a_finding_that_is_not_there_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        of(CHATML)["nonsense"]
    assert isinstance(of(CHATML)["stop_of_answer"], TemplateFinding)
