"""Every quantizer of the table, those of other packages included, on every grid it supports."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from saqcli.quant.convert import Scheme
from saqcli.quant.grid import AnyGrid, ShiftedGrid
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.quantizers.dorefa import TanhWeight
from saqcli.quant.quantizers.learned_step import LearnedStep
from tests.support.strategies import BITS
from tests.support.sweeps import sweep

ROWS = 3
WEIGHT_GRIDS = ("paper", "zero", "auto")


def scheme_with(name: str) -> Scheme:
    """The quantizer ``name`` for the operands that it has, ``clip`` for another."""
    entry = QUANTIZERS[name]
    if entry.weight and entry.activation:
        return Scheme(quantizer=name)
    return Scheme(weight_quantizer=name) if entry.weight else Scheme(activation_quantizer=name)


class Case(NamedTuple):
    """A quantizer of the table on one of its grids; ``channels`` gives every row its own level."""

    family: str
    operand: str
    channels: bool

    @property
    def kind(self) -> type[Quantizer]:
        """The class."""
        entry = QUANTIZERS[self.family]
        kind = entry.weight if self.operand in WEIGHT_GRIDS else entry.activation
        assert kind is not None
        return kind

    @property
    def squeezes(self) -> bool:
        """Whether weights are transformed before rounding, so that the folded form differs."""
        return self.kind.fold is not Quantizer.fold

    @property
    def learns(self) -> bool:
        """Whether any parameter is trained."""
        return bool(list(self.build(1.0).parameters()))

    def grid(self, width: int) -> AnyGrid:
        if self.operand in WEIGHT_GRIDS:
            return self.kind.weight_grid(width, self.operand)  # type: ignore[arg-type]
        return self.kind.activation_grid(width, signed=self.operand == "signed")

    def build(self, level: float, widths: tuple[int, ...] = tuple(BITS)) -> Quantizer:
        """Build it with all ``widths`` as candidates; with per-row levels these are level, 2 level, 3 level."""
        by_bits = {width: self.grid(width) for width in widths}
        quantizer = self.kind(by_bits, (ROWS, 1) if self.channels else ())
        rows = torch.tensor([[1.0], [2.0], [3.0]]) if self.channels else torch.tensor(1.0)
        set_levels(quantizer, level * rows)
        return quantizer


@torch.no_grad()
def set_levels(quantizer: Quantizer, level: Tensor) -> None:
    """Set the highest code of every candidate to the value ``level``, whatever the parameter's name.

    A quantizer with parameters of other names is fitted to values up to the level.
    """
    if not (hasattr(quantizer, "clipping_level") or hasattr(quantizer, "step_size")):
        quantizer.fit(level * torch.linspace(-1, 1, 255))
        return
    for position, grid in enumerate(quantizer.grids.values()):
        if hasattr(quantizer, "clipping_level"):
            quantizer.clipping_level[position] = level
        else:
            quantizer.step_size[position] = level / grid.highest  # type: ignore[index, operator]
        if hasattr(quantizer, "offset"):
            quantizer.offset[position] = level / grid.highest * grid.lowest  # type: ignore[index, operator]
        if hasattr(quantizer, "lowest_code") and level.numel() == ROWS:  # rows differ, up to both extremes
            lowest = torch.tensor([grid.lowest, 0, 1 - grid.levels], dtype=torch.int16)
            quantizer.lowest_code[position] = lowest.view_as(level)  # type: ignore[index, operator]


SHARED = {"lsq_plus": LearnedStep, "pact": TanhWeight}  # weights that another quantizer has too


def _operands(family: str) -> list[tuple[str, bool]]:
    """Grids, and whether levels are per row: all for the first quantizer, the necessary ones for others."""
    entry = QUANTIZERS[family]
    inputs = [("unsigned", False), ("signed", False)] if entry.activation else []
    if entry.weight is None:
        return inputs
    kinds = entry.weight.weight_grids
    if family != "clip":  # ``auto`` is one of the others, if there are others
        kinds = tuple(kind for kind in kinds if kind != "auto") or kinds
    scopes = [granularity == "channel" for granularity in entry.weight.granularities]
    if family in SHARED and not {"forward", "fit", "step", "codes"} & set(vars(entry.weight)):
        assert issubclass(entry.weight, SHARED[family])
        return [("paper", True), *inputs]
    return [*((kind, channels) for kind in kinds for channels in sorted(scopes)), *inputs]


CASES = [Case(family, *operand) for family in QUANTIZERS for operand in _operands(family)]


def name_of(case: Case) -> str:
    return f"{case.family}-{case.operand}{'-channels' if case.channels else ''}"


def _stands_for_others(case: Case) -> bool:
    """Whether it is the one of its class that every run tests; of ``clip`` all are."""
    alike = [each for each in CASES if each.kind is case.kind]
    preferred = [each for each in alike if each.channels or each.operand == "signed"]
    return case.family == "clip" or case == (preferred or alike)[0]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    """A test for each of ``cases``; other grids and scopes of a class that is tested on one are slow."""
    return pytest.mark.parametrize(
        "case", sweep([(case,) for case in cases], _stands_for_others), ids=[name_of(case) for case in cases]
    )


def plain_of(quantizer: Quantizer, x: Tensor) -> Quantizer:
    """Its folded form, or itself where it transforms nothing."""
    with torch.no_grad():
        return quantizer.fold(x)[0]


def values_of(quantizer: Quantizer) -> Tensor:
    """All values of the active grid, along a last dimension after those of a level."""
    step, grid = quantizer.step().detach()[..., None], quantizer.grid()
    if isinstance(grid, ShiftedGrid):
        grid = ShiftedGrid(grid.lowest[..., None], grid.top)
    return step * grid.codes_at(torch.arange(grid.levels))


def bounds(quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Least and greatest value of the active grid."""
    step, grid = quantizer.step().detach(), quantizer.grid()
    return step * grid.lowest, step * grid.highest
