"""Properties of every quantizer in the table, and closed forms of the paper's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saqcli.errors import ConfigError
from saqcli.quant import grid as grids
from saqcli.quant.grid import LevelTable, ShiftedGrid
from saqcli.quant.quantizers import Quantizer, quantizers_of
from tests.support.cases import CASES, ROWS, Case, bounds, each, plain_of, values_of
from tests.support.strategies import BITS, bits, levels, tensors

FLOAT64_EPS = torch.finfo(torch.float64).eps

every_quantizer = each(CASES)
every_clip = each([case for case in CASES if case.family == "clip"])
every_straight = each([case for case in CASES if not case.squeezes])
every_learner = each([case for case in CASES if case.learns])


# Grids


@pytest.mark.parametrize("width", BITS)
def test_paper_grid_codes(width: int) -> None:
    n = 2**width - 1
    grid = grids.paper_weights(width)
    codes = list(range(grid.lowest, grid.highest + 1, grid.stride))
    assert codes == [2 * d - n for d in range(n + 1)]
    assert grid.levels == 2**width


@pytest.mark.parametrize("width", BITS)
def test_integer_grids(width: int) -> None:
    grid = grids.integer_weights(width)
    assert grid == ((-127, 127, 1) if width == 8 else (-(2 ** (width - 1)), 2 ** (width - 1) - 1, 1))


@pytest.mark.parametrize("width", BITS)
def test_auto_grid_is_paper_below_8_bits(width: int) -> None:
    expected = grids.integer_weights(8) if width == 8 else grids.paper_weights(width)
    assert grids.weights(width, "auto") == expected


@each([case for case in CASES if case.operand in ("signed", "unsigned")])
def test_inputs_of_zero_stay_zero(case: Case) -> None:
    assert all(case.grid(width).has_zero for width in BITS)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("width", BITS)
def test_zero_is_a_level_of_activation_grids(width: int, signed: bool) -> None:
    grid = grids.activations(width, signed=signed)
    assert grid.levels == 2**width
    assert 0 in range(grid.lowest, grid.highest + 1, grid.stride)


# Values


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_at_most_2_to_the_bits_values(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    many = torch.cat([x, torch.linspace(-2, 2, 600).expand(ROWS, -1) * level], dim=1)
    with torch.no_grad():
        q = quantizer(many)
    low, high = bounds(quantizer)
    for row in q if case.channels else [q]:
        assert row.unique().numel() <= 2**width
    assert ((q >= low) & (q <= high)).all()


@every_quantizer
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits())
def test_quantization_is_idempotent(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level).double()
    quantizer.select(width)
    with torch.no_grad():
        once = quantizer(x)
        assert torch.equal(plain_of(quantizer, x)(once), once)


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_quantization_is_monotonic(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    with torch.no_grad():
        q = quantizer(x.sort(dim=1).values)
    assert (q.diff(dim=1) >= 0).all()


@every_quantizer
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits())
def test_values_go_to_the_nearest_level(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level).double()
    quantizer.select(width)
    quantizer = plain_of(quantizer, x)
    low, high = bounds(quantizer)
    x = torch.minimum(torch.maximum(x, low), high)
    with torch.no_grad():
        error = (quantizer(x) - x).abs()
        every = values_of(quantizer)
    least = (x[..., None] - every).abs().amin(-1)
    # x / step and code * step are rounded once each: relative to the level, an eps apiece, doubled for safety.
    assert (error <= least + 4 * FLOAT64_EPS * torch.maximum(high, -low)).all()


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_values_outside_range_are_clipped(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    quantizer = plain_of(quantizer, x)
    low, high = (bound.expand_as(x) for bound in bounds(quantizer))
    with torch.no_grad():
        q = quantizer(x)
    assert torch.equal(q[x >= high], high[x >= high])
    assert torch.equal(q[x <= low], low[x <= low])


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_step_times_codes_equals_output(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    with torch.no_grad():
        assert torch.equal(quantizer.step() * quantizer.codes(x), quantizer(x))


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_codes_are_on_the_grid(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    codes, grid = quantizer.codes(x), quantizer.grid()
    assert codes.dtype == (torch.float32 if isinstance(grid, LevelTable) else torch.int32)
    assert ((codes >= grid.lowest) & (codes <= grid.highest)).all()
    assert torch.equal(grid.codes_at(grid.indices(codes)), codes)


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_folded_form_is_bit_identical(case: Case, x: Tensor, level: float, width: int) -> None:
    """Also after the weight is stored as codes, as in a file."""
    quantizer = case.build(level)
    quantizer.select(width)
    with torch.no_grad():
        q = quantizer(x)
        plain, folded = quantizer.fold(x)
        stored = plain.step() * quantizer.codes(x)
        assert torch.equal(plain(folded), q)
        assert torch.equal(plain(stored), q)
    assert plain.bits == width
    assert plain.candidates == quantizer.candidates
    if not case.squeezes:
        assert plain is quantizer
        assert folded is x


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_arithmetic_matches_onnx(case: Case, x: Tensor, level: float, width: int) -> None:
    """Division by the step, round half to even, saturate, multiply: float32 throughout, as ONNX defines it.

    A table has no rounding in ONNX: its codes are searched.
    """
    quantizer = case.build(level)
    quantizer.select(width)
    quantizer = plain_of(quantizer, x)
    grid = quantizer.grid()
    values = x.numpy()
    step = quantizer.step().detach().numpy()
    if case.family == "clip":
        assert np.array_equal(step, np.abs(quantizer.level().detach().numpy()) / np.float32(grid.highest))  # type: ignore[operator]
    scaled = values / step
    if isinstance(grid, LevelTable):
        table = np.array(grid.codes, np.float32)
        codes = table[np.searchsorted((table[1:] + table[:-1]) / 2, scaled)]
    elif isinstance(grid, ShiftedGrid):
        codes = np.clip(np.rint(scaled), grid.lowest.numpy(), grid.highest.numpy())
    elif grid.stride == 1:
        codes = np.clip(np.rint(scaled), grid.lowest, grid.highest)
    else:
        n = np.float32(grid.highest)
        codes = 2 * np.clip(np.rint((scaled + n) / 2), 0, n) - n
    twin = codes.astype(np.float32) * step
    assert twin.dtype == np.float32
    with torch.no_grad():
        assert torch.equal(quantizer(x), torch.from_numpy(twin))


@every_quantizer
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_zero_maps_to_zero(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    with torch.no_grad():
        q = quantizer(torch.zeros_like(x))
    assert bool((q == 0).all()) == quantizer.grid().has_zero


@every_quantizer
@pytest.mark.parametrize("width", BITS)
def test_bfloat16_is_computed_in_float32(case: Case, width: int) -> None:
    quantizer = case.build(1.0)
    quantizer.select(width)
    x = torch.randn(ROWS, 40).bfloat16()
    with torch.no_grad():
        q = quantizer(x)
        assert q.dtype == torch.float32
        assert torch.equal(q, quantizer(x.float()))


@every_quantizer
@pytest.mark.parametrize("width", BITS)
def test_autocast_changes_nothing(case: Case, width: int) -> None:
    quantizer = case.build(1.0)
    quantizer.select(width)
    x = torch.randn(ROWS, 40)
    with torch.no_grad():
        expected = quantizer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(quantizer(x), expected)


@every_quantizer
def test_input_is_not_modified(case: Case) -> None:
    x = torch.randn(ROWS, 40, requires_grad=True)
    before = x.detach().clone()
    case.build(1.0)(x).sum().backward()
    assert torch.equal(x, before)


# Candidates


@every_quantizer
def test_switching_bits_back_restores_output(case: Case) -> None:
    quantizer = case.build(1.0)
    quantizer.fit(torch.randn(ROWS, 200))  # a level of its own for every candidate
    x = torch.randn(ROWS, 40)
    with torch.no_grad():
        before = {}
        for width in BITS:
            quantizer.select(width)
            before[width] = quantizer(x)
        assert not torch.equal(before[2], before[8])
        for width in reversed(BITS):
            quantizer.select(width)
            assert quantizer.bits == width
            assert torch.equal(quantizer(x), before[width])


@every_learner
@pytest.mark.parametrize("width", BITS)
def test_only_the_active_level_gets_gradients(case: Case, width: int) -> None:
    quantizer = case.build(1.0)
    quantizer.select(width)
    quantizer(3 * torch.randn(ROWS, 40)).square().sum().backward()
    assert list(quantizer.parameters())
    for parameter in quantizer.parameters():
        assert parameter.grad is not None
        for position, candidate in enumerate(quantizer.candidates):
            assert bool((parameter.grad[position] != 0).all()) == (candidate == width)


@each([case for case in CASES if not case.learns])
def test_unlearned_levels_are_buffers(case: Case) -> None:
    quantizer = case.build(1.5)
    assert not list(quantizer.parameters())
    assert set(quantizer.state_dict()) == {name for name, _ in quantizer.named_buffers()} != set()


@every_quantizer
def test_state_dict_is_sufficient_to_rebuild(case: Case) -> None:
    quantizer, again = case.build(1.0), case.build(3.0)
    x = torch.randn(ROWS, 200)
    quantizer.fit(x)
    again.load_state_dict(quantizer.state_dict())
    for width in BITS:
        quantizer.select(width)
        again.select(width)
        with torch.no_grad():
            assert torch.equal(again(x), quantizer(x))


def test_quantizers_of_a_model_are_found() -> None:
    model = torch.nn.Sequential(
        torch.nn.ReLU(), CASES[0].build(1.0), torch.nn.Sequential(CASES[-1].build(1.0))
    )
    assert [type(found) for found in quantizers_of(model)] == [type(model[1]), type(model[2][0])]


@every_quantizer
def test_bit_width_must_be_a_candidate(case: Case) -> None:
    quantizer = case.build(1.0, (2, 4))
    with pytest.raises(ConfigError, match="cannot switch to 3"):
        quantizer.select(3)
    assert quantizer.bits == 2


@every_quantizer
def test_candidates_are_sorted(case: Case) -> None:
    assert case.build(1.0, (8, 2, 5)).candidates == (2, 5, 8)


@every_quantizer
@pytest.mark.parametrize("width", BITS)
def test_fitted_levels_beat_no_clipping(case: Case, width: int) -> None:
    x = torch.randn(ROWS, 500)
    x = x.relu() if case.operand == "unsigned" else x
    quantizer = case.build(float(x.abs().max()), (width,))
    with torch.no_grad():
        before = (quantizer(x) - x).square().sum()
        quantizer.fit(x)
        assert (quantizer(x) - x).square().sum() < before


# Gradients


@every_straight
@given(x=tensors(ROWS), level=levels(), width=bits())
def test_gradient_passes_inside_the_range_only(case: Case, x: Tensor, level: float, width: int) -> None:
    quantizer = case.build(level)
    quantizer.select(width)
    if hasattr(quantizer, "level"):
        high = quantizer.level().detach().expand_as(x)
        low = high * (quantizer.grid().lowest / quantizer.grid().highest)
    else:
        low, high = (bound.expand_as(x) for bound in bounds(quantizer))
    x = torch.cat([x, high[:, :1], low[:, :1]], dim=1).requires_grad_()  # the ends count as inside
    upstream = torch.cos(torch.arange(x.numel())).view_as(x)
    quantizer(x).backward(upstream)
    high, low = (torch.cat([b, b[:, :1], b[:, :1]], dim=1) for b in (high, low))
    assert torch.equal(x.grad, upstream * ((x >= low) & (x <= high)))


def twin_weights(x: float, a: float, width: int) -> tuple[float, float, float, bool]:
    """Q, dQ/dx, dQ/da of the paper's weights with D and u (arXiv:2111.12273, Eq. 1-8), and whether x is too near a
    rounding or clipping boundary for two orders of the same arithmetic to agree."""
    s = 2**width - 1
    u = min(max(x / a, -1.0), 1.0)
    scaled = (u + 1) / 2 * s
    d = round(scaled) / s
    inside = abs(x / a) <= 1
    grad_a = (2 * d - 1) - x / a if inside else (1.0 if x > 0 else -1.0)
    return a * (2 * d - 1), float(inside), grad_a, _near_edge(scaled) or abs(abs(x / a) - 1) < 1e-9


def twin_activations(z: float, a: float, width: int) -> tuple[float, float, float, bool]:
    """Likewise for the paper's unsigned activations."""
    s = 2**width - 1
    scaled = min(max(z / a, 0.0), 1.0) * s
    d = round(scaled) / s
    inside = 0 <= z / a <= 1
    grad_a = (d - z / a) if inside else float(z > a)
    return a * d, float(inside), grad_a, _near_edge(scaled) or abs(z / a - 1) < 1e-9


