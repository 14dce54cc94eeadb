"""Initial clipping levels and ranges: least quantization error, the sum of |e|**p over the values.

p is 2 by default. A larger one, such as the 2.4 of BRECQ (Li et al., arXiv:2102.05426, in the authors' code), weighs
large errors more, so that ranges are wider.

Levels: a coarse scan downwards from the level that clips nothing finds the basin, two finer scans around the best level
find its minimum, and a few fixed-point steps finish: with the codes q held, the best step at p = 2 is <x, q> / <q, q>
(Lloyd, 1982), and at another p the same with weights |e|**(p - 2) (``refined_step``). The finer scans are needed: from
5 bits on the error has many local minima, and without them it stays up to 9 % above the best. Every proposal is kept
only where it lowers the error. At p other than 2 the level for p = 2 is a proposal too, so that the result is never
worse.

Ranges: a step and the lowest of consecutive codes, 0 among them. Coarse scans take fractions of the smallest and of the
largest value for the two ends, finer ones move the step and the lowest code, and the same fixed-point steps finish.
"""

import torch
from torch import Tensor

from saqcli.quant.grid import TINY, AnyGrid, Grid, codes_of, step_of

SCAN = tuple(0.88**k for k in range(28))  # fractions of the level that clips nothing: 1 down to 0.03
FINER = (
    0.88 ** (1 / 5),
    0.88 ** (1 / 25),
)  # ratios of the finer scans: four steps in both directions fill a gap
FINER_STEPS = 4
FIXED_POINT_STEPS = 4
EMPTY_FRACTION = 2.0**-26  # level of an all-zero channel, as a fraction of the tensor's largest magnitude
SQUARED = 2.0  # exponent of the error by default


def best_level(x: Tensor, grid: AnyGrid, shape: tuple[int, ...] = (), power: float = SQUARED) -> Tensor:
    """The clipping level of least error.

    Args:
        x: values to represent, any shape.
        grid: the codes.
        shape: of the result; must broadcast against ``x``, for example ``(C_out, 1, 1, 1)`` for one level per
            channel.
        power: exponent p of the error, at least 1.

    Returns:
        Positive and finite, also where a channel is constant or all zero. Its error is not above that of the level for
        p = 2.
    """
    x = x.detach().float()
    floor = least_level(float(x.abs().max()), grid)
    widest = _widest(x, grid, shape).clamp_min(floor)
    level, error = widest, error_at(x, widest, grid, power)
    for fraction in SCAN[1:]:
        level, error = _better(x, grid, level, error, (widest * fraction).clamp_min(floor), power)
    for ratio in FINER:
        centre = level
        for k in (k for j in range(1, FINER_STEPS + 1) for k in (j, -j)):
            level, error = _better(x, grid, level, error, (centre * ratio**k).clamp_min(floor), power)
    for _ in range(FIXED_POINT_STEPS):
        step = step_of(level, grid)
        proposal = refined_step(x, codes_of(x, step, grid), step, shape, power)
        proposal = torch.where(proposal.isnan(), level, proposal * grid.highest)
        level, error = _better(x, grid, level, error, proposal.clamp_min(floor), power)
    if power != SQUARED:
        level, error = _better(x, grid, level, error, best_level(x, grid, shape), power)
    return level


def refined_step(
    x: Tensor, codes: Tensor, step: Tensor, shape: tuple[int, ...], power: float = SQUARED
) -> Tensor:
    """The step that fits fixed ``codes`` better than ``step``, in ``shape``; NaN where all codes are 0.

    At p = 2 it is the best one. At another p it is a step of iteratively reweighted least squares, above 2 shortened by
    1 / (p - 1), which makes it Newton's; keep it only where it lowers the error.
    """
    weighted = codes
    if power != SQUARED:
        error = (x - codes * step).abs_()
        largest = reduce_to(error, shape, "amax").clamp_min(torch.finfo(x.dtype).tiny)
        weighted = codes * (error / largest).clamp_min_(1e-6).pow_(power - 2)
    numerator, denominator = reduce_to(x * weighted, shape, "sum"), reduce_to(codes * weighted, shape, "sum")
    found = torch.where(denominator > 0, numerator / denominator.clamp_min(TINY), torch.nan)
    return found if power <= SQUARED else step + (found - step) / (power - 1)


