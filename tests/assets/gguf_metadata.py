"""The metadata of a GGUF file: a vocabulary of half a million strings in a second, and no tensors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def gguf_metadata(path: Path) -> dict[str, Any]:
    """Every key of the file with its value, arrays as lists. Raises `ValueError` if it is not little-endian GGUF."""
    with path.open("rb") as file:
        read = file.read

        def scalar(code: str) -> Any:
            return struct.unpack(f"<{code}", read(struct.calcsize(f"<{code}")))[0]

        def string() -> str:
            return read(scalar("Q")).decode("utf-8")

        def array() -> list[Any]:
            kind, count = scalar("I"), scalar("Q")
            if kind in SCALARS:
                layout = f"<{count}{SCALARS[kind]}"
                return list(struct.unpack(layout, read(struct.calcsize(layout))))
            item: Callable[[], Any] = string if kind == STRING else array
            return [item() for _ in range(count)]

        if read(4) != b"GGUF" or scalar("I") not in (2, 3):
            raise ValueError(f"{path.name} is not a GGUF file of version 2 or 3")
        _tensors, count = scalar("Q"), scalar("Q")
        fields: dict[str, Any] = {}
        for _ in range(count):
            key, kind = string(), scalar("I")
            fields[key] = string() if kind == STRING else array() if kind == ARRAY else scalar(SCALARS[kind])
        return fields
