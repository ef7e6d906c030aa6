"""Our rows beside those of TRL's tagged templates and of `renderers`: ``python -m benchmarks.peers``.

Both peers make one row per chat. For every turn: are its context ids those of inference, and its trained ids those
that the model must then emit? Ours are made from the original, unmodified template. Where a peer differs, the
difference has a name in `REASONS`; one without a name fails the test.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from tests import assets, conformance

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder, Encoding
from chatloss.load import load_tokenizer
from chatloss.policy import Policy

# The tokenizer that belongs to a template of TRL, where we have it; Qwen3's otherwise.
TRL_TOKENIZERS = {
    "qwen2_5": "qwen2.5", "qwen3_5_nothink": "qwen3.5", "qwen3_5_think": "qwen3.5", "qwen3_6": "qwen3.5",
    "llama3": "llama3", "gptoss": "gpt-oss", "deepseekv3": "deepseek-v3", "gemma": "gemma-like", "smolvlm": "smollm2",
}
RENDERERS = {
    "Qwen3RendererConfig": "qwen3", "Qwen35RendererConfig": "qwen3.5", "GptOssRendererConfig": "gpt-oss",
    "Llama3RendererConfig": "llama3", "DeepSeekV3RendererConfig": "deepseek-v3",
}
REASONS = (
    "a context that inference does not show",
    "prompt-supplied tokens trained",
    "emitted tokens before the answer untrained",
    "trained past the stop",
    "the stop untrained",
    "the same text in other ids: a token straddles an end",
    "an answer that inference does not emit",
    "trained although the original template makes it off_prompt",
    "trained although the original template makes it altered",
    "trained although the original template makes it unrenderable",
)
CHATS = {name: conformance.SHAPES[name] for name in ("plain", "system", "reasoning")}


@dataclass
class Beside:
    """One peer's row beside our rows for one chat: how many turns are equal, and why the others are not."""

    name: str
    tokenizer: str
    chat: str
    turns: int = 0
    equal: int = 0
    refused: str = ""
    reasons: Counter[str] = field(default_factory=Counter)


@cache
def tokenizer_of(name: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    logging.disable(logging.WARNING)
    directory = assets.tokenizer_dir(name)
    return load_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


def our_turns(encoding: Encoding) -> dict[int, tuple[list[int], list[int]]]:
    """(context ids, target ids) of every turn that is lawful under the original template."""
    found = {}
    for row in encoding.rows:
        for turn in sorted(set(row.turns.tolist()) - {-1}):
            places = np.flatnonzero(row.turns == turn)
            found[turn] = row.input_ids[: places[0]].tolist(), row.input_ids[places].tolist()
    return found


def runs(mask: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) of every stretch of ones."""
    padded = np.concatenate([[0], np.asarray(mask, dtype=np.int8), [0]])
    edges = np.flatnonzero(np.diff(padded))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def difference(ids: Sequence[int], run: tuple[int, int], context: Sequence[int], target: Sequence[int]) -> str:
    """The name of what sets a peer's trained run apart from our turn; "" if they are equal."""
    start, end = run
    n = len(context)
    if list(ids[: min(start, n)]) != list(context[: min(start, n)]):
        return "a context that inference does not show"
    if start < n:
        return "prompt-supplied tokens trained" if list(ids[start:n]) == list(context[start:]) else (
            "a context that inference does not show")
    if start > n:
        return "emitted tokens before the answer untrained"
    theirs = list(ids[start:end])
    if theirs == list(target):
        return ""
    if theirs[: len(target)] == list(target):
        return "trained past the stop"
    if list(target[: len(theirs)]) == theirs:
        return "the stop untrained"
    return "an answer that inference does not emit"


def beside(name: str, tokenizer: str, template: str, chat: str, row: tuple[list[int], list[int]] | str) -> Beside:
    """Compare a peer's (ids, mask), or its refusal, with our rows from `template`."""
    messages, tools = CHATS[chat]
    loaded, _ = tokenizer_of(tokenizer)
    encoder = ChatEncoder.load(loaded, template, Policy(), clock=lambda: conformance.CLOCK)
    encoding = encoder.examine(Conversation.from_messages(messages, tools))
    ours = our_turns(encoding)
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    result = Beside(name, tokenizer, chat, len(wanted))
    if isinstance(row, str):
        result.refused = row
        return result
    ids, mask = row
    found = runs(mask)
    if len(found) != len(wanted):
        result.reasons[f"{len(found)} trained stretches for {len(wanted)} turns"] += len(wanted)
        return result
    for turn, run in zip(wanted, found, strict=True):
        if turn not in ours:
            result.reasons[f"trained although the original template makes it {encoding.outcomes[turn]}"] += 1
            continue
        why = difference(ids, run, *ours[turn])
        if why == "an answer that inference does not emit":
            texts = encoder.decode(ids[run[0] : run[1]]), encoder.decode(ours[turn][1])
            if texts[0].startswith(texts[1]) or texts[1].startswith(texts[0]):
                why = "the same text in other ids: a token straddles an end"
        result.equal += not why
        if why:
            result.reasons[why] += 1
    return result


def trl() -> Iterator[Beside]:
    """transformers' mask over TRL's tagged template, our rows from the original."""
    for tagged in assets.trl_training_templates():
        name = TRL_TOKENIZERS.get(tagged.original, "qwen3")
        _, tokenizer = tokenizer_of(name)
        texts = assets.trl_templates()
        for chat, (messages, tools) in CHATS.items():
            row: tuple[list[int], list[int]] | str
            try:
                made = tokenizer.apply_chat_template(
                    messages, tools, chat_template=texts[tagged.name], tokenize=True, return_dict=True,
                    return_assistant_tokens_mask=True,
                )
                row = list(made["input_ids"]), list(made["assistant_masks"])
            except Exception as error:  # whatever a template raises is its refusal
                row = " ".join(str(error).split())[:80]
            yield beside(tagged.original, name, texts[tagged.original], chat, row)


def renderers() -> Iterator[Beside]:
    """The hand-written renderers for which we have the tokenizer, with their own training mask."""
    import renderers.configs
    from renderers.base import build_training_sample, create_renderer

    for config, name in RENDERERS.items():
        loaded, tokenizer = tokenizer_of(name)
        for chat, (messages, tools) in CHATS.items():
            row: tuple[list[int], list[int]] | str
            try:
                renderer = create_renderer(tokenizer, getattr(renderers.configs, config)())
                made = build_training_sample(renderer, list(messages), tools=tools)
                row = list(made.token_ids), [int(x) for x in made.loss_mask]
            except Exception as error:  # a peer's own refusal
                row = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
            yield beside(config.removesuffix("RendererConfig"), name, loaded.chat_template, chat, row)



def main() -> None:
    conformance.freeze_clock()
    for title, results in (("TRL 1.16 tagged templates", trl()), ("renderers 0.1.12", renderers())):
        print(f"\n### {title}\n\n| template | tokenizer | chat | turns equal | why the others differ |")
        print("| --- | --- | --- | --- | --- |")
        for r in results:
            why = (r.refused and f"refused: {r.refused}") or ", ".join(f"{n} {x}" for x, n in r.reasons.items()) or "-"
            print(f"| {r.name} | {r.tokenizer} | {r.chat} | {r.equal} of {r.turns} | {why.replace('|', '/')} |")


if __name__ == "__main__":
    main()
