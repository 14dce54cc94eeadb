"""Second moments of a layer's operands: all that the squared error of its output depends on.

A layer multiplies patches x of its input by its weight: the pixels under a convolution's kernel, or the input of a
linear layer. With patches x in the quantized network and f in the float one, at the same positions of the same images,

    E (q x - w f)^2 = q H q' - 2 q C w' + const        H = E x x', C = E x f'

for every output channel: rows q of quantized and w of float weights. Grouped convolutions have one H and one C a group.
A random part of the positions is enough: as many rows as give each of the d x d moments some measurements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli import distributed
from saqcli.quant.layer import CONVOLUTIONS, QuantizedLayer
from saqcli.quant.products import operands_first
from saqcli.quant.routing import WeightRecorder

ROWS_PER_INPUT = 64  # rows measured for each of the d values of a patch
LEAST_ROWS = 16384
_GEOMETRY = {"stride": 3, "padding": 4, "dilation": 5}  # places among the arguments of a convolution


@dataclass
class SecondMoments:
    """Means of products of patches, by group, float64.

    Attributes:
        rows: measured so far.
        quantized: H, (groups, d, d).
        mixed: C, (groups, d, d): patches of the quantized network times those of the float one.
        mean: of quantized patches, (groups, d).
        float_mean: of float patches, (groups, d).
    """

    rows: int = 0
    quantized: Tensor = field(default_factory=lambda: torch.zeros(()))
    mixed: Tensor = field(default_factory=lambda: torch.zeros(()))
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    float_mean: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, x: Tensor, f: Tensor) -> None:
        """Add patches (rows, groups, d) of both networks."""
        total = self.rows + len(x)
        if not total:
            return
        x, f = x.transpose(0, 1), f.transpose(0, 1)
        old, new = self.rows / total, 1 / total
        self.quantized = self.quantized * old + (x.transpose(1, 2) @ x).double() * new
        self.mixed = self.mixed * old + (x.transpose(1, 2) @ f).double() * new
        self.mean = self.mean * old + x.sum(1).double() * new
        self.float_mean = self.float_mean * old + f.sum(1).double() * new
        self.rows = total

    def average(self) -> None:
        """Average over all ranks, which measure the same number of rows."""
        distributed.average([self.quantized, self.mixed, self.mean, self.float_mean])

    def centered(self) -> "SecondMoments":
        """The same about the means."""
        h = self.quantized - self.mean.unsqueeze(2) * self.mean.unsqueeze(1)
        c = self.mixed - self.mean.unsqueeze(2) * self.float_mean.unsqueeze(1)
        return SecondMoments(self.rows, h, c, self.mean, self.float_mean)


class Operands(WeightRecorder):
    """A pass that records what one layer multiplies its weight with.

    Attributes:
        calls: input of every call, with stride, padding and dilation of a convolution.
    """

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self._layer = layer
        self.calls: list[tuple[Tensor, tuple[Any, ...]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator; record the operands of the layer."""
        kwargs = kwargs or {}
        if self.owner(func, args, kwargs) is self._layer:
            x = operands_first(args, kwargs, ("weight",))[0][0]
            given = (
                args[place] if len(args) > place else kwargs.get(name) for name, place in _GEOMETRY.items()
            )
            self.calls.append((x, tuple(given)))
        return func(*args, **kwargs)


def has_patches(layer: QuantizedLayer) -> bool:
    """Whether the layer's output is its weight times patches of its input: not where convolutions are transposed."""
    return issubclass(layer.float_class, (*CONVOLUTIONS, nn.Linear))


def rows_wanted(layer: QuantizedLayer) -> int:
    """The number of patches to measure."""
    return max(LEAST_ROWS, ROWS_PER_INPUT * layer.latent_weight()[0].numel())


def count_patches(layer: QuantizedLayer, operand: tuple[Tensor, tuple[Any, ...]]) -> int:
    """The number of patches in the input of one call."""
    found = _windows(layer, *operand)
    return int(found.shape[: found.dim() - _patch_dims(layer)].numel())


def patches(layer: QuantizedLayer, operand: tuple[Tensor, tuple[Any, ...]], chosen: Tensor) -> Tensor:
    """Some patches of the input of one call, (rows, groups, d), in the order of the weight's elements.

    Args:
        layer: a linear layer or a convolution.
        operand: from ``Operands``.
        chosen: numbers of the patches, int64.
    """
    windows = _windows(layer, *operand)
    dims = windows.dim() - _patch_dims(layer)
    index = torch.unravel_index(chosen.to(windows.device), tuple(windows.shape[:dims]))
    groups = getattr(layer, "groups", 1)
    return windows[index].reshape(len(chosen), groups, -1)


def _patch_dims(layer: QuantizedLayer) -> int:
    """Number of dimensions of a patch: channels, and those of the kernel."""
    return layer.latent_weight().dim() - 1


def _windows(layer: QuantizedLayer, x: Tensor, geometry: tuple[Any, ...]) -> Tensor:
    """A view of all patches: positions first, the patch last."""
    kernel = layer.latent_weight().shape[2:]
    if not kernel:
        return x
    if x.dim() == len(kernel) + 1:  # one image without the dimension of the batch
        x = x.unsqueeze(0)
    stride, padding, dilation = (
        default if value is None else value for value, default in zip(geometry, (1, 0, 1), strict=True)
    )
    stride, dilation = _each(stride, len(kernel)), _each(dilation, len(kernel))
    spans = [(size - 1) * gap + 1 for size, gap in zip(kernel, dilation, strict=True)]
    x = F.pad(x, _padding(padding, spans))
    for d, (span, step, gap) in enumerate(zip(spans, stride, dilation, strict=True)):
        x = x.unfold(2 + d, span, step)[..., ::gap]
    return x.movedim(1, 1 + len(kernel))  # (N, positions ..., channels, kernel ...)


def _each(value: Any, count: int) -> list[int]:
    """A number, or one per dimension, as one per dimension."""
    values = [int(value)] if isinstance(value, int) else [int(each) for each in value]
    return values * count if len(values) == 1 else values


def _padding(padding: Any, spans: Sequence[int]) -> list[int]:
    """Padding as ``F.pad`` takes it: before and after, last dimension first."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        pairs = [((span - 1) // 2, span - 1 - (span - 1) // 2) for span in spans]
    else:
        pairs = [(each, each) for each in _each(padding, len(spans))]
    return [each for pair in reversed(pairs) for each in pair]
