"""The documents do what they say: commands run, code runs, the command-line page is that of --help."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from scripts.cli_docs import PAGE, render

from chatloss.demo import chats_file, tokenizer_directory
from chatloss.policy import Policy
from chatloss.sample import Reason
from chatloss.view import OUTCOMES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# ```bash and ```python blocks are run; ```sh are for the reader's own machine (installing, make), ```text is output.
BLOCK = re.compile(r"^```(bash|python)(?: (slow))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, slow: bool) -> list[tuple[str, str]]:
    return [(kind, body) for kind, mark, body in BLOCK.findall(page.read_text("utf-8")) if bool(mark) == slow]


def run_page(page: Path, folder: Path, slow: bool) -> None:
    """All blocks of a page, in order, in one folder that holds what the pages speak of."""
    shutil.copytree(tokenizer_directory(), folder / "tokenizer")
    shutil.copy(chats_file(), folder / "chats.jsonl")
    shutil.copy(chats_file(), folder / "data.jsonl")
    for name in ("messy.jsonl", "preferences.jsonl"):
        shutil.copy(tokenizer_directory().parent / name, folder / name)
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "NO_COLOR": "1",
                   "PYTHONPATH": str(ROOT)}
    for kind, body in blocks(page, slow):
        command = ["bash", "-euo", "pipefail", "-c", body] if kind == "bash" else [sys.executable, "-c", body]
        run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1500)
        assert run.returncode == 0, f"{page.name}:\n{body}\n{run.stdout[-2000:]}\n{run.stderr[-2000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, slow=False)], ids=lambda page: page.name)
def test_every_block_of_the_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, slow=True)], ids=lambda page: page.name)
def test_every_slow_block_of_the_page_runs(page: Path, tmp_path: Path) -> None:
    run_page(page, tmp_path, slow=True)


def test_the_page_on_reasons_names_every_reason_outcome_and_policy() -> None:
    text = (ROOT / "docs" / "why.md").read_text("utf-8")
    for name in [*(reason.name.lower() for reason in Reason), *OUTCOMES, *(field.name for field in fields(Policy))]:
        assert f"`{name}`" in text, name


def test_the_command_line_page_is_that_of_help() -> None:
    assert PAGE.read_text("utf-8") == render(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_test_that_the_page_on_exactness_names_exists() -> None:
    root = Path(__file__).parents[1]
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "exactness.md").read_text("utf-8")))
    sources = "".join(path.read_text("utf-8") for path in (root / "tests").glob("test_*.py"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in sources] == []
