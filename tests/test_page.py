"""The page is one file, inert whatever the data, and holds every token of every row."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import subprocess
import sys
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatloss.demo import tokenizer_directory
from chatloss.errors import DataError
from chatloss.page import Section, page, write_page
from chatloss.sample import Reason, Sample, Span

WORDS = ["<|start|>", "user\n", "What", " is", " it?", "<|end|>\n", "bot\n", "It", " is", " fine", ".", "<|end|>"]
WORDS += ["你", "好"]
ROLES = ["user", "assistant"]


def decode(ids: Any) -> str:
    return "".join(WORDS[i] for i in ids)


def chat(
    answer: list[int], source: str = "a.jsonl:1", weight: float = 1.0, outcome: str = "exact", **fields: Any
) -> Sample:
    """A question and an answer of these tokens."""
    ids = [0, 1, 2, 3, 4, 5, 0, 6, *answer, 11]
    spans = (
        Span(0, 2, 0, 0.0, Reason.SCAFFOLD), Span(2, 5, 0, 0.0, Reason.OTHER_ROLE), Span(5, 6, 0, 0.0, Reason.SCAFFOLD),
        Span(6, 8, 1, 0.0, Reason.GENERATION_PROMPT), Span(8, len(ids) - 1, 1, weight, Reason.CONTENT),
        Span(len(ids) - 1, len(ids), 1, weight, Reason.STOP),
    )
    return Sample(np.array(ids, np.int32), spans, {1: outcome}, source, **{"decode": decode, **fields})


def text_row(text: str, source: str = "a.jsonl:1") -> Sample:
    span = Span(0, 1, 0, 1.0, Reason.CONTENT)
    return Sample(np.array([3], np.int32), (span,), {0: "exact"}, source, decode=lambda _: text)


def data_of(document: str) -> Any:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)
    return json.loads(found)


def texts_of(data: Any) -> list[str]:
    """The text of every row, read as the page's script reads it."""
    out = []
    for row in data["rows"]:
        text, at, odd = [], 0, row["x"]
        while at < len(row["k"]):
            if odd and odd[0] == at:
                _, at, piece, *odd = odd
            else:
                piece, at = data["texts"][row["k"][at]], at + 1
            text.append(piece)
        out.append("".join(text))
    return out


def test_the_page_is_one_file_that_may_load_and_run_nothing_else() -> None:
    document = page([chat([7, 8, 9, 10])])
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', document)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    for tag, name in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", document, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{name} 'sha256-{digest}'" in policy
    assert not re.search(r"""(?:src|href)="(?!#|data:,)|https?://(?!www\.w3\.org/2000/svg)|@import|url\(""", document)
    assert not re.search(r"\sstyle=|\son\w+=", document), "inline styles and handlers would be blocked"


def test_every_token_of_every_row_is_in_the_page() -> None:
    other = chat([10], "b.jsonl:1", decode=lambda ids: "é" * len(ids))
    rows = [chat([7, 8, 9, 10]), chat([12, 13], "a.jsonl:2", 0.5), other]
    data = data_of(page(rows, roles={"a.jsonl:1": ROLES}))
    assert texts_of(data) == [row.decode(row.input_ids.tolist()) for row in rows]  # type: ignore[misc]
    ids = [[data["ids"][rank] for rank in row["k"]] for row in data["rows"]]
    assert ids == [row.input_ids.tolist() for row in rows]
    assert [row["p"][16:20] for row in data["rows"]] == [[12, 1, 1.0, 1], [10, 1, 0.5, 1], [9, 1, 1.0, 1]]
    assert data["rows"][0]["m"] == ROLES and "m" not in data["rows"][1]


CONTROLS = "</script>!-{}&\t\u2028\u202e\x1b\x00\ufeff"
hostile = st.text(st.characters(codec=None, categories=None) | st.sampled_from(CONTROLS))


@given(hostile, hostile)
def test_whatever_the_data_the_page_holds_it_as_inert_text(text: str, other: str) -> None:
    said = "</script><script>alert(1)</script><!--" + other
    rejects = [DataError(text, where=other, hint=said)]
    findings = [{"severity": said, "cause": text, "count": 1, "example": other, "remedy": said}]
    document = page(
        [text_row(text, said), text_row(said, text)], title=said, roles={said: [said]}, rejects=rejects,
        findings=findings, summary={said: text}, sections=[Section(said, text, [[text, said]])],
        weights_by_reduction={said: [[1.0], [2.0]]},
    )
    assert document.count("<script") == document.count("</script") == 2 and document.count("<!--") == 0
    assert all(c == "\n" or (unicodedata.category(c)[0] != "C" and c not in "\u2028\u2029") for c in document)
    kept = [re.sub("[\ud800-\udfff]", lambda m: f"⟨U+{ord(m[0]):04X}⟩", value) for value in (text, said)]
    data = data_of(document)
    assert texts_of(data) == kept
    assert data["findings"][0]["cause"] == kept[0] and data["rejects"]["list"][0][1] == kept[0]


def test_placeholders_in_the_data_are_data() -> None:
    document = page([text_row("{{css}} {{data}}")], title="{{js}} \\1 $&")
    assert "<h1>{{js}} \\1 $&amp;</h1>" in document and texts_of(data_of(document)) == ["{{css}} {{data}}"]


