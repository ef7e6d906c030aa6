"""One row of each input format -> Conversation, Preference, Label or Text; and which format a file's rows are in.

What the formats say about training is kept: the completion of a prompt/completion row is trained and its prompt is
not, a preference pair is judged by what follows the prompt, a KTO row by its last answer. Assistant messages that only
serve as context there get `train=False`, unless the data has its own `train` or `weight` for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from chatloss.chat import (
    CALL_KEYS,
    REASONING_KEYS,
    Conversation,
    Label,
    Message,
    Preference,
    Text,
    plain_message,
    split_think,
    tools_of,
)
from chatloss.errors import DataError
from chatloss.values import checked_text, kind_of, parse_json

__all__ = ["COLUMNS", "INPUT_FORMATS", "KEYING", "Row", "detect", "parse"]

Row = Conversation | Preference | Label | Text

FORMATS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt-completion": ("prompt", "completion"),
    "preference": ("chosen", "rejected"),
    "kto": ("kto_tag or a boolean label",),
    "text": ("text",),
}
INPUT_FORMATS = ("auto", *FORMATS)

LIST_KEYS = ("messages", "conversations")
PAIR_KEYS = (("chosen", "rejected"), ("chosen_messages", "rejected_messages"))
MEDIA_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
KEYING = (*LIST_KEYS, *PAIR_KEYS[0], *PAIR_KEYS[1], "instruction", "output", "prompt", "completion", "text")
# Every key of a row that is looked at: columnar files need not decode the others.
EXTRA = ("input", "history", "system", "tools", "functions", "chat_template_kwargs", "label", "kto_tag")
COLUMNS = (*KEYING, *EXTRA, *MEDIA_KEYS)
_USUAL = {*LIST_KEYS[:1], "tools"}  # the keys of most rows

SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function": "tool", "function_call": "assistant",
}  # fmt: skip
# A `role` may be one that only its own template knows, so it passes unless it is unmistakably another format's.
ROLE_ALIASES = {"human": "user", "gpt": "assistant", "function": "tool"}
PART_ORDER = {"reasoning": 0, "thinking": 0, "text": 1, "tool_call": 2}


def detect(rows: Sequence[Mapping[str, Any]]) -> str:
    """The name of the format that these first rows of a file are in, told by their keys.

    Raises `DataError` if no format, or more than one, fits. `text` only fits where nothing else does.

    >>> detect([{"conversations": [{"from": "human", "value": "hi"}]}])
    'sharegpt'
    """
    keys = sorted({str(key) for row in rows for key, value in row.items() if value is not None})
    if any(set(pair) <= set(keys) for pair in PAIR_KEYS):
        return "preference"
    fits = [name for name in FORMATS if name != "text" and set(FORMATS[name]) <= set(keys)]
    labels = [row["label"] for row in rows if row.get("label") is not None]
    if fits and ("kto_tag" in keys or (labels and all(isinstance(label, bool) for label in labels))):
        return "kto"
    if fits and labels and all(_is_flag(label) for label in labels):
        fits.append("kto")  # 0 and 1 may judge the answer, or be a class that has nothing to do with it.
    if not fits and "text" in keys:
        return "text"
    if len(fits) == 1:
        return fits[0]
    shown = ", ".join(key[:40] for key in keys[:20]) or "none"
    more = f" and {len(keys) - 20} more" if len(keys) > 20 else ""
    why = f"fit {' as well as '.join(fits)}" if fits else "fit no format"
    known = "; ".join(f"{name} ({', '.join(wanted)})" for name, wanted in FORMATS.items())
    hint = f"choose with --input-format NAME, or rename the keys; known formats (keys): {known}"
    raise _bad(f"the keys of its rows {why}: {shown}{more}", "", hint, "format")


def parse(row: object, input_format: str, source: str = "") -> Row:
    """One row in one of `INPUT_FORMATS` (not "auto") as what it stands for.

    Raises `DataError` that names `source` and the path of the field.

    >>> parse({"instruction": "Add.", "input": "1 2", "output": "3"}, "alpaca").messages[0].text
    'Add.\\n1 2'
    """
    try:
        if type(row) is not dict and not isinstance(row, Mapping):
            raise _bad(f"a row must be an object, not {kind_of(row)}", "", 'expected {"messages": [...]} or the like')
        _refuse_media(row, "")
        return _PARSERS[input_format](row, source)
    except DataError as error:
        kind = "field" if error.kind == "DataError" else error.kind
        raise _bad(error.what, f"{source} {error.where}".strip(), error.hint, kind) from None
    except RecursionError:
        raise _bad("nested too deeply", source, "flatten it", "field") from None


def _bad(what: str, where: str, hint: str, kind: str = "") -> DataError:
    return DataError(what, where=where, hint=hint, kind=kind)


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def _is_flag(value: object) -> bool:
    return isinstance(value, int | float) and value in (0, 1)


def _refuse_media(data: Mapping[str, Any], where: str) -> None:
    if MEDIA_KEYS.isdisjoint(data):
        return
    for key in sorted(MEDIA_KEYS.intersection(data)):
        if not _empty(data[key]):
            here = f"{where}.{key}" if where else key
            raise _bad(f"has {key}, which cannot be trained on yet", here, "drop the row or the key", "media")


def _string(row: Mapping[str, Any], key: str) -> str:
    if row.get(key) is None:
        raise _missing(row, key)
    return checked_text(row[key], key)


def _missing(row: Mapping[str, Any], key: str) -> DataError:
    keys = ", ".join(str(key)[:40] for key in list(row)[:20]) or "none"
    return _bad(f"the row has no {key}", key, f"its keys are {keys}; give it {key}, or choose another --input-format")


# Messages.


def _messages(row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    value = row[key]
    if isinstance(value, str):
        value = parse_json(value, key)
    if type(value) is not list and (isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence)):
        raise _bad(f"{key} must be a list, not {kind_of(value)}", key, 'expected [{"role": "user", "content": "..."}]')
    if not value:
        raise _bad(f"{key} is empty", key, "give it at least one message")
    return tuple([plain_message(item) or _message(item, f"{key}[{i}]") for i, item in enumerate(value)])


def _message(data: object, where: str) -> Message:
    if type(data) is not dict and not isinstance(data, Mapping):
        return Message.from_dict(data, where)
    _refuse_media(data, where)
    role = data.get("role")
    if role is None and "from" in data:
        speaker = data["from"]
        if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
            shown = repr(speaker[:40]) if isinstance(speaker, str) else kind_of(speaker)
            hint = f"use one of {', '.join(SHAREGPT_ROLES)}"
            raise _bad(f"from must be a known speaker, not {shown}", f"{where}.from", hint)
        text = checked_text(data.get("value"), f"{where}.value")
        data = {key: value for key, value in data.items() if key not in ("from", "value", "role", "content")}
        if speaker == "function_call":
            return _call_message(data, text, where, "value")
        return Message.from_dict({**data, "role": SHAREGPT_ROLES[speaker], "content": text}, where)
    if role == "function_call":
        return _call_message(data, checked_text(data.get("content"), f"{where}.content"), where, "content")
    if isinstance(role, str) and role in ROLE_ALIASES:
        data = {**data, "role": ROLE_ALIASES[role]}
    if isinstance(data.get("content"), list | tuple):
        data = _with_parts_as_fields(data, where)
    return Message.from_dict(data, where)


def _call_message(data: Mapping[str, Any], text: str, where: str, key: str) -> Message:
    """LLaMA-Factory's function_call: JSON of one call or a list of calls, after an optional <think>...</think>."""
    rest = split_think(text)[1]
    calls = parse_json(rest, f"{where}.{key}")
    if calls == [] or not _empty(data.get("tool_calls")):
        raise _bad("needs its calls in one place", f"{where}.{key}", 'expected {"name": "...", "arguments": {...}}')
    calls = calls if isinstance(calls, list) else [calls]
    content = text[: len(text) - len(rest)] or None
    return Message.from_dict({**data, "role": "assistant", "content": content, "tool_calls": calls}, where)