def error_at(x: Tensor, level: Tensor, grid: AnyGrid, power: float = SQUARED) -> Tensor:
    """Sum of |e|**power of quantizing ``x``, in the shape of ``level``."""
    step = step_of(level, grid)
    return reduce_to(_raised((codes_of(x, step, grid) * step).sub_(x), power), tuple(level.shape), "sum")


def squared_error(x: Tensor, level: Tensor, grid: AnyGrid) -> Tensor:
    """Sum of squared errors of quantizing ``x``, in the shape of ``level``."""
    return error_at(x, level, grid)


def _raised(error: Tensor, power: float) -> Tensor:
    """|e|**power; ``error`` is overwritten."""
    return error.square_() if power == SQUARED else error.abs_().pow_(power)


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
    x: Tensor, grid: AnyGrid, level: Tensor, error: Tensor, proposal: Tensor, power: float
) -> tuple[Tensor, Tensor]:
    """The level with the smaller error, channel by channel, and that error."""
    candidate = error_at(x, proposal, grid, power)
    improves = candidate < error
    return torch.where(improves, proposal, level), torch.where(improves, candidate, error)


def reduce_to(x: Tensor, shape: tuple[int, ...], how: str) -> Tensor:
    """``x`` reduced to ``shape`` by sum or maximum."""
    dims = [d for d in range(x.dim()) if not shape or shape[d] == 1]
    reduced: Tensor = getattr(x, how)(dim=dims, keepdim=bool(shape)) if dims else x
    return reduced


FRACTIONS = tuple(0.8**k for k in range(16))  # of either end: 1 down to 0.035
FINER_RANGES = (0.8 ** (1 / 5), 0.8 ** (1 / 25))  # ratios of the finer scans of the step
COARSE_SAMPLES = 8192  # enough to find the basin


