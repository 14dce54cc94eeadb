"""Hard swish, SiLU and hard sigmoid in integer kernels: style ort writes them as sums and products of codes."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli as saq
from saqcli.api.files import metadata_of
from saqcli.export import STYLES
from saqcli.export.integer.gates import GatedJunction, rescale, split_gates, use_sums
from saqcli.export.operators import DOMAIN, frozen_copy
from saqcli.quant.junctions.quantized import QuantizedJunction, quantized_junctions
from saqcli.verify.kernels import Operator
from saqcli.verify.layerwise import check_layers, recorded
from saqcli.verify.runtime import open_file
from tests.support.networks import images, seeded

JUNCTIONS = ("mul", "pool", "sigmoid", "hardsigmoid", "hardswish", "silu")


class Gates(nn.Module):
    """Hard swish, also in place, SiLU, and a gate of hard sigmoid; gates reach 0 and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(inputs, 8, 3, padding=1) for inputs in (3, 8, 8))
        self.reduce, self.expand = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.swish, self.silu, self.gate = nn.Hardswish(inplace=True), nn.SiLU(), nn.Hardsigmoid()
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.silu(self.b(self.swish(self.a(x))))
        x = x * self.gate(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))
        logits: Tensor = self.head(F.hardswish(self.c(x)).mean((2, 3)))
        return logits


def quantized(bits: str, junctions: tuple[str, ...] = JUNCTIONS) -> nn.Module:
    with seeded(0):
        model = Gates().eval()
        for layer, scale in ((model.a, 6.0), (model.b, 6.0), (model.c, 20.0), (model.expand, 20.0)):
            layer.weight.data *= scale
    return saq.quantize_model(
        model,
        bits,
        calibration=[images(32, seed=1)],
        junctions=junctions,
        pins={"*": bits},
        weight_grid="zero",
    )


def kinds(path: Path) -> list[str]:
    operators: tuple[Operator, ...] = open_file(path).operators
    assert all(each.integer for each in operators), [each for each in operators if not each.integer]
    return [each.kind for each in operators]


@pytest.mark.parametrize("bits", ["w7a8", "w4a4"])
def test_gates_run_on_integers_and_are_proved(bits: str, tmp_path: Path) -> None:
    model, path = quantized(bits), tmp_path / "model.onnx"

    verdict = saq.export_onnx(model, path, "ort", verify=[images(16, seed=2)])

    found = kinds(path)
    assert found.count("QLinearAdd") == 3  # two hard swishes, one hard sigmoid
    assert found.count("QLinearSigmoid") == 1
    assert found.count("QLinearMul") == 4  # two hard swishes, one SiLU, one gate
    assert verdict.layerwise is not None
    assert verdict.layerwise.passed
    checked = {each.layer for each in verdict.layerwise.layers}
    assert {"swish.junctions.0.gate", "silu.junctions.0.gate"} <= checked
    assert not any(each.startswith("gate.") and each.endswith(".gate") for each in checked)
    if verdict.twin is not None and verdict.twin.skipped is None:
        assert verdict.twin.equal
    assert verdict.moved is not None
    assert 0 < verdict.moved.differing < 0.05 * verdict.moved.codes
    assert verdict.moved.largest == 1


def test_verdict_counts_codes_of_the_trained_model_only(tmp_path: Path) -> None:
    model, few = quantized("w7a8"), images(4, seed=2)

    verdict = saq.export_onnx(model, tmp_path / "model.onnx", "ort", verify=[few])

    frozen = frozen_copy(model)
    with recorded(frozen) as calls:
        frozen(few)
    assert verdict.moved is not None
    assert verdict.moved.codes == sum(call.codes.size for each in calls.values() for call in each)


def test_form_moves_a_product_by_half_a_step_of_its_gate() -> None:
    frozen = frozen_copy(quantized("w7a8"))
    before = dict(quantized_junctions(frozen))
    split_gates(frozen)
    after: dict[str, Any] = dict(quantized_junctions(frozen))

    changed = {name for name, each in after.items() if isinstance(each, GatedJunction)}
    assert changed == {name for name, each in before.items() if each.kind in ("hardswish", "silu")}
    for name in changed:
        junction: QuantizedJunction = before[name]
        operator = F.hardswish if junction.kind == "hardswish" else F.silu
        step = float(junction.operands[0].step)
        x = step * torch.arange(junction.operands[0].grid.lowest, junction.operands[0].grid.highest + 1.0)
        apart = after[name].run(operator, (x,), {}) - operator(x)
        assert (apart.abs() <= x.abs() / 510 + 1e-6).all()
        assert apart.any()
        place = x.clone()
        assert after[name].run(operator, (place,), {"inplace": True}) is place
        assert torch.equal(place - operator(x), apart)


