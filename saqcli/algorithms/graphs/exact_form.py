"""The exact form of a quantized model: the same function, written so that every runtime computes the same bits.

A fake-quantized convolution multiplies floating-point numbers, and its sum depends on the order of the summands. Here

    codes of x --.
                  conv -- * scale[c] -- + shift[c] -- ...        scale = s_a s_w gain,  shift = bias and norm, folded
    codes of w --'

works on integers, whose sums are exact in any order (``integers``). Everything else becomes operations that
are defined to the last bit (``ordered``). An operator that is neither exact by itself nor known there is
refused by name.

The program of a frozen model is rewritten node by node. A value on the way is a ``Tensor`` (a constant, computed here
and now), an ``fx.Node`` (a floating-point tensor), or ``Integers`` with the scale that was not yet applied to them.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as tree

from saqcli.algorithms.graphs import operators, tracing
from saqcli.algorithms.graphs.exact_operators import EXACT_ALONE, LAYOUT, ORDERED, SCALED, SEVERAL
from saqcli.algorithms.graphs.integers import Accumulator, Integers, Operator, part_of, parts_of
from saqcli.errors import UnsupportedModel

aten, saq = torch.ops.aten, torch.ops.saq


# Strides may differ from those that the program was traced with.
_SAFE = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


class ExactForm(nn.Module):
    """A model in its exact form: images (N, C, H, W) to logits (N, classes).

    Attributes:
        accumulators: of every quantized layer that is called.
    """

    def __init__(self, frozen: nn.Module, example: Tensor) -> None:
        """Rewrite a model.

        Args:
            frozen: from ``frozen_copy``.
            example: images (N, C, H, W); the form is for their size, and for any number of them.

        Raises:
            UnsupportedModel: the model cannot be traced, or has an operator without an exact form; names it.
        """
        super().__init__()
        rewriting = _Rewriting(tracing.program(frozen, example).run_decompositions({}).module())
        self.body = rewriting.run()
        self.accumulators = tuple(rewriting.accumulators)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        logits: Tensor = self.body(images)
        return logits


class _Rewriting:
    """One pass over the nodes of a program."""

    def __init__(self, source: nn.Module) -> None:
        self.source = source
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.accumulators: list[Accumulator] = []
        self.current: fx.Node

    def run(self) -> fx.GraphModule:
        """The rewritten program."""
        assert isinstance(self.source, fx.GraphModule)
        values: dict[fx.Node, Any] = {}

        def value_of(each: Any) -> Any:
            return values.get(each, each) if isinstance(each, fx.Node) else each

        for node in self.source.graph.nodes:
            args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), value_of)
            values[node] = self._rewritten(node, args, kwargs)
        return fx.GraphModule(self.root, self.graph)

    def _rewritten(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        self.current = node
        if node.op == "placeholder":
            return self.graph.placeholder("images")
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.source)
        if node.op == "output":
            return self.graph.output(self.floating(tree.tree_leaves(args)[0]))
        if node.op == "call_module":  # a check of the input's shape
            return None
        return self._call(node.target, args, kwargs)

    def _call(self, target: Any, args: Any, kwargs: Any) -> Any:
        target = _SAFE.get(target, target)
        if target is operator.getitem and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        if target in HANDLERS:
            names = [argument.name for argument in target._schema.arguments]
            return HANDLERS[target](self, target, dict(zip(names, args, strict=False)) | kwargs)
        leaves = tree.tree_leaves((args, kwargs))
        if not any(isinstance(leaf, fx.Node | Integers) for leaf in leaves):
            return target(*args, **kwargs)
        name = str(target).split(".")[1] if isinstance(target, torch._ops.OpOverload) else target.__name__
        codes = args[0] if args and isinstance(args[0], Integers) else None
        if name in LAYOUT and name not in SEVERAL and codes is not None and codes.moves(args[1:], kwargs):
            return self._moved(target, args, kwargs)
        args, kwargs = self._floating((args, kwargs))
        if kwargs.get("alpha", 1) != 1 and name in SCALED:
            return self.graph.call_function(SCALED[name], args, kwargs)
        if (name in LAYOUT or name in EXACT_ALONE) and not kwargs.get("rounding_mode"):
            return self.graph.call_function(target, args, kwargs)
        if name in ORDERED:
            return self.graph.call_function(ORDERED[name], args, kwargs)
        raise UnsupportedModel(
            f"style exact has no form of operator {name} that every runtime computes alike: choose another --style"
        )

    def _moved(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator that only moves numbers about, or adds zeros, on codes."""
        x, *rest = args
        rest, kwargs = self._floating((tuple(rest), kwargs))
        numbers = self.graph.call_function(target, (self.live(x.numbers), *rest), kwargs)
        if target == aten.sym_size.int:
            return numbers
        return Integers(numbers, x.scale, None, min(x.lowest, 0), max(x.highest, 0), x.bits, x.layer)

    def _floating(self, values: Any) -> Any:
        """Arguments for the new graph: constants and integers become nodes."""

        def become_nodes(each: Any) -> Any:
            return self.floating(each) if isinstance(each, Tensor | Integers) else each

        return fx.node.map_aggregate(values, become_nodes)

    def live(self, value: Any) -> fx.Node:
        """A node that gives ``value``; a constant gets a buffer."""
        if isinstance(value, fx.Node):
            return value
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, value.detach().clone())
        return self.graph.get_attr(name)

    def floating(self, value: Any) -> fx.Node:
        """A node that gives the values in floating point."""
        if not isinstance(value, Integers):
            return self.live(value)
        if value.value is None:
            numbers = self.live(value.numbers.float() if isinstance(value.numbers, Tensor) else value.numbers)
            value.value = self.affine(numbers, value.scale, value.shift)
        return value.value

    def affine(self, x: fx.Node, scale: Tensor, shift: Tensor | None) -> fx.Node:
        """``x * scale + shift``, both rounded to float32 once."""
        result = self.graph.call_function(aten.mul.Tensor, (x, self.live(scale.float())))
        if shift is not None:
            result = self.graph.call_function(aten.add.Tensor, (result, self.live(shift.float())))
        return result


