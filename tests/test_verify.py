"""`verify` passes what is exact, fails what is not, and judges anybody's gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from chatloss.config import Recipe
from chatloss.errors import RecipeError
from chatloss.models import PureFloat64
from chatloss.reduction import Reduction
from chatloss.sample import Reason, Sample
from chatloss.verify import definition, judge, verify
from tests.synthetic import FAMILIES, chats, per_turn, row
from tests.torch_reference import reference_gradient, tiny


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


def recipe(**changes: Any) -> Recipe:
    return Recipe.from_dict({"model": FAMILIES["llama"], "init": "random", "batch": {"examples": 5},
                             "loss": {"reduction": "turn"}, **changes})


def formats(n: int = 8) -> dict[str, list[list[Sample]]]:
    return {"multi_turn": chats(n), "per_turn": [per_turn(rows) for rows in chats(n)]}


def test_one_rank_passes_for_every_partition_and_both_row_formats() -> None:
    report = verify(recipe(), formats(), ranks=(1,))
    assert report.passed, report.table()
    assert len(report.verdicts) == 2 * 2 * 6
    assert report.examples == 5
    assert {v.tolerance for v in report.verdicts} == {1e-12, 1e-5}
    assert len(report.table().splitlines()) == len(report.verdicts)


@pytest.mark.slow
def test_two_and_four_ranks_pass_under_ddp_and_fsdp2() -> None:
    report = verify(recipe(), formats(), ranks=(1, 2, 4))
    assert report.passed, report.table()
    assert any("2 ranks fsdp" in v.case for v in report.verdicts)


@pytest.mark.parametrize("change", [{"model": FAMILIES["gemma2"]}, {"lora": {"rank": 2}}])
def test_models_with_their_own_logits_and_adapters_pass(change: dict[str, Any]) -> None:
    report = verify(recipe(**change), formats(), ranks=(1,))
    assert report.passed, report.table()


def test_conversations_that_train_other_tokens_in_another_format_are_left_out_and_told() -> None:
    both = formats()
    both["per_turn"][3] = both["per_turn"][3][:-1] or both["per_turn"][3]
    report = verify(recipe(batch={"examples": 8}), both, ranks=(1,))
    assert report.passed
    assert report.examples == 7
    assert any("left out" in note for note in report.notes)


def test_a_batch_that_trains_nothing_is_an_error() -> None:
    with pytest.raises(RecipeError, match="trains nothing"):
        verify(recipe(), {"auto": [[row([(4, 0, 0.0, Reason.OTHER_ROLE)], np.arange(4))]]}, ranks=(1,))


def test_the_definition_is_the_one_the_tests_wrote_independently() -> None:
    model = tiny(FAMILIES["llama"])
    with PureFloat64():
        _, want = reference_gradient(model, chats(4), "turn")
        got = definition(model, chats(4), Reduction.parse("turn"))
    assert max(float(np.abs(got[k] - want[k].numpy()).max()) for k in want) < 1e-14


def test_a_mean_of_micro_batch_means_is_judged_wrong_and_token_sums_right() -> None:
    # nanochat, litgpt, minimind, Lightning, axolotl's default.
    model = tiny(FAMILIES["llama"])
    examples = chats(6)
    reference = definition(model, examples, Reduction.parse("token"))
    n = sum(rows[0].n_trained for rows in examples)

    def loop(divide: Any) -> Any:
        def gradient_of(micro_batches: Sequence[Sequence[Sequence[Sample]]]) -> dict[str, np.ndarray]:
            model.zero_grad()
            for micro in micro_batches:
                total = torch.zeros((), dtype=torch.float64)
                for [r] in micro:
                    ids = torch.from_numpy(r.input_ids.astype("int64"))[None]
                    logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
                    labels = torch.from_numpy(r.labels[1:])
                    total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
                (total / divide(micro, len(micro_batches))).backward()
            return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        return gradient_of

    cases = {f"{size} rows": [examples[i : i + size] for i in range(0, 6, size)] for size in (1, 2, 6)}
    exact = judge(loop(lambda micro, count: n), cases, reference, 1e-5)
    means = judge(loop(lambda micro, count: count * sum(r.n_trained for [r] in micro)), cases, reference, 1e-5)
    assert all(verdict.passed for verdict in exact)
    assert [verdict.passed for verdict in means] == [False, False, True]
    assert means[0].difference > 0.1


def test_a_missing_or_non_finite_gradient_is_judged_wrong() -> None:
    reference = {"a": np.array([1.0]), "b": np.array([0.0])}
    cases = {"missing": {"a": np.array([1.0])}, "nan": {"a": np.array([math.nan]), "b": np.array([0.0])},
             "not zero": {"a": np.array([1.0]), "b": np.array([1e-30])}, "right": dict(reference)}
    verdicts = judge(lambda case: case, cases, reference)
    assert [v.passed for v in verdicts] == [False, False, False, True]
    assert [v.worst for v in verdicts[:3]] == ["b", "a", "b"]
