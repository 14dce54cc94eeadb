"""Grids, rounding onto them with gradients, and packed codes.

Grids. A grid is a finite set of codes, ``value = step * code``. The step comes from a clipping level, the value of the
highest code: ``step = clipping_level / highest``. Codes of a uniform ``Grid`` are integers; those of a ``LevelTable``
are any numbers, such as sums of powers of two. Two families of uniform grids for weights, one for activations:

    paper weights, b bits     -n, -n + 2, ..., n      n = 2**b - 1: 2**b levels, symmetric, without zero
    integer weights, b bits   -2**(b-1) ... 2**(b-1) - 1;   at 8 bits -127 ... 127
    activations               0 ... 2**b - 1, or -2**(b-1) ... 2**(b-1) - 1 where the input is signed
    shifted weights, b bits   l ... l + 2**b - 1 with -2**b < l <= 0, one l per channel (``ShiftedGrid``)

The paper's weights (Liu et al., arXiv:2111.12273, Eq. 1 and 3-5) are ``a * (2 D - 1)`` with D in {0, 1/n, ..., 1}; in
units of ``a / n`` these are exactly the odd integers above, so that they can be stored as integers with zero point 0.

Rounding. ``fake_quantize`` is the one numerical kernel, with the gradients of the same paper, section 3:

    step  = |level| / highest
    code  = clamp(round(x / step), lowest, highest)               stride 1
    code  = 2 * clamp(round((x / step + n) / 2), 0, n) - n         stride 2, n = highest
    code  = the entry nearest to x / step, the lower of two        table
    Q(x)  = code * step

With upstream gradient G and ``inside`` = 1 where x / step lies in [lowest, highest]:

    dL/dx     = G * inside                                         straight through the rounding
    dL/dlevel = sum G * (Q(x) - inside * x) / level                the rounding residual inside, +-1 outside

For the paper's grids these are its Eq. 6-8; on a table the second is the gradient of the reparameterized clipping
function of Li et al., arXiv:1909.13144. The division ``x / step`` (not a multiplication by 1 / step) and the final
product are bit for bit those of ONNX Runtime's QuantizeLinear and DequantizeLinear.

Packing. Codes are stored in exactly their bits: 4-bit weights take half a byte, 3-bit weights three eighths. A code is
stored as its index on the grid, ``(code - lowest) / stride`` or its place in the table, most significant bit first,
indices back to back, the last byte padded with zeros.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, prod
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saqcli.errors import ConfigError, CorruptArtifact
from saqcli.quant.kernels.choice import KernelKind, backward_kernels_for, kernels_for
from saqcli.quant.kernels.layout import CLIP, RESIDUAL
from saqcli.units import counted

WeightGrid = Literal["auto", "paper", "zero"]


class Grid(NamedTuple):
    """A uniform grid, with the codes ``lowest, lowest + stride, ..., highest``."""

    lowest: int
    highest: int
    stride: int

    @property
    def levels(self) -> int:
        """The number of codes."""
        return (self.highest - self.lowest) // self.stride + 1

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a code."""
        return self.stride == 1

    @property
    def gap(self) -> float:
        """The distance between neighboring codes."""
        return self.stride

    def nearest(self, scaled: Tensor) -> Tensor:
        """The codes nearest to ``scaled``, which is overwritten, in its dtype and shape; rounds half to even."""
        if self.stride == 1:
            return scaled.round_().clamp_(self.lowest, self.highest)
        n = self.highest
        return scaled.add_(n).div_(2).round_().clamp_(0, n).mul_(2).sub_(n)

    def indices(self, codes: Tensor) -> Tensor:
        """The index of each code, counted from the lowest; int64."""
        return (codes.long() - self.lowest) // self.stride

    def codes_at(self, indices: Tensor) -> Tensor:
        """The codes at ``indices``; int32."""
        return (indices * self.stride + self.lowest).to(torch.int32)


LEAST_GAP = 2.0**-16  # of neighboring codes, relative to their magnitude: keeps them apart in float32


