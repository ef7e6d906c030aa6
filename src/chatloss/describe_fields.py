"""What a template does with the fields of messages, with roles and their order, and with the world around it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import TemplateError
from chatloss.findings import plural, quoted, witness
from chatloss.probes import (
    ANSWER,
    ANSWER2,
    ARGUMENT,
    ARGUMENT2,
    QUESTION,
    QUESTION2,
    RESULT,
    SYSTEM,
    THOUGHT,
    Probes,
    TemplateFinding,
    answer,
    call,
    place,
    refusal,
    result,
    user,
)
from chatloss.stops import MARKER, control_texts
from chatloss.switches import kwargs_read
from chatloss.template import TOOL, ChatTemplate

__all__ = [
    "content_findings", "date_findings", "environment_findings", "role_findings", "split_controls", "tool_findings",
]

INLINE = f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"


def content_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """The form of content, whitespace at its ends, reasoning in a field of its own and inline."""
    formats = probes.encoder.template.formats
    text = probes.text(user(), answer())
    if formats.content is None:
        words = "the text of an answer is lost, whether it is a string or typed parts"
        shown = witness(text, 0, len(text)) if text else None
        yield TemplateFinding("content", "content_format", None, words, "error", shown, "another --chat-template FILE")
    else:
        takes = {"string": "content is taken as a string; typed parts are joined by newlines",
                 "parts": "content is taken as typed parts; strings are wrapped into one, for their text would be lost"}
        yield TemplateFinding("content", "content_format", formats.content, takes[formats.content])
    if text is not None and ANSWER in text:
        yield from _whitespace(probes, text)
    yield from _reasoning(probes, text)


def _whitespace(probes: Probes, text: str) -> Iterator[TemplateFinding]:
    padded = probes.text(user(), answer(f"  {ANSWER}  \n"))
    forms = {"kept": f"  {ANSWER}  \n", "trailing": f"  {ANSWER}", "leading": f"{ANSWER}  \n", "both": ANSWER}
    value = next((name for name, form in forms.items() if padded == form.join(text.rsplit(ANSWER, 1))), "changed")
    words = {
        "kept": "whitespace at the ends of an answer is kept", "both": "an answer is stripped at both ends",
        "trailing": "an answer is stripped at its end", "leading": "an answer is stripped at its start",
        "changed": "whitespace at the ends of an answer is changed",
    }[value]
    if value != "kept":
        words += ": such data is trained as rendered, and counted"
    shown = place(padded, ANSWER) if padded is not None and value != "kept" else None
    yield TemplateFinding("content", "content_whitespace", value, words, witness=shown)


def _reasoning(probes: Probes, text: str | None) -> Iterator[TemplateFinding]:
    key = probes.encoder.template.formats.reasoning
    if key is None:
        words = "reasoning_content is ignored: an answer with reasoning in a field of its own is 'altered'"
        remedy = "move the reasoning into the content, --altered drop, or a template that renders it"
        yield TemplateFinding("content", "reasoning_content", None, words, remedy=remedy)
    else:
        shown = probes.text(user(), answer(reasoning_content=THOUGHT))
        mark = place(shown, THOUGHT, 40) if shown and THOUGHT in shown else None
        yield TemplateFinding("content", "reasoning_content", key, f"reasoning is read from {key}", witness=mark)
    inline = probes.text(user(), answer(INLINE))
    if inline is None:
        yield TemplateFinding("content", "inline_think", "refused", "an answer that holds <think>…</think> is refused")
    elif THOUGHT not in inline:
        words = "<think>…</think> inside an answer is dropped: such an answer is 'altered'"
        mark = place(inline, ANSWER)
        yield TemplateFinding("content", "inline_think", "dropped", words, "warning", mark, "--altered drop|keep")
    elif text is not None and inline == INLINE.join(text.rsplit(ANSWER, 1)):
        words = "<think>…</think> inside an answer is kept as it is written"
        yield TemplateFinding("content", "inline_think", "kept", words, witness=place(inline, THOUGHT))
    else:
        words = "<think>…</think> inside an answer is taken apart and written the template's own way"
        yield TemplateFinding("content", "inline_think", "rewritten", words, witness=place(inline, THOUGHT, 40))


# -- tools -------------------------------------------------------------------------------------------------------------


def tool_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """Tool definitions, calls and their arguments, calls beside content and beside other calls, results."""
    arguments = probes.encoder.template.formats.arguments
    rendering = probes.rendering(user(), answer(), tools=True)
    text = rendering.text(len(probes.opening) + 1, True) or rendering.text(len(probes.opening) + 2)
    if text is None:
        yield TemplateFinding("tools", "tools", "refused", f"tool definitions are refused: {refusal(rendering)}")
    elif "Looks a word up." in text or "lookup" in text:
        shown = place(text, "lookup")
        yield TemplateFinding("tools", "tools", "rendered", "tool definitions are rendered", witness=shown)
    else:
        severity = "info" if arguments is None else "warning"
        words = "tool definitions are ignored: the model never sees them"
        yield TemplateFinding("tools", "tools", "ignored", words, severity)
    yield _arguments(probes, arguments)
    if arguments is None:
        return
    yield from _calls(probes)
    answered = probes.text(user(), call(), result(), tools=True)
    if answered is None or RESULT not in answered:
        value = "refused" if answered is None else "dropped"
        yield TemplateFinding("tools", "tool_result", value, f"a tool result is {value}", "warning")
    else:
        shown = place(answered, RESULT, 40)
        yield TemplateFinding("tools", "tool_result", "rendered", "a tool result is rendered", witness=shown)


def _arguments(probes: Probes, arguments: str | None) -> TemplateFinding:
    if arguments is None:
        rendering = probes.rendering(user(), call(), tools=True)
        text = rendering.text(len(probes.opening) + 2)
        why = f"refused: {refusal(rendering)}" if text is None else "lost: a turn that calls a tool is 'altered'"
        shown = witness(text, len(text), len(text), 60) if text else None
        return TemplateFinding("tools", "tool_calls", None, f"tool calls are {why}", "info", shown, "--altered drop")
    text = probes.text(user(), call(), tools=True)
    shown = place(text, ARGUMENT, 40) if text else None
    words = {"object": "arguments are taken as an object; JSON strings are parsed, as engines do",
             "string": "arguments are taken as a JSON string; objects are written as one"}[arguments]
    if arguments == "object" and _double_encodes(probes):
        words += " (a string would be encoded twice)"
    return TemplateFinding("tools", "tool_calls", arguments, words, witness=shown)


def _double_encodes(probes: Probes) -> bool:
    raw = call()
    raw["tool_calls"][0]["function"]["arguments"] = f'{{"word": "{ARGUMENT}"}}'
    try:
        text = probes.encoder.template.render([*probes.opening, user(), raw], [TOOL])
    except TemplateError as error:
        if error.kind != "refused":
            raise
        return False
    return '\\"word\\"' in text


def _calls(probes: Probes) -> Iterator[TemplateFinding]:
    beside = probes.rendering(user(), call(content=ANSWER), tools=True)
    text = beside.text(len(probes.opening) + 2)
    if text is None:
        words = f"content together with a call is refused: {refusal(beside)}"
        yield TemplateFinding("tools", "content_with_calls", "refused", words, "warning", remedy="--unrenderable drop")
    else:
        held = [name for name, needle in (("content", ANSWER), ("call", ARGUMENT)) if needle in text]
        value = {2: "kept", 1: f"only {held[0]}" if held else "", 0: "dropped"}[len(held)]
        words = {"kept": "content together with a call is kept"}.get(value, f"of content and a call together: {value}")
        severity = "info" if value == "kept" else "warning"
        remedy = "" if value == "kept" else "--altered drop, or move the content into a message of its own"
        yield TemplateFinding("tools", "content_with_calls", value, words, severity, place(text, ARGUMENT, 40), remedy)
    two = probes.rendering(user(), call(ARGUMENT, ARGUMENT2), tools=True)
    text = two.text(len(probes.opening) + 2)
    if text is None:
        words = f"two calls in one answer are refused: {refusal(two)}"
        yield TemplateFinding("tools", "parallel_calls", "refused", words, "warning", remedy="--unrenderable drop")
    else:
        value = "kept" if ARGUMENT in text and ARGUMENT2 in text else "only one"
        words = "two calls in one answer are both kept" if value == "kept" else "of two calls in one answer one is lost"
        severity = "info" if value == "kept" else "warning"
        needle = ARGUMENT2 if ARGUMENT2 in text else ARGUMENT
        yield TemplateFinding("tools", "parallel_calls", value, words, severity, place(text, needle, 40))


# -- roles -------------------------------------------------------------------------------------------------------------


def role_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """System and developer messages, and which orders of roles are refused."""
    system = probes.render([user(), answer()])
    for role in ("system", "developer"):
        yield _opening_role(probes, role, system)
    if probes.opening:
        yield TemplateFinding("roles", "needs_system", True, "a chat without a system message is refused", "warning")
    orders: tuple[tuple[str, str, list[dict[str, Any]]], ...] = (
        ("empty_history", "an answer with nothing before it", [answer()]),
        ("assistant_first", "a chat that begins with an answer", [answer(), user(), answer(ANSWER2)]),
        ("two_users", "two user messages in a row", [user(), user(QUESTION2), answer()]),
        ("two_answers", "two answers in a row", [user(), answer(), answer(ANSWER2)]),
        ("unknown_role", "a role that nobody knows", [user(), {"role": "critic", "content": SYSTEM}, answer()]),
    )
    for name, what, chat in orders:
        yield _order(probes, name, what, chat)


def _opening_role(probes: Probes, role: str, without: str | None) -> TemplateFinding:
    opening = {"role": role, "content": SYSTEM}
    rendering = probes.encoder.rendering(Conversation.from_messages([opening, user(), answer()]))
    prompt, text = rendering.text(2, True), rendering.text(3)
    name = f"{role}_role"
    if prompt is None:
        words = f"a {role} message is refused: {refusal(rendering)}"
        return TemplateFinding("roles", name, "refused", words, remedy="put its text into the user's message")
    at, asked = prompt.find(SYSTEM), prompt.find(QUESTION)
    if at < 0:
        words = f"a {role} message is dropped: the model never sees it"
        severity = "warning" if role == "system" else "info"
        return TemplateFinding("roles", name, "dropped", words, severity, place(prompt, QUESTION))
    between = prompt[at + len(SYSTEM) : asked] if asked > at else ""
    inside = asked > at and not control_texts(between, probes.encoder.loaded.tokens.special)
    after = "rendered" if asked > at else "rendered after the user's"
    where = "rendered inside the user's message" if inside else after
    words = f"a {role} message is {where}"
    if text is not None and SYSTEM not in text:
        words += ", and only while a user message comes last"
    if role == "system" and without is not None and "system" in without.lower():
        words += "; without one the template writes its own"
    return TemplateFinding("roles", name, where, words, witness=place(prompt, SYSTEM))


def _order(probes: Probes, name: str, what: str, chat: list[dict[str, Any]]) -> TemplateFinding:
    rendering = probes.rendering(*chat)
    start = len(probes.opening)
    wanted = [m["content"] for m in chat if m["role"] == "assistant"]
    answers = [start + i for i, m in enumerate(chat) if m["role"] == "assistant"]
    refused = next((i for i in answers if rendering.prompt(i) is None or rendering.text(i + 1) is None), None)
    if refused is not None:
        words = f"{what}: refused ({refusal(rendering)})"
        return TemplateFinding("roles", name, "refused", words)
    text = rendering.text(start + len(chat)) or ""
    shown = [needle for needle in (m["content"] for m in chat) if needle not in text]
    if any(needle in wanted for needle in shown):
        return TemplateFinding("roles", name, "dropped", f"{what}: part of it is dropped", "warning")
    if shown:
        return TemplateFinding("roles", name, "ignored", f"{what}: {quoted(shown[0])} is left out", witness=None)
    return TemplateFinding("roles", name, "rendered", f"{what}: rendered")


# -- the world around --------------------------------------------------------------------------------------------------


def environment_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """BOS, dates, ``{% generation %}`` tags, named templates, arguments, control texts that are no single tokens."""
    encoder, source = probes.encoder, probes.encoder.template.source
    text = probes.text(user(), answer())
    yield from _bos(encoder, text)
    yield from date_findings(probes)
    texts = [source] if isinstance(source, str) else list(source.values())
    if any("{% generation" in t or "{%- generation" in t for t in texts):
        words = "the template has {% generation %} tags; masks are made without them, and agree with inference"
        yield TemplateFinding("around", "generation_tags", True, words)
    if not isinstance(source, str):
        names = sorted(source)
        words = f"there are {plural(len(names), 'template')}: {', '.join(names)}; chats with tools take tool_use"
        yield TemplateFinding("around", "named_templates", names, words)
    names = kwargs_read(source)
    if names:
        words = f"the template also reads {', '.join(names)}"
        remedy = "--template-kwargs JSON sets them"
        yield TemplateFinding("around", "template_kwargs", names, words, remedy=remedy)
    yield from _controls(encoder)


def _bos(encoder: ChatEncoder, text: str | None) -> Iterator[TemplateFinding]:
    bos = encoder.loaded.special_tokens.get("bos_token", "")
    if not bos or text is None:
        return
    if text.startswith(bos + bos):
        words = f"the template begins with {quoted(bos)} twice"
        yield TemplateFinding("around", "bos", "twice", words, "warning", witness(text, 0, 2 * len(bos)))
    elif text.startswith(bos):
        words = (f"the template writes {quoted(bos)} itself, and chatloss adds none; a tool that tokenizes this text "
                 "with add_special_tokens=True would write it twice")
        yield TemplateFinding("around", "bos", "written", words, witness=witness(text, 0, len(bos)))
    else:
        words = f"the template does not begin with {quoted(bos)}; engines add none to chats, and neither does chatloss"
        yield TemplateFinding("around", "bos", "none", words)


def date_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """Whether the same chat is rendered the same now, and on another day."""
    text = probes.text(user(), answer())
    if text is None:
        return
    if probes.text(user(), answer()) != text:
        words = "the same chat is rendered differently each time: no row can be lawful"
        yield TemplateFinding("around", "deterministic", False, words, "error", remedy="another --chat-template FILE")
        return
    template = probes.encoder.template
    now = template.clock()
    # Frozen, so that seconds passing between the two renders are not what differs.
    early, late = (
        ChatTemplate(template.source, template.special_tokens, lambda t=time: t, template.bounds)  # type: ignore[misc]
        for time in (now, now + timedelta(days=400, hours=5, minutes=7, seconds=11))
    )
    chat = [*probes.opening, user(), answer()]
    before, after = (_rendered(probes, t, chat) for t in (early, late))
    if before is None or after is None or before == after:
        return
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    names = [name for name in kwargs_read(template.source) if "date" in name or name in ("today", "now")]
    remedy = "--chat-template FILE with a date of its own fixes it"
    if names:
        remedy = f"--template-kwargs '{{\"{names[0]}\": \"...\"}}' fixes it"
    words = "every prompt holds today's date: rows made on another day differ, and so will prompts at inference"
    yield TemplateFinding("around", "date", True, words, "warning", witness(before, at, at + 10), remedy)


def _rendered(probes: Probes, template: ChatTemplate, chat: list[Mapping[str, Any]]) -> str | None:
    rendering = replace(probes.encoder, template=template).rendering(Conversation.from_messages(chat))
    return rendering.text(len(chat))


def split_controls(encoder: ChatEncoder) -> dict[str, int]:
    """Control texts that the template writes and the tokenizer cuts into several tokens -> how many."""
    if not encoder.loaded.special_tokens and not encoder.loaded.tokens.special:
        return {}  # a bare function from text to ids does not say what its tokens are
    shown = encoder.template.probe({"role": "assistant", "content": ANSWER}) or ""
    spans = control_texts(shown, encoder.loaded.tokens.special)
    texts = dict.fromkeys([*(shown[a:b] for a, b in spans), encoder.stops.answer.text, encoder.stops.call.text])
    counts = {text: len(encoder.loaded.tokens.ids_of(text)) for text in texts if text and MARKER.fullmatch(text)}
    return {text: count for text, count in counts.items() if count != 1}


def _controls(encoder: ChatEncoder) -> Iterator[TemplateFinding]:
    split = split_controls(encoder)
    if not split:
        words = "every control text of the template is one token of this tokenizer"
        yield TemplateFinding("around", "control_tokens", {}, words)
        return
    listed = ", ".join(f"{quoted(text)} ({count} tokens)" for text, count in list(split.items())[:4])
    foreign = any(text.startswith("<") for text in split)
    words = f"this tokenizer has no single token for {listed}"
    words += ": template and tokenizer do not belong together" if foreign else "; it is written as plain text"
    remedy = "give the tokenizer of the model that the template is from" if foreign else ""
    yield TemplateFinding("around", "control_tokens", split, words, "warning" if foreign else "info", remedy=remedy)
