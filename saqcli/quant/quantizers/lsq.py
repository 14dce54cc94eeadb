"""LSQ: the step is learned, with a gradient scaled to the size of the tensor.

    Q(x)   = s * clamp(round(x / s), lowest, highest)
    dL/dx  = G * inside
    dL/ds  = sum G * [ inside * (round(x / s) - x / s) + below * lowest + above * highest ] / sqrt(N * highest)

Source: Esser et al., arXiv:1902.08153, Eq. 1-3 and section 2.2. Differs from the paper:

- Steps start at the least squared error (``levels.best_level``) instead of at 2 * mean|x| / sqrt(highest), so
  that a pretrained network keeps its function as well as the bits allow.
- Where each channel of a weight has a step of its own, N counts the weights of a channel.
- Weights are on whatever grid the scheme asks for, also the one of odd codes.
"""

from torch import Tensor

from saqcli.quant.quantizers.learned_step import LearnedStep, features


class LsqWeight(LearnedStep):
    """Weights: a step per output channel or one for the tensor."""


class LsqActivation(LearnedStep):
    """Inputs of a layer: one step."""

    def sharing(self, x: Tensor) -> float:
        """The features of one image, as in the paper."""
        return features(x)
