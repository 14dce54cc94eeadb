"""Style qonnx: IntQuant nodes with complete inputs, and a function that defines them."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from saqcli.export.operators import frozen_copy
from saqcli.export.qonnx import INT_QUANT, QONNX, QonnxExporter
from saqcli.quant.convert import Scheme
from saqcli.quant.quantizers import Quantizer
from saqcli.verify.layerwise import check_layers
from tests.support.networks import NETWORKS, images, quantize
from tests.support.onnx_files import constants, export, graph_of, network, told, weights_of, written
from tests.support.sweeps import sweep


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}


def int_quant(x: Any, scale: Any, zero: Any, bits: Any, signed: int, narrow: int) -> Any:
    """IntQuant as QONNX defines it, in float64."""
    if signed:
        lowest, highest = -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1
    else:
        lowest, highest = 0, 2**bits - 1 - narrow
    units = np.clip(np.float64(x) / np.float64(scale) + zero, lowest, highest)
    return (np.round(units) - zero) * scale


@pytest.mark.parametrize(
    ("name", "quantizer", "grid"),
    sweep(
        (
            (name, *scheme)
            for name in ("conv_bn", "token_mlp", "transposed")
            for scheme in (("clip", "paper"), ("lsq_plus", "zero"))
        ),
        lambda name, quantizer, grid: (quantizer == "clip") == (name == "conv_bn"),
    ),
)
def test_nodes_hold_true_bits_and_weights(name: str, grid: str, quantizer: str, tmp_path: Path) -> None:
    """The constant is unchanged by its quantizer, since it is already on the grid."""
    quantized = quantize(NETWORKS[name], scheme=Scheme(quantizer=quantizer, weight_grid=grid))  # type: ignore[arg-type]
    path = export(quantized, "qonnx", tmp_path / "model.onnx")
    graph = graph_of(path)
    known = {key: numpy_helper.to_array(value) for key, value in constants(graph).items()}
    nodes = [node for node in graph.node if node.op_type == INT_QUANT]
    layers = weights_of(quantized)
    policy = quantized.facts.policy.layers
    seen = set()
    for node in nodes:
        facts, given = told(node), attributes(node)
        scale, zero, bits = (known[name] for name in node.input[1:])
        layer = facts["saq.layer"]
        assert node.domain == QONNX
        assert given["rounding_mode"] == b"ROUND"
        if facts["saq.operand"] == "input":
            assert bits == policy[layer].activation
            continue
        seen.add(layer)
        assert bits == policy[layer].weight
        assert given["signed"] == 1
        weight = known[node.input[0]]
        quantizer_ = layers[layer].weight_quantizer
        assert isinstance(quantizer_, Quantizer)
        truth = layers[layer].quantized_weight().detach().numpy()
        assert np.array_equal(weight, truth)
        mine = int_quant(weight, scale, zero, bits, given["signed"], given["narrow"])
        assert (np.abs(mine - truth) <= 1e-6 * np.abs(truth)).all()
    assert seen == set(layers)
    frozen = frozen_copy(quantized.model)
    assert check_layers(path, frozen, images(8, seed=5), QonnxExporter.quantizers).passed


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("narrow", [0, 1])
@pytest.mark.parametrize("zero", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_embedded_function_matches_the_standard(
    bits: int, zero: float, narrow: int, signed: int, folder: Path
) -> None:
    """Away from rounding edges, where the order of operations shows only in the last bit."""
    import onnxruntime as ort

    model = onnx.load(str(written(folder, "qonnx", network("conv_bn"), "conv_bn-auto")))
    scale = 0.375
    x = (np.random.default_rng(bits).integers(-300, 300, 500) + 0.3).astype(np.float32) * np.float32(scale)
    node = helper.make_node(
        INT_QUANT,
        ["x", "s", "z", "b"],
        ["y"],
        domain=QONNX,
        signed=signed,
        narrow=narrow,
        rounding_mode="ROUND",
    )
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", kind, [500])],
        [helper.make_tensor_value_info("y", kind, [500])],
        [
            numpy_helper.from_array(np.float32(value), key)
            for key, value in (("s", scale), ("z", zero), ("b", bits))
        ],
    )
    one = helper.make_model(
        graph, functions=list(model.functions), opset_imports=list(model.opset_import), ir_version=10
    )
    session = ort.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})

    assert np.allclose(found, int_quant(x, scale, zero, bits, signed, narrow), rtol=1e-6, atol=1e-6)


def test_paper_grid_has_zero_point_half(tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], scheme=Scheme(weight_grid="paper"))
    graph = graph_of(export(quantized, "qonnx", tmp_path / "model.onnx"))
    known = constants(graph)
    points = {
        float(numpy_helper.to_array(known[node.input[2]]))
        for node in graph.node
        if node.op_type == INT_QUANT and told(node)["saq.operand"] == "weight"
    }

    assert points == {-0.5}
