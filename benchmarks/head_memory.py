"""Peak memory of the language-model head's step against full logits: ``python -m benchmarks.head_memory``.

One forward and backward pass over N trained tokens; each case in a process of its own. The inputs, the weight and its
gradient, which every implementation needs, are not counted.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

CASES = ((4096, 256, 32_768), (2048, 256, 131_072))


def measure(which: str, n: int, width: int, vocabulary: int) -> tuple[float, float]:
    """Peak MiB beyond what is there before, and CPU seconds."""
    import torch
    from torch.nn.functional import cross_entropy

    from chatloss.loss.nll import weighted_nll

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = torch.randn(n, width, requires_grad=True)
    weight = (torch.randn(vocabulary, width) / width**0.5).requires_grad_()
    target, u = torch.randint(0, vocabulary, (n,)), torch.rand(n)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    spare = torch.ones_like(weight)  # the gradient before it is added to .grad, which every implementation has
    del spare
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if which == "chatloss":
        total, _ = weighted_nll(hidden, weight, None, target, u)
    else:
        total = (cross_entropy(hidden @ weight.T, target, reduction="none") * u).sum()
    total.backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*")
    case = parser.parse_args().case
    if case:
        print("RESULT", *measure(case[0], *map(int, case[1:])))
        return
    print("| tokens | width | vocabulary | full logits MiB | chatloss MiB | ratio | CPU s full | CPU s chatloss |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for n, width, vocabulary in CASES:
        found = []
        for which in ("full", "chatloss"):
            command = [sys.executable, "-m", "benchmarks.head_memory", which, str(n), str(width), str(vocabulary)]
            out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
            found.append([float(value) for value in out.stdout.split()[-2:]])
        (full, slow), (ours, fast) = found
        sizes = f"| {n} | {width} | {vocabulary} | {full:.0f} | {ours:.0f} | {ours / full:.3f} |"
        print(f"{sizes} {slow:.1f} | {fast:.1f} |", flush=True)


if __name__ == "__main__":
    main()
