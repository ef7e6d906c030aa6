"""ChatEncoder: a conversation in, rows out, in which every trained token is what the model must emit at inference."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from chatloss.chat import Conversation, Message, split_think
from chatloss.encoding import Encoding, Problem
from chatloss.errors import ChatlossError, DataError, TokenizerError
from chatloss.fast_tokens import FlatTokens
from chatloss.literal import LiteralTokens, PrivateTokens, cannot, why_not_literal
from chatloss.load import Loaded, load_tokenizer, read_template
from chatloss.paint import sample
from chatloss.places import standing
from chatloss.plans.each import each
from chatloss.plans.plans import RowPlans
from chatloss.policy import Policy
from chatloss.reference import Rendering, Stops, Turn
from chatloss.rows import TurnIds, group, turn_ids
from chatloss.sample import Reason, Sample
from chatloss.stops import Stop, control_texts
from chatloss.straight import straight
from chatloss.template import ANSWER, USER, ChatTemplate
from chatloss.tokens import FastTokens
from chatloss.typed import Controls, Origin, Typed, TypedRendering, Unproven
from chatloss.window import fit

__all__ = ["ChatEncoder", "Encoding", "Problem"]


@dataclass(frozen=True, eq=False)
class ChatEncoder:
    """Turns conversations into rows of ids with a weight and a reason for every token. Make one with `load`.

    >>> from chatloss.demo import tokenizer_directory
    >>> encoder = ChatEncoder.load(tokenizer_directory())
    >>> row, = encoder.encode([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}])
    >>> encoder.decode(row.input_ids[row.weights > 0])
    'Hello!<|im_end|>'
    """

    loaded: Loaded
    template: ChatTemplate
    policy: Policy = field(default_factory=Policy)
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    typed: Typed | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.policy.control_tokens == "literal" and (why := why_not_literal(self.loaded.tokens)):
            raise cannot(self.loaded.name, why)

    @classmethod
    def load(
        cls, tokenizer: Any, chat_template: str | Mapping[str, str] | Path | None = None,
        policy: Policy | None = None, *, template_kwargs: Mapping[str, Any] | None = None,
        clock: Callable[[], datetime] = datetime.now, trace: bool = True,
    ) -> ChatEncoder:
        """An encoder for a directory, hub id, tokenizer object or ``text -> ids`` function.

        `chat_template` (a template's text, a file, or several texts by name) replaces the tokenizer's own. `clock` is
        the time that templates see. `trace`: make all renderings of a conversation in one pass where they are proven
        equal to the renderings one by one, which is faster. Raises `TokenizerError` or `TemplateError`.
        """
        loaded = tokenizer if isinstance(tokenizer, Loaded) else load_tokenizer(tokenizer)
        source = chat_template if chat_template is not None else loaded.chat_template
        if isinstance(source, Path) or (isinstance(source, str) and "\n" not in source and "{" not in source):
            source = read_template(Path(source).expanduser())
        if source is None:
            raise TokenizerError(
                f"the tokenizer {loaded.name} has no chat template", hint="give one with --chat-template FILE",
            )
        template = ChatTemplate(source, loaded.special_tokens, clock, trace=trace)
        return cls(loaded, template, policy or Policy(), dict(template_kwargs or {}))

    @property
    def tokens(self) -> Any:
        return self.loaded.tokens

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self.loaded.tokens.decode([int(i) for i in ids]))

    # -- what tokenizer and template say together ------------------------------------------------------------------

    @cached_property
    def engine_stops(self) -> tuple[str, ...]:
        """Texts at which engines stop: those of the generation config, then the tokenizer's EOS."""
        texts = [self.loaded.tokens.token_text(i) for i in self.loaded.stop_ids]
        eos = self.loaded.special_tokens.get("eos_token")
        return tuple(dict.fromkeys(text for text in [*texts, eos] if text))

    @cached_property
    def stops(self) -> Stops:
        """The texts that end a turn, by source: the template, the generation config, the tokenizer's EOS."""
        answer, call = self.template.stops(self.loaded.tokens.special, self.engine_stops)
        texts = tuple(dict.fromkeys(text for text in (answer.text, call.text, *self.engine_stops) if text))
        eos = next(iter(self.engine_stops), "")
        return Stops(texts, answer if answer.text else Stop(eos, eos), call if call.text else Stop(eos, eos))

    @cached_property
    def control(self) -> frozenset[str]:
        """Texts that no message may hold: special tokens, and the template's own header and stop markers."""
        known = self.loaded.tokens.special
        found = {text for text in known if text.strip() and not _is_inner(text)}
        found |= set(self.stops.texts)
        shown = self.template.probe({"role": "assistant", "content": ANSWER}) or ""
        text = shown.replace(USER, "\0").replace(ANSWER, "\0")
        found |= {text[a:b] for a, b in control_texts(text, known)}
        return frozenset(text for text in found if text.strip() and len(text) > 2)

    @cached_property
    def _forms(self) -> dict[str, str]:
        formats = self.template.formats
        content, arguments = self.policy.content_format, self.policy.tool_arguments
        return {
            "content": (formats.content or "string") if content == "auto" else content,
            "arguments": (formats.arguments or "object") if arguments == "auto" else arguments,
            "reasoning": formats.reasoning or "reasoning_content",
        }

    # -- encoding --------------------------------------------------------------------------------------------------

    def encode(
        self, messages: Any, tools: Any = None, template_kwargs: Any = None, source: str = ""
    ) -> list[Sample]:
        """The rows of one conversation (messages in OpenAI form, or a `Conversation`).

        Raises `DataError` where the policy says "error"; the message names the turn and the flag that settles it.
        """
        if not isinstance(messages, Conversation):
            messages = Conversation.from_messages(messages, tools, template_kwargs, source)
        encoding = self.examine(messages)
        for problem in encoding.problems:
            if problem.fatal:
                raise problem.error(messages.source)
        return encoding.rows

    def rendering(self, conversation: Conversation) -> Rendering:
        """The conversation's prompts and own renderings under this template."""
        make = Rendering if self.typed is None else partial(TypedRendering, self.typed)
        return make(
            self.template, conversation, self.stops, missing_stop=self.policy.missing_stop,
            template_kwargs=self.template_kwargs, **self._forms,
        )

    def examine(self, conversation: Conversation) -> Encoding:
        """Rows, outcomes and problems of a conversation. Never raises for what a policy decides: problems say it."""
        problems = self.control_problems(conversation)
        if self.policy.control_tokens == "literal":
            return self._examine_literal(conversation, problems)
        return self.usual(conversation, problems)

    def examine_each(
        self, conversations: Iterable[Conversation]
    ) -> Iterator[tuple[Conversation, Encoding | ChatlossError]]:
        """Every conversation with what `examine` gives or raises, in order, but without turns.

        Much faster for many of the same shape. Up to `plans.each.AHEAD` are taken before the first is given back.
        """
        if self._plans is not None:
            return each(self, self._plans, conversations)
        return ((conversation, _attempted(self.examine, conversation)) for conversation in conversations)

    @cached_property
    def _plans(self) -> RowPlans | None:
        """Plans are made where ids tell the text."""
        tokens, policy = self.loaded.tokens, self.policy
        literal = policy.control_tokens == "literal"
        if literal or policy.spans or not isinstance(tokens, FlatTokens):
            return None
        return RowPlans(tokens, self.decode, apart=policy.row_format == "per_turn", longest=policy.max_length)

    def _examine_literal(self, conversation: Conversation, problems: list[Problem]) -> Encoding:
        """The same with sentinels in place of what was typed, where rendering shows which control strings that is."""
        spelled: dict[Origin, str] = {}
        while True:
            typed = self._controls.typed(conversation, self._forms["arguments"], spelled)
            if typed is None:
                return self.usual(conversation, problems)
            try:
                return _restored(self._with_typed(typed).usual(typed.conversation, problems[:]), typed)
            except Unproven as error:
                if error.respell is not None and error.respell[0] not in spelled:
                    spelled.update([error.respell])
                    continue
                told = f"it cannot be told which control tokens somebody typed here: {error}"
                remedy = "remove them, or --control-tokens parity to encode them as such"
                problem = Problem("control_tokens", typed.message, told, remedy, True)
                return self.usual(conversation, [problem, *problems])

    def _with_typed(self, typed: Typed) -> ChatEncoder:
        """This encoder for a conversation with sentinels, knowing all that this one has found out."""
        made = copy(self)
        tokens = LiteralTokens(self._private_tokens, typed)
        made.__dict__.update(typed=typed, loaded=replace(self.loaded, tokens=tokens))
        return made

    @cached_property
    def _private_tokens(self) -> PrivateTokens:
        return PrivateTokens(self.loaded.tokens, self.loaded.name)

    @cached_property
    def _controls(self) -> Controls:
        return Controls(self.control, "\n".join([str(self.template.source), *self.control]))

    def usual(
        self, conversation: Conversation, problems: list[Problem], rendering: Rendering | None = None
    ) -> Encoding:
        """`examine` without a look at what was typed, for which there are `problems` already."""
        rendering = rendering or self.rendering(conversation)
        wanted, untrained = self._wanted(conversation)
        turns = [rendering.turn(i) for i in wanted]
        if isinstance(self.loaded.tokens, FastTokens) and not any(problem.fatal for problem in problems):
            rows = straight(rendering, turns, self.policy, untrained, self.loaded.tokens, self.decode)
            if rows is not None:
                return Encoding(rows, dict(rows[-1].outcomes), untrained, tuple(problems), tuple(turns))
        # The last first: most of the others are parts of it.
        ids = {turn.index: self._turn_ids(turn, conversation.messages[turn.index]) for turn in reversed(turns)}
        outcomes: dict[int, str] = {}
        ready: list[TurnIds] = []
        for turn in turns:
            problem = self._problem(turn)
            if problem is not None:
                problems.append(problem)
            made = ids[turn.index]
            outcomes[turn.index] = "exact" if turn.outcome == "reachable" else turn.outcome
            if made is not None:
                ready.append(made)
            else:
                untrained[turn.index] = "missing_stop" if turn.outcome == "reachable" else turn.outcome
        if any(problem.cause == "control_tokens" and problem.fatal for problem in problems):
            untrained.update({t.turn.index: "control_tokens" for t in ready})
            ready = []  # what such text would become in the row is nobody's wish
        groups = group(ready, self.policy.row_format)
        for members in groups[:-1]:
            for t in members:
                if outcomes[t.turn.index] == "exact":
                    outcomes[t.turn.index] = "split"
        unlawful: list[int] = []
        if self.policy.row_format == "multi_turn" and len(groups) > 1:
            unlawful = sorted(t.turn.index for members in groups[:-1] for t in members)
            problems.append(self._one_row_problem(unlawful))
            groups = groups[-1:]
            base = groups[0][-1].turn
            kept = [i for i in unlawful if self.policy.unlawful == "keep" and standing(rendering, i, base)]
            untrained.update({i: "split" for i in unlawful if i not in kept})
            unlawful = kept
        rows = []
        for members in groups:
            made_rows, cut, problem = fit(self, rendering, members, outcomes, untrained, unlawful)
            rows += made_rows
            untrained.update(dict.fromkeys(cut, "truncated"))
            if problem is not None:
                problems.append(problem)
        if self.policy.max_length:  # what was cut is known only now
            rows = [replace(row, untrained=dict(untrained)) for row in rows]
        return Encoding(rows, outcomes, untrained, tuple(problems), tuple(turns))

    def sample(
        self, rendering: Rendering, members: Sequence[TurnIds], outcomes: Mapping[int, str],
        untrained: Mapping[int, str], *, length: int = 0, unlawful: Sequence[int] = (),
    ) -> Sample:
        return sample(
            rendering, members, self.policy, outcomes, untrained, self.decode, length=length, unlawful=unlawful
        )

    def _wanted(self, conversation: Conversation) -> tuple[list[int], dict[int, str]]:
        """(indices of the turns, why the other assistant messages are not trained)."""
        messages, policy = conversation.messages, self.policy
        candidates = [i for i, message in enumerate(messages) if message.role in policy.roles]
        chosen = set(candidates)
        if policy.turns == "last":
            chosen = set(candidates[-1:])
        elif policy.turns == "last_round":
            last_user = max((i for i, message in enumerate(messages) if message.role == "user"), default=-1)
            chosen = {i for i in candidates if i > last_user}
        chosen = {i for i in chosen if messages[i].train is not False and messages[i].weight != 0}
        off = {i: "switched_off" for i in candidates if i not in chosen}
        return sorted(chosen), off

    def _turn_ids(self, turn: Turn, message: Message) -> TurnIds | None:
        policy = self.policy
        if turn.stop == "missing" and policy.missing_stop == "error" and turn.outcome == "reachable":
            return None
        if turn.outcome == "reachable":
            return turn_ids(self.loaded.tokens, turn)
        if turn.outcome == "altered" and policy.altered == "keep":
            return turn_ids(self.loaded.tokens, turn)
        if turn.outcome == "off_prompt" and policy.off_prompt == "keep" and turn.target:
            return turn_ids(self.loaded.tokens, turn)
        if turn.outcome == "off_prompt" and policy.off_prompt == "splice":
            return turn_ids(self.loaded.tokens, self._spliced(turn, message), apart=True)
        return None

    def _spliced(self, turn: Turn, message: Message) -> Turn:
        """The turn with its target written by the user's own format after the prompt that inference holds."""
        inline, content = split_think(message.text)
        stop = (self.stops.call if message.tool_calls else self.stops.answer).text
        form = self.policy.splice_format
        try:
            body = form.format(reasoning_content=message.reasoning or inline or "", content=content, stop="")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise DataError(
                f"splice_format {form!r} does not format: {error}", hint="use {content}, {reasoning_content}, {stop}"
            ) from None
        spans = ((0, len(body), Reason.CONTENT), (len(body), len(body) + len(stop), Reason.STOP))
        kept = tuple(span for span in spans if span[1] > span[0])
        return replace(turn, prompt=turn.engine_prompt, target=body + stop, spans=kept)

    # -- problems --------------------------------------------------------------------------------------------------

    def _problem(self, turn: Turn) -> Problem | None:
        policy, i = self.policy, turn.index
        if turn.outcome == "off_prompt":
            remedy = "--off-prompt drop|keep|splice, or another --template-kwargs"
            return Problem("off_prompt", i, f"inference would not show this prompt before this answer: {turn.detail}",
                           remedy, policy.off_prompt == "error")
        if turn.outcome == "altered":
            return Problem("altered", i, f"the template changes this answer: {turn.detail}",
                           "--altered drop|keep, or a template that keeps it", policy.altered == "error")
        if turn.outcome == "unrenderable":
            return Problem("unrenderable", i, f"the template cannot render this turn: {turn.detail}",
                           "--unrenderable drop, or mend the order of roles", policy.unrenderable == "error")
        if turn.stop == "missing":
            return Problem("missing_stop", i, "the answer is rendered without a stop",
                           "--missing-stop append", policy.missing_stop == "error")
        return None

    def _one_row_problem(self, turns: Sequence[int]) -> Problem:
        names = ", ".join(f"messages[{i}]" for i in turns)
        return Problem(
            "one_row", turns[0], f"one row cannot hold these turns as inference shows them: {names}",
            "--row-format auto, or --unlawful keep", self.policy.unlawful == "error",
        )

    def control_problems(self, conversation: Conversation) -> list[Problem]:
        policy = self.policy.control_tokens
        remedy = "remove it, or encode it: --control-tokens literal as text, --control-tokens parity as one"
        if policy == "literal":
            remedy = "nothing to do: it is encoded as ordinary text"
        found = self._controls.found(conversation, self._forms["arguments"])
        told = "the text holds the control token {0.text!r} in {0.place}"
        return [Problem("control_tokens", one.message, told.format(one), remedy, policy == "reject") for one in found]


def _attempted(examine: Callable[[Conversation], Encoding], conversation: Conversation) -> Encoding | ChatlossError:
    try:
        return examine(conversation)
    except ChatlossError as error:
        return error


def _is_inner(text: str) -> bool:
    """Tags inside an answer are no control tokens, even where a tokenizer lists them as special."""
    return any(word in text.lower() for word in ("think", "tool_call", "tool_response"))


def _restored(encoding: Encoding, typed: Typed) -> Encoding:
    """What was found out with sentinels, told with what was typed."""
    back = typed.restored
    turns = tuple(
        replace(turn, prompt=back(turn.prompt), target=back(turn.target), detail=back(turn.detail),
                engine_prompt=back(turn.engine_prompt)) for turn in encoding.turns)
    problems = tuple(replace(problem, detail=back(problem.detail)) for problem in encoding.problems)
    return replace(encoding, problems=problems, turns=turns)
