"""Runs `prepare` in processes that are killed with SIGKILL at a chosen event, or at random moments.

``python -m tests.crash_prepare --seed 1`` kills 50 runs, each at a moment of its own, and shows what came of them: one
process, two workers, Ray in the process ("ray") and a Ray cluster that goes on ("cluster"), where the process that was
called is killed, or one of its workers. The same command again must end with the bytes of a run that nobody killed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash import kill_at_event

LOOPBACK = "127.0.0.2"  # Ray takes 127.0.0.1 for a wish to be reached from elsewhere
ALL = {"one": 16, "two": 14, "ray": 8, "cluster": 12}


def run(data: Path, output: Path, kill_at: int, workers: int = 1) -> int:
    """Prepares `data` into `output`, killed at the `kill_at`-th event (0: never); 0, or a non-zero exit code.

    A run that is not killed writes the number of its events to `<output>.events`.
    """
    process = _started([str(data)], output, "two" if workers == 2 else "one", kill_at)
    process.join()
    return abs(process.exitcode or 0)


def _started(data: list[str], output: Path, way: str, kill_at: int = 0) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chatloss.prepare", "tokenizers", "pyarrow.parquet"])
    process = context.Process(target=_prepare, args=(data, output, way, kill_at))
    process.start()
    return process


def _prepare(data: list[str], output: Path, way: str, kill_at: int) -> None:
    from chatloss import prepare as preparing
    from chatloss.cluster import on_ray
    from chatloss.demo import tokenizer_directory
    from chatloss.errors import ChatlossError
    from chatloss.folders import Folder

    runner = None
    if way not in ("one", "two"):
        os.environ["RAY_AUTH_MODE"] = "disabled"  # read when Ray is imported
        import ray

        options = {"address": "local", "num_cpus": 2, "include_dashboard": False} if way == "ray" else {"address": way}
        ray.init(**options, log_to_driver=False, logging_level="ERROR", _node_ip_address=LOOPBACK)
        runner = on_ray()
    watched = ((Path, "replace"), (Path, "unlink"), (os, "fsync"), (Folder, "make"), (Folder, "delete"),
               (Folder, "delete_folder"))
    events = kill_at_event(kill_at, watched)
    preparing.shard_bytes = lambda inputs: 16384
    Path(f"{output}.began").touch()
    job = preparing.Job(str(tokenizer_directory()))
    workers = 2 if way == "two" else 1
    try:
        preparing.prepare(data, output, job, workers=workers, runner=runner, max_rejects=0.1)
    except ChatlossError as error:  # a worker was killed
        sys.exit(f"{error}")
    if not kill_at:
        Path(f"{output}.events").write_text(str(events()))
    if runner:
        ray.shutdown()


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@dataclass(frozen=True)
class Kill:
    """One killed run: what was killed when, what stood then, and whether the bytes are those of a whole run."""

    way: str
    victim: str
    moment: str
    shards: int  # with their markers
    ended: int  # exit code of the run
    same: bool


def kills(folder: Path, ways: dict[str, int], seed: int, copies: int = 4) -> Iterator[Kill]:
    """Kills as many runs of each of the `ways` at random moments, spread over the whole duration of such a run."""
    chance = random.Random(seed)
    data = _data(folder, copies)
    whole = folder / "whole"
    seconds = {"one": _ended(data, whole, "one")[1]}
    events, wanted = int(Path(f"{whole}.events").read_text()), contents(whole)
    for way, n in ways.items():
        with _cluster() if way == "cluster" else nullcontext((way, 0)) as (real, head):
            if way not in seconds:
                seconds[way] = min(_ended(data, folder / f"{way}-{i}", real)[1] for i in range(2))
            k = misses = 0
            while k < n:
                output = folder / f"killed-{way}-{k}"
                if way == "one" and k % 2:
                    at = chance.randint(1, events)
                    process = _started(data, output, real, at)
                    victim, moment, hit = "main", f"event {at} of {events}", True
                    process.join()
                else:
                    victim = "worker" if way != "one" and k % 2 else "main"
                    after = chance.uniform(0, seconds[way])
                    process = _started(data, output, real)
                    hit = _killed(process, output, after, victim, head or process.pid)
                    moment = f"{after:.2f} s of {seconds[way]:.2f} s"
                shards = len(list((output / ".prepare").glob("[0-9]*.json")))
                process.join()
                if hit:
                    ended = process.exitcode or 0
                    if ended:
                        _ended(data, output, real)
                    yield Kill(way, victim, moment, shards, ended, contents(output) == wanted)
                    k += 1
                misses += not hit
                assert misses <= n + 10, "runs end before their moment, or have no workers"
                shutil.rmtree(output, ignore_errors=True)
                Path(f"{output}.began").unlink(missing_ok=True)


def _data(folder: Path, copies: int) -> list[str]:
    """The demonstration's chats as JSON Lines and compressed, with bad rows among them."""
    from chatloss.demo import chats_file

    lines = chats_file().read_text("utf-8").splitlines() * copies
    text = "".join(f"{line}\n" + ("broken\n" if k % 50 == 0 else "") for k, line in enumerate(lines))
    plain, packed = folder / "chats.jsonl", folder / "more.jsonl.gz"
    plain.write_text(text, "utf-8")
    packed.write_bytes(gzip.compress(text.encode(), mtime=0))
    return [str(plain), str(packed)]


