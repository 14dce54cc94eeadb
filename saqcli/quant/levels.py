"""Where clipping levels start: at the least squared error between a tensor and its quantized self.

A coarse scan over fractions of the largest magnitude finds the basin; a few fixed-point steps finish: with
the codes q held, the best step is <x, q> / <q, q>, and neither half of the iteration can raise the error
(Lloyd, 1982).
"""

import torch
from torch import Tensor

from saqcli.quant.fake_quantize import codes_of, step_of
from saqcli.quant.grids import Grid

SCAN = tuple(round(1.0 * 0.86**k, 4) for k in range(16))  # fractions of max |x|: 1 down to 0.10
FIXED_POINT_STEPS = 6
EMPTY_FRACTION = 2.0**-26  # level of an all-zero channel, as a fraction of the tensor's largest magnitude


def best_level(x: Tensor, grid: Grid, shape: tuple[int, ...] = ()) -> Tensor:
    """The clipping level of least squared error.

    Args:
        x: values to represent, any shape.
        grid: the codes.
        shape: of the result; must broadcast against ``x``, for instance ``(C_out, 1, 1, 1)`` for a level a
            channel.

    Returns:
        Positive and finite even where a channel is constant or all zero.
    """
    x = x.detach().float()
    largest = _reduce(x.abs(), shape, "amax")
    whole = largest.amax().item()
    floor = whole * EMPTY_FRACTION if whole > 0 else 1.0
    largest = largest.clamp_min(floor)
    level, error = largest, squared_error(x, largest, grid)
    for fraction in SCAN[1:]:
        level, error = _better(x, grid, level, error, largest * fraction)
    for _ in range(FIXED_POINT_STEPS):
        codes = codes_of(x, step_of(level, grid), grid)
        numerator, denominator = _reduce(x * codes, shape, "sum"), _reduce(codes * codes, shape, "sum")
        proposal = torch.where(denominator > 0, numerator / denominator.clamp_min(1) * grid.highest, level)
        level, error = _better(x, grid, level, error, proposal.clamp_min(floor))
    return level


def squared_error(x: Tensor, level: Tensor, grid: Grid) -> Tensor:
    """Sum of squared errors of quantizing ``x``, in the shape of ``level``."""
    step = step_of(level, grid)
    return _reduce((codes_of(x, step, grid) * step - x).square_(), tuple(level.shape), "sum")


def noise_to_signal(x: Tensor, level: Tensor, grid: Grid) -> float:
    """Squared error relative to the power of ``x``; 0 for an all-zero tensor."""
    x = x.detach().float()
    power = float(x.double().square().sum())
    return float(squared_error(x, level, grid).double().sum()) / power if power > 0 else 0.0


def _better(x: Tensor, grid: Grid, level: Tensor, error: Tensor, proposal: Tensor) -> tuple[Tensor, Tensor]:
    """Channel by channel, whichever of two levels errs less."""
    candidate = squared_error(x, proposal, grid)
    improves = candidate < error
    return torch.where(improves, proposal, level), torch.where(improves, candidate, error)


def _reduce(x: Tensor, shape: tuple[int, ...], how: str) -> Tensor:
    """``x`` reduced to ``shape`` by sum or maximum."""
    dims = [d for d in range(x.dim()) if not shape or shape[d] == 1]
    reduced: Tensor = getattr(x, how)(dim=dims, keepdim=bool(shape)) if dims else x
    return reduced
