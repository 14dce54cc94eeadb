"""Where LSQ+ starts: the step and the lowest code of least squared error, by a scan over both ends of the range.

A coarse scan takes fractions of the least and of the greatest number for the two ends; finer scans of the step,
with the lowest code and its neighbours, and a few fixed-point steps finish. With the codes held, the best step is
<x, q> / <q, q> (Lloyd, 1982).
"""

import torch
from torch import Tensor

FRACTIONS = tuple(0.8**k for k in range(16))  # of either end: 1 down to 0.035
FINER = (0.8 ** (1 / 5), 0.8 ** (1 / 25))  # ratios of the finer scans of the step
FINER_STEPS = 4
FIXED_POINT_STEPS = 4
COARSE_SAMPLES = 8192  # enough to find the basin


@torch.no_grad()
def best_range(x: Tensor, top: int) -> tuple[float, int]:
    """The step, and the lowest of ``top + 1`` consecutive codes, that represent ``x`` best.

    Args:
        x: values to represent, float32, any shape.
        top: number of codes less one.

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
