"""A transformers tokenizer whose assistant mask is right for any template: what TRL's assistant_only_loss asks for."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from chatloss.chat import Conversation
from chatloss.encode import ChatEncoder
from chatloss.errors import DataError, RecipeError, TokenizerError
from chatloss.load import load_tokenizer
from chatloss.policy import Policy

__all__ = ["MaskCounts", "NothingMasked", "with_assistant_masks"]

logger = logging.getLogger(__name__)

# TRL looks for generation tags in a template's text and, where it finds none, replaces or refuses the template. This
# comment says in its terms that the mask is there. It renders to nothing: "+" keeps the newline behind a comment.
MARK = "{# {% generation %}: the assistant mask is made by chatloss from the template below +#}"


class NothingMasked(DataError, ValueError):
    """No turn of a conversation can be trained in the one row that its rendering is."""


@dataclass
class MaskCounts:
    """What `with_assistant_masks` did so far, in this process: turns that its masks hold, and why others are left out.

    `left_out` counts by outcome ("split": lawful in a row of its own only; "off_prompt", "altered", "unrenderable",
    "control_tokens", "cut": truncation took it). `stops_appended` counts conversations whose template ends the last
    answer without a stop. TRL's probe of three messages is counted like any conversation.
    """

    conversations: int = 0
    masked: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    stops_appended: int = 0

    def __str__(self) -> str:
        """One line for people.

        >>> print(MaskCounts(2, 3, Counter(split=1)))
        3 of 4 turns in 2 conversations are masked; left out: 1 split
        """
        total = self.masked + self.left_out.total()
        rest = _listed(self.left_out)
        return f"{self.masked} of {total} turns in {self.conversations} conversations are masked" + (
            f"; left out: {rest}" if rest else "")


def with_assistant_masks(tokenizer: Any, policy: Policy | None = None) -> Any:
    """A copy of a transformers tokenizer that masks exactly what the model must emit, under any unmodified template.

    Its ``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives the ids it always gave and, in
    `assistant_masks`, a 1 for every token of a turn whose context and targets in this one row are those of inference.
    Other turns are left out, counted in `mask_counts` and logged once; where none remains `NothingMasked` is raised, a
    `ValueError`. `policy` says which turns and parts are trained. The class stays a subclass of the tokenizer's, and
    `save_pretrained` writes the original. Raises `TokenizerError` for what is no tokenizer or has no chat template, and
    `RecipeError` for a policy with a `max_length`.

    >>> import transformers
    >>> from chatloss.demo import tokenizer_directory
    >>> tokenizer = with_assistant_masks(transformers.AutoTokenizer.from_pretrained(tokenizer_directory()))
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> row = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True)
    >>> tokenizer.decode([i for i, masked in zip(row["input_ids"], row["assistant_masks"]) if masked])
    'Hello!<|im_end|>'
    """
    import transformers

    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise TokenizerError(
            f"a {type(tokenizer).__name__} is no transformers tokenizer", hint="of a processor, give its .tokenizer"
        )
    if not tokenizer.chat_template:
        raise TokenizerError("the tokenizer has no chat template", hint="set tokenizer.chat_template first")
    base = tokenizer._plain_class if isinstance(tokenizer, _AssistantMasks) else type(tokenizer)
    state = dict(copy.deepcopy(tokenizer).__dict__)
    if policy is not None and policy.max_length:
        raise RecipeError("a mask cuts nothing", where="max_length", hint="give max_length to the trainer")
    state["_mask_policy"] = replace(policy or Policy(), row_format="per_turn")
    return _rebuilt(base, state)


@dataclass
class _Work:
    """What belongs to a tokenizer in this process and not into its pickles."""

    counts: MaskCounts = field(default_factory=MaskCounts)
    encoders: dict[Any, ChatEncoder] = field(default_factory=dict)
    told: bool = False


_WORK: WeakKeyDictionary[Any, _Work] = WeakKeyDictionary()


class _AssistantMasks:
    """Comes before a tokenizer class. The instance's own attributes are those of a plain tokenizer, and its policy."""

    _plain_class: Any

    @property
    def mask_counts(self) -> MaskCounts:
        return _WORK.setdefault(self, _Work()).counts

    @property
    def chat_template(self) -> Any:
        plain = self.__dict__.get("chat_template")
        if isinstance(plain, dict):
            return {name: MARK + text if name == "default" else text for name, text in plain.items()}
        return plain and MARK + plain

    @chat_template.setter
    def chat_template(self, value: Any) -> None:
        if isinstance(value, dict):
            self.__dict__["chat_template"] = {name: text.removeprefix(MARK) for name, text in value.items()}
        else:
            self.__dict__["chat_template"] = value and value.removeprefix(MARK)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        plain = object.__new__(self._plain_class)
        plain.__dict__.update({name: value for name, value in self.__dict__.items() if name != "_mask_policy"})
        return plain.save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self._plain_class, self.__dict__)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        apply: Any = super().apply_chat_template  # type: ignore[misc]
        call = inspect.signature(apply).bind(conversation, *args, **kwargs)
        if not call.arguments.pop("return_assistant_tokens_mask", False):
            return apply(conversation, *args, **kwargs)
        if not (call.arguments.get("tokenize", True) and call.arguments.get("return_dict", True)):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        batched = not isinstance(conversation[0], Mapping)
        chats = [_parsed(chat, call.arguments) for chat in (conversation if batched else [conversation])]
        encoder = self._encoder(call.arguments.get("chat_template"))
        seen = [encoder.rendering(chat).messages for chat in chats]
        tensors = call.arguments.pop("return_tensors", None)
        call.arguments |= {"conversation": seen if batched else seen[0], "tools": chats[0].tools and [*chats[0].tools]}
        out = apply(*call.args, **call.kwargs)
        # Only a list of its own can take in a stop that the template leaves away.
        grows = not (batched or call.arguments.get("padding") or call.arguments.get("truncation"))
        rows = _rows(out, "input_ids", batched)
        attention = _rows(out, "attention_mask", batched) or [[1] * len(row) for row in rows]
        masks = []
        for chat, row, real in zip(chats, rows, attention, strict=True):
            places = np.flatnonzero(real)
            found = self._held(encoder, chat, np.asarray(row)[places], grows)
            mask = np.zeros(len(row) + len(found.stop), np.int64)
            mask[[*places, *range(len(row), len(mask))]] = found.mask
            row.extend(found.stop)
            real.extend([1] * len(found.stop))
            masks.append(mask.tolist())
        out["assistant_masks"] = masks if batched else masks[0]
        return out if tensors is None else out.convert_to_tensors(tensors, prepend_batch_axis=not batched)

    def _encoder(self, chat_template: Any) -> ChatEncoder:
        """The encoder for the tokenizer's own template, or the one that the call names or gives."""
        plain = self.__dict__["chat_template"]
        if isinstance(plain, dict) and chat_template is not None:
            plain = plain.get(chat_template, chat_template)
        elif chat_template is not None:
            plain = chat_template.removeprefix(MARK)
        encoders = _WORK.setdefault(self, _Work()).encoders
        key = (str(plain), len(self))  # type: ignore[arg-type]
        if key not in encoders:
            from transformers.utils import chat_template_utils as theirs

            encoders[key] = ChatEncoder.load(
                load_tokenizer(self), plain, self._mask_policy,  # type: ignore[attr-defined]
                clock=lambda: theirs.datetime.now(),  # one clock for both, where a template writes the date
            )
        return encoders[key]

    def _held(self, encoder: ChatEncoder, chat: Conversation, ids: Any, grows: bool) -> _Held:
        found = _hold(encoder, chat, ids, grows)
        work = _WORK.setdefault(self, _Work())
        work.counts.conversations += 1
        work.counts.masked += found.turns
        work.counts.left_out += found.left_out
        work.counts.stops_appended += bool(found.stop)
        if found.left_out and not work.told:
            work.told = True
            logger.warning(
                "one row cannot hold every turn of a conversation as inference shows it: %s (told once; mask_counts "
                "has the sums, and rows from chatloss.hf.dataset train every turn)", _listed(found.left_out),
            )
        return found


