"""Exact form of a quantized model, with the same bits in every runtime.

A fake-quantized convolution multiplies floating-point numbers, and its sum depends on the order of the summands. Here

    codes of x --.
                  conv -- * scale[c] -- + shift[c] -- ...        scale = s_a s_w gain,  shift = bias and norm, folded
    codes of w --'

works on integers, whose sums are exact in any order (``integers``). All other operators become operations that are
defined to the last bit (``ordered``). An operator that is neither exact itself nor listed here is refused by name.

The program of a frozen model is rewritten node by node. An intermediate value is a ``Tensor`` (a constant, computed
immediately), an ``fx.Node`` (a floating-point tensor), or ``Integers`` with a scale that is not applied yet.

To add an operator, put its name in ``EXACT_ALONE`` if IEEE 754 defines its result to the last bit; otherwise add a
function of ``ordered`` to ``ORDERED``.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils import _pytree as tree

from saqcli.errors import UnsupportedModel
from saqcli.export import operators, ordered, tracing
from saqcli.export.integers import Accumulator, Integers, Operator, split_channels, weight_part

# Rearrange numbers or insert zeros.
LAYOUT = set(
    """
    alias clone contiguous view _unsafe_view reshape permute transpose t flatten unflatten squeeze unsqueeze
    expand select slice narrow split split_with_sizes chunk unbind roll flip constant_pad_nd pad pixel_shuffle
    pixel_unshuffle im2col lift_fresh_copy detach dropout repeat index_select channel_shuffle sym_size
    """.split()
)

SEVERAL = {"split", "split_with_sizes", "chunk", "unbind"}  # of LAYOUT: they return several tensors

# One IEEE 754 operation per output value, or a selection of values.
EXACT_ALONE = set(
    """
    add sub rsub mul div neg abs reciprocal square relu relu6 leaky_relu clamp clamp_min clamp_max
    hardtanh maximum minimum max_pool1d max_pool2d max_pool3d adaptive_max_pool2d amax amin floor ceil round
    where masked_fill cat stack index gather embedding eq ne lt le gt ge logical_and logical_or logical_not
    bitwise_not zeros_like ones_like full_like zeros ones full arange _to_copy to getitem mul floordiv
    upsample_nearest2d _assert_tensor_metadata
    """.split()
)


def _avg_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """``torch.nn.functional.avg_pool2d``: sums shifted images in row-major order."""
    sizes, pads = (int(x.shape[-2]), int(x.shape[-1])), _pair(padding)
    kernels, strides = _pair(kernel_size), _pair(stride if len(stride) else kernel_size)
    windows = [_windows(*each, ceil_mode) for each in zip(sizes, kernels, strides, pads, strict=True)]
    (top, bottom), (left, right) = (
        (pad, max(0, (len(starts) - 1) * step + kernel - size - pad))
        for starts, size, kernel, step, pad in zip(windows, sizes, kernels, strides, pads, strict=True)
    )
    padded = F.pad(x, (left, right, top, bottom))
    total: Tensor | None = None
    for offsets in itertools.product(*(range(kernel) for kernel in kernels)):
        rows, columns = (
            slice(offset, offset + (len(starts) - 1) * step + 1, step)
            for offset, starts, step in zip(offsets, windows, strides, strict=True)
        )
        total = padded[..., rows, columns] if total is None else total + padded[..., rows, columns]
    assert total is not None
    if divisor_override:
        return total / float(divisor_override)
    high, wide = (
        [_covered(start, kernel, size, pad if count_include_pad else 0) for start in starts]
        for starts, kernel, size, pad in zip(windows, kernels, sizes, pads, strict=True)
    )
    counts = [[float(rows * columns) for columns in wide] for rows in high]
    same = len({count for line in counts for count in line}) == 1
    return total / (counts[0][0] if same else torch.tensor(counts))


def _windows(size: int, kernel: int, stride: int, pad: int, ceil_mode: bool) -> list[int]:
    """Starts of the windows along one dimension; the last one starts within the image or its left padding."""
    room = size + 2 * pad - kernel
    count = -(-room // stride) + 1 if ceil_mode else room // stride + 1
    if ceil_mode and (count - 1) * stride >= size + pad:
        count -= 1
    return [index * stride - pad for index in range(count)]


def _covered(start: int, kernel: int, size: int, pad: int) -> int:
    """Size of the part of a window in the image with ``pad`` around it."""
    return min(start + kernel, size + pad) - max(start, -pad)


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return (int(value[0]), int(value[-1]))


def _adaptive_avg_pool2d(x: Tensor, size: Sequence[int]) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool2d``: every cell is the mean of its window."""
    rows, columns = _pair(size)
    height, width = int(x.shape[-2]), int(x.shape[-1])
    if height % rows == 0 and width % columns == 0 and (rows, columns) != (1, 1):
        return _avg_pool2d(x, (height // rows, width // columns))
    cells = [
        ordered.mean(
            x[
                ...,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ],
            (-2, -1),
            keepdim=True,
        )
        for i in range(rows)
        for j in range(columns)
    ]
    if len(cells) == 1:
        return cells[0]
    lines = [torch.cat(cells[i * columns : (i + 1) * columns], -1) for i in range(rows)]
    return torch.cat(lines, -2)


def _avg_pool1d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> Tensor:
    """``torch.nn.functional.avg_pool1d``."""
    kernel, step = (1, kernel_size[0]), (1, (stride or kernel_size)[0])
    return _avg_pool2d(x.unsqueeze(-2), kernel, step, (0, padding[0]), ceil_mode, count_include_pad).squeeze(
        -2
    )


def _adaptive_avg_pool1d(x: Tensor, size: Sequence[int]) -> Tensor:
    """``torch.nn.functional.adaptive_avg_pool1d``."""
    return _adaptive_avg_pool2d(x.unsqueeze(-2), (1, size[0])).squeeze(-2)


def _ordered_sum(x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any) -> Tensor:
    dims = sorted(d % x.dim() for d in (dim or range(x.dim())))
    x = ordered.total(x, dims)
    return x if keepdim else x.squeeze(dims)


def _norm(
    x: Tensor, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, **_: Any
) -> Tensor:
    if order != 2:
        raise UnsupportedModel(f"style exact has no norm of order {order}: choose another `style`")
    return ordered.sqrt(_ordered_sum(x * x, dim, keepdim))


def _power(x: Tensor, exponent: float) -> Tensor:
    if abs(exponent) == 0.5:
        x = ordered.sqrt(x)
        return x if exponent > 0 else 1.0 / x
    if exponent not in range(1, 9):
        raise UnsupportedModel(f"style exact has no power of {exponent}: choose another `style`")
    total = x
    for _ in range(int(exponent) - 1):
        total = total * x
    return total


ORDERED: dict[str, Callable[..., Any]] = {
    "mean": ordered.mean,
    "sum": _ordered_sum,
    "linalg_vector_norm": _norm,
    "pow": _power,
    "sqrt": ordered.sqrt,
    "rsqrt": lambda x: 1.0 / ordered.sqrt(x),
    "avg_pool2d": _avg_pool2d,
    "avg_pool1d": _avg_pool1d,
    "adaptive_avg_pool1d": _adaptive_avg_pool1d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "exp": ordered.exp,
    "sigmoid": ordered.sigmoid,
    "silu": ordered.silu,
    "tanh": ordered.tanh,
    "erf": ordered.erf,
    "gelu": ordered.gelu,
    "hardsigmoid": ordered.hardsigmoid,
    "hardswish": ordered.hardswish,
    "softmax": ordered.softmax,
    "_softmax": ordered.softmax,
    "layer_norm": ordered.layer_norm,
    "group_norm": ordered.group_norm,
    "rms_norm": ordered.rms_norm,
    "matmul": ordered.matmul,
    "bmm": ordered.matmul,
    "scaled_dot_product_attention": ordered.attention,
}

# With alpha, PyTorch rounds once for multiplication and addition.
SCALED: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha: x + y * alpha,
    "sub": lambda x, y, alpha: x - y * alpha,
    "rsub": lambda x, y, alpha: y - x * alpha,
}


aten, saq = torch.ops.aten, torch.ops.saq


# Strides may differ from those during tracing.
_SAFE = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}


