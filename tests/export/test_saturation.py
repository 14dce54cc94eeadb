"""8-bit files are correct on processors that add product pairs in 16 bits, simulated in numpy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper
from torch import nn

from saqcli.export.onnx_helpers import may_saturate
from saqcli.export.operators import frozen_copy
from saqcli.verify.hazards import hazards
from saqcli.verify.layerwise import check_layers
from saqcli.verify.runtime import INTEGER_KERNELS, onnx_session
from tests.support.networks import NETWORKS, Quantized, attention, images, quantize, same_bits
from tests.support.onnx_files import INT8, dequantized, export, graph_of


def pairwise_sum(inputs: Any, weights: Any) -> int:
    """A sum of products as VPMADDUBSW computes it: neighbours are added in 16 bits with saturation."""
    products = inputs.astype(np.int64) * weights.astype(np.int64)
    products = np.append(products, np.zeros(len(products) % 2, np.int64)).reshape(-1, 2)
    return int(products.sum(1).clip(-(2**15), 2**15 - 1).sum())


def worst_error(weights: Any) -> int:
    """The largest error of such a sum over a row of (outputs, K), for any inputs and order."""
    error = 0
    for row in weights.astype(np.int64):
        for sign in (1, -1):
            order = np.argsort(-sign * row)
            inputs = np.where(sign * row[order] > 0, 255, 0)
            true = int((inputs * row[order]).sum())
            error = max(error, abs(pairwise_sum(inputs, row[order]) - true))
    return error


def integer_weights(path: Path, tmp_path: Path) -> dict[str, Any]:
    """Constant weights, (outputs, K), and zero points of every integer kernel of ONNX Runtime."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    known = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type in INTEGER_KERNELS:
            place = 1 if node.op_type == "MatMulIntegerToFloat" else 3
            weight = known[node.input[place]]
            by_output = weight if node.op_type == "QLinearConv" else weight.T
            found[node.name or node.output[0]] = by_output.reshape(len(by_output), -1)
    return found


@given(st.lists(st.lists(st.integers(-128, 127), min_size=3, max_size=3), min_size=1, max_size=3))
def test_saturation_check_is_exact(rows: list[list[int]]) -> None:
    codes = np.array(rows, np.int8)

    assert (worst_error(codes) > 0) == may_saturate(codes, 0)
    assert may_saturate(codes.T, 1) == may_saturate(codes, 0)


def test_saturation_halves_the_largest_sum() -> None:
    """64 products of 255 and 127: each pair gives 32767 instead of 64770."""
    inputs, weights = np.full(64, 255), np.full(64, 127)

    assert int((inputs * weights).sum()) == 32 * 64770
    assert pairwise_sum(inputs, weights) == 32 * 32767


def chain() -> nn.Module:
    """Layers with ReLUs between, so that ONNX Runtime uses integers: dense, grouped, depthwise, linear."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 16), nn.ReLU()),
        *(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)),
    )


CHAINS: dict[str, Callable[[], nn.Module]] = {"chain": chain, **NETWORKS}


def spread(quantized: Quantized) -> Quantized:
    """The same network with extreme codes in every weight, as in trained networks."""
    with torch.no_grad():
        for layer in quantized.layers.values():
            if type(layer.weight_quantizer).__name__ != "Identity":
                layer.latent_weight().mul_(4)
    return quantized


@pytest.fixture(params=CHAINS)
def at_eight_bits(request: pytest.FixtureRequest) -> Quantized:
    return spread(quantize(CHAINS[request.param], same_bits(8)))


@pytest.mark.parametrize("style", ["qdq", "exact"])
def test_exported_layers_cannot_saturate(at_eight_bits: Quantized, style: str, tmp_path: Path) -> None:
    path = export(at_eight_bits, style, tmp_path / "model.onnx")

    weights = integer_weights(path, tmp_path)
    errors = {name: worst_error(codes) for name, codes in weights.items() if codes.dtype == np.int8}

    assert not any(errors.values())
    assert not hazards(onnx.load(str(path)))


def test_int8_weights_saturate_and_are_named(tmp_path: Path) -> None:
    """Control: the same network with INT8 weights is wrong without VNNI, in all layers but one."""
    path = export(spread(quantize(chain, same_bits(8))), "qdq-vnni", tmp_path / "model.onnx")

    weights = integer_weights(path, tmp_path)

    assert len(weights) >= 2
    assert all(codes.dtype == np.int8 and worst_error(codes) > 0 for codes in weights.values())
    assert {hazard.code for hazard in hazards(onnx.load(str(path)))} == {"H9"}
    assert len(hazards(onnx.load(str(path)))) == 6


def test_qdq_and_vnni_forms_agree(tmp_path: Path) -> None:
    quantized = spread(quantize(chain, same_bits(8)))
    x = images(16, seed=3)

    answers = [
        onnx_session(export(quantized, style, tmp_path / f"{style}.onnx"), optimized=False)(x)
        for style in ("qdq", "qdq-vnni")
    ]

    assert torch.equal(*answers)


def test_few_bits_keep_int8_containers(tmp_path: Path) -> None:
    """Two codes of the paper's 6-bit grid sum to 126 at most, which 16 bits hold."""
    path = export(spread(quantize(chain, same_bits(6))), "qdq", tmp_path / "model.onnx")

    assert {stored.data_type for _, stored in dequantized(graph_of(path))} == {INT8}


def test_activation_products_use_unsigned_codes(tmp_path: Path) -> None:
    quantized = quantize(attention, same_bits(8), products=True)
    safe, fast = (export(quantized, style, tmp_path / f"{style}.onnx") for style in ("qdq", "qdq-vnni"))

    assert not hazards(onnx.load(str(safe)))
    assert any("matmul" in hazard.node for hazard in hazards(onnx.load(str(fast))))
    assert check_layers(safe, frozen_copy(quantized.model), images(4)).passed
