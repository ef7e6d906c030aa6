"""Conversations of the shapes that a template has often seen, rendered by what it did with one of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Template
from jinja2.exceptions import TemplateError as JinjaError

from chatloss.meter import Bounds, Exceeded
from chatloss.shapes.recording import Recording, recorded, written_alone
from chatloss.shapes.sandbox import RecordingSandbox
from chatloss.shapes.together import TogetherSandbox, written_together
from chatloss.traced.expressions import Unsupported
from chatloss.traced.render import World

__all__ = ["Recording", "Shapes"]

Message = Mapping[str, Any]
Rendered = list[str | Exception | None]

LARGEST, SMALL = 256, 32  # messages of a conversation; where there are more, all is recorded in one pass
# So many conversations of a shape take as long as recording one and planning its rows, and so many more to try again.
OFTEN, LATER = 4, 144
PATIENCE = 2  # each recording of a long shape that did not serve makes the next one wait so many times longer
KNOWN, RECORDED, EACH = 4096, 256, 8  # shapes that are counted, those that are recorded, recordings of each
KEPT = 120_000  # steps and pieces of all recordings together, of which each takes a kilobyte with its plan
LONGEST_SHAPE, LONGEST_NAME, LONGEST_TEXT = 4096, 64, 2**20  # of what is kept for each
_NOT_COMPILED = (
    JinjaError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, TypeError, Unsupported, Exceeded,
)
_OTHER = ...  # begins what a shape says of a message that is more than a role and a text; equal to nothing else there
_SCALARS = frozenset((str, int, bool, float, type(None)))


class Shapes:
    """The shapes of conversations under one template text. Raises `Unsupported` where it cannot be recorded.

    `fresh`: what `render` gave last is the first that a recording was used for; `together`: one made in one pass.

    Not safe for use by several threads at a time.
    """

    def __init__(
        self, text: str, clock: Callable[[], datetime], bounds: Bounds, constants: Mapping[str, Any]
    ) -> None:
        if "strftime_now" in text and clock == datetime.now:
            raise Unsupported("what it writes depends on when")
        self._sandbox = RecordingSandbox(clock, bounds)
        self._sandbox.meter.start()
        try:
            self._template = self._sandbox.load(text)
        except _NOT_COMPILED as error:
            raise Unsupported(str(error)) from None
        self._constants, self._text, self._clock = constants, text, clock
        self._together: tuple[TogetherSandbox, Template] | None = None
        self.fresh, self.together, self.known = False, False, list[int]()
        self._seen: OrderedDict[int, int] = OrderedDict()  # by hash: shapes may be long
        self._shapes: OrderedDict[Any, list[Recording]] = OrderedDict()

    def render(
        self, messages: Sequence[Message], worlds: Sequence[World], tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
    ) -> Rendered | None:
        """What `worlds` write or raise, None where that is not known; None for a conversation of no known shape.

        `variables` are what the conversation gives the template beside that; `constants` it always has. `known` then
        has for each world a number of characters: two of the texts begin alike through the smaller of theirs.
        """
        key, leaves = _shape_of(messages, tools, variables)
        self.together = False
        if key is None:
            return None
        self._start()
        shape, texts = self._known(key, leaves)
        long = len(messages) > SMALL
        self.fresh = texts is None and _may_be_kept(key) and self._often(key, long)
        self.together = self.fresh and long
        if self.fresh:
            self._learn(key, self._record(messages, worlds, tools, variables))
            self._start()
            shape, texts = self._known(key, leaves)
        if shape is None or texts is None:
            return None
        made = shape.worlds.written(texts)
        found: Rendered = []
        self.known = []
        for world in worlds:
            one, known = made((world.count, world.prompt)), 0
            if world.swap is not None:
                given = self._swapped(shape, key, messages, world.swap, tools, variables)
                if given is None or isinstance(one, tuple):
                    one = None if given is None else shape.worlds.written(given)((world.count, world.prompt))
            if isinstance(one, tuple):
                text, known = one
                found.append(text)
            else:
                found.append(one)
            self.known.append(0 if world.swap else known)
        return found

    def recall(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> tuple[Recording, tuple[str, ...]] | None:
        """The recording of this conversation's shape, and the texts of all its pieces; None if there is none."""
        key, leaves = _shape_of(messages, tools, variables)
        if key not in self._shapes:
            return None
        self._start()
        recording, texts = self._known(key, leaves)
        return None if recording is None or texts is None else (recording, texts)

    def _start(self) -> None:
        for sandbox in (self._sandbox, *(self._together or ())[:1]):
            sandbox.meter.start()

    def _known(self, key: Any, leaves: Sequence[Any]) -> tuple[Recording | None, tuple[Any, ...] | None]:
        """The recording that a conversation passes all guards of, and what that gives."""
        recordings = self._shapes.get(key, ())
        for i, shape in enumerate(recordings):
            texts = self._replayed(shape, leaves)
            if texts is not None:
                if i:
                    recordings.insert(0, recordings.pop(i))  # type: ignore[union-attr]
                return shape, texts
        return None, None

    def _replayed(self, shape: Recording, leaves: Sequence[Any]) -> tuple[Any, ...] | None:
        try:
            values = shape.program.run(leaves)
        except Exception:  # whatever it is, the template itself will say it in its own words
            return None
        if values is None or sum(map(len, values)) * shape.repeats > self._sandbox.meter.bounds.output // 2:
            return None  # the template may write more than it is let
        return shape.texts + values

    def _swapped(
        self, shape: Recording, key: Any, messages: Sequence[Message], swap: tuple[int, Message],
        tools: Sequence[Any] | None, variables: Mapping[str, Any],
    ) -> tuple[Any, ...] | None:
        """What a recording gives of the conversation with another message, should that pass the same guards."""
        index, other = swap
        own, leaves = _shape_of([*messages[:index], other, *messages[index + 1 :]], tools, variables)
        return self._replayed(shape, leaves) if own == key else None

    def _often(self, key: Any, long: bool) -> bool:
        """Whether a recording is worth its time, after so many conversations that had to do without.

        Of many messages one is soon unlike those that were recorded.
        """
        wanted = OFTEN * PATIENCE ** len(self._shapes.get(key, ())) if long else OFTEN
        seen = self._seen.pop(hash(key), 0) + 1
        self._seen[hash(key)] = seen if seen < 0 else seen % wanted
        if len(self._seen) > KNOWN:
            self._seen.popitem(last=False)
        return seen == wanted

    def _learn(self, key: Any, shape: Recording | None) -> None:
        recordings = self._shapes.pop(key, [])
        self._shapes[key] = [shape, *recordings[: EACH - 1]] if shape is not None else recordings
        if shape is None:
            self._seen[hash(key)] = -LATER  # it may be another part of the template next time
        while len(self._shapes) > RECORDED or sum(one.size for each in self._shapes.values() for one in each) > KEPT:
            self._shapes.popitem(last=False)

    def _record(
        self, messages: Sequence[Message], worlds: Sequence[World], tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
    ) -> Recording | None:
        """The shape of a conversation; None where another one of its shape may be rendered in another way."""
        if sum(map(_length, _shape_of(messages, tools, variables)[1])) > LONGEST_TEXT:
            return None  # recording holds all its sums
        asked = dict.fromkeys((world.count, world.prompt) for world in worlds)
        given = {**self._constants, **variables}
        if len(messages) <= SMALL:
            return recorded(written_alone, self._sandbox, self._template, messages, asked, tools, given)
        if self._together is None:
            sandbox = TogetherSandbox(self._clock, self._sandbox.meter.bounds)
            sandbox.meter.start()
            try:
                self._together = sandbox, sandbox.load(self._text)
            except _NOT_COMPILED:
                return None
        return recorded(written_together, *self._together, messages, asked, tools, given)


