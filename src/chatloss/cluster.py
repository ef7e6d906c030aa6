"""The same shard function on a Ray cluster: shards are tasks, and a task whose worker dies is run again elsewhere.

Every node must see the inputs, the tokenizer and the output under the same paths, as on a shared file system. Extra
`ray`.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, UsageError
from chatloss.manifest import Counts
from chatloss.prepare import Job, Runner, run_shard
from chatloss.shards import Shard

__all__ = ["on_ray"]

RETRIES = 5


def on_ray(address: str = "local") -> Runner:
    """A runner for `prepare`: `address` is that of a cluster ("auto": the one this machine is in) or "local".

    At most two shards per CPU of the cluster are held at a time. Raises `UsageError` where Ray is not installed or
    cannot be reached, and `ChatlossError` where a shard fails on `RETRIES` workers.
    """

    def run(shards: Iterator[Shard], job: Job, directory: Path) -> Iterator[tuple[Shard, Counts]]:
        ray = _connected(address)
        tokenizer = str(Path(job.tokenizer).absolute()) if Path(job.tokenizer).exists() else job.tokenizer
        handle = ray.put((replace(job, tokenizer=tokenizer), directory.absolute()))
        task = ray.remote(_run).options(max_retries=RETRIES, num_cpus=1)
        most = 2 * int(ray.cluster_resources().get("CPU", 1))
        running: dict[Any, Shard] = {}

        def ended() -> tuple[Shard, Counts]:
            [done], _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(done)
            try:
                return shard, ray.get(done)
            except ray.exceptions.WorkerCrashedError:
                what = f"shard {shard.index} ended {RETRIES + 1} workers"
                raise ChatlossError(what, where=shard.name, hint="is there enough memory?", kind="worker") from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        for shard in shards:
            found = replace(shard, path=str(Path(shard.path).absolute())) if shard.path else shard
            running[task.remote(handle, found)] = replace(shard, payload=())
            if len(running) >= most:
                yield ended()
        while running:
            yield ended()

    return run


def _connected(address: str) -> Any:
    try:
        import ray
    except ImportError:
        raise UsageError("Ray is not installed", where="--ray", hint="pip install 'chatloss[ray]'") from None
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            what = f"the cluster cannot be reached: {str(error).splitlines()[0][:200]}"
            raise UsageError(what, where=f"--ray {address}", hint="ray status; or --ray local") from None
    return ray


def _run(given: tuple[Job, Path], shard: Shard) -> Counts:
    job, directory = given
    return run_shard(job, _encoder(job), shard, directory)


@lru_cache(maxsize=1)
def _encoder_of(job: bytes) -> ChatEncoder:
    found: Job = pickle.loads(job)
    return found.encoder()


def _encoder(job: Job) -> ChatEncoder:
    return _encoder_of(pickle.dumps(job))
