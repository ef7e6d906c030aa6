"""The same functions of shards on a Ray cluster: a shard is a task, and if its worker dies it is run again elsewhere.

Every node must see the inputs and the output under the same URIs, or the same paths of a shared file system, and the
tokenizer. Extra `ray`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

from chatloss.errors import ChatlossError, UsageError
from chatloss.runners import Runner
from chatloss.shards import Shard

__all__ = ["on_ray"]

RETRIES = 5
T = TypeVar("T")


def on_ray(address: str = "local") -> Runner:
    """A runner for `prepare`: `address` is that of a cluster ("auto": the one this machine is in) or "local".

    At most two shards per CPU of the cluster are held at a time. Raises `UsageError` where Ray is not installed or
    cannot be reached, and `ChatlossError` where a shard fails on `RETRIES` workers.
    """

    def run(function: Callable[[Shard], T], shards: Iterator[Shard]) -> Iterator[tuple[Shard, T]]:
        ray = _connected(address)
        handle = ray.put(function)
        task = ray.remote(_call).options(max_retries=RETRIES, num_cpus=1)
        most = 2 * int(ray.cluster_resources().get("CPU", 1))
        running: dict[Any, Shard] = {}

        def ended() -> tuple[Shard, T]:
            [done], _ = ray.wait(list(running), num_returns=1)
            shard = running.pop(done)
            try:
                return shard, ray.get(done)
            except ray.exceptions.WorkerCrashedError:
                what = f"{shard.name}, bytes {shard.start} to {shard.end}, ended {RETRIES + 1} workers"
                raise ChatlossError(what, where="--ray", hint="is there enough memory?", kind="worker") from None
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        try:
            for shard in shards:
                running[task.remote(handle, shard)] = replace(shard, payload=())
                if len(running) >= most:
                    yield ended()
            while running:
                yield ended()
        finally:  # what still runs after an error must not write into what is done next
            for left in running:
                ray.cancel(left, force=True)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=60)

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
            hint = "ray status; export RAY_AUTH_MODE=token where the cluster asks for a token; or --ray local"
            raise UsageError(what, where=f"--ray {address}", hint=hint) from None
    return ray


def _call(function: Callable[[Shard], T], shard: Shard) -> T:
    return function(shard)
