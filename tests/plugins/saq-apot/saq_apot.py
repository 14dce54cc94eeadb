"""APoT: weights whose levels are sums of powers of two.

Each level is a sign times a sum of n powers of two, one of three or zero, and of one more power where the number of
magnitude bits B = bits - 1 is odd (r = 1, else 0):

    level = +-g * (p_1 + ... + p_n + q)     B = 2 n + r,   g such that the largest level is 1
    p_j in {0, 2**-j, 2**-(n + j), 2**-(2 n + r + j)}       q in {0, 2**-(2 n + 1)}, only if r = 1

The sums are distinct: there are 2**B magnitudes and 2**bits - 1 levels, zero among them. The value of a level is the
trained clipping level times it; gradients are those of ``fake_quantize``.

Source: Li et al., arXiv:1909.13144, section 2.2, with 2 bits for each power of two, and the authors' code, which lists
the magnitudes for B = 2 to 6. Differs from it:

- B = 1, which the code leaves out, gives {-1, 0, 1} by the same rule: the ternary levels that the paper uses.
- At 8 bits the grid is uniform, INT8, as that of the first and the last layer in the code.
- Levels start at the least squared error, with one per output channel unless the granularity is ``tensor``; the paper
  starts a layer's only level at 3 standard deviations of its weight.
- The weight is standardized only with weight normalization, after which its standard deviation is multiplied back.
- A weight halfway between two levels goes to the lower one.
"""

from itertools import product

from saqcli.quant.grid import AnyGrid, LevelTable, WeightGrid
from saqcli.quant.quantizers import ClipWeight, NormalizedClipWeight, QuantizerEntry


def magnitudes(bits: int) -> list[float]:
    """The 2**bits magnitudes, ascending from 0 to 1."""
    n, r = divmod(bits, 2)
    powers = [(0.0, 2.0**-j, 2.0 ** -(n + j), 2.0 ** -(2 * n + r + j)) for j in range(1, n + 1)]
    last = [(0.0, 2.0 ** -(2 * n + 1))] * r
    sums = sorted(sum(terms) for terms in product(*powers, *last))
    return [each / sums[-1] for each in sums]


class ApotWeight(ClipWeight):
    """Weights on sums of powers of two."""

    weight_grids = ("auto",)

    @classmethod
    def weight_grid(cls, bits: int, kind: WeightGrid) -> AnyGrid:
        """The levels for ``bits``, one of them for the sign."""
        if bits == 8:
            return super().weight_grid(bits, kind)
        positive = magnitudes(bits - 1)
        return LevelTable((*(-each for each in reversed(positive[1:])), *positive))


class NormalizedApotWeight(ApotWeight, NormalizedClipWeight):
    """The same in standard deviations from the mean."""

    plain = ApotWeight


APOT = QuantizerEntry(
    "weights in sums of powers of two (arXiv:1909.13144)", weight=ApotWeight, normalized=NormalizedApotWeight
)
