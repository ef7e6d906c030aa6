"""Counting a stream in little memory: which texts came before, how long things are, where a cause was seen."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

__all__ = ["MOST_HASHES", "Duplicates", "Lengths", "Seen"]

MOST_HASHES = 10_000_000
KEPT_EXAMPLES = 100
_ROW_BITS, _MESSAGE_BITS = 34, 14


@dataclass(slots=True)
class Seen:
    """How often a cause came, where first, the sources of the first 100; `severity` and so on where not the usual."""

    severity: str = ""
    text: str = ""
    remedy: str = ""
    count: int = 0
    example: str = ""
    detail: str = ""
    sources: dict[str, None] = field(default_factory=dict)

    def add(self, source: str, where: str = "", detail: str = "") -> None:
        if not self.count:
            self.example, self.detail = f"{source} {where}".strip(), detail
        self.count += 1
        if source and len(self.sources) < KEPT_EXAMPLES:
            self.sources[source] = None


class Lengths:
    """A histogram of lengths: exact percentiles, memory only for lengths that differ.

    >>> lengths = Lengths()
    >>> for n in (5, 1, 3, 2, 4): lengths.add(n)
    >>> lengths.summary()
    {'min': 1, 'median': 3, 'p95': 5, 'max': 5, 'mean': 3.0}
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def summary(self) -> dict[str, float]:
        """min, median, p95, max (each a length that occurs; nearest rank) and mean; all 0 without any length."""
        if not self._counts:
            return {"min": 0, "median": 0, "p95": 0, "max": 0, "mean": 0.0}
        lengths = np.array(sorted(self._counts))
        counts = np.array([self._counts[n] for n in lengths.tolist()])
        ends, total = np.cumsum(counts), int(counts.sum())
        at = {name: int(lengths[np.searchsorted(ends, -(-total * share // 100))])
              for name, share in (("min", 0), ("median", 50), ("p95", 95), ("max", 100))}
        return {**at, "mean": round(float(lengths @ counts / total), 1)}


class Duplicates:
    """Which texts of a stream came before: 16 bytes for each, the first 10 million of them.

    >>> texts = Duplicates()
    >>> for row, text in enumerate(["a", "b", "a", "a"], 1): texts.add(text.encode(), f"x.jsonl:{row}", 0)
    >>> texts.count(), list(texts.places(1))
    (2, [('x.jsonl:3', 0, 'x.jsonl:1', 0)])
    """

    def __init__(self, most: int = MOST_HASHES) -> None:
        self.most = most
        self.left_out = 0
        self._hashes, self._places = array("Q"), array("Q")
        self._files: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, text: bytes, source: str, message: int) -> None:
        if len(self._hashes) >= self.most:
            self.left_out += 1
            return
        self._hashes.append(int.from_bytes(blake2b(text, digest_size=8).digest(), "little"))
        self._places.append(self._packed(source, message))

    def count(self) -> int:
        """How many texts are equal to an earlier one."""
        return len(self._hashes) - len(np.unique(np.frombuffer(self._hashes, np.uint64))) if self._hashes else 0

    def places(self, most: int) -> Iterator[tuple[str, int, str, int]]:
        """(source, message, source of its first occurrence, message there) of the first `most` repeated texts."""
        if not self._hashes:
            return
        hashes = np.frombuffer(self._hashes, np.uint64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        repeated = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        for at in np.sort(order[repeated])[:most].tolist():
            first = int(order[np.searchsorted(ordered, hashes[at])])
            yield (*self._unpacked(at), *self._unpacked(first))

    def _packed(self, source: str, message: int) -> int:
        name, _, row = source.rpartition(":")
        if not row.isascii() or not row.isdigit() or int(row) >= 1 << _ROW_BITS:
            name, row = source, "0"
        if name not in self._files and len(self._files) >= (1 << 16) - 1:
            name = ""  # more files than can be told apart
        file = self._files.setdefault(name, len(self._files))
        return file << (_ROW_BITS + _MESSAGE_BITS) | int(row) << _MESSAGE_BITS | min(message, (1 << _MESSAGE_BITS) - 1)

    def _unpacked(self, at: int) -> tuple[str, int]:
        packed = self._places[at]
        name = list(self._files)[packed >> (_ROW_BITS + _MESSAGE_BITS)]
        row = packed >> _MESSAGE_BITS & (1 << _ROW_BITS) - 1
        return (f"{name}:{row}" if row else name), packed & (1 << _MESSAGE_BITS) - 1
