"""Base classes of quantizers: one grid per bit-width, one of them active.

Parameters (clipping levels, step sizes, offsets) are stacked over all candidates, ``(candidates, *shape)``, so that
every pass uses the same parameters whatever bits are active (data-parallel training needs no search for unused ones)
and switching bits is one assignment.

A quantizer that transforms its tensor before rounding has a *plain form*, returned by ``fold``: a quantizer without a
transformation and a weight that give the same quantized weight to the last bit. Files hold plain forms, since a weight
that is stored as ``step * code`` must not be transformed again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.quant.clip_init import SQUARED, best_level, reduce_to
from saqcli.quant.grid import AnyGrid, LevelTable, WeightGrid, activations, codes_of, step_of, weights
from saqcli.quant.kernels.choice import KernelKind
from saqcli.quant.short_steps.rounding import nearby, short_level, span

Granularity = Literal["channel", "tensor"]


class Quantizer(nn.Module, ABC):
    """Maps a tensor onto a finite grid; gradients pass straight through the rounding.

    A class declares its grids: ``weight_grid`` and ``activation_grid`` are uniform unless it has its own.

    Attributes:
        weight_grids: the values of ``quantization.weight_grid`` that a class for weights supports.
        granularities: the values of ``quantization.granularity`` that it supports.
        kernel: which kernel computes it (``kernels.use.use_kernels``); a plain attribute, in no state dict.
        error_power: exponent p of the error, sum |e|**p, that ``fit`` minimizes; a plain attribute as well.
        step_bits: significant bits that the active step is rounded to, for exact sums (``short_steps``); None for all.
            A plain attribute, set together with the bits.
        candidates: bit-widths to choose from, ascending; a single one if precision is fixed.
        shape: shape of one clipping level or step; broadcasts against the tensor.
    """

    weight_grids: ClassVar[tuple[WeightGrid, ...]] = ("auto", "paper", "zero")
    granularities: ClassVar[tuple[Granularity, ...]] = ("channel", "tensor")
    kernel: KernelKind = "eager"
    error_power: float = SQUARED
    step_bits: int | None = None

    @classmethod
    def weight_grid(cls, bits: int, kind: WeightGrid) -> AnyGrid:
        """The grid of weights of ``bits``, 2 to 8: at most 2**bits codes; ``kind`` is in ``weight_grids``."""
        return weights(bits, kind)

    @classmethod
    def activation_grid(cls, bits: int, *, signed: bool) -> AnyGrid:
        """The grid of inputs: at most 2**bits codes, 0 among them, so that padding stays exact."""
        return activations(bits, signed=signed)

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        """Create with ``grids`` by bit-width and the ``shape`` of one level, which broadcasts against the tensor."""
        super().__init__()
        self.grids = dict(sorted(grids.items()))
        self.candidates = tuple(self.grids)
        self.shape = shape
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

    def grid(self) -> AnyGrid:
        """The active codes."""
        return self.grids[self.bits]

    def largest_code(self) -> float:
        """The largest magnitude of an active code, in units of the power of two that divides all codes."""
        return span(self.grids[self.bits])

    @abstractmethod
    def step(self) -> Tensor:
        """The active step, positive, in ``shape``; in the plain form ``value = step * code``."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``x`` on the active grid, in the shape of ``x``."""

    @abstractmethod
    def fit(self, x: Tensor) -> None:
        """Fit the parameters of all candidates to ``x``."""

    def dropped_deviation(self, x: Tensor) -> Tensor | None:
        """The deviation of ``x`` that the quantized tensor is not multiplied with, a scalar; None if there is none."""
        return None

    @torch.no_grad()
    def settle(self, x: Tensor, least: Tensor | None = None) -> None:
        """Move the active steps, fitted to ``x``, to the best one of the short steps around them.

        Nearest is not best: a step that is too small clips, which costs more than rounding, and the error of few
        weights, such as those of a depthwise convolution, has several minima.

        Args:
            x: what it quantizes.
            least: the least steps, in ``shape``; None for any.
        """
        bits = self.step_bits
        scales = [name for name in ("clipping_level", "step_size") if hasattr(self, name)]
        if bits is None or not scales:
            return
        row = getattr(self, scales[0])[self._active]
        fitted = row.clone()
        try:
            self.step_bits = None
            step = self.step()
        finally:
            self.step_bits = bits
        best, lowest = fitted, torch.full_like(fitted, torch.inf)
        for short in nearby(step if least is None else torch.maximum(step, least), bits):
            row.copy_(fitted * (short / step))
            error = reduce_to((self.forward(x) - x).abs_().pow_(self.error_power), self.shape, "sum")
            if least is not None:
                error = torch.where(short < least, torch.inf, error)
            best, lowest = torch.where(error < lowest, row, best), torch.minimum(error, lowest)
        row.copy_(best)

    def fits(self) -> tuple[Callable[[Tensor], None], ...]:
        """The ways to fit it, among which ``clip_init`` as ``output`` chooses: ``fit``, and others of its own."""
        return (self.fit,)

    def fit_as_published(self, x: Tensor, *, linear: bool) -> None:
        """Set the parameters of all candidates as in the SAQ paper; ``linear``: the layer is not a convolution.

        Raises:
            ConfigError: the quantizer is not the one of that paper.
        """
        raise ConfigError(f"{type(self).__name__} has no initial levels of SAQ: give clip_init error")

    @torch.no_grad()
    def codes(self, x: Tensor) -> Tensor:
        """The codes of ``x``; in the plain form ``step() * codes(x)`` equals ``forward(x)``.

        They are float32 on a table of levels, else int32.
        """
        grid = self.grid()
        codes = codes_of(x.detach().float(), self.step(), grid)
        return codes if isinstance(grid, LevelTable) else codes.to(torch.int32)

    def unrounded(self, weight: Tensor) -> Tensor:
        """The weight that ``self(weight)`` has the error of: ``weight``, or a normalized one in its place."""
        return weight

    def fold(self, weight: Tensor) -> "tuple[Quantizer, Tensor]":
        """The plain form: a quantizer without a transformation, and the weight for it.

        Args:
            weight: the input of this quantizer.

        Returns:
            ``(plain, w)``, where ``plain(w)`` and ``plain.step() * plain.codes(w)`` equal ``self(weight)`` to the last
            bit, at the active bits; ``(self, weight)`` if there is nothing to fold.
        """
        return self, weight

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"bits={self.bits}, candidates={self.candidates}, shape={self.shape}"


