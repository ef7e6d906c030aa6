"""Memory and time of `chatloss prepare` as the input grows: ``python -m benchmarks.scale``.

The input is written to a temporary folder, which is deleted afterwards: the real chats of benchmarks.prepare again and
again, each time with the words of every message turned round by another number and with that number, so that no text
comes twice. Memory is the sum of PSS (resident memory, where what processes share is counted once) over the command and
all processes below it, four times a second. Seconds are those of the clock, and of CPU time over all processes.
"""

from __future__ import annotations

import argparse
import gzip
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
from tests import assets

from benchmarks.prepare import CHATS, THREADS, own_template, varied


def write_chats(path: Path, size: int, data: str) -> None:
    """At least `size` bytes of JSON Lines, compressed where the name ends in .gz (the size is that before)."""
    written = 0
    with (gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb")) as file:
        for row in varied(list(CHATS[data]())):
            line = orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE)
            file.write(line)
            written += len(line)
            if written >= size:
                return


def tree_pss(root: int) -> int:
    """Bytes of PSS of a process and all below it."""
    total, todo = 0, [root]
    while todo:
        pid = todo.pop()
        try:
            [line] = [x for x in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if x.startswith("Pss:")]
            total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):  # it has ended
            continue
    return total


def measure(size: int, options: argparse.Namespace) -> dict[str, float]:
    """One run of the command."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        data, output = Path(folder) / f"chats.jsonl{'.gz' * options.gzip}", Path(folder) / "out"
        write_chats(data, size, options.data)
        command = [sys.executable, "-m", "chatloss", "prepare", str(data), "-o", str(output), "--workers",
                   str(options.workers), "--tokenizer", str(assets.tokenizer_dir(options.pair)), "--encoder", "fast"]
        if (template := own_template(options.pair)) is not None:
            (Path(folder) / "template.jinja").write_text(template, "utf-8")
            command += ["--chat-template", str(Path(folder) / "template.jinja")]
        samples = []
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        run = subprocess.Popen(command, env={**os.environ, **THREADS}, stderr=subprocess.PIPE, text=True)
        while run.poll() is None:
            samples.append(tree_pss(run.pid))
            time.sleep(0.25)
        seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if run.returncode:
            sys.exit(run.stderr.read() if run.stderr else "")
        half = samples[len(samples) // 4 : len(samples) // 2]
        return {
            "megabytes": size / 1e6, "seconds": seconds,
            "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            "peak": max(samples) / 2**20, "early": max(half, default=0) / 2**20,
            "written": sum(path.stat().st_size for path in (output / "shards").iterdir()) / 1e6,
        }


def costs(rate: float, cores: int, price: float, network: float) -> Iterator[str]:
    """What 1 TB of chats takes, as a table: `rate` is MB of input per second of a core, `network` GB/s of a node."""
    core_hours = 1e6 / rate / 3600
    yield f"| nodes of {cores} cores | first reading | encoding | core-hours | at {price:g} $ per core-hour |"
    yield "| ---: | ---: | ---: | ---: | ---: |"
    for nodes in (1, 10, 100):
        reading, encoding = 1000 / network / nodes, core_hours * 3600 / cores / nodes
        # Every node is paid for from the beginning to the end.
        paid = (reading + encoding) / 3600 * cores * nodes
        yield (f"| {nodes} | {reading / 60:.1f} min | {encoding / 60:.1f} min | {paid:.0f} | {paid * price:.2f} $ |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pair", default="llama3", help="template and tokenizer, as in benchmarks.prepare")
    parser.add_argument("--data", default="plain", choices=list(CHATS))
    parser.add_argument("--gzip", action="store_true", help="compressed input, which the main process reads")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--cost", type=float, metavar="RATE",
                        help="measure nothing: what 1 TB takes at that many MB of input per second of a core")
    parser.add_argument("--cores", type=int, default=32, help="of a node")
    parser.add_argument("--price", type=float, default=0.05, help="in dollars, of a core for an hour")
    parser.add_argument("--network", type=float, default=1.0, help="GB per second that a node reads")
    options = parser.parse_args()
    if options.cost:
        print("\n".join(costs(options.cost, options.cores, options.price, options.network)))
        return
    print("| input MB | seconds | CPU seconds | MB per CPU second | peak PSS MiB | of it, second quarter | shards MB |")
    print("| ---: " * 7 + "|")
    for megabytes in options.megabytes:
        made = measure(megabytes * 10**6, options)
        print(f"| {megabytes} | {made['seconds']:.1f} | {made['cpu']:.1f} | {made['megabytes'] / made['cpu']:.2f} | "
              f"{made['peak']:.0f} | {made['early']:.0f} | {made['written']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
