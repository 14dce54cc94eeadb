"""Plain SAM around a quantizer (Case 2): perturb the float weights, then quantize.

    L(Q(w + e)),   e = rho * normalize(dL/dw at Q(w))

Rounding swallows nearly all of e: a weight changes only if e carries it over the edge between two codes, and
then it changes by a whole step (*perturbation diminishment*). The baseline that SAQ is compared with. All
parameters ascend, clipping levels of weights included.

Source: Foret et al., arXiv:2010.01412; Liu et al., arXiv:2111.12273, Eq. 9.
"""

from saqcli.algorithms.minimizers.sharpness_aware import SharpnessAware


class SAM(SharpnessAware):
    """Ascends along the straight-through gradient of the float weights, and perturbs the float weights."""

    perturbed_kinds = ("latent_weights", "biases", "norms", "activation_clips", "weight_clips")