def _quantize_input(r: _Rewriting, target: Any, given: dict[str, Any]) -> Integers:
    lowest, highest, bits, layer = (given[name] for name in ("lowest", "highest", "bits", "layer"))
    arguments = (r.floating(given["x"]), r.live(given["step"]), lowest, highest, bits, layer)
    numbers = r.graph.call_function(saq.input_codes.default, arguments)
    return Integers(numbers, given["step"].double(), None, lowest, highest, bits, layer)


def _dequantize_weight(r: _Rewriting, target: Any, given: dict[str, Any]) -> Integers:
    codes, step = given["codes"], given["step"]
    scale = operators.along(step, given["dim"], codes.dim()).double()
    return Integers(codes, scale, None, int(codes.min()), int(codes.max()), given["bits"], given["layer"])


def _product(r: _Rewriting, target: Any, given: dict[str, Any]) -> Any:
    """A convolution or linear layer."""
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    if not (isinstance(x, Integers) and isinstance(weight, Integers) and x.plain):
        return _float_product(r, target, x, weight, bias)
    assert isinstance(weight.numbers, Tensor)
    layer = Operator(target, given)
    parts, largest = parts_of(layer, x, weight)
    r.accumulators.append(Accumulator(weight.layer, largest, len(parts)))
    sums = [_sum(r, layer, x, weight, part if len(parts) > 1 else None) for part in parts]
    channels, dims = len(layer.by_output(weight.numbers)), weight.numbers.dim()
    scale = layer.per_channel(x.scale * weight.scale, channels, dims)
    shift = None if bias is None else layer.per_channel(bias.double(), channels, dims)
    if len(sums) == 1:
        return Integers(sums[0], scale, shift, layer=weight.layer)
    # Scaled before they are added: where a runtime adds one convolution to another's sums, those would leave 2^24.
    total = r.affine(sums[0], scale, shift)
    for other in sums[1:]:
        total = r.graph.call_function(aten.add.Tensor, (total, r.affine(other, scale, None)))
    return total


def _sum(r: _Rewriting, layer: Operator, x: Integers, weight: Integers, part: slice | None) -> fx.Node:
    """The products of codes, summed over the input channels of one part or over all."""
    numbers, codes = r.live(x.numbers), weight.numbers
    assert isinstance(codes, Tensor)
    if part is not None:
        codes = part_of(layer, codes, part)
        if layer.groups == 1:
            limits = (numbers, layer.channel_dim, part.start, part.stop)
            numbers = r.graph.call_function(aten.slice.Tensor, limits)
    multiplier = r.graph.call_function(saq.weight_codes.default, (r.live(codes), weight.bits, weight.layer))
    return r.graph.call_function(layer.target, (numbers, multiplier, None), layer.settings)


def _float_product(r: _Rewriting, target: Any, x: Any, weight: Any, bias: Any) -> fx.Node:
    """A linear layer that was left in floating point."""
    if target != aten.linear.default:
        name = weight.layer if isinstance(weight, Integers) else "one"
        raise UnsupportedModel(
            f"style exact needs weights and inputs of every convolution quantized, and {name} is not: "
            "choose another --style"
        )
    transposed = r.graph.call_function(aten.transpose.int, (r.floating(weight), -2, -1))
    result = r.graph.call_function(ORDERED["matmul"], (r.floating(x), transposed))
    return result if bias is None else r.graph.call_function(aten.add.Tensor, (result, r.live(bias)))


def _batch_norm(r: _Rewriting, target: Any, given: dict[str, Any]) -> tuple[Any, None, None]:
    """A batch norm in eval mode: folded into the scale of integers, else a multiplication and an addition."""
    x = given["input"]
    mean, var = given["running_mean"].double(), given["running_var"].double()
    gain = torch.rsqrt(var + given["eps"])
    gain = gain if given["weight"] is None else gain * given["weight"].double()
    shift = -mean * gain if given["bias"] is None else given["bias"].double() - mean * gain
    dims = r.current.meta["val"][0].dim()
    gain, shift = (each.reshape(1, -1, *(1,) * (dims - 2)) for each in (gain, shift))
    if isinstance(x, Integers) and not x.plain and x.scale.dim() > 1:
        shift = shift if x.shift is None else x.shift * gain + shift
        return Integers(x.numbers, x.scale * gain, shift, layer=x.layer), None, None
    return r.affine(r.floating(x), gain, shift), None, None


HANDLERS: dict[Any, Callable[[_Rewriting, Any, dict[str, Any]], Any]] = {
    saq.quantize_input.default: _quantize_input,
    saq.dequantize_weight.default: _dequantize_weight,
    aten._native_batch_norm_legit_no_training.default: _batch_norm,
    **dict.fromkeys(
        (
            aten.linear.default,
            aten.conv1d.default,
            aten.conv1d.padding,
            aten.conv2d.default,
            aten.conv2d.padding,
            aten.conv3d.default,
            aten.conv3d.padding,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ),
        _product,
    ),
}