def _shape_of(
    messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """(what conversations have in common that are rendered alike, the values in which they differ)."""
    leaves: list[Any] = []
    if len(messages) > LARGEST:
        return None, leaves
    shape: list[Any] = []
    for message in messages:
        role, text = message.get("role"), message.get("content")
        if len(message) == 2 and type(role) is type(text) is str and next(iter(message)) == "role":
            shape.append(role)  # what all others are follows their mark
            leaves.append(text)
            continue
        shape.append(_OTHER)
        for key, value in message.items():
            shape.append(key)
            if key == "role":
                shape.append(value)
            elif type(value) is str:
                leaves.append(value)
            elif key == "tool_calls":
                shape.append(len(value))
                for call in value:
                    _walk(call, shape, leaves)
            else:
                shape.append(type(value))
                leaves.append(value)
        shape.append(None)
    shape.append(tools is None)
    if tools is not None:
        leaves += tools
        shape += map(type, tools)
    for key, value in variables.items():
        if type(value) not in _SCALARS:
            return None, leaves
        shape += key, type(value), repr(value) if type(value) is float else value  # 0.0 == -0.0
    return tuple(shape), leaves


def _may_be_kept(shape: Sequence[Any]) -> bool:
    """Keys and roles are a stranger's."""
    return len(shape) <= LONGEST_SHAPE and not any(type(one) is str and len(one) > LONGEST_NAME for one in shape)


def _length(value: Any) -> int:
    """How many characters and values it holds."""
    if isinstance(value, str):
        return len(value)
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return 1 + sum(map(_length, items))


def _walk(value: Mapping[str, Any], shape: list[Any], leaves: list[Any]) -> None:
    """A tool call: what is deeper than its function and arguments is one value."""
    for key, one in value.items():
        shape.append(key)
        if type(one) is dict and key == "function":
            _walk(one, shape, leaves)
        else:
            shape.append(type(one))
            leaves.append(one)
    shape.append(None)
