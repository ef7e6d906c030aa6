"""Texts that are kept are those that would be made again."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatloss import kept
from chatloss.kept import Kept
from chatloss.meter import Bounds, Exceeded, Meter
from chatloss.shapes.recorder import OfTools
from chatloss.tojson import tojson

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from([0.0, -0.0, 1.0, 2.5]),
                    st.sampled_from(["", "a", "1", "é", '"', "true"]))
VALUES = st.recursive(SCALARS, lambda one: st.one_of(
    st.lists(one, max_size=3), st.dictionaries(st.sampled_from(["", "a", "1", "é"]), one, max_size=3)), max_leaves=8)


@given(values=st.lists(VALUES, min_size=1, max_size=8))
def test_json_is_the_same_however_often_it_was_written(values: list[Any]) -> None:
    for value in values * 2:
        for form in ({"indent": 4}, {"indent": 2, "ensure_ascii": True}, {"indent": "\t", "sort_keys": True}, {},
                     {"indent": 1, "separators": (",", ":")}, {"indent": 0, "separators": [", ", ": "]}):
            assert tojson(value, **form) == json.dumps(value, **{"ensure_ascii": False, **form})


@given(values=st.lists(VALUES, min_size=1, max_size=8))
def test_what_is_written_of_tools_is_that_of_no_other_tools(values: list[Any]) -> None:
    same = Kept()
    one, other = (OfTools(name, partial(written, name), Meter(Bounds()), same) for name in "ab")
    for value in values * 2:
        for tools in ([value], (value,), [[value]], [(value,)]):
            assert one(tools) == written("a", tools) and other(tools) == written("b", tools)
            assert one(tools, indent=4) == written("a", tools, 4)


def written(name: str, tools: Any, indent: Any = None) -> str:
    return f"{name}{tools}{indent}"


def test_half_characters_are_not_the_whole_one() -> None:
    for text in ("\ud83d\ude00", "😀"):
        assert tojson({"a": text}, indent=2) == json.dumps({"a": text}, indent=2, ensure_ascii=False)


def test_only_so_much_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_LONGEST", 100)
    monkeypatch.setattr(kept, "_MOST", 1000)
    some = Kept()
    for k in range(500):
        assert some.keep(str(k), "x" * 50) == "x" * 50
        assert sum(len(of) + len(text) for of, text in some.texts.items()) <= 1000
    assert some.texts
    some.keep("long", "x" * 100)
    assert "long" not in some.texts


def test_what_is_kept_is_counted_each_time() -> None:
    """A template may ask for the same text again and again."""
    meter = Meter(Bounds(built=10_000))
    long = OfTools("a", lambda tools: "x" * 2000, meter, Kept())
    meter.start()
    with pytest.raises(Exceeded):
        for _ in range(100):
            long([1])
