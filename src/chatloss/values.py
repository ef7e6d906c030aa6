"""JSON values: read strictly, checked to be what a template may be shown, and named in errors."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jiter

from chatloss.errors import DataError

__all__ = ["check_json", "checked_text", "is_json", "is_text", "kind_of", "parse_json", "shown"]

_KINDS = {"NoneType": "null", "dict": "an object", "list": "a list", "str": "a string", "bool": "a boolean"}
_KINDS |= {"int": "an integer", "float": "a number"}
_MAX_DEPTH = 64
_MAX_BITS = 3320


def parse_json(text: str | bytes, where: str = "") -> Any:
    """The value of a JSON text; raises `DataError` for all that is not strictly JSON in UTF-8.

    NaN and a key that occurs twice are refused, integers stay exact. (`orjson` keeps the last of two equal keys and
    turns integers beyond 64 bits into floats, silently. `jiter` does neither; what it refuses is read again, to tell
    why.)

    >>> parse_json('{"a": 123456789012345678901}')
    {'a': 123456789012345678901}
    """
    try:
        return jiter.from_json(
            text if isinstance(text, bytes) else text.encode(), allow_inf_nan=False, cache_mode="keys",
            catch_duplicate_keys=True,
        )
    except ValueError:
        pass
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return _DECODER.decode(text)
    except DataError as error:
        raise error.at(where) if where else error from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{error.object[error.start]:02X} at offset {error.start}"
        raise DataError(what, where=where, kind="encoding", hint="convert the data to UTF-8") from None
    except RecursionError:
        raise DataError("nested too deeply", where=where, kind="json", hint="flatten it") from None
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=where, kind="json", hint="write it with a JSON library") from None


def kind_of(value: object) -> str:
    """What `value` is, in JSON's terms."""
    return _KINDS.get(type(value).__name__, f"a Python {type(value).__name__}")


def shown(value: object) -> str:
    """`value` as an error quotes it: the repr of a nested one can be endless, or recurse too deeply."""
    return repr(value[:40]) if isinstance(value, str) else repr(value) if isinstance(value, float) else kind_of(value)


def checked_text(value: object, where: str) -> str:
    """`value` if it is text that can be encoded as UTF-8; else a `DataError`."""
    if not isinstance(value, str):
        raise DataError(f"must be a string, not {kind_of(value)}", where=where, hint="convert the value to text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"holds a lone surrogate (U+{ord(value[error.start]):04X}), which is not text", where=where,
            hint="re-export the data as valid UTF-8",
        ) from None
    return value


def is_text(value: str) -> bool:
    """Whether `value` can be encoded as UTF-8."""
    try:
        if not value.isascii():
            value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_json(value: object, where: str) -> None:
    """Plain JSON values only, of bounded depth: what a template may be shown."""
    if not is_json(value):
        _find_fault(value, where)


def is_json(value: object) -> bool:
    """Whether `value` is surely fine, looked at level by level: most values are, and need no account of places."""
    texts: list[Any] = []
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is str:
                texts.append(item)
            elif kind is dict:
                texts += item
                below += item.values()
            elif kind is list:
                below += item
            elif not (item is None or kind is bool or (kind in (int, float) and abs(item) < 2**64)):
                return False
        if not below:
            return set(map(type, texts)) <= {str} and is_text("".join(texts))
        level = below
    return False


def _find_fault(value: object, where: str, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise DataError(f"is nested more than {_MAX_DEPTH} levels deep", where=where, hint="flatten it")
    if isinstance(value, str):
        checked_text(value, where)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            checked_text(key, f"{where} (a key)")
            _find_fault(item, f"{where}.{key}" if len(str(key)) < 60 else where, depth + 1)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _find_fault(item, f"{where}[{i}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"holds {value}, which is not JSON", where=where, hint="write null or a number")
    elif isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise DataError("holds an integer of more than 1,000 digits", where=where, hint="write it as a string")
    elif value is not None and not isinstance(value, bool | int | float):
        raise DataError(f"holds {kind_of(value)}, which is not JSON", where=where, hint="convert it to text")


def _constant(name: str) -> None:
    raise DataError(f"{name} is not JSON", kind="json", hint="write null or a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise DataError(f"key {twice[:40]!r} occurs twice in one object", kind="json", hint="keep one of them")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant)
