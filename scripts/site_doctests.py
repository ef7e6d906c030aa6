"""Fences the doctests in docstrings, which are Markdown else, for the reference on the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

# From the first prompt to the end of what it prints: an empty line ends both.
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*(?:\n\n>>> .*(?:\n.+)*)*", re.MULTILINE)


class Doctests(griffe.Extension):
    """Told to mkdocstrings in mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
