"""DoReFa: weights squeezed into [-1, 1] by tanh, inputs clamped to a range that is not trained.

Weights, with their formula and gradient: ``tanh_weight``. Inputs:

    Q(x)   = a * round(clamp(x / a, 0, 1) * (2**bits - 1)) / (2**bits - 1)       a fixed
    dL/dx  = G * inside

Source: Zhou et al., arXiv:1606.06160, Eq. 5, 9 and 11. Differs from the paper, beside what ``tanh_weight`` says:

- The range of inputs is 1 there, behind an activation that is bounded by 1. Here it is fitted at calibration, at
  the least squared error, since a pretrained network has no such bound.
- Signed inputs get the signed grid.
- Gradients are not quantized.
"""

from saqcli.quant.quantizers.tanh_weight import FixedLevel, TanhWeight


class DorefaWeight(TanhWeight):
    """Weights: a factor per output channel or one for the tensor."""


class DorefaActivation(FixedLevel):
    """Inputs of a layer: one level."""
