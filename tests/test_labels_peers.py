"""Rows really made by other tools, audited: each has the findings that its code is known for, and no other error."""

from __future__ import annotations

import logging
from functools import cache

import pytest
from benchmarks import labels

from tests import conformance

pytestmark = pytest.mark.peer

# What must be found in the rows of 6 chats; None: the tool refuses the template.
EXPECTED: dict[str, dict[str, set[str] | None]] = {
    "qwen3": {
        "chatloss": set(),
        "TRL 1.16 assistant_only_loss": {"past_stop", "context_differs"},
        "TRL 1.16 prompt/completion": {"past_stop", "turn_lost", "only_last_turn"},
        "transformers 5.23 mask, own template": {"nothing_trained", "turn_lost"},
        "axolotl 0.21 chat_template": {"reasoning_missing", "reasoning_untrained"},
        "LLaMA-Factory 0.9.5": {"past_stop", "context_differs"},
        "ms-swift 4.6": {"past_stop", "context_differs"},
        "unsloth 2026.10 train_on_responses_only": {"reasoning_missing"},
        "response_template (TRL <= 0.19)": {"past_stop", "turn_lost", "only_last_turn"},
        "response + instruction template": {"past_stop", "reasoning_missing"},
        "minimind scan": {"past_stop", "reasoning_missing"},
        "minimind scan, no newline": {"reasoning_missing"},
        "minimind scan, +1": {"mask_shifted_right", "reasoning_missing", "reasoning_untrained"},
    },
    "llama3": {
        "chatloss": set(),
        "TRL 1.16 assistant_only_loss": None,
        "axolotl 0.21 chat_template": set(),
        "unsloth 2026.10 train_on_responses_only": set(),
        "LLaMA-Factory 0.9.5": {"context_differs"},
        "ms-swift 4.6": {"context_differs"},
        "response + instruction template": {"tool_trained", "user_trained", "headers_trained", "structure_trained"},
    },
    "gpt-oss": {
        "chatloss": set(),
        "TRL 1.16 assistant_only_loss": {"headers_trained", "other_stop", "stop_differs"},
        "LLaMA-Factory 0.9.5": {"label_differs", "no_stop", "context_differs", "target_differs"},
    },
}


@cache
def results(template: str) -> dict[str, labels.Result]:
    logging.disable(logging.WARNING)
    conformance.freeze_clock()
    return {result.tool: result for result in labels.results(template, labels.conversations(3))}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("template", EXPECTED)
def test_rows_of_other_tools_have_the_findings_that_their_code_is_known_for(template: str) -> None:
    for tool, expected in EXPECTED[template].items():
        report = results(template)[tool].report
        assert (report is None) == (expected is None), results(template)[tool].refusal
        if report is not None and expected is not None:
            assert {finding.cause for finding in report.findings} == expected, tool


@pytest.mark.filterwarnings("default")
def test_our_own_rows_are_equal_to_themselves_in_every_turn() -> None:
    for template in EXPECTED:
        report = results(template)["chatloss"].report
        assert report is not None and set(report.differences) == {"equal"}
