"""Style ort: ONNX Runtime runs every operator on integers, and the file is the model with biases on their grids."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli.api.files import metadata_of
from saqcli.export import STYLES
from saqcli.export.integer.bias import INT32_MAX, grid_bias, round_biases
from saqcli.export.onnx_helpers import may_saturate
from saqcli.export.operators import frozen_copy
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import Quantizer
from saqcli.verify.hazards import hazards
from saqcli.verify.kernels import summary
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import open_file
from saqcli.verify.verdict import Verdict
from tests.support.networks import images, randomize_norms, seeded
from tests.support.onnx_files import set_gains

JUNCTIONS = ("add", "concat", "pool")


def block(inputs: int, outputs: int, kernel: int, activation: nn.Module, **options: Any) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), activation)


class Everything(nn.Module):
    """A residual sum, a depthwise layer, a shortcut of slices and padding, a concatenation, and both kinds of pools."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 4, 3, nn.ReLU())
        self.pool = nn.MaxPool2d(3, 1, 1)
        self.wide = block(4, 8, 1, nn.ReLU6())
        self.depthwise = block(8, 8, 3, nn.ReLU6(), groups=8)
        self.narrow = block(8, 4, 1, nn.Identity())
        self.down = block(4, 6, 3, nn.Identity(), stride=2)
        self.left, self.right = block(6, 3, 1, nn.ReLU()), block(6, 5, 1, nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = x + self.narrow(self.depthwise(self.wide(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1))
        x = F.relu(self.down(x) + shortcut)
        x = torch.cat([self.left(x), self.right(x)], 1)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def quantized(bits: str, junctions: tuple[str, ...] = JUNCTIONS, **options: Any) -> nn.Module:
    with seeded(0):
        model = Everything().eval()
        randomize_norms(model)
    set_gains(model)
    return saq.quantize_model(
        model, bits, calibration=[images(32, seed=1)], junctions=junctions, pins={"*": bits}, **options
    )


def exported(model: nn.Module, path: Path, style: str = "ort") -> Verdict:
    return saq.export_onnx(model, path, style, verify=[images(16, seed=2)])


def weights_of(path: Path) -> dict[str, Any]:
    """The stored codes of every layer."""
    return {
        each.name: each for each in onnx.load(str(path)).graph.initializer if each.name.endswith(".codes")
    }


INT4, UINT4, INT8, UINT8 = TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8
# Bits, options of the weights, and their containers: as they are, as halves of odd codes, with zero points.
CASES: dict[str, tuple[str, dict[str, Any], set[int]]] = {
    "w8a8": ("w8a8", {}, {UINT8}),  # every channel reaches 127
    "w4a4": ("w4a4", {"weight_grid": "zero"}, {INT4, UINT4}),  # a negative gain makes 8 of a code of -8
    "w4a8, odd codes": ("w4a8", {"weight_grid": "paper"}, {INT4}),
    "w4a3, asymmetric": ("w4a3", {"weight_quantizer": "asymmetric"}, {INT4, UINT4}),
}


@pytest.mark.parametrize("case", CASES)
def test_all_operators_run_on_integers_and_are_proved(case: str, tmp_path: Path) -> None:
    bits, options, containers = CASES[case]
    path = tmp_path / "model.onnx"

    verdict = exported(quantized(bits, **options), path)

    operators = open_file(path).operators
    kinds = [each.kind for each in operators]
    assert all(each.integer for each in operators), [each for each in operators if not each.integer]
    assert (kinds.count("QLinearConv"), kinds.count("QLinearAdd"), kinds.count("QGemm")) == (7, 2, 1)
    assert {"QLinearConcat", "QLinearGlobalAveragePool"} <= set(kinds)
    assert {each.layer for each in operators if each.kind == "QLinearConv"} == {
        f"{name}.0" for name in ("stem", "wide", "depthwise", "narrow", "down", "left", "right")
    }
    assert {each.data_type for each in codes_of(path)} <= containers
    assert verdict.layerwise is not None
    assert verdict.layerwise.passed
    assert verdict.moved is not None
    assert verdict.moved.codes > 0
    assert verdict.moved.largest <= (1 if bits == "w8a8" else 2)  # few products a sum at few bits


def codes_of(path: Path) -> list[onnx.TensorProto]:
    """The stored codes of every layer."""
    return [each for each in onnx.load(str(path)).graph.initializer if each.name.endswith(".codes")]


def test_wrong_biases_and_codes_are_found(tmp_path: Path) -> None:
    model, style = quantized("w8a8"), STYLES["ort"]()
    path, wrong = tmp_path / "model.onnx", tmp_path / "wrong.onnx"
    style.export(model, images(2), path, metadata_of(model))
    form = round_biases(frozen_copy(model), images(2))
    assert check_layers(path, form, images(4), style.quantizers).passed

    file = onnx.load(str(path))
    for tensor in file.graph.initializer:
        if tensor.name == "wide.0.bias":
            unit = max(1, int(np.abs(numpy_helper.to_array(tensor)).max()) // 20)
            tensor.CopyFrom(
                numpy_helper.from_array(numpy_helper.to_array(tensor) + np.int32(unit), tensor.name)
            )
    onnx.save(file, str(wrong))
    assert check_layers(wrong, form, images(4), style.quantizers).wrong


def test_without_junctions_additions_are_between_codes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"

    exported(quantized("w8a8", ()), path)

    rest = [each for each in open_file(path).operators if not each.integer]
    assert {"DequantizeLinear", "QuantizeLinear"} <= {each.kind for each in rest}
    (narrow,) = [each for each in rest if each.layer == "narrow.0"]  # its result is added, as values
    assert narrow.round_trip
    lines = list(summary(open_file(path).operators))
    assert lines[0].startswith("on integers: ")
    assert any(line.startswith("codes become values and codes again") for line in lines)
    assert any("narrow.0" in line for line in lines)


def test_int8_weights_of_style_for_vnni(tmp_path: Path) -> None:
    model = quantized("w8a8")
    style, path = STYLES["ort-vnni"](), tmp_path / "model.onnx"
    style.export(model, images(2), path, metadata_of(model))

    assert {each.data_type for each in codes_of(path)} == {INT8}
    assert {hazard.code for hazard in hazards(onnx.load(str(path)))} == {"H9"} == set(style.conditions)


@given(st.lists(st.lists(st.integers(-64, 63), min_size=3, max_size=3), min_size=1, max_size=4))
def test_no_two_products_of_seven_bit_weights_saturate(rows: list[list[int]]) -> None:
    assert not may_saturate(np.array(rows, np.int8), 0)
    assert 255 * 2 * 63 < 2**15 and -255 * 2 * 64 >= -(2**15)  # noqa: PT018 - the bound of any two


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2),
    st.lists(st.floats(1e-6, 10), min_size=2, max_size=2),
    st.floats(1e-6, 10),
)
def test_biases_move_by_half_a_unit_at_most(bias: list[float], steps: list[float], input_step: float) -> None:
    weights = np.array([[1, -3], [0, 0]], np.int8)

    found = grid_bias(np.array(bias), weights, input_step, np.array(steps, np.float32))

    if found is None:
        assert np.abs(np.array(bias) / (np.array(steps) * input_step)).max() > INT32_MAX / 2
        return
    off = np.abs(found.values - np.array(bias))
    assert off[0] <= 0.5001 * found.unit[0] + 1e-6 * abs(bias[0])
    assert off[1] <= 1e-6 * abs(bias[1]) + 1e-20  # a channel without weights has the unit that its bias needs
    assert found.weight_step[0] == np.float32(steps[0])


def test_sums_beyond_32_bits_have_no_integer_bias() -> None:
    weights = np.full((1, 2), 127, np.int8)
    bias, step = np.array([1.0]), np.array([2.0**-15], np.float32)

    assert grid_bias(bias, weights, 2.0**-15, step) is not None
    assert grid_bias(bias, weights, 2.0**-16, step) is None


def test_lowest_code_of_a_negative_gain_moves_by_one(tmp_path: Path) -> None:
    model = quantized("w8a8")
    layer: Any = quantized_layers(model)["down.0"]
    assert isinstance(layer.weight_quantizer, Quantizer)
    frozen = frozen_copy(model)
    codes = quantized_layers(frozen)["down.0"].weight_quantizer.codes  # type: ignore[union-attr]
    codes[0, 0, 0, 0] = codes[1, 0, 0, 0] = -128  # gains: negative, zero
    codes[3, 0, 0, 0] = -128  # positive

    round_biases(frozen, images(2))

    assert [int(codes[k, 0, 0, 0]) for k in (0, 1, 3)] == [-127, -128, -128]  # type: ignore[index]
