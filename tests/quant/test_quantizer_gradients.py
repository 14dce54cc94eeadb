"""Gradients of every quantizer compared with the formulas of its paper, element by element in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saqcli.quant import grid as grids
from saqcli.quant.quantizers.clip import ClipWeight, NormalizedClipWeight
from saqcli.quant.quantizers.dorefa import PactActivation
from saqcli.quant.quantizers.learned_step import LsqPlusActivation
from tests.support.cases import ROWS, Case, each, set_levels
from tests.support.strategies import BITS, bits, levels, tensors

EDGE = 1e-9  # values nearer to a rounding or clipping boundary than this may fall on either side


def upstream_of(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)


def near(value: float, boundary: float) -> bool:
    return abs(value - boundary) <= EDGE * max(1.0, abs(value), abs(boundary))


def near_half(scaled: float) -> bool:
    return abs(scaled % 1 - 0.5) < EDGE * max(1.0, abs(scaled))


def compare(
    quantizer: Any, x: Tensor, twin: Callable[[float, int], tuple[float, float, dict[str, float], bool]]
) -> None:
    """Compare values and gradients with ``twin(number, row)``: Q, dQ/dx, dQ/d(parameters), and edge flags."""
    entries = [[twin(value, row) for value in x[row].tolist()] for row in range(ROWS)]
    clear = torch.tensor([[not entry[3] for entry in row] for row in entries])
    upstream = upstream_of(x) * clear
    x = x.clone().requires_grad_()
    q = quantizer(x)
    q.backward(upstream)

    values, slopes = (_table([[e[k] for e in row] for row in entries]) for k in (0, 1))
    torch.testing.assert_close(q.detach()[clear], values[clear], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, upstream * slopes, rtol=1e-9, atol=0)
    active = quantizer.candidates.index(quantizer.bits)
    for name, parameter in quantizer.named_parameters():
        terms = _table([[e[2][name] for e in row] for row in entries])
        expected = (upstream * terms).sum_to_size(quantizer.shape)
        # Terms as large as the highest code may cancel in the sum.
        torch.testing.assert_close(
            parameter.grad[active],
            expected,
            rtol=1e-9,
            atol=1e-13 * max(1.0, float(terms.abs().max())) * x.numel(),
        )


def _table(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


LSQ = [Case("lsq", o, c) for o in ("paper", "zero") for c in (False, True)] + [
    Case("lsq_plus", "paper", True),
    Case("lsq", "unsigned", False),
    Case("lsq", "signed", False),
]


@each(LSQ)
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits(), sign=st.sampled_from([1.0, -1.0]))
def test_lsq_matches_equations_1_to_3(case: Case, x: Tensor, level: float, width: int, sign: float) -> None:
    """arXiv:1902.08153, Eq. 1-3 and section 2.2; on odd codes the nearest one is taken."""
    quantizer = case.build(sign * level).double()
    quantizer.select(width)
    grid = case.grid(width)
    of_one_image = case.operand in ("signed", "unsigned")
    shared = x.numel() / (ROWS if case.channels or of_one_image else 1)
    scale = 1 / math.sqrt(shared * grid.highest)

    def twin(value: float, row: int) -> tuple[float, float, dict[str, float], bool]:
        s = float(quantizer.step().detach().expand(ROWS, 1)[row])
        v = value / s
        code = min(
            max(grid.lowest + grid.stride * round((v - grid.lowest) / grid.stride), grid.lowest), grid.highest
        )
        inside = grid.lowest <= v <= grid.highest
        slope = code - v if inside else (grid.lowest if v < grid.lowest else grid.highest)
        edge = near_half((v - grid.lowest) / grid.stride) or near(v, grid.lowest) or near(v, grid.highest)
        return s * code, float(inside), {"step_size": sign * scale * slope}, edge

    compare(quantizer, x, twin)


def lsq_plus(step: float, offset: float, widths: tuple[int, ...] = tuple(BITS)) -> LsqPlusActivation:
    quantizer = LsqPlusActivation(
        {width: grids.activations(width, signed=False) for width in widths}
    ).double()
    with torch.no_grad():
        quantizer.step_size.fill_(step)
        quantizer.offset.fill_(offset)
    return quantizer


@given(
    x=tensors(ROWS, torch.float64),
    level=levels(),
    width=bits(),
    place=st.floats(-1.5, 0.5, width=32),
)
def test_lsq_plus_matches_its_equations(x: Tensor, level: float, width: int, place: float) -> None:
    """arXiv:2004.09576, Eq. 4-8: the offset gets the gradient outside the range, the step its residual inside."""
    top = 2**width - 1
    step, offset = level / top, place * level
    quantizer = lsq_plus(step, offset)
    quantizer.select(width)
    lowest = min(0, max(-top, round(offset / step)))
    free = -top <= round(offset / step) <= 0
    scale = 1 / math.sqrt(x.numel() / len(x) * top)
    upstream = upstream_of(x)
    outside = sum(
        g for v, g in zip(x.flatten().tolist(), upstream.flatten().tolist(), strict=True)
        if not step * lowest <= v <= step * (lowest + top)
    )  # fmt: skip
    returns = outside > 0 if offset > 0 else outside < 0

    def twin(value: float, _: int) -> tuple[float, float, dict[str, float], bool]:
        v = value / step
        code = min(max(round(v), lowest), lowest + top)
        below, above = v < lowest, v > lowest + top
        inside = not (below or above)
        ends = (0, top) if free else (lowest, lowest + top)
        slope = code - v if inside else ends[0] if below else ends[1]
        moves = scale if not inside and (free or returns) else 0.0
        edge = near_half(v) or near(v, lowest) or near(v, lowest + top)
        return step * code, float(inside), {"step_size": scale * slope, "offset": moves}, edge

    undecided = near_half(offset / step) or any(twin(v, 0)[3] for v in x.flatten().tolist())
    if not undecided:  # one number at an edge would change the sum that decides whether the offset returns
        compare(quantizer, x, twin)


def test_offset_shifts_range_by_whole_codes() -> None:
    quantizer = lsq_plus(0.5, -1.3, (4,))
    assert quantizer.grid() == (-3, 12, 1)
    assert quantizer(torch.tensor([-9.0, -1.6, 0.0, 9.0]).double()).tolist() == [-1.5, -1.5, 0.0, 6.0]


@pytest.mark.parametrize(("offset", "lowest"), [(0.3, 0), (40.0, 0), (-40.0, -15), (-0.2, 0), (0.0, 0)])
def test_zero_is_a_code_at_any_offset(offset: float, lowest: int) -> None:
    quantizer = lsq_plus(0.5, offset, (4,))
    assert quantizer.grid() == (lowest, lowest + 15, 1)
    assert quantizer(torch.zeros(3).double()).tolist() == [0.0] * 3


@pytest.mark.parametrize(
    ("offset", "values", "upstream", "moves"),
    [
        (-1.0, [0.5, 1.0], [1.0, 1.0], False),  # all inside
        (-1.0, [-5.0, 1.0], [1.0, 1.0], True),
        (-1.0, [-5.0, -6.0], [1.0, -1.0], False),  # cancels
        (4.0, [-5.0, 1.0], [-1.0, 1.0], False),  # above zero, and descent would raise it further
        (4.0, [-5.0, 1.0], [1.0, 1.0], True),
        (-9.0, [3.0, -1.0], [1.0, 1.0], False),  # below all codes, and descent would lower it further
        (-9.0, [3.0, -1.0], [-1.0, 1.0], True),
    ],
)
def test_out_of_range_offset_recovers(
    offset: float, values: list[float], upstream: list[float], moves: bool
) -> None:
    quantizer = lsq_plus(0.5, offset, (4,))
    quantizer(torch.tensor(values).double()).backward(torch.tensor(upstream).double())
    assert quantizer.offset.grad is not None
    assert bool(quantizer.offset.grad.item()) == moves
    assert quantizer.step_size.grad is not None
    assert quantizer.step_size.grad.isfinite().all()


@pytest.mark.parametrize("step", [0.0, -0.5])
def test_zero_and_negative_steps_are_handled(step: float) -> None:
    quantizer, x = lsq_plus(step, -1.0, (4,)), torch.linspace(-2, 9, 12).double().requires_grad_()
    q = quantizer(x)
    q.sum().backward()
    for tensor in (q, x.grad, quantizer.step_size.grad, quantizer.offset.grad):
        assert tensor is not None
        assert tensor.isfinite().all()
    if step < 0:
        other = lsq_plus(-step, -1.0, (4,))
        same = other(x)
        same.sum().backward()
        assert torch.equal(q, same)
        assert torch.equal(quantizer.step_size.grad, -other.step_size.grad)  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("signed", [False, True])
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits(), sign=st.sampled_from([1.0, -1.0]))
def test_pact_learns_from_clipped_values(
    signed: bool, x: Tensor, level: float, width: int, sign: float
) -> None:
    """arXiv:1805.06085, Eq. 1-3, and their mirror image for negative numbers."""
    quantizer = PactActivation({width: grids.activations(width, signed=signed)}).double()
    set_levels(quantizer, torch.tensor(sign * level))
    n = 2 ** (width - 1) - 1 if signed else 2**width - 1
    lowest = -(n + 1) if signed else 0

    def twin(value: float, _: int) -> tuple[float, float, dict[str, float], bool]:
        low = level * lowest / n
        y = min(max(value, low), level)
        slope = 1.0 if value >= level else lowest / n if value < low else 0.0
        edge = near_half(y * n / level) or near(value, low)
        return (
            round(y * n / level) * level / n,
            float(low <= value <= level),
            {"clipping_level": sign * slope},
            edge,
        )

    compare(quantizer, torch.cat([x, torch.full((ROWS, 1), level)], 1), twin)


@each(
    [Case("dorefa", o, c) for o in ("paper", "zero") for c in (False, True)] + [Case("pact", "paper", True)]
)
@given(x=tensors(ROWS, torch.float64), level=levels(), width=bits())
def test_tanh_weights_match_the_formula(case: Case, x: Tensor, level: float, width: int) -> None:
    """arXiv:1606.06160, Eq. 9 times the level; the gradient is that of tanh(w) / max|tanh(w)| with the maximum held."""
    quantizer = case.build(level).double()
    quantizer.select(width)
    largest = x.abs().amax(1) if case.channels else x.abs().max().expand(ROWS)
    n, grid = 2**width - 1, case.grid(width)

    def twin(value: float, row: int) -> tuple[float, float, dict[str, float], bool]:
        peak = max(math.tanh(float(largest[row])), 1e-12)
        a = float(quantizer.level().detach().expand(ROWS, 1)[row])  # type: ignore[operator]
        t = math.tanh(value) / peak
        if case.operand == "paper":
            r, edge = 2 * round((t / 2 + 0.5) * n) / n - 1, near_half((t / 2 + 0.5) * n)
        else:
            r, edge = round(t * grid.highest) / grid.highest, near_half(t * grid.highest)
        return a * r, a * (1 - math.tanh(value) ** 2) / peak, {}, edge

    x = x.clamp(-3, 3)  # beyond, 1 - tanh**2 cancels completely
    largest = x.abs().amax(1) if case.channels else x.abs().max().expand(ROWS)
    compare(quantizer, x, twin)


@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("channels", [False, True])
@given(
    x=tensors(ROWS, torch.float64).filter(lambda x: float(x.std()) > 1e-3),
    level=levels(),
    width=bits(),
    kind=st.sampled_from(["paper", "zero"]),
)
def test_weight_normalization_matches_its_formula(
    channels: bool, restored: bool, x: Tensor, level: float, width: int, kind: Any
) -> None:
    """The paper: w^ = (w - mean) / std, u = clip(w^ / a), both statistics constant; ours is std * Q(w^) or Q(w^)."""
    quantizer = NormalizedClipWeight(
        {width: grids.weights(width, kind)}, (ROWS, 1) if channels else ()
    ).double()
    quantizer.restores_deviation = restored
    set_levels(quantizer, level * (torch.tensor([[1.0], [2.0], [3.0]]) if channels else torch.tensor(1.0)))
    numbers = x.flatten().tolist()
    mean = math.fsum(numbers) / len(numbers)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in numbers) / (len(numbers) - 1))
    grid = grids.weights(width, kind)

    def twin(value: float, row: int) -> tuple[float, float, dict[str, float], bool]:
        a = float(quantizer.level().detach().expand(ROWS, 1)[row])
        v = (value - mean) / std / a * grid.highest
        code = min(
            max(grid.lowest + grid.stride * round((v - grid.lowest) / grid.stride), grid.lowest), grid.highest
        )
        inside = grid.lowest <= v <= grid.highest
        ends = (grid.lowest if v < grid.lowest else grid.highest) / grid.highest
        slope = (code - v) / grid.highest if inside else ends
        edge = near_half((v - grid.lowest) / grid.stride) or near(v, grid.lowest) or near(v, grid.highest)
        scale = std if restored else 1.0
        value, passed = scale * a * code / grid.highest, float(inside) * scale / std
        return value, passed, {"clipping_level": scale * slope}, edge

    compare(quantizer, x, twin)


@given(x=tensors(ROWS), level=levels(), width=bits(), restored=st.booleans())
def test_folded_normalized_weight_equals_clip(x: Tensor, level: float, width: int, restored: bool) -> None:
    quantizer = NormalizedClipWeight({width: grids.weights(width, "paper") for width in BITS}, (ROWS, 1))
    quantizer.restores_deviation = restored
    set_levels(quantizer, level * torch.tensor([[1.0], [2.0], [3.0]]))
    quantizer.select(width)
    with torch.no_grad():
        plain, folded = quantizer.fold(x)
        assert type(plain) is ClipWeight
        assert torch.equal(plain(folded), quantizer(x))
        assert torch.equal(plain.step() * quantizer.codes(x), quantizer(x))
        assert torch.equal(plain.codes(folded), quantizer.codes(x))
