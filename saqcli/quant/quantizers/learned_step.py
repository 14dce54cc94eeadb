"""What LSQ and LSQ+ share: a weight quantizer whose trainable number is its step.

    Q(w)   = s * clamp(round(w / s), lowest, highest)
    dL/dw  = G * inside
    dL/ds  = g * sum G * [ inside * (round(w / s) - w / s) + below * lowest + above * highest ]
    g      = 1 / sqrt(N * highest)              N numbers share the step

Up to g this is the kernel's gradient (``fake_quantize``) with the clipping level ``highest * s``. g makes a step
as steady as the weights: otherwise its gradient, a sum over N numbers, is sqrt(N * highest) times too large
beside its own size (Esser et al., arXiv:1902.08153, section 2.2).

On the paper's grid of odd codes a step is the distance unit, half the distance of two levels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.fake_quantize import fake_quantize, step_of
from saqcli.quant.grids import Grid
from saqcli.quant.levels import best_level
from saqcli.quant.quantizers.base import Quantizer


class _ScaleGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def scale_gradient(parameter: Tensor, count: float, highest: int) -> Tensor:
    """``parameter``, its gradient scaled by 1 / sqrt(count * highest); ``count`` numbers share one of its elements."""
    return _ScaleGradient.apply(parameter, max(1.0, count * highest) ** -0.5)  # type: ignore[no-any-return]


def features(x: Tensor) -> float:
    """Numbers of ``x``, (N, ...), that belong to one image: how images are batched must not change a gradient."""
    return x.numel() / max(1, len(x))


class LearnedStep(Quantizer):
    """A trainable step for each candidate.

    Attributes:
        step_size: trainable, ``(len(candidates), *shape)``, in units of the tensor; its sign does not matter.
    """

    def __init__(self, grids: Mapping[int, Grid], shape: tuple[int, ...] = ()) -> None:
        super().__init__(grids, shape)
        highest = torch.tensor([float(grid.highest) for grid in self.grids.values()])
        self.step_size = nn.Parameter(1 / highest.view(-1, *(1,) * len(shape)).expand(-1, *shape).clone())

    def level(self) -> Tensor:
        """The value of the highest code, differentiable."""
        return self.step_size[self._active] * self.grid().highest

    def step(self) -> Tensor:
        """The active step, as the kernel computes it from the level."""
        return step_of(self.level(), self.grid())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid of the active step."""
        grid, level = self.grid(), self.level()
        return fake_quantize(x, scale_gradient(level, self.sharing(x), grid.highest), grid)

    def sharing(self, x: Tensor) -> float:
        """How many numbers of ``x`` share a step."""
        return x.numel() / max(1, self.level().numel())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Steps of least squared error on ``x``, for every candidate."""
        for row, grid in zip(self.step_size, self.grids.values(), strict=True):
            row.copy_(best_level(x, grid, self.shape) / grid.highest)
