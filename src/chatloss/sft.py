"""From a recipe to a trained model: load the tokenizer, encode the chats under the policy, hand them to the trainer."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chatloss.config import Recipe
from chatloss.dataset import Joined, Prepared, PreparedPairs, is_prepared, prepared_answers
from chatloss.encode import ChatEncoder
from chatloss.errors import RecipeError
from chatloss.pairs import mismatched, prompt_ids
from chatloss.pipeline import answers, examples, pairs
from chatloss.policy import Policy
from chatloss.reader import Reader, read
from chatloss.sample import Sample

if TYPE_CHECKING:
    from chatloss.trainer import TrainResult
    from chatloss.verify import Report

__all__ = ["encode_files", "recipe_encoder", "run_recipe", "shipped_recipes", "stop_ids", "verify_recipe",
           "write_tokenizer"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt", "tokenizer.model")


def recipe_encoder(recipe: Recipe) -> ChatEncoder:
    """The encoder that a recipe asks for; the tokenizer is the model's own unless the recipe names another."""
    tokenizer = recipe.tokenizer or (recipe.model if isinstance(recipe.model, str) else "")
    if not tokenizer:
        raise RecipeError("the recipe names no tokenizer", where="tokenizer", hint="set tokenizer = 'DIRECTORY'")
    template = None if recipe.chat_template is None else Path(recipe.chat_template)
    policy = Policy.from_dict(recipe.data.policy)
    return ChatEncoder.load(tokenizer, template, policy, template_kwargs=recipe.data.template_kwargs)


def encode_files(
    recipe: Recipe, encoder: ChatEncoder, files: Sequence[str], *, rejects: Path | None = None
) -> tuple[Sequence[list[Sample]], list[list[int]]]:
    """(examples, prompts): the rows of every conversation, and the ids an engine holds before its first answer.

    `files` that are prepared directories are read when needed, and give no more prompts than the recipe asks for. Else
    rejected rows are written to `rejects` and summed up on stderr; too many of them raise `DataError`.
    """
    if any(map(is_prepared, files)):
        ready = Joined([part.holding("conversations") for part in _prepared(recipe, encoder, files)])
        return ready, [_first_prompt(ready[i][0]) for i in range(min(recipe.run.samples, len(ready)))]
    reader = read(list(files), input_format=recipe.data.input_format or "auto", max_rejects=recipe.data.max_rejects)
    made: list[list[Sample]] = []
    prompts: list[list[int]] = []
    cut = 0
    try:
        for one in examples(reader, encoder):
            made.append(one.encoding.rows)
            prompts.append(_first_prompt(one.encoding.rows[0]))
            cut += sum(why == "truncated" for why in one.encoding.untrained.values())
    finally:
        _tell_rejects(reader, rejects)
    if cut:
        print(f"left out {cut} turns that max_length cuts; see --overflow", file=sys.stderr)
    return made, prompts


def _prepared(recipe: Recipe, encoder: ChatEncoder, directories: Sequence[str]) -> list[Prepared]:
    """The prepared directories, made as the recipe asks."""
    chats = next((name for name in directories if not is_prepared(name)), None)
    if chats is not None:
        hint = "prepare it too, or train on chats only"
        raise RecipeError("chats beside prepared directories", where=f"data: {chats}", hint=hint)
    policy = asdict(Policy.from_dict(recipe.data.policy))
    chosen = {"policy": {name: policy[name] for name in recipe.data.policy}}
    parts = [Prepared(directory, encoder.decode) for directory in directories]
    for part in parts:
        part.check_made_with(encoder, **chosen, template_kwargs=recipe.data.template_kwargs)
    return parts


def encode_preferences(
    recipe: Recipe, encoder: ChatEncoder, files: Sequence[str], *, rejects: Path | None = None
) -> tuple[Sequence[Any], list[list[int]]]:
    """(pairs, or judged answers for KTO; prompts); rejected rows are treated as `encode_files` does."""
    from chatloss.objectives import is_unpaired

    unpaired = is_unpaired(recipe)
    if any(map(is_prepared, files)):
        return _prepared_preferences(recipe, _prepared(recipe, encoder, files), unpaired)
    reader = read(list(files), input_format=recipe.data.input_format or "auto", max_rejects=recipe.data.max_rejects)
    made: list[Any] = []
    try:
        made += answers(reader, encoder) if unpaired else pairs(reader, encoder)
    finally:
        _tell_rejects(reader, rejects)
    first = made if unpaired else [pair.chosen for pair in made]
    every = made if unpaired else [side for pair in made for side in (pair.chosen, pair.rejected)]
    kept = {answer.source.removesuffix(" chosen").removesuffix(" rejected") for answer in every}
    dropped = reader.n_rows - reader.n_rejected - len(kept)
    if dropped:
        print(f"left out {dropped} rows that max_length cuts; see --overflow", file=sys.stderr)
    cut = sum("truncated" in answer.rows[0].untrained.values() for answer in every)
    if cut:
        print(f"cut {cut} answers at max_length; see --overflow", file=sys.stderr)
    prompts = [prompt_ids(answer.rows).tolist() for answer in first[: recipe.run.samples]]
    return (mismatched(made) if unpaired else made), prompts