def test_long_texts_of_findings_are_cut_and_those_of_rows_are_not() -> None:
    document = page([text_row("x" * 1_000_000)], findings=[{"cause": "y" * 1_000_000}], rejects=[{"what": "z"}] * 5000)
    data = data_of(document)
    assert texts_of(data) == ["x" * 1_000_000]
    assert data["findings"][0]["cause"].endswith("… (1,000,000 characters)") and len(document) < 1_300_000
    assert data["rejects"]["total"] == 5000 and len(data["rejects"]["list"]) == 1000


@dataclass
class Finding:
    severity: str
    cause: str
    count: int
    example: str
    remedy: str


def test_a_finding_leads_to_the_rows_it_is_about() -> None:
    rows = [chat([7]), chat([8], "a.jsonl:2"), chat([9], "a.jsonl:2")]
    findings = [
        Finding("error", "one", 1, "a.jsonl:1 messages[1].content", "fix"), Finding("info", "none", 9, "c.jsonl:1", ""),
        {"severity": "warning", "cause": "two", "rows": ["a.jsonl:2"]},
    ]
    assert [finding["rows"] for finding in data_of(page(rows, findings=findings))["findings"]] == [[0], [], [1, 2]]


def test_weights_under_a_reduction_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match="has 0 rows, but there are 1"):
        page([chat([7])], weights_by_reduction={"turn": []})
    with pytest.raises(ValueError, match=r"shape \(1,\) for a row of 10 tokens"):
        page([chat([7])], weights_by_reduction={"turn": [[1.0]]})
    data = data_of(page([chat([7])], weights_by_reduction={"turn": [chat([7]).weights / 2]}))
    assert data["rows"][0]["w"] == [[8, 0.0, 10, 0.5]]


def test_the_usual_reductions_are_shown_unless_others_are_given() -> None:
    rows = [chat([7, 8, 9]), chat([10], "a.jsonl:2")]
    data = data_of(page(rows))
    assert data["reductions"] == ["token", "turn"], "with one turn each, conversations weigh what turns weigh"
    assert data["rows"][0]["w"] == [[8, 0.0, 12, 1.0], [8, 0.0, 12, 0.75]]
    assert data["rows"][1]["w"] == [[8, 0.0, 10, 1.0], [8, 0.0, 10, 1.5]]
    assert data_of(page(rows, weights_by_reduction={}))["reductions"] == []
    assert data_of(page([chat([7], weight=0.0)]))["rows"][0]["w"] == [[10, 0.0]]


def test_every_turn_that_is_trained_nowhere_is_listed_or_counted() -> None:
    rows = [chat([7], untrained={3: "truncated"}), chat([8], untrained={3: "truncated"}), chat([7], "")]
    more = {"a.jsonl:1": {9: "altered"}, "a.jsonl:7": {i: "switched_off" if i else "split" for i in range(2001)}}
    said = data_of(page(rows, untrained=more, roles={"a.jsonl:7": ROLES}))["untrained"]
    assert said["counts"] == [["switched_off", 2000], ["truncated", 1], ["unlawful", 1]]
    assert said["list"] == [["a.jsonl:1", 3, "truncated", 0, ""], ["a.jsonl:7", 0, "unlawful", -1, "user"]]


@pytest.mark.parametrize("command", ["view", "check"])
def test_the_commands_pages_hold_every_turn_that_is_trained_nowhere(command: str, tmp_path: Path) -> None:
    data, tokenizer = tokenizer_directory().parent / "messy.jsonl", tokenizer_directory()
    arguments = [command, str(data), "-t", str(tokenizer), "--html", str(tmp_path / "page.html")]
    run = subprocess.run([sys.executable, "-m", "chatloss", *arguments], capture_output=True, text=True)
    made = data_of((tmp_path / "page.html").read_text("utf-8"))
    assert run.returncode == (1 if command == "check" else 0), run.stderr
    assert dict(made["untrained"]["counts"]) == {"control_tokens": 3, "switched_off": 1}
    assert {turn[2] for turn in made["untrained"]["list"]} == {"control_tokens"}
    assert made["rejects"]["total"] == 8
    causes = [finding["cause"].split(":")[0] for finding in made["findings"]]
    assert len(set(causes)) == len(causes) and "control tokens" in causes
    assert made["reductions"] == ["token", "turn", "conversation"]


def test_the_mask_of_another_tool_stands_beside_ours() -> None:
    data = data_of(page([chat([7]), chat([8])], peer_weights={1: np.arange(10) > 6}, peer_name="TRL"))
    assert data["peer"] == "TRL" and data["rows"][1]["l"] == [7, 0.0, 10, 1.0] and "l" not in data["rows"][0]
    assert data_of(page([chat([7])]))["peer"] is None


def test_the_mask_of_another_tool_must_fit_the_rows() -> None:
    with pytest.raises(ValueError, match=r"peer_weights\[0\] has shape \(3,\) for a row of 10 tokens"):
        page([chat([7])], peer_weights={0: [1, 0, 1]})
    with pytest.raises(ValueError, match="peer_weights has a row 1, but there are 1"):
        page([chat([7])], peer_weights={1: np.ones(10)})
    with pytest.raises(ValueError, match=r"peer_weights\[0\] has a weight that is not a finite number"):
        page([chat([7])], peer_weights={0: np.full(10, np.nan)})


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    write_page(path, [chat([7])], title="the old page")
    before = path.read_bytes()

    def broken(ids: Any) -> str:
        raise RuntimeError("no")

    with pytest.raises(Exception, match="no"):
        write_page(path, [chat([7])], decode=broken)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["out.html"]
    write_page(path, [])
    assert b"the old page" not in path.read_bytes()
