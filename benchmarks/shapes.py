"""Chats rendered by the shape of another: ``python -m benchmarks.shapes``, about ten minutes.

Over all templates of the corpus: how many know the shape of a chat once they have rendered one of it, how many of four
others with stranger and stranger words they render by that, and that those are what rendering alone gives.
"""

from __future__ import annotations

import random
from unittest.mock import patch

from tests import assets
from tests.test_shapes import replayed, template_of, variants
from tests.test_traced import SHAPES, Chat

from chatloss.errors import ChatlossError, TemplateError
from chatloss.shapes import shapes

OTHERS = 4


def served(chat: Chat, texts: list[str]) -> tuple[int, int, int]:
    """(templates that know the shape, chats rendered by it, templates of which one differs)."""
    known = chats = differing = 0
    for i, text in enumerate(texts):
        try:
            count = replayed(template_of(text), variants(chat, OTHERS, random.Random(i)))
        except TemplateError:  # what does not compile, and a chat that no prefix of can be rendered
            continue
        except (AssertionError, ChatlossError):
            differing += 1
            continue
        known, chats = known + (count > 0), chats + count
    return known, chats, differing


def main() -> None:
    texts = list(dict.fromkeys(text for text in assets.templates().values() if isinstance(text, str)))
    print(f"| chat | templates of {len(texts)} | chats of {(OTHERS + 1) * len(texts)} | templates that differ |")
    print("| --- | ---: | ---: | ---: |")
    with patch.object(shapes, "OFTEN", 1):
        for name, chat in SHAPES.items():
            known, chats, differing = served(chat, texts)
            print(f"| {name} | {known} | {chats} | {differing} |", flush=True)


if __name__ == "__main__":
    main()