class ExactForm(nn.Module):
    """A model in its exact form: images (N, C, H, W) to logits (N, classes).

    Attributes:
        accumulators: largest sums of every quantized layer that is called.
    """

    def __init__(self, frozen: nn.Module, example: Tensor) -> None:
        """Rewrite a model.

        Args:
            frozen: from ``frozen_copy``.
            example: images (N, C, H, W); the form is valid for their size and any batch size.

        Raises:
            UnsupportedModel: the model cannot be traced, or an operator, named in the message, has no exact form.
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
            return self.graph.output(self.as_float(tree.tree_leaves(args)[0]))
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
        if (
            name in LAYOUT
            and name not in SEVERAL
            and codes is not None
            and codes.keeps_values(args[1:], kwargs)
        ):
            return self._rearranged(target, args, kwargs)
        args, kwargs = self._floating((args, kwargs))
        if kwargs.get("alpha", 1) != 1 and name in SCALED:
            return self.graph.call_function(SCALED[name], args, kwargs)
        if (name in LAYOUT or name in EXACT_ALONE) and not kwargs.get("rounding_mode"):
            return self.graph.call_function(target, args, kwargs)
        if name in ORDERED:
            return self.graph.call_function(ORDERED[name], args, kwargs)
        raise UnsupportedModel(
            f"style exact has no form of operator {name} that every runtime computes alike: choose another `style`"
        )

    def _rearranged(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Apply an operator that only rearranges numbers or inserts zeros to codes."""
        x, *rest = args
        rest, kwargs = self._floating((tuple(rest), kwargs))
        numbers = self.graph.call_function(target, (self.as_node(x.numbers), *rest), kwargs)
        if target == aten.sym_size.int:
            return numbers
        return Integers(numbers, x.scale, None, min(x.lowest, 0), max(x.highest, 0), x.bits, x.layer)

    def _floating(self, values: Any) -> Any:
        """Arguments for the new graph: constants and integers become nodes."""

        def become_nodes(each: Any) -> Any:
            return self.as_float(each) if isinstance(each, Tensor | Integers) else each

        return fx.node.map_aggregate(values, become_nodes)

    def as_node(self, value: Any) -> fx.Node:
        """A node of ``value``; a constant becomes a buffer."""
        if isinstance(value, fx.Node):
            return value
        name = f"constant_{len(self.root._buffers)}"
        self.root.register_buffer(name, value.detach().clone())
        return self.graph.get_attr(name)

    def as_float(self, value: Any) -> fx.Node:
        """A node of the values in floating point."""
        if not isinstance(value, Integers):
            return self.as_node(value)
        if value.value is None:
            numbers = self.as_node(
                value.numbers.float() if isinstance(value.numbers, Tensor) else value.numbers
            )
            value.value = self.affine(numbers, value.scale, value.shift)
        return value.value

    def affine(self, x: fx.Node, scale: Tensor, shift: Tensor | None) -> fx.Node:
        """``x * scale + shift``, both rounded to float32 once."""
        result = self.graph.call_function(aten.mul.Tensor, (x, self.as_node(scale.float())))
        if shift is not None:
            result = self.graph.call_function(aten.add.Tensor, (result, self.as_node(shift.float())))
        return result


