"""Case 1: the perturbation is added to the quantized weights, but found as if there were no clipping.

    L(Q(w) + e),   e = rho * normalize(dL/dw at Q(w)), through the straight-through estimator

Weights that the quantizer clips have no gradient there and are left out of the ascent, so that its direction
is not the one in which the loss at Q(w) rises fastest (*perturbation mismatch*). Where nothing is clipped it
is SAQ, bit for bit.

Source: the three cases of Liu et al. (SAQ, later version); kept to compare with.
"""

from saqcli.algorithms.minimizers.sharpness_aware import SharpnessAware


class Case1(SharpnessAware):
    """Ascends along the straight-through gradient of the float weights, and perturbs the quantized weights."""

    through_rounding = True
