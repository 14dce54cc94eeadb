"""Powers of two, split grids, and the choice among grids."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

import saqcli
from saqcli.errors import UnsupportedModel
from saqcli.export import onnx_helpers
from saqcli.quant.clip_init import best_level, squared_error
from saqcli.quant.grid import Grid, LevelTable, activations
from saqcli.quant.quantizers import QUANTIZERS
from saqcli.quant.quantizers.levels import (
    AdaptiveActivation,
    family,
    powers_of_two,
    split_at_a_point,
    split_at_zero,
)
from saqcli.verify.runtime import onnx_session
from tests.support.networks import NETWORKS, images
from tests.support.sweeps import sweep

BITS = range(2, 9)


def fitted(x: Tensor, bits: int) -> AdaptiveActivation:
    signed = bool((x < 0).any())
    quantizer = AdaptiveActivation({bits: activations(bits, signed=signed)})
    quantizer.fit(x)
    return quantizer


def probabilities() -> Tensor:
    return (4 * torch.randn(256, 65, generator=torch.Generator().manual_seed(0))).softmax(-1).flatten()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [False, True])
def test_families_are_grids_of_these_bits(bits: int, signed: bool) -> None:
    grids = family(bits, signed=signed)
    assert grids[0] == activations(bits, signed=signed)
    assert len(set(grids)) == len(grids)
    for grid in grids:
        assert grid.levels <= 2**bits
        assert grid.has_zero
        assert grid.lowest < 0 if signed else grid.lowest == 0


def test_tables_are_those_of_the_docstring() -> None:
    assert powers_of_two(3, signed=False).codes == (0, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 2**-1, 1)
    assert powers_of_two(3, signed=True).codes == (-1, -0.5, -0.25, 0, 0.25, 0.5, 1)
    assert split_at_a_point(3, 2).codes == (0, 0.5, 1, 1.5, 2, 3, 4, 5)
    assert split_at_zero(3, 4, 0.25).codes == (-1, -0.75, -0.5, -0.25, 0, 1, 2, 3)


@torch.no_grad()
def test_choice_has_the_least_error_by_brute_force() -> None:
    x = probabilities()[:4096]
    quantizer = fitted(x, 4)
    errors = {grid: float(squared_error(x, best_level(x, grid), grid)) for grid in family(4, signed=False)}
    assert quantizer.grid() == min(errors, key=errors.__getitem__)
    assert float((quantizer(x) - x).square().sum()) == pytest.approx(min(errors.values()), rel=1e-4)


@pytest.mark.parametrize(
    ("values", "kind"),
    [(torch.rand(4096), Grid), (torch.rand(4096) - 0.1, Grid), (probabilities(), LevelTable)],
    ids=["uniform", "offset", "softmax"],
)
@pytest.mark.parametrize("bits", [3, 4, 8])
@torch.no_grad()
def test_tables_are_taken_only_where_they_gain(values: Tensor, kind: type, bits: int) -> None:
    quantizer, plain = fitted(values, bits), activations(bits, signed=bool((values < 0).any()))
    error = float((quantizer(values) - values).square().sum())
    assert isinstance(quantizer.grid(), kind)
    assert error <= float(squared_error(values, best_level(values, plain), plain)) * (1 + 1e-6)


@torch.no_grad()
def test_gelu_needs_fewer_negative_codes() -> None:
    x = torch.nn.functional.gelu(torch.randn(20_000, generator=torch.Generator().manual_seed(0)))
    quantizer, plain = fitted(x, 4), activations(4, signed=True)
    error = float((quantizer(x) - x).square().sum())
    assert error < 0.5 * float(squared_error(x, best_level(x, plain), plain))


def test_state_keeps_the_choice() -> None:
    quantizer = fitted(probabilities(), 4)
    other = AdaptiveActivation({4: activations(4, signed=False)})
    other.load_state_dict(quantizer.state_dict())
    assert other.grid() == quantizer.grid() != other.grids[4]
    with pytest.raises(RuntimeError, match="choice is no grid of the quantizer adaptive"):
        other.load_state_dict(quantizer.state_dict() | {"choice": torch.tensor([99])})


def quantized(net: str, quantizer: str) -> Any:
    torch.manual_seed(0)
    return saqcli.quantize_model(
        NETWORKS[net]().eval(),
        "w4a4",
        calibration=[images(16)],
        weight_quantizer="asymmetric",
        activation_quantizer=quantizer,
        quantize_attention=True,
        pins={"*": "4"},
    )


@pytest.mark.parametrize(
    ("style", "net"),
    sweep(
        [(style, net) for net in ("token_mlp", "attention") for style in ("qdq", "exact")],
        lambda style, net: net == "token_mlp",
    ),
)
def test_tables_are_exported_and_proved(style: str, net: str, tmp_path: Path) -> None:
    """Beside asymmetric weights; with attention also operands of products."""
    model, path, x = quantized(net, "log2"), tmp_path / "model.onnx", images(8, seed=3)
    verdict = saqcli.export_onnx(model, path, style=style)
    assert verdict.verified
    assert style != "exact" or verdict.max_abs_diff == 0.0
    graph = onnx.load(str(path)).graph
    marked = [
        node for node in graph.node if any(each.key == onnx_helpers.LEVELS for each in node.metadata_props)
    ]
    assert len(marked) >= (2 if net == "token_mlp" else 3)
    assert {node.op_type for node in marked} == {"Where"}
    if style == "qdq":
        with torch.no_grad():
            assert torch.allclose(onnx_session(path, optimized=True)(x), model(x), atol=1e-5)


def test_search_in_the_graph_is_the_nearest_level() -> None:
    """Every edge, the numbers next to it, and values beyond both ends."""
    import onnx_ir as ir
    import onnxruntime as ort

    table, step = powers_of_two(4, signed=True, density=2), np.float32(0.3)
    edges = table.edges(torch.zeros(1)).numpy() * step
    x = np.concatenate(
        [np.nextafter(edges, side) for side in np.float32([-9, 9])] + [edges, np.float32([-9, 0, 9])]
    )
    images_in = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([len(x)]))
    graph = ir.Graph([images_in], [], nodes=[], opset_imports={"": 21}, name="g")
    constants = [
        onnx_helpers.constant(graph, name, value)
        for name, value in (("step", step), ("levels", np.array(table.codes, np.float32)))
    ]
    node = ir.node("InputOnLevels", [images_in, *constants], {"bits": 4, "layer": "l"}, domain="saq")
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    onnx_helpers.lower(graph, "InputOnLevels", onnx_helpers.on_levels)
    graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model = ir.to_proto(ir.Model(graph, ir_version=10))
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    scaled = torch.from_numpy(x) / torch.tensor(step)
    assert np.array_equal(found, (table.nearest(scaled) * torch.tensor(step)).numpy())


@pytest.mark.parametrize("style", sweep(["trt", "qonnx"], lambda style: style == "trt"))
def test_other_styles_refuse_tables(style: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=f"style {style} has uniform grids only.*choose `style=qdq`"):
        saqcli.export_onnx(quantized("token_mlp", "log2"), tmp_path / "model.onnx", style=style)


def test_exact_refuses_tables_of_convolutions(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="its weights and inputs on uniform grids"):
        saqcli.export_onnx(quantized("conv_bn", "log2"), tmp_path / "model.onnx", style="exact")


def test_both_are_for_inputs_only() -> None:
    assert all(QUANTIZERS[name].weight is None for name in ("log2", "adaptive"))
