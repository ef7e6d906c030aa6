"""Ten real data sets through native template-tokenizer pairs, default policies: ``python -m benchmarks.real_data``.

Prints, for every pair and data set, the rows, the outcomes of the turns, and the share of conversations that the
default policies reject, with the most frequent causes.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice
from multiprocessing import get_context

from tests import assets

from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError
from chatloss.pipeline import conversations_of
from chatloss.reader import read

DATA = ("tools_en", "tools_zh", "dpo_en", "dpo_zh", "kto_en", "reasoning_tools", "weights", "multilingual", "smalltalk",
        "bfcl_calls")
PAIRS = ("qwen3", "qwen2.5", "llama3", "gpt-oss", "deepseek-v3", "mistral-v3", "mistral-v7", "tekken", "smollm2",
         "gemma-like")
CLOCK = datetime(2026, 1, 2, 3, 4, 5)


@dataclass
class Count:
    """What became of one data set under one pair."""

    pair: str
    data: str
    conversations: int = 0
    rejected: int = 0
    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def line(self) -> str:
        share = f"{self.rejected / max(self.conversations, 1):.1%}"
        turns = ", ".join(f"{n} {name}" for name, n in self.outcomes.most_common())
        why = ", ".join(f"{name} {n}" for name, n in self.causes.most_common(3)) or "-"
        return f"| {self.pair} | {self.data} | {self.conversations} | {self.rows} | {turns} | {share} | {why} |"


def measure(job: tuple[str, int]) -> list[Count]:
    """One pair over all data sets; a preference row counts as one conversation for each of its answers."""
    pair, limit = job
    encoder = ChatEncoder.load(assets.tokenizer_dir(pair), clock=lambda: CLOCK)
    counts = []
    for name in DATA:
        count = Count(pair, name)
        reader = read(str(assets.chat_file(name)), max_rejects=1.0)
        for conversation in islice((c for row in reader for c in conversations_of(row)), limit):
            count.conversations += 1
            try:
                encoding = encoder.examine(conversation)
            except ChatlossError as error:
                count.rejected += 1
                count.causes[error.kind] += 1
                continue
            fatal = {problem.cause for problem in encoding.problems if problem.fatal}
            count.rejected += bool(fatal)
            count.causes.update(fatal)
            count.outcomes.update(encoding.outcomes.values())
            count.rows += 0 if fatal else len(encoding.rows)
        count.rejected += reader.n_rejected
        counts.append(count)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, default=300, help="conversations of each data set")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    options = parser.parse_args()
    print("| pair | data | conversations | rows | turns by outcome | rejected | causes |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with get_context("spawn").Pool(2) as pool:
        for counts in pool.imap(measure, [(pair, options.limit) for pair in options.pairs]):
            for count in counts:
                print(count.line, flush=True)
    print("done", file=sys.stderr)


if __name__ == "__main__":
    main()
