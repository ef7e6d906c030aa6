"""Chats -> prepared shards, in any number of processes: one pure function of a shard, and markers of what is done.

``kill -9`` at any moment loses at most the shards in work: a shard appears under its name when it is whole, its marker
after it, and the manifest last of all.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from chatloss.dataset import ShardWriter
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, DataError
from chatloss.fast_tokens import FlatTokens, Unequal, loaded_with
from chatloss.load import Loaded, load_tokenizer
from chatloss.manifest import (
    FORMAT,
    MANIFEST,
    Counts,
    differences,
    file_sha256,
    fingerprints,
    read_manifest,
    shard_file,
    write_json,
)
from chatloss.markers import Markers
from chatloss.pipeline import Encoded, records
from chatloss.policy import Policy
from chatloss.shards import Shard, ShardReader, check_unchanged, inputs_of, shard_bytes, shards_of

__all__ = ["Job", "prepare", "run_shard"]

WORK = ".prepare"  # what is done so far; gone when all is
UNEQUAL = "unequal.json"  # in WORK: a text on which the fast encoder was seen to differ
FAST_BYTES = 8 * 2**20  # of input, for which loading the fast encoder takes less time than it saves
Progress = Callable[[int, Counts], None]
Runner = Callable[[Iterator[Shard], "Job", Path], Iterator[tuple[Shard, Counts]]]


@dataclass(frozen=True, slots=True)
class Job:
    """All that the bytes of a shard depend on beside its records. Workers build their encoder from it.

    `chat_template` is a template's text, or None for the tokenizer's own. `export` is "rows" (all that a `Sample`
    holds) or "labels" (input_ids and labels, for other trainers). `clock` is the time that templates see. `backend`,
    "reference", "fast" or "auto", is how ids are made, not which.
    """

    tokenizer: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    markers: Markers | None = None
    export: str = "rows"
    clock: str = ""
    backend: str = "reference"

    def encoder(self, loaded: Loaded | None = None, note: Callable[[str], None] | None = None) -> ChatEncoder:
        """The encoder; `loaded` saves reading the tokenizer again. `note` is told why "auto" is the reference."""
        now = datetime.fromisoformat(self.clock) if self.clock else None
        loaded = loaded_with(loaded or load_tokenizer(self.tokenizer), self.backend, note)
        return ChatEncoder.load(
            loaded, self.chat_template, self.policy, template_kwargs=self.template_kwargs,
            clock=(lambda: now) if now else datetime.now,
        )

    def describe(self, encoder: ChatEncoder) -> dict[str, Any]:
        """What identifies the job, for the manifest: the same dict, the same shards."""
        return {
            "format": FORMAT,
            "versions": {name: version(name) for name in ("chatloss", "tokenizers", "jinja2", "pyarrow")},
            **fingerprints(encoder),
            "template_kwargs": dict(self.template_kwargs),
            "policy": asdict(self.policy),
            "markers": None if self.markers is None else asdict(self.markers),
            "export": self.export,
        }


def run_shard(job: Job, encoder: ChatEncoder, shard: Shard, directory: Path) -> Counts:
    """Encode one shard and put it, then its marker, into `directory`; returns what became of its records."""
    reader, counts = ShardReader(shard), Counts()
    target = directory / shard_file(shard.index)
    partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with ShardWriter(partial, job.export) as writer:
            labels = job.export == "labels"
            for record in records(reader, encoder, markers=job.markers, strict=True, supervised=labels):
                if labels and (problem := _beyond_labels(record)) is not None:
                    reader.reject(problem.where, problem)
                    continue
                counts.add(record)
                rows = [(made.side, row) for made in record for row in made.encoding.rows]
                if rows:
                    writer.add(rows)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    counts.records, counts.rejected = reader.n_rows, reader.reject_counts
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    done = {
        "file": shard_file(shard.index), "conversations": writer.conversations, "rows": writer.rows,
        "bytes": partial.stat().st_size, "sha256": file_sha256(partial),
    }
    partial.replace(target)
    rejects = [asdict(reject) for reject in reader.rejects]
    fast = isinstance(encoder.tokens, FlatTokens)
    marker = {"shard": done, "counts": counts.to_dict(), "rejects": rejects, "fast": fast}
    write_json(_marker(directory, shard.index), marker)
    return counts


def _beyond_labels(record: Sequence[Encoded]) -> DataError | None:
    """Labels say whether a token is trained, and cannot say by how much."""
    rows = [row for made in record for row in made.encoding.rows]
    weights = {span.weight for row in rows for span in row.spans} - {0.0, 1.0}
    if not weights:
        return None
    return DataError(f"labels cannot hold the weight {min(weights):g}", where=rows[0].source, kind="weights",
                     hint="train with chatloss, or give no weights but 0 and 1")


def _marker(directory: Path, index: int) -> Path:
    return directory / WORK / f"{index:06}.json"


def prepare(
    data: Sequence[str], output: str | Path, job: Job, *, input_format: str = "auto", max_rejects: float = 0.01,
    workers: int = 1, fresh: bool = False, progress: Callable[[int], Progress] | None = None,
    note: Callable[[str], None] | None = None, runner: Runner | None = None,
) -> dict[str, Any]:
    """Prepare `data` (paths, "-", hub ids) into the directory `output`; returns the manifest, which is its last file.

    If `output` holds what an earlier call of the same kind has done, the rest is done, whatever the number of
    `workers` (processes; 1: none beside this one). If input, tokenizer, template, policy or a version has changed
    since, `DataError` says which; `fresh` starts anew. The bytes written depend on none of that. Rows that cannot be
    used are in ``rejects.jsonl``; more than the share `max_rejects` of them raises `DataError`. `progress` is called
    with the bytes of all inputs, and gives a function that is told the bytes of every shard done and its counts; `note`
    is told in words what the user should know. `runner` does the shards somewhere else, see `chatloss.cluster`.
    """
    directory = Path(output)
    _clear(directory, fresh)
    work = directory / WORK
    work.mkdir(parents=True, exist_ok=True)
    (directory / "shards").mkdir(exist_ok=True)
    inputs = inputs_of(data, input_format, work)
    size = shard_bytes(inputs)
    encoder = replace(job, backend="reference").encoder()
    about = {**job.describe(encoder), "inputs": [one.to_dict() for one in inputs], "shard_bytes": size}
    about = json.loads(json.dumps(about))
    clock = _agreed(directory, about, encoder)
    if (directory / MANIFEST).is_file():
        shutil.rmtree(work)
        return read_manifest(directory)
    total_bytes = sum(one.size for one in inputs)
    if (job.backend == "auto" and total_bytes < FAST_BYTES) or (work / UNEQUAL).exists():
        job = replace(job, backend="reference")
    job = replace(job, clock=clock)
    run = runner or (partial(_in_processes, workers=workers) if workers > 1 else None)
    told = progress(total_bytes if all(one.lines for one in inputs) else 0) if progress else None
    note = note or (lambda text: None)
    encoder = job.encoder(encoder.loaded, note)
    try:
        total = _all(shards_of(inputs, size), job, encoder, directory, run, told)
    except Unequal as error:
        note(f"{error}: encoding all of it with the reference")
        write_json(work / UNEQUAL, {"text": error.text})
        _forget_fast(directory)
        job = replace(job, backend="reference")
        total = _all(shards_of(inputs, size), job, job.encoder(), directory, run, told)
    check_unchanged(inputs)
    return _finish(directory, {**about, "clock": clock}, total, max_rejects)


# -- what was there ----------------------------------------------------------------------------------------------------


def _clear(directory: Path, fresh: bool) -> None:
    """Refuse a directory of something else; with `fresh` remove what was prepared in this one."""
    if directory.exists() and not directory.is_dir():
        raise DataError("the output is no directory", where=str(directory), hint="name another with -o")
    ours = (directory / MANIFEST).is_file() or (directory / WORK).is_dir()
    if not ours and directory.is_dir() and any(directory.iterdir()):
        raise DataError("the output directory holds other things", where=str(directory), hint="name an empty one")
    if ours and fresh:
        (directory / MANIFEST).unlink(missing_ok=True)
        for folder in (directory / WORK, directory / "shards"):
            shutil.rmtree(folder, ignore_errors=True)
    for left in directory.glob("**/.*.tmp"):  # by a run that was killed
        left.unlink(missing_ok=True)


def _agreed(directory: Path, about: dict[str, Any], encoder: ChatEncoder) -> str:
    """The time that templates see, settled when the directory was begun; raises if it was begun as something else."""
    path = directory / WORK / "job.json"
    if (directory / MANIFEST).is_file():
        before = read_manifest(directory)["job"]
    elif path.is_file():
        before = json.loads(path.read_text("utf-8"))
    else:
        named = encoder.template.source
        texts = [named] if isinstance(named, str) else named.values()
        clock = datetime.now().isoformat(timespec="seconds") if any("strftime_now" in text for text in texts) else ""
        write_json(path, {**about, "clock": clock})
        return clock
    clock = before.pop("clock")
    changed = differences(before, about)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise DataError(
            f"the directory was begun with something else: {'; '.join(changed[:3])}{more}", where=str(directory),
            hint="restore it, name another directory, or start anew with --fresh", kind="changed",
        )
    return str(clock)


def _done(directory: Path, index: int) -> dict[str, Any] | None:
    """The marker of a shard that is done and still there."""
    try:
        marker: dict[str, Any] = json.loads(_marker(directory, index).read_text("utf-8"))
        there = (directory / marker["shard"]["file"]).stat().st_size == marker["shard"]["bytes"]
    except FileNotFoundError:
        return None
    return marker if there else None


def _forget_fast(directory: Path) -> None:
    """Undo the shards that the fast encoder made."""
    for path in (directory / WORK).glob("[0-9]*.json"):
        if json.loads(path.read_text("utf-8"))["fast"]:
            path.unlink()


# -- doing the rest ----------------------------------------------------------------------------------------------------


def _all(
    shards: Iterable[Shard], job: Job, encoder: ChatEncoder, directory: Path, run: Runner | None, told: Progress | None
) -> Counts:
    """The counts of all shards, when they are done."""
    total = Counts()
    for shard, counts in _each(shards, job, encoder, directory, run):
        total.merge(counts)
        if told:
            told(shard.end - shard.start, counts)
    return total


def _each(
    shards: Iterable[Shard], job: Job, encoder: ChatEncoder, directory: Path, run: Runner | None
) -> Iterator[tuple[Shard, Counts]]:
    """Every shard with its counts, as they get done; in order where this process does them."""
    left = []

    def undone() -> Iterator[Shard]:
        for shard in shards:
            marker = _done(directory, shard.index)
            if marker is None:
                yield shard
            else:
                left.append((replace(shard, payload=()), Counts.from_dict(marker["counts"])))

    todo = undone()
    if run is None:
        for shard in todo:
            yield shard, run_shard(job, encoder, shard, directory)
    else:
        yield from run(todo, job, directory)
    yield from left


def _in_processes(shards: Iterator[Shard], job: Job, directory: Path, workers: int) -> Iterator[tuple[Shard, Counts]]:
    """The same in `workers` processes; at most two shards per process are held at a time."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(job, directory))
    running: dict[Future[Counts], Shard] = {}
    try:
        for shard in shards:
            running[pool.submit(_work, shard)] = replace(shard, payload=())
            if len(running) >= 2 * workers:
                yield from _ended(running)
        while running:
            yield from _ended(running)
    except BrokenProcessPool:
        hint = ("was it killed for want of memory? The same command goes on where it stopped; try fewer --workers. A "
                "script that calls prepare needs: if __name__ == '__main__'")
        raise ChatlossError("a worker process died", where=str(directory), hint=hint, kind="worker") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _ended(running: dict[Future[Counts], Shard]) -> list[tuple[Shard, Counts]]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    return [(running.pop(future), future.result()) for future in done]


