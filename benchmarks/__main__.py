"""All benchmarks whose numbers stand in docs/, one after another: ``python -m benchmarks [NAME...]``."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("exactness", "invariance", "head_memory", "fill", "row_formats", "hf", "training", "preference",
         "one_pass", "shapes", "prepare", "scale")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", default=NAMES, help=f"some of {', '.join(NAMES)}")
    for name in parser.parse_args().name:
        print(f"\n## {name}\n", flush=True)
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=Path(__file__).parent.parent)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
