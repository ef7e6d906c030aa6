"""Take the pictures of the page in docs/images; `python -m scripts.page_images` with Chromium and Pillow installed."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver

from chatloss.demo import chats_file, tokenizer_directory
from chatloss.encode import ChatEncoder
from chatloss.page import write_page
from chatloss.pipeline import encodings
from chatloss.reader import read
from chatloss.sample import Reason, Sample

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def past_the_stop(sample: Sample) -> Any:
    """Labels with two common mistakes, for the picture: trained past the stop, and no loss on the first turn."""
    weights = np.array(sample.weights)
    stops, next_is_template = sample.reasons[:-1] == Reason.STOP, sample.reasons[1:] == Reason.SCAFFOLD
    weights[np.flatnonzero(stops & next_is_template) + 1] = 1
    turns = sample.turns
    if len(set(turns[turns >= 0])) > 1:
        weights[turns == turns[turns >= 0].min()] = 0
    return weights


def write_pages(folder: Path) -> None:
    encoder = ChatEncoder.load(tokenizer_directory(), tokenizer_directory() / "chat_template_rewrites.jinja")
    with contextlib.chdir(chats_file().parent):
        made = list(encodings(read("chats.jsonl"), encoder))
    rows = [row for one in made for row in one.encoding.rows]
    roles = {one.conversation.source: [m.role for m in one.conversation.messages] for one in made if one.conversation}
    options: dict[str, Any] = {"roles": roles, "decode": encoder.decode}
    write_page(folder / "view.html", rows, title="chats.jsonl", **options)
    peer = {i: past_the_stop(row) for i, row in enumerate(rows)}
    write_page(folder / "masks.html", rows, title="labels.parquet", peer_weights=peer, **options)


def take(
    window: Any, url: str, image: str, script: str, scheme: str = "light", size: tuple[int, int] = (1280, 860)
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    window.get("about:blank")
    window.get(url)
    window.execute_script(script)
    time.sleep(0.5)
    picture = Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(IMAGES / image, optimize=True)


def main() -> None:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or "chromium"
    with tempfile.TemporaryDirectory() as name:
        for flag in ("headless", "no-sandbox", "hide-scrollbars", f"user-data-dir={name}/profile"):
            options.add_argument("--" + flag)
        window = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
        folder = Path(name)
        write_pages(folder)
        view, masks = (folder / "view.html").as_uri(), (folder / "masks.html").as_uri()
        row = "go(rows.find((row) => row.s === 'chats.jsonl:139' && row.outcomes.has('split') && row.reasons.has(2)));"
        try:
            for scheme in ("light", "dark"):
                take(window, view, f"view-{scheme}.png", row + "trained(1); token(1); token(1); token(1);", scheme)
                take(window, masks, f"masks-{scheme}.png", "go(rows[0]); difference(1)", scheme)
            take(window, view, "phone.png", "", size=(390, 844))
        finally:
            window.quit()


if __name__ == "__main__":
    main()
