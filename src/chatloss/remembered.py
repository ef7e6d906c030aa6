"""Facts that were checked once, remembered for the next run: one small JSON file each in the user's cache directory."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["cache_directory", "remember", "remembered"]


def cache_directory() -> Path:
    """CHATLOSS_CACHE, or else a directory of ours where this platform keeps what can be made again."""
    if own := os.environ.get("CHATLOSS_CACHE"):
        return Path(own)
    if given := os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None):
        return Path(given) / "chatloss"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "chatloss"


def remembered(kind: str, fact: Mapping[str, str]) -> bool:
    """Whether `fact` was remembered. What cannot be read was not."""
    try:
        return bool(json.loads(_path(kind, fact).read_text("utf-8")) == fact)
    except (OSError, ValueError, RuntimeError):
        return False


def remember(kind: str, fact: Mapping[str, str]) -> None:
    """Remember `fact`, where that can be written."""
    try:
        path = _path(kind, fact)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(fact, indent=1), "utf-8")
        part.replace(path)
    except (OSError, RuntimeError):
        return


def _path(kind: str, fact: Mapping[str, str]) -> Path:
    name = hashlib.sha256(json.dumps(fact, sort_keys=True).encode()).hexdigest()
    return cache_directory() / kind / f"{name}.json"
