"""The law, checked from outside: is every trained token one that a re-rendering engine would have the model emit?

Written from the text of the law (DESIGN sections 1 to 3) and nothing else: transformers renders, the tokenizer encodes,
and not one line is shared with chatloss. It finds what is unlawful in rows that somebody made; it cannot make any.
"""

import json
import re

REASONING = ("reasoning_content", "thinking", "reasoning")
ANSWER, NEXT = "SENTINELANSWER", "SENTINELNEXT"
MARKED = {"content": ANSWER, **dict.fromkeys(REASONING, NEXT)}
# What control tokens look like where the tokenizer is not the template's own, and has none for them.
PIPED, TAG = r"<\|[^<>|\s]+\|>", r"<[^<>\s]+>|\[[^\[\]\s]+[\[\]]"


def violations(tokenizer, template, messages, rows, *, partial=(), untrained=(), row_format=None, **options):
    """Every breach of the law in the `rows` made of `messages`, as sentences; empty if there is none.

    A row has `input_ids`, `weights`, `turns` (each [n]) and `outcomes`, as in DESIGN section 6. `partial`: turns of
    which only parts are trained, or nothing. `untrained`: assistant messages that must not be trained. A `row_format`
    ("auto", "per_turn", "multi_turn") also fixes the number of rows. For the `options`, see `Law`.
    """
    law = Law(tokenizer, template, messages, **options)
    return [what for wrong, what in breaches(law, rows, partial, set(untrained), row_format) if wrong]


def breaches(law, rows, partial, untrained, row_format):
    """Yield (whether it is broken, what is wrong) for every rule that rows must keep."""
    outcomes, placed = dict(rows[0].outcomes) if rows else {}, {}
    yield any(dict(row.outcomes) != outcomes for row in rows), "the rows do not agree on the outcomes"
    for r, row in enumerate(rows):
        ids, owners = [int(t) for t in row.input_ids], [int(i) for i in row.turns]
        yield [w != 0 for w in row.weights] != [i >= 0 for i in owners], f"row {r}: weights and turns disagree"
        yield len(ids) != len(owners) or any(row.weights[:1]), f"row {r} is ragged, or position 0 is trained"
        for i in sorted({*owners} - {-1}):
            prompt, _, _, faults = law.turns[i]
            yield faults or i in untrained, f"row {r}: message {i} must not be trained: {faults or 'untrained'}"
            yield i in placed, f"row {r}: turn {i} is trained in another row too"
            context, trained = law.encode(prompt)[0], [t for t, owner in enumerate(owners) if owner == i]
            start, end = len(context), trained[-1] + 1
            lawful = [start + len(targets) for targets in law.targets(i) if ids[start:][: len(targets)] == targets]
            ends = [e for e in lawful if e == end or (i in partial and e > end)]
            placed[i] = ids[:start], ids[: [*ends, end][0]], r
            begins = trained[0] == max(start, 1) or (i in partial and trained[0] > start)
            yield ids[:start] != context or not begins, f"row {r}: turn {i} does not begin after its prompt"
            yield i not in partial and end - trained[0] != len(trained), f"row {r}: turn {i} is not one run"
            yield not ends, f"row {r}: turn {i} is not what the model must emit: {law.decode(ids[start:end])!r}"
    for i, (_, _, _, faults) in enumerate(law.turns):
        claims, trainable = faults or {"exact", "split"}, i not in untrained and "no turn" not in faults
        yield rows and trainable and outcomes.get(i) not in claims, f"turn {i} is {outcomes.get(i)}, not {claims}"
        yield trainable and not faults and not {i} & {*placed, *partial}, f"turn {i} is reachable, but in no row"
    shared = {(i, j) for i in placed for j in placed if placed[j][0][: len(placed[i][1])] == placed[i][1]}
    exact, used = {i for i in placed if outcomes.get(i) == "exact"}, {r for _, _, r in placed.values()}
    yield any((i, j) not in shared for i in exact for j in exact if i < j), f"turns {exact} cannot share one row"
    inexact = [i for i in placed.keys() - exact if len(used) == 1 or placed[i][2] in {placed[j][2] for j in exact}]
    yield inexact, f"turns {inexact} are in the one row, but not exact"
    allowed = {"auto": len(placed.keys() - {i for i, _ in shared}), "per_turn": len(placed), "multi_turn": 1}
    yield placed and len(used) != allowed.get(row_format, len(used)), f"{len(used)} rows, but {row_format} in {allowed}"


