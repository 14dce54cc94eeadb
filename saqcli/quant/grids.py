"""Integer grids: the finite sets that quantizers map onto, as ``value = step * code``.

A grid is described by its codes alone; the step comes from a clipping level, the value of the highest code:
``step = clipping_level / highest``. Two families for weights, one for activations:

    paper weights, b bits     -n, -n + 2, ..., n      n = 2**b - 1: 2**b levels, symmetric, none of them zero
    integer weights, b bits   -2**(b-1) ... 2**(b-1) - 1;   at 8 bits -127 ... 127
    activations               0 ... 2**b - 1, or -2**(b-1) ... 2**(b-1) - 1 where the input is signed

The paper's weights (arXiv:2111.12273, Eq. 1 and 3-5) are ``a * (2 D - 1)`` with D in {0, 1/n, ..., 1}; in
units of ``a / n`` these are exactly the odd integers above, so that they can be stored as integers with zero
point 0.
"""

from typing import Literal, NamedTuple

WeightGrid = Literal["auto", "paper", "zero"]


class Grid(NamedTuple):
    """The codes of a grid: ``lowest, lowest + stride, ..., highest``."""

    lowest: int
    highest: int
    stride: int

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return (self.highest - self.lowest) // self.stride + 1


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
