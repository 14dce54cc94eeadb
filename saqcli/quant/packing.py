"""Integer codes in exactly their bits: 4-bit weights take half a byte, 3-bit weights three eighths.

A code is stored as its index on the grid, ``(code - lowest) / stride``, most significant bit first, indices
back to back, the last byte filled up with zeros.
"""

from math import prod

import numpy as np
import torch
from torch import Tensor

from saqcli.errors import CorruptArtifact
from saqcli.quant.grids import Grid
from saqcli.units import counted


def pack(codes: Tensor, grid: Grid, bits: int) -> Tensor:
    """``codes``, integers of any shape, as ceil(numel * bits / 8) bytes, one dimension of uint8."""
    index = ((codes.cpu().numpy().astype(np.int64).ravel() - grid.lowest) // grid.stride).astype(np.uint8)
    table = np.unpackbits(index[:, None], axis=1)[:, 8 - bits :]
    return torch.from_numpy(np.packbits(table.ravel()))


def packed_bytes(shape: tuple[int, ...], bits: int) -> int:
    """How many bytes ``pack`` makes of codes of ``bits`` in ``shape``."""
    return -(-prod(shape) * bits // 8)


def unpack(packed: Tensor, grid: Grid, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes that ``pack`` stored, int32 in ``shape``.

    Raises:
        CorruptArtifact: not the number of bytes that the shape needs, an index outside the grid, or filling that is not
            zero.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != packed_bytes(shape, bits):
        raise CorruptArtifact(
            f"{counted(packed.numel(), 'byte')} cannot hold {counted(count, 'code')} of {bits} bits"
        )
    stream = np.unpackbits(packed.cpu().numpy())
    if stream[count * bits :].any():
        raise CorruptArtifact("the bits behind the last code are not zero")
    table = stream[: count * bits].reshape(count, bits)
    index = np.packbits(np.pad(table, ((0, 0), (8 - bits, 0))), axis=1).ravel().astype(np.int32)
    if count and int(index.max()) >= grid.levels:
        raise CorruptArtifact(f"code {int(index.max())} lies outside a grid of {grid.levels} levels")
    return torch.from_numpy(index * grid.stride + grid.lowest).reshape(shape)
