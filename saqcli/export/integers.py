"""Exact integer sums: codes with their scale, and the split of long sums.

A sum of products of codes is an integer. float32 represents every integer up to 2**24, so as long as no partial sum can
exceed that range, the result does not depend on the order of the summands, the number of threads, or the batch size.
The largest possible sum follows from the weight's codes and the range of the inputs. If it is larger, the input
channels are split into parts whose sums stay within the range, and the parts are added one after another.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from saqcli.errors import UnsupportedModel

EXACT_FLOAT = 2**24
_LINEAR = torch.ops.aten.linear.default


@dataclass(eq=False)
class Integers:
    """Integers in float32 and the values they represent: ``numbers * scale + shift``.

    Attributes:
        numbers: the node that computes them; for a weight, the constant codes.
        scale: float64, shaped to multiply ``numbers``; a scalar for codes of inputs.
        shift: float64, shaped as ``scale``, or None.
        lowest: lower bound of codes.
        highest: upper bound of codes.
        bits: bits of the quantizer of the codes.
        layer: name of the layer whose operand they are.
        value: the node of ``numbers * scale + shift``, created on first use.
    """

    numbers: fx.Node | Tensor
    scale: Tensor
    shift: Tensor | None = None
    lowest: int = 0
    highest: int = 0
    bits: int = 0
    layer: str = ""
    value: fx.Node | None = None

    @property
    def plain(self) -> bool:
        """Whether layout operators on ``numbers`` keep the values they represent."""
        return self.scale.dim() == 0 and self.shift is None

    def keeps_values(self, more: Sequence[Any], options: dict[str, Any]) -> bool:
        """Whether a layout operator with these further arguments only rearranges the numbers or inserts zeros."""
        filled = options.get("value") or any(isinstance(each, float) and each for each in more)
        return isinstance(self.numbers, fx.Node) and self.plain and not filled


@dataclass(frozen=True)
class Accumulator:
    """The largest possible sum of one layer.

    Attributes:
        layer: name of the layer.
        largest: bound on the magnitude of all partial sums, in products of codes.
        parts: number of parts of the input channels; 1 if ``largest`` is at most 2**24.
    """

    layer: str
    largest: int
    parts: int


@dataclass(frozen=True)
class Operator:
    """A convolution or linear layer of the traced program.

    Attributes:
        target: the ATen operator.
        settings: its arguments by name, without input, weight and bias.
    """

    target: Any
    settings: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether the first dimension of its weight is that of input channels."""
        return "transpose" in str(self.target)

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return int(self.settings.get("groups", 1))

    @property
    def channel_dim(self) -> int:
        """The channel dimension of the output."""
        return -1 if self.target == _LINEAR else 1

    def by_output(self, codes: Tensor) -> Tensor:
        """Codes as (outputs, inputs of one group, kernel)."""
        if not self.transposed:
            return codes.reshape(codes.shape[0], codes.shape[1], -1)
        grouped = codes.reshape(self.groups, codes.shape[0] // self.groups, codes.shape[1], -1)
        return grouped.transpose(1, 2).flatten(0, 1)

    def per_channel(self, scale: Tensor, channels: int, dims: int) -> Tensor:
        """``scale`` of a weight, per channel or a scalar, shaped to multiply the output.

        A scalar is repeated for every channel, since ONNX Runtime merges scalars into a product.
        """
        flat = scale.flatten()
        flat = flat.repeat(channels // len(flat))  # the groups of a transposed convolution share it
        return flat if self.channel_dim == -1 else flat.reshape(1, -1, *(1,) * (dims - 2))


def split_channels(operator: Operator, x: Integers, weight: Integers) -> tuple[list[slice], int]:
    """The parts of the input channels of a group, and the largest possible sum of all channels.

    Raises:
        UnsupportedModel: the sum of a single input channel can exceed 2**24.
    """
    assert isinstance(weight.numbers, Tensor)
    codes = operator.by_output(weight.numbers).double()
    ends = torch.stack([codes * x.lowest, codes * x.highest])
    above, below = ends.amax(0).clamp_min(0).sum(-1), ends.amin(0).clamp_max(0).sum(-1)  # (outputs, inputs)
    largest = int(torch.maximum(above.sum(1), -below.sum(1)).max())
    each = torch.maximum(above, -below).amax(0)
    if float(each.max()) > EXACT_FLOAT:
        raise UnsupportedModel(
            f"style exact: the sums of layer {weight.layer} can exceed 2^24 within one input channel: "
            "choose another `style`, or fewer bits for this layer"
        )
    cuts, start = [], 0
    for end in range(1, codes.shape[1] + 1):
        sums = torch.maximum(above[:, start:end].sum(1), -below[:, start:end].sum(1))
        if float(sums.max()) > EXACT_FLOAT:
            cuts.append(slice(start, end - 1))
            start = end - 1
    return [*cuts, slice(start, codes.shape[1])], largest


def weight_part(operator: Operator, codes: Tensor, part: slice) -> Tensor:
    """The weight of one part: other channels are removed or, with groups, set to zero."""
    if operator.groups > 1:
        dim = 0 if operator.transposed else 1
        inside = torch.zeros(operator.by_output(codes).shape[1], dtype=codes.dtype)
        inside[part] = 1
        inside = inside.repeat(operator.groups) if operator.transposed else inside
        return codes * inside.reshape([-1 if d == dim else 1 for d in range(codes.dim())])
    return (codes[part] if operator.transposed else codes[:, part]).contiguous()