@torch.no_grad()
def best_range(x: Tensor, top: int, power: float = SQUARED) -> tuple[float, int]:
    """The step and the lowest of ``top + 1`` consecutive codes with the least error on ``x``.

    Args:
        x: values to represent, float32, any shape.
        top: number of codes minus one.
        power: exponent p of the error, at least 1.

    Returns:
        ``(step, lowest)``, the step positive, ``-top <= lowest <= 0``. Their error is not above that of those for
        p = 2.
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
    best = min(scanned, key=lambda one: range_error(few, one[0], one[1], top, power))
    error = range_error(x, best[0], best[1], top, power)
    for ratio in FINER_RANGES:
        step, lowest = best
        for code in sorted({_code(code, top) for code in (lowest - 1, lowest, lowest + 1)}):
            for k in range(-FINER_STEPS, FINER_STEPS + 1):
                found = range_error(x, step * ratio**k, code, top, power)
                if found < error:
                    best, error = (step * ratio**k, code), found
    for _ in range(FIXED_POINT_STEPS):
        step, lowest = best
        proposal = _refined(x, step, lowest, top, power)
        if proposal > 0 and range_error(x, proposal, lowest, top, power) < error:
            best = proposal, lowest
            error = range_error(x, proposal, lowest, top, power)
    if power != SQUARED:
        step, lowest = best_range(x, top)
        best = (step, lowest) if range_error(x, step, lowest, top, power) < error else best
    return best


def _refined(x: Tensor, step: float, lowest: int, top: int, power: float) -> float:
    """The step that fits the codes of ``x`` better; 0 if there is none."""
    codes = (x / step).round_().clamp_(lowest, lowest + top)
    if power != SQUARED:
        found = float(refined_step(x, codes, torch.tensor(step), (), power))
        return found if found > 0 else 0.0
    total, product = float(codes.square().sum()), float((x * codes).sum())
    return product / total if total > 0 and product > 0 else 0.0


def _code(value: float, top: int) -> int:
    return min(0, max(-top, round(value)))


def range_error(x: Tensor, step: float, lowest: int, top: int, power: float = SQUARED) -> float:
    """Sum of |e|**power of quantizing ``x`` to ``step`` times the codes ``lowest`` to ``lowest + top``."""
    error = (x / step).round_().clamp_(lowest, lowest + top).mul_(step) - x
    return float(_raised(error, power).sum())


ENDS = FRACTIONS[:7]  # fractions of either end of a channel: 1 down to 0.26


@torch.no_grad()
def best_ranges(
    x: Tensor, top: int, shape: tuple[int, ...] = (), power: float = SQUARED
) -> tuple[Tensor, Tensor]:
    """As ``best_range``, for every channel of a weight.

    Args:
        x: values to represent, any shape.
        top: number of codes minus one, odd.
        shape: of the results, as in ``best_level``.
        power: exponent p of the error, at least 1.

    Returns:
        ``(step, lowest)``, float32 in ``shape``: steps positive and finite, ``lowest`` whole numbers in -top ... 0.
        Their error is not above that of ``best_level`` on the signed grid of as many codes.
    """
    x = x.detach().float()
    half = (top + 1) // 2
    level = best_level(x, signed := Grid(-half, top - half, 1), shape, power)
    search = _RangeSearch(x, top, shape, power, step_of(level, signed), torch.full_like(level, -half))
    low, high = (
        -reduce_to(-x, shape, "amax").clamp_min(0),
        reduce_to(x, shape, "amax").clamp_min(0),
    )
    for below in ENDS:
        for above in ENDS:
            step = (high * above - low * below) / top
            search.propose(step, low * below / step)
    for ratio, far in zip(FINER_RANGES, (max(2, top // 12), 1), strict=True):
        step, lowest = search.step, search.lowest
        for shift in sorted({-far, -1, 0, 1, far}):
            for k in range(-FINER_STEPS, FINER_STEPS + 1):
                search.propose(step * ratio**k, lowest + shift)
    for _ in range(FIXED_POINT_STEPS):
        search.propose(refined_step(x, search.codes(), search.step, shape, power), search.lowest)
    if power != SQUARED:
        search.propose(*best_ranges(x, top, shape))
    return search.step, search.lowest


class _RangeSearch:
    """The best step and lowest code of every channel so far."""

    def __init__(
        self, x: Tensor, top: int, shape: tuple[int, ...], power: float, step: Tensor, lowest: Tensor
    ) -> None:
        self.x, self.top, self.shape, self.power = x, top, shape, power
        self.floor = least_level(float(x.abs().max()), Grid(0, top, 1)) / top
        self.step, self.lowest = step, lowest
        self.error = self._error(step, lowest)

    def propose(self, step: Tensor, lowest: Tensor) -> None:
        """Keep ``step`` and ``lowest`` where they lower the error; NaN is never kept."""
        step = step.clamp_min(self.floor)
        lowest = lowest.round().clamp(-self.top, 0)
        error = self._error(step, lowest)
        improves = error < self.error
        self.step = torch.where(improves, step, self.step)
        self.lowest = torch.where(improves, lowest, self.lowest)
        self.error = torch.where(improves, error, self.error)

    def codes(self) -> Tensor:
        """The codes of the values."""
        return self._codes(self.step, self.lowest)

    def _codes(self, step: Tensor, lowest: Tensor) -> Tensor:
        return (self.x / step).round_().clamp_(lowest, lowest + self.top)

    def _error(self, step: Tensor, lowest: Tensor) -> Tensor:
        error = self._codes(step, lowest).mul_(step).sub_(self.x)
        return reduce_to(_raised(error, self.power), self.shape, "sum")
