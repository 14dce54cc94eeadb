"""LSQ and LSQ+: quantizers with a learned step.

LSQ, for weights and inputs; LSQ+ uses it for weights:

    Q(x)   = s * clamp(round(x / s), lowest, highest)
    dL/dx  = G * inside
    dL/ds  = g * sum G * [ inside * (round(x / s) - x / s) + below * lowest + above * highest ]
    g      = 1 / sqrt(N * highest)              N values share the step: of a weight, or of the input for one image

Up to g this is the gradient of ``fake_quantize`` with the clipping level ``highest * s``. g balances the updates of
steps and weights: without it the gradient of a step, a sum over N values, is sqrt(N * highest) times too large relative
to the step (Esser et al., arXiv:1902.08153, section 2.2). On the grid of odd codes a step is the distance unit, half
the distance between two levels.

Source: Esser et al., arXiv:1902.08153, Eq. 1-3 and section 2.2. Differs from the paper:

- Steps start at the least squared error (``clip_init.best_level``) instead of 2 * mean|x| / sqrt(highest), so that a
  pretrained network keeps its function as well as the bits allow.
- Where each channel of a weight has a step, N counts the weights of a channel.
- Weights use the grid of the scheme, which may be that of odd codes.

LSQ+, for inputs: an asymmetric range from below to above zero, for GELU, SiLU and similar activations. A signed grid
would use half of its codes for negative values, though GELU never falls below -0.17. Step s and offset o are learned,
and the codes run from ``lowest`` to ``lowest + top``, ``top = 2**bits - 1``:

    lowest = clamp(round(o / s), -top, 0)               so that 0 is always a code
    Q(x)   = s * clamp(round(x / s), lowest, lowest + top)

    dL/dx  = G * inside
    dL/ds  = g * sum G * [ inside * (round(x / s) - x / s) + above * top ]
    dL/do  = g * sum G * [ below + above ]
    g      = 1 / sqrt(N * top)                          N values of the input for one image

Where ``round(o / s)`` is clamped, the ends are fixed codes: they add ``below * lowest + above * (lowest + top)`` to
dL/ds instead, and dL/do is zero unless a descent step would move o back.

Step and lowest code start at the least squared error (``clip_init.best_range``); rounding and gradients are computed in
``ranges``.

Source: Bhalgat et al., arXiv:2004.09576, Eq. 4-8. Differs from the paper:

- The offset is rounded to a multiple of the step and never above zero. Zero, and so the padding of a convolution, stays
  exact, and the offset is the integer zero point of ONNX.
- Step and offset start where a search finds the least squared error on calibration images; the paper minimizes the same
  error by gradient descent.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saqcli.quant.clip_init import best_level, best_range
from saqcli.quant.grid import TINY, AnyGrid, Grid, fake_quantize, full_precision, step_of
from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.quantizers.ranges import lowest_code, round_to_range, scale_gradient, values_per_image
from saqcli.quant.short_steps.rounding import short_level, short_step


class LearnedStep(Quantizer):
    """A quantizer with one trainable step per candidate.

    Attributes:
        step_size: trainable, ``(len(candidates), *shape)``, in units of the tensor; its sign does not matter.
    """

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        super().__init__(grids, shape)
        highest = torch.tensor([float(grid.highest) for grid in self.grids.values()])
        self.step_size = nn.Parameter(1 / highest.view(-1, *(1,) * len(shape)).expand(-1, *shape).clone())

    def level(self) -> Tensor:
        """The value of the highest code, differentiable."""
        highest = self.grid().highest
        return short_level(self.step_size[self._active] * highest, highest, self.step_bits)  # type: ignore[arg-type]

    def step(self) -> Tensor:
        """The active step, as the kernel computes it from the level."""
        return step_of(self.level(), self.grid())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid of the active step."""
        grid, level = self.grid(), self.level()
        scaled = scale_gradient(level, self.values_per_step(x), float(grid.highest))
        return fake_quantize(x, scaled, grid, self.kernel)

    def values_per_step(self, x: Tensor) -> float:
        """Number of values of ``x`` that share a step."""
        return x.numel() / max(1, self.level().numel())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Steps of least error on ``x``, for every candidate."""
        for row, grid in zip(self.step_size, self.grids.values(), strict=True):
            row.copy_(best_level(x, grid, self.shape, self.error_power) / grid.highest)


class LsqWeight(LearnedStep):
    """Weights: one step per output channel or per tensor."""


class LsqActivation(LearnedStep):
    """Inputs of a layer: one step."""

    def values_per_step(self, x: Tensor) -> float:
        """Number of values per image, as in the paper."""
        return values_per_image(x)


class LsqPlusWeight(LearnedStep):
    """Weights: one step per output channel or per tensor."""


class LsqPlusActivation(Quantizer):
    """Inputs of a layer: one step, one offset.

    Attributes:
        step_size: trainable, ``(len(candidates),)``, in units of the tensor; its sign does not matter.
        offset: trainable, ``(len(candidates),)``: the value of the lowest code, before it is rounded to a code.
    """

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        """Create with ``grids`` by bit-width, which set the number of codes and the lowest code before fitting."""
        super().__init__(grids, shape)
        steps = torch.tensor([1 / grid.highest for grid in self.grids.values()])
        lowest = torch.tensor([float(grid.lowest) for grid in self.grids.values()])
        self.step_size = nn.Parameter(steps)
        self.offset = nn.Parameter(steps * lowest)

    @property
    def top(self) -> int:
        """The highest code, counted from the lowest."""
        return self.grids[self.bits].levels - 1

    def step(self) -> Tensor:
        """The active step, differentiable."""
        return short_step(self.step_size[self._active].abs().clamp_min(TINY), self.step_bits)

    def largest_code(self) -> float:
        """The largest one that the offset allows."""
        return float(self.top)

    def grid(self) -> Grid:
        """The active codes, which follow from step and offset."""
        lowest = int(lowest_code(self.step(), self.offset[self._active], self.top))
        return Grid(lowest, lowest + self.top, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the learned range and rounded."""
        x = full_precision(x)
        step = scale_gradient(self.step(), values_per_image(x), self.top)
        offset = scale_gradient(self.offset[self._active], values_per_image(x), self.top)
        return round_to_range(x, step, offset, self.top, self.kernel)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Step and offset of least error on ``x``, for every candidate."""
        for k, grid in enumerate(self.grids.values()):
            step, lowest = best_range(x.detach().float(), grid.levels - 1, self.error_power)
            self.step_size[k], self.offset[k] = step, lowest * step
