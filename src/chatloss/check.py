"""The audit before training: everything in the data that would be refused, lost or trained without anybody wanting it.

`check` reads conversations in one pass and never stops at a policy: what `prepare` and `train` would refuse is counted
here, one line for each cause, with an example and what settles it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from chatloss.audit import audit
from chatloss.causes import CAUSES, REFUSALS, Cause
from chatloss.chat import Conversation, Label, Message, Preference, Text
from chatloss.check_report import COUNTS, TURN_STATUSES, CheckFinding, CheckReport
from chatloss.describe_fields import date_findings, split_controls
from chatloss.describe_turns import stop_finding
from chatloss.encode import ChatEncoder, Encoding, Problem
from chatloss.errors import ChatlossError, DataError
from chatloss.findings import SEVERITIES, quoted
from chatloss.formats import Row
from chatloss.markers import Markers, encode_text
from chatloss.pairs import examine_pair, judged, sides
from chatloss.probes import REFUSES, Probes
from chatloss.sample import Reason, Sample
from chatloss.switches import remedy_for
from chatloss.tally import Duplicates, Lengths, Seen

__all__ = ["CheckFinding", "CheckReport", "check"]

SHORT_ANSWER = 20  # characters; shorter answers may well be the same
_LACKS = re.compile(r"lacks the (reasoning|content|tool_calls)")
_TOTALS = {"turn": "turns", "message": "messages", "conversation": "conversations", "row": "rows",
           "input row": "input_rows"}


def check(
    items: Iterable[Row], encoder: ChatEncoder, *, markers: Markers | None = None, max_rejects: float | None = None,
    keep_samples: int = 0,
) -> CheckReport:
    """Audit rows, usually a `Reader`, under the encoder's template, tokenizer and policy.

    `markers` say what to train in plain text. More than `max_rejects` (a share) of bad rows is an error; None leaves
    that to the reader. `keep_samples`: so many of the first rows are kept in `CheckReport.samples` for a page, and the
    first example of each later cause. Raises `TemplateError` if the template does not compile, and `DataError` for a
    file that cannot be read.

    >>> from chatloss.demo import tokenizer_directory
    >>> from chatloss.reader import read
    >>> rows = read([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": ""}]}])
    >>> report = check(rows, ChatEncoder.load(tokenizer_directory()))
    >>> [(finding.cause, finding.count, finding.example) for finding in report.findings]
    [('empty_answer', 1, '<list>:1 messages[1]')]
    """
    audited = _Audit(encoder, keep_samples, markers)
    try:
        for item in items:
            audited.item(item)
    except DataError as error:
        if error.kind != "rejects":
            raise
        max_rejects = getattr(items, "max_rejects", 0.0)
    audited.rejects(items, 1.0 if max_rejects is None else max_rejects)
    return audited.report()


class _Audit:
    """What has been counted so far."""

    def __init__(self, encoder: ChatEncoder, keep: int, markers: Markers | None) -> None:
        self.encoder, self.keep, self.markers = encoder, keep, markers
        self.control = encoder.control  # a template that does not even compile says so here, once
        self.seen: dict[str, Seen] = {}
        self.n: Counter[str] = Counter()
        self.turns: Counter[str] = Counter()
        self.reasons: Counter[Reason] = Counter()
        self.lengths, self.turn_lengths = Lengths(), Lengths()
        self.conversations, self.answers = Duplicates(), Duplicates()
        self.samples: list[Sample] = []
        self.roles: dict[str, tuple[str, ...]] = {}
        self.untrained: dict[str, Mapping[int, str]] = {}
        self.lost: tuple[Conversation, list[int]] | None = None
        bos = encoder.loaded.special_tokens.get("bos_token", "")
        self.bos = encoder.loaded.tokens.ids_of(bos) if bos else []

    def hit(
        self, cause: str, source: str, where: str = "", detail: str = "", *, severity: str = "", text: str = "",
        remedy: str = "",
    ) -> None:
        """Count one occurrence; severity, text and remedy are those of the catalogue unless given here."""
        if cause not in self.seen:
            self.seen[cause] = Seen(severity, text, remedy)
        self.seen[cause].add(source, where, detail)

    # -- one row of data -------------------------------------------------------------------------------------------

    def item(self, item: Row) -> None:
        self.n["input_rows"] += 1
        if isinstance(item, Text):
            self.plain_text(item)
        elif isinstance(item, Preference):
            self.pair(item)
        else:
            self.conversation(judged(item) if isinstance(item, Label) else item)

    def plain_text(self, item: Text) -> None:
        self.n["texts"] += 1
        if self.markers is None:
            self.hit("text_rows", item.source)
            return
        encoder = self.encoder
        try:
            row = encode_text(encoder.tokens, item.text, self.markers, source=item.source, decode=encoder.decode)
        except ChatlossError as error:
            self.hit("no_marker", item.source, "", error.what, remedy=error.hint)
            return
        encoding = Encoding([row], row.outcomes, {}, ())
        self.n["turns"] += len(row.outcomes)
        self.outcomes(encoding, list(row.outcomes))
        self.rows(encoding, item.source)
        self.samples += encoding.rows if len(self.samples) < self.keep else []

    def pair(self, item: Preference) -> None:
        """Both sides of a pair, and what they lack as a pair."""
        try:
            both: tuple[Encoding | None, ...] = examine_pair(self.encoder, item)
        except ChatlossError:  # of one side, and told with it
            both = None, None
        for side, start, encoding in zip(sides(item), (0, len(item.prompt)), both, strict=True):
            self.conversation(side, start, encoding)

    def conversation(self, conversation: Conversation, start: int = 0, made: Encoding | None = None) -> None:
        """Count one conversation, encoded already if `made`; what concerns messages before `start` has been told."""
        source = conversation.source
        turns = [i for i, m in enumerate(conversation.messages) if m.role in self.encoder.policy.roles]
        self.n["conversations"] += 1
        self.n["messages"] += len(conversation.messages)
        self.n["turns"] += len(turns)
        known = len(self.seen)
        encoding = self.encoding(conversation, turns, made)
        if encoding is not None:
            self.outcomes(encoding, turns)
            self.problems(conversation, encoding)
            self.rows(encoding, source)
        off = () if encoding is None else [i for i, why in encoding.untrained.items() if why == "switched_off"]
        self.data(conversation, {i for i in turns if i not in off}, start)
        new = len(self.seen) > known
        if encoding is not None and self.keep and (new or len(self.samples) < self.keep):
            self.samples += encoding.rows
            self.roles[source] = tuple(m.role for m in conversation.messages)
            self.untrained[source] = encoding.untrained

    def encoding(self, conversation: Conversation, turns: list[int], made: Encoding | None) -> Encoding | None:
        """What encoding says of it, None where it cannot be encoded; both counted."""
        source = conversation.source
        try:
            encoding = made or self.encoder.examine(conversation)
        except ChatlossError as error:
            self.refuse(turns)
            self.turns["rejected"] += len(turns)
            text = "a conversation that cannot be encoded"
            self.hit(error.kind, source, error.where, error.what, severity="error", text=text, remedy=error.hint)
            return None
        fatal = any(problem.fatal for problem in encoding.problems)
        if fatal:
            self.refuse(turns)
        if not turns:
            self.hit("no_turns", source)
        elif not fatal and not any(row.n_trained for row in encoding.rows):
            counts = Counter(encoding.untrained.values()).most_common()
            self.hit("nothing_trained", source, "", ", ".join(f"{n} {why.replace('_', ' ')}" for why, n in counts))
        return encoding

    def refuse(self, turns: list[int]) -> None:
        self.n["refused_conversations"] += 1
        self.n["refused_turns"] += len(turns)

    def outcomes(self, encoding: Encoding, turns: list[int]) -> None:
        """Every turn has one status; where the whole conversation is unusable, that is what became of all of them."""
        status: dict[int, str] = {**encoding.outcomes, **encoding.untrained}
        whole = any(problem.fatal and problem.cause == "control_tokens" for problem in encoding.problems)
        for i in turns:
            told = status.get(i, "rejected")
            self.turns["rejected" if whole or told not in TURN_STATUSES else told] += 1

    def problems(self, conversation: Conversation, encoding: Encoding) -> None:
        source, policy = conversation.source, self.encoder.policy
        cut = [i for i, why in encoding.untrained.items() if why == "truncated"]
        for problem in encoding.problems:
            settled = getattr(policy, problem.cause, "") in ("drop", "splice", "literal")
            place = f"messages[{problem.message}]" if problem.message >= 0 else ""
            severity = "error" if problem.fatal else "info" if settled else "warning"
            if problem.cause == "too_long":  # told once for each turn that is lost
                for i in cut:
                    self.hit("too_long", source, f"messages[{i}]", problem.detail, severity=severity)
                cut = []
                continue
            self.hit(_cause_of(problem), source, place, _detail_of(problem), severity=severity)
            if problem.cause == "off_prompt" and self.lost is None:
                self.lost = conversation, [i for i, told in encoding.outcomes.items() if told == "off_prompt"]
        for turn in encoding.turns:
            if turn.outcome != "reachable" or turn.index in encoding.untrained:
                continue
            place = f"messages[{turn.index}]"
            split = encoding.outcomes.get(turn.index) == "split"
            stop = turn.stop == "appended"
            for cause, holds in (("split", split), ("stop_appended", stop), ("trimmed", turn.trimmed)):
                if holds:
                    self.hit(cause, source, place)

    def rows(self, encoding: Encoding, source: str) -> None:
        for row in encoding.rows:
            self.n["rows"] += 1
            self.lengths.add(len(row))
            trained: Counter[int] = Counter()
            for span in row.spans:
                size = span.end - span.start
                self.n["tokens"] += size
                self.n["trained_tokens"] += size if span.weight else 0
                self.reasons[span.reason] += size
                if span.weight:
                    trained[span.message] += size
            self.n["trained_turns"] += len(trained)
            for size in trained.values():
                self.turn_lengths.add(size)
            if not trained:
                self.hit("untrained_row", source)
            if len(self.bos) == 1 and row.input_ids[:2].tolist() == self.bos * 2:
                self.hit("double_bos", source)

    def data(self, conversation: Conversation, wanted: set[int], start: int) -> None:
        """What is wrong whatever the template, and what came before."""
        source = conversation.source
        for found in audit(conversation, wanted, self.control.__contains__):
            if found.message >= start:
                self.hit(found.cause, source, f"messages[{found.message}]", found.detail)
        self.conversations.add(_canonical(conversation), source, 0)
        for i in sorted(wanted):
            text = _answer_text(conversation.messages[i])
            if len(text) >= SHORT_ANSWER:
                self.answers.add(text.encode("utf-8", "surrogatepass"), source, i)

    # -- the end ---------------------------------------------------------------------------------------------------

    def rejects(self, items: Iterable[Row], most: float) -> None:
        """The rows that the reader could not use, by kind; more than the share `most` is an error."""
        counts: Mapping[str, int] = getattr(items, "reject_counts", {})
        self.n["rejected_rows"] = sum(counts.values())
        self.n["input_rows"] += self.n["rejected_rows"]
        for kind, count in counts.items():
            for reject in (r for r in getattr(items, "rejects", ()) if r.kind == kind):
                where = reject.where.removeprefix(reject.source).strip()
                self.hit(f"rejected_{kind}", reject.source, where, reject.what, remedy=reject.hint)
            self.seen[f"rejected_{kind}"].count = count
        rejected, total = self.n["rejected_rows"], self.n["input_rows"]
        if rejected > most * total:
            remedy = f"mend them, or go on without them: --max-rejects {math.ceil(1000 * rejected / total) / 1000:g}"
            self.hit("too_many_rejects", "", remedy=remedy)
            self.seen["too_many_rejects"].count = rejected

    def report(self) -> CheckReport:
        self.repeated(self.conversations, "duplicate_conversation")
        self.repeated(self.answers, "duplicate_answer")
        if self.lost is not None:
            found = remedy_for(self.encoder, *self.lost)
            self.seen["off_prompt"].remedy = found and f"{found}, or {CAUSES['off_prompt'].remedy}"
        if "split" in self.seen:
            rows, chats = self.n["rows"], self.n["conversations"]
            self.seen["split"].remedy = f"nothing to do: it takes {rows:,} rows for {chats:,} conversations"
        findings = [self.finding(cause, seen) for cause, seen in self.seen.items()]
        try:
            findings += self.template_findings()
        except ChatlossError as error:
            findings.append(CheckFinding("error", "template", error.what, 1, "template", remedy=error.hint))
        findings.sort(key=lambda f: (SEVERITIES.index(f.severity), -f.count, f.cause))
        return CheckReport(
            tokenizer=self.encoder.loaded.name, counts={name: self.n[name] for name in COUNTS},
            turns={status: self.turns[status] for status in TURN_STATUSES},
            reasons={reason.name.lower(): count for reason, count in sorted(self.reasons.items())},
            lengths=self.lengths.summary(), turn_lengths=self.turn_lengths.summary(), findings=tuple(findings),
            samples=tuple(self.samples), roles=self.roles, untrained=self.untrained,
        )

    def repeated(self, texts: Duplicates, cause: str) -> None:
        count = texts.count()
        for source, message, first, first_message in texts.places(100):
            file, _, row = first.rpartition(":")
            same = f"row {row}" if file == source.rpartition(":")[0] else first
            if cause == "duplicate_conversation":
                self.hit(cause, source, "", f"the same as {same}")
            else:
                self.hit(cause, source, f"messages[{message}]", f"the same as {same} messages[{first_message}]")
        if count:
            self.seen[cause].count = count
        if count and texts.left_out:
            self.seen[cause].text = f"{CAUSES[cause].text} (looked for among the first {len(texts):,})"

    def finding(self, cause: str, seen: Seen) -> CheckFinding:
        known = CAUSES.get(cause, Cause("warning", "conversation", "", ""))
        total = self.n[_TOTALS[known.unit]]
        return CheckFinding(
            severity=seen.severity or known.severity, cause=cause, text=seen.text or known.text, count=seen.count,
            unit=known.unit, share=seen.count / total if total else None, example=seen.example, detail=seen.detail,
            remedy=seen.remedy or known.remedy, rows=tuple(seen.sources),
        )

    def template_findings(self) -> Iterator[CheckFinding]:
        """What concerns every row: the stop, a date in the prompt, control texts that this tokenizer does not know."""
        turns = self.n["trained_turns"]
        stop = stop_finding(self.encoder)
        ids, text = stop.value["ids"], stop.value["text"]
        if stop.severity != "info":
            cause = "no_stop" if not text else "stop_not_one_token" if len(ids) > 1 else "stop_unknown_to_engines"
            yield CheckFinding(stop.severity, cause, stop.statement, turns, "turn", remedy=stop.remedy)
        elif ids and not stop.value["generation_config"]:
            missing = "does not list" if self.encoder.loaded.stop_ids else "is missing, or does not list"
            words = f"the generation config {missing} the stop {quoted(text)}; it is the tokenizer's EOS"
            remedy = f"for engines that read only that file, set eos_token_id to {ids[-1]} in generation_config.json"
            yield CheckFinding("info", "stop_not_in_generation_config", words, turns, "turn", remedy=remedy)
        split = split_controls(self.encoder)
        if split:
            listed = ", ".join(f"{quoted(text)} ({n} tokens)" for text, n in list(split.items())[:4])
            words = f"control texts of the template that this tokenizer cuts into several tokens: {listed}"
            severity = "warning" if any(text.startswith("<") for text in split) else "info"
            remedy = "see whether template and tokenizer belong to the same model"
            yield CheckFinding(severity, "control_not_one_token", words, len(split), "control text", remedy=remedy)
        for date in date_findings(Probes.of(self.encoder)):
            name, severity = ("date_in_prompt", "info") if date.name == "date" else (date.name, date.severity)
            yield CheckFinding(severity, name, date.statement, turns, "turn", remedy=date.remedy)


def _cause_of(problem: Problem) -> str:
    if problem.cause == "altered" and (found := _LACKS.search(problem.detail)):
        return {"tool_calls": "altered_calls"}.get(found[1], f"altered_{found[1]}")
    if problem.cause == "unrenderable":
        words = _detail_of(problem)
        return next((cause for pattern, cause in REFUSALS if re.search(pattern, words, re.IGNORECASE)), "unrenderable")
    return problem.cause


def _detail_of(problem: Problem) -> str:
    """What the problem says beyond the text of its cause."""
    head, colon, tail = problem.detail.partition(": ")
    general = colon and head.startswith(("inference would", "the template c", "one row cannot"))
    return (tail if general else problem.detail).removeprefix(REFUSES).removeprefix("the text holds the control token ")


def _answer_text(message: Message) -> str:
    calls = "".join(f"\0{call.name}\0{call.arguments}" for call in message.tool_calls)
    return message.text.strip() + calls


def _canonical(conversation: Conversation) -> bytes:
    whole = [[m.to_dict() for m in conversation.messages], conversation.tools, dict(conversation.template_kwargs)]
    try:
        return orjson.dumps(whole, option=orjson.OPT_SORT_KEYS, default=_plain)
    except (TypeError, ValueError):  # integers beyond 64 bits
        return json.dumps(whole, sort_keys=True, default=_plain).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)
