"""The trainer: a recipe and encoded examples in, a model directory out. Read it from top to bottom."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from chatloss import checkpoint
from chatloss.batch import Document, GlobalBatch, Layout, global_batches
from chatloss.config import Optim, Recipe, differences
from chatloss.errors import RecipeError
from chatloss.evaluate import greedy
from chatloss.log import Logger
from chatloss.loss.model import TokenLoss
from chatloss.models import caveats, head_difference, isolation_difference, load_model
from chatloss.objective import first_documents
from chatloss.objectives import objective_of, refer
from chatloss.parallel import World, join_world
from chatloss.references import Machine
from chatloss.step import blame, clip_gradient, gradient

__all__ = ["TrainResult", "learning_rate", "train"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a run ended. `loss` is that of its last step, `eval` the last evaluation; `model` the Hugging Face directory.

    `skipped` counts the steps that had nothing to train; `notes` is what the run said about itself.
    """

    steps: int
    skipped: int
    loss: float
    eval: dict[str, Any]
    samples: tuple[str, ...]
    notes: tuple[str, ...]
    model: Path
    metrics: Path


def train(
    recipe: Recipe, train_examples: Sequence[Any], eval_examples: Sequence[Any] | None = None, *,
    tokenizer_files: Callable[[Path], None], decode: Callable[[Sequence[int]], str],
    prompts: Sequence[Sequence[int]] = (), stop_ids: Sequence[int] = (), vocab_size: int | None = None,
    fresh: bool = False, quiet: bool = False,
) -> TrainResult:
    """Trains a model on encoded examples: all rows of a conversation, a `Pair` or a `Judged` answer, by the objective.

    `tokenizer_files` writes the tokenizer and chat template into a checkpoint directory. `prompts` are ids to answer at
    evaluations, `stop_ids` where answers end. `vocab_size` is for a random model whose config has none. Under
    ``torchrun`` every rank calls this with the same arguments. If ``recipe.output`` holds a checkpoint of the same
    recipe and data, the run continues from it; `fresh` starts anew. Raises `RecipeError` and `DataError`.
    """
    with join_world() as world:
        run = _Run(recipe, train_examples, eval_examples or (), world, tokenizer_files, decode, prompts, stop_ids,
                   vocab_size, fresh, quiet)
        try:
            return run.run()
        finally:
            if run.logger is not None:
                run.logger.close()


