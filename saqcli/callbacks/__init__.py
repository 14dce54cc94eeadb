"""Sharpness-aware steps in the loops of others: Lightning, and the Trainer of Hugging Face.

A loop that is your own needs nothing from here: ``saqcli.SAQ(model, optimizer).step(closure)``. These classes are for
loops that call the forward pass, the backward pass and the optimizer themselves. Each overrides public hooks of its
library only, and gives the same weights as a loop of your own, bit for bit. The names load on first use; the libraries
are imported by your program, not here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saqcli.callbacks.lightning import SAQLightningMixin as SAQLightningMixin
    from saqcli.callbacks.transformers import SAQTrainerMixin as SAQTrainerMixin

_PUBLIC = {
    "SAQLightningMixin": "saqcli.callbacks.lightning",
    "SAQTrainerMixin": "saqcli.callbacks.transformers",
}

__all__ = ["SAQLightningMixin", "SAQTrainerMixin"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'saqcli.callbacks' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
