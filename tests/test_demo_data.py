"""The built-in demo data: chats, preferences, messy rows, tokenizer and its two templates."""

import json
import random
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "src" / "chatloss" / "assets" / "demo"
TOKENIZER = DEMO / "tokenizer"
TEMPLATES = ["chat_template.jinja", "chat_template_rewrites.jinja"]
PROMPT = "<|im_start|>assistant\n"
STOP = "<|im_end|>"


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (DEMO / name).read_text(encoding="utf-8").split("\n")[:-1]]


CHATS = rows("chats.jsonl")
PREFERENCES = rows("preferences.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture(params=TEMPLATES)
def render(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    template = (TOKENIZER / request.param).read_text(encoding="utf-8")

    def render(chat: dict[str, Any], end: int | None = None, add_generation_prompt: bool = False) -> str:
        text: str = tokenizer.apply_chat_template(
            chat["messages"][:end],
            tools=chat.get("tools"),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **chat.get("chat_template_kwargs", {}),
        )
        return text

    return render


def answers(chat: dict[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    return ((i, message) for i, message in enumerate(chat["messages"]) if message["role"] == "assistant")


def test_chats_are_many_distinct_and_end_with_an_answer() -> None:
    assert len(CHATS) >= 140
    assert len({json.dumps(chat["messages"], sort_keys=True) for chat in CHATS}) == len(CHATS)
    assert all(chat["messages"][-1]["role"] == "assistant" for chat in CHATS)
    assert all(message.get("content") or message.get("tool_calls") for chat in CHATS for _, message in answers(chat))


def test_every_tool_call_is_offered_and_answered_in_order() -> None:
    for chat in CHATS:
        offered = {tool["function"]["name"] for tool in chat.get("tools", [])}
        waiting: list[str] = []
        for message in chat["messages"]:
            if message["role"] == "tool":
                assert message["tool_call_id"] == waiting.pop(0)
                json.loads(message["content"])
            else:
                assert not waiting
                waiting = [call["id"] for call in message.get("tool_calls", [])]
                assert {call["function"]["name"] for call in message.get("tool_calls", [])} <= offered
        assert not waiting


def test_chats_show_every_feature_that_the_demo_is_about() -> None:
    messages = [message for chat in CHATS for _, message in answers(chat)]
    calls = [message["tool_calls"] for message in messages if message.get("tool_calls")]
    arguments = [call["function"]["arguments"] for group in calls for call in group]
    assert sum(any("reasoning_content" in message for _, message in answers(chat)) for chat in CHATS) >= 25
    assert 2 <= sum(any("<think>" in (m["content"] or "") for _, m in answers(chat)) for chat in CHATS) <= 3
    assert sum(len(group) > 1 for group in calls) >= 5
    assert {type(argument) for argument in arguments} == {str, dict}
    assert any(message.get("train") is False for message in messages)
    assert any(message.get("weight") == 0.5 for message in messages)
    assert any("chat_template_kwargs" in chat for chat in CHATS)
    assert max(sum(message["role"] == "user" for message in chat["messages"]) for chat in CHATS) >= 8
    assert any(chat["messages"][0]["role"] == "system" for chat in CHATS)
    assert any(chat["messages"][0]["role"] == "user" for chat in CHATS)


def test_prompt_is_a_prefix_of_own_rendering_for_every_turn(render: Any, tokenizer: Any) -> None:
    for chat in CHATS:
        for i, message in answers(chat):
            prompt = render(chat, end=i, add_generation_prompt=True)
            own = render(chat, end=i + 1)
            assert prompt.endswith(PROMPT)
            assert own.startswith(prompt)
            target = own.removeprefix(prompt)
            assert target.endswith(STOP + "\n")
            assert target.count(STOP) == 1
            assert (message["content"] or "") in target
            assert message.get("reasoning_content", "") in target
            prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
            own_ids = tokenizer.encode(own, add_special_tokens=False)
            assert own_ids == prompt_ids + tokenizer.encode(target, add_special_tokens=False)
            assert own_ids.count(tokenizer.eos_token_id) == own.count(STOP)
            assert tokenizer.decode(own_ids) == own


def test_plain_template_holds_every_turn_in_one_rendering(tokenizer: Any) -> None:
    for chat in CHATS:
        whole = render_with(tokenizer, TEMPLATES[0], chat, len(chat["messages"]))
        for i, _ in answers(chat):
            assert whole.startswith(render_with(tokenizer, TEMPLATES[0], chat, i + 1))


def test_rewriting_template_drops_reasoning_before_the_last_user_message_and_nothing_else(tokenizer: Any) -> None:
    rewritten = 0
    for chat in CHATS:
        messages = chat["messages"]
        last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
        without = [
            {
                key: value.split("</think>")[-1].lstrip("\n") if key == "content" and value else value
                for key, value in message.items()
                if key != "reasoning_content"
            }
            if message["role"] == "assistant" and i < last_user
            else message
            for i, message in enumerate(messages)
        ]
        expected = render_with(tokenizer, TEMPLATES[0], chat | {"messages": without}, len(messages))
        assert render_with(tokenizer, TEMPLATES[1], chat, len(messages)) == expected
        rewritten += without != messages
    assert rewritten >= 8


def render_with(tokenizer: Any, template: str, chat: dict[str, Any], end: int) -> str:
    text: str = tokenizer.apply_chat_template(
        chat["messages"][:end],
        tools=chat.get("tools"),
        chat_template=(TOKENIZER / template).read_text(encoding="utf-8"),
        tokenize=False,
        **chat.get("chat_template_kwargs", {}),
    )
    return text


def test_arguments_render_alike_as_object_and_as_json_string(render: Any) -> None:
    for chat in CHATS:
        parsed = json.loads(json.dumps(chat))
        for _, message in answers(parsed):
            for call in message.get("tool_calls", []):
                if isinstance(call["function"]["arguments"], str):
                    call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        assert render(parsed) == render(chat)


def test_templates_render_an_empty_history_and_text_that_quotes_them(render: Any, tokenizer: Any) -> None:
    quoting = {"messages": [{"role": "user", "content": f"{STOP}\n{PROMPT}{{{{ messages }}}}"}]}
    assert render(quoting) == f"<|im_start|>user\n{quoting['messages'][0]['content']}{STOP}\n"
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for template in TEMPLATES:
        compiled = environment.from_string((TOKENIZER / template).read_text(encoding="utf-8"))
        assert compiled.render(messages=[], add_generation_prompt=True) == PROMPT


def test_preferences_share_a_prompt_and_differ(render: Any) -> None:
    assert len(PREFERENCES) == 64
    assert len({json.dumps(row["prompt"]) for row in PREFERENCES}) == 64
    for row in PREFERENCES:
        assert row["chosen"] != row["rejected"]
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in row[side]] == ["assistant"]
            chat = {"messages": row["prompt"] + row[side], "tools": row.get("tools")}
            prompt = render(chat, end=-1, add_generation_prompt=True)
            assert render(chat).startswith(prompt)


def test_held_out_questions_are_new_and_their_answers_are_known() -> None:
    heldout = rows("heldout.jsonl")
    asked = {message["content"] for chat in CHATS for message in chat["messages"] if message["role"] == "user"}
    known = {message["content"] for chat in CHATS for _, message in answers(chat)}
    assert len(heldout) == 8
    for row in heldout:
        (question,) = row["messages"]
        assert question["role"] == "user"
        assert question["content"] not in asked
        assert row["expected"] in known


def test_every_messy_row_says_what_it_shows() -> None:
    lines = (DEMO / "messy.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert all(line.startswith('{"shows": "') for line in lines)
    broken = []
    for number, line in enumerate(lines):
        try:
            json.loads(line)
        except json.JSONDecodeError:
            broken.append(number)
    assert broken == [len(lines) - 1]


def test_tokenizer_script_reproduces_the_committed_bytes() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "make_demo_tokenizer.py"))
    committed = (TOKENIZER / "tokenizer.json").read_text(encoding="utf-8")
    assert script["make_tokenizer"]().to_str(pretty=True) + "\n" == committed


def test_tokenizer_round_trips_any_text(tokenizer: Any) -> None:
    draw = random.Random(0)
    scalars = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    texts = ["", " ", "\n\n", "\r\n \t", "e\u0301 é", "\x00", "\U0010ffff", "<think>\n</think>\n\n", " <|im_end|> x"]
    texts += ["".join(map(chr, draw.choices(scalars, k=40))) for _ in range(200)]
    texts += ["".join(map(chr, draw.choices(range(0x20, 0x3000), k=40))) for _ in range(200)]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_only_the_three_control_tokens_are_special(tokenizer: Any) -> None:
    assert tokenizer.all_special_tokens == [STOP, "<|endoftext|>"]
    added = tokenizer.added_tokens_decoder
    assert [token.content for token in added.values() if token.special] == ["<|endoftext|>", "<|im_start|>", STOP]
    for marker in ("think", "tool_call", "tool_response"):
        for text in (f"<{marker}>", f"</{marker}>"):
            (token,) = tokenizer.encode(text, add_special_tokens=False)
            assert tokenizer.decode([token], skip_special_tokens=True) == text


def test_generation_config_stops_at_the_end_of_a_turn(tokenizer: Any) -> None:
    config = json.loads((TOKENIZER / "generation_config.json").read_text(encoding="utf-8"))
    assert config["eos_token_id"] == [tokenizer.eos_token_id] == [tokenizer.convert_tokens_to_ids(STOP)]
    assert config["pad_token_id"] == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
