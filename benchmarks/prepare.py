"""Chats to training rows: ``python -m benchmarks.prepare``, all lines in less than an hour.

For every pair of template and tokenizer and every kind of chats: megabytes of rendered text per second of CPU time, in
one process, tokenizers loaded before, for `chatloss prepare` (its shard function, Parquet included), for TRL's own SFT
preprocessing with assistant masks (`SFTTrainer` on a `datasets.Dataset`, its patched template), and for
`transformers.apply_chat_template` with a mask in a loop. Then the same per second of the clock with two processes and
all that starting them takes: ``--workers 2``, and ``dataset_num_proc=2``. Megabytes are those of one rendering of every
chat, the same for all. What others make is not the same: `chatloss` also finds out what each turn's context is at
inference. Chats are taken `COPIES` times (`COPIES_FOR_TWO`), each time with other texts: what a corpus has many of is
chats of few shapes. The better of `RUNS` runs counts, for TRL too. All shapes are then met for the first time; what as
many chats take afterwards, of the same shapes and with other words, is measured too: so it goes on in a large corpus.
With two processes `chatloss` gets five times as many chats as TRL, which takes minutes for so many, at the same rate:
what is left to see of starting is then what there would be in a corpus of a few hundred megabytes.

``--equal`` measures nothing: it compares every id, span and weight of all these chats with those of the reference
encoder (`tokenizers`) and the reference renderer (every prefix rendered alone). The second chat of a shape is then
already rendered by that of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import count, islice
from math import inf
from operator import itemgetter
from pathlib import Path
from types import FrameType
from typing import Any

from tests import assets

PAIRS = {"qwen3": "qwen3_training", "qwen2.5": "qwen2_5_training", "llama3": "llama3_training",
         "gpt-oss": "gptoss_training", "deepseek-v3": "deepseekv3_training"}
# The template that TRL ships beside its tagged one puts a thought into every prompt: all chats here are off-prompt.
TEMPLATES = {"deepseek-v3": "yujiepan-deepseek-v3-tiny-random"}
DATA = ("tools", "plain", "agent")
COPIES = {"tools": 32, "plain": 32, "agent": 16}
RUNS = 2  # of chatloss and of TRL, of which the better one counts: the machine is not always as fast
COPIES_FOR_TWO = {"chatloss": 320, "trl": 64}
COPIES_TO_COMPARE = {"tools": 4, "plain": 4, "agent": 2}
# What takes the time, by the innermost module of ours that runs.
STAGES = {
    "read": "shards reader streams tables formats chat values",
    "render": "template sandbox meter traced shapes",
    "ids": "tokens fast_tokens cuts",
    "rows": "reference fields places rows paint straight plans window encoding encode sample pipeline policy typed",
    "write": "columns dataset manifest folders prepare",
}
MODULES = {f"chatloss.{name}": stage for stage, names in STAGES.items() for name in names.split()}
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


def copies(data: str, times: int) -> list[dict[str, Any]]:
    """The chats several times, never with the same text."""
    rows = list(CHATS[data]())
    return list(islice(varied(rows), times * len(rows)))


def varied(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The chats without end, each time with the words of every message turned round by another number."""
    for n in count():
        for row in rows:
            yield {**row, "messages": [
                {**m, "content": f"{n} {turned(m['content'], n)}"} if isinstance(m.get("content"), str) else m
                for m in row["messages"]
            ]}


def turned(text: str, n: int) -> str:
    words = text.split(" ")
    at = n % len(words)
    return " ".join([*words[at:], *words[:at]])


def chatloss(pair: str, data: str, backend: str) -> dict[str, Any]:
    """CPU seconds of the shard function over all chats, by stage and beside the least there is to do."""
    from chatloss.folders import Folder
    from chatloss.prepare import run_shard
    from chatloss.shards import blocks_of, hashed, inputs_of, shards_of, with_blocks

    rows, job = copies(data, COPIES[data]), job_of(pair, backend)
    encoder = job.encoder()
    with tempfile.TemporaryDirectory() as folder:
        out = Folder(f"{folder}/out")
        out.make("shards", ".prepare")

        def run(encoder: Any) -> list[Any]:
            inputs = with_blocks(found, ((block, hashed(block)) for block in blocks_of(found, 2**25)))
            return [run_shard(job, encoder, shard, out) for shard in shards_of(inputs, 2**25)]

        found = inputs_of([written(rows[-2:], folder)], "auto", out)
        run(encoder)  # which imports what the others have imported when their time begins
        seconds = known = inf
        others = copies(data, 2 * COPIES[data])[len(rows) :]
        for new in [encoder, *(job.encoder() for _ in range(RUNS - 1))]:  # each meets all shapes for the first time
            found = inputs_of([written(rows, folder)], "auto", out)
            began = time.process_time()
            counts = run(new)
            seconds = min(seconds, time.process_time() - began)
            found = inputs_of([written(others, folder)], "auto", out)
            began = time.process_time()
            run(new)
            known = min(known, time.process_time() - began)
        with shares() as stages:
            run(encoder)
    other_texts = [rendered_once(encoder, chat) for chat in conversations(others)]
    chats = list(conversations(rows))
    began = time.process_time()
    texts = [rendered_once(encoder, chat) for chat in chats]
    rendering = time.process_time() - began
    for text in texts:
        encoder.tokens.encode(text)
    least = time.process_time() - began
    return {"seconds": seconds, "known": known, "known_megabytes": megabytes(other_texts),
            "tokens": sum(c.tokens for c in counts), "rows": sum(c.rows for c in counts),
            "rejected": sum(sum(c.rejected.values()) for c in counts), "stages": stages, "least": least,
            "rendering": rendering, "megabytes": megabytes(texts),
            **two_processes(pair, data, backend)}


