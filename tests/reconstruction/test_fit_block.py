"""Fitting one block: nothing at zero iterations, never a higher error, the same bits by seed and after a stop."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import saqcli as saq
from saqcli.errors import ConfigError
from saqcli.quant import convert
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.reconstruction.adam import RelativeAdam, Trained
from saqcli.reconstruction.block import BlockError, fit_block
from saqcli.reconstruction.blocks import find_blocks
from saqcli.reconstruction.options import Reconstruction
from saqcli.training.loop import NO_MEMORY

FEW = Reconstruction(iterations=12, batch_size=16, weight_lr=0.02)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip


def images() -> Tensor:
    return torch.randn(40, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def reconstructed(
    options: Reconstruction, seed: int = 0, memory: Any = NO_MEMORY, **scheme: Any
) -> tuple[nn.Module, list[BlockError]]:
    """The quantized network with all blocks fitted, and their errors."""
    net, x = network(), images()
    quantized = saq.quantize_model(net, "w3a3", calibration=[x], **scheme)
    in_float = copy.deepcopy(net)
    convert.wrap(in_float)
    generator = torch.Generator().manual_seed(seed)
    inputs = float_inputs = x
    errors = []
    for block in find_blocks(quantized, x):
        with torch.no_grad():
            targets = block(in_float, float_inputs)
        errors.append(fit_block(block, quantized, inputs, float_inputs, targets, options, generator, memory))
        with torch.no_grad():
            inputs, float_inputs = block(quantized, inputs), targets
    return quantized, errors


def same(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_zero_iterations_change_no_bit() -> None:
    calibrated = saq.quantize_model(network(), "w3a3", calibration=[images()])
    quantized, errors = reconstructed(Reconstruction(iterations=0))
    assert same(quantized, calibrated)
    assert all(error.before == error.after for error in errors)


@pytest.mark.parametrize("rounding", ["straight", "soft"])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_error_never_rises_for_any_quantizer(quantizer: str, rounding: str) -> None:
    options = Reconstruction(iterations=25, batch_size=16, rounding=rounding, weight_lr=0.02, rounding_lr=0.1)
    operand = "quantizer" if QUANTIZERS.find(quantizer).weight else "activation_quantizer"
    _, errors = reconstructed(options, **{operand: quantizer})
    assert len(errors) == 3
    assert all(error.after <= error.before for error in errors)
    assert any(error.after < error.before for error in errors)


def test_error_is_that_of_the_block_it_leaves() -> None:
    net, x = network(), images()
    quantized = saq.quantize_model(net, "w3a3", calibration=[x])
    first, block, _ = find_blocks(quantized, x)
    with torch.no_grad():
        inputs, targets = first(quantized, x), net[:5](x)
    error = fit_block(block, quantized, inputs, inputs, targets, FEW, torch.Generator().manual_seed(0))
    assert error.after < error.before
    with torch.no_grad():
        off = (block(quantized, inputs) - targets).double().square().mean()
    assert error.after == pytest.approx(float(off / targets.double().var(correction=0)), rel=1e-6)


def test_useless_iterations_are_undone_bitwise() -> None:
    calibrated = saq.quantize_model(network(), "w3a3", calibration=[images()])
    harmful = Reconstruction(
        iterations=5, weight_lr=50.0, weight_level_lr=5.0, input_level_lr=5.0, bias_lr=9.0
    )
    quantized, errors = reconstructed(harmful)
    assert all(error.before == error.after for error in errors)
    assert same(quantized, calibrated)


def test_strided_points_of_few_channels_are_not_laid_out() -> None:
    """With channels last, torch's gradient of such a weight writes beyond its memory on a CPU."""
    for channels, stride, laid_out in ((6, 2, False), (6, 1, True), (16, 2, True)):
        net = nn.Sequential(nn.Conv2d(channels, 8, 1, stride), nn.Flatten(), nn.LazyLinear(3))
        x = torch.randn(4, channels, 8, 8)
        net(x)
        seen: list[bool] = []
        quantized = saq.quantize_model(net, 4, calibration=[x])
        quantized[0].register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda _, given, seen=seen: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
        saq.reconstruct(quantized, [x], iterations=1)
        assert any(seen) is laid_out


def test_gradients_and_flags_are_left_as_before() -> None:
    quantized, _ = reconstructed(FEW)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in quantized.parameters())


@pytest.mark.parametrize(
    "change",
    [{}, {"drop_inputs": 0.5}, {"noise_radius": 0.2}, {"bias_lr": 0.01}, {"rounding": "soft"}],
    ids=str,
)
def test_same_seed_gives_the_same_bits(change: dict[str, Any]) -> None:
    options = Reconstruction(**{"iterations": 10, "batch_size": 16, "weight_lr": 0.02, **change})
    first, again = reconstructed(options)[0], reconstructed(options)[0]
    assert same(first, again)
    assert not same(first, reconstructed(options, seed=1)[0])


class Stop(Exception):
    pass


class Stopping:
    """Keeps the state after ``count`` iterations, and stops there; then gives it back once."""

    def __init__(self, count: int) -> None:
        self.left, self.state = count, None

    def load(self) -> Any:
        state, self.state = self.state, None
        return state

    def offer(
        self, state: Callable[[], dict[str, Any]], *, milestone: bool = False, failing: bool = False
    ) -> None:
        self.left -= 1
        if self.left == 0:
            self.state = copy.deepcopy(state())
            raise Stop

    def restore_random(self) -> None:
        pass


@pytest.mark.parametrize("rounding", ["straight", "soft"])
def test_stopped_block_continues_to_the_same_bits(rounding: str) -> None:
    net, x = network(), images()
    options = Reconstruction(iterations=9, batch_size=16, rounding=rounding, weight_lr=0.02, drop_inputs=0.3)
    with torch.no_grad():
        targets = net[:5](x)

    def fit(seed: int, memory: Any) -> nn.Module:
        quantized = saq.quantize_model(net, "w3a3", calibration=[x])
        first, block, _ = find_blocks(quantized, x)
        with torch.no_grad():
            inputs = first(quantized, x)
        fit_block(
            block, quantized, inputs, inputs, targets, options, torch.Generator().manual_seed(seed), memory
        )
        return quantized

    stopping = Stopping(5)
    with pytest.raises(Stop):
        fit(0, stopping)
    assert same(fit(7, stopping), fit(0, NO_MEMORY))  # the state has the generator's, not the seed


def test_relative_adam_equals_a_float64_twin() -> None:
    value = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    unit = torch.tensor([0.1, 1.0, 10.0])
    optimizer = RelativeAdam([Trained(value, unit, 0.01)])
    twin, first, second = value.detach().double(), torch.zeros(3).double(), torch.zeros(3).double()
    for step in range(1, 6):
        value.square().sum().backward()
        optimizer.step(0.5)
        gradient = 2 * twin
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        size = (second / (1 - 0.999**step)).sqrt() + 1e-12
        twin = twin - 0.5 * 0.01 * unit * (first / (1 - 0.9**step)) / size
    assert torch.allclose(value.detach().double(), twin, rtol=1e-6)
    assert value.grad is None


@pytest.mark.parametrize(
    ("option", "value"),
    [("iterations", -1), ("batch_size", 0), ("drop", 1.5), ("rounding", "up"), ("weighting", "all"),
     ("weight_lr", -0.1), ("noise_radius", float("nan"))],
)  # fmt: skip
def test_impossible_settings_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=option):
        Reconstruction(**{option: value})
