"""Starts under other exponents of the error, of asymmetric ranges, and by the error of a layer's output."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from saqcli.config import QuantizationSection
from saqcli.errors import ConfigError
from saqcli.quant import calibration, convert
from saqcli.quant import grid as grids
from saqcli.quant.calibration import KEPT_IMAGES, KEPT_VALUES
from saqcli.quant.clip_init import best_level, best_range, best_ranges, error_at, range_error
from saqcli.quant.convert import Scheme
from saqcli.quant.grid import Grid, ShiftedGrid, pack, unpack
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers.asymmetric import AsymmetricWeight
from saqcli.quant.quantizers.dorefa import DorefaWeight
from saqcli.quant.starts import choose_starts
from saqcli.serialization import parse_object
from tests.support import tiny
from tests.support.strategies import BITS, bits, tensors
from tests.support.sweeps import sweep

POWERS = (1.0, 1.5, 2.4, 3.0, 4.0)
ROWS = (3, 1)
GRIDS = {
    "paper": grids.paper_weights,
    "integer": grids.integer_weights,
    "unsigned": lambda width: grids.activations(width, signed=False),
}
every_power = pytest.mark.parametrize("power", sweep(POWERS, lambda power: power in (1.0, 2.4)))


def of_ranges(x: Tensor, step: Tensor, lowest: Tensor, top: int, power: float) -> Tensor:
    """The error of every row, in float64."""
    x, step, lowest = x.double(), step.double(), lowest.double()
    codes = (x / step).round().clamp(lowest, lowest + top)
    return (codes * step - x).abs().pow(power).sum(1, keepdim=True)


# Exponents


@every_power
@pytest.mark.parametrize("kind", GRIDS)
@given(x=tensors(3), width=bits())
def test_level_is_never_worse_than_at_2(kind: str, power: float, x: Tensor, width: int) -> None:
    grid = GRIDS[kind](width)
    found, plain = best_level(x, grid, ROWS, power), best_level(x, grid, ROWS)
    assert (error_at(x, found, grid, power) <= error_at(x, plain, grid, power)).all()
    assert (found > 0).all()
    assert found.isfinite().all()


@every_power
@given(x=tensors(3), width=bits())
def test_ranges_are_never_worse_than_at_2(power: float, x: Tensor, width: int) -> None:
    top = 2**width - 1
    step, lowest = best_range(x, top, power)
    plain = best_range(x, top)
    assert range_error(x.flatten(), step, lowest, top, power) <= range_error(x.flatten(), *plain, top, power)
    errors = [of_ranges(x, *best_ranges(x, top, ROWS, each), top, power) for each in (power, 2.0)]
    assert (errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all()


@every_power
@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("width", [2, 4])
def test_level_is_near_the_best_of_a_scan(kind: str, width: int, power: float) -> None:
    grid, x = GRIDS[kind](width), torch.randn(400)
    x = x.abs() if kind == "unsigned" else x
    scanned = min(
        float(error_at(x, level, grid, power)) for level in torch.linspace(0.002, 1, 800) * x.abs().max()
    )
    assert float(error_at(x, best_level(x, grid, (), power), grid, power)) <= 1.01 * scanned


def test_larger_exponents_clip_less() -> None:
    x, grid = torch.randn(4000), grids.paper_weights(3)
    levels = [float(best_level(x, grid, (), power)) for power in (1.0, 2.0, 2.4, 4.0)]
    assert levels == sorted(levels)


@every_power
def test_squeezed_weights_fit_their_factor(power: float) -> None:
    x = torch.randn(3, 60)
    errors = []
    for exponent in (power, 2.0):
        quantizer = DorefaWeight({3: grids.paper_weights(3)}, ROWS)
        quantizer.error_power = exponent
        quantizer.fit(x)
        errors.append((quantizer(x) - x).abs().pow(power).sum(1))
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    if power != 2:
        assert (errors[0] < errors[1]).any()


@pytest.mark.parametrize("schema", [Scheme, QuantizationSection])
def test_json_has_the_exponent_only_if_set(schema: type[Scheme]) -> None:
    assert "error_power" not in json.loads(schema().model_dump_json())
    assert json.loads(schema(error_power=2.4).model_dump_json())["error_power"] == 2.4


@pytest.mark.parametrize("power", [0.5, 4.5, float("nan")])
def test_other_exponents_are_refused(power: float) -> None:
    with pytest.raises(ConfigError, match="error_power"):
        parse_object(Scheme, {"error_power": power}, "the quantizers", ConfigError)


@pytest.mark.parametrize("name", ["clip", "lsq", "lsq_plus", "asymmetric", "pact", "dorefa"])
def test_exponent_reaches_every_quantizer(name: str) -> None:
    levels = []
    for power in (2.0, 4.0):
        net, x = tiny.build("conv_bn")
        tiny.quantized(net, x, 3, Scheme(quantizer=name, error_power=power))
        levels.append([value for key, value in net.state_dict().items() if "quantizer" in key])
    assert any(not torch.equal(*pair) for pair in zip(*levels, strict=True))


# Asymmetric ranges


@given(x=tensors(3), width=bits(), power=st.sampled_from([2.0, 2.4]))
def test_ranges_are_never_worse_than_signed(x: Tensor, width: int, power: float) -> None:
    top, signed = 2**width - 1, grids.activations(width, signed=True)
    step, lowest = best_ranges(x, top, ROWS, power)
    plain = best_level(x, signed, ROWS, power) / signed.highest
    errors = (
        of_ranges(x, step, lowest, top, power),
        of_ranges(x, plain, torch.full(ROWS, float(signed.lowest)), top, power),
    )
    assert (errors[0] <= errors[1] * (1 + 1e-4) + 1e-12).all()
    assert ((lowest >= -top) & (lowest <= 0) & (lowest == lowest.round())).all()
    assert (step > 0).all()


@pytest.mark.parametrize("power", [2.0, 2.4])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_ranges_are_near_the_best_of_all(width: int, power: float) -> None:
    x = torch.stack([torch.randn(60), torch.randn(60) + 1, -torch.randn(60).abs(), torch.randn(60) ** 3])
    top = 2**width - 1
    found = of_ranges(x, *best_ranges(x, top, (4, 1), power), top, power)
    widest = (x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) / top
    best = torch.full((4, 1), torch.inf, dtype=torch.float64)
    for code in range(-top, 1):
        for k in range(8, 121):
            best = torch.minimum(best, of_ranges(x, widest * k / 100, torch.tensor(code), top, power))
    assert (found <= 1.03 * best).all()


@pytest.mark.parametrize("constant", [0.0, 3.0, -1e-6])
def test_empty_and_constant_channels_have_ranges(constant: float) -> None:
    x = torch.randn(3, 8)
    x[1] = constant
    step, lowest = best_ranges(x, 15, ROWS, 2.4)
    assert ((step > 0) & step.isfinite() & lowest.isfinite()).all()
    q = (x / step).round().clamp(lowest, lowest + 15) * step
    torch.testing.assert_close(q[1], x[1], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(), (4, 1, 1, 1), (1, 4, 1, 1)])
def test_weights_have_ranges_of_the_shape(shape: tuple[int, ...]) -> None:
    quantizer = AsymmetricWeight({bits: AsymmetricWeight.weight_grid(bits, "auto") for bits in BITS}, shape)
    x = torch.randn(4, 4, 3, 3) + 0.5
    quantizer.fit(x)
    for width in BITS:
        quantizer.select(width)
        grid = quantizer.grid()
        assert grid.lowest.shape == quantizer.step().shape == shape
        codes = quantizer.codes(x)
        assert torch.equal(quantizer.step() * codes, quantizer(x))
        limit = 127 if width == 8 else 2**width - 1
        assert codes.abs().max() <= limit
        if width < 8:
            assert (grid.lowest > -(2 ** (width - 1))).any()
        else:
            assert grid.hull == Grid(-127, 127, 1)


@given(width=st.integers(2, 7), seed=st.integers(0, 99))
def test_shifted_codes_are_packed_in_their_bits(width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    lowest = -torch.randint(2**width, (5, 1), generator=generator).float()
    grid = ShiftedGrid(lowest, 2**width - 1)
    codes = grid.codes_at(torch.randint(2**width, (5, 7), generator=generator))
    packed = pack(codes, grid, width)
    assert packed.numel() == -(-35 * width // 8)
    assert torch.equal(unpack(packed, grid, width, (5, 7)), codes)


# The error of a layer's output


def calibrated(scheme: Scheme, keep: bool, bits: tuple[int, ...] = (3, 4)) -> nn.Module:
    net, x = tiny.build("conv_bn")
    convert.wrap(net)
    statistics = calibration.observe(net, [x], keep=keep)
    signed = {name: entry.signed for name, entry in statistics.items()}
    layers = {name: convert.LayerBits(weight=3, activation=3) for name in quantized_layers(net)}
    more = [convert.LayerBits(weight=each, activation=each) for each in bits]
    config = convert.BitConfig(model="tiny", layers=layers)
    convert.install(net, scheme, config, signed, dict.fromkeys(layers, more))
    calibration.fit(net, statistics, scheme.clip_init)
    return net


@torch.no_grad()
def output_errors(layer: convert.QuantizedLayer, inputs: list[Tensor]) -> tuple[float, float]:
    """Of the weights alone, and of the inputs alone, recomputed with the float operators."""
    weights, own = layer.weight_quantizer, layer.input_quantizer
    found = []
    for w, a in ((weights, nn.Identity()), (nn.Identity(), own)):
        total = 0.0
        for x in inputs:
            operator = layer._conv_forward if hasattr(layer, "_conv_forward") else nn.functional.linear
            weight, quantized = layer.latent_weight(), w(layer.latent_weight())
            total += float(
                (operator(x, weight, None) - operator(a(x), quantized, None)).double().square().sum()
            )
        found.append(total)
    return found[0], found[1]


@pytest.mark.parametrize(
    "quantizer", sweep(["clip", "asymmetric", "lsq_plus"], lambda name: name == "asymmetric")
)
def test_chosen_start_has_the_least_output_error(quantizer: str) -> None:
    net = calibrated(Scheme(quantizer=quantizer), keep=True)
    _, x = tiny.build("conv_bn")
    statistics = calibration.observe(net, [x], keep=True)
    for name, layer in quantized_layers(net).items():
        samples, inputs = statistics[name].samples, statistics[name].inputs
        choose_starts(layer, samples, inputs)
        for width in (3, 4):
            convert.set_bits(layer, convert.LayerBits(weight=width, activation=width))
            chosen = output_errors(layer, inputs)
            before = [copy_of(each) for each in (layer.weight_quantizer, layer.input_quantizer)]
            for power in (2.0, 2.4):
                for place, (one, data) in enumerate(
                    ((layer.weight_quantizer, layer.latent_weight()), (layer.input_quantizer, samples))
                ):
                    one.error_power = power  # type: ignore[assignment]
                    for fit in one.fits():  # type: ignore[operator]
                        fit(data)
                        assert chosen[place] <= output_errors(layer, inputs)[place] * (1 + 1e-6)
                    one.load_state_dict(before[place])
                    one.error_power = 2.0  # type: ignore[assignment]


def copy_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_kept_inputs_change_nothing_else() -> None:
    one, two = (calibrated(Scheme(), keep=keep).state_dict() for keep in (False, True))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_output_starts_differ_and_fall_back() -> None:
    plain, chosen, without = (
        calibrated(Scheme(clip_init=how), keep=keep).state_dict()  # type: ignore[arg-type]
        for how, keep in (("error", False), ("output", True), ("output", False))
    )
    assert all(torch.equal(value, without[name]) for name, value in plain.items())
    assert any(not torch.equal(value, chosen[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 4, 7), (3, 8, 300, 9)),
        (nn.Conv2d(8192, 2, 3, dilation=2), (2, 8192, 6, 7)),
        (nn.Conv1d(4, 4, 3), (5, 4, 30000)),
        (nn.Linear(64, 5), (2, 900, 64)),
        (nn.Linear(64, 5), (2, 30, 30, 64)),
        (nn.Linear(64, 5), (300, 64)),
        (nn.ConvTranspose2d(6, 4, 2), (2, 6, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_windows_are_small_and_run(layer: nn.Module, shape: tuple[int, ...]) -> None:
    net = nn.Sequential(layer).eval()
    convert.wrap(net)
    x = torch.randn(shape)
    statistics = calibration.observe(net, [x] * 9, keep=True)["0"]
    assert sum(map(len, statistics.inputs)) == min(KEPT_IMAGES, 9 * min(4, len(x)))
    for kept in statistics.inputs:
        small = 8192 * 25 if "8192" in str(shape) else 2 * KEPT_VALUES
        assert kept[0].numel() <= small
        assert net(kept).isfinite().all()
