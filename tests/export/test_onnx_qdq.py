"""Style qdq: integer codes with DequantizeLinear, folded norms, and the values of the model."""

import itertools
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.quantizers import Quantizer
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import judge
from tests.support.networks import NETWORKS, Bank, Quantized, images, quantize, same_bits
from tests.support.onnx_files import (
    EPSILON,
    EXPORTED,
    INT4,
    INT8,
    INT16,
    UINT8,
    answer,
    constants,
    dequantized,
    export,
    first_of_all,
    gain_of,
    graph_of,
    integers,
    network,
    norms_of,
    producers,
    set_gains,
    told,
    weights_of,
    written,
)
from tests.support.sweeps import sweep


@pytest.fixture(params=sweep(((pair,) for pair in EXPORTED), lambda pair: first_of_all(*pair)), ids="-".join)
def exported(request: pytest.FixtureRequest, folder: Path) -> tuple[Quantized, Path]:
    """Every network, as a file."""
    name, grid = request.param
    quantized = network(name, grid, "channel")
    return quantized, written(folder, "qdq", quantized, f"{name}-{grid}")


def test_one_dequantizer_per_quantized_weight(
    exported: tuple[Quantized, Path],
) -> None:
    quantized, path = exported
    names = [codes.name.removesuffix(".codes") for _, codes in dequantized(graph_of(path))]

    assert sorted(names) == sorted(weights_of(quantized))


def check_weights(quantized: Quantized, path: Path) -> None:
    """Codes are the quantizer's with the sign of the gain; steps are the quantizer's times its magnitude, rounded once.
    rounded once."""
    graph = graph_of(path)
    known = constants(graph)
    norms = norms_of(quantized.model)
    for node, stored in dequantized(graph):
        name = stored.name.removesuffix(".codes")
        layer = weights_of(quantized)[name]
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, Quantizer)
        codes = quantizer.codes(layer.effective_weight()).numpy()
        step = quantizer.step().detach().double().numpy()
        shape = [-1 if d == layer.channel_dim else 1 for d in range(codes.ndim)]
        gain = (gain_of(norms[name]) if name in norms else np.ones(1)).reshape(shape)
        found = numpy_helper.to_array(known[node.input[1]])
        expected = (np.where(gain == 0, 1, np.abs(gain)) * step).flatten()

        assert np.array_equal(integers(stored), codes * np.sign(gain).astype(int)), name
        assert (np.abs(found - expected) <= EPSILON * expected).all(), name
        axis = [attribute.i for attribute in node.attribute if attribute.name == "axis"]
        assert axis == ([layer.channel_dim] if found.ndim else [])
        zero = numpy_helper.to_array(known[node.input[2]]) if len(node.input) > 2 else np.int8(0)
        assert (zero == (128 if stored.data_type == UINT8 else 0)).all()
        assert zero.shape in ((), found.shape)
        truth = gain * step * codes
        mine = integers(stored) * found.astype(np.float64).reshape(shape if found.ndim else ())
        assert (np.abs(mine - truth) <= EPSILON * np.abs(truth)).all(), name


def test_stored_codes_match_the_quantizers(exported: tuple[Quantized, Path]) -> None:
    check_weights(*exported)


@pytest.mark.parametrize(
    ("name", "granularity", "grid"),
    sweep(
        itertools.product(("conv_bn", "residual", "depthwise"), ("channel", "tensor"), ("paper", "zero")),
        lambda *case: case[1:] == ("channel", "zero") or case == ("conv_bn", "tensor", "paper"),
    ),
)
def test_negative_and_zero_gains_are_folded(name: str, granularity: str, grid: str, tmp_path: Path) -> None:
    scheme = Scheme(weight_grid=grid, granularity=granularity)  # type: ignore[arg-type]

    def make() -> nn.Module:
        torch.manual_seed(3)
        return NETWORKS[name]()

    quantized = quantize(make, scheme=scheme)
    set_gains(quantized.model)
    path = export(quantized, "qdq", tmp_path / "model.onnx")
    graph = graph_of(path)
    kept = [node for node in graph.node if node.op_type == "BatchNormalization"]
    x = images(64, seed=6)

    if grid == "paper":  # symmetric: every code has a negative
        assert not kept
        check_weights(quantized, path)
    assert check_layers(path, frozen_copy(quantized.model), x[:8]).passed
    for optimized in (False, True):
        assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


