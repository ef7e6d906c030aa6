"""Real data sets and a real model, in the slow tier; a slice of the data in every run."""

from __future__ import annotations

import pytest
from benchmarks.real_data import DATA, Count, measure


def total(counts: list[Count]) -> dict[str, tuple[int, int]]:
    return {count.data: (count.conversations, count.rejected) for count in counts}


def test_qwen3_takes_every_real_data_set_without_a_reject() -> None:
    counts = measure(("qwen3", 12))
    assert [count.data for count in counts] == list(DATA)
    assert all(rejected == 0 and seen == 12 for seen, rejected in total(counts).values())


def test_what_a_template_cannot_hold_is_counted_by_cause() -> None:
    by_data = {count.data: count for count in measure(("llama3", 8))}
    reasoning = by_data["reasoning_tools"]
    assert reasoning.rejected == 8 and set(reasoning.causes) == {"altered", "unrenderable"}
    assert by_data["tools_en"].rejected == 0


@pytest.mark.slow
def test_a_chat_model_finds_the_trained_tokens_easier_than_the_others() -> None:
    import tempfile
    from pathlib import Path

    from benchmarks.real_model import _write_chats, losses

    from chatloss.encode import ChatEncoder
    from chatloss.reader import read
    from tests import assets

    encoder = ChatEncoder.load(assets.tokenizer_dir("smollm2"))
    with tempfile.TemporaryDirectory() as folder:
        chats = Path(folder) / "chats.jsonl"
        _write_chats(chats, 4)
        rows = [row for chat in read(str(chats)) for row in encoder.encode(chat)]  # type: ignore[arg-type]
    trained, others = losses(assets.model_dir("smollm2"), rows)
    assert trained < 0.7 * others