def megabytes(texts: list[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def two_processes(pair: str, data: str, backend: str) -> dict[str, float]:
    """Seconds of the clock for `prepare` with two workers, from the call to the manifest."""
    from chatloss.prepare import prepare

    n = COPIES_FOR_TWO["chatloss"]
    rows = copies(data, n)
    with tempfile.TemporaryDirectory() as folder:
        path, began = written(rows, folder), time.monotonic()
        prepare([path], f"{folder}/out", job_of(pair, backend), workers=2, max_rejects=1.0)
        return {"two": (time.monotonic() - began) / n * COPIES[data]}


def job_of(pair: str, backend: str) -> Any:
    from chatloss.prepare import Job

    return Job(str(assets.tokenizer_dir(pair)), own_template(pair), clock="2026-01-02T03:04:05", backend=backend)


def written(rows: list[dict[str, Any]], folder: str) -> str:
    path = Path(folder) / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@contextmanager
def shares() -> Iterator[dict[str, float]]:
    """The share of CPU time of each stage: a thousand times a second, the time since the last look goes to one."""
    found: Counter[str] = Counter()
    last = time.process_time()

    def look(_: int, frame: FrameType | None) -> None:
        nonlocal last
        stage = None
        while frame and stage is None:
            stage = MODULES.get(".".join(frame.f_globals.get("__name__", "").split(".")[:2]))
            frame = frame.f_back
        now = time.process_time()
        found[stage or "other"] += now - last  # type: ignore[assignment]
        last = now

    made: dict[str, float] = {}
    signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, 0.001, 0.001)
    try:
        yield made
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    made |= {stage: seconds / sum(found.values()) for stage, seconds in found.items()}


def rendered_once(encoder: Any, chat: Any) -> str:
    """All of a chat rendered, as `apply_chat_template` does; nothing where the template refuses it."""
    from chatloss.errors import TemplateError

    rendering = encoder.rendering(chat)
    try:
        return str(encoder.template.render(rendering.messages, chat.tools, **rendering.kwargs))
    except TemplateError:
        return ""


def differences(pair: str, data: str) -> dict[str, int]:
    """How many rows there are, and of how many chats the reference makes something else."""
    from dataclasses import replace

    from chatloss.plans.plans import same_encodings
    from chatloss.shapes import shapes

    shapes.OFTEN = 1
    fast, plain = job_of(pair, "fast").encoder(), job_of(pair, "reference").encoder()
    plain = replace(plain, template=replace(plain.template, trace=False))
    found: Counter[str] = Counter()
    for chat, one in fast.examine_each(conversations(copies(data, COPIES_TO_COMPARE[data]))):
        other = plain.examine(chat)
        differing = not same_encodings(one, other)
        found.update(chats=1, rows=len(one.rows), tokens=sum(map(len, one.rows)), differing=differing)
    assert fast._plans is not None
    return {**found, "planned": fast._plans.planned}


def conversations(rows: list[dict[str, Any]]) -> Iterator[Any]:
    from chatloss.chat import Conversation

    return (Conversation.from_messages(row["messages"], row.get("tools")) for row in rows)


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


def peers(pair: str, data: str) -> dict[str, Any]:
    """TRL and transformers over the same chats; what one of them raises is told under its name."""
    runs: dict[str, Callable[[], dict[str, Any]]] = {
        "trl": lambda: min((trl(pair, copies(data, COPIES[data])) for _ in range(RUNS)), key=itemgetter("seconds")),
        "transformers": lambda: transformers(pair, data),
        "two": lambda: trl(pair, copies(data, COPIES_FOR_TWO["trl"]), processes=2),
    }
    made: dict[str, Any] = {}
    for name, run in runs.items():
        try:
            made[name] = run()
        except Exception as error:
            made[name] = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:160]}
    if "seconds" in made["two"]:
        made["two"]["seconds"] *= COPIES[data] / COPIES_FOR_TWO["trl"]
    return made