class LevelQuantizer(Quantizer):
    """A quantizer with one clipping level, the value of the highest code, per candidate.

    Attributes:
        clipping_level: ``(len(candidates), *shape)``, in units of the tensor; a parameter if ``trained``, else a
            buffer.
    """

    trained = True
    clipping_level: Tensor

    def __init__(self, grids: Mapping[int, AnyGrid], shape: tuple[int, ...] = ()) -> None:
        super().__init__(grids, shape)
        levels = torch.ones(len(self.candidates), *shape)
        if self.trained:
            self.clipping_level = nn.Parameter(levels)
        else:
            self.register_buffer("clipping_level", levels)

    def level(self) -> Tensor:
        """The active clipping level, differentiable, in ``shape``."""
        return self.shortened(self.clipping_level[self._active])

    def shortened(self, level: Tensor) -> Tensor:
        """``level`` with a step of ``step_bits`` significant bits."""
        return short_level(level, self.grid().highest, self.step_bits)  # type: ignore[arg-type]

    def step(self) -> Tensor:
        """The active step: the clipping level divided by the highest code."""
        return step_of(self.level(), self.grid())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Levels of least error on ``x``, for every candidate."""
        for row, grid in zip(self.clipping_level, self.grids.values(), strict=True):
            row.copy_(best_level(x, grid, self.shape, self.error_power))


def quantizers_of(model: nn.Module) -> Iterator[Quantizer]:
    """Every quantizer in ``model``, in order of registration."""
    return (module for module in model.modules() if isinstance(module, Quantizer))
