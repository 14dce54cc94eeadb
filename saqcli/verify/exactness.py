"""Exact by construction: the places of a graph where float32 arithmetic may depend on who computes it.

With short steps (``quant.short_steps``) every value between a quantizer and the next is a whole number of some power of
two. Here each tensor of an exported graph gets

    unit        a power of two that divides all of its values, by channel
    low, high   bounds of its values, from the codes of its quantizers and the weights of its layers

and a sum is exact, in any order and with any fused operations, if no partial sum can exceed 2**24 units. The worst case
is taken: all positive products, or all negative ones. A value without a unit is *settled* if it comes from exact ones
by single IEEE operations, such as the division of a quantizer: it has the same bits everywhere too, and may be rounded
to codes, but not summed.

A graph without any such place gives the same bits in every runtime that computes float32 as IEEE 754 says and does not
replace a division by a product. Runtimes that do (OpenVINO's quantizers) may round a value on the edge between two
codes to the other one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from saqcli.export.onnx_helpers import LAYER

LARGEST = 2.0**24  # units of an exact float32 sum
_KEEP = ("Identity", "Dropout", "Relu", "Clip", "Min", "Max", "MaxPool", "Pad", "Cast")
_RESHAPE = (
    *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand"),
    *("DepthToSpace", "SpaceToDepth", "Tile"),
)
_MEANS = ("GlobalAveragePool", "AveragePool", "ReduceMean")


@dataclass(frozen=True)
class Inexact:
    """A place where results may depend on the runtime.

    Attributes:
        layer: the layer there, or the last one on the way there; empty before the first.
        node: name of the node.
        reason: what is wrong, as the end of a sentence.
    """

    layer: str
    node: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer or self.node}: {self.reason}"


@dataclass(frozen=True)
class _Values:
    """What is known of a tensor.

    Attributes:
        unit: divides all values, (channels,) or (); None if unknown.
        low: lower bound, in the same shape.
        high: upper bound, in the same shape.
        settled: whether its bits are the same everywhere.
        product: whether it comes from products by additions only, into which a runtime may fuse another one.
        axis: dimension of the channels; None for values of the whole tensor.
        layer: the last layer on the way here.
        codes: whether it comes straight from a quantizer.
    """

    unit: Any
    low: Any
    high: Any
    settled: bool = True
    product: bool = False
    axis: int | None = None
    layer: str = ""
    codes: bool = False

    def whole(self) -> "_Values":
        """The same for all channels together."""
        unit = None if self.unit is None else np.min(self.unit)
        return replace(self, unit=unit, low=np.min(self.low), high=np.max(self.high), axis=None)


def inexact_places(model: onnx.ModelProto) -> list[Inexact]:
    """The places of a graph that keep it from being exact by construction, in its order; none if it is."""
    return _Walk(model).places


class _Walk:
    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.places: list[Inexact] = []
        self.constants: dict[str, Any] = {each.name: _array(each) for each in graph.initializer}
        self.layers: dict[str, str] = {}  # of constants behind DequantizeLinear
        self.known: dict[str, _Values] = {}
        self.readers: dict[str, list[Any]] = {}
        self.shapes = _shapes(model)
        self.quantizers: dict[str, tuple[float, Any, _Values]] = {}  # step, zero, input of QuantizeLinear
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        for value in graph.input:
            self.known[value.name] = _Values(None, np.float64(-np.inf), np.float64(np.inf))
        for node in graph.node:
            self._visit(node)

    def _visit(self, node: Any) -> None:
        if node.op_type == "Constant":
            found = [each.t for each in node.attribute if each.name == "value"]
            self.constants[node.output[0]] = _array(found[0]) if found else None
            return
        inputs = [name for name in node.input if name]
        if all(name in self.constants for name in inputs):
            self._fold(node)
            return
        if not any(name in self.known or name in self.quantizers for name in inputs):
            return  # of shapes
        rule: Callable[[Any], _Values | None] | None = getattr(self, f"_{node.op_type.lower()}", None)
        if rule is None and node.op_type in _KEEP:
            rule = self._keep
        elif rule is None and node.op_type in _RESHAPE:
            rule = self._reshape
        elif rule is None and node.op_type in _MEANS:
            rule = self._mean
        values = rule(node) if rule else self._other(node)
        if values is not None:
            self._check_kernel(node, values)
            for name in node.output:
                self.known[name] = values

    def _fold(self, node: Any) -> None:
        """Constants computed from constants: those that weights need; others are unknown."""
        arrays = [self.constants.get(name) if name else None for name in node.input]
        layer = next((each.value for each in node.metadata_props if each.key == LAYER), "")
        layer = layer or next((self.layers[name] for name in node.input if name in self.layers), "")
        result: Any = None
        if arrays and arrays[0] is not None:
            if node.op_type == "DequantizeLinear":
                result = _dequantized(node, arrays)
            elif node.op_type == "Transpose":
                result = np.transpose(arrays[0], _attribute(node, "perm"))
            elif node.op_type in ("Mul", "Add") and arrays[1] is not None:
                both = [np.asarray(each, np.float32) for each in arrays[:2]]
                result = both[0] * both[1] if node.op_type == "Mul" else both[0] + both[1]
            elif node.op_type == "Reshape" and arrays[1] is not None:
                result = np.reshape(arrays[0], arrays[1])
            elif node.op_type in ("Identity", "Cast"):
                result = arrays[0]
        for name in node.output:
            self.constants[name], self.layers[name] = result, layer

    def _report(self, node: Any, layer: str, reason: str) -> None:
        self.places.append(Inexact(layer, node.name or node.output[0], reason))

    def _of(self, name: str) -> _Values:
        return self.known.get(name, _Values(None, np.float64(-np.inf), np.float64(np.inf), settled=False))

    def _check_kernel(self, node: Any, values: _Values) -> None:
        """Operators between two quantizers run on integers, with a rescaling that is rounded."""
        makes = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Mul", *_MEANS)
        inside = [self.known[name] for name in node.input if name in self.known]
        if makes and all(each.codes for each in inside) and self._quantized_next(node.output[0]):
            self._report(
                node, values.layer, "it runs in an integer kernel, whose results are rescaled by a product"
            )

    def _quantized_next(self, name: str) -> bool:
        readers = self.readers.get(name, [])
        if len(readers) != 1:
            return False
        if readers[0].op_type == "Relu":
            return self._quantized_next(readers[0].output[0])
        return bool(readers[0].op_type == "QuantizeLinear")

    # --- Quantizers.

    def _quantizelinear(self, node: Any) -> None:
        step = self.constants.get(node.input[1])
        zero = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        if step is None or np.size(step) != 1:
            self._report(node, self._of(node.input[0]).layer, "its quantizer has no constant step")
            return
        zero = np.asarray(0, np.uint8) if zero is None else zero
        self.quantizers[node.output[0]] = float(np.reshape(step, ())), zero, self._of(node.input[0])

    def _dequantizelinear(self, node: Any) -> _Values | None:
        found = self.quantizers.get(node.input[0])
        step = self.constants.get(node.input[1])
        if found is None or step is None or np.size(step) != 1:
            return _Values(None, np.float64(-np.inf), np.float64(np.inf), settled=False)
        own, zero, x = found
        step, ends = float(np.reshape(step, ())), _ends(zero.dtype)
        offset = float(np.reshape(zero, ()).astype(np.float64))
        lowest, highest = (
            np.clip(np.round(end / own) if np.isfinite(end) else end, ends[0] - offset, ends[1] - offset)
            for end in (float(np.min(x.low)), float(np.max(x.high)))
        )
        unit = np.float64(_lowest_bits(np.array([step]))[0])
        return _Values(unit, np.float64(lowest * step), np.float64(highest * step), codes=True, layer=x.layer)

    # --- Products.

    def _conv(self, node: Any) -> _Values:
        weight = self.constants.get(node.input[1])
        groups = int(_attribute(node, "group") or 1)
        if weight is None:
            return self._other(node)
        if node.op_type == "ConvTranspose":  # (in, out / groups, ...) to (out, in / groups, ...)
            inputs, outputs, *kernel = weight.shape
            weight = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
            weight = weight.reshape(groups * outputs, inputs // groups, *kernel)
        weight = weight.reshape(*weight.shape[:2], -1)
        return self._product(node, weight, groups, axis=1)

    _convtranspose = _conv

    def _gemm(self, node: Any) -> _Values:
        weight = self.constants.get(node.input[1])
        plain = all(_attribute(node, name) in (None, 1.0) for name in ("alpha", "beta"))
        if weight is None or not plain or _attribute(node, "transA"):
            return self._other(node)
        weight = weight if _attribute(node, "transB") else weight.T
        return self._product(node, weight[:, :, None], 1, axis=-1)

    def _matmul(self, node: Any) -> _Values:
        weight = self.constants.get(node.input[1])
        if weight is None or weight.ndim != 2:
            return self._other(node, "a product of two activations")
        return self._product(node, weight.T[:, :, None], 1, axis=-1)

    def _product(self, node: Any, weight: Any, groups: int, axis: int) -> _Values:
        """The sums of products with ``weight``, (out, in / groups, kernel)."""
        x, layer = self._of(node.input[0]), self.layers.get(node.input[1], "")
        weight = weight.astype(np.float64)
        layer = layer or x.layer
        if x.unit is None:
            self._report(node, layer, "its input is not quantized")
            return _unknown(layer)
        inputs = weight.shape[1] * groups
        x = x if x.axis == axis and np.size(x.unit) == inputs else x.whole()
        low, high, unit = (
            _by_output(each, inputs, groups, len(weight))[:, :, None] for each in (x.low, x.high, x.unit)
        )
        ends = weight * low, weight * high
        above, below = np.maximum(*ends), np.minimum(*ends)
        high = above.clip(min=0).sum((1, 2))
        low = below.clip(max=0).sum((1, 2))
        units = np.where(weight != 0, _lowest_bits(weight) * unit, np.inf).min((1, 2))
        bias = self.constants.get(node.input[2]) if len(node.input) > 2 else None
        if len(node.input) > 2 and node.input[2] and bias is None:
            return self._other(node)
        if bias is not None:
            bias = np.broadcast_to(np.asarray(bias, np.float64).reshape(-1), units.shape)
            high, low = high + bias.clip(min=0), low + bias.clip(max=0)
            units = np.minimum(units, _lowest_bits(bias))
        return self._sum(node, layer, low, high, units, axis)

    def _sum(self, node: Any, layer: str, low: Any, high: Any, units: Any, axis: int | None) -> _Values:
        """A sum between bounds, if it is exact."""
        largest = np.max(np.maximum(high, -low) / units, initial=0.0)
        if largest > LARGEST:
            self._report(node, layer, f"its sums may have {np.log2(largest):.1f} bits, and float32 has 24")
            return _unknown(layer, low, high)
        return _Values(units, low, high, product=True, axis=axis, layer=layer)

    # --- Sums and factors.

    def _add(self, node: Any) -> _Values:
        one, other = node.input
        if one in self.constants or other in self.constants:
            name, fixed = (other, one) if one in self.constants else (one, other)
            return self._plus(node, self._of(name), self.constants[fixed])
        a, b = self._of(one), self._of(other)
        layer = a.layer if a.product else b.layer
        if not (a.settled and b.settled):
            return _unknown(layer, np.min(a.low) + np.min(b.low), np.max(a.high) + np.max(b.high))
        if a.unit is not None and b.unit is not None:
            if (a.axis, np.shape(a.unit)) != (b.axis, np.shape(b.unit)):
                a, b = (each if each.axis is None else each.whole() for each in (a, b))
            low = np.minimum(a.low, 0) + np.minimum(b.low, 0)
            high = np.maximum(a.high, 0) + np.maximum(b.high, 0)
            units = np.minimum(a.unit, b.unit)
            largest = np.max(np.maximum(high, -low) / units, initial=0.0)
            if largest <= LARGEST:
                return _Values(units, low, high, a.product or b.product, axis=a.axis, layer=layer)
            bits = f"a sum of two branches may have {np.log2(largest):.1f} bits, and float32 has 24"
        else:
            low, high = np.min(a.low) + np.min(b.low), np.max(a.high) + np.max(b.high)
            bits = "a sum with a value that was rounded"
        if a.product or b.product:
            self._report(node, layer, f"{bits}, in an order that a fused convolution chooses")
            return _unknown(layer, np.min(low), np.max(high))
        return _Values(None, np.min(low), np.max(high), layer=layer)  # a single addition, correctly rounded

    def _plus(self, node: Any, x: _Values, constant: Any) -> _Values:
        """``x`` plus a constant, such as a bias."""
        if constant is None or not x.settled:
            return _unknown(x.layer)
        bias = np.asarray(constant, np.float64)
        axis = x.axis
        along = axis is not None and bias.size == np.size(x.unit) and x.unit is not None
        bias = bias.reshape(-1) if along else np.array([bias.min(), bias.max()])
        units = _lowest_bits(np.asarray(constant, np.float64).reshape(-1))
        if not along:
            x, axis = x.whole(), None
        low = x.low + (bias.clip(max=0) if along else min(bias[0], 0))
        high = x.high + (bias.clip(min=0) if along else max(bias[1], 0))
        if x.unit is None:
            return (
                replace(x, low=low, high=high, axis=None) if not x.product else _unknown(x.layer, low, high)
            )
        return self._sum(node, x.layer, low, high, np.minimum(x.unit, units if along else units.min()), axis)

    def _mul(self, node: Any) -> _Values:
        return self._scaled(node, divide=False)

    def _div(self, node: Any) -> _Values:
        return self._scaled(node, divide=True)

    def _scaled(self, node: Any, *, divide: bool) -> _Values:
        one, other = node.input
        fixed, name = (one, other) if one in self.constants and not divide else (other, one)
        factor = self.constants.get(fixed)
        if factor is None:
            return self._other(node, "a product of two activations")
        x = self._of(name).whole()
        factor = np.unique(np.asarray(factor, np.float64))
        if not x.settled or len(factor) != 1 or not factor[0]:
            return _unknown(x.layer) if x.settled is False else replace(x, unit=None, product=not divide)
        scale = 1 / factor[0] if divide else factor[0]
        ends = sorted((float(x.low * scale), float(x.high * scale)))
        found = replace(x, low=np.float64(ends[0]), high=np.float64(ends[1]), codes=False)
        if x.unit is not None and abs(np.frexp(scale)[0]) == 0.5:
            return replace(found, unit=x.unit * abs(scale))
        return replace(
            found, unit=None, product=not divide
        )  # rounded once; a runtime may fuse multiply and add

    def _reducesum(self, node: Any) -> _Values:
        x, count = self._of(node.input[0]), self._ratio(node)
        x = x if x.axis == 1 and self._keeps_channels(node) else x.whole()
        if not x.settled:
            return _unknown(x.layer)
        if x.unit is None or count is None:
            self._report(node, x.layer, "a sum of values that were rounded")
            return _unknown(x.layer)
        return self._sum(node, x.layer, x.low * count, x.high * count, x.unit, x.axis)

    def _keeps_channels(self, node: Any) -> bool:
        """Whether a sum is one over positions, of each channel."""
        axes = self.constants.get(node.input[1]) if len(node.input) > 1 else None
        return axes is not None and bool((np.asarray(axes) > 1).all())

    def _mean(self, node: Any) -> _Values:
        x, count = self._of(node.input[0]).whole(), self._ratio(node)
        if node.op_type == "AveragePool":
            count = float(np.prod(_attribute(node, "kernel_shape")))
        if not x.settled:
            return _unknown(x.layer, x.low, x.high)
        if x.unit is None or count is None:
            self._report(node, x.layer, "a mean of values that were rounded")
        elif np.frexp(count)[0] != 0.5 or (
            node.op_type == "AveragePool" and any(_attribute(node, "pads") or ())
        ):
            self._report(node, x.layer, "a mean whose number of values is no power of two")
        else:
            sums = self._sum(node, x.layer, x.low * count, x.high * count, x.unit, None)
            if sums.unit is not None:
                return replace(sums, unit=x.unit / count, low=x.low, high=x.high, product=False)
        return _unknown(x.layer, x.low, x.high)

    def _ratio(self, node: Any) -> float | None:
        """Number of values that one of the output is made of."""
        sizes = [self.shapes.get(name) for name in (node.input[0], node.output[0])]
        if any(each is None for each in sizes):
            return None
        before, after = (float(np.prod(each[1:])) for each in sizes if each is not None)
        return before / after

    # --- All others.

    def _keep(self, node: Any) -> _Values:
        x = replace(self._of(node.input[0]), product=False, codes=False)
        fixed = [self.constants.get(name) for name in node.input[1:]] if node.op_type != "Pad" else []
        if node.op_type == "Relu":
            return replace(x, low=np.maximum(x.low, 0), high=np.maximum(x.high, 0))
        if node.op_type in ("Clip", "Min", "Max"):
            if any(each is None for name, each in zip(node.input[1:], fixed, strict=True) if name):
                return self._join(node)
            pair = [float(np.reshape(each, ())) if each is not None else None for each in fixed]
            least, most = [*pair, None, None][:2]
            least, most = (None, least) if node.op_type == "Min" else (least, most)
            for end in (least, most):
                if end and x.unit is not None:
                    x = replace(x, unit=np.minimum(x.unit, _lowest_bits(np.array([end]))[0]))
            least, most = (-np.inf if least is None else least), (np.inf if most is None else most)
            return replace(x, low=np.clip(x.low, least, most), high=np.clip(x.high, least, most))
        if node.op_type == "Pad":
            x = x.whole()
            return replace(x, low=np.minimum(x.low, 0), high=np.maximum(x.high, 0))
        if node.op_type == "MaxPool":
            return replace(x, codes=self._of(node.input[0]).codes)
        return x

    def _reshape(self, node: Any) -> _Values:
        return replace(self._of(node.input[0]).whole(), product=False)

    def _concat(self, node: Any) -> _Values:
        return self._join(node)

    def _join(self, node: Any) -> _Values:
        """Values of several tensors side by side."""
        parts = [self._of(name).whole() for name in node.input if name and name not in self.constants]
        units = [each.unit for each in parts]
        fixed = any(name in self.constants for name in node.input)
        return _Values(
            None if fixed or any(unit is None for unit in units) else min(units),
            min(each.low for each in parts) if not fixed else np.float64(-np.inf),
            max(each.high for each in parts) if not fixed else np.float64(np.inf),
            settled=all(each.settled for each in parts),
            layer=parts[0].layer,
        )

    def _shape(self, node: Any) -> None:
        return None

    def _other(self, node: Any, what: str | None = None) -> _Values:
        inputs = [self.known[name] for name in node.input if name in self.known]
        layer = next((each.layer for each in inputs if each.layer), "")
        if all(each.settled for each in inputs):
            self._report(
                node, layer, f"{what or f'{node.op_type} after it'} is rounded in other ways elsewhere"
            )
        return _unknown(layer)


def _unknown(layer: str, low: Any = -np.inf, high: Any = np.inf) -> _Values:
    return _Values(None, np.float64(np.min(low)), np.float64(np.max(high)), settled=False, layer=layer)


def _by_output(values: Any, inputs: int, groups: int, outputs: int) -> Any:
    """Values of input channels, (inputs,) or (), for each output channel: (outputs, inputs / groups)."""
    by_group = np.broadcast_to(values, (inputs,)).reshape(groups, inputs // groups)
    return np.repeat(by_group, outputs // groups, axis=0)


def _lowest_bits(values: Any) -> Any:
    """The largest powers of two that divide float numbers, infinite for 0."""
    values = np.asarray(values, np.float64)
    mantissa, exponent = np.frexp(np.abs(values))
    whole = (mantissa * 2.0**53).astype(np.int64)
    bits = np.ldexp((whole & -whole).astype(np.float64), exponent - 53)
    return np.where(values == 0, np.inf, bits)


def _ends(dtype: Any) -> tuple[float, float]:
    """The lowest and the highest number of an integer type, also of 4 and 2 bits."""
    kind = ml_dtypes.iinfo(dtype)
    return float(kind.min), float(kind.max)


def _array(tensor: Any) -> Any:
    return numpy_helper.to_array(tensor)


def _dequantized(node: Any, arrays: list[Any]) -> Any:
    codes, step = arrays[0].astype(np.float32), arrays[1]
    zero = arrays[2].astype(np.float32) if len(arrays) > 2 and arrays[2] is not None else np.float32(0)
    axis = _attribute(node, "axis")
    along = [-1 if d == (1 if axis is None else axis) % codes.ndim else 1 for d in range(codes.ndim)]
    step, zero = (np.reshape(each, along) if np.ndim(each) else each for each in (step, zero))
    return (codes - zero) * step


def _attribute(node: Any, name: str) -> Any:
    return next((onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name), None)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of tensors, 1 in the place of dynamic sizes; empty where they cannot be inferred."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # a mean is then not exact
        graph = model.graph
    return {
        value.name: tuple(int(each.dim_value) or 1 for each in value.type.tensor_type.shape.dim)
        for value in [*graph.value_info, *graph.input, *graph.output]
    }