@dataclass(frozen=True)
class LevelTable:
    """A grid of any 2 to 256 levels.

    Attributes:
        codes: the levels in units of the step, ascending, rounded to float32, from 0 or below to above 0.

    Raises:
        ConfigError: the codes are no such table.

    Example:
        >>> ternary = LevelTable((-1.0, 0.0, 1.0))
        >>> fake_quantize(torch.tensor([-0.8, 0.1, 0.3]), torch.tensor(0.5), ternary)
        tensor([-0.5000,  0.0000,  0.5000])
    """

    codes: tuple[float, ...]

    def __post_init__(self) -> None:
        codes = tuple(float(np.float32(code)) for code in self.codes)
        object.__setattr__(self, "codes", codes)
        if not 2 <= len(codes) <= 256 or not all(map(isfinite, codes)) or not codes[0] <= 0 < codes[-1]:
            raise ConfigError("a table of levels has 2 to 256 finite numbers, from 0 or below to above 0")
        if any(high - low <= LEAST_GAP * max(-low, high) for low, high in pairwise(codes)):
            raise ConfigError(
                f"the levels of a table must ascend, each by more than {LEAST_GAP:.2g} of its magnitude"
            )

    @property
    def lowest(self) -> float:
        """The lowest code."""
        return self.codes[0]

    @property
    def highest(self) -> float:
        """The highest code."""
        return self.codes[-1]

    @property
    def levels(self) -> int:
        """The number of codes."""
        return len(self.codes)

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a code."""
        return 0.0 in self.codes

    @property
    def gap(self) -> float:
        """The mean distance between neighboring codes."""
        return (self.highest - self.lowest) / (self.levels - 1)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The codes nearest to ``scaled``, in its dtype and shape; the lower of two. NaN stays NaN."""
        codes = self._table(scaled)[torch.bucketize(scaled.contiguous(), self.edges(scaled))]
        return torch.where(scaled.isnan(), scaled, codes)

    def edges(self, like: Tensor) -> Tensor:
        """The numbers halfway between neighboring codes, in the dtype and on the device of ``like``."""
        table = self._table(like)
        return (table[1:] + table[:-1]) / 2

    def indices(self, codes: Tensor) -> Tensor:
        """The place of each code in the table; int64."""
        return torch.searchsorted(self._table(codes), codes.contiguous())

    def codes_at(self, indices: Tensor) -> Tensor:
        """The codes at ``indices``; float32."""
        return self._table(torch.empty(0, device=indices.device))[indices.long()]

    def _table(self, like: Tensor) -> Tensor:
        return torch.tensor(self.codes, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, eq=False)
class ShiftedGrid:
    """Consecutive codes, 0 among them, from a lowest one of each channel.

    Attributes:
        lowest: the lowest code of each channel, whole numbers; broadcasts against the tensor.
        top: the highest code, counted from the lowest.
    """

    lowest: Tensor
    top: int

    @property
    def highest(self) -> Tensor:
        """The highest code of each channel."""
        return self.lowest + self.top

    @property
    def levels(self) -> int:
        """The number of codes of a channel."""
        return self.top + 1

    @property
    def has_zero(self) -> bool:
        """Whether 0 is a code."""
        return True

    @property
    def gap(self) -> float:
        """The distance between neighboring codes."""
        return 1.0

    @property
    def hull(self) -> Grid:
        """The smallest uniform grid with the codes of all channels."""
        return Grid(int(self.lowest.min()), int(self.highest.max()), 1)

    def nearest(self, scaled: Tensor) -> Tensor:
        """The codes nearest to ``scaled``, which is overwritten, in its dtype and shape; rounds half to even."""
        return scaled.round_().clamp_(self.lowest, self.highest)

    def indices(self, codes: Tensor) -> Tensor:
        """The index of each code, counted from the lowest of its channel; int64."""
        return codes.long() - self.lowest.to(codes.device).long()

    def codes_at(self, indices: Tensor) -> Tensor:
        """The codes at ``indices``, which broadcast against ``lowest``; int32."""
        return (indices + self.lowest.to(indices.device)).to(torch.int32)


AnyGrid = Grid | LevelTable | ShiftedGrid


def paper_weights(bits: int) -> Grid:
    """2**bits odd codes, symmetric, without zero."""
    highest = 2**bits - 1
    return Grid(-highest, highest, 2)


def integer_weights(bits: int) -> Grid:
    """Codes with zero; at 8 bits symmetric, as integer kernels expect."""
    highest = 2 ** (bits - 1) - 1
    return Grid(-highest if bits == 8 else -highest - 1, highest, 1)


def weights(bits: int, kind: WeightGrid) -> Grid:
    """The grid of weights: ``auto`` is the paper's up to 7 bits and plain int8 at 8."""
    if kind == "zero" or (kind == "auto" and bits == 8):
        return integer_weights(bits)
    return paper_weights(bits)


def activations(bits: int, *, signed: bool) -> Grid:
    """The grid of activations; zero is always a level, so that padding stays exact."""
    return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 1) if signed else Grid(0, 2**bits - 1, 1)


TINY = 1e-12  # smallest clipping level, avoids 0 / 0; initial levels of empty channels are far above it


def step_of(level: Tensor, grid: AnyGrid) -> Tensor:
    """The distance unit of the grid, in units of the tensor; shape of ``level``."""
    return level.abs().clamp_min(TINY) / grid.highest


def codes_of(x: Tensor, step: Tensor, grid: AnyGrid) -> Tensor:
    """The codes nearest to ``x``, in its dtype and shape: whole numbers on a uniform grid."""
    return grid.nearest(x / step)


