"""Other people's trainers with and without `chatloss.hf`: ``python -m benchmarks.hf`` writes the tables of docs/hf.md.

A tiny random Llama in float64, uneven chats, one optimiser step: `chatloss.hf.verify` compares its gradient with the
definition by ``max over parameters of max |dg| / max |g|``. Two ranks are processes on gloo. And what
`with_assistant_masks` holds of a plain chat of three turns, for every tokenizer family with its own template.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tests import assets, conformance
from tests.ranks import on_ranks
from tests.synthetic import FAMILIES, chats
from tests.torch_reference import tiny

from chatloss.parallel import World
from chatloss.sample import Sample

Build = Callable[[Any], Any]
REFUSED = "refused by name"


def quiet() -> None:
    import datasets
    import transformers

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)


def trainer(kind: str, rows: Any, *, exact: bool, packed: bool = False, **settings: Any) -> Build:
    """Builds a trainer of a kind ("transformers", "overridden", "trl") on `rows`, as it is or with our loss."""
    import transformers
    import trl
    from tests.test_hf_proof import WORDS, ReturnsTheModelsLoss

    from chatloss import hf

    bases = {"transformers": transformers.Trainer, "overridden": ReturnsTheModelsLoss, "trl": trl.SFTTrainer}
    base: Any = bases[kind]
    if exact:
        base = type("Exact", (hf.ExactLoss, base), {})
    more: dict[str, Any] = {"data_collator": hf.Collator(packed=packed)} if exact else {}
    if kind != "trl" and not exact:
        more["data_collator"] = transformers.DataCollatorForSeq2Seq(WORDS, padding=True)

    def build(model: Any) -> Any:
        common = {"output_dir": tempfile.gettempdir(), "max_steps": 1, "per_device_train_batch_size": 2,
                  "gradient_accumulation_steps": 50, "use_cpu": True, "report_to": [], "save_strategy": "no",
                  **settings}
        if kind == "trl":
            config: Any = trl.SFTConfig(**{"bf16": False, "max_length": None, **common})
            return base(model, config, train_dataset=rows, processing_class=WORDS, **more)
        return base(model, transformers.TrainingArguments(**common), train_dataset=rows, **more)

    return build


def difference(build: Build, examples: Sequence[Sequence[Sample]], reduction: str) -> str:
    from chatloss import hf
    from chatloss.errors import RecipeError

    try:
        [verdict] = hf.verify(build, tiny(FAMILIES["llama"]), examples, reduction).verdicts
    except RecipeError:
        return REFUSED
    return f"{verdict.difference:.1e}"


ONE_RANK: Mapping[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "Trainer, 2 rows x 4": ("transformers", 8, {}, {}),
    "Trainer, 3 rows x 3, the last of 1": ("transformers", 7, {"per_device_train_batch_size": 3}, {}),
    "Trainer, label smoothing 0.1": ("transformers", 8, {"label_smoothing_factor": 0.1}, {}),
    "Trainer whose compute_loss returns outputs.loss": ("overridden", 8, {}, {}),
    "SFTTrainer, padded": ("trl", 8, {}, {}),
    "SFTTrainer, packed bfd 130": ("trl", 8, {"packing": True, "max_length": 130}, {"packed": True}),
    "SFTTrainer, packed wrapped 130": (
        "trl", 8, {"packing": True, "packing_strategy": "wrapped", "max_length": 130}, {"packed": True}),
}
TWO_RANKS: Mapping[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "Trainer": ("transformers", 8, {}, {}),
    "Trainer, average_tokens_across_devices=False": (
        "transformers", 8, {"average_tokens_across_devices": False}, {}),
    "Trainer, 7 rows: the last batch repeats one": ("transformers", 7, {}, {}),
    "SFTTrainer, 7 rows": ("trl", 7, {}, {}),
}
ALL_REDUCTIONS = {"Trainer, 2 rows x 4", "SFTTrainer, padded", "Trainer"}
PACKS = {"packing", "packing_strategy", "max_length"}  # made by our collator instead


def table(world: World, cases: Mapping[str, tuple[str, int, dict[str, Any], dict[str, Any]]]) -> list[str]:
    quiet()
    if world.size > 1:
        from tests.test_hf_ranks import as_torchrun

        as_torchrun(world)
    from chatloss import hf

    lines = []
    for name, (kind, count, settings, ours) in cases.items():
        for reduction in ("token", "turn", "conversation") if name in ALL_REDUCTIONS else ("token",):
            examples = chats(count)
            rows = hf.dataset(examples, reduction)
            kept = {key: value for key, value in settings.items() if key not in PACKS}
            plain = difference(trainer(kind, rows, exact=False, **settings), examples, reduction)
            exact = difference(trainer(kind, rows, exact=True, **ours, **kept), examples, reduction)
            ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
            lines.append(f"| {name} | {ranks} | {reduction} | {plain} | {exact} |")
    return lines


def masks() -> list[str]:
    """What TRL says of a family's own template, and the turns that the wrapped tokenizer masks."""
    import transformers
    from trl.chat_template_utils import get_training_chat_template

    from chatloss import hf
    from chatloss.errors import DataError

    lines = []
    for name in assets.FAST_TIER:
        plain = transformers.AutoTokenizer.from_pretrained(assets.tokenizer_dir(name))
        try:
            get_training_chat_template(plain)
            alone = "its own tagged template"
        except ValueError:
            alone = "refused: no tagged template"
        held = []
        for shape in ("plain", "tools"):
            tokenizer = hf.with_assistant_masks(plain)
            messages, tools = conformance.SHAPES[shape]
            turns = sum(message["role"] == "assistant" for message in messages)
            try:
                tokenizer.apply_chat_template(messages, tools, return_assistant_tokens_mask=True)
                rest = ", ".join(f"{n} {why}" for why, n in tokenizer.mask_counts.left_out.items())
                held.append(f"{tokenizer.mask_counts.masked} of {turns}" + (f" ({rest})" if rest else ""))
            except DataError as error:
                held.append("refused: " + error.what.partition("(")[2].rstrip(")"))
            except Exception as error:  # the template's own refusal
                held.append(f"the template refuses: {' '.join(str(error).split())[:60]}")
        lines.append(f"| {name} | {alone} | {held[0]} | {held[1]} |")
    return lines


def main() -> None:
    quiet()
    print("| trainer | ranks | reduction | as it is | with ExactLoss |\n| --- | --- | --- | --- | --- |")
    print("\n".join([*table(World(), ONE_RANK), *on_ranks(2, table, TWO_RANKS)]), flush=True)
    print("\n| tokenizer | TRL 1.16 alone | masked, plain chat | masked, tool chat |\n| --- | --- | --- | --- |")
    print("\n".join(masks()))


if __name__ == "__main__":
    main()
