"""What a template does around an answer: the prompt before it, the stop behind it, and what becomes of it later."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.findings import Witness, plural, quoted, witness
from chatloss.probes import (
    ANSWER,
    ANSWER2,
    ANSWER3,
    ARGUMENT2,
    QUESTION,
    QUESTION2,
    QUESTION3,
    REFUSES,
    SYSTEM,
    THINKING,
    THOUGHT,
    THOUGHT2,
    Chat,
    Probes,
    TemplateFinding,
    answer,
    call,
    place,
    refusal,
    result,
    thinking_tags,
    user,
)
from chatloss.reference import Turn
from chatloss.sample import Reason
from chatloss.switches import as_flag, candidates, remedy_for, repair

__all__ = ["history_findings", "prompt_findings", "stop_finding", "stop_findings"]


def prompt_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """The generation prompt, what of the header it leaves to the model, and reasoning that it opens."""
    rendering = probes.rendering(user(), answer())
    at = len(probes.opening) + 1
    plain, prompt = rendering.text(at), rendering.text(at, True)
    if prompt is None:
        words = f"a prompt cannot be rendered: {refusal(rendering)}"
        yield TemplateFinding("prompt", "generation_prompt", None, words, "error")
        return
    shared = os.path.commonprefix([plain or "", prompt])  # noqa: RUF071 (texts, not paths)
    if QUESTION not in shared:
        words = "add_generation_prompt changes text that stands before the generation prompt"
        yield TemplateFinding("prompt", "generation_prompt", None, words, "warning", witness(prompt, 0, len(prompt)))
        return
    added, instead = prompt[len(shared) :], (plain or "")[len(shared) :]
    shown = witness(prompt, len(shared), len(prompt), 40)
    words = f"every prompt ends with {quoted(added)}" if added else "there is none: a prompt ends with the last message"
    words += f", in place of the {quoted(instead)} that ends a text without it" if instead else ""
    yield TemplateFinding("prompt", "generation_prompt", added, words, witness=shown)
    turn = rendering.turn(at)
    if turn.outcome == "reachable":
        yield _emitted_header(probes, turn, added)
    yield _prompt_reasoning(probes, added, turn, prompt)


def _emitted_header(probes: Probes, turn: Turn, added: str) -> TemplateFinding:
    left = turn.target[: next((a for a, _, why in turn.spans if why != Reason.HEADER), 0)]
    if not left:
        words = "supplied by the prompt: the answer itself is the first thing that the model emits"
        return TemplateFinding("prompt", "emitted_header", "", words)
    what = "the rest of it" if added else "all of it"
    words = f"the model emits {what}: {quoted(left)} is trained, with the reason 'header'"
    shown = witness(turn.prompt + turn.target, len(turn.prompt), len(turn.prompt) + len(left))
    remedy = ""
    for kwargs in candidates(probes.encoder):
        prompt = probes.with_kwargs(kwargs).rendering(user()).text(turn.index, True)
        if prompt == turn.prompt + left:
            remedy = f"{as_flag(kwargs)} has the prompt supply it"
            break
    return TemplateFinding("prompt", "emitted_header", left, words, witness=shown, remedy=remedy)


def _prompt_reasoning(probes: Probes, added: str, turn: Turn, prompt: str) -> TemplateFinding:
    opened, closed = thinking_tags(added)
    shown = witness(prompt, len(prompt) - len(added), len(prompt)) if opened or closed else None
    if opened > closed:
        value, words = "open", "the prompt opens reasoning, and the model goes on from there"
    elif opened:
        value, words = "closed", "the prompt writes a whole reasoning block, and the model answers at once"
    else:
        return TemplateFinding("prompt", "prompt_reasoning", "none", "the prompt opens no reasoning")
    if turn.outcome != "off_prompt":
        return TemplateFinding("prompt", "prompt_reasoning", value, words, witness=shown)
    words += "; an answer without reasoning is rendered differently, so no prompt leads to it"
    remedy = _switch(probes, turn.index, added)
    return TemplateFinding("prompt", "prompt_reasoning", value, words, "warning", shown, remedy)


def _switch(probes: Probes, index: int, added: str) -> str:
    found = repair(probes.encoder, probes.chat(user(), answer()), [index])
    if found:
        return as_flag(found)
    tag = next((match[0] for match in THINKING.finditer(added) if not match["close"]), "")
    form = f"{{reasoning_content}}{tag[0]}/{tag[1:]}{{content}}" if tag else "{content}"
    return f"--off-prompt splice --splice-format '{form}'"


# -- stops -------------------------------------------------------------------------------------------------------------


def stop_finding(encoder: ChatEncoder, *, of_call: bool = False) -> TemplateFinding:
    """The stop of an answer or of a call: its ids, and whether engines stop at it."""
    known = encoder.stops.call if of_call else encoder.stops.answer
    name, what = ("stop_of_call", "a call") if of_call else ("stop_of_answer", "an answer")
    text, tokens = known.text, encoder.loaded.tokens
    value: dict[str, object] = {"text": text, "ids": [], "generation_config": False, "eos": False}
    if not text:
        words = f"nothing ends {what}: the template writes no stop, and neither generation config nor tokenizer has one"
        remedy = "a tokenizer_config.json with eos_token, or another template"
        return TemplateFinding("stop", name, value, words, "error", remedy=remedy)
    if not encoder.engine_stops and not tokens.special:
        return TemplateFinding("stop", name, value, f"{what} ends with {quoted(text)}; this tokenizer names no stops")
    ids = tokens.ids_of(text)
    eos = encoder.loaded.special_tokens.get("eos_token", "")
    eos_id = tokens.ids_of(eos)[-1:] if eos else []
    # Engines stop at single ids: of a stop of several tokens the last one counts.
    in_config, is_eos = ids[-1:] != [] and ids[-1] in encoder.loaded.stop_ids, ids[-1:] == eos_id != []
    value |= {"ids": ids, "generation_config": in_config, "eos": is_eos}
    listed = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
    words = f"{what} ends with {quoted(text)}, {'id' if len(ids) == 1 else f'{len(ids)} tokens:'} {listed}"
    told = [name for name, holds in (("the generation config", in_config), ("the tokenizer's EOS", is_eos)) if holds]
    if told:
        return TemplateFinding("stop", name, value, f"{words}: {' and '.join(told)}")
    if len(ids) > 1:
        words += "; engines stop at single tokens, so this one has to be given to them as a stop string"
        return TemplateFinding("stop", name, value, words, "warning", remedy="a tokenizer that has it as one token")
    others = ", ".join(map(quoted, encoder.engine_stops)) or "nothing"
    words += f"; engines stop at {others} and would run on"
    remedy = f"add {ids[-1]} to eos_token_id in generation_config.json (checkpoints that chatloss exports have it)"
    return TemplateFinding("stop", name, value, words, "warning", remedy=remedy)


def stop_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """The stops, what stands behind them, and whether past answers end as the last one does."""
    yield stop_finding(probes.encoder)
    if probes.encoder.template.formats.arguments is not None:
        yield stop_finding(probes.encoder, of_call=True)
    at = len(probes.opening) + 1
    rendering = probes.rendering(user(), answer(), user(QUESTION2))
    turn, own, later = rendering.turn(at), rendering.text(at + 1), rendering.text(at + 2)
    if turn.outcome != "reachable" or own is None:
        return
    stop = next((turn.target[a:b] for a, b, why in turn.spans if why == Reason.STOP), "")
    if turn.stop != "rendered":
        yield _unwritten_stop(turn, own, stop)
    else:
        whole = turn.prompt + turn.target
        tail, shown = own[len(whole) :], witness(own, len(whole), len(own))
        words = f"{quoted(tail)} stands behind the stop; it is never trained" if tail else "nothing stands behind it"
        yield TemplateFinding("stop", "after_stop", tail, words, witness=shown if tail else None)
    if later is None or ANSWER not in later or not stop:
        return
    behind = later.rsplit(ANSWER, 1)[1]
    emitted = turn.target.rsplit(ANSWER, 1)[-1]
    if behind.startswith(emitted):
        yield TemplateFinding("stop", "past_stop", "same", "an earlier answer ends with the same stop")
        return
    start = len(later) - len(behind)
    words = f"an earlier answer does not end with {quoted(emitted)}, which the model must emit: each turn needs its row"
    shown = witness(later, start, start + min(len(emitted), len(behind)))
    yield TemplateFinding("stop", "past_stop", "differs", words, "info", shown)


def _unwritten_stop(turn: Turn, own: str, stop: str) -> TemplateFinding:
    shown = witness(own, len(own), len(own), 40)
    if turn.stop == "appended":
        words = f"the template writes none behind the last answer; chatloss appends {quoted(stop)}"
        return TemplateFinding("stop", "last_stop", "appended", words, "info", shown, "--missing-stop leave|error")
    words = "the template writes none behind the last answer: a model trained so never learns to stop"
    return TemplateFinding("stop", "last_stop", "missing", words, "warning", shown, "--missing-stop append")


# -- history -----------------------------------------------------------------------------------------------------------


def history_findings(probes: Probes) -> Iterator[TemplateFinding]:
    """How many rows each kind of chat takes and why, and what becomes of reasoning and system text as it goes on."""
    plain: Chat = (user(), answer(), user(QUESTION2), answer(ANSWER2), user(QUESTION3), answer(ANSWER3))
    yield _rows(probes, "rows_plain", plain, tools=False, serious="error")
    system = {"role": "system", "content": SYSTEM}
    if not probes.opening and probes.render([system, user()]) is not None:
        yield _rows(probes, "rows_system", (system, user(), answer(), user(QUESTION2), answer(ANSWER2)), tools=False)
    if probes.encoder.template.formats.arguments is not None:
        chat: Chat = (user(), call(), result(), answer(), user(QUESTION2), call(ARGUMENT2), result(), answer(ANSWER2))
        yield _rows(probes, "rows_tools", chat, tools=True)
    if probes.encoder.template.formats.reasoning is not None:
        chat = (user(), answer(reasoning_content=THOUGHT), user(QUESTION2), answer(ANSWER2, reasoning_content=THOUGHT2))
        yield _rows(probes, "rows_reasoning", chat, tools=False)
        yield from _past_reasoning(probes)
    yield from _system_in_history(probes)


def _rows(probes: Probes, name: str, chat: Chat, tools: bool, serious: str = "warning") -> TemplateFinding:
    encoder, conversation = probes.encoder, probes.chat(*chat, tools=tools)
    encoding = encoder.examine(conversation)
    counts = Counter(encoding.outcomes.values())
    value = {"turns": len(encoding.outcomes), "rows": len(encoding.rows), "outcomes": dict(counts)}
    turns = plural(len(encoding.outcomes), "turn")
    lost = [turn for turn in encoding.turns if turn.outcome != "reachable"]
    if lost:
        first = lost[0]
        detail = first.detail.removeprefix(REFUSES)
        words = f"{len(lost)} of {turns} cannot be trained as the template stands ({first.outcome}: {detail})"
        found = remedy_for(encoder, conversation, [turn.index for turn in lost])
        flags = {"off_prompt": "drop|keep|splice", "altered": "drop|keep", "unrenderable": "drop"}
        remedy = found or f"--{first.outcome.replace('_', '-')} {flags[first.outcome]}"
        return TemplateFinding("history", name, value, words, serious, _lost_place(probes, conversation, first), remedy)
    if len(encoding.rows) == 1:
        return TemplateFinding("history", name, value, f"{turns} in one row")
    words = f"{turns} need {plural(len(encoding.rows), 'row')}"
    texts = [turn.prompt + turn.target for turn in encoding.turns]
    for early, late in pairwise(texts):
        if not late.startswith(early):
            at = _parting(early, late)
            words += f": as the chat goes on, {quoted(early[at : at + 24])} becomes {quoted(late[at : at + 24])}"
            return TemplateFinding("history", name, value, words, witness=witness(late, at, min(len(late), at + 24)))
    words += ": the text stays the same, but a token straddles the start or the end of an answer"
    return TemplateFinding("history", name, value, words)


def _lost_place(probes: Probes, conversation: Conversation, turn: Turn) -> Witness | None:
    """Where the prompt of a lost turn parts from its rendering, or the rendering that lacks something of it."""
    rendering = probes.encoder.rendering(conversation)
    prompt, own = rendering.prompt(turn.index), rendering.text(turn.index + 1)
    if prompt is None or own is None:
        return None
    if turn.outcome == "off_prompt":
        at = _parting(prompt, own)
        return witness(prompt, at, at + 24)
    return witness(own, min(len(prompt), len(own)), len(own))


def _parting(a: str, b: str) -> int:
    """Where two texts part, at the start of the tag or word in which they do."""
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    word = re.search(r"[<\[][^<>\[\]\s]*\Z|\w*\Z", a[:at])
    return word.start() if word else at


def _past_reasoning(probes: Probes) -> Iterator[TemplateFinding]:
    later = probes.text(user(), answer(reasoning_content=THOUGHT), user(QUESTION2))
    if later is not None:
        kept = THOUGHT in later
        words = "is kept" if kept else "is dropped as soon as the user speaks again"
        yield TemplateFinding(
            "history", "past_reasoning", "kept" if kept else "dropped", f"reasoning of an earlier turn {words}",
            witness=place(later, THOUGHT if kept else ANSWER),
        )
    if probes.encoder.template.formats.arguments is None:
        return
    chat = (user(), call(reasoning_content=THOUGHT), result(), answer(reasoning_content=THOUGHT2))
    later = probes.text(*chat, tools=True)
    if later is not None:
        kept = THOUGHT in later
        words = "kept" if kept else "dropped"
        yield TemplateFinding(
            "history", "reasoning_before_result", words, f"reasoning before a tool result is {words} after it",
            witness=place(later, THOUGHT if kept else "lookup"),
        )


def _system_in_history(probes: Probes) -> Iterator[TemplateFinding]:
    system = {"role": "system", "content": SYSTEM}
    chat = (system, user(), answer(), user(QUESTION2))
    first, text = probes.prompt(*chat[:2]), probes.prompt(*chat)
    if text is None or first is None or SYSTEM not in first:
        return
    at = text.find(SYSTEM)
    if at < 0:
        words = "the system text is dropped from longer chats"
        yield TemplateFinding("history", "system_place", "dropped", words, "warning", place(text, QUESTION))
    elif at > text.find(ANSWER) >= 0:
        words = "the system text moves along to the last user message, so every answer has a history of its own"
        yield TemplateFinding("history", "system_place", "moves", words, witness=place(text, SYSTEM))
    else:
        yield TemplateFinding("history", "system_place", "stays", "the system text stays where it is")
