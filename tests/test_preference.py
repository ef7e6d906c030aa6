"""Preference objectives through the real step: exact however a batch is cut, moved by nothing but trained tokens."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chatloss import checkpoint, references
from chatloss.answers import answer_documents, document_logps
from chatloss.batch import Layout, MicroBatch
from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.loss.model import TokenLoss
from chatloss.loss.preference import LOSSES
from chatloss.models import PureFloat64
from chatloss.objectives import objective_of
from chatloss.pairs import Answer, Pair
from chatloss.parallel import World
from chatloss.references import Machine, adapter_off_reference, cached_logps, fingerprint_of
from chatloss.sample import Sample
from chatloss.step import gradient
from chatloss.trainer import TrainResult, train
from chatloss.verify import verify
from tests import crash
from tests.ranks import on_ranks
from tests.synthetic import FAMILIES, VOCAB, decode, tokenizer_files
from tests.synthetic_pairs import answer, judged, pairs
from tests.torch_reference import difference, gradient_of, tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def recipe(loss: str = "sigmoid", **changes: Any) -> Recipe:
    dpo = {"loss": loss, **changes.pop("dpo", {})}
    return Recipe.from_dict({"objective": "dpo", "model": FAMILIES["llama"], "init": "random", "dpo": dpo,
                             "batch": {"examples": 4}, **changes})


LAYOUTS = {
    "pair by pair": Layout(micro_rows=2, packing="none"), "padded by 6": Layout(micro_rows=6, packing="none"),
    "padded": Layout(micro_tokens=1000, packing="none"), "packed by 110": Layout(micro_tokens=110),
    "one pack": Layout(micro_tokens=2000), "packs of 120 by 2": Layout(micro_rows=2, pack_tokens=120),
}


def step(
    model: Any, loss: str, examples: Sequence[Any], layout: Layout, own_logits: bool = False, **dpo: Any
) -> tuple[Any, Any]:
    """(result, gradient) of the real step."""
    model = copy.deepcopy(model)
    objective = objective_of(recipe(loss, dpo=dpo))
    module = TokenLoss(model, own_logits=own_logits, per_token=True)
    with PureFloat64():
        work = objective.work(examples, layout, module, World())
        result = gradient(module, work.micro_batches, work.denominators, World(), terms=work.terms)
    return result, gradient_of(model)


def defined(model: Any, loss: str, examples: Sequence[Any], **dpo: Any) -> Any:
    model = copy.deepcopy(model)
    with PureFloat64():
        objective_of(recipe(loss, dpo=dpo)).definition(model, examples)
    return gradient_of(model)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_has_one_gradient_however_a_batch_of_pairs_is_cut(loss: str) -> None:
    model, examples = tiny(FAMILIES["llama"]), pairs(6)
    want = defined(model, loss, examples)
    values = set()
    for layout in LAYOUTS.values():
        result, got = step(model, loss, examples, layout)
        assert difference(got, want) < 1e-12
        values.add(round(result.loss, 10))
    assert len(values) == 1


def test_kto_has_one_gradient_and_one_baseline_however_its_batch_is_cut() -> None:
    model, examples = tiny(FAMILIES["llama"]), judged(4)
    want = defined(model, "kto", examples)
    kl = set()
    for layout in LAYOUTS.values():
        result, got = step(model, "kto", examples, layout)
        assert difference(got, want) < 1e-12
        kl.add(round(objective_of(recipe("kto")).metrics(result.measures)["kl"], 9))
    assert len(kl) == 1 and kl.pop() > 0.1


@pytest.mark.parametrize("settings", [
    {"nll": 0.7}, {"nll": 1.0, "nll_tokens": "all"}, {"nll": 0.3, "nll_reduction": "turn"},
    {"nll": 2.0, "nll_reduction": "sum:conversation"},
])
def test_the_nll_of_chosen_answers_has_a_denominator_of_its_own(settings: dict[str, Any]) -> None:
    # TRL's "sft" term divides by the tokens of the micro-batch: 0.34 relative error over accumulation.
    model, examples = tiny(FAMILIES["llama"]), pairs(5)
    want = defined(model, "sigmoid", examples, **settings)
    for layout in LAYOUTS.values():
        result, got = step(model, "sigmoid", examples, layout, **settings)
        assert difference(got, want) < 1e-12
    counts = {
        0.7: sum(pair.chosen.n_trained for pair in examples),
        1.0: sum(np.flatnonzero(pair.chosen.rows[0].weights)[-1] for pair in examples),
        0.3: sum(len({*pair.chosen.rows[0].turns} - {-1}) for pair in examples), 2.0: 5,
    }
    assert result.denominators == (5.0, float(counts[settings["nll"]]))
    assert result.loss == pytest.approx(sum(result.terms))


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "mixtral"])
def test_models_with_their_own_logits_tied_heads_and_experts_are_exact(family: str) -> None:
    model, examples = tiny(FAMILIES[family]), pairs(4)
    want = defined(model, "sigmoid", examples)
    for layout in (LAYOUTS["pair by pair"], LAYOUTS["one pack"]):
        _, got = step(model, "sigmoid", examples, layout, own_logits=family == "gemma2")
        assert difference(got, want) < 1e-12


@pytest.mark.parametrize("loss", ["sigmoid", "orpo", "ipo_mean"])
def test_verify_passes_for_preferences(loss: str) -> None:
    report = verify(recipe(loss, batch={"examples": 7}), {"auto": pairs(8)}, ranks=(1,))
    assert report.passed, report.table()
    assert len(report.verdicts) == 12 and report.examples == 7


def test_verify_passes_for_kto_and_adapters() -> None:
    assert verify(recipe("kto", lora={"rank": 2}), {"auto": judged(4)}, ranks=(1,)).passed


@pytest.mark.slow
@pytest.mark.parametrize("loss", [*sorted(LOSSES), "kto"])
def test_every_loss_passes_on_one_two_and_four_ranks(loss: str) -> None:
    examples: Any = judged(5) if loss == "kto" else pairs(7)
    report = verify(recipe(loss), {"auto": examples}, ranks=(1, 2, 4))
    assert report.passed, report.table()


# -- isolation ---------------------------------------------------------------------------------------------------------


def shuffled(one: Answer, seed: int, prompt: bool, behind: bool) -> Answer:
    """The answer with other ids in its untrained tokens behind the last trained one, or in its prompt."""
    [only] = one.rows
    ids = only.input_ids.copy()
    trained = np.flatnonzero(only.weights)
    random = np.random.default_rng(seed)
    if behind:
        ids[trained[-1] + 1 :] = random.integers(0, VOCAB, len(ids) - trained[-1] - 1)
    if prompt:
        ids[: trained[0]] = random.integers(0, VOCAB, trained[0])
    return replace(one, rows=(Sample(ids, only.spans, only.outcomes, only.source),))


def logps(model: Any, answers: Sequence[Answer], layout: Layout) -> np.ndarray:
    documents = [d for k, one in enumerate(answers) for d in answer_documents(one, k)]
    return document_logps(TokenLoss(model, per_token=True), documents, layout, World())


@pytest.mark.parametrize("layout", ["packed by 110", "one pack", "padded"])
def test_a_log_probability_is_moved_by_no_pack_neighbour_no_padding_and_nothing_behind_the_answer(layout: str) -> None:
    model = tiny(FAMILIES["llama"])
    answers = [side for pair in pairs(4) for side in (pair.chosen, pair.rejected)]
    before = logps(model, answers, LAYOUTS[layout])
    for k in range(len(answers)):
        other = [one if i == k else shuffled(one, i, prompt=True, behind=True) for i, one in enumerate(answers)]
        other[k] = shuffled(answers[k], k, prompt=False, behind=True)
        assert logps(model, other, LAYOUTS[layout])[k] == pytest.approx(before[k], rel=1e-13)


def test_prompt_tokens_are_context_and_never_summed() -> None:
    # The nll of prompt tokens is not even computed: nothing asks for it.
    [pair] = pairs(1)
    documents = objective_of(recipe()).documents(pair)
    for document, one in zip(documents, (pair.chosen, pair.rejected), strict=True):
        wanted = document.target_ids != -100
        assert wanted.sum() == one.n_trained == (document.weights != 0).sum()
        assert wanted.tolist() == (one.rows[0].weights[1 : len(document) + 1] != 0).tolist()


def test_the_gradient_of_an_input_that_only_padding_or_the_end_of_a_row_holds_is_zero() -> None:
    model = tiny({**FAMILIES["llama"], "tie_word_embeddings": False})
    unused = VOCAB - 1
    examples = []
    for pair in pairs(3):
        sides = []
        for one in (pair.chosen, pair.rejected):
            [only] = one.rows
            ids = np.minimum(only.input_ids, unused - 1)
            ids[np.flatnonzero(only.weights)[-1] + 1 :] = unused
            sides.append(replace(one, rows=(Sample(ids, only.spans, only.outcomes, only.source),)))
        examples.append(replace(pair, chosen=sides[0], rejected=sides[1]))
    for layout in LAYOUTS.values():
        _, got = step(model, "sigmoid", examples, layout)
        assert not got["model.embed_tokens.weight"][unused].any()


# -- what peers got wrong (FIELD) --------------------------------------------------------------------------------------


def test_accumulation_does_not_multiply_the_gradient() -> None:
    # trl#2615 (DPO), trl#3716 (ORPO): G micro-batches gave G times the gradient.
    model, examples = tiny(FAMILIES["llama"]), pairs(4)
    for loss in ("sigmoid", "orpo"):
        one, whole = step(model, loss, examples, LAYOUTS["one pack"])
        four, cut = step(model, loss, examples, LAYOUTS["pair by pair"])
        assert difference(cut, whole) < 1e-12
        assert math.isclose(one.loss, four.loss, rel_tol=1e-12)


def test_ipo_divides_by_the_trained_tokens_of_an_answer_and_not_by_its_pack_or_row() -> None:
    # ms-swift#9925: IPO divided by the length of the packed row.
    model, examples = tiny(FAMILIES["llama"]), pairs(3)
    packed, _ = step(model, "ipo_mean", examples, LAYOUTS["one pack"])
    apart, _ = step(model, "ipo_mean", examples, LAYOUTS["pair by pair"])
    assert math.isclose(packed.loss, apart.loss, rel_tol=1e-12)
    longer = [replace(pair, chosen=_with_longer_prompt(pair.chosen)) for pair in examples]
    first = objective_of(recipe("ipo_mean")).documents(longer[0])[0]
    assert (first.weights != 0).sum() == examples[0].chosen.n_trained


def _with_longer_prompt(one: Answer) -> Answer:
    [only] = one.rows
    spans = [span._replace(start=span.start + 5, end=span.end + 5) for span in only.spans]
    spans[0] = spans[0]._replace(start=0)
    ids = np.concatenate([np.arange(5, dtype=np.int32), only.input_ids])
    return replace(one, rows=(Sample(ids, tuple(spans), only.outcomes, only.source),))


def test_only_trained_tokens_are_averaged_and_the_mask_is_shifted_once() -> None:
    # minimind#279, #298, #659: log-probabilities averaged over prompt and padding. minimind#621: a mask off by one.
    model, [pair] = tiny(FAMILIES["llama"]), pairs(1)
    [only] = pair.chosen.rows
    ids = torch.from_numpy(only.input_ids.astype("int64"))
    with PureFloat64():
        logp = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    by_hand = sum(logp[t - 1, ids[t]].item() for t in range(1, len(ids)) if only.weights[t])
    result, _ = step(model, "simpo", [pair], LAYOUTS["padded"])
    mean = objective_of(recipe("simpo")).metrics(result.measures)["logp/chosen"]
    assert math.isclose(mean, by_hand / pair.chosen.n_trained, rel_tol=1e-12)


def test_whole_sequence_averages_give_another_gradient() -> None:
    # The worked example of docs/preference.md: the same pair behind a short and a long prompt.
    model = tiny(FAMILIES["llama"])
    n, m, prompt = 2, 10, 30
    # Averaging over a row of `prompt + n` tokens scales a side by n / (prompt + n): each by another factor.
    shares = [n / (prompt + n), m / (prompt + m)]
    assert shares[1] / shares[0] == pytest.approx(4.0)
    pair = Pair(answer(np.arange(prompt), [n], 1, reference=-8.0), answer(np.arange(prompt), [m], 2, reference=-41.0))
    _, right = step(model, "sigmoid_norm", [pair], LAYOUTS["padded"])
    wrong = copy.deepcopy(model)
    sides = []
    for one, share in ((pair.chosen, shares[0]), (pair.rejected, shares[1])):
        [document] = answer_documents(one, 0)
        _, nll = TokenLoss(wrong, per_token=True)(*_tensors(document))
        sides.append(share * (-nll.sum() - (one.reference or 0.0)) / one.n_trained)
    (-torch.nn.functional.logsigmoid(5.0 * (sides[0] - sides[1]))).backward()
    got = gradient_of(wrong)
    cosine = sum(float((got[k] * right[k]).sum()) for k in right) / math.sqrt(
        sum(float((got[k] ** 2).sum()) for k in right) * sum(float((right[k] ** 2).sum()) for k in right))
    assert cosine < 0.99


def _tensors(document: Any) -> Any:
    from chatloss.step import tensors

    return tensors(MicroBatch.build([[document]]), torch.nn.Linear(1, 1, dtype=torch.float64), torch.device("cpu"))


# -- reference ---------------------------------------------------------------------------------------------------------


def run(output: Path, loss: str = "sigmoid", examples: Any = None, fresh: bool = False, evaluated: Any = None,
        **changes: Any) -> TrainResult:
    settings = {"output": str(output), "run": {"steps": 4}, "optim": {"lr": 0.01}, "seed": 5, **changes}
    given = examples if examples is not None else pairs(8, references=False)
    return train(recipe(loss, **settings), given, evaluated, tokenizer_files=tokenizer_files, decode=decode, quiet=True,
                 fresh=fresh)


def records(result: TrainResult, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines if line["kind"] == kind]


def test_precomputed_and_frozen_references_give_the_same_run(tmp_path: Path) -> None:
    a = run(tmp_path / "a")
    b = run(tmp_path / "b", dpo={"reference": "frozen"})
    for one, other in zip(records(a), records(b), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert records(a)[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert records(a)[-1]["loss"] < 0.5


def test_adapters_switched_off_are_the_reference(tmp_path: Path) -> None:
    a = run(tmp_path / "a", lora={"rank": 4})
    b = run(tmp_path / "b", lora={"rank": 4}, dpo={"reference": "adapter_off"})
    for one, other in zip(records(a), records(b), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    with pytest.raises(RecipeError, match="no adapters to switch off"):
        run(tmp_path / "c", dpo={"reference": "adapter_off"})


def test_the_cache_is_used_again_and_made_anew_where_model_or_data_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    original = references.document_logps

    def counted(module: Any, documents: Any, *rest: Any) -> Any:
        looked.append(len(documents))
        return original(module, documents, *rest)

    monkeypatch.setattr(references, "document_logps", counted)
    cache = {"dpo": {"cache": str(tmp_path / "cache")}}
    run(tmp_path / "a", **cache)
    assert looked == [16]
    run(tmp_path / "b", **cache, optim={"lr": 0.1})  # another rate, the same reference
    assert looked == [16]
    run(tmp_path / "c", **cache, seed=6)  # another model
    assert looked == [16, 16]
    run(tmp_path / "d", examples=pairs(9, references=False), **cache)  # other data
    assert looked == [16, 16, 18]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 3


def test_a_killed_computation_goes_on_behind_the_last_whole_part(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(references, "PART", 4)
    answers = [side for pair in pairs(6, references=False) for side in (pair.chosen, pair.rejected)]
    seen: list[int] = []

    def reference(fail_after: int) -> Any:
        def looking(documents: Any) -> Any:
            if len(seen) == fail_after:
                raise KeyboardInterrupt
            seen.append(len(documents))
            return np.array([float(document.input_ids.sum()) for document in documents])
        return lambda: looking

    with pytest.raises(KeyboardInterrupt):
        cached_logps(answers, tmp_path, "f", reference(2), World())
    assert seen == [4, 4] and len(list(tmp_path.glob("*.npy"))) == 2
    values = cached_logps(answers, tmp_path, "f", reference(-1), World())
    assert seen == [4, 4, 4]
    assert values.tolist() == [float(one.rows[0].input_ids[: _end(one)].sum()) for one in answers]
    assert (cached_logps(answers, tmp_path, "f", reference(0), World()) == values).all()  # nothing is asked for


def _end(one: Answer) -> int:
    return int(np.flatnonzero(one.rows[0].weights)[-1])


def test_a_damaged_cache_is_an_error_and_no_pickle_is_ever_loaded(tmp_path: Path) -> None:
    answers = [pair.chosen for pair in pairs(2, references=False)]

    def reference() -> Any:
        return lambda documents: np.ones(len(documents))

    cached_logps(answers, tmp_path, "f", reference, World())
    [file] = tmp_path.glob("*.npy")
    np.save(file, np.array([{"evil": 1}, None], dtype=object), allow_pickle=True)
    for content in (None, b"", b"garbage"):
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(RecipeError, match="cannot read cached") as error:
            cached_logps(answers, tmp_path, "f", reference, World())
        assert "delete this file" in error.value.hint


def test_the_fingerprint_is_that_of_weights_configuration_and_precision() -> None:
    model = tiny(FAMILIES["llama"])
    same = tiny(FAMILIES["llama"])
    other = tiny(FAMILIES["llama"], seed=1)
    assert fingerprint_of(model, None) == fingerprint_of(same, None)
    prints = {fingerprint_of(model, None), fingerprint_of(other, None), fingerprint_of(model, torch.bfloat16)}
    model.config.rms_norm_eps = 0.1
    assert len(prints | {fingerprint_of(model, None)}) == 4


# -- the trainer -------------------------------------------------------------------------------------------------------


def test_metrics_are_those_people_expect_and_hold_by_hand(tmp_path: Path) -> None:
    result = run(tmp_path / "a", evaluated=pairs(3, seed=7, references=False), run={"steps": 3, "eval_every": 1})
    first, *_, last = records(result)
    assert {"reward/chosen", "reward/rejected", "margin", "accuracy", "logp/chosen", "logp/rejected",
            "log_ratio/chosen", "log_ratio/rejected"} <= first.keys()
    assert first["margin"] == pytest.approx(0.0, abs=1e-4)
    assert last["margin"] == pytest.approx(last["reward/chosen"] - last["reward/rejected"])
    assert last["margin"] > 0.2 and last["accuracy"] == 1.0
    assert last["denominator"] == 4.0
    evaluated = records(result, "eval")
    assert len(evaluated) == 4 and evaluated[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert result.eval["tokens"] == sum(
        side.n_trained for pair in pairs(3, seed=7, references=False) for side in (pair.chosen, pair.rejected))


def test_held_out_pairs_may_be_longer_than_any_micro_batch_of_the_training_data(tmp_path: Path) -> None:
    longer = pairs(3, seed=7, most=60, references=False)
    for mode in ("precomputed", "frozen"):
        result = run(tmp_path / mode, evaluated=longer, batch={"examples": 4, "micro_tokens": 90},
                     run={"steps": 1, "eval_every": 1}, dpo={"reference": mode})
        assert records(result, "eval")[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)


@pytest.mark.parametrize("loss", ["kto", "orpo", "apo_down"])
def test_other_objectives_train(tmp_path: Path, loss: str) -> None:
    examples = judged(5, references=False) if loss == "kto" else None
    result = run(tmp_path / "a", loss, examples, run={"steps": 8, "eval_every": 8},
                 evaluated=judged(2, 3, references=False) if loss == "kto" else pairs(2, 3, references=False))
    assert records(result)[-1]["margin"] > records(result)[0]["margin"]
    assert math.isfinite(result.eval["loss"])


def test_packing_and_micro_batches_change_nothing_about_a_run(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(i), batch={"examples": 4, **batch}, run={"steps": 3, "dtype": "float64"})
            for i, batch in enumerate([{}, {"packing": "none", "micro_rows": 2}, {"micro_tokens": 120}])]
    for others in runs[1:]:
        for one, other in zip(records(runs[0]), records(others), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-10)
            assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-9)


def test_a_pair_that_no_micro_batch_can_hold_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="does not fit"):
        run(tmp_path / "a", batch={"examples": 4, "micro_tokens": 30})
    with pytest.raises(RecipeError, match="rows belong together"):
        run(tmp_path / "a", batch={"examples": 4, "micro_rows": 1, "packing": "none"})


def test_a_run_that_stops_goes_on_in_the_same_bits(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", run={"steps": 6, "save_every": 2})
    cut = tmp_path / "cut"
    run(cut, run={"steps": 6, "save_every": 2})
    checkpoint.remove(*sorted((cut / "checkpoints").glob("step-*"))[-1:], cut / "model")
    again = run(cut, run={"steps": 6, "save_every": 2})
    assert "continuing" in " ".join(again.notes)
    assert records(whole) == records(again)
    weights = [path / "model" / "model.safetensors" for path in (tmp_path / "whole", cut)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize(("changes", "what"), [
    ({"dpo": {"beta": 0}}, "not positive"), ({"dpo": {"label_smoothing": 0.5}}, "below one half"),
    ({"dpo": {"loss": "ipo", "label_smoothing": 0.1}}, "has no label_smoothing"),
    ({"dpo": {"loss": "simpo", "reference": "frozen"}}, "has no reference"),
    ({"dpo": {"loss": "kto", "nll": 1.0}}, "has no nll"), ({"dpo": {"nll": -1.0}}, "negative"),
    ({"loss": {"reduction": "turn"}}, "the unit of a preference loss"),
    ({"objective": "orpo", "dpo": {"loss": "simpo"}}, "differ"), ({"objective": "dpoo"}, "'dpoo' is not known"),
    ({"objective": "sft"}, "no effect on supervised"),
])
def test_settings_that_make_no_sense_are_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what) as error:
        objective_of(Recipe.from_dict({"objective": "dpo", "model": {}, "dpo": {}, **changes}))
    assert error.value.where


def test_every_loss_is_an_objective_by_its_own_name() -> None:
    for name in (*LOSSES, "kto", "APO-zero"):
        assert objective_of(Recipe.from_dict({"objective": name})).per_token


def _spread(world: World, parallel: str, objective: Any, examples: Sequence[Any], adapters: bool = False) -> float:
    """How far the gradient on these ranks is from the definition's."""
    model: Any = tiny(FAMILIES["llama"])
    if adapters:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    module = TokenLoss(model, per_token=True)
    with PureFloat64():
        if adapters:  # the reference is the model itself, looked at before every step
            alone = Machine(Layout(micro_tokens=130), World())
            answers = [side for pair in examples for side in (pair.chosen, pair.rejected)]
            looking = adapter_off_reference(module, alone)
            values = [float(looking(answer_documents(one, 0)).sum()) for one in answers]
            known = [objective.referred(pair, values[2 * i : 2 * i + 2]) for i, pair in enumerate(examples)]
        objective.definition(model, known if adapters else examples)
        want = gradient_of(model)
        model.zero_grad()
        layers = [m for m in module.modules() if type(m).__name__ == "LlamaDecoderLayer"]
        wrapped = world.wrap(module, parallel, layers)
        layout = Layout(world.size, micro_tokens=130)
        if adapters:
            objective = replace(objective, reference=adapter_off_reference(module, Machine(layout, world)))
        work = objective.work(examples, layout, wrapped, world)
        gradient(wrapped, work.micro_batches, work.denominators, world, terms=work.terms)
    return difference(gradient_of(model), want)


