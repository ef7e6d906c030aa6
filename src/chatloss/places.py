"""Whose text is whose: where each message stands in a rendering of more of them, rewritten or not."""

from __future__ import annotations

from chatloss.fields import SHORT, Located, Missing, fields_of, locate
from chatloss.reference import Rendering, Turn, View
from chatloss.sample import Reason
from chatloss.template import control_texts

__all__ = ["regions", "standing"]


def regions(rendering: Rendering, text: str, count: int) -> list[tuple[int, int, int]]:
    """(start, end, message) for the first `count` messages as they stand in `text`, a rendering of more of them.

    Exact where shorter renderings are prefixes; where a template rewrites history, a message ends behind its text.
    """
    bounds, at = [], 0
    for i in range(count):
        prefix = rendering.text(i + 1)
        if prefix is not None and text.startswith(prefix):
            end = len(prefix)
        else:
            end = _end_by_text(rendering, text, at, i, prefix)
        end = max(at, min(end, len(text)))
        bounds.append((at, end, i))
        at = end
    return bounds


def _end_by_text(rendering: Rendering, text: str, at: int, index: int, prefix: str | None) -> int:
    fields = fields_of(rendering.conversation.messages[index])
    answer = [field for field in fields if field.reason == Reason.CONTENT]
    for wanted in (fields, answer):  # the template may have dropped the reasoning or the calls
        found = locate(text, wanted, at)
        if isinstance(found, Missing) or not found or not _goes_on(rendering, text, found[-1][1], index + 1):
            continue
        end = found[-1][1]
        # What the shorter rendering writes behind the same words belongs to the message as far as it stands here too.
        words = text[max(found[-1][0], end - SHORT) : end]
        behind = prefix.rfind(words) if prefix else -1
        return end + _common(prefix[behind + len(words) :], text[end:]) if prefix and behind >= 0 else end
    if not fields:
        return max(at, _common(prefix or "", text))
    prompt = rendering.prompt(index) or ""  # of a message that is dropped the header may be left
    return max(at, len(prompt)) if text.startswith(prompt) else at


def _goes_on(rendering: Rendering, text: str, at: int, index: int) -> bool:
    """Whether the next message is behind `at`; else what was found is somebody's quotation of a dropped message."""
    messages = rendering.conversation.messages
    following = [f for f in fields_of(messages[index]) if f.reason == Reason.CONTENT] if index < len(messages) else []
    return not following or messages[index].role == "assistant" or not isinstance(locate(text, following, at), Missing)


def standing(rendering: Rendering, index: int, base: Turn) -> Located:
    """What the row of a later turn, `base`, shows of message `index` in its context: its fields and its stop, if any.

    This is what training in an unlawful row can train of it.
    """
    engine, before, text = rendering.prompt(base.index), rendering.prompt(index), base.prompt
    # A turn that is kept off its prompt has a row of its own rendering.
    view = View(rendering, base.index, True) if text == engine else View(rendering, base.index + 1, False)
    known = before is not None and text.startswith(before)
    start = len(before or "") if known else view.last_text(index)
    found = [place for place in view.shown(index, start) if place[1] <= len(text)]
    if not found and not known:
        return []
    at = found[-1][1] if found else start
    limit = min(view.next_text(index, at), len(text))
    stop = rendering.stops.end(text[:limit], at)
    starts = [stop - len(end) for end in rendering.stops.texts if text.endswith(end, at, stop)] if stop else []
    if stop is None or control_texts(text[at : min(starts)]):  # that is the stop of another message
        return found
    return [*found, (at, stop, Reason.STOP)]


def _common(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size
    low, high = 0, size
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