def _quantize_input(r: _Rewriting, target: Any, given: dict[str, Any]) -> Integers:
    lowest, highest, bits, layer = (given[name] for name in ("lowest", "highest", "bits", "layer"))
    arguments = (r.as_float(given["x"]), r.as_node(given["step"]), lowest, highest, bits, layer)
    numbers = r.graph.call_function(saq.input_codes.default, arguments)
    return Integers(numbers, given["step"].double(), None, lowest, highest, bits, layer)


def _copy(r: _Rewriting, target: Any, given: dict[str, Any]) -> Any:
    """A tensor that is written over by another one of its shape, as by the result of a junction in place."""
    whole, source = (each.meta["val"] for each in r.current.args[:2])  # type: ignore[union-attr]
    if whole.dtype != source.dtype or str(whole.shape) != str(source.shape):
        raise UnsupportedModel("style exact has no form of a copy to another shape: choose another `style`")
    return given["src"]


def _input_on_levels(r: _Rewriting, target: Any, given: dict[str, Any]) -> fx.Node:
    """Values on a table of levels: a division, comparisons and a look-up, the same in every runtime."""
    tensors = (r.as_float(given["x"]), r.as_node(given["step"]), r.as_node(given["levels"]))
    return r.graph.call_function(target, (*tensors, given["bits"], given["layer"]))


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
    parts, largest = split_channels(layer, x, weight)
    r.accumulators.append(Accumulator(weight.layer, largest, len(parts)))
    sums = [_sum(r, layer, x, weight, part if len(parts) > 1 else None) for part in parts]
    channels, dims = len(layer.by_output(weight.numbers)), weight.numbers.dim()
    scale = layer.per_channel(x.scale * weight.scale, channels, dims)
    shift = None if bias is None else layer.per_channel(bias.double(), channels, dims)
    if len(sums) == 1:
        return Integers(sums[0], scale, shift, layer=weight.layer)
    # Scaled before addition: a runtime that adds one convolution to the sums of another would exceed 2^24.
    total = r.affine(sums[0], scale, shift)
    for other in sums[1:]:
        total = r.graph.call_function(aten.add.Tensor, (total, r.affine(other, scale, None)))
    return total


