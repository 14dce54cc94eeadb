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

Step and lowest code start at the least squared error: a coarse scan takes fractions of the smallest and of the largest
value for the two ends; finer scans of the step, with the lowest code and its neighbours, and a few fixed-point steps
finish. With the codes held, the best step is <x, q> / <q, q> (Lloyd, 1982).

Source: Bhalgat et al., arXiv:2004.09576, Eq. 4-8. Differs from the paper:

- The offset is rounded to a multiple of the step and never above zero. Zero, and so the padding of a convolution, stays
  exact, and the offset is the integer zero point of ONNX.
- Step and offset start where a search finds the least squared error on calibration images; the paper minimizes the same
  error by gradient descent.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.clip_init import best_level
from saqcli.quant.grid import TINY, AnyGrid, Grid, between, fake_quantize, full_precision, step_of
from saqcli.quant.kernels.choice import KernelKind, backward_kernels_for, kernels_for
from saqcli.quant.kernels.layout import OFFSET
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


def scale_gradient(parameter: Tensor, count: float, highest: float) -> Tensor:
    """``parameter`` with its gradient scaled by 1 / sqrt(count * highest); ``count`` values share an element of it."""
    return _ScaleGradient.apply(parameter, max(1.0, count * highest) ** -0.5)  # type: ignore[no-any-return]


def values_per_image(x: Tensor) -> float:
    """Number of values of ``x``, (N, ...), per image: the batch size must not change a gradient."""
    return x.numel() / max(1, len(x))


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
        return self.step_size[self._active] * self.grid().highest

    def step(self) -> Tensor:
        """The active step, as the kernel computes it from the level."""
        return step_of(self.level(), self.grid())

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the grid of the active step."""
        grid, level = self.grid(), self.level()
        scaled = scale_gradient(level, self.values_per_step(x), grid.highest)
        return fake_quantize(x, scaled, grid, self.kernel)

    def values_per_step(self, x: Tensor) -> float:
        """Number of values of ``x`` that share a step."""
        return x.numel() / max(1, self.level().numel())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Steps of least squared error on ``x``, for every candidate."""
        for row, grid in zip(self.step_size, self.grids.values(), strict=True):
            row.copy_(best_level(x, grid, self.shape) / grid.highest)


class LsqWeight(LearnedStep):
    """Weights: one step per output channel or per tensor."""


class LsqActivation(LearnedStep):
    """Inputs of a layer: one step."""

    def values_per_step(self, x: Tensor) -> float:
        """Number of values per image, as in the paper."""
        return values_per_image(x)


FRACTIONS = tuple(0.8**k for k in range(16))  # of either end: 1 down to 0.035
FINER = (0.8 ** (1 / 5), 0.8 ** (1 / 25))  # ratios of the finer scans of the step
FINER_STEPS = 4
FIXED_POINT_STEPS = 4
COARSE_SAMPLES = 8192  # enough to find the basin


