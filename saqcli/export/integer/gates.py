"""Gates in integers: hard swish, SiLU and hard sigmoid from operators that ONNX Runtime has integer kernels for.

    hardsigmoid(x) = clip(x / 6 + 1/2, 0, 1)
        codes of x -- DQ (a sixth of the step) -- Add(1/2) -- Q     one QLinearAdd, whose codes saturate
    hardswish(x) = x * hardsigmoid(x),  silu(x) = x * sigmoid(x)
        x -- gate -- Q (step 1/255) -- DQ -- Mul(x) -- Q            one QLinearAdd or QLinearSigmoid, one QLinearMul

A hard sigmoid has the codes that it has in PyTorch: rounding to a grid is monotone, so Q(clip(x)) = clip(Q(x)). The
gate inside a hard swish or SiLU is a tensor that the trained model does not round. Here it has 8 bits on 0 ... 1, which
moves the product by up to |x| / 510. As with biases (``bias``), the PyTorch model that a file is compared with has the
same rounding (``split_gates``), and the verdict says how many codes this moves.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.export.onnx_helpers import array_of, constant, consumers, placeholders, text
from saqcli.export.operators import FrozenInput, label
from saqcli.quant.grid import Grid
from saqcli.quant.junctions.kinds import taken_apart
from saqcli.quant.junctions.quantized import QuantizedJunction, quantized_junctions

GATES: dict[str, Callable[[Tensor], Tensor]] = {"hardswish": F.hardsigmoid, "silu": torch.sigmoid}  # by kind
BITS, HIGHEST = 8, 255  # of the codes of a gate; the highest is 1
GATE = "gate"  # last part of the name of its quantizer
_RESCALES = "saq.rescales"  # key in ``node.meta`` of a Mul that becomes another step of the codes before it


class GatedJunction(QuantizedJunction):
    """A frozen junction ``x * gate(x)`` whose gate is rounded.

    Attributes:
        gate: quantizer of the gate.
    """

    def __init__(self, junction: QuantizedJunction, gate: FrozenInput) -> None:
        super().__init__(junction.kind, junction.positions, junction.bits)
        self.operands, self.gate = junction.operands, gate
        self.tensors_read, self.requantizes = junction.tensors_read, junction.requantizes

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The product, on the quantized operand; one that writes to its operand still does."""
        joined = taken_apart(func, args, kwargs)
        (x,) = self(*joined.operands)
        result = x * self.gate(GATES[self.kind](x))
        return result if joined.target is None else joined.target.copy_(result)


def split_gates(frozen: nn.Module) -> nn.Module:
    """Round the gate of every hard swish and SiLU with a quantized operand, in place.

    Args:
        frozen: from ``frozen_copy``.

    Returns:
        ``frozen``.
    """
    for name, junction in quantized_junctions(frozen).items():
        operand = junction.operands[0]
        if junction.kind in GATES and isinstance(operand, FrozenInput) and isinstance(operand.grid, Grid):
            step = torch.tensor(1 / HIGHEST)
            gate = FrozenInput(Grid(0, HIGHEST, 1), BITS, step, f"{label(name)}.{GATE}")
            frozen.set_submodule(name, GatedJunction(junction, gate))
    return frozen


def use_sums(graph: ir.Graph) -> None:
    """Write hard sigmoids between quantizers as product, sum and Clip; ``narrow_ranges`` then removes the Clip.

    PyTorch's exporter always writes slope and offset, ``alpha`` and ``beta``.
    """
    quantizers = placeholders(graph, "QuantizeInput")
    for node in quantizers:
        gate = node.inputs[0].producer() if node.inputs[0] is not None else None
        if gate is None or gate.op_type != "HardSigmoid":
            continue
        x, layer = gate.inputs[0], text(node, "layer")
        slope, offset = (np.float32(gate.attributes[name].as_float()) for name in ("alpha", "beta"))
        if x is None or x.producer() not in quantizers or slope <= 0 or offset <= 0:
            continue
        # ONNX Runtime adds an operand of lower rank to (N, C, 1, 1) element by element
        one = np.ones([1] * (0 if x.shape is None else len(x.shape)), np.uint8)
        stored = {"offset": one, "offset_step": offset, "offset_zero": np.uint8(0)}
        ends = [constant(graph, f"{layer}.{end:g}", np.float32(end)) for end in (0.0, 1.0)]
        product = ir.node("Mul", [x, constant(graph, f"{layer}.slope", slope)])
        product.meta[_RESCALES] = True
        summand = ir.node("DequantizeLinear", [constant(graph, f"{layer}.{k}", v) for k, v in stored.items()])
        total = ir.node("Add", [product.outputs[0], summand.outputs[0]])
        limit = ir.node("Clip", [total.outputs[0], *ends])
        for each in (product, total, limit):
            each.outputs[0].type, each.outputs[0].shape = x.type, x.shape
        graph.insert_before(node, [product, summand, total, limit])
        node.replace_input_with(0, limit.outputs[0])
        if not consumers(gate.outputs[0]):
            graph.remove(gate, safe=True)


def rescale(graph: ir.Graph) -> None:
    """Read codes with another step in the place of the products above; to be called once placeholders were replaced."""
    for product in [node for node in graph if node.meta.get(_RESCALES)]:
        source = product.inputs[0].producer() if product.inputs[0] is not None else None
        assert source is not None
        assert source.op_type == "DequantizeLinear"
        codes, step, zero = source.inputs
        assert step is not None
        other = constant(graph, f"{step.name}.rescaled", array_of(step) * array_of(product.inputs[1]))
        values = ir.node("DequantizeLinear", [codes, other, zero])
        values.outputs[0].type, values.outputs[0].shape = product.outputs[0].type, product.outputs[0].shape
        values.meta.update(source.meta)
        graph.insert_before(product, values)
        product.outputs[0].replace_all_uses_with(values.outputs[0])
        graph.remove(product, safe=True)