@pytest.mark.parametrize("code", [-8, -7])
def test_norm_overflowing_int4_is_not_folded(code: int, tmp_path: Path) -> None:
    """-8 has no negative in INT4, and a larger container for one sign does not pay off."""
    quantized = quantize(lambda: nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten()),
                         lambda names: {n: LayerBits(weight=4, activation=8) for n in names},
                         Scheme(weight_grid="zero"))  # fmt: skip
    (layer,) = weights_of(quantized).values()
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    with torch.no_grad():
        weight = layer.latent_weight()
        weight.clamp_(-1, 1).mul_(quantizer.step() * 7)
        weight[0, 0] = code * quantizer.step()[0, 0]
    set_gains(quantized.model)
    path = export(quantized, "qdq", tmp_path / "model.onnx")
    graph = graph_of(path)
    ((_, codes),) = dequantized(graph)
    x = images(64, seed=6)

    assert codes.data_type == INT4
    assert ("BatchNormalization" in {node.op_type for node in graph.node}) == (code == -8)
    assert check_layers(path, frozen_copy(quantized.model), x[:8]).passed


def test_codes_use_the_smallest_container(exported: tuple[Quantized, Path]) -> None:
    """INT4 where the codes fit, packed two per byte; INT16 only for the paper's 8 bits."""
    _, path = exported
    for _, codes in dequantized(graph_of(path)):
        array = integers(codes)
        low, high = array.min(), array.max()
        expected = INT4 if low >= -8 and high <= 7 else INT8 if low >= -127 and high <= 127 else INT16
        assert codes.data_type == expected or (codes.data_type, expected) == (UINT8, INT8), codes.name
        assert codes.data_type != UINT8 or high > 64 or low < -64, "what cannot saturate stays INT8"
        if expected == INT4:
            assert len(codes.raw_data) == ceil(prod(codes.dims) / 2)


def test_float_bias_is_never_fused(exported: tuple[Quantized, Path]) -> None:
    """ONNX Runtime would round it; the integer bias of an integer layer is already rounded."""
    graph = graph_of(exported[1])
    made = producers(graph)
    behind = {node.output[0] for node, _ in dequantized(graph)}
    for node in graph.node:
        if node.op_type == "Transpose" and node.input[0] in behind:
            behind.add(node.output[0])
    multiplications = [n for n in graph.node if len(n.input) > 1 and n.input[1] in behind]

    assert multiplications
    for node in multiplications:
        assert node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
        for bias in filter(None, node.input[2:]):
            assert made[bias].op_type == "DequantizeLinear", node.name
            assert constants(graph)[made[bias].input[0]].data_type == onnx.TensorProto.INT32


@pytest.mark.parametrize("quantizer", ["clip", "lsq_plus"])
def test_integer_layer_has_integer_bias(quantizer: str, tmp_path: Path) -> None:
    """Rounded by half a unit at most; a layer without 8-bit output keeps its float bias."""
    quantized = quantize(NETWORKS["conv_bn"], same_bits(8), Scheme(quantizer=quantizer))
    path = export(quantized, "qdq", tmp_path / "model.onnx")
    graph = graph_of(path)
    known, made = constants(graph), producers(graph)
    found = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) > 2:
            bias = made[node.input[2]]
            codes, unit = (numpy_helper.to_array(known[name]).astype(np.float64) for name in bias.input[:2])
            weight, source = made[node.input[1]], made[node.input[0]]
            steps = [numpy_helper.to_array(known[each.input[1]]) for each in (weight, source)]
            assert np.allclose(unit, steps[0].astype(np.float64) * steps[1], rtol=2 * EPSILON, atol=0)
            found[told(weight)["saq.layer"]] = (codes * unit, unit)

    norms = norms_of(quantized.model)
    assert set(found) == {"0"}  # outputs of the others are reshaped or not quantized
    for name in found:
        norm = norms[name]
        values, unit = found[name]
        layer: Any = quantized.layers[name]
        shift = 0 if layer.bias is None else layer.bias.detach().double().numpy()
        mean, offset = (each.detach().double().numpy() for each in (norm.running_mean, norm.bias))
        exact = (shift - mean) * gain_of(norm) + offset
        assert (np.abs(values - exact) <= 0.5 * unit + 2 * EPSILON * np.abs(exact)).all()