@torch.no_grad()
def best_range(x: Tensor, top: int) -> tuple[float, int]:
    """The step and the lowest of ``top + 1`` consecutive codes with the least squared error on ``x``.

    Args:
        x: values to represent, float32, any shape.
        top: number of codes minus one.

    Returns:
        ``(step, lowest)``, the step positive, ``-top <= lowest <= 0``.
    """
    x = x.flatten()
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    if low == high:
        return 1.0 / top, 0
    few = x[:: -(-x.numel() // COARSE_SAMPLES)]
    scanned = []
    for below in (low * fraction for fraction in (FRACTIONS if low < 0 else (1.0,))):
        for above in (high * fraction for fraction in (FRACTIONS if high > 0 else (1.0,))):
            step = (above - below) / top
            scanned.append((step, _code(below / step, top)))
    best = min(scanned, key=lambda one: _error(few, one[0], one[1], top))
    error = _error(x, best[0], best[1], top)
    for ratio in FINER:
        step, lowest = best
        for code in sorted({_code(code, top) for code in (lowest - 1, lowest, lowest + 1)}):
            for k in range(-FINER_STEPS, FINER_STEPS + 1):
                found = _error(x, step * ratio**k, code, top)
                if found < error:
                    best, error = (step * ratio**k, code), found
    for _ in range(FIXED_POINT_STEPS):
        step, lowest = best
        codes = (x / step).round_().clamp_(lowest, lowest + top)
        power, product = float(codes.square().sum()), float((x * codes).sum())
        if power > 0 and product > 0 and _error(x, product / power, lowest, top) < error:
            best = product / power, lowest
            error = _error(x, product / power, lowest, top)
    return best


def _code(value: float, top: int) -> int:
    return min(0, max(-top, round(value)))


def _error(x: Tensor, step: float, lowest: int, top: int) -> float:
    """Sum of squared errors."""
    return float(((x / step).round_().clamp_(lowest, lowest + top).mul_(step) - x).square_().sum())


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
        return self.step_size[self._active].abs().clamp_min(TINY)

    def grid(self) -> Grid:
        """The active codes, which follow from step and offset."""
        lowest = int(_lowest(self.step(), self.offset[self._active], self.top))
        return Grid(lowest, lowest + self.top, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the learned range and rounded."""
        x = full_precision(x)
        step = scale_gradient(self.step(), values_per_image(x), self.top)
        offset = scale_gradient(self.offset[self._active], values_per_image(x), self.top)
        return _Asymmetric.apply(x, step, offset, self.top, self.kernel)  # type: ignore[no-any-return]

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Step and offset of least squared error on ``x``, for every candidate."""
        for k, grid in enumerate(self.grids.values()):
            step, lowest = best_range(x.detach().float(), grid.levels - 1)
            self.step_size[k], self.offset[k] = step, lowest * step


def _lowest(step: Tensor, offset: Tensor, top: int) -> Tensor:
    return (offset / step).round().clamp(-top, 0)


class _Asymmetric(torch.autograd.Function):
    """Q(x) and the gradients in the module's docstring, without g; ``step`` is positive, both are scalars."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, offset: Tensor, top: int, kind: KernelKind) -> Tensor:
        ctx.top, ctx.kind = top, kind
        if kernels := kernels_for(kind, x, step):
            ctx.save_for_backward(x, step, offset)
            ctx.requantize = lambda x, step, offset: _Asymmetric.apply(x, step, offset, top, kind)
            return kernels.forward(x, step, offset, codes=Grid(0, top, 1))
        lowest = _lowest(step, offset, top)
        quantized = (x / step).round_().clamp_(lowest, lowest + top).mul_(step)
        ctx.save_for_backward(x, step, offset, quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (grad,) = grads
        x, step, offset, *saved = ctx.saved_tensors
        top: int = ctx.top
        lowest = _lowest(step, offset, top)
        wanted = (offset / step).round()
        if not saved and (kernels := backward_kernels_for(ctx.kind, x, step)):
            codes = Grid(0, top, 1)
            grad_x, (residual, under, over) = kernels.backward(
                grad, x, step, offset, codes=codes, kind=OFFSET
            )
        else:
            quantized = saved[0] if saved else _Asymmetric.apply(x, step, offset, top, "eager")
            low, high = step * lowest, step * (lowest + top)
            below, above, inside = x < low, x > high, between(x.detach(), low, high)
            under, over = (grad * below).sum(), (grad * above).sum()
            residual = (grad * inside * (quantized - x)).sum()
            grad_x = grad * inside
        ends = torch.where(wanted == lowest, over * top, under * lowest + over * (lowest + top))
        grad_step = residual / step + ends
        outside = under + over
        # Descent moves against the gradient: an offset clamped at zero needs a positive one to move back.
        stuck = ((wanted > 0) & (outside < 0)) | ((wanted < -top) & (outside > 0))
        return grad_x, grad_step, torch.where(stuck, 0, outside), None, None
