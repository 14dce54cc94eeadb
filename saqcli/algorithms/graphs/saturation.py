"""Sums of two 8-bit products that 16 bits cannot hold, which x86 processors without VNNI cut off in silence.

Without VNNI, ONNX Runtime multiplies unsigned by signed bytes with VPMADDUBSW: neighbouring products are added in 16
bits, and what exceeds 32767 becomes 32767 (255 * 127 + 255 * 127 = 64770). Signed activations are moved to unsigned
ones first, so they are concerned as well. Weights stored as UINT8 with zero point 128 take another kernel (VPMADDWD),
which is exact on every processor. Depthwise convolutions have a kernel of their own, which is exact too; it is not
relied on here.

Which products are neighbours depends on the kernel, so the test is for any two of an output channel.
"""

from typing import Any

import numpy as np

HIGHEST_INPUT = 255  # of an 8-bit activation, moved to unsigned where it is signed
INT16_MIN, INT16_MAX = -(2**15), 2**15 - 1
UINT8_ZERO = 128  # code of zero of a weight that is stored as UINT8


def may_saturate(codes: Any, dim: int) -> bool:
    """Whether two products of weight codes with 8-bit inputs can exceed 16 bits.

    Args:
        codes: integer weight codes without zero point, in -128 ... 127.
        dim: of the output channels.
    """
    rows = np.moveaxis(np.asarray(codes, np.int32), dim, 0).reshape(codes.shape[dim], -1)
    if rows.shape[1] < 2:
        return False
    highest = np.partition(rows, -2, axis=1)[:, -2:].clip(min=0).sum(1).max()
    lowest = np.partition(rows, 1, axis=1)[:, :2].clip(max=0).sum(1).min()
    return bool(HIGHEST_INPUT * highest > INT16_MAX or HIGHEST_INPUT * lowest < INT16_MIN)
