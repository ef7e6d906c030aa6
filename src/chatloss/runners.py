"""Who calls a function of every shard: threads or processes of this machine. `cluster` has another."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process
from typing import Protocol, TypeVar

from chatloss.errors import ChatlossError
from chatloss.shards import Shard

__all__ = ["Runner", "in_processes", "in_threads", "seldom_collected"]

T = TypeVar("T")
OBJECTS = 50_000  # are made between two looks for garbage


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Look for cyclic garbage less often: conversations leave hardly any, and looking takes a tenth of their time."""
    before = gc.get_threshold()
    if before[0]:  # 0: somebody has switched it off
        gc.set_threshold(max(before[0], OBJECTS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class Runner(Protocol):
    """Calls a function of every shard, anywhere and in any order, and gives each shard (its payload no more) with what
    the function returned. It holds few shards at a time.
    """

    def __call__(self, function: Callable[[Shard], T], shards: Iterator[Shard], /) -> Iterator[tuple[Shard, T]]: ...


def in_threads(function: Callable[[Shard], T], shards: Iterator[Shard], workers: int) -> Iterator[tuple[Shard, T]]:
    """The function of every shard, in order. The shards are all held: they should have no payload."""
    with ThreadPoolExecutor(workers) as pool:
        some = list(shards)
        yield from zip(some, pool.map(function, some), strict=True)


def in_processes(function: Callable[[Shard], T], shards: Iterator[Shard], workers: int) -> Iterator[tuple[Shard, T]]:
    """The function of every shard as they get done, in `workers` processes; at most two shards for each are held."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)
    running: dict[Future[T], Shard] = {}
    try:
        for shard in shards:
            running[pool.submit(function, shard)] = replace(shard, payload=())
            if len(running) >= 2 * workers:
                yield from _ended(running)
        while running:
            yield from _ended(running)
    except BrokenProcessPool:
        hint = ("was it killed for want of memory? The same command goes on where it stopped; try fewer --workers. A "
                "script that calls prepare needs: if __name__ == '__main__'")
        raise ChatlossError("a worker process died", where="--workers", hint=hint, kind="worker") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(running: dict[Future[T], Shard]) -> list[tuple[Shard, T]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    return [(running.pop(future), future.result()) for future in done]


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
