"""Every quantizer of the table on every grid it supports."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from saqcli.quant import grid as grids
from saqcli.quant.grid import Grid
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.quantizers.dorefa import TanhWeight
from saqcli.quant.quantizers.learned_step import LearnedStep
from tests.support.strategies import BITS

ROWS = 3
WEIGHT_GRIDS = ("paper", "zero", "auto")


class Case(NamedTuple):
    """A quantizer of the table on one of its grids; ``channels`` gives every row its own level."""

    family: str
    operand: str
    channels: bool

    @property
    def squeezes(self) -> bool:
        """Whether weights go through tanh before rounding, so that the folded form differs."""
        return self.family in ("pact", "dorefa") and self.operand in WEIGHT_GRIDS

    @property
    def learns(self) -> bool:
        """Whether any parameter is trained."""
        return not self.squeezes and self.family != "dorefa"

    def grid(self, width: int) -> Grid:
        if self.operand in WEIGHT_GRIDS:
            return grids.weights(width, self.operand)  # type: ignore[arg-type]
        return grids.activations(width, signed=self.operand == "signed")

    def build(self, level: float, widths: tuple[int, ...] = tuple(BITS)) -> Quantizer:
        """Build it with all ``widths`` as candidates; with per-row levels these are level, 2 level, 3 level."""
        family = QUANTIZERS[self.family]
        by_bits = {width: self.grid(width) for width in widths}
        if self.operand in WEIGHT_GRIDS:
            quantizer: Quantizer = family.weight(by_bits, (ROWS, 1) if self.channels else ())
        else:
            quantizer = family.activation(by_bits)
        rows = torch.tensor([[1.0], [2.0], [3.0]]) if self.channels else torch.tensor(1.0)
        set_levels(quantizer, level * rows)
        return quantizer


@torch.no_grad()
def set_levels(quantizer: Quantizer, level: Tensor) -> None:
    """Set the highest code of every candidate to the value ``level``, whatever the parameter's name."""
    for position, grid in enumerate(quantizer.grids.values()):
        if hasattr(quantizer, "clipping_level"):
            quantizer.clipping_level[position] = level
        else:
            quantizer.step_size[position] = level / grid.highest  # type: ignore[index, operator]
        if hasattr(quantizer, "offset"):
            quantizer.offset[position] = level / grid.highest * grid.lowest  # type: ignore[index, operator]


SHARED = {"lsq_plus": LearnedStep, "pact": TanhWeight}  # weights that another quantizer has too


def _weights(family: str) -> list[tuple[str, bool]]:
    """Grids, and whether levels are per row: all for the first quantizer, the necessary ones for others."""
    if family == "clip":
        return [(grid, channels) for grid in WEIGHT_GRIDS for channels in (False, True)]
    kind = QUANTIZERS[family].weight
    if family in SHARED and not {"forward", "fit", "step", "codes"} & set(vars(kind)):
        assert issubclass(kind, SHARED[family])
        return [("paper", True)]
    return [(grid, channels) for grid in ("paper", "zero") for channels in (False, True)]


CASES = [
    Case(family, operand, channels)
    for family in QUANTIZERS
    for operand, channels in (*_weights(family), ("unsigned", False), ("signed", False))
]


def name_of(case: Case) -> str:
    return f"{case.family}-{case.operand}{'-channels' if case.channels else ''}"


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=name_of)


def plain_of(quantizer: Quantizer, x: Tensor) -> Quantizer:
    """Its folded form, or itself where it transforms nothing."""
    with torch.no_grad():
        return quantizer.fold(x)[0]


def bounds(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the active grid."""
    step, grid = quantizer.step().detach(), quantizer.grid()
    return step * grid.lowest, step * grid.highest
