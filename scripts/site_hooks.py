"""What mkdocs does to a page before it reads it; named in mkdocs.yml."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """``slow`` behind the language of a block is for the tests, and no fence to mkdocs."""
    return re.sub(r"^```(bash|python) slow$", r"```\1", markdown, flags=re.MULTILINE)
