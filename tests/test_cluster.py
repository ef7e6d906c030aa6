"""`prepare` on Ray: the bytes of a local run, though a worker is killed in the middle."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chatloss import cluster
from chatloss import prepare as preparing
from chatloss.cluster import on_ray
from chatloss.demo import chats_file, tokenizer_directory
from chatloss.errors import DataError, UsageError
from chatloss.prepare import Job, prepare
from chatloss.shards import Shard
from tests import crash_prepare

JOB = Job(str(tokenizer_directory()))


@pytest.fixture(scope="module")
def local() -> Iterator[str]:
    """Ray in this machine's processes, two CPUs."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield "local"
    ray.shutdown()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preparing, "shard_bytes", lambda inputs: 16384)
    monkeypatch.chdir(tmp_path)
    shutil.copy(chats_file(), "chats.jsonl")


def contents(directory: str) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in Path(directory).rglob("*") if p.is_file()}


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_ray_writes_the_bytes_of_a_local_run(local: str) -> None:
    prepare(["chats.jsonl"], "here", JOB)
    prepare(["chats.jsonl"], "there", JOB, runner=on_ray(local))
    prepare(["chats.jsonl"], Path("uri").absolute().as_uri(), JOB, runner=on_ray(local))
    assert contents("here") == contents("there") == contents("uri")


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_a_worker_that_is_killed_is_replaced(local: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prepare(["chats.jsonl"], "here", JOB)
    once = tmp_path / "killed"

    def killed_once(function: Callable[[Shard], Any], shard: Shard) -> Any:
        if shard.index == 3 and not once.exists():
            once.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(shard)

    monkeypatch.setattr(cluster, "_call", killed_once)
    prepare(["chats.jsonl"], "there", JOB, runner=on_ray(local))
    assert once.exists() and contents("here") == contents("there")


@pytest.mark.peer
def test_a_caller_or_a_worker_killed_at_a_random_moment_changes_no_byte(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    made = list(crash_prepare.kills(tmp_path, {"cluster": 2}, seed=1, copies=1))
    assert [one.victim for one in made] == ["main", "worker"] and all(one.same for one in made), made


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("small")
def test_too_many_bad_rows_fail_as_they_do_here(local: str) -> None:
    with Path("chats.jsonl").open("a") as file:
        file.write("broken\n" * 50)
    with pytest.raises(DataError, match="50 of 315 rows are bad"):
        prepare(["chats.jsonl"], "there", JOB, runner=on_ray(local))


@pytest.mark.usefixtures("small")
def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(UsageError, match="not installed") as caught:
        prepare(["chats.jsonl"], "there", JOB, runner=on_ray())
    assert "chatloss[ray]" in caught.value.hint