def trl(pair: str, rows: list[dict[str, Any]], processes: int | None = None) -> dict[str, Any]:
    """CPU seconds of TRL's `_prepare_dataset`, called by its trainer; seconds of the clock with more `processes`."""
    import datasets
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    seconds, prepare = [], SFTTrainer._prepare_dataset
    clock = time.monotonic if processes else time.process_time

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = clock()
        made = prepare(*args, **kwargs)
        seconds.append(clock() - began)
        return made

    tokenizer = tagged_tokenizer(pair)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                         num_attention_heads=1, num_key_value_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        data = datasets.Dataset.from_list([as_peers_take(row) for row in rows])
        options = SFTConfig(output_dir=folder, assistant_only_loss=True, max_length=None, report_to=[], use_cpu=True,
                            dataset_num_proc=processes)
        SFTTrainer._prepare_dataset = timed
        try:
            trainer = SFTTrainer(LlamaForCausalLM(config), options, train_dataset=data, processing_class=tokenizer)
        finally:
            SFTTrainer._prepare_dataset = prepare
        ids = trainer.train_dataset.with_format("arrow")["input_ids"]
        return {"seconds": seconds[0], "tokens": sum(len(row) for row in ids.combine_chunks()), "rows": len(ids)}


def transformers(pair: str, data: str) -> dict[str, Any]:
    """CPU seconds of `apply_chat_template` with an assistant mask in a loop."""
    tokenizer, tokens = tagged_tokenizer(pair), 0
    given = [as_peers_take(row) for row in copies(data, COPIES[data])]
    began = time.process_time()
    for row in given:
        kwargs = {"tools": json.loads(row["tools"])} if "tools" in row else {}
        made = tokenizer.apply_chat_template(
            row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **kwargs
        )
        tokens += len(made["input_ids"])
    return {"seconds": time.process_time() - began, "tokens": tokens, "rows": len(given)}


def measure(what: str, pair: str, data: str, backend: str) -> dict[str, Any]:
    """One measurement in a process of its own; what it raises is told under "error"."""
    command = [sys.executable, "-m", "benchmarks.prepare", "--one", what, pair, data, "--encoder", backend]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **THREADS}, timeout=540)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["?"])[-1][:160]}
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def line(data: str, ours: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """The cells of a line of the table; "-" where something could not be run."""
    def shown(digits: int, a: float | None, b: float | None) -> str:
        return f"{a / b:.{digits}f}" if a and b else "-"

    size = ours["megabytes"]
    trl, loop, two = (others.get(name, {}) for name in ("trl", "transformers", "two"))
    return [
        f"{size / COPIES[data]:.2f}", shown(2, size, ours["seconds"]), shown(2, ours["known_megabytes"], ours["known"]),
        *(shown(2, size, one.get("seconds")) for one in (trl, loop)), shown(1, trl.get("seconds"), ours["seconds"]),
        shown(1, trl.get("seconds", 0) * ours["known_megabytes"], size * ours["known"]),
        shown(1, ours["tokens"], trl.get("tokens")),
        shown(2, size, ours["two"]), shown(2, size, two.get("seconds")), shown(1, two.get("seconds"), ours["two"]),
        shown(1, ours["seconds"], ours["least"]),
        shown(1, ours["known"] * size, ours["least"] * ours["known_megabytes"]),
        shown(2, size, ours["rendering"]),
        *(f"{ours['stages'].get(stage, 0):.0%}" for stage in STAGES),
    ]


COLUMNS = ("pair", "chats", "MB", "chatloss MB/s", "shapes known", "TRL MB/s", "transformers MB/s", "chatloss : TRL",
           "shapes known : TRL", "tokens : TRL's", "chatloss x2 MB/s", "TRL x2 MB/s", "ratio x2",
           "all : render and encode once", "shapes known", "rendering once MB/s", *STAGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "PAIR", "DATA"))
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--data", nargs="*", default=list(DATA))
    parser.add_argument("--encoder", choices=("fast", "reference"), default="fast")
    options = parser.parse_args()
    if options.one:
        what, pair, data = options.one
        with redirect_stdout(sys.stderr):
            if what == "equal":
                made: dict[str, Any] = differences(pair, data)
            elif what == "two":
                made = two_processes(pair, data, options.encoder)
            else:
                made = peers(pair, data) if what == "peers" else chatloss(pair, data, options.encoder)
        print(json.dumps(made))
        return
    lines = [(pair, data) for pair in options.pairs for data in options.data]
    (compared if options.equal else timed)(lines, options.encoder)


def timed(lines: list[tuple[str, str]], encoder: str) -> None:
    print(f"| {' | '.join(COLUMNS)} |\n| --- | --- {'| ---: ' * (len(COLUMNS) - 2)}|")
    for pair, data in lines:
        ours, others = (measure(what, pair, data, encoder) for what in ("chatloss", "peers"))
        for name, said in (("chatloss", ours), ("peers", others), *others.items()):
            if isinstance(said, dict) and ("error" in said or said.get("rejected")):
                print(f"{pair} {data} {name}: {said.get('error') or said}", file=sys.stderr)
        if "error" not in ours:
            print(f"| {' | '.join([pair, data, *line(data, ours, others)])} |", flush=True)


def compared(lines: list[tuple[str, str]], encoder: str) -> None:
    print("| pair | chats | number | by plan | rows | tokens | differing |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    differing = 0
    for pair, data in lines:
        made = measure("equal", pair, data, encoder)
        differing += made.get("differing", 1)
        cells = [str(made.get(name, "-")) for name in ("chats", "planned", "rows", "tokens", "differing")]
        print(f"| {' | '.join([pair, data, *cells])} |{made.get('error', '')}", flush=True)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