_state: dict[str, Any] = {}


def _begin(job: Job, directory: Path) -> None:
    parent = parent_process()
    assert parent is not None
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _state.update(job=job, directory=directory, encoder=job.encoder())


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _work(shard: Shard) -> Counts:
    return run_shard(_state["job"], _state["encoder"], shard, _state["directory"])


# -- when all is done --------------------------------------------------------------------------------------------------


def _finish(directory: Path, about: dict[str, Any], total: Counts, max_rejects: float) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    first: dict[str, str] | None = None
    rejects = directory / "rejects.jsonl"
    partial = rejects.with_name(f".{rejects.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        while (marker := _done(directory, len(shards))) is not None:
            shards.append(marker["shard"])
            for reject in marker["rejects"]:
                first = first or reject
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
    partial.replace(rejects)
    rejected = sum(total.rejected.values())
    if first is not None and rejected > max_rejects * total.records:
        raise _too_many(total, first)
    manifest = {"job": about, "counts": total.to_dict(), "shards": shards}
    write_json(directory / MANIFEST, manifest, indent=1)
    shutil.rmtree(directory / WORK)
    return manifest


def _too_many(total: Counts, first: Mapping[str, str]) -> DataError:
    rejected = sum(total.rejected.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in total.rejected.most_common(5))
    share = -(-rejected * 1000 // total.records) / 1000
    return DataError(
        f"{rejected} of {total.records} rows are bad ({kinds}); the first: {first['what']}", where=first["where"],
        hint=f"{first['hint']}; or go on without such rows: --max-rejects {share:g}", kind="rejects",
    )