class _Run:
    """One training run, in the order in which things happen."""

    def __init__(
        self, recipe: Recipe, examples: Sequence[Any], eval_examples: Sequence[Any],
        world: World, tokenizer_files: Callable[[Path], None], decode: Callable[[Sequence[int]], str],
        prompts: Sequence[Sequence[int]], stop_ids: Sequence[int], vocab_size: int | None, fresh: bool, quiet: bool,
    ) -> None:
        if not recipe.output:
            raise RecipeError("the recipe names no output directory", where="output", hint="set output = 'runs/first'")
        self.recipe, self.world = recipe, world
        self.examples, self.eval_examples = examples, eval_examples
        self.tokenizer_files, self.decode, self.stop_ids = tokenizer_files, decode, stop_ids
        self.prompts = prompts[: recipe.run.samples or len(prompts)]
        self.output = Path(recipe.output)
        self.checkpoints = self.output / "checkpoints"
        self.notes: list[str] = []
        self.objective = objective_of(recipe)
        self.autocast = torch.bfloat16 if recipe.run.dtype == "bfloat16" else None

        self.survey = self.objective.survey(examples)
        if len(set(world.gather(self.survey.digest))) > 1:
            raise RecipeError("the ranks do not hold the same examples", where="data.train")
        self.total = self._total_steps()
        nothing = self.survey.trained.count(0)
        if nothing:
            self.notes.append(f"{nothing} of {len(examples)} conversations train nothing and count in no mean")
        self.resumed, self.state = self._begin() if fresh else self._continue()
        self.loss = self._token_loss(load_model(recipe, self.resumed, vocab_size))
        whole = getattr(self.loss.inner, "_no_split_modules", None) or ()
        layers = [layer for layer in self.loss.modules() if type(layer).__name__ in whole]
        self.module = world.wrap(self.loss, recipe.run.parallel, layers)
        self.optimizer = _optimizer(self.loss, recipe.optim)
        self.layout = self._layout()
        self._compare(vocab_size)
        if self.resumed is not None:
            checkpoint.load_optimizer(self.resumed, self.loss, self.optimizer)
        self.logger = None
        if fresh and world.rank == 0:  # only now, when everything that could be refused has been
            checkpoint.remove(self.checkpoints, self.output / "model", self.output / "metrics.jsonl")
        if world.rank == 0:
            self.logger = Logger(self.output / "metrics.jsonl", self.total, step=self.state["step"],
                                 extra=recipe.run.log, quiet=quiet)

    def run(self) -> TrainResult:
        """The loop: one global batch, one exact gradient, one update."""
        recipe, state = self.recipe, self.state
        for note in self.notes:
            self._log("notice", {"text": note})
        if state["step"] == 0 and (recipe.run.eval_every or self.prompts):
            self._evaluate()
        for batch in islice(self._batches(), self.total - state["step"]):
            began = time.perf_counter()
            step = state["step"]
            work = self.objective.work([self.examples[i] for i in batch.examples], self.layout, self.module, self.world,
                                       self.autocast)
            # Noise (dropout) is a function of seed, step and rank, so that no generator's state needs to be saved.
            torch.manual_seed(_noise_seed(recipe.seed, step, self.world.rank))
            result = gradient(self.module, work.micro_batches, work.denominators, self.world, autocast=self.autocast,
                              moe_aux=bool(self.loss.moe_aux), terms=work.terms)
            rate = learning_rate(step, self.total, recipe.optim)
            norm = 0.0
            if not result.skipped:
                norm = clip_gradient(self.loss, recipe.optim.max_grad_norm)
                if not math.isfinite(norm):
                    raise blame(self.module, work.micro_batches, self.world, self.autocast)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
            state |= {"step": step + 1, "epoch": batch.epoch, "position": batch.end,
                      "skipped": state["skipped"] + result.skipped, "tokens": state["tokens"] + result.tokens,
                      "loss": result.loss}
            seconds = time.perf_counter() - began
            self._log("step", {
                "loss": result.loss, "lr": rate, "grad_norm": norm, "tokens": result.tokens, "epoch": batch.epoch,
                "examples": len(batch.examples), "denominator": result.denominators[0], "skipped": result.skipped,
                "inputs": result.inputs, "computed": result.computed, "seconds": seconds,
                **({"moe_aux": result.terms[-1]} if self.loss.moe_aux else {}),
                **({} if result.skipped else self.objective.metrics(result.measures)),
            })
            last = step + 1 == self.total
            if last or (recipe.run.eval_every and (step + 1) % recipe.run.eval_every == 0):
                self._evaluate()
            if last or (recipe.run.save_every and (step + 1) % recipe.run.save_every == 0):
                self._save()
        checkpoint.save(self.output / "model", self.loss, self.world, tokenizer_files=self.tokenizer_files,
                        stop_ids=self.stop_ids)
        return TrainResult(state["step"], state["skipped"], state["loss"], state["eval"], tuple(state["samples"]),
                           tuple(self.notes), self.output / "model", self.output / "metrics.jsonl")

    # -- before the first step ------------------------------------------------------------------------------------

    def _total_steps(self) -> int:
        run, n = self.recipe.run, len(self.survey.trained)
        if sum(self.survey.trained) == 0:
            raise RecipeError("no token of the data is trained", where="data.train", hint="look with `chatloss check`")
        if run.steps is not None:
            return run.steps
        epochs = 1.0 if run.epochs is None else run.epochs
        batches = self._batches(start=(0, 0))
        return sum(1 for _ in _until(batches, epochs, n))

    def _batches(self, start: tuple[int, int] | None = None) -> Iterator[GlobalBatch]:
        batch = self.recipe.batch
        examples = batch.examples or (None if batch.tokens else 32)
        epoch, position = start or (self.state["epoch"], self.state["position"])
        return global_batches(self.survey.trained, examples=examples, tokens=batch.tokens, seed=self.recipe.seed,
                              epoch=epoch, position=position)

    def _begin(self) -> tuple[None, dict[str, Any]]:
        """No checkpoint, and the state before the first step."""
        return None, {"step": 0, "epoch": 0, "position": 0, "skipped": 0, "tokens": 0, "loss": 0.0, "eval": {},
                      "samples": [], "total": self.total, "data": self.survey.digest, "recipe": self.recipe.to_dict()}

    def _continue(self) -> tuple[Path | None, dict[str, Any]]:
        """The newest checkpoint and its state, if there is one; it must be of this recipe and data."""
        if self.world.rank == 0:
            checkpoint.prune(self.checkpoints, self.recipe.run.keep)
        self.world.barrier()
        found = checkpoint.latest(self.checkpoints)
        if found is None:
            return self._begin()
        state = checkpoint.state_of(found)
        changed = differences(state["recipe"], self.recipe.to_dict())
        if state["data"] != self.survey.digest:
            changed.append("the encoded training data")
        if changed:
            raise RecipeError(
                f"{found} was made with another recipe: {'; '.join(changed)}", where=self.recipe.output,
                hint="restore the recipe, choose another output, or start anew with --fresh",
            )
        self.notes.append(f"continuing from {found} (step {state['step']} of {self.total})")
        return found, state

    def _token_loss(self, model: Any) -> TokenLoss:
        """The model with its loss, after a look at what its head and its experts do."""
        loss = TokenLoss(model, per_token=self.objective.per_token)
        rows = int(model.get_input_embeddings().weight.shape[0])
        if self.survey.largest_id >= rows:
            raise RecipeError(
                f"the data holds token id {self.survey.largest_id}, the model has {rows} embeddings", where="tokenizer",
                hint="use the tokenizer that belongs to this model",
            )
        config = loss.inner.config.get_text_config()
        aux = self.recipe.loss.moe_aux
        if aux is None and getattr(config, "output_router_logits", False):
            aux = config.router_aux_loss_coef
        loss.moe_aux = aux or 0.0
        difference = head_difference(loss.inner, self._first_documents()[0].input_ids[:64].tolist())
        if difference:
            loss.own_logits = True
            self.notes.append(f"the model's own logits are used: {difference}")
        self.notes += caveats(model, loss.moe_aux)
        return loss

    def _layout(self) -> Layout:
        """How global batches are cut: packed if documents are isolated on this machine, else padded."""
        batch = self.recipe.batch
        packing = batch.packing
        if packing == "best_fit":
            leak = isolation_difference(self.loss, self._first_documents(), self.module)
            if any(self.world.gather(leak)):
                packing = "none"
                self.notes.append(f"packing is off, rows are padded instead: {leak}")
        micro_tokens, survey = batch.micro_tokens, self.survey
        most = survey.longest if packing == "best_fit" else survey.widest
        if micro_tokens is None and batch.micro_rows is None:
            micro_tokens = max(4096, most)
        layout = Layout(
            ranks=self.world.size, micro_tokens=micro_tokens, micro_rows=batch.micro_rows, packing=packing,
            pack_tokens=most,
            quadratic=1.0 / (6.0 * self.loss.inner.config.get_text_config().hidden_size),
        )
        layout.plan([most])  # refuses rows that do not fit, now and not in mid-run
        layout.plan([1] * survey.rows, [0] * survey.rows)
        return layout

    def _compare(self, vocab_size: int | None) -> None:
        """What a preference objective needs of its reference model."""
        machine = Machine(self.layout, self.world, self.autocast)
        referred = refer(self.objective, self.recipe, self.loss, self.examples, self.eval_examples, machine, vocab_size,
                         self.state.get("reference", ""))
        self.objective, self.examples = referred.objective, referred.examples
        self.eval_examples = referred.eval_examples
        if referred.fingerprint:
            self.state["reference"] = referred.fingerprint

    def _first_documents(self) -> list[Document]:
        return first_documents(self.objective, self.examples)

    # -- in the loop ----------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Measures and logs; the newest values are part of the state."""
        if self.eval_examples:
            values = self.objective.evaluate(self.module, self.eval_examples, self.layout, self.world, self.autocast)
            self._log("eval", values)
            self.state["eval"] = values
        if self.prompts and self.world.rank == 0 and (self.world.size == 1 or self.recipe.run.parallel == "ddp"):
            self.state["samples"] = greedy(self.loss, self.prompts, self.stop_ids, self.decode)
            for text in self.state["samples"]:
                self._log("sample", {"text": text})

    def _save(self) -> None:
        path = self.checkpoints / f"step-{self.state['step']:08d}"
        checkpoint.save(path, self.loss, self.world, tokenizer_files=self.tokenizer_files, stop_ids=self.stop_ids,
                        optimizer=self.optimizer, state=self.state)
        if self.world.rank == 0:
            checkpoint.prune(self.checkpoints, self.recipe.run.keep)

    def _log(self, kind: str, values: dict[str, Any]) -> None:
        if self.logger is not None:
            self.logger.write(kind, self.state["step"], values)