class Law:
    """What the law asks of every message of a conversation.

    `stop_ids`: the generation config's `eos_token_id`. `missing_stop`: "append", "leave" or "error". `how`: `tools`.
    """

    def __init__(self, tokenizer, template, messages, template_kwargs=None, stop_ids=(), missing_stop="append", **how):
        self.tokenizer, self.messages, self.missing_stop = tokenizer, messages, missing_stop
        self.how = {"chat_template": template, "tokenize": False, **how, **(template_kwargs or {})}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.stop_ids = list(stop_ids) or [tokenizer.eos_token_id]
        self.ends = {tokenizer.convert_ids_to_tokens(t) for t in stop_ids} or special
        self.special = special | self.ends
        self.turns = [self.read(i) for i in range(len(messages))]

    def render(self, messages, prompt=False):
        try:
            return self.tokenizer.apply_chat_template([messages], add_generation_prompt=prompt, **self.how)[0]
        except Exception:
            return None

    def encode(self, text):
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def read(self, i):
        """(prompt, own rendering, end of the last field in it, why message i cannot be trained)."""
        before, message = self.messages[:i], self.messages[i]
        if message["role"] != "assistant":
            return "", "", None, {"no turn"}
        prompt, own = self.render(before, prompt=True), self.render([*before, message])
        if prompt is None or own is None:
            return "", "", None, {"unrenderable"}
        end = end_of_fields(own, len(prompt) if own.startswith(prompt) else 0, message)
        # "a" is found in any text: a field holds only if an unmistakable one in its place is rendered as well.
        texts = {name: text for name in MARKED if isinstance(text := message.get(name), str) and text.strip()}
        within = {name for name, text in texts.items() if any(text.strip() in token for token in self.special)}
        tags = {name for name, text in texts.items() if name not in REASONING and re.match(r"\s*<[\w/|]", text)}
        plain = texts.keys() - (tags - within)
        marked = {name: MARKED[name] if name in plain else value for name, value in message.items()}
        shown = end_of_fields(self.render([*before, marked]) or "", 0, marked)
        faults = {"off_prompt": not own.startswith(prompt), "altered": end is None or shown is None}
        return prompt, own, end, {fault for fault, holds in faults.items() if holds}

    def targets(self, i):
        """Yield every list of ids that can be what the model must emit after the prompt of turn i; mostly one."""
        prompt, own, _, faults = self.turns[i]
        context, cut = self.encode(prompt)[0], len(prompt)
        n, seen = len(context), len(self.decode(context))
        for text, stop in [] if faults else self.endings(i):
            ids, spans = self.encode(max(own, text, key=len))
            if ids[:n] == context and all(b <= cut for _, b in spans[:n]) and all(a >= cut for a, _ in spans[n:]):
                yield [t for t, (a, _) in zip(ids, spans, strict=True) if a < len(text)][n:] + stop
                yield self.encode(text)[0][n:] + stop
                continue
            for anchor in ("", "\n", "a"):  # a token straddles the boundary: the rest alone, without a dummy prefix
                before, both = self.encode(anchor)[0], self.encode(anchor + text[cut:])[0]
                rest = both[len(before) :] + stop
                leads = [re.match(r"\s*", said)[0] for said in (text[cut:], self.decode(context + rest)[seen:])]
                if both[: len(before)] == before and leads[0] == leads[1]:
                    yield rest

    def endings(self, i):
        """(Text of prompt and targets, ids of a stop that the text lacks) of every lawful end of turn i; mostly one."""
        _, own, end, _ = self.turns[i]
        tail, final, texts = own[end:], self.after_answer(i), []
        header = (self.messages[i].get("tool_calls") and self.after_answer(i, "tool")) or self.after_answer(i, "user")
        foreign = re.match(rf"\s*(?:{TAG})*", final)[0].strip() or final.strip()  # no token of ours: perhaps all of it
        closing = self.stops(final) | ({foreign} - {""} if not any(t in final for t in self.special) else set())
        last = [token for token in self.controls(tail) if tail.rstrip().endswith(token)]  # <|call|> of gpt-oss
        for stops in (closing, last, opening := self.stops(header)):
            texts = texts or [own[: end + tail.index(stop) + len(stop)] for stop in stops if stop in tail]
        if texts or self.missing_stop != "append":
            return [(text, []) for text in texts or [own] * (self.missing_stop == "leave")]
        answer = own.removesuffix(final)  # where the template puts no stop, only whitespace can follow an answer
        texts = [own + s for s in opening] + [answer + header[: header.index(s) + len(s)] for s in opening]
        known = [] if opening & self.ends else self.stop_ids
        return [(text, []) for text in texts] + [(text, [stop]) for stop in known for text in (own, answer)]

    def stops(self, text):
        """The first control token in what follows an answer, and the first that the engine stops at."""
        found = self.controls(text) or re.findall(TAG, text)
        return {*found[:1], *[token for token in found if token in self.ends][:1]}

    def controls(self, text):
        """The control tokens in a text, in order; also what looks like one and is not in the vocabulary."""
        known, unknown = self.tokenizer.convert_tokens_to_ids, (None, self.tokenizer.unk_token_id)
        tokens = self.special | {token for token in re.findall(PIPED, text) if known(token) in unknown}
        return sorted((token for token in tokens if token in text), key=lambda t: (text.index(t), -len(t)))

    def after_answer(self, i, role=None):
        """What the template puts after an answer in the place of turn i, up to what `role` says next; or nothing."""
        typed = isinstance(self.messages[i].get("content"), list)
        said = [("assistant", ANSWER), (role, NEXT)][: 2 if role else 1]
        said = [{"role": who, "content": [{"type": "text", "text": text}] if typed else text} for who, text in said]
        text = self.render([*self.messages[:i], *said]) or ""
        return text.rpartition(ANSWER)[2].partition(NEXT)[0] if ANSWER in text and (NEXT in text or not role) else ""


