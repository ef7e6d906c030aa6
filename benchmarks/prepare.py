"""Chats to training rows, one process: ``python -m benchmarks.prepare``.

For every pair of template and tokenizer and every kind of chats: megabytes of rendered text per second of CPU time,
for `chatloss prepare` (its shard function, Parquet included; tokenizers loaded before) with both encoders, for TRL's
own SFT preprocessing with assistant masks (`SFTTrainer` on a `datasets.Dataset`, its patched template), and for
`transformers.apply_chat_template` with a mask in a loop. Megabytes are those of one rendering of every chat, the same
for all. What others make is not the same: `chatloss` also finds out what each turn's context is at inference.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from tests import assets

PAIRS = {"qwen3": "qwen3_training", "qwen2.5": "qwen2_5_training", "llama3": "llama3_training",
         "gpt-oss": "gptoss_training", "deepseek-v3": "deepseekv3_training"}
# The template that TRL ships beside its tagged one puts a thought into every prompt: all chats here are off-prompt.
TEMPLATES = {"deepseek-v3": "yujiepan-deepseek-v3-tiny-random"}
METHODS = ("fast", "reference", "trl", "transformers")
DATA = ("tools", "plain", "agent")
THREADS = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def tools() -> Iterator[dict[str, Any]]:
    """300 real chats with tool calls, 2 to 14 messages."""
    from chatloss.chat import Conversation
    from chatloss.reader import read

    for chat in read(str(assets.chat_file("tools_en"))):
        assert isinstance(chat, Conversation)
        yield {"messages": [m.to_dict() for m in chat.messages], "tools": [dict(tool) for tool in chat.tools or ()]}


def plain(chat: dict[str, Any]) -> dict[str, Any]:
    """The same words without tools: calls are part of the answer, results are said by the user."""
    messages = []
    for message in chat["messages"]:
        calls = "".join(json.dumps(call["function"]) for call in message.get("tool_calls", ()))
        role = "user" if message["role"] == "tool" else message["role"]
        text = f"{message.get('content') or ''}{calls}"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return {"messages": messages}


def agent() -> Iterator[dict[str, Any]]:
    """Chats of 40 to 200 messages, put together from the real ones."""
    pool = [m for chat in map(plain, tools()) for m in chat["messages"] if m["role"] != "system"]
    said = {role: [m["content"] for m in pool if m["role"] == role] for role in ("user", "assistant")}
    at = 0
    for i in range(24):
        size = 40 + 160 * i // 23
        messages = [{"role": "system", "content": "You are an agent. Work step by step."}]
        for k in range(size // 2 * 2):
            role = "assistant" if k % 2 else "user"
            at += 1
            messages.append({"role": role, "content": f"{said[role][at % len(said[role])]} ({k})"})
        yield {"messages": messages}


CHATS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "tools": tools, "plain": lambda: map(plain, tools()), "agent": agent,
}


def chatloss(pair: str, rows: list[dict[str, Any]], backend: str) -> dict[str, Any]:
    """CPU seconds of the shard function over all chats, and what came of it."""
    from chatloss.prepare import Job, run_shard
    from chatloss.shards import inputs_of, shards_of

    job = Job(str(assets.tokenizer_dir(pair)), own_template(pair), clock="2026-01-02T03:04:05", backend=backend)
    encoder = job.encoder()
    list(islice((encoder.examine(c) for c in conversations(rows[:2])), 2))
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "chats.jsonl", Path(folder) / "out"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        (out / "shards").mkdir(parents=True)
        (out / ".prepare").mkdir()
        [one] = inputs_of([str(data)], "auto", out)
        began = time.process_time()
        counts = [run_shard(job, encoder, shard, out) for shard in shards_of([one], 2**25)]
        seconds = time.process_time() - began
    return {"seconds": seconds, "tokens": sum(c.tokens for c in counts), "rows": sum(c.rows for c in counts),
            "rejected": sum(sum(c.rejected.values()) for c in counts)}


def conversations(rows: list[dict[str, Any]]) -> Iterator[Any]:
    from chatloss.chat import Conversation

    return (Conversation.from_messages(row["messages"], row.get("tools")) for row in rows)


def megabytes(pair: str, rows: list[dict[str, Any]]) -> float:
    """Rendered once each by the model's own template."""
    from chatloss.encode import ChatEncoder

    encoder = ChatEncoder.load(assets.tokenizer_dir(pair), own_template(pair))
    texts = (encoder.rendering(c).text(len(c.messages)) or "" for c in conversations(rows))
    return sum(len(text.encode()) for text in texts) / 1e6


