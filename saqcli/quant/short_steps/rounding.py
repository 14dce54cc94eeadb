"""Rounding of steps to few significant bits, and how many a layer may have.

A float32 number has 24 significant bits. A product of two codes and two steps is a whole number times a power of two,

    (step_w * code_w) * (step_x * code_x) = code_w * code_x * m_w * m_x * 2**e        step = m * 2**e, 0 < m < 2**bits

and so is every sum of a layer's products, since they share the step of the input and of the output channel. While the
whole number stays within 2**24, float32 represents every partial sum: the order of summation, fused multiply-adds and
blocking no longer matter, and every kernel with IEEE arithmetic gives the same bits.

``bits_that_fit`` gives a layer as many significant bits as its codes and its fan-in leave room for, whatever the
weights are, at most those that were asked for. Where not even powers of two fit, the layer has these; whether its sums
are exact then depends on its weights (``verify.exactness``).

Every channel has a step of its own, however far below the others: gains of depthwise layers spread over 2**9 and more.
Only its bias limits it (``least_step``). A bias is a whole number of units too, and channels whose weights are almost
zero, which trained networks have, would need more than 2**24 of them.

Rounding is straight through: the gradient of a step is that of the rounded one.
"""

from itertools import product
from math import frexp
from typing import Any

import torch
from torch import Tensor

from saqcli.quant.grid import AnyGrid, LevelTable, ShiftedGrid

MOST_BITS = 8  # of a step; a level, the step times a code of 8 bits, stays exact
SIGNIFICANT = 24  # bits of a float32 number
REACH = 3  # short steps that are tried on either side of a fitted one
LEAST_STEP = 2.0**-32  # ``grid.TINY``, to which kernels limit levels, is still below


def short_step(step: Tensor, bits: int | None) -> Tensor:
    """``step``, positive, rounded to ``bits`` significant bits, half to even; itself if that is None.

    Example:
        >>> short_step(torch.tensor([0.1, 0.3, 1.0]), 2)
        tensor([0.0938, 0.2500, 1.0000])
    """
    return step if bits is None else _Rounded.apply(step, bits)


def short_level(level: Tensor, highest: float, bits: int | None) -> Tensor:
    """A clipping level whose step, ``level / highest``, has ``bits`` significant bits; itself if that is None.

    The sign is kept. With a whole ``highest`` of up to 8 bits the division gives the rounded step exactly.
    """
    return level if bits is None else _RoundedLevel.apply(level, highest, bits)


def rounded(step: Tensor, bits: int) -> Tensor:
    """The numbers with ``bits`` significant bits nearest to ``step``, at least ``LEAST_STEP``."""
    step = step.clamp_min(LEAST_STEP)
    whole = torch.frexp(step).mantissa * 2.0**bits
    return whole.round() * (step / whole)


def neighbours(step: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The numbers with ``bits`` significant bits around ``step``, positive: not above it, and the next one.

    Example:
        >>> neighbours(torch.tensor(0.3), 2)
        (tensor(0.2500), tensor(0.3750))
    """
    whole = torch.frexp(step).mantissa * 2.0**bits
    return whole.floor() * (step / whole), (whole.floor() + 1) * (step / whole)


def nearby(step: Tensor, bits: int) -> list[Tensor]:
    """Numbers with ``bits`` significant bits around ``step``, positive: its neighbours first, then ``REACH`` in all on
    either side.

    Example:
        >>> [float(each) for each in nearby(torch.tensor(0.3), 2)]
        [0.25, 0.375, 0.1875, 0.5, 0.125, 0.75]
    """
    below, above = neighbours(step, bits)
    found = [below, above]
    for _ in range(REACH - 1):
        below, above = neighbours(below * (1 - 2.0 ** -(bits + 1)), bits)[0], neighbours(above, bits)[1]
        found += [below, above]
    return found


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: Tensor, bits: int) -> Tensor:
        return rounded(step, bits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _RoundedLevel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, level: Tensor, highest: float, bits: int) -> Tensor:
        found = rounded(level.abs() / highest, bits) * highest
        return torch.where(level < 0, -found, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def rounded_bias(bias: Tensor, unit: Tensor) -> Tensor:
    """``bias``, (channels,), rounded to multiples of ``unit``, in the same shape; straight through."""
    return _RoundedBias.apply(bias, unit)  # type: ignore[no-any-return]


class _RoundedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, unit: Tensor) -> Tensor:
        return (bias / unit).round_().mul_(unit)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def least_step(bias: Tensor, step: Tensor | float, bits: int) -> Tensor:
    """The least steps of weights with which a bias takes at most half of the 24 bits of a sum.

    Args:
        bias: of the channels.
        step: of the input.
        bits: significant bits of the product of both steps.

    Returns:
        Positive, in the shape of ``bias``.

    Example:
        >>> least_step(torch.tensor([2.0, 0.0]), 0.5, 6).tolist() == [2.0**-15, LEAST_STEP]
        True
    """
    return (bias.abs() / (step * 2.0 ** (SIGNIFICANT - 1 - bits))).clamp_min(LEAST_STEP)


def span(grid: AnyGrid) -> float:
    """The largest magnitude of a code, in units of the power of two that divides all codes."""
    if isinstance(grid, ShiftedGrid):
        return float(grid.top)
    if isinstance(grid, LevelTable):
        codes = [code for code in grid.codes if code]
        return max(map(abs, codes)) / min(map(lowest_bit, codes))
    return float(max(-grid.lowest, grid.highest))


def lowest_bit(value: float) -> float:
    """The largest power of two that divides a float, which is not 0.

    Example:
        >>> lowest_bit(0.75), lowest_bit(-6.0)
        (0.25, 2.0)
    """
    mantissa, exponent = frexp(value)
    whole = int(abs(mantissa) * 2**53)
    return float((whole & -whole) * 2.0 ** (exponent - 53))


def bits_that_fit(weights: float, inputs: float, fan_in: int, most: int) -> tuple[int, int]:
    """Significant bits of the steps of a layer's weights and of its input with which sums are exact.

    Args:
        weights: largest code of a weight.
        inputs: largest code of the input.
        fan_in: products of a sum.
        most: bits that were asked for, of each of them.

    Returns:
        As many as fit, at least 1, evenly, the odd one to the weights; (1, 1) if nothing fits.

    Example:
        >>> bits_that_fit(15, 15, 576, most=8), bits_that_fit(127, 255, 64, most=8)
        ((4, 3), (3, 1))
    """
    room = 2.0**SIGNIFICANT / (weights * inputs * fan_in)
    fitting = [
        (w, x)
        for w, x in product(range(1, most + 1), repeat=2)
        if (2**w - 1) * (2**x - 1) <= room and x <= w <= x + 2
    ]
    return max(fitting, key=lambda pair: (sum(pair), -abs(pair[0] - pair[1])), default=(1, 1))
