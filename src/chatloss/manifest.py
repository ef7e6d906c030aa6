"""What a prepared directory says of itself: what it was made of, what became of every turn, and a checksum per shard.

Everything here is a function of input and choices: no times, no number of workers, nothing of the machine.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from chatloss.encode import ChatEncoder
from chatloss.errors import DataError
from chatloss.folders import Folder
from chatloss.pipeline import Encoded
from chatloss.values import parse_json

__all__ = ["FORMAT", "MANIFEST", "Counts", "differences", "file_sha256", "fingerprints", "read_manifest", "shard_file",
           "write_json"]

FORMAT = 5
MANIFEST = "manifest.json"


@dataclass(slots=True)
class Counts:
    """What became of the records of a shard, or of all of them.

    ``records = conversations + pairs + judged + sum(rejected)``; of all that are not rejected `empty` have no row.
    `outcomes` and `untrained` count turns, `reasons` tokens, `tokens` and `trained` the tokens of all rows. Rows and
    tokens are counted where they are written.
    """

    records: int = 0
    conversations: int = 0
    pairs: int = 0
    judged: int = 0
    empty: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    untrained: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, record: Sequence[Encoded]) -> None:
        """Count one conversation, one pair or one judged answer, without its rows."""
        if len(record) == 2:
            self.pairs += 1
        elif record[0].side:
            self.judged += 1
        else:
            self.conversations += 1
        self.empty += not any(made.encoding.rows for made in record)
        for encoding in (made.encoding for made in record):
            for outcome in encoding.outcomes.values():
                self.outcomes[outcome] += 1
            for why in encoding.untrained.values():
                self.untrained[why] += 1

    def merge(self, other: Counts) -> None:
        """Add another shard's counts."""
        for entry in fields(self):
            mine, more = getattr(self, entry.name), getattr(other, entry.name)
            if isinstance(mine, Counter):
                mine.update(more)
            else:
                setattr(self, entry.name, mine + more)

    def to_dict(self) -> dict[str, Any]:
        values = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return {name: dict(sorted(value.items())) if isinstance(value, Counter) else value for name, value in values}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Counts:
        plain: dict[str, Any] = {n: Counter(value) if isinstance(value, dict) else value for n, value in data.items()}
        return cls(**plain)


def shard_file(index: int) -> str:
    """Where shard `index` lies in its directory."""
    return f"shards/{index:06}.parquet"


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a prepared directory, whoever made it. Raises `DataError` where it is none, or of another format.
    """
    path, data = folder.place(MANIFEST), folder.read(MANIFEST)
    if data is None:
        raise DataError("the prepared directory is not finished", where=folder.name,
                        hint="run the same `chatloss prepare` again: it goes on where it stopped")
    damaged = DataError("this is no manifest of `chatloss prepare`", where=path, kind="damaged",
                        hint="prepare the chats again with --fresh")
    try:
        manifest: dict[str, Any] = parse_json(data)
        version, shards = manifest["job"]["format"], manifest["shards"]
        plain = [(shard["file"], shard["bytes"] >= 0, shard["conversations"] >= 0) for shard in shards]
        sound = plain == [(shard_file(i), True, True) for i in range(len(shards))] and "export" in manifest["job"]
        if version == FORMAT:
            Counts.from_dict(manifest["counts"])
    except (DataError, KeyError, TypeError, AttributeError):
        raise damaged from None
    if not sound:
        raise damaged
    if version != FORMAT:
        raise DataError(f"the rows have format {version}, and this version reads {FORMAT}", where=path,
                        hint="prepare the chats again with --fresh", kind="changed")
    return manifest


def fingerprints(encoder: ChatEncoder) -> dict[str, Any]:
    """What tells tokenizers and templates apart, whatever directory they are in."""
    source = encoder.template.source
    named = {"default": source} if isinstance(source, str) else source
    return {
        "tokenizer": {
            "sha256": _sha256(encoder.tokens.serialised()), "special_tokens": dict(encoder.loaded.special_tokens),
            "stop_ids": list(encoder.loaded.stop_ids),
        },
        "template": {name: _sha256(text) for name, text in sorted(named.items())},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Where two descriptions differ, one line each, by dotted key.

    >>> differences({"policy": {"turns": "all"}, "format": 1}, {"policy": {"turns": "last"}, "format": 1})
    ["policy.turns was 'all' and is 'last'"]
    """
    old, new = dict(_flat(before)), dict(_flat(now))
    return [
        f"{key} was {_short(old.get(key))} and is {_short(new.get(key))}"
        for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)
    ]


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list) and value and isinstance(value[0], Mapping):
        for i, item in enumerate(value):
            yield from _flat(item, f"{key}[{i}]")
    else:
        yield key, value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}…{text[-8:]}"


def write_json(folder: Folder, file: str, value: object, *, indent: int | None = None) -> None:
    """Write `value` in one step: a reader sees the old file or the new one."""
    folder.write(file, f"{json.dumps(value, ensure_ascii=False, indent=indent)}\n".encode())


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
