"""ASAQ: SAQ with a radius relative to the magnitude of each weight.

    e_p = rho * T_p**2 g_p / ||T g||,   T_p = |p| + eta for quantized weights, clipping levels and norm scales, 1 else

Source: Liu et al. (arXiv:2111.12273) name it and give no formula; this is ASAM (Kwon et al., arXiv:2102.11600) at Q(w).
Differs from the released code: eta stands in the numerator too; ``numerator="p2"`` leaves it out as that code does.
"""

from typing import Any, Literal

import torch
from torch import nn

from saqcli.algorithms.minimizers.sharpness_aware import SharpnessAware
from saqcli.algorithms.options import check_choice, check_number
from saqcli.algorithms.sharpness import Adaptive


class ASAQ(SharpnessAware):
    """SAQ, adaptive.

    Args:
        model: as for ``SharpnessAware``.
        base: likewise.
        rho: likewise.
        eta: added to magnitudes, in deviations of the weight.
        numerator: ``t2`` or ``p2``, see above.
        options: of ``SharpnessAware``.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float,
        eta: float = 0.01,
        numerator: Literal["t2", "p2"] = "t2",
        **options: Any,
    ) -> None:
        check_choice("numerator", numerator, ("t2", "p2"))
        check_number("eta", eta, least=0)
        super().__init__(model, base, rho=rho, **options)
        self.adaptive = Adaptive(eta, numerator)
