"""Peers side by side: every token in which they differ from ours has a named reason, and the law is on our side."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from benchmarks import peers

from chatloss.sample import Reason, Sample, Span
from tests import assets, conformance
from tests.oracle import violations

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", autouse=True)
def frozen_clock() -> None:
    conformance.freeze_clock()


def assert_explained(results: list[peers.Beside]) -> None:
    for result in results:
        assert set(result.reasons) <= set(peers.REASONS), result
        assert result.refused or result.equal + sum(result.reasons.values()) == result.turns, result


def test_every_token_in_which_trl_differs_has_a_named_reason() -> None:
    results = list(peers.trl())
    assert_explained(results)
    assert len({result.name for result in results}) == 31
    plain = {result.name: result for result in results if result.chat == "plain"}
    assert plain["llama3"].equal == plain["llama3"].turns == 3
    assert plain["gptoss"].reasons == {"prompt-supplied tokens trained": 3}
    assert plain["qwen2_5"].reasons == {"prompt-supplied tokens trained": 3}


def test_every_token_in_which_the_renderers_differ_has_a_named_reason() -> None:
    results = list(peers.renderers())
    assert_explained([result for result in results if not result.reasons.keys() - set(peers.REASONS)])
    plain = {result.name: result for result in results if result.chat == "plain"}
    assert plain["Llama3"].equal == 3
    assert plain["Qwen3"].equal == 1, "one row cannot hold Qwen3's earlier answers as inference emits them"


def as_sample(ids: list[int], mask: list[int], wanted: list[int]) -> Sample:
    """A peer's row in our form, its k-th trained stretch being the k-th answer."""
    owner = np.full(len(ids), -1)
    for turn, (start, end) in zip(wanted, peers.runs(mask), strict=True):
        owner[start:end] = turn
    edges = [0, *(np.flatnonzero(np.diff(owner)) + 1).tolist(), len(ids)]
    spans = [
        Span(a, b, int(owner[a]), float(owner[a] >= 0), Reason.CONTENT if owner[a] >= 0 else Reason.SCAFFOLD)
        for a, b in pairwise(edges)
    ]
    return Sample(np.asarray(ids, np.int32), tuple(spans), dict.fromkeys(wanted, "exact"), "peer:1")


@pytest.mark.parametrize(("original", "tokenizer", "lawful"), [
    ("llama3", "llama3", True), ("gptoss", "gpt-oss", False), ("qwen2_5", "qwen2.5", False), ("qwen3", "qwen3", False),
    ("gemma", "gemma-like", False),
])
def test_the_oracle_finds_trl_unlawful_exactly_where_it_differs(original: str, tokenizer: str, lawful: bool) -> None:
    messages, _ = conformance.SHAPES["plain"]
    _, transformers_tokenizer = peers.tokenizer_of(tokenizer)
    tagged = assets.trl_templates()[f"{original}_training"]
    made: Any = transformers_tokenizer.apply_chat_template(
        messages, chat_template=tagged, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    wanted = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    row = as_sample(list(made["input_ids"]), list(made["assistant_masks"]), wanted)
    loaded, _ = peers.tokenizer_of(tokenizer)
    found = violations(
        transformers_tokenizer, assets.trl_templates()[original], messages, [row], stop_ids=loaded.stop_ids
    )
    assert (not found) == lawful, found


def test_transformers_trains_the_user_where_a_tagged_answer_ends_at_the_first_token() -> None:
    """A generation span that ends inside token 0 becomes a mask over everything up to the last token."""
    _, tokenizer = peers.tokenizer_of("qwen3")
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    chat = [{"role": "assistant", "content": "a"}, {"role": "user", "content": " secret words of the user"}]
    made: Any = tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask, ids = list(made["assistant_masks"]), list(made["input_ids"])
    trained = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert "secret" in trained, "fixed upstream: tell FIELD and the migration pages"