def end_of_fields(text, start, message):
    """Where the last of reasoning, answer and calls, each found after the one before, ends; None if something is lost.

    A field is a list of pieces in any order, a piece a list of its spellings: a call has a name and leaf arguments.
    """
    content = message.get("content") or ""
    answer = [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    thoughts = [next((message[name] for name in REASONING if message.get(name)), "")]
    if inline := re.match(r"\s*<think>(.*?)</think>(.*)", "".join(answer[:1]), re.DOTALL):
        thoughts, answer = [*thoughts, inline[1]], [inline[2], *answer[1:]]
    thoughts, answer = ([[[part.strip()]] for part in parts] for parts in (thoughts, answer))
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    calls = [[[function["name"]], *leaves(function.get("arguments") or {})] for function in functions]
    for order in (thoughts + answer + calls, thoughts + calls + answer):
        end = start
        for pieces in order:
            ends = [[text.find(s, end) + len(s) for s in spellings if text.find(s, end) >= 0] for spellings in pieces]
            end = max(map(min, ends)) if all(ends) else len(text) + 1
        if end <= len(text):
            return end
    return None


def leaves(value):
    """The spellings of every leaf argument: raw, JSON-escaped, as a Python literal."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in leaves(item)]
    escaped = [json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value)]
    return [[value, *(text[1:-1] for text in escaped)] if isinstance(value, str) else escaped]
