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
from chatloss.errors import DataError, TokenizerError
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
        rest = ", ".join(f"{n} {why}" for why, n in sorted(self.left_out.items()))
        return f"{self.masked} of {total} turns in {self.conversations} conversations are masked" + (
            f"; left out: {rest}" if rest else "")


def with_assistant_masks(tokenizer: Any, policy: Policy | None = None) -> Any:
    """A copy of a transformers tokenizer that masks exactly what the model must emit, under any unmodified template.

    Its ``apply_chat_template(..., return_assistant_tokens_mask=True)`` gives the ids it always gave and, in
    `assistant_masks`, a 1 for every token of a turn whose context and targets in this one row are those of inference.
    Other turns are left out, counted in `mask_counts` and logged once; where none remains `NothingMasked` is raised, a
    `ValueError`. `policy` says which turns and parts are trained. The class stays a subclass of the tokenizer's, and
    `save_pretrained` writes the original. Raises `TokenizerError` for what is no tokenizer or has no chat template.

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
    if isinstance(tokenizer, _AssistantMasks):
        state = dict(copy.deepcopy(tokenizer).__dict__)
        base = tokenizer._plain_class
    else:
        state, base = dict(copy.deepcopy(tokenizer).__dict__), type(tokenizer)
    state["_mask_policy"] = replace(policy or Policy(), row_format="per_turn", max_length=0)
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
        bound = inspect.signature(apply).bind(conversation, *args, **kwargs)
        if not bound.arguments.pop("return_assistant_tokens_mask", False):
            return apply(conversation, *args, **kwargs)
        if not (bound.arguments.get("tokenize", True) and bound.arguments.get("return_dict", True)):
            raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
        tensors = bound.arguments.pop("return_tensors", None)
        batched = not isinstance(conversation[0], Mapping)
        chats = [_parsed(chat, bound.arguments) for chat in (conversation if batched else [conversation])]
        encoder = self._encoder(bound.arguments.get("chat_template"))
        seen = [encoder.rendering(chat).messages for chat in chats]
        tools = chats[0].tools if chats else None
        bound.arguments |= {"conversation": seen if batched else seen[0], "tools": tools and list(tools)}
        out = apply(*bound.args, **bound.kwargs)
        rows = out["input_ids"] if batched else [out["input_ids"]]
        real = out.get("attention_mask", [[1] * len(row) for row in rows]) if batched else [
            out.get("attention_mask", [1] * len(rows[0]))]
        grows = not (batched or bound.arguments.get("padding") or bound.arguments.get("truncation"))
        masks = []
        for chat, row, mask in zip(chats, rows, real, strict=True):
            places = np.flatnonzero(mask)
            full = np.zeros(len(row), np.int64)
            found, more = self._mask(encoder, chat, np.asarray(row)[places], grows)
            full[places] = found[: len(places)]
            if len(more):  # the template leaves the last answer without its stop
                row.extend(more.tolist())
                mask.extend([1] * len(more))
                full = np.concatenate([full, found[len(places) :]])
            masks.append(full.tolist())
        out["assistant_masks"] = masks if batched else masks[0]
        if tensors is None:
            return out
        return out.convert_to_tensors(tensors, prepend_batch_axis=not batched)

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

    def _mask(self, encoder: ChatEncoder, chat: Conversation, ids: Any, grows: bool) -> tuple[Any, Any]:
        """(mask of `ids` and what stands behind them, the ids of a stop to be appended)."""
        work = _WORK.setdefault(self, _Work())
        encoding = encoder.examine(chat)
        left_out = Counter(why for why in encoding.untrained.values() if why != "switched_off")
        mask: Any = np.zeros(len(ids), np.int64)
        more: Any = np.zeros(0, np.int64)
        masked = 0
        for row in encoding.rows:
            weights = row.weights
            end = int(np.flatnonzero(weights)[-1]) + 1
            if not np.isin(weights, (0, 1)).all():
                raise DataError(
                    "a mask cannot hold weights other than 0 and 1", where=row.source, kind="weights",
                    hint="train with chatloss.hf.dataset and ExactLoss, which carry them",
                )
            target = row.input_ids[:end]
            if len(target) <= len(ids) and np.array_equal(ids[:end], target):
                mask[:end] |= weights[:end] != 0
            elif grows and len(target) > len(ids) and np.array_equal(target[: len(ids)], ids):
                more = target[len(ids) :]
                mask = np.concatenate([mask | (weights[: len(ids)] != 0), np.ones(len(more), np.int64)])
                ids = target
            else:
                shorter = len(target) > len(ids) and np.array_equal(target[: len(ids)], ids)
                left_out["cut" if shorter else "split"] += 1
                continue
            masked += 1
        if not masked:
            raise _nothing(chat, left_out)
        work.counts.conversations += 1
        work.counts.masked += masked
        work.counts.left_out += left_out
        work.counts.stops_appended += bool(len(more))
        if left_out and not work.told:
            work.told = True
            logger.warning(
                "one row cannot hold every turn of a conversation as inference shows it: %s (told once; mask_counts "
                "has the sums, and rows from chatloss.hf.dataset train every turn)",
                ", ".join(f"{n} {why}" for why, n in left_out.items()),
            )
        return mask, more


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


def _nothing(chat: Conversation, left_out: Mapping[str, int]) -> NothingMasked:
    why = ", ".join(f"{n} {name}" for name, n in left_out.items()) or "no turn is trained"
    return NothingMasked(
        f"no turn of this conversation can be masked in one row ({why})", where=chat.source, kind="nothing masked",
        hint="`chatloss view` shows why; rows from chatloss.hf.dataset train split turns too",
    )


@cache
def _class_of(base: Any) -> Any:
    # The name stays: transformers writes it into tokenizer_config.json.
    return type(base.__name__, (_AssistantMasks, base), {"_plain_class": base, "__module__": __name__})


def _rebuilt(base: Any, state: Mapping[str, Any]) -> Any:
    made = object.__new__(_class_of(base))
    made.__dict__.update(state)
    return made
