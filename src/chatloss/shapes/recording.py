"""What a template did with one conversation, for others of its shape: pieces, and a program that gives some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Template
from jinja2.runtime import Context

from chatloss.meter import Exceeded
from chatloss.shapes.program import Program
from chatloss.shapes.recorder import Written, told
from chatloss.shapes.renderings import Renderings
from chatloss.shapes.sandbox import RecordingSandbox
from chatloss.shapes.symbols import Symbol, Unplanned

__all__ = ["Recording", "forget", "recorded", "written_alone"]

Message = Mapping[str, Any]
Leaf = Callable[..., Symbol]
# What worlds of messages with symbols write, as far as that is known. Raises `Unplanned`.
Write = Callable[[Any, Template, Sequence[Message], Sequence[tuple[int, bool]], Mapping[str, Any]], Written]


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
    worlds: Renderings

    @property
    def constants(self) -> int:
        return len(self.texts)


def recorded(
    write: Write, sandbox: RecordingSandbox, template: Template, messages: Sequence[Message],
    worlds: Iterable[tuple[int, bool]], tools: Sequence[Any] | None, variables: Mapping[str, Any],
) -> Recording | None:
    """What `write` tells of a conversation; None where another one of its shape may be rendered in another way."""
    recorder = sandbox.recorder
    recorder.begin()
    sandbox.meter.start()  # all renderings together may take what one may
    leaves = 0

    def leaf(value: Any, of_tools: bool = False) -> Symbol:
        nonlocal leaves
        leaves += 1
        return recorder.leaf(value, of_tools)

    given = [_with_leaves(message, leaf) for message in messages]
    given_tools = None if tools is None else [leaf(tool, of_tools=True) for tool in tools]
    try:
        written = write(sandbox, template, given, [*worlds], {**variables, "tools": given_tools, "documents": None})
        program = Program(recorder, leaves, [*recorder.written.values()])
        steps = len(recorder.steps)
    except (Unplanned, RecursionError, MemoryError):
        return None
    finally:
        symbols = recorder.written
        recorder.end()
    for one in written.values():
        if isinstance(one, Exception):  # it is kept, and not what the template held then
            one.__traceback__ = one.__context__ = one.__cause__ = None
    renderings = Renderings(written)
    pieces = [one for held in renderings.held() for one in held]
    texts = [*dict.fromkeys(one for one in pieces if type(one) is str)]
    places: dict[Any, tuple[int]] = {one: (i,) for i, one in enumerate([*texts, *symbols])}
    return Recording(
        program, tuple(texts), steps + len(pieces), renderings.repeats(), renderings.split(places.__getitem__)
    )


def written_alone(
    sandbox: RecordingSandbox, template: Template, messages: Sequence[Message], worlds: Sequence[tuple[int, bool]],
    variables: Mapping[str, Any],
) -> Written:
    """What each of `worlds` writes or raises, rendered one by one. Raises `Unplanned`, as whatever ends a recording."""
    recorder, made = sandbox.recorder, Written()
    refusals: dict[str, Exception] = {}
    for count, prompt in worlds:
        recorder.start()
        context = template.new_context({
            **variables, "messages": messages[:count], "add_generation_prompt": prompt,
        })
        try:
            for _ in template.root_render_func(context):
                pass
            made[count, prompt] = tuple(recorder.flat(recorder.buffer.parts))
        except (Unplanned, Exceeded, RecursionError, MemoryError) as error:
            raise Unplanned(str(error)) from None
        except Exception as error:  # a stranger's code: whatever it raises is its refusal
            made[count, prompt] = refusals.setdefault(told(error), error)
        finally:
            forget(context)
    return made


def forget(context: Context) -> None:
    """Let go of the conversation: steps may keep the context, from which they take nothing of it."""
    context.parent.update(messages=None, tools=None)


def _with_leaves(message: Message, leaf: Leaf) -> dict[str, Any]:
    """The message with a symbol for each value, in the order of `Shapes`' leaves."""
    made: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            made[key] = value
        elif key == "tool_calls" and type(value) is not str:
            made[key] = [_call_with_leaves(call, leaf) for call in value]
        else:
            made[key] = leaf(value)
    return made


def _call_with_leaves(call: Message, leaf: Leaf) -> dict[str, Any]:
    return {
        key: _call_with_leaves(one, leaf) if type(one) is dict and key == "function" else leaf(one)
        for key, one in call.items()
    }
