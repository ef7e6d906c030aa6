"""Conversations of the shapes that a template has often seen, rendered by what it did with one of them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2.exceptions import TemplateError as JinjaError

from chatloss.meter import Bounds, Exceeded
from chatloss.shapes.program import Program
from chatloss.shapes.recorder import told
from chatloss.shapes.sandbox import RecordingSandbox
from chatloss.shapes.symbols import Symbol, Unplanned
from chatloss.traced.expressions import Unsupported
from chatloss.traced.render import World

__all__ = ["Recording", "Shapes"]

Message = Mapping[str, Any]
Rendered = list[str | Exception | None]

LARGEST = 32  # messages: longer conversations hardly ever have the same shape
# So many conversations of a shape take as long as recording one and planning its rows, and so many more to try again.
OFTEN, LATER = 4, 144
KNOWN, RECORDED, EACH = 4096, 256, 8  # shapes that are counted, those that are recorded, recordings of each
KEPT = 200_000  # steps and pieces of all recordings together
LONGEST_SHAPE, LONGEST_NAME, LONGEST_TEXT = 1024, 64, 2**16  # of what is kept for each
_SCALARS = frozenset((str, int, bool, float, type(None)))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Recording:
    """How to render the worlds of a shape: for each the indices of its pieces among `texts` and what `program` gives.

    Pieces from `constants` on are values of the program. A world that the template refuses has what it raises. `size`:
    its steps and pieces. `repeats`: how often a value of the program is written in a world, at most.
    """

    program: Program
    texts: tuple[str, ...]
    size: int
    repeats: int
    worlds: Mapping[tuple[int, bool], tuple[int, ...] | Exception]

    @property
    def constants(self) -> int:
        return len(self.texts)

    def text(self, texts: Sequence[str], count: int, prompt: bool) -> str | None:
        """A world of the conversation whose pieces are `texts`; None where it is refused or not known."""
        pieces = self.worlds.get((count, prompt))
        return "".join([texts[i] for i in pieces]) if isinstance(pieces, tuple) else None


class Shapes:
    """The shapes of conversations under one template text. Raises `Unsupported` where it cannot be recorded.

    `fresh`: what `render` gave last is the first that a recording was used for.

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
        except (JinjaError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError, TypeError) as error:
            raise Unsupported(str(error)) from None
        self._constants = constants
        self.fresh = False
        self._seen: OrderedDict[int, int] = OrderedDict()  # by hash: shapes may be long
        self._shapes: OrderedDict[Any, list[Recording]] = OrderedDict()

    def render(
        self, messages: Sequence[Message], worlds: Sequence[World], tools: Sequence[Any] | None,
        variables: Mapping[str, Any],
    ) -> Rendered | None:
        """What `worlds` write or raise, None where that is not known; None for a conversation of no known shape.

        `variables` are what the conversation gives the template beside that; `constants` it always has.
        """
        key, leaves = _shape_of(messages, tools, variables)
        if key is None:
            return None
        self._sandbox.meter.start()
        shape, texts = self._known(key, leaves)
        self.fresh = texts is None and _may_be_kept(key) and self._often(key)
        if self.fresh:
            self._learn(key, self._record(messages, worlds, tools, variables))
            self._sandbox.meter.start()
            shape, texts = self._known(key, leaves)
        if shape is None or texts is None:
            return None
        found: Rendered = []
        for world in worlds:
            pieces = shape.worlds.get((world.count, world.prompt))
            given = (texts if world.swap is None
                     else self._swapped(shape, key, messages, world.swap, tools, variables))
            if given is None or pieces is None:
                found.append(None)
            elif isinstance(pieces, Exception):
                found.append(pieces)
            else:
                found.append("".join([given[i] for i in pieces]))
        return found

    def recall(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
    ) -> tuple[Recording, tuple[str, ...]] | None:
        """The recording of this conversation's shape, and the texts of all its pieces; None if there is none."""
        key, leaves = _shape_of(messages, tools, variables)
        if key not in self._shapes:
            return None
        self._sandbox.meter.start()
        recording, texts = self._known(key, leaves)
        return None if recording is None or texts is None else (recording, texts)

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

    def _often(self, key: Any) -> bool:
        """Whether a recording is worth its time, after so many conversations that had to do without."""
        seen = self._seen.pop(hash(key), 0) + 1
        self._seen[hash(key)] = seen if seen < 0 else seen % OFTEN
        if len(self._seen) > KNOWN:
            self._seen.popitem(last=False)
        return seen == OFTEN

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
            return None  # recordings keep it
        recorder = self._sandbox.recorder
        recorder.begin()
        self._sandbox.meter.start()  # all renderings together may take what one may
        leaves = 0

        def leaf(value: Any, of_tools: bool = False) -> Symbol:
            nonlocal leaves
            leaves += 1
            return recorder.leaf(value, of_tools)

        given = [_with_leaves(message, leaf) for message in messages]
        tools = None if tools is None else [leaf(tool, of_tools=True) for tool in tools]
        written: dict[tuple[int, bool], list[Any] | Exception] = {}
        refusals: dict[str, Exception] = {}
        try:
            for count, prompt in dict.fromkeys((world.count, world.prompt) for world in worlds):
                recorder.start()
                context = self._template.new_context({
                    **self._constants, **variables, "messages": given[:count], "tools": tools, "documents": None,
                    "add_generation_prompt": prompt,
                })
                try:
                    for _ in self._template.root_render_func(context):
                        pass
                    made = recorder.joined(recorder.buffer.parts)
                    written[count, prompt] = (made.parts or [made]) if type(made) is Symbol else [made]
                except (Unplanned, Exceeded, RecursionError, MemoryError):
                    return None
                except Exception as error:  # a stranger's code: whatever it raises is its refusal
                    written[count, prompt] = refusals.setdefault(told(error), error)
            pieces = [one for parts in written.values() if isinstance(parts, list) for one in parts]
            symbols = {one.slot: one for one in pieces if type(one) is Symbol}
            program = Program(recorder, leaves, [*symbols.values()])
            size = len(recorder.steps) + len(pieces)
            repeats = max((n for parts in written.values() if isinstance(parts, list)
                           for n in Counter(one.slot for one in parts if type(one) is Symbol).values()), default=0)
        except (Unplanned, RecursionError, MemoryError):
            return None
        finally:
            recorder.end()
        texts = {one: i for i, one in enumerate(dict.fromkeys(one for one in pieces if type(one) is str))}
        places = {slot: len(texts) + i for i, slot in enumerate(symbols)}
        return Recording(program, tuple(texts), size, repeats, {
            world: parts if isinstance(parts, Exception)
            else tuple(places[one.slot] if type(one) is Symbol else texts[one] for one in parts)
            for world, parts in written.items()
        })


def _shape_of(
    messages: Sequence[Message], tools: Sequence[Any] | None, variables: Mapping[str, Any]
) -> tuple[Any, list[Any]]:
    """(what conversations have in common that are rendered alike, the values in which they differ)."""
    leaves: list[Any] = []
    if len(messages) > LARGEST:
        return None, leaves
    shape: list[Any] = []
    for message in messages:
        text = message.get("content")
        if len(message) == 2 and type(text) is str and next(iter(message)) == "role":
            shape += "role", message["role"], "content", None
            leaves.append(text)
            continue
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


def _with_leaves(message: Message, leaf: Callable[[Any], Symbol]) -> dict[str, Any]:
    """The message with a symbol for each value, in the order of `_shape_of`."""
    made: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            made[key] = value
        elif key == "tool_calls" and type(value) is not str:
            made[key] = [_call_with_leaves(call, leaf) for call in value]
        else:
            made[key] = leaf(value)
    return made


def _call_with_leaves(call: Mapping[str, Any], leaf: Callable[[Any], Symbol]) -> dict[str, Any]:
    return {
        key: _call_with_leaves(one, leaf) if type(one) is dict and key == "function" else leaf(one)
        for key, one in call.items()
    }
