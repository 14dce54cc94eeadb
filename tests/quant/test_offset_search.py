"""Initialization of LSQ+: no worse than any grid with the same number of codes."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli.quant import grid as grids
from saqcli.quant.clip_init import best_level, best_range, range_error, squared_error
from tests.support.strategies import BITS

SLACK = 1.02  # both searches end in a local minimum
SHAPES = {
    "normal": lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "negative": lambda z: -z.abs(),
    "shifted": lambda z: z + 2,
    "heavy": lambda z: z**3,
    "two_values": lambda z: z.sign(),
}


def sample(shape: str) -> Tensor:
    return SHAPES[shape](torch.randn(5000, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_worse_than_signed_or_unsigned_grid(shape: str, width: int) -> None:
    x, top = sample(shape), 2**width - 1
    step, lowest = best_range(x, top)
    for signed in (False, True):
        grid = grids.activations(width, signed=signed)
        other = float(squared_error(x, best_level(x, grid), grid))
        assert range_error(x, step, lowest, top) <= SLACK * other + 1e-9


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("shape", ["normal", "gelu", "shifted"])
def test_no_worse_than_exhaustive_search(shape: str, width: int) -> None:
    x, top = sample(shape), 2**width - 1
    step, lowest = best_range(x, top)
    widest = float(x.max() - x.min()) / top
    best = min(
        range_error(x, widest * k / 100, code, top) for k in range(10, 121, 2) for code in range(-top, 1)
    )
    assert range_error(x, step, lowest, top) <= SLACK * best


@pytest.mark.parametrize("width", BITS)
def test_zero_is_a_code_and_step_positive(width: int) -> None:
    top = 2**width - 1
    for x in (
        torch.zeros(5),
        torch.ones(1),
        -torch.ones(3),
        torch.tensor([1e-30, 1e30]),
        torch.tensor([-5.0, -4.0]),
        torch.full((2, 2), 7.0),
    ):
        step, lowest = best_range(x, top)
        assert 0 < step < float("inf")
        assert -top <= lowest <= 0