def test_inputs_are_clipped_then_quantized(exported: tuple[Quantized, Path]) -> None:
    """ONNX Runtime refuses or miscomputes narrower containers; without the clip there would be too many codes."""
    quantized, path = exported
    graph = graph_of(path)
    known = constants(graph)
    made = producers(graph)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                known[node.output[0]] = attribute.t
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    layers = [layer for layer in quantized.layers.values() if isinstance(layer.input_quantizer, Quantizer)]
    if not isinstance(quantized.model, Bank):  # its layers share the quantized images
        assert len(quantizers) == len(layers)

    assert {known[n.input[2]].data_type for n in quantizers} <= {INT8, UINT8}
    assert not any(numpy_helper.to_array(known[n.input[2]]).any() for n in quantizers)
    full = {
        layer.input_quantizer.step().item()  # type: ignore[operator, union-attr]
        for layer in layers
        if layer.bits.activation == 8
    }
    for node in quantizers:
        step = numpy_helper.to_array(known[node.input[1]]).item()
        before = made.get(node.input[0])
        assert step in full or (before is not None and before.op_type == "Clip"), node.name


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("grid", sweep(["paper", "zero"], lambda grid: grid == "paper"))
def test_single_layer_matches_to_rounding(grid: str, optimized: bool, folder: Path) -> None:
    """Products of the same codes, summed in another order: each sum of K terms is within K + 2 roundings of the true
    one, times the sum of magnitudes; 2 for the steps and the bias."""
    quantized = network("bank", grid, "channel")
    path = written(folder, "qdq", quantized, f"bank-{grid}")
    x = images(16, seed=4)
    found = onnx_session(path, optimized=optimized)(x)
    expected = answer(quantized.model, x)
    assert found.shape == expected.shape

    assert isinstance(quantized.model, Bank)
    start = 0
    for name, branch in quantized.model.branches.items():
        (layer,) = quantized_layers(branch).values()
        bound, terms = magnitudes(branch, layer, x)
        width = bound.shape[1]
        difference = (found - expected)[:, start : start + width].abs().double()
        assert (difference <= 2 * (terms + 2) * EPSILON * bound).all(), name
        start += width
    assert start == expected.shape[1]


@torch.no_grad()
def magnitudes(branch: nn.Module, layer: QuantizedLayer, x: Tensor) -> tuple[Tensor, int]:
    """The sum of magnitudes of the terms of every output, in float64, and the largest number of terms."""
    seen: list[Tensor] = []
    hook = layer.input_quantizer.register_forward_hook(lambda module, args, output: seen.append(output))
    output = branch(x)
    hook.remove()
    weight, inputs = layer.quantized_weight().double().abs(), seen[0].double().abs()
    bias = None if layer.bias is None else layer.bias.double().abs()
    kind: Any = layer
    if isinstance(layer, nn.Linear):
        sums = nn.functional.linear(inputs, weight, bias)
    elif isinstance(layer, nn.Conv1d):
        sums = nn.functional.conv1d(inputs, weight, bias, kind.stride, kind.padding)
    elif isinstance(layer, nn.ConvTranspose2d):
        sums = nn.functional.conv_transpose2d(inputs, weight, bias, kind.stride, kind.padding)
    else:
        padding = "same" if getattr(kind, "same_pad", False) else kind.padding
        sums = nn.functional.conv2d(inputs, weight, bias, kind.stride, padding, kind.dilation, kind.groups)
    assert sums.shape == output.shape
    return sums.flatten(1), weight[0].numel() * (
        weight.shape[0] if isinstance(layer, nn.ConvTranspose2d) else 1
    )


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize(
    ("name", "grid"), sweep((pair for pair in EXPORTED if pair[0] != "bank"), first_of_all)
)
def test_deep_network_matches_the_model(name: str, grid: str, optimized: bool, folder: Path) -> None:
    """An activation on the edge of two codes may fall either way, hence no bound on the largest difference; the median
    image has none: its largest difference is that of a few thousand float32 roundings."""
    quantized = network(name, grid, "channel")
    path = written(folder, "qdq", quantized, f"{name}-{grid}")
    x = images(256, seed=6)
    truth = answer(quantized.model, x)
    found = onnx_session(path, optimized=optimized)(x)

    assert judge(truth, found).verified
    scale = float(truth.abs().max())
    assert float((truth - found).abs().amax(1).median()) <= 4096 * EPSILON * scale


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_per_tensor_step_is_exported(granularity: str, folder: Path) -> None:
    """A scalar, unless a norm was folded into it."""
    quantized = network("conv_bn", "auto", granularity)
    path = written(
        folder, "qdq", quantized, "conv_bn-auto" if granularity == "channel" else "conv_bn-auto-tensor"
    )
    graph = graph_of(path)
    x = images(64, seed=6)
    norms = norms_of(quantized.model)

    assert len(norms) == 2
    for node, codes in dequantized(graph):
        name = codes.name.removesuffix(".codes")
        dims = len(constants(graph)[node.input[1]].dims)
        assert dims == (1 if granularity == "channel" or name in norms else 0)
    for optimized in (False, True):
        assert judge(answer(quantized.model, x), onnx_session(path, optimized=optimized)(x)).verified


def test_batch_norms_are_folded(exported: tuple[Quantized, Path]) -> None:
    quantized, path = exported
    kinds = {node.op_type for node in graph_of(path).node}

    assert "BatchNormalization" not in kinds or not norms_of(quantized.model)