def _sum(r: _Rewriting, layer: Operator, x: Integers, weight: Integers, part: slice | None) -> fx.Node:
    """The sum of products of codes over the input channels of one part, or over all."""
    numbers, codes = r.as_node(x.numbers), weight.numbers
    assert isinstance(codes, Tensor)
    if part is not None:
        codes = weight_part(layer, codes, part)
        if layer.groups == 1:
            limits = (numbers, layer.channel_dim, part.start, part.stop)
            numbers = r.graph.call_function(aten.slice.Tensor, limits)
    multiplier = r.graph.call_function(
        saq.weight_codes.default, (r.as_node(codes), weight.bits, weight.layer)
    )
    return r.graph.call_function(layer.target, (numbers, multiplier, None), layer.settings)


def _float_product(r: _Rewriting, target: Any, x: Any, weight: Any, bias: Any) -> fx.Node:
    """A linear layer in floating point."""
    if target != aten.linear.default:
        name = weight.layer if isinstance(weight, Integers) else "one"
        raise UnsupportedModel(
            f"style exact needs every convolution quantized, its weights and inputs on uniform grids, and {name} is "
            "not: choose another `style`"
        )
    transposed = r.graph.call_function(aten.transpose.int, (r.as_float(weight), -2, -1))
    result = r.graph.call_function(ORDERED["matmul"], (r.as_float(x), transposed))
    return result if bias is None else r.graph.call_function(aten.add.Tensor, (result, r.as_node(bias)))


def _batch_norm(r: _Rewriting, target: Any, given: dict[str, Any]) -> tuple[Any, None, None]:
    """A batch norm in eval mode: folded into the scale of integers, or a multiplication and an addition."""
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
    return r.affine(r.as_float(x), gain, shift), None, None


HANDLERS: dict[Any, Callable[[_Rewriting, Any, dict[str, Any]], Any]] = {
    saq.quantize_input.default: _quantize_input,
    saq.input_on_levels.default: _input_on_levels,
    aten.copy.default: _copy,
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
