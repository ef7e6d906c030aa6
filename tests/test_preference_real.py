"""A few DPO steps of a real chat model on real preference chats."""

from __future__ import annotations

import math

import pytest
from benchmarks.preference import real

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("data", ["dpo_en", "dpo_zh"])
def test_a_few_steps_of_smollm2_move_the_margin(data: str) -> None:
    first, *_, last = real(data)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert abs(first["margin"]) < 1e-2 < last["margin"]
    assert last["accuracy"] == 1.0
