"""The cases of sharpness-aware quantization: what is perturbed, and along which gradient.

    SAQ (Case 3)    L(Q(w) + e),   e = rho * normalize(dL/dQ at Q(w))
    SAM (Case 2)    L(Q(w + e)),   e = rho * normalize(dL/dw at Q(w))
    Case 1          L(Q(w) + e),   e = rho * normalize(dL/dw at Q(w)), by the straight-through estimator

Source of the three cases: Liu et al. (SAQ), arXiv:2111.12273, Eq. 9-11 and a later version.
"""

from typing import Any, Literal

import torch
from torch import nn

from saqcli.training.minimizers import reference
from saqcli.training.minimizers.sharpness_aware import SharpnessAware
from saqcli.training.options import check_choice, plain_number
from saqcli.training.perturbation import Adaptive


class SAQ(SharpnessAware):
    """Perturbs the quantized weights along the gradient of the quantized weights (Case 3).

    The perturbation depends on the quantization noise, and rounding removes none of it. Source: Liu et al.,
    arXiv:2111.12273, Eq. 10-11. Differs from the paper: batch-norm statistics are updated in pass 1 only, as is usual
    for SAM; the released code updates them in both passes (``bn_second_pass="update"``).
    """

    description = "perturbs quantized weights"
    reference = staticmethod(reference.saq)


class ASAQ(SharpnessAware):
    """SAQ with a radius relative to the magnitude of each weight.

        e_p = rho * T_p**2 g_p / ||T g||,   T_p = |p| + eta for quantized weights, clipping levels, norm scales, else 1

    Source: Liu et al. (arXiv:2111.12273) name it without a formula; this is ASAM (Kwon et al., arXiv:2102.11600) at
    Q(w). Differs from the released code: eta is in the numerator too; ``numerator="p2"`` omits it as that code does.

    Args:
        model: as in ``SharpnessAware``.
        base: as in ``SharpnessAware``.
        rho: as in ``SharpnessAware``.
        eta: added to magnitudes, in deviations of the weight.
        numerator: ``t2`` or ``p2``, see above.
        options: further arguments of ``SharpnessAware``.
    """

    description = "perturbs quantized weights relative to their magnitudes"
    reference = staticmethod(reference.asaq)

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float | None = None,
        eta: float = 0.01,
        numerator: Literal["t2", "p2"] = "t2",
        **options: Any,
    ) -> None:
        check_choice("numerator", numerator, ("t2", "p2"))
        eta = plain_number("eta", eta, least=0)
        super().__init__(model, base, rho=rho, **options)
        self.adaptive = Adaptive(eta, numerator)


class SAM(SharpnessAware):
    """Perturbs the float weights along their straight-through gradient, then quantizes (Case 2).

    Rounding removes nearly all of the perturbation: a weight changes only if it crosses the edge between two codes, and
    then by a whole step (*perturbation diminishment*). All parameters ascend, clipping levels of weights included. The
    baseline of SAQ. On a float model it is SAM: all trained weights, biases and norms ascend. Source: Foret et al.,
    arXiv:2010.01412; Liu et al., arXiv:2111.12273, Eq. 9.
    """

    description = "perturbs float weights before quantization"
    reference = staticmethod(reference.sam)
    perturbed_kinds = ("latent_weights", "biases", "norms", "activation_clips", "weight_clips")


class Case1(SharpnessAware):
    """Perturbs the quantized weights along the straight-through gradient of the float weights.

    Clipped weights have no such gradient and do not ascend, so the direction is not the steepest one at Q(w)
    (*perturbation mismatch*). Without clipping it equals SAQ bit for bit. For comparison only.
    """

    description = "perturbs quantized weights along the gradients of float weights; for comparison"
    reference = staticmethod(reference.case1)
    through_rounding = True