@dataclass(frozen=True, slots=True)
class _Held:
    """What one row holds: the mask of its ids and of the stop behind them, how many turns, and why not the others."""

    mask: Any
    stop: list[int]
    turns: int
    left_out: Counter[str]


def _hold(encoder: ChatEncoder, chat: Conversation, ids: Any, grows: bool) -> _Held:
    """The turns whose context and targets `ids` begin with. `grows`: a last stop that is missing may be appended."""
    encoding = encoder.examine(chat)
    left_out = Counter(why for why in encoding.untrained.values() if why != "switched_off")
    mask, given, turns = np.zeros(len(ids), bool), len(ids), 0
    for row in encoding.rows:
        trained = row.weights != 0
        if not np.isin(row.weights, (0, 1)).all():
            raise DataError(
                "a mask cannot hold weights other than 0 and 1", where=row.source, kind="weights",
                hint="train with chatloss.hf.dataset and ExactLoss, which carry them",
            )
        end = int(np.flatnonzero(trained)[-1]) + 1
        longer, begins = end - len(ids), np.array_equal(ids[:end], row.input_ids[: len(ids)][:end])
        if begins and longer > 0 and grows:
            ids, mask = row.input_ids[:end], np.concatenate([mask, np.zeros(longer, bool)])
        if begins and (longer <= 0 or grows):
            mask[:end] |= trained[:end]
            turns += 1
        else:
            left_out["cut" if begins else "split"] += 1
    if not turns:
        raise NothingMasked(
            f"no turn of this conversation can be masked in one row ({_listed(left_out) or 'no turn is trained'})",
            where=chat.source, kind="nothing masked",
            hint="`chatloss view` shows why; rows from chatloss.hf.dataset train split turns too",
        )
    return _Held(mask, [int(i) for i in ids[given:]], turns, left_out)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {why}" for why, n in sorted(counts.items()))


def _rows(out: Any, name: str, batched: bool) -> list[list[int]]:
    """A column of a tokenizer's answer as lists, one per conversation; none where it has no such column."""
    if name not in out:
        return []
    return out[name] if batched else [out[name]]


def _parsed(chat: Any, arguments: Mapping[str, Any]) -> Conversation:
    """The conversation as our encoder takes it: functions among the tools become their schemas."""
    tools: Sequence[Any] | None = arguments.get("tools")
    if tools is not None:
        from transformers.utils import get_json_schema

        tools = [get_json_schema(tool) if callable(tool) else tool for tool in tools]
    more = dict(arguments.get("kwargs", {}))
    if arguments.get("documents") is not None:
        more["documents"] = arguments["documents"]
    messages = getattr(chat, "messages", chat)
    clean = [{k: v for k, v in message.items() if v is not None} for message in messages]
    return Conversation.from_messages(clean, tools, more)


@cache
def _class_of(base: Any) -> Any:
    # The name stays: transformers writes it into tokenizer_config.json.
    return type(base.__name__, (_AssistantMasks, base), {"_plain_class": base, "__module__": __name__})


def _rebuilt(base: Any, state: Mapping[str, Any]) -> Any:
    made = object.__new__(_class_of(base))
    made.__dict__.update(state)
    return made
