"""Plain quantization-aware training: one pass and the base optimizer's step; the baseline of the others."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.training.minimizers.base import Chunk, Passes, accumulate, agree


class QAT:
    """Descends on the loss at the quantized weights."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.model = model
        self.base = base

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """One update."""
        return self.update(self.gradients(chunks))

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        """Gradients of the chunks add up by their shares."""
        self.base.zero_grad()
        return Passes(torch.stack([accumulate(chunk) for chunk in chunks]).sum(), [], [])

    def update(self, passes: Passes) -> Tensor:
        """The base optimizer's step."""
        loss = agree(self.model, self.base, passes).loss
        self.base.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Empty: there is no state but the base optimizer's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Does nothing."""