def _all_spread(world: World) -> dict[tuple[str, str], float]:
    paired, unpaired = objective_of(recipe(dpo={"nll": 0.5})), objective_of(recipe("kto"))
    out = {}
    for parallel in ("ddp", "fsdp"):
        out[parallel, "pairs"] = _spread(world, parallel, paired, pairs(5))
        out[parallel, "fewer pairs than ranks"] = _spread(world, parallel, paired, pairs(1))
        out[parallel, "kto"] = _spread(world, parallel, unpaired, judged(3))
        out[parallel, "adapters off"] = _spread(world, parallel, paired, pairs(4, references=False), adapters=True)
    return out


def test_ranks_change_nothing_replicated_or_sharded() -> None:
    found = on_ranks(2, _all_spread)
    assert len(found) == 8
    assert max(found.values()) < 1e-12, found


# -- kill -9 -----------------------------------------------------------------------------------------------------------

CRASH = {"objective": "dpo", "batch": {"examples": 3, "micro_tokens": 150}}


@pytest.mark.parametrize("share", [0.01, 0.05, 0.3, 0.6, 0.95])
def test_kill_9_and_the_same_command_again_give_the_same_bytes(whole: Path, tmp_path: Path, share: float) -> None:
    events = int((whole / "events.0").read_text())
    assert crash.run(tmp_path / "run", max(1, round(share * events)), **CRASH) == signal.SIGKILL
    assert crash.run(tmp_path / "run", **CRASH) == 0
    assert crash.outcome(tmp_path / "run") == crash.outcome(whole)
    assert not list((tmp_path / "run" / "reference").glob(".*"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert crash.run(output, **CRASH) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"objective": "kto"}, {"dpo": {"reference": "frozen"}}, {"dpo": {"reference": "adapter_off"}, "lora": {"rank": 2}},
    {"run": {**crash.RECIPE["run"], "parallel": "fsdp"}},
])
def test_kill_9_on_two_ranks_gives_the_same_bytes(tmp_path: Path, change: dict[str, Any]) -> None:
    settings = {**CRASH, "model": FAMILIES["llama"], **change}
    assert crash.run(tmp_path / "whole", ranks=2, **settings) == 0
    assert crash.run(tmp_path / "run", 60, ranks=2, **settings) == signal.SIGKILL
    assert crash.run(tmp_path / "run", ranks=2, **settings) == 0
    assert crash.outcome(tmp_path / "run") == crash.outcome(tmp_path / "whole")
