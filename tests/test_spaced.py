"""Conversations with space at the ends of their texts, as many have, are planned too."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from chatloss.encode import ChatEncoder
from chatloss.plans import spaced
from chatloss.plans.spaced import Spaced
from chatloss.shapes import shapes
from chatloss.shapes.recording import Recording
from chatloss.shapes.renderings import Renderings
from tests import conformance
from tests.test_shape_rows import FAMILIES, LONGER, at_once, encoder, planned
from tests.test_shapes import WORDS
from tests.test_traced import answer, user

__all__ = ["at_once"]  # for every test here
ENDS = ["\n", "\n\n", " \n", "\t", "\u3000", "\r\n"]


def fresh(family: str) -> ChatEncoder:
    known = encoder(family)
    return ChatEncoder.load(known.loaded, known.template.source, clock=lambda: conformance.CLOCK)


def served(made: ChatEncoder, some: Sequence[tuple[str, str, str, str]]) -> int:
    """How many of these chats had their rows from a plan; raises where such rows differ."""
    counts = [planned(made, [user(a), answer(b), user(c), answer(d)]) for a, b, c, d in some]
    return counts[-1]


@pytest.mark.parametrize("where", [{1}, {3}, {1, 3}, {0, 2}, {0, 1, 2, 3}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_end_with_space_are_planned(family: str, where: set[int]) -> None:
    chance, said = random.Random(family), ["It is four", "Tell me more", "Why is that", "Nobody knows it"]
    some = [tuple(f"{i} {chance.choice(said)}{chance.choice(ENDS) if k in where else ''}" for k in range(4))
            for i in range(8)]
    assert served(fresh(family), some) >= 5  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
def test_of_any_words(family: str) -> None:
    made, words = fresh(family), [*LONGER, *WORDS]
    for before, behind in [("", "\n"), ("\n", ""), (" ", "\n")]:
        for word in words:
            spaced_out = f"{before}{word}{behind}"
            served(made, [("one", spaced_out, "two", "The answer."), (spaced_out, "An answer", spaced_out, spaced_out)])


def test_what_is_only_space_is_no_text_with_space() -> None:
    """Where a plan takes a piece for space it must be that in all conversations that the plan is used for."""
    for family in FAMILIES:
        made = fresh(family)
        served(made, [("one", "\n", "two", "The answer."), ("one", "And so on.", "two", "The answer.")] * 3)
        served(made, [("one", "two.\n", "\n", "Yes.\n"), ("one", "two.\n", "more\n", "Yes.\n")] * 3)


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = [Recording(None, ("<u>",), 0, 1, Renderings({(1, False): (0, 1) * 50})) for _ in range(9)]  # type: ignore[arg-type]
    monkeypatch.setattr(spaced, "KEPT", 450)
    kept = Spaced()
    for one in recorded:
        made, texts = kept.of(one, ("<u>", "a\n"))  # type: ignore[misc]
        assert made.worlds.written(texts)((1, False)) == ("<u>a\n" * 50, 250)
        assert kept.of(one, ("<u>", "b\n"))[0] is made  # type: ignore[index]
    assert sum(map(len, kept._made.values())) <= 4


def test_what_is_counted_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaced, "OFTEN", 2)
    monkeypatch.setattr(spaced, "SEEN", 3)
    kept, one = Spaced(), Recording(None, (), 0, 1, Renderings({(1, False): (0, 1, 2, 3)}))  # type: ignore[arg-type]
    patterns = [[f"a{' ' * (i >> k & 1)}" for k in range(4)] for i in range(1, 16)]
    assert [kept.of(one, texts) for texts in patterns] == [None] * 15
    assert len(kept._sights) <= 3 and kept.of(one, patterns[-1]) is not None


def test_a_pattern_is_planned_when_it_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spaced, "OFTEN", 2)
    assert shapes.OFTEN == 1
    made, counts = fresh("qwen2.5"), []
    for i in range(5):
        counts.append(served(made, [("one", f"The answer {i}.\n", "two", "And another.")]))
    assert counts[0] == counts[1] == 0 and counts[-1] >= 3


@pytest.mark.parametrize("overflow", ["whole_turns", "window", "right", "drop"])
def test_a_longest_row_leaves_those_that_fit_to_their_plan(overflow: str) -> None:
    known = encoder("qwen3", max_length=64, overflow=overflow)
    made = ChatEncoder.load(known.loaded, known.template.source, known.policy, clock=lambda: conformance.CLOCK)
    some = [("one", f"The answer is {i}.", "two" + " and more" * (60 if i % 3 == 2 else 1), "Five.") for i in range(12)]
    assert served(made, some) >= 6
