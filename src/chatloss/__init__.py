"""chatloss turns chat data into exactly the training signal you asked for, and shows and proves it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatloss.chat import Conversation, Message
    from chatloss.encode import ChatEncoder
    from chatloss.errors import ChatlossError
    from chatloss.policy import Policy
    from chatloss.reader import read
    from chatloss.sample import Reason, Sample

__version__ = "0.1.0"
__all__ = ["ChatEncoder", "ChatlossError", "Conversation", "Message", "Policy", "Reason", "Sample", "read"]

_HOMES = {
    "ChatEncoder": "chatloss.encode",
    "ChatlossError": "chatloss.errors",
    "Conversation": "chatloss.chat",
    "Message": "chatloss.chat",
    "Policy": "chatloss.policy",
    "Reason": "chatloss.sample",
    "Sample": "chatloss.sample",
    "read": "chatloss.reader",
}


def __getattr__(name: str) -> Any:
    # Names are imported when first used, so that `import chatloss` costs next to nothing.
    if name not in _HOMES:
        raise AttributeError(f"module 'chatloss' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
