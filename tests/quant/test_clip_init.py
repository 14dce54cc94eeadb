"""Clipping levels of least squared error: near-optimal, independent per channel, and always finite."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saqcli.quant import grid as grids
from saqcli.quant.clip_init import best_level, noise_to_signal, squared_error
from saqcli.quant.grid import Grid, fake_quantize
from tests.support.strategies import BITS, tensors
from tests.support.sweeps import sweep

GRIDS = {
    f"{name}-{width}": grid
    for width in BITS
    for name, grid in {
        "paper": grids.paper_weights(width),
        "integer": grids.integer_weights(width),
        "unsigned": grids.activations(width, signed=False),
        "signed": grids.activations(width, signed=True),
    }.items()
}
every_grid = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)

SAMPLES = {
    "normal": lambda: torch.randn(3000),
    "heavy tails": lambda: torch.randn(3000) ** 3,
    "uniform": lambda: torch.rand(3000) * 2 - 1,
    "one outlier": lambda: torch.cat([torch.randn(3000), torch.tensor([30.0])]),
    "relu": lambda: torch.randn(3000).relu(),
}


def brute_force(x: Tensor, grid: Grid) -> float:
    """The least squared error over 2,000 levels up to the largest magnitude."""
    fractions = torch.linspace(0.0005, 1, 2000)
    return min(float(squared_error(x, f * x.abs().max(), grid)) for f in fractions)


@pytest.mark.parametrize(
    ("kind", "width", "sample"),
    sweep(
        product(("paper", "integer", "unsigned", "signed"), (2, 3, 4, 8), SAMPLES),
        lambda kind, width, sample: width == 3 or (width in (2, 8) and sample == "heavy tails"),
    ),
)
def test_level_is_within_1_percent_of_scan(kind: str, width: int, sample: str) -> None:
    x = SAMPLES[sample]()
    x = x.abs() if kind == "unsigned" else x
    grid = GRIDS[f"{kind}-{width}"]
    assert float(squared_error(x, best_level(x, grid), grid)) <= 1.01 * brute_force(x, grid)


@every_grid
def test_values_on_the_grid_are_kept(grid: Grid) -> None:
    codes = torch.arange(grid.lowest, grid.highest + 1, grid.stride).float()
    level = best_level(codes * 0.25, grid)
    torch.testing.assert_close(level, torch.tensor(0.25 * grid.highest), rtol=1e-6, atol=0)


@every_grid
def test_channels_are_fitted_independently(grid: Grid) -> None:
    x = torch.randn(5, 3, 2, 2) * torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]).view(5, 1, 1, 1)
    together = best_level(x, grid, (5, 1, 1, 1))
    alone = torch.stack([best_level(row, grid) for row in x])
    # The order in which sums are taken differs: a few float32 ulps.
    torch.testing.assert_close(together.flatten(), alone, rtol=1e-5, atol=0)


@every_grid
def test_changing_one_channel_leaves_the_others(grid: Grid) -> None:
    x = torch.randn(4, 6)
    before = best_level(x, grid, (4, 1))
    x[2] = torch.randn(6)
    after = best_level(x, grid, (4, 1))
    assert torch.equal(before[[0, 1, 3]], after[[0, 1, 3]])
    assert before[2] != after[2]


@pytest.mark.parametrize("shape", [(), (4, 1, 1, 1), (1, 4, 1, 1)])
def test_levels_have_the_requested_shape(shape: tuple[int, ...]) -> None:
    assert best_level(torch.randn(4, 4, 3, 3), grids.paper_weights(4), shape).shape == shape


def test_levels_along_dimension_1() -> None:
    x = torch.randn(4, 6, 3, 3)  # output channels of a transposed convolution's weight
    one = best_level(x, grids.paper_weights(4), (1, 6, 1, 1))
    zero = best_level(x.transpose(0, 1), grids.paper_weights(4), (6, 1, 1, 1))
    torch.testing.assert_close(one.flatten(), zero.flatten(), rtol=1e-5, atol=0)


@every_grid
@given(x=tensors(3), constant=st.sampled_from([0.0, 1e-30, -1e-6, 3.0]))
def test_levels_are_positive_and_finite(grid: Grid, x: Tensor, constant: float) -> None:
    x = torch.cat([x, torch.full_like(x[:1], constant)])
    level = best_level(x, grid, (4, 1))
    assert (level > 0).all()
    assert level.isfinite().all()


@every_grid
@pytest.mark.parametrize("empty", ["all zero", "one channel zero", "one channel constant"])
def test_empty_and_constant_channels_are_finite(grid: Grid, empty: str) -> None:
    x = torch.zeros(3, 8) if empty == "all zero" else torch.randn(3, 8)
    x[1] = 0.0 if "zero" in empty else 0.37
    level = best_level(x, grid, (3, 1)).requires_grad_()
    x.requires_grad_()
    q = fake_quantize(x, level, grid)
    q.square().sum().backward()
    for tensor in (q, x.grad, level.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
    if "zero" in empty:  # a grid without zero has only its smallest level, which must vanish beside the rest
        assert q[1].detach().abs().max() <= 1e-7 * x.detach().abs().max().clamp_min(1)


@every_grid
@given(x=tensors(3))
def test_fit_is_never_worse_than_no_clipping(grid: Grid, x: Tensor) -> None:
    x = x if grid.lowest else x.abs()
    widest = torch.maximum(x.max(), -x.min() * grid.highest / -grid.lowest if grid.lowest else x.max())
    widest = widest.clamp_min(1e-3)
    # Sums of squares are rounded: an ulp for each of at most 36 terms.
    assert squared_error(x, best_level(x, grid), grid) <= squared_error(x, widest, grid) * (1 + 1e-5)


@pytest.mark.parametrize("width", BITS)
def test_level_scales_with_the_tensor(width: int) -> None:
    x, grid = torch.randn(500), grids.paper_weights(width)
    assert torch.equal(
        best_level(1024 * x, grid), 1024 * best_level(x, grid)
    )  # scaling by a power of two is exact


def test_noise_to_signal_definition() -> None:
    x, grid, level = torch.tensor([0.5, -1.0, 2.0]), grids.paper_weights(2), torch.tensor(1.5)
    # Levels -1.5, -0.5, 0.5, 1.5: errors 0, 0.5 and 0.5 (both -0.5 and -1.5 are 0.5 away from -1).
    assert noise_to_signal(x, level, grid) == pytest.approx(0.5 / 5.25)
    assert noise_to_signal(torch.zeros(3), level, grid) == 0.0
