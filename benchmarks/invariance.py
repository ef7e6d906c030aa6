"""One gradient, however a batch is cut: ``python -m benchmarks.invariance``.

For tiny random models of several families: the largest difference from the float64 definition (row by row, all logits)
over every reduction x micro-batch sizes x packed and padded x row formats, and over 2 and 4 ranks (DDP; FSDP2 on two).
Eight generated conversations of one to four turns; `max over parameters of max |dg| / max |g|`.
"""

from __future__ import annotations

import argparse
import warnings
from itertools import islice

import torch
from tests.synthetic import FAMILIES, chat, per_turn

from chatloss.config import Recipe
from chatloss.reduction import Reduction
from chatloss.sample import Sample
from chatloss.verify import Verdict, verify

REDUCTIONS = ("token", "turn", "conversation", "power:0.5:turn", "power:0.5:conversation", "sum:turn",
              "sum:conversation", "constant:64:turn", "constant:64:conversation")
TURNS = ([(5, 4), (3, 9)], [(4, 30)], [(7, 1), (2, 12), (3, 3)], [(3, 2)], [(6, 17), (4, 5), (2, 8), (5, 6)],
         [(9, 7)], [(2, 40), (8, 2)], [(3, 11), (3, 11)])


def verdicts(family: str, reduction: str, ranks: tuple[int, ...]) -> tuple[Verdict, ...]:
    Reduction.parse(reduction)
    multi_turn = [chat(turns, seed) for seed, turns in enumerate(TURNS)]
    formats: dict[str, list[list[Sample]]] = {
        "multi_turn": multi_turn, "per_turn": [per_turn(rows) for rows in multi_turn],
    }
    recipe = Recipe.from_dict({
        "model": FAMILIES[family], "init": "random", "output": "unused", "loss": {"reduction": reduction},
        "batch": {"examples": len(TURNS)},
    })
    return verify(recipe, formats, ranks=ranks).verdicts


def worst(found: list[Verdict], dtype: str) -> str:
    chosen = [verdict for verdict in found if verdict.case.startswith(dtype)]
    return f"{len(chosen)} | {max(verdict.difference for verdict in chosen):.1e}" if chosen else "0 | "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="*", default=list(FAMILIES))
    parser.add_argument("--reductions", type=int, default=len(REDUCTIONS))
    parser.add_argument("--ranks", default="2,4", help="for the last column; empty: none")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| model | cases in float64 | difference | cases in float32 | difference | cases on 2 and 4 ranks, float64 "
          "| difference |\n" + "| --- " * 7 + "|")
    ranks = tuple(int(size) for size in arguments.ranks.split(",") if size)
    for family in arguments.family:
        found = [v for name in islice(REDUCTIONS, arguments.reductions) for v in verdicts(family, name, (1,))]
        spread = [v for name in ("token", "turn") for v in verdicts(family, name, ranks)] if ranks else []
        print(f"| {family} | {worst(found, 'float64')} | {worst(found, 'float32')} | {worst(spread, 'float64')} |",
              flush=True)


if __name__ == "__main__":
    main()
