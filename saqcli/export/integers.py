"""Integers on their way through a graph, and the sums of their products, which no order can change.

A sum of products of codes is an integer. float32 holds every integer up to 2**24, so as long as no partial
sum can leave that range, the result does not depend on the order of the summands, the number of threads, or
how the batch is cut. The largest possible sum follows from the weight's codes and the range of the inputs.
Where it is larger, the input channels are cut into parts whose sums stay below, and the parts are added one
after another.
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
    """Integers in float32, and what they are worth: ``numbers * scale + shift``.

    Attributes:
        numbers: the node that computes them; of a weight, the constant codes.
        scale: float64, shaped to multiply ``numbers``; a scalar for codes of inputs.
        shift: likewise, or None.
        lowest: no number is below; of codes.
        highest: no number is above; of codes.
        bits: of the quantizer that made the codes.
        layer: whose operand they are.
        value: ``numbers * scale + shift``, once somebody needed it.
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
        """Whether moving the numbers about leaves their worth as it is."""
        return self.scale.dim() == 0 and self.shift is None

    def moves(self, more: Sequence[Any], options: dict[str, Any]) -> bool:
        """Whether an operator of these further arguments only moves the numbers about, or puts zeros among them."""
        filled = options.get("value") or any(isinstance(each, float) and each for each in more)
        return isinstance(self.numbers, fx.Node) and self.plain and not filled


@dataclass(frozen=True)
class Accumulator:
    """How large the sums of one layer can get.

    Attributes:
        layer: its name.
        largest: magnitude that no partial sum exceeds, in products of codes.
        parts: that its input channels are cut into; 1 where ``largest`` is at most 2**24.
    """

    layer: str
    largest: int
    parts: int


@dataclass(frozen=True)
class Operator:
    """A convolution or linear layer as the rewriting meets it.

    Attributes:
        target: the ATen operator.
        settings: its arguments but input, weight and bias, by name.
    """

    target: Any
    settings: dict[str, Any]

    @property
    def transposed(self) -> bool:
        """Whether its weight has input channels first."""
        return "transpose" in str(self.target)

    @property
    def groups(self) -> int:
        """Of channels."""
        return int(self.settings.get("groups", 1))

    @property
    def channel_dim(self) -> int:
        """The output's dimension of channels."""
        return -1 if self.target == _LINEAR else 1

    def by_output(self, codes: Tensor) -> Tensor:
        """Codes as (outputs, inputs of one group, kernel)."""
        if not self.transposed:
            return codes.reshape(codes.shape[0], codes.shape[1], -1)
        grouped = codes.reshape(self.groups, codes.shape[0] // self.groups, codes.shape[1], -1)
        return grouped.transpose(1, 2).flatten(0, 1)

    def per_channel(self, scale: Tensor, channels: int, dims: int) -> Tensor:
        """``scale`` of a weight, one for each of its channels or one for all, shaped to multiply the output.

        One number for each channel, where one for all would do: ONNX Runtime merges a single number into a product.
        """
        flat = scale.flatten()
        flat = flat.repeat(channels // len(flat))  # of a transposed convolution: the groups share it
        return flat if self.channel_dim == -1 else flat.reshape(1, -1, *(1,) * (dims - 2))


def parts_of(operator: Operator, x: Integers, weight: Integers) -> tuple[list[slice], int]:
    """How the input channels of a group are cut, and the largest possible sum of all of them.

    Raises:
        UnsupportedModel: a single input channel can exceed what float32 counts.
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


def part_of(operator: Operator, codes: Tensor, part: slice) -> Tensor:
    """The weight of one part: without the other channels, or with zeros in their place where there are groups."""
    if operator.groups > 1:
        dim = 0 if operator.transposed else 1
        inside = torch.zeros(operator.by_output(codes).shape[1], dtype=codes.dtype)
        inside[part] = 1
        inside = inside.repeat(operator.groups) if operator.transposed else inside
        return codes * inside.reshape([-1 if d == dim else 1 for d in range(codes.dim())])
    return (codes[part] if operator.transposed else codes[:, part]).contiguous()
