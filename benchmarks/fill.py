"""256 uneven conversations on 8 ranks, beside best-fit-decreasing over the whole: ``python -m benchmarks.fill``.

Real tool chats in English. Packing for ranks costs at most as many bins as make the number divisible, and
balances what attention costs; best-fit-decreasing for one rank only fills bins.
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.training import rows
from chatloss.batch import Layout
from chatloss.pack import best_fit


def measure(lengths: list[int], capacity: int, ranks: int, quadratic: float) -> dict[str, float]:
    """Bins, fill, and how much dearer than the mean the dearest rank is, of our plan; bins and fill of the baseline."""
    plan = Layout(ranks, capacity, quadratic=quadratic).plan(lengths)
    cost = [sum(lengths[i] + quadratic * lengths[i] ** 2 for group in rank for pack in group for i in pack)
            for rank in plan]
    bins = sum(1 for rank in plan for group in rank for pack in group if pack)
    whole = best_fit(lengths, capacity)
    dealt = [whole[r::ranks] for r in range(ranks)]
    plain = [sum(lengths[i] + quadratic * lengths[i] ** 2 for pack in rank for i in pack) for rank in dealt]
    total = sum(lengths)
    return {"bins": bins, "fill": total / bins / capacity, "dearest": max(cost) / np.mean(cost) - 1,
            "bfd bins": len(whole), "bfd fill": total / len(whole) / capacity,
            "bfd dearest": max(plain) / np.mean(plain) - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capacity", type=int, nargs="*", default=[4096, 8192])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--quadratic", type=float, default=1e-4, help="cost of n^2 beside n")
    arguments = parser.parse_args()
    examples, _ = rows("qwen2.5", "tools_en", 256, min(arguments.capacity))
    lengths = [len(row) for example in examples for row in example]
    print(f"{len(examples)} conversations of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all\n")
    print(f"| tokens per bin | bins for {arguments.ranks} ranks | fill | dearest rank "
          "| bins of best-fit-decreasing | fill | dearest rank |\n| --- | --- | --- | --- | --- | --- | --- |")
    for capacity in arguments.capacity:
        m = measure(lengths, capacity, arguments.ranks, arguments.quadratic)
        print(f"| {capacity} | {m['bins']:.0f} | {m['fill']:.1%} | +{m['dearest']:.1%} "
              f"| {m['bfd bins']:.0f} | {m['bfd fill']:.1%} | +{m['bfd dearest']:.1%} |")


if __name__ == "__main__":
    main()
