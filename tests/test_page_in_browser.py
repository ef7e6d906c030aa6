"""The page works in Chromium: by mouse and by keyboard, quickly, in the dark, and with hostile content."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chatloss.errors import DataError
from chatloss.page import Section, write_page
from chatloss.sample import Sample
from tests.test_page import ROLES, WORDS, Finding, chat, decode, text_row

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "window-size=1280,900",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument("--" + flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    window = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield window
    window.quit()


@pytest.fixture
def opened(chromium: Any, tmp_path: Path) -> Iterator[Any]:
    """Opens rows as a page. Afterwards: no error in the console, and no request but for the page itself."""

    def open_page(rows: list[Sample], fragment: str = "", **options: Any) -> Any:
        write_page(tmp_path / "page.html", rows, **options)
        chromium.get("about:blank")
        chromium.get_log("performance")
        chromium.get((tmp_path / "page.html").as_uri() + fragment)
        assert chromium.execute_script("return document.documentElement.dataset.ready") == "yes"
        return chromium

    yield open_page
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    urls = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert {url.split("#")[0] for url in urls} <= {(tmp_path / "page.html").as_uri(), "data:,"}


def run(window: Any, script: str) -> Any:
    return window.execute_script("return " + script)


def visible_rows(window: Any) -> list[str]:
    return run(window, "[...document.querySelectorAll('.row')].filter(r => !r.hidden).map(r => r.id)")  # type: ignore[no-any-return]


def press(window: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    for key in keys:
        ActionChains(window).send_keys(key).perform()


def until(window: Any, script: str) -> None:
    for _ in range(100):
        if run(window, script):
            return
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}")


def many(n: int) -> list[Sample]:
    """Rows of about 400 tokens; every tenth has an odd outcome, every seventh comes from another file."""
    generator = np.random.default_rng(0)
    answers = [generator.choice([7, 8, 9, 10, 12, 13], generator.integers(20, 800)).tolist() for _ in range(n)]
    return [
        chat(answer, f"{'b' if i % 7 == 0 else 'a'}.jsonl:{i + 1}", outcome="split" if i % 10 == 0 else "exact")
        for i, answer in enumerate(answers)
    ]


def test_two_thousand_rows_are_there_at_once_and_scroll(opened: Any) -> None:
    rows = many(2000)
    window = opened(rows)
    first = min(float(run(opened(rows), "document.documentElement.dataset.firstRow")) for _ in range(2))
    print(f"2,000 rows of {sum(map(len, rows)):,} tokens: first row after {first:.0f} ms")
    assert first < 1000
    assert run(window, "document.querySelectorAll('.t').length") < 30_000, "only what is near is drawn"
    run(window, "scrollTo(0, document.body.scrollHeight)")
    until(window, "!!document.querySelector('#row-2000 .t')")
    for share in (0.2, 0.4, 0.6, 0.8):
        run(window, f"scrollTo(0, document.body.scrollHeight * {share})")
        until(window, "[...document.querySelectorAll('.row')].some(r => r.querySelector('.t') && "
              "r.getBoundingClientRect().top < innerHeight && r.getBoundingClientRect().bottom > 0)")
    until(window, "document.querySelectorAll('.t').length < 60000")


def test_hovering_a_token_says_what_it_is_and_why(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    sample = chat([7, 8, 9, 10], weight=0.5)
    window = opened([sample], roles={"a.jsonl:1": ROLES}, weights_by_reduction={"turn": [sample.weights / 8]})
    token = window.find_elements(By.CSS_SELECTOR, "#row-1 .content .t")[2]
    ActionChains(window).move_to_element(token).perform()
    card = window.find_element(By.ID, "card")
    assert card.is_displayed()
    text = card.get_attribute("textContent")
    said = (" fine", "id9", "reasoncontent", "weight0.5", "weight (turn)0.0625", "#1 assistant, exact", "11 of 13")
    assert all(part in text for part in (*said, "trained: the answer itself"))
    ActionChains(window).move_to_element(window.find_element(By.TAG_NAME, "h1")).perform()
    assert not card.is_displayed()


def test_the_keyboard_is_enough(opened: Any) -> None:
    window = opened(many(30))
    press(window, "j", "j")
    assert run(window, "document.querySelector('.current').id") == "row-2"
    until(window, "location.hash === '#row-2'")
    press(window, "k", "n")
    assert run(window, "document.activeElement.textContent") == WORDS[many(1)[0].input_ids[8]]
    assert run(window, "document.activeElement.closest('.row').id") == "row-1"
    press(window, "\ue014")
    assert "place 10 of" in run(window, "document.getElementById('say').textContent")
    assert run(window, "!document.getElementById('card').hidden")
    press(window, "i")
    assert run(window, "document.querySelector('[data-toggle=ids]').ariaPressed") == "true"
    assert run(window, "getComputedStyle(document.querySelector('.t'), '::after').content") == '"0"'
    press(window, "/", "zebra", "\ue00c")
    until(window, "!document.getElementById('none').hidden")
    press(window, "c")
    assert len(visible_rows(window)) == 30
    press(window, "?")
    assert run(window, "document.getElementById('help').open")
    press(window, "\ue00c", "\ue010")
    until(window, "document.querySelector('.current').id === 'row-30'")


def test_filters_and_search_keep_the_rows_they_should(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    rows = [*many(40), chat([12, 13], "c.jsonl:41", outcome="off_prompt", weight=0.0)]
    window = opened(rows, findings=[Finding("error", "odd", 1, "c.jsonl:41", "fix")])

    def pick(group: int, name: str) -> None:
        for label in window.find_elements(By.CSS_SELECTOR, f"fieldset:nth-of-type({group}) .pick"):
            if label.text.startswith(name):
                label.click()

    pick(2, "split")
    assert visible_rows(window) == ["row-1", "row-11", "row-21", "row-31"]
    pick(4, "b.jsonl")
    assert visible_rows(window) == ["row-1"]
    press(window, "c")
    window.find_element(By.CSS_SELECTOR, ".finding .link").click()
    assert visible_rows(window) == ["row-41"]
    window.find_element(By.CSS_SELECTOR, ".chip").click()
    assert len(visible_rows(window)) == 41
    window.find_element(By.CSS_SELECTOR, "[aria-label^='nothing trained']").click()
    assert visible_rows(window) == ["row-41"]
    assert run(window, "document.getElementById('count').textContent") == "1 of 41 rows"
    press(window, "c", "/", "你好<|END|>")
    until(window, "document.getElementById('active').children.length === 1")
    shown = visible_rows(window)
    assert shown == [f"row-{i + 1}" for i, row in enumerate(rows) if "你好<|end|>" in decode(row.input_ids)]
    until(window, f"!!document.querySelector('#{shown[0]} .t')")
    hits = run(window, f"[...document.querySelectorAll('#{shown[0]} .hit')].map(t => t.textContent)")
    assert "".join(hits) == "你好<|end|>"


def test_the_bars_of_the_plots_are_buttons_for_the_keyboard_too(opened: Any) -> None:
    rows = many(60)
    weights = {"token": [r.weights for r in rows], "turn": [r.weights / r.n_trained for r in rows]}
    window = opened(rows, weights_by_reduction=weights)
    assert run(window, "document.querySelectorAll('.plot[role=group] [tabindex=\"0\"]').length") == 3
    run(window, "document.querySelector('[aria-label^=\"Share of the loss\"] .bin').focus()")
    press(window, "\ue014", "\ue007")
    tenth = sorted(range(60), key=lambda i: rows[i].n_trained)[6:12]
    assert visible_rows(window) == [f"row-{i + 1}" for i in sorted(tenth)]
    press(window, " ")
    assert len(visible_rows(window)) == 60


def test_the_address_keeps_filters_search_switches_and_row(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    rows = many(40)
    findings = [Finding("error", "odd", 1, "a.jsonl:2", ""), Finding("info", "even", 1, "b.jsonl:1", "")]
    window = opened(rows, findings=findings)
    for label in window.find_elements(By.CSS_SELECTOR, ".pick"):
        if label.text.startswith(("split", "b.jsonl", "content")):
            label.click()
    press(window, "/", "你好<|end|> &=,%", "\ue00c", "i")
    until(window, "document.getElementById('active').children.length === 4")
    said = "%E4%BD%A0%E5%A5%BD%3C%7Cend%7C%3E%20%26%3D%2C%25"
    until(window, f"location.hash === '#reason=content&outcome=split&source=b.jsonl&q={said}&show=space,ids'")
    chips = run(window, "document.getElementById('active').textContent")
    window.refresh()
    assert run(window, "document.getElementById('active').textContent") == chips
    assert run(window, "[...document.querySelectorAll('.pick input:checked')].length") == 3
    assert run(window, "document.getElementById('search').value") == "你好<|end|> &=,%"
    assert run(window, "document.querySelector('[data-toggle=ids]').ariaPressed") == "true"

    window.find_elements(By.CSS_SELECTOR, ".finding .link")[1].click()
    press(window, "c")
    window.find_elements(By.CSS_SELECTOR, ".finding .link")[1].click()
    until(window, "location.hash === '#finding=2&show=space,ids'")
    press(window, "j")
    until(window, "location.hash === '#row-1&finding=2&show=space,ids'")
    window.refresh()
    assert visible_rows(window) == ["row-1"] and run(window, "document.querySelector('.current').id") == "row-1"

    bars = window.find_elements(By.CSS_SELECTOR, "[aria-label='Tokens in a row'] .bin")
    press(window, "c", "i")
    for bar in bars[2:4]:
        bar.click()
    until(window, "location.hash === '#length=2,3'")
    shown = visible_rows(window)
    assert 0 < len(shown) < 40
    window.refresh()
    assert visible_rows(window) == shown
    run(window, "location.hash = '#nothing=1&reason=toString,constructor&length=99,-1,&finding=9&q=%E4%&row-99'")
    until(window, "document.getElementById('search').value === '%e4%'")
    assert run(window, "document.getElementById('active').children.length") == 1


def test_the_rows_of_one_conversation_lead_to_each_other_and_keep_the_filters(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    first, second = chat([7], outcome="split"), chat([7], outcome="split", weight=0.0)
    window = opened([second, first, chat([8], "a.jsonl:2")])
    press(window, "/", "a.jsonl:1", "\ue00c")
    until(window, "document.querySelectorAll('.row:not([hidden])').length === 2")
    window.find_element(By.CSS_SELECTOR, "#row-1 .who a").click()
    until(window, "location.hash === '#row-2&q=a.jsonl%3A1'")
    assert visible_rows(window) == ["row-1", "row-2"]


def test_what_is_trained_nowhere_and_what_was_rejected_is_listed(opened: Any) -> None:
    from selenium.webdriver.common.by import By

    rows = [chat([7], untrained={3: "truncated", 5: "switched_off"}), chat([8], "a.jsonl:2", untrained={1: "split"})]
    rejects = [DataError("content is a number", where="a.jsonl:9 messages[2].content", hint="make it text")]
    window = opened(rows, roles={"a.jsonl:1": [*ROLES, *ROLES]}, rejects=rejects, untrained={
        "a.jsonl:1": {7: "altered"}, "a.jsonl:4": {1: "altered"}})
    nowhere, rejected = window.find_elements(By.CSS_SELECTOR, "details.panel")
    for panel in (nowhere, rejected):
        panel.find_element(By.TAG_NAME, "summary").click()
    cells = [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
             for row in nowhere.find_elements(By.CSS_SELECTOR, "table:last-of-type tbody tr")]
    assert cells == [
        ["a.jsonl:1", "#3 assistant", "truncated", "row 1"], ["a.jsonl:4", "#1", "altered", "no row"],
        ["a.jsonl:2", "#1", "unlawful", "row 2"],
    ]
    assert nowhere.find_element(By.TAG_NAME, "summary").text == "Turns trained nowhere4"
    assert "1 switched off" in nowhere.text.replace("\n", " ")
    said = [cell.text for cell in rejected.find_elements(By.TAG_NAME, "td")]
    assert said == ["a.jsonl:9", "messages[2].content", "content is a number", "make it text"]
    nowhere.find_element(By.LINK_TEXT, "row 2").click()
    until(window, "document.querySelector('.current')?.id === 'row-2'")


def test_a_link_leads_to_its_row_even_if_it_was_filtered_out(opened: Any) -> None:
    window = opened(many(500), "#row-417")
    place = "document.querySelector('#row-417').getBoundingClientRect().top"
    until(window, f"document.querySelector('.current')?.id === 'row-417' && {place} > 0 && {place} < 200")
    assert run(window, "document.querySelector('#row-417 h3').textContent") == "417a.jsonl:417"
    run(window, "search('zebra'), apply(), location.hash = '#row-7'")
    until(window, "document.querySelector('.current').id === 'row-7' && !document.querySelector('#row-7').hidden")


def test_two_masks_side_by_side_show_and_count_every_difference(opened: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    rows = [chat([7, 8, 9, 10], f"a.jsonl:{i}") for i in range(1, 5)]  # trains tokens 8 to 12
    late, double = np.roll(rows[0].weights, 1), rows[1].weights * np.where(np.arange(13) == 9, 2, 1)
    window = opened(rows, peer_weights={0: late, 1: double, 2: rows[2].weights}, peer_name="TRL")

    def texts(selector: str) -> list[str]:
        return [node.text for node in window.find_elements(By.CSS_SELECTOR, selector)]

    assert texts(".agree") == ["only chatloss 1, only TRL 1, both 4", "other weight 1, both 4", "both 5", "not in TRL"]
    assert texts(".diff") == ["only TRL", "only chatloss", "other weight"]
    assert texts("#row-1 .t.theirs, #row-1 .t.ours") == ["<|start|>", "It"]
    lines = "(({backgroundImage, textDecorationLine}) => [backgroundImage, textDecorationLine])(getComputedStyle(%s))"
    token = "document.querySelector('#row-1 .t.{}')"
    shown = {kind: run(window, lines % token.format(kind)) for kind in ("both", "ours", "theirs", "none")}
    assert len({tuple(style) for style in shown.values()}) == 4, "every kind has lines of its own, whatever the colour"
    ActionChains(window).move_to_element(window.find_element(By.CSS_SELECTOR, "#row-2 .t.other")).perform()
    card = window.find_element(By.ID, "card").get_attribute("textContent")
    assert "1 in chatloss, 2 in TRL" in card and "other weight" in card
    for label in window.find_elements(By.CSS_SELECTOR, ".pick"):
        if label.text.startswith("that differ"):
            label.click()
    assert visible_rows(window) == ["row-1", "row-2"]
    press(window, "d", "d")
    assert run(window, "document.activeElement.textContent") == "It"
    press(window, "d")
    assert run(window, "document.activeElement.closest('.row').id") == "row-2"
    press(window, "D", "D")
    assert run(window, "document.activeElement.className").endswith("theirs")


def test_hostile_content_is_shown_and_does_nothing(opened: Any) -> None:
    text = "</script><img src=x onerror='window.hacked=1'><svg onload=hacked=1> \u202egnp.exe\u2069 \x1b[2J {{data}} "
    text += "<!-- \u2028 a\u200db"
    window = opened(
        [text_row(text, text)], title=text, roles={text: [text]}, summary={text: text},
        rejects=[DataError(text, where=text)], findings=[Finding(text, text, 1, text, text)],
        sections=[Section(text, text, [[text], [text]], [(0, 1), (1, 2)])],
    )
    run(window, "document.querySelector('.finding .link').click(), document.querySelector('.t').focus()")
    assert run(window, "window.hacked") is None
    assert run(window, "document.querySelectorAll('img, svg[onload]').length") == 0
    shown = re.sub("[\u202e\u2069\x1b\u2028]", lambda match: f"U+{ord(match[0]):04X}", text)
    assert run(window, "document.querySelector('#row-1 .t').textContent") == shown
    assert run(window, "document.querySelector('.prose').textContent") == shown
    assert not set("\u202e\u2069\x1b\u2028") & set(run(window, "document.body.innerText"))


def test_a_row_of_a_hundred_thousand_tokens_is_drawn_in_parts(opened: Any) -> None:
    window = opened([chat([7, 8, 9, 10] * 25_000), chat([7], "a.jsonl:2")])
    assert run(window, "document.querySelectorAll('.t').length") < 12_000
    assert "below" in run(window, "document.querySelector('.more').textContent")
    before = run(window, "document.querySelectorAll('#row-1 .t').length")
    run(window, "document.querySelector('.more').scrollIntoView()")
    until(window, f"document.querySelectorAll('#row-1 .t').length > {before}")


def test_a_line_of_a_megabyte_and_half_a_character_are_shown(opened: Any) -> None:
    rows = [text_row("x" * 1_000_000), text_row("\ud83d half\udc00", "a.jsonl:2")]
    window = opened(rows)
    assert float(run(window, "document.documentElement.dataset.firstRow")) < 3000
    assert run(window, "document.querySelector('#row-1 .t').textContent.length") == 1_000_000
    run(window, "go(rows[1])")
    assert run(window, "document.querySelector('#row-2 .t').textContent") == "⟨U+D83D⟩ half⟨U+DC00⟩"
    run(window, "go(rows[0]), document.querySelector('#row-1 .t').focus()")
    assert run(window, "document.querySelector('#card .text').textContent.length") < 1000


def test_the_page_fits_a_telephone(opened: Any) -> None:
    text = "a" * 300
    window = opened([*many(3), text_row(text, text)], peer_weights={0: many(1)[0].weights}, title=text)
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    window.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert run(window, "document.documentElement.scrollWidth") <= 390
        assert run(window, "getComputedStyle(document.getElementById('filters')).display") == "none"
        run(window, "document.getElementById('drawer').click()")
        assert run(window, "getComputedStyle(document.getElementById('filters')).display") == "block"
    finally:
        window.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_and_light_follow_the_system_and_the_switch_and_keep_contrast(opened: Any) -> None:
    window = opened([chat([7, 8, 9, 10])])

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(selector: str) -> float:
        lights = [
            luminance(run(window, f"getComputedStyle(document.querySelector('{where}')).{what}"))
            for where, what in ((selector, "color"), (".row", "backgroundColor"))
        ]
        return (max(lights) + 0.05) / (min(lights) + 0.05)

    def emulate(scheme: str) -> float:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        window.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        for selector in (".span.on .t", ".span.off .t", "#facts", ".who", ".pick .n", ".why"):
            assert contrast(selector) >= 4.5, (scheme, selector)
        return luminance(run(window, "getComputedStyle(document.body).backgroundColor"))

    assert emulate("light") > 0.8 and emulate("dark") < 0.05
    press(window, "t")
    assert luminance(run(window, "getComputedStyle(document.body).backgroundColor")) > 0.8
    assert run(window, "document.getElementById('theme').ariaLabel") == "Theme: light"
    press(window, "t", "t")


def test_no_rows_make_a_page_too(opened: Any) -> None:
    assert run(opened([]), "document.getElementById('facts').textContent") == "0 rows · 0 tokens · 0.0% trained"
