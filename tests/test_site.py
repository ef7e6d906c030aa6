"""The site: built strictly, so that no link, anchor or name in it is broken, and without a request to anybody."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chatloss.hf
from tests.test_page_in_browser import chromium  # noqa: F401

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return folder


def test_every_page_is_built_and_asks_no_other_server_for_anything(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert pages <= {path.relative_to(site) for path in site.rglob("*.html")}
    loads = r'<(?:script|img|iframe)[^>]*\ssrc="https?:|<link[^>]*href="https?:|url\(["\']?(?:https?:)?//'
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text("utf-8")
        assert not re.search(loads, text), path
        assert "```" not in text and "<code>bash" not in text, f"a block that is none: {path}"


def test_the_reference_has_every_public_name_with_its_example(site: Path) -> None:
    text = (site / "reference.html").read_text("utf-8")
    for name in [*chatloss.__all__, *(f"hf.{name}" for name in chatloss.hf.__all__)]:
        assert f'id="chatloss.{name}"' in text, name
    assert "&gt;&gt;&gt;" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.DOTALL), "a doctest that is no code"


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.browser
def test_in_a_browser_the_site_stays_on_its_server_and_finds_words(chromium: Any, address: str) -> None:  # noqa: F811
    chromium.get("about:blank")
    chromium.get_log("performance")
    chromium.get_log("browser")
    chromium.get(address + "/index.html?q=truncated")
    found = "document.querySelectorAll('.md-search-result__item').length"
    assert chromium.execute_async_script(
        f"const look = (done) => {found} ? done(true) : setTimeout(look, 50, done); look(arguments[0])"
    )
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert urls and all(url.startswith((address, "data:", "blob:")) for url in urls), urls
