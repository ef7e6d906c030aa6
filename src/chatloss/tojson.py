"""The filter `tojson` as engines have it. Not jinja's own: that one escapes HTML, which no model has seen."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from chatloss.kept import Kept

__all__ = ["tojson"]

_FORMS = 4  # of which texts are kept


def tojson(
    x: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """The JSON text of `x`."""
    form = ensure_ascii, indent, separators, sort_keys
    try:
        encoder, known = _encoder(*form)
    except TypeError:  # a form that cannot be hashed
        return _new_encoder(*form).encode(x)
    if indent is None:
        return encoder.encode(x)
    # Indented text is made by Python code, and takes longer than all else that is done with a tool. What is the same in
    # one line is the same in many.
    line = json.dumps(x, ensure_ascii=False, sort_keys=sort_keys)
    found = known.texts.get(line)
    return known.keep(line, encoder.encode(x)) if found is None else found


def _new_encoder(ensure_ascii: Any, indent: Any, separators: Any, sort_keys: Any) -> json.JSONEncoder:
    return json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=_FORMS, typed=True)
def _encoder(ensure_ascii: Any, indent: Any, separators: Any, sort_keys: Any) -> tuple[json.JSONEncoder, Kept]:
    """An encoder, and what was written with it."""
    return _new_encoder(ensure_ascii, indent, separators, sort_keys), Kept()
