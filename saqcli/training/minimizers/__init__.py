"""Minimizers, one optimization step each, over any torch optimizer.

A minimizer receives the model and the base optimizer, then a list of chunks per step. To add one, write
``saqcli/training/minimizers/NAME.py`` and add its line here. The contract tests run over the table.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from saqcli.plugins import Plugins
from saqcli.training.minimizers.base import Chunk, MicroBatch, Passes
from saqcli.training.minimizers.qat import QAT
from saqcli.training.minimizers.sharpness_aware import ASAQ, SAM, SAQ, Case1


class Minimizer(Protocol):
    """Moves the weights once per call."""

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """``gradients`` and ``update`` over all chunks; returns the mean loss at the unperturbed weights."""

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        """All passes over the images: fills the gradients of the parameters, changes neither weights nor state."""

    def update(self, passes: Passes) -> Tensor:
        """Update the weights by the mean of these passes over all ranks; returns the mean loss.

        Raises:
            TrainingDiverged: the loss or a gradient is NaN or infinite; nothing was changed.
        """

    def state_dict(self) -> dict[str, Any]:
        """State in addition to that of the base optimizer; tensors and plain values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``: the following steps are the same."""


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no minimizer, or None."""
    missing = [name for name in ("step", "gradients", "update", "state_dict") if not hasattr(plugin, name)]
    return f"it has no {missing[0]}" if missing else None


_OURS: dict[str, Callable[..., Minimizer]] = {
    "qat": QAT,
    "sam": SAM,
    "case1": Case1,
    "saq": SAQ,
    "asaq": ASAQ,
}
MINIMIZERS: Plugins[Callable[..., Minimizer]] = Plugins("minimizers", "method", _OURS, _problem)

__all__ = ["MINIMIZERS", "Chunk", "MicroBatch", "Minimizer", "Passes"]