def _prepared_preferences(
    recipe: Recipe, parts: Sequence[Prepared], unpaired: bool
) -> tuple[Sequence[Any], list[list[int]]]:
    """Pairs are read when needed; judged answers, each of which needs the next one, are read at once."""
    if unpaired:
        every = [answer for part in parts for answer in prepared_answers(part)]
        return mismatched(every), [prompt_ids(answer.rows).tolist() for answer in every[: recipe.run.samples]]
    pairs = Joined([PreparedPairs(part) for part in parts])
    few = min(recipe.run.samples, len(pairs))
    return pairs, [prompt_ids(pairs[i].chosen.rows).tolist() for i in range(few)]


def _tell_rejects(reader: Reader, rejects: Path | None) -> None:
    if reader.rejects and rejects is not None:
        rejects.parent.mkdir(parents=True, exist_ok=True)
        reader.write_rejects(rejects)
        kinds = ", ".join(f"{count} {kind}" for kind, count in reader.reject_counts.most_common())
        print(f"rejected {reader.n_rejected} of {reader.n_rows} rows ({kinds}); see {rejects}", file=sys.stderr)


def _first_prompt(row: Sample) -> list[int]:
    trained = row.weights != 0
    return [int(i) for i in row.input_ids[: int(trained.argmax()) if trained.any() else len(row)]]


def stop_ids(encoder: ChatEncoder) -> list[int]:
    """Single-token stops, those that training ends turns with first: what the checkpoint's generation config holds."""
    stops = encoder.stops
    texts = dict.fromkeys(text for text in (stops.answer.text, stops.call.text, *encoder.engine_stops) if text)
    ids = [encoder.tokens.ids_of(text) for text in texts]
    return list(dict.fromkeys(found[0] for found in ids if len(found) == 1))


def write_tokenizer(encoder: ChatEncoder) -> Callable[[Path], None]:
    """A function that writes the tokenizer into a checkpoint, with the template that was trained as its template."""

    def write(directory: Path) -> None:
        home = encoder.loaded.directory
        if home is None:
            raise RecipeError("the tokenizer has no files to put into the checkpoint", hint="load it from a directory")
        for name in TOKENIZER_FILES:
            if (home / name).is_file():
                shutil.copyfile(home / name, directory / name)
        config_file = directory / "tokenizer_config.json"
        if config_file.is_file():
            config = json.loads(config_file.read_text("utf-8"))
            if config.pop("chat_template", None) is not None:  # the file of its own is the one that counts
                config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        source = encoder.template.source
        named = {"default": source} if isinstance(source, str) else source
        for name, text in named.items():
            path = directory / "chat_template.jinja"
            if name != "default":
                path = directory / "additional_chat_templates" / f"{Path(name).name}.jinja"
                path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())

    return write


def run_recipe(recipe: Recipe, *, fresh: bool = False, quiet: bool = False) -> TrainResult:
    """Encode the recipe's data and train; see `chatloss.trainer.train`."""
    from chatloss.trainer import train

    if not recipe.data.train:
        raise RecipeError("the recipe names no training data", where="data.train", hint="set train = ['chats.jsonl']")
    encoder = recipe_encoder(recipe)
    output = Path(recipe.output or ".")
    encode: Any = encode_files if recipe.objective == "sft" else encode_preferences
    trained, prompts = encode(recipe, encoder, recipe.data.train, rejects=output / "rejects.jsonl")
    evaluated: Sequence[Any] = []
    if recipe.data.eval:
        evaluated, prompts = encode(recipe, encoder, recipe.data.eval, rejects=output / "rejects-eval.jsonl")
    return train(
        recipe, trained, evaluated or None, tokenizer_files=write_tokenizer(encoder), decode=encoder.decode,
        prompts=prompts[: recipe.run.samples], stop_ids=stop_ids(encoder),
        vocab_size=getattr(encoder.tokens, "size", None), fresh=fresh, quiet=quiet,
    )


def verify_recipe(recipe: Recipe, ranks: Sequence[int] = (1, 2, 4)) -> Report:
    """The recipe's first global batch under every partition and row format; see `chatloss.verify.verify`."""
    from chatloss.verify import verify

    formats: dict[str, Sequence[Any]] = {}
    encode: Any = encode_files if recipe.objective == "sft" else encode_preferences
    for row_format in ("auto", "per_turn"):
        policy = {**recipe.data.policy, "row_format": row_format}
        encoder = recipe_encoder(replace(recipe, data=replace(recipe.data, policy=policy)))
        formats[row_format], _ = encode(recipe, encoder, recipe.data.train)
    return verify(recipe, formats, ranks=ranks, vocab_size=getattr(encoder.tokens, "size", None))


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(__file__).parent / "assets" / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}
