"""Plain quantization-aware training: one pass, the base optimizer's step. What the others are compared with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saqcli.algorithms.divergence import check_step

if TYPE_CHECKING:
    from saqcli.algorithms.minimizers import Chunk


class QAT:
    """Descends on the loss at the quantized weights."""

    def __init__(self, model: nn.Module, base: torch.optim.Optimizer) -> None:
        self.base = base

    def step(self, chunks: Sequence["Chunk"]) -> Tensor:
        """One update; gradients of the chunks add up by their shares."""
        self.base.zero_grad()
        losses = []
        for chunk in chunks:
            loss = chunk.loss() * chunk.share
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        total = torch.stack(losses).sum()
        check_step(total)
        self.base.step()
        return total
