"""The quantizer of SAQ: uniform, with a learned clipping level and the rounding residual as its gradient.

Weights on the paper's odd-integer grid or the integer grid, activations in [0, a] or, where the input is
signed, on the signed grid of the same number of levels. Formulas and gradients stand in ``fake_quantize``.

Source: Liu et al., arXiv:2111.12273, section 3. Differs from the paper: levels start at the least squared
error (and a level per output channel) instead of at 1 with normalized weights, so that wrapping a pretrained
network keeps its function as well as the bits allow.
"""

import torch
from torch import Tensor

from saqcli.quant.fake_quantize import fake_quantize
from saqcli.quant.levels import best_level
from saqcli.quant.quantizers.base import Quantizer


class _Clip(Quantizer):
    def forward(self, x: Tensor) -> Tensor:
        """``x`` clamped to the clipping level and rounded onto the grid."""
        return fake_quantize(x, self.level(), self.grid())

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Levels of least squared error on ``x``, for every candidate."""
        for row, grid in zip(self.clipping_level, self.grids.values(), strict=True):
            row.copy_(best_level(x, grid, tuple(row.shape)))


class ClipWeight(_Clip):
    """Weights: a level per output channel or one for the tensor."""


class ClipActivation(_Clip):
    """Inputs of a layer: one level."""
