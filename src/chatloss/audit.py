"""What can be wrong with a conversation as data, whatever the template: roles, tools, answers not worth training."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from chatloss.chat import ROLES, Conversation, Message, split_think
from chatloss.errors import DataError
from chatloss.values import parse_json

__all__ = ["Hit", "audit"]


@dataclass(frozen=True, slots=True)
class Hit:
    """One occurrence of a cause: the index of its message (-1: the whole conversation) and what was seen there."""

    cause: str
    message: int
    detail: str = ""


_LABEL = re.compile(r"(?:assistant|chatgpt|gpt|bot|ai|model|user|human|system) ?:", re.IGNORECASE)
_FOREIGN = re.compile(
    r"<\|(?:im_start|im_end|endoftext|eot_id|eom_id|start_header_id|end_header_id|begin_of_text|end_of_text|user|system|"
    r"assistant|end|start|return|channel|message|END_OF_TURN_TOKEN)\|>|</s>\s*\Z|\A\s*<s>|\[/?INST\]|<</?SYS>>|"
    r"<(?:start|end)_of_turn>|<｜[^｜<>]{2,40}｜>|<(?:bos|eos|pad|unk)>"
)
_MOJIBAKE = re.compile("Ã[\u0080-\u00bf\u0152-\u0192\u2018-\u2122]|â€|Â[\u00a0-\u00bf]|ï»¿|\ufffd")
_SENTENCE = re.compile(r"[.!?]\s|[。！？]")
_SIGNED = re.compile(r"\b(?:regards|sincerely|cheers|yours|wishes)\b", re.IGNORECASE)
_ITEM = re.compile(r"\s*(?:[-*+•|#>~=]|\d+[.)]|[A-Za-z][.)]\s)")


def audit(conversation: Conversation, turns: set[int], control: Callable[[str], bool]) -> Iterator[Hit]:
    """Every hit in a conversation. `turns`: the indices that are to be trained; `control(text)`: the encoder's own.

    >>> chat = Conversation.from_messages([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " "}])
    >>> list(audit(chat, {1}, lambda text: False))
    [Hit(cause='empty_answer', message=1, detail='')]
    """
    yield from _order(conversation)
    yield from _tools(conversation)
    for i, message in enumerate(conversation.messages):
        for text in (message.text, message.reasoning or ""):
            foreign = _FOREIGN.search(text) if "<" in text or "[" in text else None
            if foreign and not control(foreign[0].strip()):
                yield Hit("foreign_control", i, foreign[0].strip())
                break
        broken = _MOJIBAKE.search(message.text)
        if broken:
            yield Hit("mojibake", i, message.text[max(0, broken.start() - 12) : broken.end() + 12])
        if i in turns:
            yield from _answer(i, message)


def _order(conversation: Conversation) -> Iterator[Hit]:
    messages = conversation.messages
    roles = [message.role for message in messages]
    spoken = [i for i, role in enumerate(roles) if role not in ("system", "developer")]
    if spoken and roles[spoken[0]] == "assistant":
        yield Hit("assistant_first", spoken[0])
    for i, role in enumerate(roles):
        before = roles[i - 1] if i else ""
        if role not in ROLES:
            yield Hit("unknown_role", i, role)
        elif role in ("system", "developer") and i and any(r not in ("system", "developer") for r in roles[:i]):
            yield Hit("system_inside", i)
        elif role == before == "user":
            yield Hit("users_in_a_row", i)
        elif role == before == "assistant" and not messages[i - 1].tool_calls:
            yield Hit("answers_in_a_row", i)
    if "assistant" in roles and roles[-1] != "assistant":
        yield Hit("ends_without_answer", len(roles) - 1, roles[-1])


def _tools(conversation: Conversation) -> Iterator[Hit]:
    messages = conversation.messages
    offered = {str(_name_of(tool)) for tool in conversation.tools or ()}
    open_ids: set[str] = set()
    waiting = 0
    for i, message in enumerate(messages):
        if message.role == "tool":
            if not waiting or (message.tool_call_id and open_ids and message.tool_call_id not in open_ids):
                yield Hit("result_without_call", i, message.tool_call_id or "")
            continue
        if message.tool_calls and i + 1 < len(messages) and messages[i + 1].role != "tool":
            yield Hit("call_without_result", i, message.tool_calls[0].name)
        waiting = len(message.tool_calls)
        open_ids = {call.id for call in message.tool_calls if call.id}
        for call in message.tool_calls:
            if conversation.tools is not None and call.name not in offered:
                yield Hit("unknown_tool", i, call.name)
            if not isinstance(call.arguments, Mapping) and not _is_object(call.arguments):
                yield Hit("broken_arguments", i, str(call.arguments)[:60])


def _name_of(tool: Mapping[str, Any]) -> Any:
    function = tool.get("function")
    return function.get("name") if isinstance(function, Mapping) else tool.get("name")


def _is_object(arguments: Any) -> bool:
    try:
        return isinstance(arguments, str) and (not arguments.strip() or isinstance(parse_json(arguments), dict))
    except DataError:
        return False


def _answer(index: int, message: Message) -> Iterator[Hit]:
    text = message.text
    inline, content = split_think(text)
    if not text.strip() and not (message.reasoning or "").strip() and not message.tool_calls:
        yield Hit("empty_answer", index)
    elif inline is not None:
        yield Hit("reasoning_twice" if (message.reasoning or "").strip() else "inline_think", index)
        if not content.strip() and not message.tool_calls:
            yield Hit("empty_answer", index, "nothing behind </think>")
    elif text.lstrip().startswith("<think>"):
        yield Hit("unclosed_think", index)
    label = _LABEL.match(content.lstrip())
    if label:
        yield Hit("role_label", index, label[0])
    if message.extra.get("finish_reason") == "length":
        yield Hit("cut", index)
    elif not message.tool_calls and (how := _seems_cut(content)):
        yield Hit("maybe_cut", index, how)
    if _circles(text):
        yield Hit("repeats", index, f"…{text[-40:]}")


def _seems_cut(text: str) -> str:
    """How the end of `text` looks cut off, or nothing: a code block left open, or a last sentence without its end.

    >>> _seems_cut("He lives in the old mill by the harbour. He is grey, and he sleeps on the")
    '…he sleeps on the'
    >>> _seems_cut("He lives in the old mill by the harbour. He is grey, and he sleeps there.")
    ''
    """
    text = text.rstrip()
    if text.count("```") % 2:
        return "a code block is left open"
    wide = bool(text) and ord(text[-1]) > 0x2E7F
    if len(text) < (16 if wide else 40) or "```" in text[-4:]:
        return ""
    last = text.rsplit("\n", 1)[-1]
    if not (text[-1].isalnum() or text[-1] in ",，、([{（") or not _SENTENCE.search(text[:-1]) or _ITEM.match(last):
        return ""
    # A last line of one sentence without a full stop is a signature, a title, a link; this one began another before.
    ended = list(_SENTENCE.finditer(last))
    rest = last[ended[-1].end() :] if ended else ""
    if len(rest.split()) < (1 if wide else 3) or len(rest) < (5 if wide else 8):
        return ""
    if "://" in rest or _SIGNED.search(rest):
        return ""
    words = text[-16:] if wide else " ".join(text.split()[-4:])
    return f"…{words}"


def _circles(text: str) -> bool:
    """Whether a passage comes five times or more in a row, at least 200 characters of it."""
    if len(text) < 200:
        return False
    tail = text[-1200:]
    if len(zlib.compress(tail.encode("utf-8", "replace"), 1)) > 0.3 * len(tail.encode("utf-8", "replace")):
        return False
    found = re.search(r"(\S.{7,159}?)\1{4,}", tail, re.DOTALL)
    return bool(found) and len(set(found[1])) > 3 if found else False
