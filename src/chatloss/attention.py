"""Attention over packs at the cost of their documents: one causal product per document instead of one over the pack."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["NAME", "attend_by_document", "blocks_of", "use_blocks"]

NAME = "chatloss_blocks"

Block = tuple[int, int, int, bool]  # row of the batch, start, end, whether plain causal attention is all it needs

# A model makes one mask per forward pass (or one per kind of layer) and hands it to every layer.
_BLOCKS: WeakIdKeyDictionary = WeakIdKeyDictionary()


def blocks_of(mask: Tensor) -> list[Block]:
    """The diagonal blocks of a boolean mask [B, 1, T, T] (True: may attend) outside which nothing may attend.

    A block begins where a position may not attend to the one before it. If anything outside the blocks may attend after
    all, every row of the batch is one block. O(B T^2) once per mask.

    >>> mask = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril().bool()[None, None]
    >>> blocks_of(mask)
    [(0, 0, 2, True), (0, 2, 5, True)]
    """
    found: list[Block] | None = _BLOCKS.get(mask)  # type: ignore[no-untyped-call]
    if found is not None:
        return found
    width = mask.shape[-1]
    found = []
    for b in range(mask.shape[0]):
        square = mask[b, 0]
        starts = [0, *((~square.diagonal(-1)).nonzero()[:, 0] + 1).tolist(), width]
        parts = list(pairwise(starts))
        insides = [square[start:end, start:end] for start, end in parts]
        if int(square.sum()) != sum(int(inside.sum()) for inside in insides):
            parts, insides = [(0, width)], [square]
        for (start, end), inside in zip(parts, insides, strict=True):
            causal = torch.ones_like(inside).tril_()
            found.append((b, start, end, bool((inside == causal).all())))
    _BLOCKS[mask] = found
    return found


def attend_by_document(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, document by document where the mask is made of documents.

    `query`, `key`, `value` [B, heads, T, D]; returns [B, T, heads, D]. The same numbers as one masked product over the
    whole pack, in ``sum n_i^2`` instead of ``(sum n_i)^2`` operations; and no number of one document can reach another.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as attend

    plain = (
        attention_mask is None or attention_mask.dtype != torch.bool or attention_mask.shape[1] != 1
        or attention_mask.shape[0] != query.shape[0] or query.shape[2] != key.shape[2]
        or attention_mask.shape[-2:] != (query.shape[2], key.shape[2]) or kwargs.get("position_bias") is not None
    )
    if plain or len(blocks := blocks_of(attention_mask)) == query.shape[0]:  # type: ignore[arg-type]
        out: tuple[Tensor, None] = attend(module, query, key, value, attention_mask, **kwargs)
        return out
    assert attention_mask is not None
    rows: list[list[Tensor]] = [[] for _ in range(query.shape[0])]
    for b, start, end, causal in blocks:
        at = (slice(b, b + 1), slice(None), slice(start, end))
        mask = None if causal else attention_mask[b : b + 1, :, start:end, start:end]
        rows[b].append(attend(module, query[at], key[at], value[at], mask, **kwargs)[0])
    return torch.cat([torch.cat(row, 1) for row in rows]), None


def use_blocks(model: Any) -> bool:
    """Makes a model that attends through SDPA do so document by document; False if it attends in another way."""
    if getattr(model.config, "_attn_implementation", None) != "sdpa":
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend_by_document)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    return True
