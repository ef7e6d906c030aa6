"""Real chats as files: in the form their package has them, or converted to `messages` where that form is odd.

Original: `tools_en tools_zh dpo_en dpo_zh kto_en reasoning_tools weights dpo_messages alpaca_en alpaca_zh text_en`.
Converted: `multilingual` (with a `language`), `smalltalk`, `bfcl_calls` and `bfcl_multi_turn` (with `tools`).
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from .packages import build_once, fetch

Row = dict[str, Any]

LLAMAFACTORY = {
    "tools_en": "glaive_toolcall_en_demo.json",
    "tools_zh": "glaive_toolcall_zh_demo.json",
    "dpo_en": "dpo_en_demo.json",
    "dpo_zh": "dpo_zh_demo.json",
    "kto_en": "kto_en_demo.json",
    "reasoning_tools": "reason_tool_use_demo_50.jsonl",
    "weights": "v1_sft_demo.jsonl",
    "dpo_messages": "v1_dpo_demo.jsonl",
    "alpaca_en": "alpaca_en_demo.json",
    "alpaca_zh": "alpaca_zh_demo.json",
    "text_en": "c4_demo.jsonl",
}
BFCL_CALLS = (
    "simple_python",
    "multiple",
    "parallel",
    "parallel_multiple",
    "live_simple",
    "live_parallel_multiple",
)
BFCL_CLASS_FILES = {
    "GorillaFileSystem": "gorilla_file_system",
    "MathAPI": "math_api",
    "MessageAPI": "message_api",
    "TicketAPI": "ticket_api",
    "TradingBot": "trading_bot",
    "TravelAPI": "travel_booking",
    "TwitterAPI": "posting_api",
    "VehicleControlAPI": "vehicle_control",
}
JSON_SCHEMA_TYPES = {"dict": "object", "float": "number", "tuple": "array", "any": "string"}


def multilingual() -> Iterator[Row]:
    """Short chats in 28 languages; speakers take turns, the first is the user, and a chat ends with an answer."""
    for path in sorted((fetch("chatterbot-corpus") / "chatterbot_corpus/data").glob("*/*.yml")):
        for lines in yaml.safe_load(path.read_text("utf-8")).get("conversations") or []:
            texts = [line for line in lines if isinstance(line, str)]
            if len(texts) == len(lines) and len(texts) >= 2:
                messages = [message("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
                yield {"messages": messages[: len(messages) // 2 * 2], "language": path.parent.name}


def smalltalk() -> Iterator[Row]:
    """Chats of two people; who speaks first is the user, and lines in a row by one person are one message."""
    raw = json.loads((fetch("chitchat-dataset") / "chitchat_dataset/dataset.json").read_text("utf-8"))
    for chat in raw.values():
        lines = [line for group in chat["messages"] for line in group]
        turns = ["\n".join(line["text"] for line in run) for _, run in groupby(lines, lambda line: line["sender"])]
        if len(turns) >= 2:
            yield {"messages": [message("assistant" if i % 2 else "user", turn) for i, turn in enumerate(turns)]}


def bfcl_calls() -> Iterator[Row]:
    """One request, its tools, and the calls that answer it: the first admissible value of each argument."""
    for category in BFCL_CALLS:
        for row, answer in bfcl_rows(category):
            calls = [tool_call(name, first(arguments)) for call in answer for name, arguments in call.items()]
            messages = [*row["question"][0], {"role": "assistant", "content": "", "tool_calls": calls}]
            yield {"messages": messages, "tools": [openai_tool(tool) for tool in row["function"]]}


def bfcl_multi_turn() -> Iterator[Row]:
    """Several requests, each answered by calls; the package has no tool results, so there are none here."""
    for row, answer in bfcl_rows("multi_turn_base"):
        tools = [tool for name in row["involved_classes"] for tool in bfcl_class(name)]
        parameters = {tool["name"]: list(tool["parameters"]["properties"]) for tool in tools}
        messages: list[Row] = []
        for requests, calls in zip(row["question"], answer, strict=True):
            parsed = [python_call(call, parameters) for call in calls]
            messages += requests
            messages.append({"role": "assistant", "content": "", "tool_calls": parsed})
        yield {"messages": messages, "tools": [openai_tool(tool) for tool in tools]}


CONVERTED: dict[str, Callable[[], Iterator[Row]]] = {
    "multilingual": multilingual,
    "smalltalk": smalltalk,
    "bfcl_calls": bfcl_calls,
    "bfcl_multi_turn": bfcl_multi_turn,
}
CHATS = (*LLAMAFACTORY, *CONVERTED)


@cache
def chat_file(name: str) -> Path:
    """The JSON or JSONL file with these chats."""
    if name in LLAMAFACTORY:
        (path,) = fetch("llamafactory").glob(f"*/data/{LLAMAFACTORY[name]}")
        return path
    rows = CONVERTED[name]
    filename = f"{name}.jsonl"

    def build(folder: Path) -> None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows())
        (folder / filename).write_text("".join(lines), "utf-8")

    recipe = Path(__file__).read_bytes() + Path(__file__).with_name("packages.py").read_bytes()
    key = hashlib.sha256(recipe).hexdigest()[:12]
    return build_once(f"chats/{key}/{name}", build) / filename


def chat_files() -> dict[str, Path]:
    """All chat files by name."""
    return {name: chat_file(name) for name in CHATS}


def chats(name: str) -> list[Row]:
    """The rows of one chat file as they are in it; the caller may change them."""
    path = chat_file(name)
    text = path.read_text("utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line] if path.suffix == ".jsonl" else json.loads(text)
    assert isinstance(rows, list)
    return rows


def message(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def tool_call(name: str, arguments: Row) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def openai_tool(schema: Row) -> Row:
    """A BFCL function as an OpenAI tool: its Python type names become those of JSON Schema."""
    function = {key: schema[key] for key in ("name", "description")}
    return {"type": "function", "function": {**function, "parameters": json_schema(schema["parameters"])}}


def json_schema(value: Any) -> Any:
    """`value` with every `"type"` that is a Python type name replaced."""
    if isinstance(value, list):
        return [json_schema(item) for item in value]
    if not isinstance(value, dict):
        return value
    named = value.get("type")
    replaced = {"type": JSON_SCHEMA_TYPES.get(named, named)} if isinstance(named, str) else {}
    return {key: json_schema(item) for key, item in value.items()} | replaced


def first(admissible: Row) -> Row:
    """The first admissible value of every argument; an argument whose first value is `""` may be left out, and is."""

    def value(item: Any) -> Any:
        if isinstance(item, list):
            return [value(part) for part in item]
        return first(item) if isinstance(item, dict) else item

    return {key: value(values[0]) for key, values in admissible.items() if values and values[0] != ""}


def bfcl_rows(category: str) -> Iterator[tuple[Row, list[Any]]]:
    """Every row of a BFCL category with its answer."""
    folder = fetch("bfcl-eval") / "bfcl_eval/data"
    answers = {
        row["id"]: row["ground_truth"] for row in bfcl_lines(folder / f"possible_answer/BFCL_v4_{category}.json")
    }
    for row in bfcl_lines(folder / f"BFCL_v4_{category}.json"):
        yield row, answers[row["id"]]


def bfcl_class(name: str) -> list[Row]:
    """The functions of one BFCL service."""
    return bfcl_lines(fetch("bfcl-eval") / f"bfcl_eval/data/multi_turn_func_doc/{BFCL_CLASS_FILES[name]}.json")


def bfcl_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def python_call(source: str, parameters: dict[str, list[str]]) -> Row:
    """`mv('a', destination='b')` as a tool call, positional arguments named by the tool's schema."""
    call = ast.parse(source, mode="eval").body
    assert isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
    arguments = {
        name: ast.literal_eval(value) for name, value in zip(parameters[call.func.id], call.args, strict=False)
    }
    arguments |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    return tool_call(call.func.id, arguments)
