"""Initial clipping levels: least squared quantization error.

A coarse scan downwards from the level that clips nothing finds the basin, two finer scans around the best level find
its minimum, and a few fixed-point steps finish: with the codes q held, the best step is <x, q> / <q, q>, and neither
half of the iteration can raise the error (Lloyd, 1982). The finer scans are needed: from 5 bits on the error has many
local minima, and without them it stays up to 9 % above the best.
"""

import torch
from torch import Tensor

from saqcli.quant.grid import TINY, AnyGrid, codes_of, step_of

SCAN = tuple(0.88**k for k in range(28))  # fractions of the level that clips nothing: 1 down to 0.03
FINER = (
    0.88 ** (1 / 5),
    0.88 ** (1 / 25),
)  # ratios of the finer scans: four steps in both directions fill a gap
FINER_STEPS = 4
FIXED_POINT_STEPS = 4
EMPTY_FRACTION = 2.0**-26  # level of an all-zero channel, as a fraction of the tensor's largest magnitude


def best_level(x: Tensor, grid: AnyGrid, shape: tuple[int, ...] = ()) -> Tensor:
    """The clipping level of least squared error.

    Args:
        x: values to represent, any shape.
        grid: the codes.
        shape: of the result; must broadcast against ``x``, for example ``(C_out, 1, 1, 1)`` for one level per
            channel.

    Returns:
        Positive and finite, also where a channel is constant or all zero.
    """
    x = x.detach().float()
    floor = least_level(float(x.abs().max()), grid)
    widest = _widest(x, grid, shape).clamp_min(floor)
    level, error = widest, squared_error(x, widest, grid)
    for fraction in SCAN[1:]:
        level, error = _better(x, grid, level, error, (widest * fraction).clamp_min(floor))
    for ratio in FINER:
        centre = level
        for k in (k for j in range(1, FINER_STEPS + 1) for k in (j, -j)):
            level, error = _better(x, grid, level, error, (centre * ratio**k).clamp_min(floor))
    for _ in range(FIXED_POINT_STEPS):
        codes = codes_of(x, step_of(level, grid), grid)
        numerator, denominator = reduce_to(x * codes, shape, "sum"), reduce_to(codes * codes, shape, "sum")
        proposal = torch.where(denominator > 0, numerator / denominator.clamp_min(TINY) * grid.highest, level)
        level, error = _better(x, grid, level, error, proposal.clamp_min(floor))
    return level


def squared_error(x: Tensor, level: Tensor, grid: AnyGrid) -> Tensor:
    """Sum of squared errors of quantizing ``x``, in the shape of ``level``."""
    step = step_of(level, grid)
    return reduce_to((codes_of(x, step, grid) * step - x).square_(), tuple(level.shape), "sum")


def noise_to_signal(x: Tensor, level: Tensor, grid: AnyGrid) -> float:
    """Squared error relative to the power of ``x``; 0 for an all-zero tensor."""
    x = x.detach().float()
    power = float(x.double().square().sum())
    return float(squared_error(x, level, grid).double().sum()) / power if power > 0 else 0.0


def least_level(largest: float, grid: AnyGrid) -> float:
    """The smallest level allowed for a channel: negligible compared with the others, and never 0."""
    if largest > 0:
        return max(largest * EMPTY_FRACTION, torch.finfo(torch.float32).tiny)
    return 1.0 if grid.has_zero else EMPTY_FRACTION  # a grid without zero is near it only at a tiny step


def _widest(x: Tensor, grid: AnyGrid, shape: tuple[int, ...]) -> Tensor:
    """The smallest level that clips nothing; a grid may reach further below zero than above."""
    above = reduce_to(x, shape, "amax")
    if grid.lowest == 0:
        return above
    return torch.maximum(above, reduce_to(-x, shape, "amax") * (grid.highest / -grid.lowest))


def _better(
    x: Tensor, grid: AnyGrid, level: Tensor, error: Tensor, proposal: Tensor
) -> tuple[Tensor, Tensor]:
    """The level with the smaller error, channel by channel, and that error."""
    candidate = squared_error(x, proposal, grid)
    improves = candidate < error
    return torch.where(improves, proposal, level), torch.where(improves, candidate, error)


def reduce_to(x: Tensor, shape: tuple[int, ...], how: str) -> Tensor:
    """``x`` reduced to ``shape`` by sum or maximum."""
    dims = [d for d in range(x.dim()) if not shape or shape[d] == 1]
    reduced: Tensor = getattr(x, how)(dim=dims, keepdim=bool(shape)) if dims else x
    return reduced