def _ended(data: list[str], output: Path, way: str) -> tuple[int, float]:
    """(exit code, seconds from its beginning) of a run that is not killed."""
    began = Path(f"{output}.began")
    began.unlink(missing_ok=True)
    process = _started(data, output, way)
    since = _since(began, process)
    process.join()
    assert process.exitcode == 0, "a run that nobody kills ends well"
    return process.exitcode, time.monotonic() - since


def _since(began: Path, process: Any) -> float:
    """When the run, past its imports, began to prepare."""
    while not began.exists() and process.exitcode is None:
        time.sleep(0.002)
    return time.monotonic()


def _killed(process: Any, output: Path, after: float, victim: str, above: int) -> bool:
    """Whether there was something to kill `after` seconds: the process, or one of the workers below process `above`."""
    since = _since(Path(f"{output}.began"), process)
    time.sleep(max(0.0, since + after - time.monotonic()))
    below = _below(above)
    workers = [pid for pid in below if _command(pid).startswith("ray::_call") or "spawn_main" in _command(pid)]
    found = [process.pid] if victim == "main" else workers
    if process.exitcode is not None or not found:
        return False
    os.kill(random.Random(after).choice(found), signal.SIGKILL)
    if victim == "main" and above == process.pid:  # Ray's own helpers outlive their node by minutes
        time.sleep(0.5)
        for pid in below:
            if "Agent" in _command(pid):
                os.kill(pid, signal.SIGKILL)
    return True


def _below(above: int) -> list[int]:
    """All processes below `above`."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(stat.read_text().rpartition(")")[2].split()[1]), []).append(int(stat.parent.name))
        except OSError:
            continue
    below, todo = [], [above]
    while todo:
        children = parents.get(todo.pop(), [])
        below += children
        todo += children
    return sorted(below)


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@contextmanager
def _cluster() -> Iterator[tuple[str, int]]:
    """A Ray cluster of this machine, on the loopback address: (address, process id of its head)."""
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2",
               f"--node-ip-address={LOOPBACK}", f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    with tempfile.TemporaryFile() as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + 60
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex((LOOPBACK, port)) == 0:
                        break
                assert head.poll() is None and time.monotonic() < deadline, "the head of the cluster did not start"
                time.sleep(0.2)
            time.sleep(3)  # the port is there before the node
            yield f"{LOOPBACK}:{port}", head.pid
        finally:
            head.terminate()
            head.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ways", type=json.loads, default=ALL, help=f"how many of which, by default {json.dumps(ALL)}")
    options = parser.parse_args()
    print(f"seed {options.seed}\n\n| # | run | killed | moment | shards done | exit | same bytes |")
    print("| ---: | --- | --- | --- | ---: | ---: | --- |")
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for one in kills(Path(folder), options.ways, options.seed):
            made.append(one)
            print(f"| {len(made)} | {one.way} | {one.victim} | {one.moment} | {one.shards} | {one.ended} | "
                  f"{'yes' if one.same else 'NO'} |", flush=True)
    print(f"\n{sum(one.same for one in made)} of {len(made)} killed runs end with the same bytes")
    sys.exit(0 if all(one.same for one in made) else 1)


if __name__ == "__main__":
    main()