def _near_edge(scaled: float) -> bool:
    return abs(scaled % 1 - 0.5) < 1e-9


def check_against_twin(quantizer: Quantizer, x: Tensor, twin: object) -> None:
    level = quantizer.level().detach().expand(x.shape[0], 1)
    rows = [[twin(v, level[r].item(), quantizer.bits) for v in x[r].tolist()] for r in range(x.shape[0])]  # type: ignore[operator]
    value, grad_x, grad_a = (
        torch.tensor([[e[k] for e in row] for row in rows], dtype=torch.float64) for k in range(3)
    )
    clear = ~torch.tensor([[e[3] for e in row] for row in rows])
    upstream = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x) * clear
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(upstream)

    torch.testing.assert_close(q.detach()[clear], value[clear], rtol=1e-9, atol=0)
    assert torch.equal(x.grad, upstream * grad_x)
    expected = (upstream * grad_a).sum_to_size(quantizer.level().shape)
    # Terms of order 1 may cancel in the sum, so the allowance grows with their number.
    actual = quantizer.clipping_level.grad[quantizer.candidates.index(quantizer.bits)]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13 * x.numel())


@pytest.mark.parametrize("channels", [False, True])
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits())
def test_weights_match_the_paper_formula(channels: bool, x: Tensor, level: float, width: int) -> None:
    quantizer = Case("clip", "paper", channels).build(level).double()
    quantizer.select(width)
    check_against_twin(quantizer, x, twin_weights)


