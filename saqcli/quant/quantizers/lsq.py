"""LSQ: the step is learned, with a gradient scaled to the size of the tensor.

    Q(x)   = s * clamp(round(x / s), lowest, highest)
    dL/dx  = G * inside
    dL/ds  = sum G * [ inside * (round(x / s) - x / s) + below * lowest + above * highest ] / sqrt(N * highest)

Source: Esser et al., arXiv:1902.08153, Eq. 1-3 and section 2.2. Differs from the paper:

- Steps start at the least squared error (``levels.best_level``) instead of at 2 * mean|x| / sqrt(highest), so
  that a pretrained network keeps its function as well as the bits allow.
- N is the count of numbers that share a step: for weights all of them, or a channel's where each has its own;
  for activations the whole tensor with its batch, where the paper counts the features of one image.
- Weights are on whatever grid the scheme asks for, also the one of odd codes.
"""

from saqcli.quant.quantizers.learned_step import LearnedStep


class LsqWeight(LearnedStep):
    """Weights: a step per output channel or one for the tensor."""


class LsqActivation(LearnedStep):
    """Inputs of a layer: one step."""
