"""Command-line options that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from chatloss.errors import UsageError

if TYPE_CHECKING:
    from chatloss.encode import ChatEncoder
    from chatloss.markers import Markers
    from chatloss.reader import Reader

__all__ = ["Source", "reading_options"]

F = TypeVar("F", bound=Callable[..., Any])

# Kept beside the parser so that --help needs no heavy import; a test holds them equal to chatloss.policy.
CHOICES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "row_format": (("auto", "per_turn", "multi_turn"), "Rows per conversation: the fewest lawful, one a turn, or one."),
    "unlawful": (("error", "keep"), "With multi_turn: turns that one row cannot hold lawfully."),
    "turns": (("all", "last", "last_round"), "Which assistant messages are trained."),
    "off_prompt": (("error", "drop", "keep", "splice"), "Turns whose prompt inference would not show."),
    "altered": (("error", "drop", "keep"), "Turns of which the template drops or changes a part."),
    "unrenderable": (("error", "drop"), "Turns whose prompt the template refuses to render."),
    "control_tokens": (("reject", "parity", "literal"), "Text that holds control tokens."),
    "missing_stop": (("append", "leave", "error"), "Answers that are rendered without a stop."),
    "overflow": (("whole_turns", "window", "right", "drop", "error"), "Rows longer than --max-length."),
    "content_format": (("auto", "string", "parts"), "How messages reach the template."),
    "tool_arguments": (("auto", "object", "string"), "How tool arguments reach the template."),
}
INPUT_FORMATS = ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "preference", "kto", "text")


@dataclass(frozen=True, slots=True)
class Source:
    """What a reading command was given: data, tokenizer and every choice about them."""

    data: tuple[str, ...]
    tokenizer: str
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    input_format: str = "auto"
    max_rejects: float = 0.01
    policy: Mapping[str, Any] = field(default_factory=dict)
    response_template: str = ""
    instruction_template: str = ""
    marker_mode: str = ""
    trace: bool = True

    def encoder(self) -> ChatEncoder:
        from chatloss.encode import ChatEncoder
        from chatloss.policy import Policy

        template = None if self.chat_template is None else Path(self.chat_template)
        policy = Policy.from_dict(self.policy)
        return ChatEncoder.load(
            self.tokenizer, template, policy, template_kwargs=self.template_kwargs, trace=self.trace
        )

    def reader(self, *, lenient: bool = False) -> Reader:
        """`lenient`: never fail because of bad rows, only list them."""
        from chatloss.reader import read

        share = 1.0 if lenient else self.max_rejects
        return read(list(self.data), input_format=self.input_format, max_rejects=share)

    def markers(self, encoder: ChatEncoder) -> Markers | None:
        from chatloss.markers import Markers

        if not self.response_template:
            return None
        mode = self.marker_mode or ("all" if self.instruction_template else "last")
        stop = encoder.engine_stops[0] if encoder.engine_stops else ""
        return Markers(mode, _unescape(self.response_template), _unescape(self.instruction_template), stop)


def _unescape(text: str) -> str:
    """A newline is hard to type in a shell: \\n in an option means one."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def reading_options(function: F, *, data_required: bool = True) -> F:
    """DATA, --tokenizer, and a flag for every choice; the command receives one `Source`."""

    def collected(**given: Any) -> Any:
        policy = {name: given.pop(name) for name in CHOICES}
        policy |= {"roles": given.pop("role"), "parts": given.pop("part"), "spans": _spans(given.pop("span"))}
        policy |= {"max_length": given.pop("max_length"), "splice_format": _unescape(given.pop("splice_format") or "")}
        chosen = {name: value for name, value in policy.items() if value not in (None, (), "")}
        names = {entry.name for entry in fields(Source)} - {"policy", "template_kwargs"}
        kwargs = _json_object(given.pop("template_kwargs"), "--template-kwargs")
        own = {name: given.pop(name) for name in list(given) if name in names}
        own = {name: value for name, value in own.items() if value is not None}
        return function(Source(policy=chosen, template_kwargs=kwargs, **own), **given)

    collected.__name__, collected.__doc__ = function.__name__, function.__doc__
    collected.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
    for option in reversed(_options(data_required)):
        collected = option(collected)
    return collected  # type: ignore[return-value]


def _options(data_required: bool) -> list[Callable[[Any], Any]]:
    choices = [
        click.option(f"--{name.replace('_', '-')}", type=click.Choice(values), help=text, hidden=False)
        for name, (values, text) in CHOICES.items()
    ]
    return [
        click.argument("data", nargs=-1, required=data_required),
        click.option("--tokenizer", "-t", required=True, help="Directory, tokenizer.json or hub id."),
        click.option("--chat-template", metavar="FILE", help="A template instead of the tokenizer's own."),
        click.option("--template-kwargs", metavar="JSON", help='For every chat, e.g. {"enable_thinking": false}.'),
        click.option("--input-format", type=click.Choice(INPUT_FORMATS), help="What a row means; told by default."),
        click.option("--trace/--no-trace", default=True, help="Render prefixes in one pass, or one by one [trace]."),
        click.option("--max-rejects", type=float, metavar="SHARE", help="Fail beyond this share of bad rows [0.01]."),
        *choices[:3],
        click.option("--role", multiple=True, help="Whose messages are trained [assistant]."),
        click.option("--part", multiple=True, type=click.Choice(("reasoning", "content", "calls")),
                     help="Which parts of a turn are trained [all]."),
        click.option("--span", multiple=True, metavar="REGEX=WEIGHT", help="Weigh what matches inside an answer."),
        *choices[3:4],
        click.option("--splice-format", metavar="TEXT",
                     help="With --off-prompt splice: {content}, {reasoning_content}."),
        *choices[4:8],
        click.option("--max-length", type=click.IntRange(min=1), metavar="TOKENS", help="Longest row [unlimited]."),
        *choices[8:],
        click.option("--response-template", metavar="TEXT", help="Plain text: what stands before a response."),
        click.option("--instruction-template", metavar="TEXT", help="Plain text: what stands before an instruction."),
        click.option("--marker-mode", type=click.Choice(("last", "all", "minimind")), help="Which responses to train."),
    ]


def _spans(given: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    spans = []
    for text in given:
        pattern, equals, weight = text.rpartition("=")
        try:
            spans.append((pattern, float(weight)))
        except ValueError:
            equals = ""
        if not equals:
            raise UsageError(f"--span takes REGEX=WEIGHT, not {text!r}", hint="for example --span '\\d+=2.0'")
    return tuple(spans)


def _json_object(text: str | None, option: str) -> dict[str, Any]:
    import json

    if not text:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UsageError(f"{option} is not JSON: {error}", hint='for example \'{"enable_thinking": false}\'') from None
    if not isinstance(value, dict):
        raise UsageError(f"{option} must be an object", hint='for example \'{"enable_thinking": false}\'')
    return value
