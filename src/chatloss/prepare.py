"""Chats -> prepared shards, in any number of processes: one pure function of a shard, and markers of what is done.

``kill -9`` at any moment loses at most the shards in work: a shard appears under its name when it is whole, its marker
after it, and the manifest last of all.
"""

from __future__ import annotations

import ctypes
import json
import pickle
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

from chatloss.dataset import ShardWriter
from chatloss.encode import ChatEncoder
from chatloss.errors import ChatlossError, DataError
from chatloss.fast_tokens import FlatTokens, Unequal, loaded_with
from chatloss.folders import Folder
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
from chatloss.runners import Runner, in_processes, in_threads, seldom_collected
from chatloss.shards import (
    Input,
    Shard,
    ShardReader,
    blocks_of,
    check_unchanged,
    hashed,
    inputs_of,
    shard_bytes,
    shards_of,
    with_blocks,
)

__all__ = ["Job", "prepare", "run_shard"]

WORK = ".prepare"  # what is done so far; gone when all is
UNEQUAL = f"{WORK}/unequal.json"  # a text on which the fast encoder was seen to differ
FRESH = f"{WORK}/fresh.json"  # that what is here is being cleared
REJECTS = "rejects.jsonl"
DONE = re.compile(re.escape(WORK) + r"/[0-9]+\.json")
READERS = 16  # markers that are read at the same time: each is a request where storage is remote
FAST_BYTES = 8 * 2**20  # of input, for which loading the fast encoder takes less time than it saves
TOLD_BYTES = 10**10  # of input, which takes so long to hash that it should be said
Progress = Callable[[int, Counts], None]


