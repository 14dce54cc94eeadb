"""Plain quantization-aware training: one pass, the base optimizer's step. What the others are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.algorithms.divergence import check_step
from saqcli.algorithms.minimizers.batches import Chunk, accumulate


class QAT:
    """Descends on the loss at the quantized weights."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.base = base

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """One update; gradients of the chunks add up by their shares."""
        self.base.zero_grad()
        total = torch.stack([accumulate(chunk) for chunk in chunks]).sum()
        check_step(total)
        self.base.step()
        return total

    def state_dict(self) -> dict[str, Any]:
        """Nothing beside the base optimizer's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""