def _with_parts_as_fields(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Reasoning and calls that are typed parts (LLaMA-Factory v1, whose parts have a `value`) as fields."""
    parts = [part if isinstance(part, Mapping) else {} for part in data["content"]]
    if not any(part.get("type") in ("reasoning", "thinking", "tool_call") or "value" in part for part in parts):
        return data
    found: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for i, part in enumerate(parts):
        here, kind = f"{where}.content[{i}]", part.get("type", "text")
        if not isinstance(kind, str) or kind not in PART_ORDER:
            raise _bad("a content part is neither text, reasoning nor a tool_call", here, "drop the part", "media")
        if any(found[PART_ORDER[kind] + 1 :]):
            raise _bad(f"a {kind} part comes too late", here, "order parts reasoning, text, tool_call, or split them")
        value = next((part[key] for key in ("value", "text", kind) if part.get(key) is not None), None)
        raw_call = kind == "tool_call" and isinstance(value, Mapping)
        found[PART_ORDER[kind]].append(value if raw_call else checked_text(value, f"{here}.value"))
    reasoning, texts, calls = found
    fields: dict[str, Any] = {"content": "".join(texts) if texts else None}
    if reasoning:
        fields["reasoning_content"] = "".join(reasoning)
    if calls:
        fields["tool_calls"] = [parse_json(c, f"{where}.content") if isinstance(c, str) else c for c in calls]
    for key in (*(REASONING_KEYS if reasoning else ()), *(CALL_KEYS if calls else ())):
        if not _empty(data.get(key)):
            raise _bad(f"has {key}, and parts that mean the same", f"{where}.{key}", "keep one of them")
    return {**data, **fields}


# What rows of several formats have.


def _conversation(row: Mapping[str, Any], messages: tuple[Message, ...], source: str) -> Conversation:
    """The messages with the row's system text, tools and template arguments."""
    if row.keys() <= _USUAL and not messages[0].extra:
        return Conversation(messages, tools_of(row.get("tools")), {}, source)
    messages = _with_system(row, messages)
    first = messages[0]
    # minimind keeps the tools of a chat in its system message.
    own = {key: value for key, value in first.extra.items() if key in ("tools", "functions") and not _empty(value)}
    if own and first.role == "system":
        messages = (replace(first, extra={k: v for k, v in first.extra.items() if k not in own}), *messages[1:])
    else:
        own = {}
    given = [value for value in (row.get("tools"), row.get("functions"), *own.values()) if not _empty(value)]
    if len(given) > 1:
        raise _bad("the tools are given twice", "tools", "keep them in one place")
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        kwargs = parse_json(kwargs, "chat_template_kwargs") if kwargs.strip() else None
    chat = Conversation.from_messages(messages, given[0] if given else None, kwargs, source)
    if chat.tools and (own or _empty(row.get("tools")) or row.get("conversations") is not None):
        return replace(chat, tools=tuple(_openai_tool(tool) for tool in chat.tools))
    return chat


def _openai_tool(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    if "function" in tool or "name" not in tool:
        return tool
    return {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}


def _with_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if _empty(row.get("system")):
        return messages
    system = _string(row, "system")
    if messages[0].role not in ("system", "developer"):
        return (Message(role="system", content=system), *messages)
    if messages[0].text != system:
        raise _bad("system differs from the system message", "system", "keep one of them")
    return messages


def _untrained(messages: Sequence[Message]) -> tuple[Message, ...]:
    context = [m.role == "assistant" and m.train is None and m.weight is None for m in messages]
    return tuple(replace(m, train=False) if off else m for m, off in zip(messages, context, strict=True))


def _alpaca_prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = []
    history = [] if _empty(row.get("history")) else row["history"]
    for i, pair in enumerate(history if isinstance(history, list | tuple) else [history]):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _bad("must be a pair", f"history[{i}]", 'expected a list of ["question", "answer"] pairs')
        for j, role in enumerate(("user", "assistant")):
            messages.append(Message(role=role, content=checked_text(pair[j], f"history[{i}][{j}]")))
    parts = [_string(row, key) for key in ("instruction", "input") if not _empty(row.get(key))]
    if not parts:
        raise _bad("instruction and input are both empty", "instruction", "give it a question")
    return (*messages, Message(role="user", content="\n".join(parts)))


def _prompt(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """The prompt of a row whose answers stand apart: text, messages, or Alpaca's fields."""
    keys = [key for key in ("prompt", *LIST_KEYS, "instruction") if row.get(key) is not None]
    if not keys:
        raise _missing(row, "prompt")
    if len(keys) > 1:
        raise _bad(f"{keys[0]} and {keys[1]} both give a prompt", keys[1], "keep one of them")
    if keys == ["instruction"]:
        return _alpaca_prompt(row)
    if keys == ["prompt"] and isinstance(row["prompt"], str):
        return (Message(role="user", content=_string(row, "prompt")),)
    prompt = _messages(row, keys[0])
    if prompt[-1].role == "assistant":
        raise _bad("the prompt ends with an assistant message", keys[0], "end it with the message that is answered")
    return prompt


def _answer(row: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    value = row.get(key)
    if isinstance(value, Mapping):
        return (_message(value, key),)
    return _messages(row, key) if isinstance(value, list | tuple) else (Message("assistant", _string(row, key)),)


# The formats.


def _chat(row: Mapping[str, Any], source: str) -> Conversation:
    for key in LIST_KEYS:
        if row.get(key) is not None:
            return _conversation(row, _messages(row, key), source)
    raise _missing(row, "messages")


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    return _conversation(row, (*_alpaca_prompt(row), Message("assistant", _string(row, "output"))), source)


def _prompt_completion(row: Mapping[str, Any], source: str) -> Conversation:
    prompt = _prompt({"prompt": row.get("prompt")})
    return _conversation(row, (*_untrained(prompt), *_answer(row, "completion")), source)


def _preference(row: Mapping[str, Any], source: str) -> Preference:
    keys = PAIR_KEYS[row.get("chosen") is None and row.get("chosen_messages") is not None]
    chosen, rejected = (_answer(row, key) for key in keys)
    whole = [answer[0].role != "assistant" for answer in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise _bad(f"only one of {keys[0]} and {keys[1]} repeats the prompt", keys[1], "give both in the same form")
    if whole[0]:
        size = _shared_prompt(row, chosen, rejected, keys)
    else:
        prompt = _prompt(row)
        chosen, rejected, size = (*prompt, *chosen), (*prompt, *rejected), len(prompt)
    if _plain(chosen) == _plain(rejected):
        raise _bad(f"{keys[0]} and {keys[1]} are the same", keys[1], "drop the pair: it prefers nothing", "tie")
    pair = [_conversation(row, (*_untrained(m[:size]), *m[size:]), source) for m in (chosen, rejected)]
    size += len(pair[0].messages) - len(chosen)
    return Preference(prompt=pair[0].messages[:size], chosen=pair[0], rejected=pair[1], source=source)


def _plain(messages: Sequence[Message]) -> list[dict[str, Any]]:
    return [message.to_dict() for message in messages]


def _shared_prompt(
    row: Mapping[str, Any], chosen: tuple[Message, ...], rejected: tuple[Message, ...], keys: tuple[str, str]
) -> int:
    """How many messages two whole conversations share before they part with an answer each."""
    together = [a == b for a, b in zip(_plain(chosen), _plain(rejected), strict=False)]
    size = [*together, False].index(False)
    if size == len(chosen) == len(rejected):
        size -= 1  # a tie, which the caller names
    if size == len(together) or {chosen[size].role, rejected[size].role} != {"assistant"}:
        hint = "they must share a prompt and differ in the answer to it"
        raise _bad(f"{keys[0]} and {keys[1]} do not part at an assistant message", f"{keys[1]}[{size}]", hint)
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        held = prompt.strip() in [m.text.strip() for m in chosen[:size]]
    else:
        given = [m for key in ("prompt", *LIST_KEYS) if row.get(key) is not None for m in _messages(row, key)]
        held = _plain(given) == _plain(chosen[: len(given)])
    if not held:
        raise _bad(f"{keys[0]} does not begin with the row's prompt", keys[0], "drop the prompt, or mend it")
    return size


def _kto(row: Mapping[str, Any], source: str) -> Label:
    key = "label" if row.get("kto_tag") is None else "kto_tag"
    if not _is_flag(row.get(key)):
        hint = "true: a desirable answer, false: an undesirable one"
        raise _bad(f"{key} must be true or false, not {kind_of(row.get(key))}", key, hint)
    if row.get("completion") is not None:
        chat = _prompt_completion(row, source)
    else:
        chat = _alpaca(row, source) if row.get("instruction") is not None else _chat(row, source)
        chat = replace(chat, messages=(*_untrained(chat.messages[:-1]), chat.messages[-1]))
    if chat.messages[-1].role != "assistant":
        raise _bad("the conversation does not end with an answer", key, "a label judges the last message")
    return Label(conversation=chat, desirable=bool(row[key]), source=source)


def _text(row: Mapping[str, Any], source: str) -> Text:
    return Text(text=_string(row, "text"), source=source)


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], Row]] = {
    "messages": _chat,
    "sharegpt": _chat,
    "alpaca": _alpaca,
    "prompt-completion": _prompt_completion,
    "preference": _preference,
    "kto": _kto,
    "text": _text,
}
