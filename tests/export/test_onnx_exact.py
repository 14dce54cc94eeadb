"""Style exact: only nodes that every runtime computes alike, and codes in the smallest containers."""

from math import ceil, prod
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from saqcli.errors import UnsupportedModel
from saqcli.export import EXPORTERS
from saqcli.export.exact_form import ExactForm
from saqcli.export.operators import frozen_copy
from saqcli.quant.bits import LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.quantizers import Quantizer
from saqcli.verify.hazards import hazards
from saqcli.verify.runtime import onnx_session
from tests.support.networks import ALL_BITS, NETWORKS, images, quantize, same_bits
from tests.support.onnx_files import (
    INT4,
    INT8,
    INT16,
    UINT8,
    answer,
    constants,
    dequantized,
    export,
    graph_of,
    integers,
    network,
    producers,
    told,
    weights_of,
    written,
)
from tests.support.sweeps import sweep

# Operators whose result depends on summation order or on an approximation.
INEXACT = set(
    """
    BatchNormalization LayerNormalization GroupNormalization InstanceNormalization Softmax LogSoftmax Exp Log Erf
    Gelu Sigmoid Tanh HardSigmoid HardSwish Mish ReduceMean ReduceL2 AveragePool GlobalAveragePool
    Pow Resize Attention
    """.split()
)
EXPORTED = sweep(
    ((name, grid) for name in NETWORKS for grid in ("auto", "zero")),
    lambda name, grid: grid == "auto" and name in ("conv_bn", "attention", "standardized", "transposed"),
)


@pytest.mark.parametrize(("name", "grid"), EXPORTED)
def test_only_deterministic_operators_are_used(name: str, grid: str, folder: Path) -> None:
    graph = graph_of(written(folder, "exact", network(name, grid), f"{name}-{grid}"))

    assert not INEXACT & {node.op_type for node in graph.node}


@pytest.mark.parametrize(("name", "grid"), EXPORTED)
def test_products_are_integer_without_bias(name: str, grid: str, folder: Path) -> None:
    """Codes are dequantized with step 1; the steps are applied after the product."""
    graph = graph_of(written(folder, "exact", network(name, grid), f"{name}-{grid}"))
    made, known = producers(graph), constants(graph)
    count = 0
    for node in graph.node:
        source = made.get(node.input[0]) if node.input else None
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or source is None:
            continue
        if source.op_type == "DequantizeLinear":
            count += 1
            assert len([given for given in node.input if given]) == 2
            assert float(numpy_helper.to_array(known[source.input[1]])) == 1
    assert count >= len(weights_of(network(name, grid)))


@pytest.mark.parametrize(
    ("bits", "grid"),
    sweep(
        ((bits, grid) for bits in ALL_BITS for grid in ("paper", "zero")),
        lambda bits, grid: bits == 8 or (bits, grid) in ((4, "paper"), (2, "zero")),
    ),
)
def test_codes_use_the_smallest_container(bits: int, grid: str, folder: Path) -> None:
    """Odd codes up to 15 are stored as halves in INT4: code = 2 h + 1."""
    quantized = quantize(NETWORKS["conv_bn"], same_bits(bits), Scheme(weight_grid=grid))  # type: ignore[arg-type]
    graph = graph_of(written(folder, "exact", quantized, f"conv_bn-{bits}-{grid}"))
    known = constants(graph)
    readers = {name: node for node in graph.node for name in node.input}
    expected = INT16 if (bits, grid) == (8, "paper") else INT4 if bits <= 4 else INT8
    for node, stored in dequantized(graph):
        layer = weights_of(quantized)[told(node)["saq.layer"]]
        quantizer = layer.weight_quantizer
        assert isinstance(quantizer, Quantizer)
        codes = quantizer.codes(layer.effective_weight()).numpy()
        found = integers(stored) * numpy_helper.to_array(known[node.input[1]])
        if np.abs(codes).max() > 7 and expected == INT4 and grid == "paper":
            add = readers[node.output[0]]
            assert add.op_type == "Add"
            found = found + numpy_helper.to_array(known[add.input[1]])
        assert np.array_equal(found, codes)
        assert (
            stored.data_type == expected
            or np.abs(codes).max() <= 7
            or (stored.data_type == UINT8 and bits > 6)
        )
        if stored.data_type == INT4:
            assert len(stored.raw_data) == ceil(prod(stored.dims) / 2)


@pytest.mark.parametrize("case", ["weight", "activation"])
def test_float_convolution_operand_is_refused(case: str, tmp_path: Path) -> None:
    other = LayerBits(weight=4, activation=4)
    one = LayerBits(weight=None if case == "weight" else 4, activation=None if case == "activation" else 4)
    quantized = quantize(
        NETWORKS["conv_bn"],
        lambda names: {name: one if name == "3" else other for name in names},
    )
    with pytest.raises(UnsupportedModel, match="every convolution quantized") as refusal:
        export(quantized, "exact", tmp_path / "model.onnx")
    assert "choose another `style`" in str(refusal.value)
    assert case == "weight" or "and 3 is not" in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_operator_without_exact_form_is_named(tmp_path: Path) -> None:
    quantized = quantize(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(64, 5))
    )
    with pytest.raises(UnsupportedModel, match=r"softplus.*choose another `style`"):
        export(quantized, "exact", tmp_path / "model.onnx")


def test_largest_sums_are_reported() -> None:
    quantized = network("depthwise")
    form = ExactForm(frozen_copy(quantized.model), images(2))

    assert [each.layer for each in form.accumulators] == list(quantized.layers)
    assert all(each.largest > 0 and each.parts == 1 for each in form.accumulators)
    assert answer(form.eval(), images(3)).shape == (3, 5)


def test_wide_products_are_split_as_codes(tmp_path: Path) -> None:
    """8-bit sums over 4,608 inputs exceed 2^24: each part is a product of codes, no float is sliced (hazard H2)."""
    quantized = quantize(
        lambda: nn.Sequential(
            nn.Conv2d(3, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128 * 36, 5)
        ),
        same_bits(8),
    )
    path, x = tmp_path / "model.onnx", images(4)
    EXPORTERS["exact"]().export(quantized.model, x, path, quantized.facts)
    form = ExactForm(frozen_copy(quantized.model), x).eval()

    assert hazards(onnx.load(str(path))) == []
    assert form.accumulators[-1].parts == 3
    for optimized in (False, True):
        assert torch.equal(onnx_session(path, optimized=optimized)(x), form(x))
