"""Our rendering is that of transformers, character for character, wherever transformers renders at all."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import transformers.utils.chat_template_utils as chat_template_utils
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import TemplateError
from chatloss.stops import Stop, control_texts
from chatloss.template import ChatTemplate
from tests import assets

Message = dict[str, Any]
CLOCK = datetime(2026, 11, 22, 3, 4, 5)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "look_up", "arguments": {"word": "é<&>", "n": [1, None]}},
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Looks <b>it</b> up & 'quotes' \"it\" — 你好.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "enum": ["é<&>", None]}, "n": {"type": "array"}},
                "required": ["word"],
            },
        },
    }
]
CHAT: list[Message] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "Hi {{ there }} {% raw %}"},
    {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"found": true}', "name": "look_up", "tool_call_id": "call00001"},
    {"role": "assistant", "content": "  Found it.\n", "reasoning_content": "It says so."},
]
SHAPES: dict[str, tuple[list[Message], list[Message] | None]] = {
    "plain": (
        [
            CHAT[1],
            {"role": "assistant", "content": " Hello 👩‍👩‍👧!\n\n"},
            {"role": "user", "content": "e\u0301 \u05d0"},
        ],
        None,
    ),
    "system": ([CHAT[0], CHAT[1], {"role": "assistant", "content": "Hello"}], None),
    "tools": (CHAT, TOOLS),
    "reasoning": ([CHAT[1], CHAT[4], {"role": "user", "content": "<think>?</think>"}, CHAT[4]], None),
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), **SPECIAL)


@pytest.fixture(autouse=True)
def frozen_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return CLOCK

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def ours(template: str | dict[str, str], messages: list[Message], tools: Any = None, **options: Any) -> str | None:
    try:
        return ChatTemplate(template, SPECIAL, lambda: CLOCK).render(messages, tools, **options)
    except TemplateError:
        return None


def theirs(
    tokenizer: PreTrainedTokenizerFast, template: str | None, messages: list[Message], tools: Any = None, **options: Any
) -> str | None:
    try:
        text = tokenizer.apply_chat_template(messages, tools, chat_template=template, tokenize=False, **options)
    except Exception:
        return None
    assert isinstance(text, str)
    return text


def assert_equal_text(tokenizer: PreTrainedTokenizerFast, name: str, template: str) -> None:
    for shape, (messages, tools) in SHAPES.items():
        for prompt in (False, True):
            expected = theirs(tokenizer, template, messages, tools, add_generation_prompt=prompt)
            assert ours(template, messages, tools, add_generation_prompt=prompt) == expected, (name, shape, prompt)


def test_a_sample_of_real_templates_renders_as_in_transformers(tokenizer: PreTrainedTokenizerFast) -> None:
    for name, template in list(assets.templates().items())[::12]:
        assert_equal_text(tokenizer, name, template)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_real_template_renders_as_in_transformers(tokenizer: PreTrainedTokenizerFast, part: int) -> None:
    everything = assets.templates() | assets.trl_templates() | assets.llama_cpp_templates() | assets.mistral_templates()
    for name, template in list(everything.items())[part::8]:
        assert_equal_text(tokenizer, name, template)


@pytest.mark.parametrize("family", assets.FAST_TIER)
def test_native_templates_render_as_in_transformers(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    assert_equal_text(tokenizer, family, assets.template(assets.NATIVE[family]))


SNIPPETS = [
    "{{ tools | tojson }}",
    "{{ tools | tojson(indent=4) }}",
    "{{ tools | tojson(indent=0) }}",
    "{{ tools | tojson(ensure_ascii=true, sort_keys=True) }}",
    "{{ tools | tojson(separators=(',', ':')) }}",
    "{{ messages[0].content | tojson }}{{ 1.5 | tojson }}{{ none | tojson }}{{ true | tojson }}",
    "{{ tools }}{{ tools | string }}{{ messages }}",
    "{{ messages[2].tool_calls[0].function.arguments | string }}",
    "{{ strftime_now('%d %B %Y, %H:%M:%S') }}",
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ sep_token }}|{{ unk_token is defined }}",
    "{% for m in messages %}{{ m.thinking }}/{{ m.reasoning_content }}/{{ m.reasoning }};{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "{%- generation -%}  a  {%- endgeneration -%}  b",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{% if loop.first %}{% continue %}{% endif %}"
    "{{ loop.index }}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}{{ loop.nextitem.role }}{{ loop.previtem.role }}"
    "{% endfor %}",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ m.content }}{% else %}none{% endfor %}",
    "{% for k, v in tools[0].function.items() %}{{ loop.index0 }}{{ k }}={{ v }}{% endfor %}",
    "{% for k, v in tools[0].function | dictsort %}{{ k }}={{ v }}{% endfor %}",
    "{% for a in [[1, [2]], [3]] recursive %}{% if a is sequence %}({{ loop(a) }}){% else %}{{ a }}{% endif %}{% endfor %}",
    "{% set ns = namespace(a=1, self=2) %}{% for m in messages %}{% set ns.a = ns.a + 1 %}{% endfor %}{{ ns.a }}{{ ns }}",
    "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller else '' }}]{% endmacro %}{{ f(1) }}{{ f(2, y=3) }}"
    "{% call f('c') %}inner{% endcall %}{{ f.name }}{{ f.arguments }}",
    "{% set text %}  a\n  b{% endset %}{{ text | trim }}{{ text | length }}{{ text.split('\n') }}",
    "{% filter upper %}abc{{ messages[0].content }}{% endfilter %}",
    "{% autoescape true %}{{ '<b>' }}{{ '<b>' | safe }}{% endautoescape %}",
    "{{ dict(a=1, b=2) }}{{ dict.fromkeys(['x', 'y'], 0) }}{{ dict([['q', 1]]) }}",
    "{{ 'a' ~ 1 ~ none ~ undefined_name ~ [1, 'x'] ~ 1.0 ~ true }}",
    "{{ '%s-%05d-%.2f' | format('a', 1234567, 1.5) }}{{ '%s' % 99999 }}{{ '%(a)s' % {'a': 1} }}{{ 7 % 4 }}",
    "{{ '{:>8}|{!r}|{a[0]}'.format('x', 'y', a=[1]) }}{{ '{b}'.format_map({'b': 2}) }}",
    "{{ 'abc'.ljust(6, '.') }}{{ 'abc' | center(9) }}{{ '7'.zfill(3) }}{{ 'a\tb'.expandtabs(4) }}",
    "{{ max_tokens | default(131072) }}{{ 123456 | int(0) }}{{ 'x' | int(99999) }}{{ 123456.789 | round(1) }}{{ 98765 | abs }}",
    "{{ [3, 1, 2] | sort | join(', ') }}{{ ['b', 'A'] | sort(reverse=true) }}{{ [1, 1, 2] | unique | list }}",
    "{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'tool') | list | length }}",
    "{{ messages | rejectattr('tool_calls', 'defined') | map(attribute='content') | join('|') }}",
    "{{ messages | map(attribute='role') | map('upper') | unique | join(',') }}{{ [[1], [2]] | sum(start=[]) }}",
    "{% for g, items in messages | groupby('role') %}{{ g }}{{ items | length }}{% endfor %}",
    "{{ [1, 2, 3, 4, 5] | batch(2, 'x') | list }}{{ [1, 2, 3, 4, 5] | slice(2) | list }}",
    "{{ 'a b c' | wordcount }}{{ 'a b c' | title }}{{ 'abc' | reverse }}{{ 'x y' | urlencode }}{{ '<b>' | e }}",
    "{{ 'a\nb' | indent(4) }}{{ 'a\nb' | indent('>', first=true) }}{{ 'one two' | truncate(5, true) }}",
    "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ 'hello'[1:-1] }}{{ messages[-1]['content'][:5] }}",
    "{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [0] * 3 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ 7 // 2 }}{{ 1 / 4 }}{{ -3 }}",
    "{{ 'x' in 'xyz' }}{{ 'role' in messages[0] }}{{ 3 in [1, 2] }}{{ 1 < 2 < 3 }}{{ messages[0] == messages[1] }}",
    "{{ messages[9] }}{{ messages[0].nothing }}{{ messages[0].nothing is none }}{{ messages[0]['content'] is string }}",
    "{{ range(3) | list }}{{ range(5, 1, -2) | list }}{{ range(3) }}",
    "{{ documents | map(attribute='title') | join(';') }}{{ documents | tojson }}",
    "{{ messages[0].items() | list }}{{ messages[0] | items | list }}{{ messages[0].get('x', 'y') }}{{ messages[0].keys() | list }}",
    "{{ cycler('a', 'b').next() }}{% set j = joiner('-') %}{{ j() }}a{{ j() }}b",
    "{%+ if true %} x {%+ endif %}\n   {# note #}\n  {%- if true -%} y {% endif %}\n{{ '\\n' }}z\n",
    "{{ extra }}{{ enable_thinking is defined and enable_thinking is false }}{{ bos }}",
    "{{ 1 if messages else 2 }}{{ not messages }}{{ messages and 'yes' or 'no' }}{{ 'é'.encode('utf-8') }}",
    "{{ messages[0].content.__class__ }}{{ messages.__len__ }}|{{ ''.__class__.__mro__ is defined }}",
    "{{ messages[0]['content'].upper().title().swapcase().strip('.').replace('A', 'b') }}{{ 'a,b'.partition(',') }}",
    "{{ raise_exception('no') }}",
    "{{ messages.append(1) }}",
    "{{ namespace(_x=1) }}",
    "{% include 'x' %}",
    "{{ undefined_name.x }}",
    "{{ undefined_name() }}",
    "{{ 1 + 'a' }}",
    "{% do x %}",
    "{% for %}",
    "{{ messages | nosuchfilter }}",
    "{{ loop }}",
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_the_language_is_that_of_transformers(tokenizer: PreTrainedTokenizerFast, snippet: str) -> None:
    documents = [{"title": "A", "text": "b"}, {"title": "C", "text": "d"}]
    for options in ({}, {"documents": documents, "extra": [1, {"a": 2}], "enable_thinking": False, "bos_token": "<B>"}):
        expected = theirs(tokenizer, snippet, CHAT, TOOLS, **options)
        assert ours(snippet, CHAT, TOOLS, **options) == expected


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": "x", "thinking": "t"},
        {"role": "assistant", "content": "x", "reasoning": "r"},
        {"role": "assistant", "content": "x", "reasoning": "r", "thinking": "t"},
        {"role": "assistant", "content": "x", "reasoning_content": "c", "thinking": None},
        {"role": "assistant", "content": "x", "reasoning_content": ""},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "x", "tool_calls": None, "name": None, "extra": {"a": None}},
        {"role": "assistant", "content": [{"type": "text", "text": "part"}]},
    ],
)
def test_reasoning_aliases_and_null_fields_are_those_of_transformers(
    tokenizer: PreTrainedTokenizerFast, message: Message
) -> None:
    template = "{% for m in messages %}{% for k in m | sort %}{{ k }}={{ m[k] }};{% endfor %}{% endfor %}"
    assert ours(template, [message]) == theirs(tokenizer, template, [message])


def test_the_tool_template_serves_conversations_with_tools() -> None:
    named = {"default": "plain", "tool_use": "tools", "rag": "rag"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, "<unk>")), **SPECIAL)
    tokenizer.chat_template = named
    for tools in (None, [], TOOLS):
        assert ours(named, CHAT, tools) == theirs(tokenizer, None, CHAT, tools)
    assert [ours(named, CHAT, tools) for tools in (None, TOOLS)] == ["plain", "tools"]


def test_named_templates_without_a_default_are_an_error_that_names_them() -> None:
    with pytest.raises(TemplateError, match="rag, tool_use and none named default"):
        ChatTemplate({"tool_use": "a", "rag": "b"}).render(CHAT)
    assert ours({"tool_use": "a"}, CHAT, TOOLS) == "a"


def test_keyword_arguments_override_special_tokens() -> None:
    assert ours("{{ bos_token }}{{ x }}", CHAT, bos_token="<B>", x=1) == "<B>1"


def test_the_clock_is_read_anew_for_every_rendering() -> None:
    times = iter([datetime(2026, 1, 1), datetime(2027, 2, 2)])
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d') }}", clock=lambda: next(times))
    assert [template.render(CHAT) for _ in range(2)] == ["2026-01-01", "2027-02-02"]


def test_rendering_changes_none_of_its_input() -> None:
    message: Message = {"role": "assistant", "content": "x", "thinking": "t", "name": None}
    before = [dict(message)]
    ours("{% for m in messages %}{{ m }}{% endfor %}", [message])
    assert [message] == before


@pytest.mark.parametrize(
    ("template", "kind", "words"),
    [
        ("{% for %}", "syntax", "does not compile"),
        ("{{ raise_exception('roles must\nalternate') }}", "refused", "roles must alternate"),
        ("{{ x.y.z }}", "refused", "refuses these messages"),
        ("{% for i in range(10) %}{{ 'x' * 10 ** 9 }}{% endfor %}", "bounds", "more than"),
    ],
)
def test_errors_say_whether_template_data_or_bounds_are_at_fault(template: str, kind: str, words: str) -> None:
    with pytest.raises(TemplateError, match=words) as caught:
        ChatTemplate(template).render(CHAT)
    assert caught.value.kind == kind
    assert "\n" not in caught.value.what


PROBED = {
    "qwen3": ("string", "object", "reasoning_content"),
    "qwen3.5": ("string", "object", "reasoning_content"),
    "llama3": ("string", "object", None),
    "gpt-oss": ("string", "object", "reasoning_content"),
    "deepseek-v3": ("string", "string", None),
    "mistral-v3": ("string", "object", None),
    "smollm2": ("string", None, None),
    "gemma-like": ("string", None, None),
}


@pytest.mark.parametrize("family", PROBED)
def test_formats_are_probed(family: str) -> None:
    formats = ChatTemplate(assets.template(assets.NATIVE[family]), SPECIAL, lambda: CLOCK).formats
    assert (formats.content, formats.arguments, formats.reasoning) == PROBED[family]


def test_a_template_that_iterates_over_parts_takes_parts() -> None:
    template = "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endfor %}"
    assert ChatTemplate(template).formats.content == "parts"


def test_a_template_that_encodes_strings_twice_takes_objects() -> None:
    template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
        "{% endfor %}"
    )
    assert ChatTemplate(template).formats.arguments == "object"
    assert ChatTemplate(template.replace("c.function | tojson", "'%s' % c.function.arguments")).formats.arguments
    joined = template.replace("c.function | tojson", "'{' + c.function.arguments")
    assert ChatTemplate(joined).formats.arguments == "string"


STOPS = {
    "qwen3": (("<|im_end|>", "<|im_end|>"), ["<|im_start|>", "<|im_end|>"]),
    "llama3": (("<|eot_id|>", "<|eot_id|>"), ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]),
    "gpt-oss": (("<|return|>", "<|call|>"), ["<|start|>", "<|end|>", "<|message|>", "<|channel|>"]),
    "gemma-like": (("<end_of_turn>", "<end_of_turn>"), ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral-v3": (("</s>", "</s>"), ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]),
    "deepseek-v3": (("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>"), ["<｜User｜>", "<｜Assistant｜>"]),
}


@pytest.mark.parametrize("family", STOPS)
def test_the_stops_are_those_the_model_is_served_with(family: str) -> None:
    (answer, call), special = STOPS[family]
    template = ChatTemplate(assets.template(assets.NATIVE[family]), SPECIAL | {"eos_token": answer}, lambda: CLOCK)
    stops = template.stops(special, [answer, call])
    assert [stop.text for stop in stops] == [answer, call]


ONE_LINE = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"


@pytest.mark.parametrize(
    ("body", "prompt", "stop"),
    [
        (
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n",
            Stop("<|im_end|>", "<|im_end|>"),
        ),
        ("<|{{ m.role }}|>\n{{ m.content }}", "<|assistant|>\n", Stop("<|user|>", "<|user|>", True)),
        ("[INST] {{ m.content }} [/INST]", "", Stop("[/INST]", "[/INST]")),
        ("### {{ m.role }}:\n{{ m.content }}\n### End\n", "### assistant:\n", Stop("### End", "### End")),
        ("{{ m.role }}: {{ m.content }}\n", "assistant: ", Stop()),
    ],
)
def test_stops_of_templates_without_a_tokenizer(body: str, prompt: str, stop: Stop) -> None:
    assert ChatTemplate(ONE_LINE % (body, prompt)).stops()[0] == stop


def test_tags_inside_an_answer_are_no_control_tokens() -> None:
    text = "</think><tool_call>x</tool_call><|im_end|><arg_key><b></s>"
    assert [text[a:b] for a, b in control_texts(text)] == ["<|im_end|>"]
    assert [text[a:b] for a, b in control_texts(text, ["</s>"])] == ["<|im_end|>", "</s>"]
    assert next(text[a:b] for a, b in control_texts(text, ["</think>"])) == "</think>"


def test_a_conversation_keeps_its_extra_fields_for_the_template() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.mood }}:{{ m.content }};{% endfor %}{{ flavour }}"
    conversation = Conversation.from_messages(
        [{"role": "user", "content": "a", "mood": "blue"}], template_kwargs={"flavour": "sweet"}
    )
    encoder: Callable[..., Any] = ChatEncoder.load
    rendering = encoder(assets.tokenizer_dir("smollm2"), template).rendering(conversation)
    assert rendering.text(1) == "user:blue:a;sweet"
