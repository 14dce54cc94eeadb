"""Sums of codes: bounded, split where float32 would overflow its integers, and exact."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import UnsupportedModel
from saqcli.export import EXPORTERS
from saqcli.export.exact_form import ExactForm
from saqcli.export.integers import EXACT_FLOAT, Integers, Operator, split_channels, weight_part
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.verify.runtime import onnx_session
from tests.support.networks import quantize, same_bits
from tests.support.onnx_files import EPSILON, answer
from tests.support.sweeps import sweep

aten = torch.ops.aten
SCALAR = torch.tensor(1.0, dtype=torch.float64)

# Kind of layer: ATen operator, weight shape, further arguments, and functional equivalent.
LAYERS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any], Any]] = {
    "linear": (aten.linear.default, (4, 6), {}, F.linear),
    "conv": (aten.conv2d.default, (4, 6, 3, 3), {}, F.conv2d),
    "conv1d": (aten.conv1d.default, (4, 6, 3), {}, F.conv1d),
    "grouped": (aten.conv2d.default, (4, 3, 3, 3), {"groups": 2}, F.conv2d),
    "depthwise": (aten.conv2d.default, (12, 1, 3, 3), {"groups": 6}, F.conv2d),
    "transposed": (aten.conv_transpose2d.input, (6, 4, 3, 3), {}, F.conv_transpose2d),
    "transposed_grouped": (aten.conv_transpose2d.input, (6, 2, 2, 2), {"groups": 3}, F.conv_transpose2d),
}
RANGES = [(0, 255), (0, 15), (-128, 127), (-8, 7), (-20, 235), (0, 1)]


def largest_sum(kind: str, codes: Tensor, lowest: int, highest: int) -> int:
    """The largest magnitude of any sum, over all outputs and both signs of every input."""
    target, _, settings, _ = LAYERS[kind]
    operator = Operator(target, settings)
    best = 0
    for row in operator.by_output(codes).flatten(1).tolist():
        best = max(
            best,
            sum(max(c * lowest, c * highest) for c in row),
            -sum(min(c * lowest, c * highest) for c in row),
        )
    return best


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_bound_is_the_largest_sum(kind: str, span: tuple[int, int]) -> None:
    target, shape, settings, _ = LAYERS[kind]
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    x = Integers(torch.zeros(1), SCALAR, None, *span)
    lowest, highest = min(span[0], 0), max(span[1], 0)
    parts, largest = split_channels(Operator(target, settings), x, Integers(codes, SCALAR))

    # Padding replaces inputs by zeros: partial sums, each below the bound.
    assert largest == largest_sum(kind, codes, lowest, highest)
    assert parts == [slice(0, Operator(target, settings).by_output(codes).shape[1])]


@pytest.mark.parametrize("span", RANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_bound_is_tight_for_real_inputs(kind: str, span: tuple[int, int]) -> None:
    """Random inputs, and for every output the worst input; the bound is reached and not exceeded."""
    target, shape, settings, twin = LAYERS[kind]
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
    operator = Operator(target, settings)
    _, largest = split_channels(
        operator, Integers(torch.zeros(1), SCALAR, None, *span), Integers(codes, SCALAR)
    )
    channels = 6
    size = {"linear": (), "conv1d": (5,)}.get(kind, (5, 5))
    x = torch.randint(span[0], span[1] + 1, (64, channels, *size), generator=generator).double()
    x[0], x[1] = span[0], span[1]
    found = twin(x, codes.double(), None, **settings)

    assert float(found.abs().max()) <= largest


@pytest.mark.parametrize("kind", LAYERS)
def test_parts_are_bounded_and_add_up(kind: str) -> None:
    """With 16-bit weights and inputs, sums exceed 2**24 while each part does not, and the total is exact."""
    target, shape, settings, twin = LAYERS[kind]
    generator = torch.Generator().manual_seed(5)
    taps = int(np.prod(shape[2:]))
    span = (0, 2**24 // (2 * 127 * taps))
    codes = torch.randint(64, 128, shape, generator=generator, dtype=torch.int8)
    operator = Operator(target, settings)
    weight = Integers(codes, SCALAR, layer="wide")
    parts, largest = split_channels(operator, Integers(torch.zeros(1), SCALAR, None, *span), weight)
    inputs = operator.by_output(codes).shape[1]

    assert [index for part in parts for index in range(part.start, part.stop)] == list(range(inputs))
    if inputs == 1 or kind == "transposed_grouped":
        assert len(parts) == 1
        assert largest <= EXACT_FLOAT
    else:
        assert len(parts) > 1
        assert largest > EXACT_FLOAT
    size = {"linear": (), "conv1d": (5,)}.get(kind, (5, 5))
    x = torch.randint(0, span[1] + 1, (8, 6, *size), generator=generator)
    x[0] = span[1]
    total = torch.zeros(1, dtype=torch.float64)
    for part in parts:
        cut = codes if len(parts) == 1 else weight_part(operator, codes, part)
        given = x[:, part] if len(parts) > 1 and operator.groups == 1 else x
        one = twin(given.double(), cut.double(), None, **settings)
        assert float(one.abs().max()) <= EXACT_FLOAT
        assert torch.equal(twin(given.float(), cut.float(), None, **settings).double(), one)
        total = total + one

    assert torch.equal(total, twin(x.double(), codes.double(), None, **settings))


def test_as_few_parts_as_possible() -> None:
    codes = torch.full((1, 100), 127, dtype=torch.int8)
    x = Integers(torch.zeros(1), SCALAR, None, 0, 2**24 // (127 * 30))
    parts, _ = split_channels(Operator(aten.linear.default, {}), x, Integers(codes, SCALAR))

    assert [part.stop - part.start for part in parts] == [30, 30, 30, 10]


def test_oversized_channel_is_refused_by_name() -> None:
    codes = torch.full((1, 4), 127, dtype=torch.int8)
    x = Integers(torch.zeros(1), SCALAR, None, 0, 2**24 // 127 + 1)
    with pytest.raises(UnsupportedModel, match=r"layer blocks\.3 .*2\^24 .*choose another `style`"):
        split_channels(Operator(aten.linear.default, {}), x, Integers(codes, SCALAR, layer="blocks.3"))


# Whole layers, through the exact form and ONNX Runtime.


def wide_linear() -> nn.Module:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(1080, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.linear(torch.relu(x).flatten(1).repeat(1, 10))
            return logits

    return Layer()


def wide_conv(groups: int = 1, *, transposed: bool = False) -> nn.Module:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            width = 300 * groups
            kind = nn.ConvTranspose2d if transposed else nn.Conv2d
            self.conv = kind(width, 2 * groups, 3, padding=1, groups=groups)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.conv(torch.relu(x).repeat(1, 100 * groups, 1, 1))
            return y.flatten(1)

    return Layer()


WIDE = {
    "linear": wide_linear,
    "conv": wide_conv,
    "grouped": lambda: wide_conv(2),
    "transposed": lambda: wide_conv(transposed=True),
    "transposed_grouped": lambda: wide_conv(2, transposed=True),
}


def all_positive(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_().add_(0.5 * parameter.abs().max())


@pytest.mark.parametrize("kind", sweep(WIDE, lambda kind: kind in ("linear", "conv", "transposed_grouped")))
def test_sums_beyond_float32_stay_exact(kind: str, tmp_path: Path) -> None:
    """Compared with integers in float64; ONNX Runtime gives the same bits at every batch size."""

    def make() -> nn.Module:
        module = WIDE[kind]()
        all_positive(module)
        return module

    quantized = quantize(make, same_bits(8), Scheme(weight_grid="paper"))
    ((name, layer),) = quantized.layers.items()
    weights, inputs = layer.weight_quantizer, layer.input_quantizer
    x = torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(6)) * 10  # beyond the range: code 255
    form = ExactForm(frozen_copy(quantized.model), x[:2]).eval()
    (accumulator,) = form.accumulators

    assert accumulator.layer == name
    assert accumulator.largest > EXACT_FLOAT
    assert accumulator.parts > 1

    seen: list[Tensor] = []
    hook = inputs.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    answer(quantized.model, x)
    hook.remove()
    codes = [weights.codes(layer.effective_weight()).double(), inputs.codes(seen[0]).double()]  # type: ignore[operator, union-attr]
    kind_of: Any = layer
    if isinstance(layer, nn.Linear):
        sums = F.linear(codes[1], codes[0])
    elif isinstance(layer, nn.ConvTranspose2d):
        sums = F.conv_transpose2d(codes[1], codes[0], None, 1, 1, groups=kind_of.groups)
    else:
        sums = F.conv2d(codes[1], codes[0], None, 1, 1, groups=kind_of.groups)
    assert float(sums.abs().max()) > EXACT_FLOAT  # it does occur
    steps = weights.step().detach().double() * inputs.step().detach().double()  # type: ignore[operator, union-attr]
    scale = steps.flatten().repeat(sums.shape[1] // steps.numel())
    shape = (-1,) if sums.dim() == 2 else (1, -1, 1, 1)
    truth = (sums * scale.reshape(shape) + kind_of.bias.detach().double().reshape(shape)).flatten(1)
    found = answer(form, x)
    # parts are added in float32, and scale and shift round once each
    error = (found.double() - truth).abs()
    assert (error <= (accumulator.parts + 2) * EPSILON * 1.01 * truth.abs()).all()

    path = tmp_path / "model.onnx"
    EXPORTERS["exact"]().export(quantized.model, x[:2], path, quantized.facts)
    for optimized in (False, True):
        for count in (1, 5, 16):
            assert torch.equal(onnx_session(path, optimized=optimized)(x[:count]), found[:count])


def test_bounded_layer_is_not_split() -> None:
    quantized = quantize(
        wide_linear, lambda names: {name: LayerBits(weight=4, activation=4) for name in names}
    )
    form = ExactForm(frozen_copy(quantized.model), torch.zeros(2, 3, 6, 6))

    assert [each.parts for each in form.accumulators] == [1]
    assert form.accumulators[0].largest <= 1080 * 15 * 15
