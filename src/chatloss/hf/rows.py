"""Rows for transformers and TRL: every row with the weights of its tokens and its share of the denominator."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chatloss.errors import DataError
from chatloss.reduction import ExampleWeights, Reduction
from chatloss.sample import Sample

__all__ = ["Collator", "dataset"]


def dataset(examples: Iterable[Sequence[Sample]], reduction: str = "token", weight_norm: str = "count") -> Any:
    """A `datasets.Dataset` of all rows that train something; `examples` are the rows of one conversation each.

    Columns: `input_ids` int32 [n]; `labels` int64 [n], -100 where not trained, for trainers without weights; `weights`
    float64 [n], ``u_t * w_t`` of the prediction of ``input_ids[t]``; `denominator` float64, the row's share of `Z`; and
    `source`. n of the reduction is counted over the whole conversation, whichever rows a step draws; a conversation's
    `Z` is shared among its rows by their trained tokens. Raises `RecipeError` for an unknown reduction.

    >>> import chatloss
    >>> from chatloss.demo import tokenizer_directory
    >>> encoder = chatloss.ChatEncoder.load(tokenizer_directory())
    >>> chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    >>> [row] = dataset([encoder.encode(chat)], reduction="turn")
    >>> sum(row["weights"]), row["denominator"]
    (1.0, 1.0)
    """
    import datasets

    chosen = Reduction.parse(reduction, weight_norm)
    columns: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weights", "denominator", "source")}
    for rows in examples:
        whole = chosen.of_example(rows)
        for row, weights, share in zip(rows, whole.weights, _shares(chosen, rows, whole), strict=True):
            if weights.any():
                columns["input_ids"].append(row.input_ids)
                columns["labels"].append(np.where(weights != 0, row.input_ids, -100).astype(np.int64))
                columns["weights"].append(weights)
                columns["denominator"].append(share)
                columns["source"].append(row.source)
    if not columns["source"]:
        raise DataError("no row trains anything", hint="look at the chats with `chatloss check`")
    return datasets.Dataset.from_dict(columns)


def _shares(reduction: Reduction, rows: Sequence[Sample], whole: ExampleWeights) -> list[float]:
    """What each row adds to `Z`; the sum is the example's."""
    if reduction.weight_norm == "weights":
        return [math.fsum(weights) for weights in whole.weights]
    if reduction.unit == "conversation":
        return [whole.denominator * int((weights != 0).sum()) / max(whole.tokens, 1) for weights in whole.weights]
    shares = [reduction.of_example([row]).denominator for row in rows]
    if not math.isclose(math.fsum(shares), whole.denominator, rel_tol=1e-9):
        raise DataError("a turn is trained in two rows", where=rows[0].source, hint="encode the chat with chatloss")
    return shares


@dataclass(frozen=True)
class Collator:
    """Rows of `dataset` -> one micro-batch of tensors for `ExactLoss` or `backward`.

    `input_ids` and `position_ids` int64 [B, T], `weights` float64 [B, T] (of the prediction of ``input_ids[t]``, not
    divided by anything) and `denominator` float64 [rows]. There is no attention mask: rows are padded at the right, or,
    with `packed`, laid end to end in one row [1, T] with positions from 0 in each. And there are no labels: a trainer
    that knows nothing of weights stops for want of a loss instead of training another one.

    >>> rows = [{"input_ids": [5, 6, 7], "weights": [0, 1, 1], "denominator": 2.0},
    ...         {"input_ids": [8, 9], "weights": [0, 1], "denominator": 1.0}]
    >>> Collator()(rows)["input_ids"].tolist(), Collator(packed=True)(rows)["position_ids"].tolist()
    ([[5, 6, 7], [8, 9, 0]], [[0, 1, 2, 0, 1]])
    """

    packed: bool = False
    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        parts = [_checked(row) for row in rows]
        lengths = [len(ids) for ids, _ in parts]
        if self.packed:
            ids, weights = (np.concatenate(values)[None] for values in zip(*parts, strict=True))
            positions = np.concatenate([np.arange(n) for n in lengths])[None]
        else:
            shape = len(parts), max(lengths)
            ids, weights = np.full(shape, self.pad_token_id, np.int64), np.zeros(shape)
            # Padding continues its row, so that no row looks packed to the model.
            positions = np.broadcast_to(np.arange(shape[1]), shape).copy()
            for b, (row_ids, row_weights) in enumerate(parts):
                ids[b, : lengths[b]], weights[b, : lengths[b]] = row_ids, row_weights
        denominator = np.asarray([row["denominator"] for row in rows], np.float64)
        return {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(positions),
                "weights": torch.from_numpy(weights), "denominator": torch.from_numpy(denominator)}


def _checked(row: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    missing = [name for name in ("input_ids", "weights", "denominator") if name not in row]
    if missing:
        raise DataError(
            f"a row has no {' and no '.join(missing)}", where=str(row.get("source", "")), kind="columns",
            hint="make rows with chatloss.hf.dataset, and the trainer from chatloss.hf.ExactLoss, which keeps them",
        )
    ids, weights = np.asarray(row["input_ids"], np.int64), np.asarray(row["weights"], np.float64)
    if len(ids) != len(weights):
        raise DataError(
            f"a row has {len(ids)} ids and {len(weights)} weights: something cut one of them",
            where=str(row.get("source", "")), kind="columns",
            hint="set max_length=None in SFTConfig and cut with Policy(max_length=...), whole turns at a time",
        )
    if weights[:1].any():
        raise DataError("position 0 has a weight, but nothing predicts it", where=str(row.get("source", "")))
    return ids, weights
