"""The same masks and the same exact loss inside transformers.Trainer, TRL and accelerate.

- `dataset` and `Collator`: rows with a weight for every token and a share of the step's denominator;
- `ExactLoss`, `ExactTrainer`: the loss of those rows in a Trainer (any subclass of it, TRL's SFTTrainer too);
- `windows`, `backward`: the same in a loop of one's own with accelerate;
- `with_assistant_masks`: a tokenizer whose assistant mask is right for any unmodified template;
- `verify`: the gradient of anybody's Trainer beside the definition.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatloss.hf.exact import ExactLoss, ExactTrainer, backward, windows
    from chatloss.hf.masks import with_assistant_masks
    from chatloss.hf.proof import verify
    from chatloss.hf.rows import Collator, dataset

__all__ = ["Collator", "ExactLoss", "ExactTrainer", "backward", "dataset", "verify", "windows", "with_assistant_masks"]

_HOMES = {
    "Collator": "rows", "ExactLoss": "exact", "ExactTrainer": "exact", "backward": "exact", "dataset": "rows",
    "verify": "proof", "windows": "exact", "with_assistant_masks": "masks",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'chatloss.hf' has no attribute {name!r}")
    return getattr(import_module(f"chatloss.hf.{_HOMES[name]}"), name)