def test_without_quantized_operands_nothing_changes() -> None:
    frozen = frozen_copy(quantized("w7a8", ("mul", "pool", "hardsigmoid")))
    x = images(4)
    before = frozen(x)

    assert torch.equal(split_gates(frozen)(x), before)
    assert not any(isinstance(each, GatedJunction) for each in frozen.modules())


@pytest.mark.parametrize("wrong", ["slope", "offset"])
def test_a_wrong_slope_or_offset_is_found(wrong: str, tmp_path: Path) -> None:
    model, style, path = quantized("w7a8"), STYLES["ort"](), tmp_path / "model.onnx"
    style.export(model, images(2), path, metadata_of(model))
    form = style.form(frozen_copy(model), images(2))
    assert check_layers(path, form, images(4), style.quantizers).passed

    file = onnx.load(str(path))
    suffix, factor = (".rescaled", 1.03) if wrong == "slope" else (".offset_step", 1.03)
    changed = [each for each in file.graph.initializer if each.name.endswith(suffix)]
    assert len(changed) == 3
    array = numpy_helper.to_array(changed[0])
    changed[0].CopyFrom(
        numpy_helper.from_array((array * np.float32(factor)).astype(np.float32), changed[0].name)
    )
    onnx.save(file, str(path))
    assert check_layers(path, form, images(4), style.quantizers).wrong


def hard_sigmoid(slope: float, offset: float, readers: int = 1, *, quantized: bool = True) -> ir.Graph:
    """x on a grid, or not, a HardSigmoid, and quantizers that read it."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 4]))

    def placeholder(value: ir.Value, step: float, layer: str) -> ir.Node:
        attributes = {"lowest": 0, "highest": 255, "bits": 8, "layer": layer}
        initializer = ir.Value(name=f"{layer}.step", const_value=ir.tensor(np.float32(step)))
        node = ir.node("QuantizeInput", [value, initializer], attributes=attributes, domain=DOMAIN)
        node.outputs[0].shape = value.shape
        return node

    nodes = [placeholder(x, 0.1, "a")] if quantized else []
    gate = ir.node(
        "HardSigmoid", [nodes[0].outputs[0] if nodes else x], attributes={"alpha": slope, "beta": offset}
    )
    after = [placeholder(gate.outputs[0], 1 / 200, f"b{k}") for k in range(readers)]
    outputs = [each.outputs[0] for each in after]
    return ir.Graph([x], outputs, nodes=[*nodes, gate, *after], opset_imports={"": 21}, name="graph")


def test_every_quantizer_of_a_hard_sigmoid_has_a_sum_of_its_own() -> None:
    graph = hard_sigmoid(0.2, 0.4, readers=2)

    use_sums(graph)

    assert [node.op_type for node in graph].count("HardSigmoid") == 0
    sums = [node for node in graph if node.op_type == "Add"]
    assert len(sums) == 2
    for total in sums:
        product, summand = (value.producer() for value in total.inputs if value is not None)
        assert product is not None
        assert summand is not None
        slope, one, step = (
            value.const_value.numpy()  # type: ignore[union-attr]
            for value in (product.inputs[1], *summand.inputs[:2])
        )
        assert slope == np.float32(0.2)
        assert one * step == np.float32(0.4)
        assert one.shape == (1, 1)  # of the rank of x


@pytest.mark.parametrize(
    ("slope", "offset", "given"), [(0.2, 0.0, True), (-0.2, 0.5, True), (0.2, 0.5, False)]
)
def test_other_hard_sigmoids_are_left(slope: float, offset: float, *, given: bool) -> None:
    graph = hard_sigmoid(slope, offset, quantized=given)
    before = [node.op_type for node in graph]

    use_sums(graph)
    rescale(graph)

    assert [node.op_type for node in graph] == before