@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits())
def test_activations_match_the_paper_formula(x: Tensor, level: float, width: int) -> None:
    quantizer = Case("clip", "unsigned", False).build(level).double()
    quantizer.select(width)
    check_against_twin(quantizer, x, twin_activations)


@every_clip
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits(), sign=st.sampled_from([1.0, -1.0]))
def test_level_gradient_matches_closed_form(
    case: Case, x: Tensor, level: float, width: int, sign: float
) -> None:
    """The closed form on every grid; a negative level acts as its magnitude with the gradient reversed."""
    quantizer = case.build(sign * level).double()
    quantizer.select(width)
    upstream = torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    q = quantizer(x)
    q.backward(upstream)
    a, grid = quantizer.level().detach().abs(), quantizer.grid()
    inside = (x <= a) & (x >= a * (grid.lowest / grid.highest))
    ends = torch.full_like(x, grid.lowest / grid.highest).masked_fill(x > 0, 1.0)
    terms = torch.where(inside, (q.detach() - x) / a, ends)
    expected = sign * (upstream * terms).sum_to_size(a.shape)
    actual = quantizer.clipping_level.grad[quantizer.candidates.index(width)]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13 * x.numel())


@every_clip
def test_zero_level_stays_finite(case: Case) -> None:
    quantizer = case.build(0.0)
    x = torch.randn(ROWS, 20, requires_grad=True)
    q = quantizer(x)
    q.sum().backward()
    for tensor in (q, x.grad, quantizer.clipping_level.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