def own_template(pair: str) -> str | None:
    """None: the one in the tokenizer's directory."""
    return assets.templates()[TEMPLATES[pair]] if pair in TEMPLATES else None


def tagged_tokenizer(pair: str) -> Any:
    """The tokenizer with the template that TRL ships for training it."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(assets.tokenizer_dir(pair))
    tokenizer.chat_template = assets.trl_templates()[PAIRS[pair]]
    return tokenizer


def as_peers_take(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments as text, because Arrow would give every call the arguments of all others."""
    messages = [
        {**m, "content": m.get("content") or "", "tool_calls": [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in m["tool_calls"]]} if m.get("tool_calls") else m
        for m in row["messages"]
    ]
    return {"messages": messages, **({"tools": json.dumps(row["tools"])} if row.get("tools") else {})}


def trl(pair: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """CPU seconds of TRL's `_prepare_dataset`, called by its trainer."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    seconds, prepare = [], SFTTrainer._prepare_dataset

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        made = prepare(*args, **kwargs)
        seconds.append(time.process_time() - began)
        return made

    SFTTrainer._prepare_dataset = timed
    tokenizer = tagged_tokenizer(pair)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_list([as_peers_take(row) for row in rows])
        options = SFTConfig(output_dir=folder, assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True)
        trainer = SFTTrainer(LlamaForCausalLM(config), options, train_dataset=data, processing_class=tokenizer)
        ids = trainer.train_dataset["input_ids"]
    return {"seconds": seconds[0], "tokens": sum(map(len, ids)), "rows": len(ids), "rejected": 0}


def transformers(pair: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """CPU seconds of `apply_chat_template` with an assistant mask in a loop."""
    tokenizer, tokens = tagged_tokenizer(pair), 0
    given = [as_peers_take(row) for row in rows]
    began = time.process_time()
    for row in given:
        kwargs = {"tools": json.loads(row["tools"])} if "tools" in row else {}
        made = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        tokens += len(made["input_ids"])
    return {"seconds": time.process_time() - began, "tokens": tokens, "rows": len(rows), "rejected": 0}


def one(method: str, pair: str, data: str) -> dict[str, Any]:
    """One measurement, in this process."""
    rows = list(CHATS[data]())
    if method in ("fast", "reference"):
        return {**chatloss(pair, rows, method), "megabytes": megabytes(pair, rows)}
    return (trl if method == "trl" else transformers)(pair, rows)


def measure(method: str, pair: str, data: str) -> dict[str, Any]:
    """One measurement in a process of its own; what it raises is told under "error"."""
    command = [sys.executable, "-m", "benchmarks.prepare", "--one", method, pair, data]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **THREADS}, timeout=540)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["?"])[-1][:120]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "PAIR", "DATA"))
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--data", nargs="*", default=list(DATA))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    options = parser.parse_args()
    if options.one:
        with redirect_stdout(sys.stderr):
            made = one(*options.one)
        print(json.dumps(made))
        return
    rates_of = " | ".join(f"{method} MB/s" for method in options.methods)
    print(f"| pair | chats | MB | {rates_of} | fast : TRL | tokens : TRL's |")
    print("| --- | --- " + "| ---: " * (len(options.methods) + 3) + "|")
    for pair in options.pairs:
        for data in options.data:
            found = {method: measure(method, pair, data) for method in options.methods}
            size = next((one["megabytes"] for one in found.values() if "megabytes" in one), 0.0)
            rates = {m: size / one["seconds"] if "seconds" in one else 0.0 for m, one in found.items()}
            cells = [f"{rates[m]:.2f}" if rates[m] else "refuses" for m in options.methods]
            ratios = ["-", "-"]
            if rates.get("trl") and rates.get("fast"):
                more = found["fast"]["tokens"] / found["trl"]["tokens"]
                ratios = [f"{rates['fast'] / rates['trl']:.1f}", f"{more:.1f}"]
            print(f"| {pair} | {data} | {size:.2f} | " + " | ".join([*cells, *ratios]) + " |", flush=True)
            for method, one_found in found.items():
                if "error" in one_found or one_found.get("rejected"):
                    said = one_found.get("error") or f"{one_found['rejected']} rejected"
                    print(f"{pair} {data} {method}: {said}", file=sys.stderr)


if __name__ == "__main__":
    main()
