"""What every quantizer is: a grid and a trainable clipping level for each candidate bit-width, one of them
active.

Levels of all candidates are one stacked Parameter ``(candidates, *shape)``, so that every pass uses the same
parameters whatever bits are active (data-parallel training needs no search for unused ones) and switching
bits is one assignment.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.quant.fake_quantize import codes_of, step_of
from saqcli.quant.grids import Grid


class Quantizer(nn.Module, ABC):
    """Maps a tensor onto a finite grid; gradients pass straight through the rounding.

    Attributes:
        candidates: bit-widths to choose from, ascending; one where precision is fixed.
        clipping_level: trainable, ``(len(candidates), *shape)``, in units of the tensor.
    """

    def __init__(self, grids: Mapping[int, Grid], shape: tuple[int, ...] = ()) -> None:
        """``grids`` by bit-width; ``shape`` of one level, which must broadcast against the tensor."""
        super().__init__()
        self.grids = dict(sorted(grids.items()))
        self.candidates = tuple(self.grids)
        self.clipping_level = nn.Parameter(torch.ones(len(self.candidates), *shape))
        self._active = 0

    @property
    def bits(self) -> int:
        """The active bit-width."""
        return self.candidates[self._active]

    def select(self, bits: int) -> None:
        """Make ``bits`` the active width.

        Raises:
            ConfigError: no such candidate.
        """
        if bits not in self.candidates:
            raise ConfigError(
                f"this quantizer was built for {self.candidates} bits and cannot switch to {bits}"
            )
        self._active = self.candidates.index(bits)

    def grid(self) -> Grid:
        """The active codes."""
        return self.grids[self.bits]

    def level(self) -> Tensor:
        """The active clipping level, differentiable, in the shape that broadcasts against the tensor."""
        return self.clipping_level[self._active]

    def step(self) -> Tensor:
        """The active step: ``value = step * code``."""
        return step_of(self.level(), self.grid())

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the active grid, in the shape of ``x``."""

    @abstractmethod
    def fit(self, x: Tensor) -> None:
        """Set the levels of all candidates so that they represent ``x`` well."""

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The integers that stand for ``x``: ``step() * codes(x)`` is ``forward(x)``."""
        return codes_of(x.detach().float(), self.step(), self.grid()).to(torch.int32)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"bits={self.bits}, candidates={self.candidates}, shape={tuple(self.clipping_level.shape[1:])}"
