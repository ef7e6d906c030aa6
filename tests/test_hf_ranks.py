"""The same on two ranks: gloo processes as torchrun would start them, every reduction, uneven batches."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest

from chatloss.errors import RecipeError
from chatloss.parallel import World
from tests.ranks import on_ranks

pytestmark = pytest.mark.peer
MODEL = "llama"


def as_torchrun(world: World) -> None:
    """What torchrun puts into the environment, which is how accelerate finds its ranks."""
    os.environ.update(
        RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.rank), MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false",
    )
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()


def judged(world: World) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Differences of trainers with our loss, of the same trainers without it, and of a loop of one's own."""
    as_torchrun(world)
    import transformers

    from chatloss import hf
    from tests.synthetic import FAMILIES, chats, per_turn
    from tests.test_hf import REDUCTIONS, arguments
    from tests.torch_reference import tiny

    loop = looped()
    folder = tempfile.mkdtemp()
    exact: dict[str, float] = {}
    cuts = [(8, False, True, 2, True), (7, False, False, 2, False), (7, True, True, 3, True),
            (3, False, False, 8, True), (3, False, True, 8, False)]
    for i, reduction in enumerate(REDUCTIONS):
        for count, split, packed, size, average in (cuts[i % 5], cuts[(i + 2) % 5]):
            examples = chats(count)
            rows = hf.dataset([per_turn(rows) for rows in examples] if split else examples, reduction)
            settings = arguments(folder, per_device_train_batch_size=size, average_tokens_across_devices=average)
            report = hf.verify(
                lambda model, settings=settings, rows=rows, packed=packed: hf.ExactTrainer(
                    model, settings, train_dataset=rows, data_collator=hf.Collator(packed)),
                tiny(FAMILIES[MODEL]), examples, reduction,
            )
            name = f"{reduction} {len(rows)} rows {packed=} {size=} {average=}"
            exact[name] = report.verdicts[0].difference
    padding = transformers.DataCollatorForSeq2Seq(_tokenizer(), padding=True)
    builds = {
        f"{count} rows {average=}": (count, lambda model, count=count, average=average: transformers.Trainer(
            model, arguments(folder, average_tokens_across_devices=average), data_collator=padding,
            train_dataset=hf.dataset(chats(count))))
        for count in (8, 7) for average in (True, False)
    }
    plain = {name: hf.verify(build, tiny(FAMILIES[MODEL]), chats(count)).verdicts[0].difference
             for name, (count, build) in builds.items()}
    return exact, plain, loop


def _tokenizer() -> Any:
    from benchmarks.training import _tokenizer as words

    from tests.synthetic import VOCAB

    return words(VOCAB)


def looped() -> dict[str, float]:
    """Differences of an accelerate loop, and what the loop says where it cannot know the repeated rows."""
    from accelerate import Accelerator, DataLoaderConfiguration
    from torch.utils.data import DataLoader

    from chatloss import hf
    from chatloss.models import PureFloat64
    from chatloss.reduction import Reduction
    from chatloss.verify import definition, judge
    from tests.synthetic import FAMILIES, chats
    from tests.torch_reference import tiny

    out = {}
    # The third skips a batch of 2 rows on each rank, as a resumed run does; the last leaves ranks with 2 and 1 rows.
    for count, steps, skipped, even in ((8, 1, 0, True), (7, 4, 0, True), (7, 1, 1, True), (3, 1, 0, True),
                                        (7, 1, 0, False)):
        dispatch = DataLoaderConfiguration(even_batches=even)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, dataloader_config=dispatch)
        model = tiny(FAMILIES[MODEL])
        loader = DataLoader(hf.dataset(chats(count), "turn"), batch_size=2, collate_fn=hf.Collator())
        prepared, loader = accelerator.prepare(model, loader)
        if skipped:
            loader = accelerator.skip_first_batches(loader, skipped)
        with PureFloat64():
            for window in hf.windows(loader, 10):
                hf.backward(accelerator, prepared, window)
            own = chats(count)[4 * skipped :]
            reference = definition(tiny(FAMILIES[MODEL]), own, Reduction.parse("turn"))
        got = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
        [verdict] = judge(lambda gradient: gradient, {"loop": got}, reference)
        out[f"{count} rows, G={steps}, {skipped=}, {even=}"] = verdict.difference
    with pytest.raises(RecipeError, match=r"hf\.windows"):
        hf.backward(accelerator, prepared, list(loader))
    return out


def test_two_ranks_have_the_definitions_gradient_and_others_are_measured() -> None:
    exact, plain, loop = on_ranks(2, judged)
    assert len(exact) == 12 and max(exact.values()) <= 1e-12, exact
    assert len(loop) == 5 and max(loop.values()) <= 1e-12, loop
    assert plain["8 rows average=True"] <= 1e-12
    assert plain["8 rows average=False"] > 0.01, "each rank's own mean, averaged"
    assert plain["7 rows average=True"] > 0.01, "the last batch repeats a row"
