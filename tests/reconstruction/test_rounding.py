"""Learned rounding: a float64 twin, a search over all roundings of a tiny layer, and codes that stay as chosen."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import saqcli as saq
from saqcli.quant.grid import Grid, integer_weights, paper_weights
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.reconstruction.block import fit_block
from saqcli.reconstruction.blocks import Block
from saqcli.reconstruction.options import Reconstruction
from saqcli.reconstruction.rounding import (
    SoftRounding,
    annealed,
    learned_rounding,
    lower_codes,
    rounded_up,
    undecided,
)

GRIDS = [paper_weights(2), paper_weights(4), integer_weights(3), integer_weights(8)]


def one_layer(
    quantizer: str = "clip", bits: str = "w2a8", inputs: int = 4, seed: int = 0
) -> tuple[nn.Module, QuantizedLayer, Tensor]:
    """A quantized linear layer of two outputs, and inputs whose values depend on each other."""
    torch.manual_seed(seed)
    x = torch.randn(64, inputs) @ torch.randn(inputs, inputs)
    net = nn.Sequential(nn.Linear(inputs, 2, bias=False))
    policy = {"0": bits}
    quantized = saq.quantize_model(
        net, policy=policy, calibration=[x], quantizer=quantizer, correct_bias=False
    )
    return quantized, quantized_layers(quantized)["0"], x


def whole() -> Block:
    return Block("0", ("0",), lambda model, x: model(x))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_soft_codes_equal_a_float64_twin(grid: Grid) -> None:
    scaled = torch.arange(grid.lowest - 3, grid.highest + 3, 0.37) + 0.01  # no code among them
    codes = range(grid.lowest, grid.highest + 1, grid.stride)
    base = lower_codes(scaled.clone(), grid)
    for value, found in zip(scaled.tolist(), base.tolist(), strict=True):
        below = [code for code in codes[:-1] if code <= value]
        assert found == (below[-1] if below else codes[0])


def test_shares_and_their_regularizer_equal_a_float64_twin() -> None:
    logits = torch.linspace(-6, 6, 41)
    for progress in (0.0, 0.3, 1.0):
        beta = 2 + 18 * 0.5 * (1 + math.cos(math.pi * progress))
        assert annealed(progress) == pytest.approx(beta, abs=1e-12)
        for value, share, term in zip(
            logits.tolist(),
            rounded_up(logits).tolist(),
            undecided(rounded_up(logits), beta).tolist(),
            strict=True,
        ):
            twin = min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1))
            assert share == pytest.approx(twin, abs=1e-6)
            assert term == pytest.approx(1 - abs(2 * twin - 1) ** beta, abs=1e-4)


def test_soft_rounding_starts_at_the_weight() -> None:
    _, layer, _ = one_layer(bits="w4a8")
    SoftRounding(layer, 0.01).prepare()
    step = layer.weight_quantizer.step().detach()
    inside = layer.latent_weight().abs() <= step * layer.weight_quantizer.grid().highest
    off = ((layer.given_weight - layer.latent_weight()).abs() / step).detach()
    assert float(off[inside].max()) <= 0.021  # the least share, of a gap of two steps


@pytest.mark.parametrize("seed", [1, 3])  # where the nearest codes are not the best ones
def test_soft_rounding_finds_the_best_of_all(seed: int) -> None:
    nearest, best, found = errors_of_codes("soft", seed)
    assert best < 0.5 * nearest
    assert found == best


@pytest.mark.parametrize("seed", range(4))
def test_straight_rounding_comes_near_the_best(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saqcli.reconstruction.rounding.LEAST_WEIGHTS", 1)
    nearest, best, found = errors_of_codes("straight", seed)
    assert found <= nearest
    assert found - best <= 0.5 * (nearest - best) or found <= 1.3 * best


def errors_of_codes(rounding: str, seed: int) -> tuple[float, float, float]:
    """The mean squared error with the nearest codes, with the best of all 2**8 choices, and with the learned ones."""
    net, layer, x = one_layer(seed=seed)
    quantizer, weight = layer.weight_quantizer, layer.latent_weight().detach().clone()
    targets, inputs, step = x @ weight.T, layer.input_quantizer(x).detach(), quantizer.step().detach()
    base = lower_codes(weight / step, quantizer.grid())

    def error(codes: Tensor) -> float:
        return float((inputs @ (codes * step).T - targets).square().mean())

    ups = itertools.product((0.0, 1.0), repeat=base.numel())
    best = min(error(base + 2 * torch.tensor(up).view_as(base)) for up in ups)
    nearest = error(quantizer.codes(weight).float())
    options = Reconstruction(
        iterations=400, batch_size=64, drop=0, rounding=rounding, weight_lr=0.03, rounding_lr=0.1,
        weight_level_lr=0, input_level_lr=0, regularization=0.1,
    )  # fmt: skip
    fit_block(whole(), net, x, x, targets, options, torch.Generator().manual_seed(0))
    return nearest, best, error(quantizer.codes(layer.latent_weight()).float())


@pytest.mark.parametrize("quantizer", [name for name, entry in QUANTIZERS.items() if entry.weight])
def test_fixed_weights_give_their_codes_back(quantizer: str) -> None:
    _, layer, _ = one_layer(quantizer, "w3a8", inputs=32)
    rounding = learned_rounding(layer, Reconstruction(rounding="soft"))
    with torch.no_grad():
        for one in rounding.trained:
            one.value.add_(one.unit * torch.randn(one.value.shape))
    rounding.fix()
    value = layer.quantized_weight().detach()
    plain, weight = layer.weight_quantizer.fold(layer.latent_weight().detach())
    assert torch.equal(plain.step() * plain.codes(weight), value)
    if SoftRounding.suits(layer):
        assert torch.equal(layer.latent_weight(), value)
        assert torch.equal(plain.codes(weight).float(), rounding.codes())


def test_soft_rounding_leaves_tables_and_tanh_to_straight() -> None:
    for quantizer in ("pact", "dorefa"):
        assert not SoftRounding.suits(one_layer(quantizer)[1])
    for quantizer in ("clip", "lsq", "lsq_plus"):
        assert SoftRounding.suits(one_layer(quantizer)[1])


def test_few_weights_of_a_level_keep_their_rounding() -> None:
    _, layer, _ = one_layer(inputs=31)
    assert not learned_rounding(layer, Reconstruction()).trained
    _, layer, _ = one_layer(inputs=32)
    assert learned_rounding(layer, Reconstruction()).trained
