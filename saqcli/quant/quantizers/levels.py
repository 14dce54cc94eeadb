"""Quantizers of inputs whose levels are not equally far apart: powers of two, and the best of a family of grids.

The probabilities of attention have most of their mass near zero and a tail up to 1; GELU and SiLU have a short
negative and a long positive side. Equal distances spend their codes where there are few values. Three kinds of
grids, in units of the step, n nonzero codes on a side:

    powers of two        0, 2**(-(n - 1) / r), ..., 2**(-1 / r), 1     r codes an octave
    split at a point     0, c / h, ..., c - c / h, c, c + 1, ..., c + h - 1     h = 2**(bits - 1): fine up to c
    split at zero        -m d, ..., -d, 0, 1, ..., p                            m + p + 1 = 2**bits, d < 1

``log2`` has powers of two, with a sign where the input is signed. ``adaptive`` takes, for every input, the grid with
the least squared error on calibration values among uniform ones with any zero point of a list, powers of two and split
grids. Uniform grids run on integer kernels, tables of levels do not: one is taken only if it has less than 0.9 of the
error of the best uniform grid. The plain uniform grid is among them, so the error is never above that of ``clip`` on
these values. The level is trained as in ``clip`` (``grid.fake_quantize``); the choice stays.

Sources: log2 grids of probabilities, Lin et al., arXiv:2111.13824, section 4.3; codes of other bases, AdaLog,
arXiv:2407.12951, Eq. 5-8; split ranges, PTQ4ViT, arXiv:2111.12293, section 3.2. Differs from them:

- A value is rounded to the nearest level, not to the nearest logarithm: the squared error is smaller.
- 0 is always a level, in the place of the smallest power: padding stays exact.
- AdaLog searches the base; here the densities r of a short list are tried.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saqcli.quant.clip_init import best_level, squared_error
from saqcli.quant.grid import AnyGrid, Grid, LevelTable, activations, fake_quantize
from saqcli.quant.quantizers.base import LevelQuantizer

OCTAVES = 14  # most that powers of two span at one code an octave; smaller levels would be next to zero
DENSE_OCTAVES = 10  # with several codes an octave
LEAST_GAIN = 0.9  # of the error of the best uniform grid, below which a table is taken
FEW_SAMPLES = 4096  # enough to tell grids apart; the level of the best is then fitted to all values


def powers_of_two(bits: int, *, signed: bool, density: int = 1) -> LevelTable:
    """0 and powers of two up to 1, on both sides of zero where ``signed``.

    Args:
        bits: 2 to 8.
        signed: as many negative levels as positive ones.
        density: a multiple of the least number of levels an octave: 1 up to 15 levels on a side, then as many as keep
            the smallest ones apart in float32.
    """
    count = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
    octave = density * (1 if count <= OCTAVES + 1 else -(-(count - 1) // DENSE_OCTAVES))
    positive = [2.0 ** (-k / octave) for k in reversed(range(count))]
    return LevelTable(
        (*(-each for each in reversed(positive)), 0.0, *positive) if signed else (0.0, *positive)
    )


def split_at_a_point(bits: int, point: int) -> LevelTable:
    """Half of the levels from 0 to below ``point``, the others from there in steps of 1."""
    half = 2 ** (bits - 1)
    return LevelTable((*(point * k / half for k in range(half)), *(float(point + k) for k in range(half))))


def split_at_zero(bits: int, below: int, step: float) -> LevelTable:
    """``below`` levels under zero, ``step`` apart, the others above it, 1 apart."""
    above = 2**bits - 1 - below
    return LevelTable((*(-step * k for k in range(below, 0, -1)), *map(float, range(above + 1))))


@cache
def family(bits: int, *, signed: bool) -> tuple[AnyGrid, ...]:
    """The grids that ``adaptive`` chooses from; the first one is the uniform grid of the other quantizers.

    Files hold the index of a grid: the order must stay.
    """
    uniform: AnyGrid = activations(bits, signed=signed)
    powers: list[AnyGrid] = [powers_of_two(bits, signed=signed, density=density) for density in (1, 2)]
    if not signed:
        points = sorted({1, *(2**k for k in (1, 2) if 2**k < 2 ** (bits - 1))})
        return tuple(dict.fromkeys([uniform, *powers, *(split_at_a_point(bits, point) for point in points)]))
    top = 2**bits - 1
    zeros = sorted({max(1, round(top * k / 8)) for k in range(1, 8)} | {2**k for k in range(bits - 1)})
    ranges = [Grid(-zero, top - zero, 1) for zero in zeros]
    parts = [2 ** (bits - k) for k in (1, 2) if bits - k >= 1]
    splits = [split_at_zero(bits, below, 2.0**-k) for below in parts for k in (1, 2, 3, 4)]
    return tuple(dict.fromkeys([uniform, *ranges, *powers, *splits]))


def _is_uniform(grid: AnyGrid) -> bool:
    return isinstance(grid, Grid)


class Log2Activation(LevelQuantizer):
    """Inputs of a layer on powers of two, with one level."""

    @classmethod
    def activation_grid(cls, bits: int, *, signed: bool) -> AnyGrid:
        """Powers of two."""
        return powers_of_two(bits, signed=signed)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the nearest levels."""
        return fake_quantize(x, self.level(), self.grid(), self.kernel)


class AdaptiveActivation(LevelQuantizer):
    """Inputs of a layer, on the grid of the family with the least squared error.

    Attributes:
        choice: index of the grid in the family of each candidate, ``(len(candidates),)``, int64.
    """

    choice: Tensor

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        """Create with uniform ``grids`` by bit-width, which tell the sign and stay in use until ``fit``."""
        super().__init__(grids, shape)
        self.register_buffer("choice", torch.zeros(len(self.candidates), dtype=torch.int64))
        self._families = [family(bits, signed=grid.lowest < 0) for bits, grid in self.grids.items()]
        self._chosen = [0] * len(self.candidates)  # as ``choice``: reading a tensor would wait for the device

    def grid(self) -> AnyGrid:
        """The active codes, of the grid that was chosen."""
        return self._families[self._active][self._chosen[self._active]]

    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the chosen grid."""
        return fake_quantize(x, self.level(), self.grid(), self.kernel)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Grid and level of least squared error on ``x``, for every candidate."""
        x = x.detach().float()
        few = x.flatten()[:: -(-x.numel() // FEW_SAMPLES)]
        for row, grids in enumerate(self._families):
            weighted = [
                float(squared_error(few, best_level(few, grid), grid))
                * (LEAST_GAIN if _is_uniform(grid) else 1)
                for grid in grids
            ]
            best = min(range(len(grids)), key=weighted.__getitem__)
            levels = {index: best_level(x, grids[index]) for index in (0, best)}
            errors = {index: float(squared_error(x, level, grids[index])) for index, level in levels.items()}
            best = best if errors[best] < errors[0] else 0
            self.clipping_level[row] = levels[best]
            self.choice[row] = best
        self._chosen = self.choice.tolist()

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        chosen = self.choice.tolist()
        if all(0 <= index < len(grids) for index, grids in zip(chosen, self._families, strict=True)):
            self._chosen = chosen
        else:
            error_msgs.append(f"{prefix}choice is no grid of the quantizer adaptive")