def learning_rate(step: int, total: int, optim: Optim) -> float:
    """The rate of step 0 <= step < total: linear warmup, then the schedule down to ``min_lr * lr``.

    >>> [learning_rate(s, 4, Optim(lr=1.0, schedule="linear", warmup=1)) for s in range(4)]
    [1.0, 1.0, 0.6666666666666667, 0.33333333333333337]
    """
    warmup = int(optim.warmup) if optim.warmup >= 1 else math.ceil(optim.warmup * total)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    share = (step - warmup) / max(total - warmup, 1)
    if optim.schedule == "constant":
        left = 1.0
    elif optim.schedule == "linear":
        left = 1.0 - share
    elif optim.schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * share))
    else:
        left = min(1.0, (total - step) / max(optim.decay * total, 1.0))
    return optim.lr * (optim.min_lr + (1.0 - optim.min_lr) * left)


def _optimizer(loss: TokenLoss, optim: Optim) -> torch.optim.Optimizer:
    """AdamW or SGD; matrices decay, gains and biases do not."""
    parameters = [parameter for parameter in loss.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in parameters if p.ndim >= 2], "weight_decay": optim.weight_decay},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum)
    betas = (optim.betas[0], optim.betas[1])
    return torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)


def _noise_seed(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=7).digest(), "big")


def _until(batches: Iterator[GlobalBatch], epochs: float, n: int) -> Iterator[GlobalBatch]:
    """Batches that begin before `epochs` passes over n examples are over."""
    for batch in batches:
        if batch.epoch + batch.start / n >= epochs:
            return
        yield batch