class FakeQuantize(torch.autograd.Function):
    """Q(x) and its straight-through gradients; with fused kernels the backward pass rounds again and saves nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: Tensor, grid: AnyGrid, kind: KernelKind) -> Tensor:
        """``x`` on the grid; ``level`` broadcasts against ``x``."""
        ctx.grid, ctx.kind = grid, kind
        if isinstance(grid, Grid) and (kernels := kernels_for(kind, x, level)):
            ctx.save_for_backward(x, level)
            ctx.requantize = lambda x, level: fake_quantize(x, level, grid, kind)
            return kernels.forward(x, level, codes=grid)
        step = step_of(level, grid)
        quantized = codes_of(x, step, grid).mul_(step)
        ctx.save_for_backward(x, level, quantized)
        return quantized

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Gradients to ``x`` and to the clipping level, as in the module's docstring."""
        (grad,) = grads
        x, level, *saved = ctx.saved_tensors
        grid: AnyGrid = ctx.grid
        to_x, to_level = ctx.needs_input_grad[:2]
        kernels = None if saved else backward_kernels_for(ctx.kind, x, level)
        if kernels and isinstance(grid, Grid):
            to_all, sums = kernels.backward(grad, x, level, codes=grid, kind=CLIP)
            return to_all if to_x else None, sums[RESIDUAL] if to_level else None, None, None
        bound = level.abs().clamp_min(TINY)
        inside = between(x.detach(), bound.detach() * (grid.lowest / grid.highest), bound.detach())
        grad_x = grad * inside if to_x else None
        grad_level = None
        if to_level:
            quantized = saved[0] if saved else FakeQuantize.apply(x, level, grid, "eager")
            residual = quantized.addcmul(x, inside, value=-1).mul_(grad)
            grad_level = residual.sum_to_size(level.shape) / bound * torch.where(level < 0, -1, 1)
        return grad_x, grad_level, None, None


def between(x: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """1 where x lies in the closed range, else 0, in the dtype of x: four times as fast on a CPU as booleans."""
    if torch.compiler.is_compiling():
        return ((x <= highest) & (x >= lowest)).to(x.dtype)
    inside = torch.le(x, highest, out=torch.empty_like(x))
    return inside.mul_(torch.ge(x, lowest, out=torch.empty_like(x)))


def full_precision(x: Tensor) -> Tensor:
    """``x`` in at least float32, in which quantizers compute also under autocast."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def fake_quantize(x: Tensor, level: Tensor, grid: AnyGrid, kind: KernelKind = "eager") -> Tensor:
    """``x`` mapped onto the grid, differentiable in ``x`` and ``level``.

    Args:
        x: any shape; computed in at least float32, also under autocast.
        level: clipping level, the value of the highest code; shape broadcasts against ``x``.
        grid: the codes.
        kind: which kernel; a table of levels has one of torch's operations only.

    Example:
        >>> fake_quantize(torch.tensor([-0.2, 0.3, 0.9]), torch.tensor(0.75), Grid(0, 3, 1))
        tensor([0.0000, 0.2500, 0.7500])
    """
    return FakeQuantize.apply(full_precision(x), level, grid, kind)  # type: ignore[no-any-return]


def pack(codes: Tensor, grid: AnyGrid, bits: int) -> Tensor:
    """``codes``, of any shape, as ceil(numel * bits / 8) bytes, one dimension of uint8."""
    index = grid.indices(codes.cpu()).numpy().ravel().astype(np.uint8)
    table = np.unpackbits(index[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(table.ravel()))


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """Number of bytes that ``pack`` returns for codes of ``bits`` in ``shape``."""
    return -(-prod(shape) * bits // 8)


def unpack(packed: Tensor, grid: AnyGrid, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack`` stored, in ``shape``: float32 on a table of levels, else int32.

    Raises:
        CorruptArtifact: a wrong number of bytes for the shape, an index outside the grid, or padding that is not zero.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(shape, bits):
        raise CorruptArtifact(
            f"{counted(packed.numel(), 'byte')} cannot hold {counted(count, 'code')} of {bits} bits"
        )
    stream = np.unpackbits(packed.cpu().numpy())
    if stream[count * bits :].any():
        raise CorruptArtifact("the padding bits after the last code are not zero")
    table = stream[: count * bits].reshape(count, bits)
    index = np.packbits(np.pad(table, ((0, 0), (8 - bits, 0))), axis=1).ravel().astype(np.int32)
    if count and int(index.max()) >= grid.levels:
        raise CorruptArtifact(f"code {int(index.max())} lies outside a grid of {grid.levels} levels")
    return grid.codes_at(torch.from_numpy(index).reshape(shape))
