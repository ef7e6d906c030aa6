"""The built-in tokenizer, templates and chats, and the demonstration that uses them: check, encode, train, report."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatloss.errors import RecipeError

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder
    from chatloss.trainer import TrainResult

__all__ = ["chats_file", "run_demo", "tokenizer_directory"]

ASSETS = Path(__file__).parent / "assets" / "demo"


def tokenizer_directory() -> Path:
    """The directory of the built-in tokenizer: a byte-level BPE of 2,266 tokens with a ChatML-like template."""
    return ASSETS / "tokenizer"


def chats_file() -> Path:
    """The built-in chats: multi-turn, uneven, with tools and reasoning, in several languages."""
    return ASSETS / "chats.jsonl"


def run_demo(output: str | Path = "chatloss-demo", *, steps: int | None = None) -> TrainResult:
    """Check and encode the built-in chats, train a tiny model on them, and write `output`/report.html.

    Needs the extra ``train``; raises `RecipeError` that says how to get it.
    """
    from rich.console import Console

    from chatloss.check import check
    from chatloss.encode import ChatEncoder
    from chatloss.pipeline import encodings
    from chatloss.reader import read
    from chatloss.view import render_sample

    _require_training()
    began = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    encoder = ChatEncoder.load(tokenizer_directory())

    console.rule("[bold]1. check[/]: what is wrong with the data, before anything is trained")
    reader = read(str(chats_file()))
    report = check(reader, encoder, keep_samples=2000)
    console.print(report.render())

    console.rule("[bold]2. encode[/]: which tokens are trained, and why")
    rewriting = ChatEncoder.load(tokenizer_directory(), tokenizer_directory() / "chat_template_rewrites.jinja")
    shown = _showcase(rewriting, encodings(read(str(chats_file())), rewriting))
    for sample, roles in shown:
        console.print(render_sample(sample, decode=encoder.decode, roles=roles))
        console.print()
    console.print("The same chat makes two rows here, because this template drops the reasoning of past answers.\n")

    console.rule("[bold]3. train[/]: a tiny Llama from scratch on the CPU")
    result, questions = _train(encoder, folder, steps)
    before, after = _answers(result.metrics, len(questions))
    for (question, expected), old, new in zip(questions, before, after, strict=True):
        mark = "✓" if new.startswith(expected) else "·"
        console.print(f"  {question}\n    before: {_short(old)}\n    after:  {_short(new)} {mark}", markup=False)

    page = folder / "report.html"
    _write_report(page, report, encoder, result, questions, before, after)
    right = sum(new.startswith(expected) for (_, expected), new in zip(questions, after, strict=True))
    console.rule("[bold]done[/]")
    console.print(f"{right} of {len(questions)} held-out questions answered as expected; "
                  f"{time.perf_counter() - began:.0f} s in all")
    console.print(f"report: {page}\nmodel:  {result.model}", markup=False, soft_wrap=True)
    return result


def _require_training() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"training needs {' and '.join(missing)}",
            hint="pip install 'chatloss[train]', or look first: chatloss view",
        )


def _showcase(encoder: ChatEncoder, made: Any) -> list[Any]:
    """The rows of the first short chat that a history-rewriting template splits."""
    for one in made:
        rows = one.encoding.rows
        if len(rows) == 2 and sum(map(len, rows)) < 300:
            roles = [message.role for message in one.conversation.messages]
            return [(row, roles) for row in rows]
    return []


def _train(encoder: ChatEncoder, folder: Path, steps: int | None) -> tuple[TrainResult, list[tuple[str, str]]]:
    import json

    from chatloss.config import Recipe
    from chatloss.sft import encode_files, stop_ids, write_tokenizer
    from chatloss.trainer import train

    settings = [] if steps is None else [f"run.steps={steps}", f"run.eval_every={max(1, steps // 2)}"]
    files = {"output": str(folder), "tokenizer": str(tokenizer_directory()), "data": {"train": [str(chats_file())]}}
    recipe = Recipe.from_dict({**_recipe(), **files}, settings)
    held_out = [json.loads(line) for line in (ASSETS / "heldout.jsonl").read_text("utf-8").splitlines()]
    questions = [(row["messages"][-1]["content"], row["expected"]) for row in held_out]
    texts = [encoder.template.render(row["messages"], add_generation_prompt=True) for row in held_out]
    prompts = [[int(i) for i in encoder.tokens.encode(text).ids] for text in texts]
    examples, _ = encode_files(recipe, encoder, recipe.data.train)
    result = train(
        recipe, examples, tokenizer_files=write_tokenizer(encoder), decode=encoder.decode, prompts=prompts,
        stop_ids=stop_ids(encoder), vocab_size=encoder.tokens.size, fresh=True, quiet=not sys.stderr.isatty(),
    )
    return result, questions


def _recipe() -> dict[str, Any]:
    import tomllib

    return tomllib.loads((ASSETS / "recipe.toml").read_text("utf-8"))


def _metrics(path: Path) -> list[dict[str, Any]]:
    import json

    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _answers(metrics: Path, count: int) -> tuple[list[str], list[str]]:
    """The first and the last answers to the held-out questions."""
    samples = [line["text"] for line in _metrics(metrics) if line["kind"] == "sample"]
    return samples[:count], samples[-count:]


def _short(text: str) -> str:
    plain = " ".join(text.replace("<|im_end|>", " ⏹").split())
    return plain if len(plain) <= 60 else plain[:59] + "…"


def _write_report(
    path: Path, report: Any, encoder: ChatEncoder, result: TrainResult, questions: list[tuple[str, str]],
    before: list[str], after: list[str],
) -> None:
    from chatloss.page import Section, write_page

    curve = [(line["step"], line["loss"]) for line in _metrics(result.metrics) if line["kind"] == "step"]
    table = [("question", "before", "after", "expected")]
    table += [(q, _short(a), _short(b), e) for (q, e), a, b in zip(questions, before, after, strict=True)]
    sections = [
        Section("Loss per trained token", f"{curve[0][1]:.2f} at the start, {curve[-1][1]:.2f} at the end.", (), curve),
        Section("Questions the model has not seen", "Greedy answers before and after training.", table),
    ]
    write_page(path, report.samples, title="chatloss demo", decode=encoder.decode, roles=report.roles,
               summary=report.summary_for_page(), sections=sections, findings=report.findings_for_page(),
               untrained=report.untrained)
