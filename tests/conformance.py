"""Every template of the corpus through the encoder and the oracle: ``python -m tests.conformance`` writes the table.

For each template and conversation shape: is our text that of transformers, is every row lawful, is every turn accounted
for, and which outcomes do the turns have.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests import assets

CLOCK = datetime(2026, 1, 2, 3, 4, 5)
LOOKUP = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "Looks a word up.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
    },
}


def _call(word: str, call_id: str) -> dict[str, Any]:
    function = {"name": "lookup", "arguments": {"word": word, "limit": 3}}
    call = {"id": call_id, "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


PLAIN = [
    _user("What is the capital of France?"), _answer("The capital of France is Paris."),
    _user("And of Peru?"), _answer("That is Lima, on the coast."),
    _user("Thanks! 你好🙂"), _answer("You are welcome — naïve façade, 再见!"),
]
SHAPES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "plain": (PLAIN, None),
    "system": ([{"role": "system", "content": "Be brief and kind."}, *PLAIN[:4]], None),
    "tools": (
        [_user("Define lumen."), _call("lumen", "call00001"),
         {"role": "tool", "tool_call_id": "call00001", "name": "lookup", "content": "A unit of light."},
         _answer("A lumen measures light."), _user("And lux?"), _call("lux", "call00002"),
         {"role": "tool", "tool_call_id": "call00002", "name": "lookup", "content": "Lumen per area."},
         _answer("Lux is lumen per square metre.")],
        [LOOKUP],
    ),
    "reasoning": (
        [_user("2 + 2?"), _answer("It is four.", reasoning_content="Two and two make four in the end."),
         _user("3 + 3?"), _answer("It is six.", reasoning_content="Three and three make six at last.")],
        None,
    ),
}


@dataclass
class Result:
    """What became of one template with one tokenizer and one shape."""

    template: str
    tokenizer: str
    shape: str
    renders: bool = False
    equal_text: bool = True
    outcomes: list[str] = field(default_factory=list)

    rows: int = 0
    text_rows: int = 0
    turns: int = 0
    accounted: bool = True
    violations: list[str] = field(default_factory=list)


def freeze_clock() -> None:
    """Make transformers' templates see the same time as ours."""
    import transformers.utils.chat_template_utils as utils

    class Frozen(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return CLOCK

    utils.datetime = Frozen  # type: ignore[attr-defined]


def examine(template: str, name: str, tokenizer: Any, loaded: Any, tokenizer_name: str) -> Iterator[Result]:
    """One result per shape."""
    from chatloss.chat import Conversation
    from chatloss.encode import ChatEncoder
    from chatloss.errors import TemplateError
    from chatloss.policy import Policy
    from tests.oracle import violations

    encoder = ChatEncoder.load(loaded, template, Policy(), clock=lambda: CLOCK)
    for shape, (messages, tools) in SHAPES.items():
        result = Result(name, tokenizer_name, shape)
        conversation = Conversation.from_messages(messages, tools)
        seen = encoder.rendering(conversation).messages
        for count in range(1, len(messages) + 1):
            for prompt in (True, False):
                try:
                    ours = encoder.template.render(seen[:count], tools, add_generation_prompt=prompt)
                except TemplateError:
                    ours = None
                try:
                    theirs = tokenizer.apply_chat_template(
                        seen[:count], tools, chat_template=template, add_generation_prompt=prompt, tokenize=False
                    )
                except Exception:
                    theirs = None
                result.equal_text &= theirs is None or ours == theirs
                if count == len(messages) and not prompt:
                    result.renders = theirs is not None
        encoding = encoder.examine(conversation)
        result.outcomes = [encoding.outcomes[i] for i, m in enumerate(messages) if m["role"] == "assistant"]
        result.turns, result.rows = len(result.outcomes), len(encoding.rows)
        texts = [turn.prompt + turn.target for turn in encoding.turns if turn.outcome == "reachable"]
        result.text_rows = sum(not any(a != b and b.startswith(a) for b in texts) for a in set(texts))
        trained = {int(i) for row in encoding.rows for i in set(row.turns.tolist()) - {-1}}
        result.accounted = trained | set(encoding.untrained) == set(encoding.outcomes)
        result.violations = violations(
            tokenizer, template, seen, encoding.rows, tools=tools, stop_ids=encoder.loaded.stop_ids, row_format="auto"
        )
        yield result


def _work(job: tuple[str, str]) -> list[Result]:
    from transformers import AutoTokenizer

    from chatloss.load import load_tokenizer

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    name, tokenizer_name = job
    freeze_clock()
    directory = assets.tokenizer_dir(tokenizer_name)
    if tokenizer_name not in _TOKENIZERS:
        _TOKENIZERS[tokenizer_name] = AutoTokenizer.from_pretrained(directory), load_tokenizer(directory)
    return list(examine(assets.template(name), name, *_TOKENIZERS[tokenizer_name], tokenizer_name))


_TOKENIZERS: dict[str, Any] = {}


def jobs(tokenizer: str = "qwen3", limit: int = 0) -> list[tuple[str, str]]:
    names = sorted(assets.templates())
    return [(name, tokenizer) for name in (names[:: max(1, len(names) // limit)] if limit else names)]


def native_jobs() -> list[tuple[str, str]]:
    """Every tokenizer of the fast tier with the template that its model ships."""
    return [(assets.NATIVE[tokenizer], tokenizer) for tokenizer in assets.FAST_TIER]


# What only the templates of one family write.
FAMILY_MARKS = {
    "llama3": "<|start_header_id|>", "gpt-oss": "<|start|>assistant", "mistral-v3": "[AVAILABLE_TOOLS]",
    "deepseek-v3": "<｜Assistant｜>", "gemma-like": "<start_of_turn>",
}


def family_jobs() -> list[tuple[str, str]]:
    """The corpus templates that a tokenizer of ours belongs to by their markers, with that tokenizer."""
    texts = assets.templates()
    return [(name, family) for family, mark in FAMILY_MARKS.items() for name in sorted(texts) if mark in texts[name]]


def run(work: list[tuple[str, str]], processes: int = 2) -> list[Result]:
    with get_context("spawn").Pool(processes) as pool:
        return [result for results in pool.imap(_work, work, chunksize=8) for result in results]


def summary(results: list[Result]) -> dict[str, dict[str, Any]]:
    """Counts by shape, over the templates that render the shape at all."""
    table = {}
    for shape in SHAPES:
        rendered = [r for r in results if r.shape == shape and r.renders]
        outcomes = Counter(outcome for r in rendered for outcome in r.outcomes)
        table[shape] = {
            "templates": len(rendered),
            "one row in text": sum(set(r.outcomes) <= {"exact", "split"} and r.text_rows == 1 for r in rendered),
            "one row in ids": sum(set(r.outcomes) == {"exact"} and r.rows == 1 for r in rendered),
            "reachable": sum(set(r.outcomes) <= {"exact", "split"} for r in rendered),
            "unequal text": sum(not r.equal_text for r in results if r.shape == shape),
            "unlawful": sum(bool(r.violations) for r in results if r.shape == shape),
            "unaccounted": sum(not r.accounted for r in results if r.shape == shape),
            **{name: outcomes[name] for name in ("exact", "split", "off_prompt", "altered", "unrenderable")},
        }
    return table


SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def floors() -> dict[str, int]:
    """What the templates themselves allow for a plain three-turn chat, in text: no tokenizer, no rows.

    "one row": one rendering of the chat begins with every turn's prompt and has its answer behind it; "own row": each
    turn's own rendering does.
    """
    from chatloss.errors import TemplateError
    from chatloss.template import ChatTemplate

    chat = [_user("Hello there"), _answer("General answer one"), _user("second question"), _answer("Answer two here"),
            _user("third question"), _answer("Answer three done")]
    turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
    counts = {"render": 0, "own row": 0, "one row": 0}
    for text in assets.templates().values():
        template = ChatTemplate(text, SPECIAL, clock=lambda: CLOCK)
        try:
            whole = template.render(chat)
        except TemplateError:
            continue
        counts["render"] += 1
        try:
            prompts = [template.render(chat[:i], add_generation_prompt=True) for i in turns]
            own = [template.render(chat[: i + 1]) for i in turns]
        except TemplateError:
            continue
        answers = [chat[i]["content"] for i in turns]

        def holds(texts: list[str], prompts: list[str] = prompts, answers: list[str] = answers) -> bool:
            return all(t.startswith(p) and a in t[len(p) :] for t, p, a in zip(texts, prompts, answers, strict=True))

        counts["own row"] += holds(own)
        counts["one row"] += holds([whole] * len(turns))
    return counts


def write_csv(results: list[Result], path: Path) -> None:
    """One line per template and shape: rows, and turns by outcome; the committed table."""
    columns = ("exact", "split", "off_prompt", "altered", "unrenderable")
    lines = [",".join(("template", "tokenizer", "shape", "renders", "rows", *columns))]
    for r in results:
        counts = Counter(r.outcomes)
        values = (r.template, r.tokenizer, r.shape, int(r.renders), r.rows, *(counts[name] for name in columns))
        lines.append(",".join(map(str, values)))
    path.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--tokenizer", default="qwen3")
    parser.add_argument("--native", action="store_true", help="each tokenizer with its own template")
    parser.add_argument("--csv", default="", help="write the outcome counts per template")
    options = parser.parse_args()
    work = native_jobs() + family_jobs() if options.native else jobs(options.tokenizer, options.limit)
    results = run(work)
    for shape, row in summary(results).items():
        print(shape, json.dumps(row))
    for r in results:
        if r.violations or not r.equal_text or not r.accounted:
            print(r.template, r.shape, r.outcomes, "TEXT" if not r.equal_text else "", r.violations[:2])
    print("in text", json.dumps(floors()))
    if options.csv:
        write_csv(results, Path(options.csv))


if __name__ == "__main__":
    main()
