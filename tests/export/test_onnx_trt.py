"""Style trt: INT8 throughout, zero points of 0, and grids that do not fit are shifted and corrected."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from saqcli.errors import UnsupportedModel
from saqcli.export import EXPORTERS
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import onnx_session
from tests.support.networks import CHANNELS, NETWORKS, Quantized, images, quantize, same_bits
from tests.support.onnx_files import (
    EPSILON,
    INT8,
    constants,
    dequantized,
    export,
    graph_of,
    network,
    told,
    written,
)
from tests.support.sweeps import sweep

# One layer each, read with unsigned codes up to 255: padding, strides, groups, dilation, and none of it.
MOVED = {
    "padded": lambda: nn.Conv2d(CHANNELS, 4, 3, padding=1),
    "uneven_padding": lambda: nn.Conv2d(CHANNELS, 4, (3, 5), padding=(1, 2), stride=2),
    "same": lambda: nn.Conv2d(CHANNELS, 4, 3, padding="same", dilation=2),
    "depthwise": lambda: nn.Conv2d(CHANNELS, 6, 3, padding=1, groups=CHANNELS, bias=False),
    "pointwise": lambda: nn.Conv2d(CHANNELS, 4, 1),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 4, 3, stride=2, padding=1),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 5)),
}


@pytest.mark.parametrize(
    ("name", "quantizer", "grid"),
    sweep(
        (
            (name, *scheme)
            for name in ("conv_bn", "depthwise", "token_mlp", "attention", "transposed")
            for scheme in (("clip", "auto"), ("lsq_plus", "zero"))
        ),
        lambda name, quantizer, grid: name != "token_mlp" and (quantizer == "clip") == (name == "conv_bn"),
    ),
)
def test_every_quantizer_is_symmetric_int8(name: str, quantizer: str, grid: str, tmp_path: Path) -> None:
    scheme = Scheme(quantizer=quantizer, weight_grid=grid)  # type: ignore[arg-type]
    quantized = quantize(NETWORKS[name], scheme=scheme)
    path = export(quantized, "trt", tmp_path / "model.onnx")
    graph = graph_of(path)
    known = constants(graph)

    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = known[node.input[2]]
            assert zero.data_type == INT8
            assert not numpy_helper.to_array(zero).any()
    assert {codes.data_type for _, codes in dequantized(graph)} == {INT8}
    assert check_layers(path, frozen_copy(quantized.model), images(8, seed=5)).passed


def moved(kind: str, quantizer: str) -> Quantized:
    """One layer whose input is quantized on a grid outside INT8."""
    quantized = quantize(
        lambda: nn.Sequential(nn.ReLU(), MOVED[kind](), nn.Flatten()),
        same_bits(8),
        Scheme(quantizer=quantizer),
    )
    (layer,) = quantized.layers.values()
    assert layer.input_quantizer.grid().highest > 127  # type: ignore[operator, union-attr]
    return quantized


@pytest.mark.parametrize(
    ("kind", "quantizer"),
    sweep(
        ((kind, quantizer) for kind in MOVED for quantizer in ("clip", "lsq_plus")),
        lambda kind, quantizer: quantizer == "lsq_plus" or kind == "padded",
    ),
)
def test_offset_is_corrected_after_the_layer(kind: str, quantizer: str, tmp_path: Path) -> None:
    """One layer on inputs that lie on the grid, so no code can flip: only sums are rounded."""
    quantized = moved(kind, quantizer)
    path = export(quantized, "trt", tmp_path / "model.onnx")
    (layer,) = quantized.layers.values()
    with torch.no_grad():
        x = layer.input_quantizer(images(16, seed=4).relu())
        expected = quantized.model.double()(x.double())
    quantized.model.float()
    step, weight = layer.input_quantizer.step().item(), layer.quantized_weight().detach()  # type: ignore[operator]
    terms = weight[0].numel() * (weight.shape[0] if kind == "transposed" else 1)
    largest = 255 * step * float(weight.abs().max())

    for optimized in (False, True):
        found = onnx_session(path, optimized=optimized)(x)
        assert np.abs((found - expected).numpy()).max() <= 2 * (terms + 4) * EPSILON * terms * largest


def test_padding_precedes_the_offset(tmp_path: Path) -> None:
    graph = graph_of(export(moved("padded", "clip"), "trt", tmp_path / "model.onnx"))
    kinds = [node.op_type for node in graph.node]
    pads = [list(a.ints) for node in graph.node for a in node.attribute if a.name == "pads"]

    assert kinds.index("Pad") < kinds.index("Sub") < kinds.index("QuantizeLinear") < kinds.index("Conv")
    assert pads == [[0, 0, 0, 0]]
    (codes,) = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert told(codes)["saq.zero"] == "-128"
    assert told(codes)["saq.pads"] == "0,0,1,1,0,0,1,1"


def test_unsigned_codes_up_to_127_are_kept(folder: Path) -> None:
    quantized = quantize(
        NETWORKS["depthwise"],
        lambda names: {name: LayerBits(weight=4, activation=7 if k else 8) for k, name in enumerate(names)},
    )
    graph = graph_of(written(folder, "trt", quantized, "depthwise-7"))

    assert not {"Sub", "Pad"} & {node.op_type for node in graph.node}


def test_weights_beyond_int8_are_refused(tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], same_bits(8), Scheme(weight_grid="paper"))
    with pytest.raises(
        UnsupportedModel, match=r"codes of 0 reach 2[0-9][0-9].*`quantization.weight_grid=auto`"
    ):
        EXPORTERS["trt"]().export(quantized.model, images(2), tmp_path / "model.onnx", quantized.facts)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["conv_bn", "depthwise"])
def test_batch_norms_are_folded(name: str, folder: Path) -> None:
    model = onnx.load(str(written(folder, "trt", network(name), f"{name}-auto")))

    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