@dataclass(frozen=True, slots=True)
class Job:
    """All that the bytes of a shard depend on beside its records. Workers build their encoder from it.

    `chat_template` is a template's text, or None for the tokenizer's own. `export` is "rows" (all that a `Sample`
    holds) or "labels" (input_ids and labels, for other trainers). `clock` is the time that templates see. `backend`,
    "reference", "fast" or "auto", is how ids are made, not which; `trace` is that of `ChatEncoder.load`.
    """

    tokenizer: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    policy: Policy = field(default_factory=Policy)
    markers: Markers | None = None
    export: str = "rows"
    clock: str = ""
    backend: str = "reference"
    trace: bool = True

    def encoder(self, loaded: Loaded | None = None, note: Callable[[str], None] | None = None) -> ChatEncoder:
        """The encoder; `loaded` saves reading the tokenizer again. `note` is told why "auto" is the reference."""
        now = datetime.fromisoformat(self.clock) if self.clock else None
        loaded = loaded or load_tokenizer(self.tokenizer)
        _give_back()
        loaded = loaded_with(loaded, self.backend, note)
        _give_back()
        return ChatEncoder.load(
            loaded, self.chat_template, self.policy, template_kwargs=self.template_kwargs,
            clock=(lambda: now) if now else datetime.now, trace=self.trace,
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


def _give_back() -> None:
    """Return free memory to the system: a tokenizer takes four times as much to load as to keep. Only glibc hoards it.
    """
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@seldom_collected()
def run_shard(job: Job, encoder: ChatEncoder, shard: Shard, folder: Folder) -> Counts:
    """Encode one shard and put it, then its marker, into `folder`; returns what became of its records."""
    reader, counts = ShardReader(shard), Counts()
    file = shard_file(shard.index)
    with folder.new(file) as path:
        with ShardWriter(path, job.export) as writer:
            labels = job.export == "labels"
            for record in records(reader, encoder, markers=job.markers, strict=True, supervised=labels, ahead=True):
                if labels and (problem := _beyond_labels(record)) is not None:
                    reader.reject(problem.where, problem)
                    continue
                counts.add(record)
                rows = [(made.side, row) for made in record for row in made.encoding.rows]
                if rows:
                    writer.add(rows)
        done = {"file": file, "conversations": writer.conversations, "rows": writer.counts.rows,
                "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    counts.merge(writer.counts)
    counts.records, counts.rejected = reader.n_rows, reader.reject_counts
    rejects = [asdict(one) for one in sorted(reader.rejects, key=lambda one: int(one.source.rpartition(":")[2]))]
    fast = isinstance(encoder.tokens, FlatTokens)
    marker = {"shard": done, "of": shard.digest, "counts": counts.to_dict(), "rejects": rejects, "fast": fast}
    write_json(folder, _marker(shard.index), marker)
    return counts


def _beyond_labels(record: Sequence[Encoded]) -> DataError | None:
    """Labels say whether a token is trained, and cannot say by how much."""
    rows = [row for made in record for row in made.encoding.rows]
    weights = {span.weight for row in rows for span in row.spans} - {0.0, 1.0}
    if not weights:
        return None
    return DataError(f"labels cannot hold the weight {min(weights):g}", where=rows[0].source, kind="weights",
                     hint="train with chatloss, or give no weights but 0 and 1")


def _marker(index: int) -> str:
    return f"{WORK}/{index:06}.json"


def prepare(
    data: Sequence[str], output: str | Path, job: Job, *, input_format: str = "auto", max_rejects: float = 0.01,
    workers: int = 1, fresh: bool = False, progress: Callable[[int], Progress] | None = None,
    note: Callable[[str], None] | None = None, runner: Runner | None = None,
) -> dict[str, Any]:
    """Prepare `data` (paths, URIs, "-", hub ids) into the directory or URI `output`; returns the manifest, its last.

    If `output` holds what an earlier call of the same kind has done, the rest is done, whatever the number of
    `workers` (processes; 1: none beside this one). If input, tokenizer, template, policy or a version has changed
    since, `DataError` says which; `fresh` starts anew. The bytes written depend on none of that. Rows that cannot be
    used are in ``rejects.jsonl``; more than the share `max_rejects` of them raises `DataError`. `progress` is called
    with the bytes of all inputs, and gives a function that is told the bytes of every shard done and its counts; `note`
    is told in words what the user should know. `runner` does the shards somewhere else, see `chatloss.cluster`.
    """
    folder = Folder(str(output))
    try:
        _clear(folder, fresh)
        folder.make(WORK, "shards")
    except OSError as error:
        what = f"the output cannot be written: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
        raise DataError(what, where=folder.name, hint="check the path and its permissions", kind="output") from None
    inputs = inputs_of(data, input_format, folder, f"{WORK}/")
    size = shard_bytes(inputs)
    encoder = replace(job, backend="reference").encoder()

    def known(some: Sequence[Input]) -> list[Input]:
        blocks = blocks_of(some, size)
        return with_blocks(some, runner(hashed, blocks) if runner else in_threads(hashed, blocks, workers))

    note = note or (lambda text: None)
    total_bytes = sum(one.size for one in inputs)
    if total_bytes > TOLD_BYTES:
        note(f"hashing {total_bytes / 1e9:.0f} GB of input first")
    inputs = known(inputs)
    about = {**job.describe(encoder), "inputs": [one.to_dict() for one in inputs], "shard_bytes": size}
    about = json.loads(json.dumps(about))
    clock = _agreed(folder, about, encoder)
    if folder.read(MANIFEST) is not None:
        folder.delete_folder(WORK)
        return read_manifest(folder)
    if (job.backend == "auto" and total_bytes < FAST_BYTES) or folder.read(UNEQUAL) is not None:
        job = replace(job, backend="reference")
    tokenizer = Path(job.tokenizer)  # workers may run somewhere else
    job = replace(job, clock=clock, tokenizer=str(tokenizer.absolute()) if tokenizer.exists() else job.tokenizer)
    run = runner or (partial(in_processes, workers=workers) if workers > 1 else None)
    told = progress(total_bytes if all(one.lines for one in inputs) else 0) if progress else None
    here: ChatEncoder | None = None
    if run is None or job.backend == "auto":  # which is settled, and told, once
        here = job.encoder(encoder.loaded, note)
        job = replace(job, backend="fast" if isinstance(here.tokens, FlatTokens) else "reference")
    if run is not None:
        here = None  # workers have their own
    del encoder
    _give_back()
    try:
        total, n = _all(shards_of(inputs, size), job, here, folder, run, told)
    except Unequal as error:
        note(f"{error}: encoding all of it with the reference")
        write_json(folder, UNEQUAL, {"text": error.text})
        _forget_fast(folder)
        job = replace(job, backend="reference")
        here = job.encoder() if run is None else None
        total, n = _all(shards_of(inputs, size), job, here, folder, run, told)
    check_unchanged(inputs, known)
    return _finish(folder, {**about, "clock": clock}, total, n, max_rejects)


# -- what was there ----------------------------------------------------------------------------------------------------


def _clear(folder: Folder, fresh: bool) -> None:
    """Refuse a directory of something else; with `fresh` remove what was prepared in this one."""
    names = folder.names()
    ours = MANIFEST in names or WORK in names
    if names and not ours:
        raise DataError("the output directory holds other things", where=folder.name, hint="name an empty one")
    if ours and fresh:
        folder.make(WORK)
        write_json(folder, FRESH, {})  # what a kill leaves from here on is still ours, and has no manifest
        folder.delete(MANIFEST)
        folder.delete(REJECTS)
        folder.delete_folder("shards")
        folder.delete_folder(WORK)
    elif ours:
        _sweep(folder)


def _sweep(folder: Folder, keep: Collection[str] = ()) -> None:
    """Delete what runs that were killed have left half written, and the shards that are not among those to keep."""
    for name in folder.files():
        hidden = name.rpartition("/")[2].startswith(".") and name.endswith(".tmp")
        if hidden or (keep and name.startswith("shards/") and name not in keep):
            folder.delete(name)


def _agreed(folder: Folder, about: dict[str, Any], encoder: ChatEncoder) -> str:
    """The time that templates see, settled when the directory was begun; raises if it was begun as something else."""
    begun = folder.read(f"{WORK}/job.json")
    if folder.read(MANIFEST) is not None:
        before = read_manifest(folder)["job"]
    elif begun is not None:
        before = json.loads(begun)
    else:
        for name in folder.files(WORK):  # markers whose job was deleted, by a run that was killed while it cleared
            if name.endswith(".json"):
                folder.delete(name)
        named = encoder.template.source
        texts = [named] if isinstance(named, str) else named.values()
        clock = datetime.now().isoformat(timespec="seconds") if any("strftime_now" in text for text in texts) else ""
        write_json(folder, f"{WORK}/job.json", {**about, "clock": clock})
        return clock
    clock = before.pop("clock")
    found = differences(before, about)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise DataError(
            f"the directory was begun with something else: {'; '.join(found[:3])}{more}", where=folder.name,
            hint="restore it, name another directory, or start anew with --fresh", kind="changed",
        )
    return str(clock)


def _done(folder: Folder) -> Iterator[tuple[int, dict[str, Any]]]:
    """(index, marker) of every shard that is done and still there, in order."""
    sizes = folder.files()
    indices = [int(PurePath(name).stem) for name in sorted(sizes) if DONE.fullmatch(name)]
    with ThreadPoolExecutor(READERS) as pool:
        for at in range(0, len(indices), READERS):
            some = indices[at : at + READERS]
            for index, data in zip(some, pool.map(folder.read, map(_marker, some)), strict=True):
                marker = json.loads(data or b"null")
                if marker and sizes.get(marker["shard"]["file"]) == marker["shard"]["bytes"]:
                    yield index, marker


def _forget_fast(folder: Folder) -> None:
    """Undo the shards that the fast encoder made."""
    for index, marker in _done(folder):
        if marker["fast"]:
            folder.delete(_marker(index))


# -- doing the rest ----------------------------------------------------------------------------------------------------


def _all(
    shards: Iterator[Shard], job: Job, here: ChatEncoder | None, folder: Folder, run: Runner | None,
    told: Progress | None,
) -> tuple[Counts, int]:
    """The counts of all shards, when they are done, and their number."""
    total, n = Counts(), 0
    before = {index: (marker["of"], marker["counts"]) for index, marker in _done(folder)}

    def done(shard: Shard, counts: Counts) -> None:
        nonlocal n
        n += 1
        total.merge(counts)
        if told:
            told(shard.end - shard.start, counts)

    def undone() -> Iterator[Shard]:
        for shard in shards:
            of, counts = before.pop(shard.index, ("", {}))
            if of == shard.digest:
                done(shard, Counts.from_dict(counts))
            else:
                yield shard

    if run is None:
        assert here is not None, "this process does the shards"
        for shard in undone():
            done(shard, run_shard(job, here, shard, folder))
    else:
        for shard, counts in run(partial(work, job, folder.absolute()), undone()):
            done(shard, counts)
    return total, n


def work(job: Job, folder: Folder, shard: Shard) -> Counts:
    """`run_shard` in any process, which keeps its encoder for the next shard."""
    return run_shard(job, _kept_encoder(pickle.dumps(job)), shard, folder)


@lru_cache(maxsize=1)
def _kept_encoder(job: bytes) -> ChatEncoder:
    found: Job = pickle.loads(job)
    return found.encoder()


# -- when all is done --------------------------------------------------------------------------------------------------


def _finish(folder: Folder, about: dict[str, Any], total: Counts, n: int, max_rejects: float) -> dict[str, Any]:
    shards: list[dict[str, Any]] = []
    first: dict[str, str] | None = None
    with folder.new(REJECTS) as path, path.open("w", encoding="utf-8") as file:
        for _, marker in islice(_done(folder), n):
            shards.append(marker["shard"])
            for reject in marker["rejects"]:
                first = first or reject
                file.write(json.dumps(reject, ensure_ascii=False) + "\n")
            more = sum(marker["counts"]["rejected"].values()) - len(marker["rejects"])
            if more:  # a reader keeps only so many
                file.write(json.dumps({"kind": "more", "what": f"{more} further rejects"}) + "\n")
    if [shard["file"] for shard in shards] != [shard_file(i) for i in range(n)]:
        raise ChatlossError("shards are gone that were there before", where=folder.name, kind="changed",
                            hint="does another process write here? The same command makes what is missing")
    rejected = sum(total.rejected.values())
    if first is not None and rejected > max_rejects * total.records:
        raise _too_many(total, first)
    _sweep(folder, keep={shard["file"] for shard in shards})
    manifest = {"job": about, "counts": total.to_dict(), "shards": shards}
    write_json(folder, MANIFEST, manifest, indent=1)
    folder.delete_folder(WORK)
    return manifest


def _too_many(total: Counts, first: Mapping[str, str]) -> DataError:
    rejected = sum(total.rejected.values())
    kinds = ", ".join(f"{count} {kind}" for kind, count in total.rejected.most_common(5))
    share = -(-rejected * 1000 // total.records) / 1000
    return DataError(
        f"{rejected} of {total.records} rows are bad ({kinds}); the first: {first['what']}", where=first["where"],
        hint=f"{first['hint']}; or go on without such rows: --max-rejects {share:g}", kind="rejects",
    )
