"""SAQ: perturb the quantized weights towards higher loss, then descend from there.

    L(Q(w) + e),   e = rho * normalize(dL/dQ at Q(w))

This is Case 3 of Liu et al. (arXiv:2111.12273, Eq. 10-11): the perturbation depends on the quantization noise, and
nothing is lost in rounding.

Differs from the paper: batch-norm statistics are updated in pass 1 only, as is usual for SAM; the released code updates
them in both (``bn_second_pass="update"``).
"""

from saqcli.algorithms.minimizers.sharpness_aware import SharpnessAware


class SAQ(SharpnessAware):
    """Ascends along the gradient of the quantized weights, and perturbs the quantized weights."""
