"""Settings of the whole test run."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Generated conversations are slow to make on a busy machine; that is no failure.
settings.register_profile("chatloss", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("chatloss")


@pytest.fixture(autouse=True)
def loggers_speak() -> None:
    """Whatever a test before has silenced."""
    logging.disable(logging.NOTSET)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_kept(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a module's cached functions hold (tokenizers, encoders with their recordings) goes when its tests end."""
    yield
    module = getattr(request.node, "obj", None)
    for value in [*vars(module).values()] if isinstance(module, ModuleType) else ():
        if hasattr(value, "cache_clear") and value.__module__ == module.__name__:
            value.cache_clear()


@pytest.fixture(scope="module")
def trainer_runs() -> Iterator[None]:
    """For tests that run transformers' Trainer often: one thread, no progress bars, and little to collect.

    Every training run of transformers ends in a full garbage collection; it need not see what is there before.
    """
    import datasets
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    datasets.enable_progress_bars()
    torch.set_num_threads(threads)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`prepare` is interrupted once, when it begins its fifth shard; the indices of all shards that it begins."""
    from chatloss import prepare

    run, begun = prepare.run_shard, []

    def counted(*args: Any) -> Any:
        begun.append(args[2].index)
        if len(begun) == 5:
            raise KeyboardInterrupt
        return run(*args)

    monkeypatch.setattr(prepare, "run_shard", counted)
    return begun


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Where CHATLOSS_NO_SKIPS is set (in CI), a skipped test fails the run: nothing may be left out silently."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter is not None else []
    if os.environ.get("CHATLOSS_NO_SKIPS") and skipped and exitstatus == 0:
        print(f"\n{len(skipped)} skipped tests: {[report.nodeid for report in skipped][:5]}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
