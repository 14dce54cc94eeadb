"""The family of minimizers: one optimisation step each, ascent included, over any torch optimizer.

A minimizer is handed the model and the base optimizer, then one list of chunks a step. To add one: write
``saqcli/algorithms/minimizers/NAME.py`` and add its line here. The contract tests run over the table.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from saqcli.algorithms.minimizers.asaq import ASAQ
from saqcli.algorithms.minimizers.case1 import Case1
from saqcli.algorithms.minimizers.qat import QAT
from saqcli.algorithms.minimizers.sam import SAM
from saqcli.algorithms.minimizers.saq import SAQ


class Chunk(NamedTuple):
    """A part of the batch on which a perturbation is computed of its own.

    Attributes:
        loss: runs the forward pass on the chunk and returns its mean loss; may be called twice.
        share: of the batch's images; the shares of a step sum to 1.
    """

    loss: Callable[[], Tensor]
    share: float


class Minimizer(Protocol):
    """Moves the weights once per call. Keeps no state beside the base optimizer's."""

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """One update over all chunks; returns the mean loss at the unperturbed weights."""


MINIMIZERS: dict[str, Callable[..., Minimizer]] = {
    "qat": QAT,
    "sam": SAM,
    "case1": Case1,
    "saq": SAQ,
    "asaq": ASAQ,
}

__all__ = ["MINIMIZERS", "Chunk", "Minimizer"]
