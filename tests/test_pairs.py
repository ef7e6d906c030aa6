"""Pairs and judged answers through the encoder: both sides keep the law; a pair is whole or rejected with a reason."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from click.testing import CliRunner

from chatloss.chat import Label, Preference
from chatloss.cli import cli
from chatloss.config import Recipe
from chatloss.demo import tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.errors import DataError
from chatloss.formats import parse
from chatloss.pairs import Pair, answer_of, answers_of, examine_pair, mismatched, pair_of, prompt_ids
from chatloss.pipeline import answers, pairs
from chatloss.policy import Policy
from chatloss.reader import read
from chatloss.sft import encode_preferences
from tests import assets
from tests.oracle import violations

REWRITES = Path(tokenizer_directory()) / "chat_template_rewrites.jinja"


@cache
def encoder(template: Path | None = None, **policy: Any) -> ChatEncoder:
    return ChatEncoder.load(tokenizer_directory(), template, Policy.from_dict(policy))


def says(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def asks(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **extra}


def preference(prompt: Any, chosen: Any, rejected: Any, **extra: Any) -> Preference:
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}
    made = parse({key: value for key, value in row.items() if value is not None}, "preference", "pairs.jsonl:1")
    assert isinstance(made, Preference)
    return made


def whole(made: Pair | None) -> Pair:
    assert made is not None
    return made


def trained(pair: Pair) -> tuple[list[str], list[str]]:
    decode = encoder().decode
    chosen, rejected = ([decode(row.input_ids[row.weights != 0].tolist()) for row in answer.rows]
                        for answer in (pair.chosen, pair.rejected))
    return chosen, rejected


TALK = [asks("Hi"), says("Hello!"), asks("2 + 2?")]
CALL = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize(("prompt", "chosen", "rejected"), [
    ("2 + 2?", "4.", "5, I think."),
    (TALK, [says("4.")], [says("5.")]),
    (TALK, says("4."), says("5.")),
    (None, [*TALK, says("4.")], [*TALK, says("5.")]),
])
def test_every_form_of_a_pair_trains_both_answers_with_their_stop_and_nothing_else(
    prompt: Any, chosen: Any, rejected: Any
) -> None:
    pair = whole(pair_of(encoder(), preference(prompt, chosen, rejected)))
    assert trained(pair)[0] == ["4.<|im_end|>"]
    assert trained(pair)[1][0].startswith("5") and trained(pair)[1][0].endswith("<|im_end|>")
    assert prompt_ids(pair.chosen.rows).tolist() == prompt_ids(pair.rejected.rows).tolist()
    assert encoder().decode(prompt_ids(pair.chosen.rows).tolist()).endswith("2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert [pair.chosen.source, pair.rejected.source] == ["pairs.jsonl:1 chosen", "pairs.jsonl:1 rejected"]


def test_nothing_of_the_prompt_is_trained_whatever_its_messages_wish() -> None:
    prompt = [asks("Hi"), says("Hello!", train=True, weight=2.0), asks("2 + 2?")]
    assert trained(whole(pair_of(encoder(), preference(prompt, "4.", "5.")))) == (["4.<|im_end|>"], ["5.<|im_end|>"])


@pytest.mark.parametrize("template", [None, REWRITES])
@pytest.mark.parametrize("row_format", ["auto", "per_turn"])
def test_answers_of_several_turns_keep_the_law_also_where_history_is_rewritten(
    template: Path | None, row_format: str
) -> None:
    prompt = [asks("Hi"), says("Hello!", reasoning_content="A greeting."), asks("2 + 2?")]
    chosen = [says("", tool_calls=[CALL], reasoning_content="I add."), {"role": "tool", "content": "4",
              "tool_call_id": "call_1"}, says("It is 4.", reasoning_content="The tool said 4.")]
    rejected = [says("5.", reasoning_content="A guess."), asks("Sure?"), says("No.", reasoning_content="Hm.")]
    row = preference(prompt, chosen, rejected, tools=TOOLS)
    made = encoder(template, row_format=row_format)
    pair = whole(pair_of(made, row))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_directory())
    source = (template or Path(tokenizer_directory()) / "chat_template.jinja").read_text("utf-8")
    for answer, chat in ((pair.chosen, row.chosen), (pair.rejected, row.rejected)):
        messages = [message.to_dict() for message in chat.messages]
        assert violations(tokenizer, source, messages, list(answer.rows), untrained={1}, row_format=row_format,
                          tools=TOOLS) == []
        assert sorted({int(i) for r in answer.rows for i in r.turns} - {-1}) == [3, 5]
    assert len(pair.rejected.rows) == (2 if row_format == "per_turn" or template else 1)


def reason(made: ChatEncoder, row: Preference) -> str:
    with pytest.raises(DataError) as error:
        pair_of(made, row)
    assert error.value.where.startswith("pairs.jsonl:1") and error.value.hint
    return error.value.kind


def test_pairs_that_are_no_pairs_are_rejected_with_a_reason() -> None:
    assert reason(encoder(), preference("Hi", [says("a", train=False)], [says("b")])) == "lost_answer"
    assert reason(encoder(), preference("Hi", [says("a", weight=0)], [says("b")])) == "lost_answer"
    # The same ids although the messages differ.
    assert reason(encoder(), preference("Hi", [says("a", name="x")], [says("a", name="y")])) == "tie"
    chats = [preference(prompt, "a", "b") for prompt in ("Hi", "Ho")]
    mixed = Preference(chats[0].prompt, chats[0].chosen, chats[1].rejected, "pairs.jsonl:1")
    assert reason(encoder(), mixed) == "other_prompt"


LONG = "word " * 60


def test_a_pair_too_long_on_one_side_is_rejected_as_a_whole_by_default() -> None:
    row = preference("Hi", "Short.", LONG)
    assert reason(encoder(max_length=60), row) == "too_long"
    assert reason(encoder(max_length=60, overflow="error"), row) == "too_long"


def test_the_user_may_drop_pairs_that_are_too_long_which_is_no_reject(tmp_path: Path) -> None:
    made = encoder(max_length=60, overflow="drop")
    assert pair_of(made, preference("Hi", "Short.", LONG)) is None
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "Hi", "chosen": "Short.", "rejected": text}) + "\n"
                            for text in (LONG, "Other.")))
    reader = read([str(file)])
    assert [pair.source.endswith(":2") for pair in pairs(reader, made)] == [True]
    assert reader.n_rejected == 0


def test_right_cuts_both_answers_at_the_same_length_and_a_pair_that_becomes_a_tie_is_rejected() -> None:
    made = encoder(max_length=60, overflow="right")
    pair = whole(pair_of(made, preference("Hi", "Not " + LONG, LONG)))
    assert {len(row) for answer in (pair.chosen, pair.rejected) for row in answer.rows} == {60}
    assert reason(made, preference("Hi", LONG + "yes", LONG + "no")) == "tie"
    assert reason(made, preference(LONG, "yes", "no")) == "too_long"


def test_a_window_leaves_the_same_messages_out_of_both_sides() -> None:
    prompt = [{"role": "system", "content": "Be brief."}, asks(LONG), says("One."), asks("word " * 20), says("Two."),
              asks("Three?")]
    fits, not_fits = "3.", "word " * 25
    full = whole(pair_of(encoder(), preference(prompt, fits, not_fits)))
    limit = max(len(row) for row in full.rejected.rows) - 10  # only the rejected side is too long with everything
    assert len(full.chosen.rows[0]) <= limit
    pair = whole(pair_of(encoder(max_length=limit, overflow="window"), preference(prompt, fits, not_fits)))
    shown = [encoder().decode(prompt_ids(answer.rows).tolist()) for answer in (pair.chosen, pair.rejected)]
    assert shown[0] == shown[1]
    assert "Be brief." in shown[0] and "One." not in shown[0] and "Two." in shown[0]
    assert {int(i) for row in pair.rejected.rows for i in row.turns} == {-1, 6}
    assert all(len(row) <= limit for row in pair.rejected.rows)


def test_a_window_that_can_hold_only_one_side_rejects_the_pair() -> None:
    row = preference([asks(LONG), says("One."), asks("Two?")], "2.", LONG + LONG)
    assert reason(encoder(max_length=100, overflow="window"), row) == "too_long"


def test_judged_answers_train_their_last_message_only() -> None:
    label = parse({"messages": [*TALK, says("4.")], "label": True}, "kto", "k.jsonl:1")
    assert isinstance(label, Label)
    answer = answer_of(encoder(), label)
    assert answer is not None and answer.desirable is True
    [row] = answer.rows
    assert encoder().decode(row.input_ids[row.weights != 0].tolist()) == "4.<|im_end|>"
    both = answers_of(encoder(), preference("Hi", "a", "b"))
    assert [one.desirable for one in both] == [True, False]


def test_mismatched_answers_stand_behind_the_prompt_of_another_with_their_own_weights() -> None:
    made = [*answers_of(encoder(), preference("Hi", "a", "b")), *answers_of(encoder(), preference("Ho!", "c d", "e"))]
    for i, judged in enumerate(mismatched(made)):
        [row], [other] = judged.mismatched.rows, made[(i + 1) % 4].rows
        cut = len(prompt_ids(made[i].rows))
        assert row.input_ids[:cut].tolist() == prompt_ids(made[i].rows).tolist()
        assert not row.weights[:cut].any()
        assert row.input_ids[cut:].tolist() == other.input_ids[other.weights != 0].tolist()
        assert row.weights[cut:].tolist() == other.weights[other.weights != 0].tolist()
    with pytest.raises(DataError, match="at least two"):
        mismatched(made[:1])


def test_rows_say_which_side_they_are_in_every_command(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps({"prompt": "Hi", "chosen": "a", "rejected": "b"}) + "\n")
    out = CliRunner().invoke(cli, ["encode", str(file), "-t", str(tokenizer_directory())])
    sources = [json.loads(line)["source"].rsplit(" ", 1)[-1] for line in out.stdout.splitlines()]
    assert sources == ["chosen", "rejected"]
    shown = CliRunner().invoke(cli, ["view", str(file), "-t", str(tokenizer_directory())])
    text = shown.stdout.replace("\n", "")
    assert shown.exit_code == 0 and "pairs.jsonl:1 chosen" in text and "pairs.jsonl:1 rejected" in text


def test_a_tie_is_told_by_check_and_refused_by_encode(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "Hi", "chosen": [says("a", name="x")], "rejected": [says("a", name="y")]}
    file.write_text(json.dumps(row) + "\n")
    refused = CliRunner().invoke(cli, ["encode", str(file), "-t", str(tokenizer_directory())])
    assert refused.exception is not None and refused.stdout == ""
    checked = CliRunner().invoke(cli, ["check", str(file), "-t", str(tokenizer_directory()), "--json"])
    assert any(finding["cause"] == "tie" for finding in json.loads(checked.stdout)["findings"])


@pytest.mark.parametrize(("name", "tokenizer"), [("dpo_en", "qwen3"), ("dpo_zh", "qwen3"), ("kto_en", "smollm2")])
def test_every_real_preference_row_is_kept_or_rejected_and_the_counts_add_up(name: str, tokenizer: str) -> None:
    made = ChatEncoder.load(assets.tokenizer_dir(tokenizer))
    reader = read([str(assets.chat_file(name))], max_rejects=1.0)
    kept = list(answers(reader, made) if name == "kto_en" else pairs(reader, made))
    assert len(kept) + reader.n_rejected == reader.n_rows >= 300
    assert reader.n_rejected <= 2, Counter(reject.kind for reject in reader.rejects)
    for one in kept:
        if isinstance(one, Pair):
            assert np.array_equal(prompt_ids(one.chosen.rows), prompt_ids(one.rejected.rows))


def test_examining_a_pair_that_cannot_be_rendered_tells_it_and_raises_nothing() -> None:
    row = preference("Hi", "a <|im_end|> b", "c")
    problems = [problem.cause for encoding in examine_pair(encoder(), row) for problem in encoding.problems]
    assert "control_tokens" in problems


def test_training_counts_pairs_that_the_policy_drops_or_cuts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "Hi", "chosen": "a", "rejected": text} for text in ("b", LONG, "c")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for overflow, kept, told in (("drop", 2, "left out 1 rows"), ("right", 3, "cut 1 answers")):
        data = {"train": [str(file)], "max_length": 60, "overflow": overflow}
        recipe = Recipe.from_dict({"objective": "dpo", "data": data})
        made, _ = encode_preferences(recipe, encoder(max_length=60, overflow=overflow), [str(file)])
        assert len(made) == kept
        assert told in capsys.readouterr().err
