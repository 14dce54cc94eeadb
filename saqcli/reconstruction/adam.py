"""Adam whose learning rates are in units of each tensor: of the steps of a weight, or of the magnitude of a level.

Adam moves a value by about its learning rate in each iteration, however large the gradient. Weights of one layer may
have steps that differ by channel by orders of magnitude, and so need a rate for each value:

    m <- b1 m + (1 - b1) g           v <- b2 v + (1 - b2) g^2
    p <- p - rate * unit * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Source: Kingma and Ba, arXiv:1412.6980, algorithm 1; the units are ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOMENTS = (0.9, 0.999)
EPSILON = 1e-12  # gradients of a normalized error may be small


class Trained(NamedTuple):
    """A tensor that is trained.

    Attributes:
        value: a leaf that requires gradients.
        unit: what its rate counts in, non-negative; broadcasts against ``value``.
        rate: learning rate in these units.
    """

    value: Tensor
    unit: Tensor
    rate: float


class RelativeAdam:
    """Adam over ``Trained`` tensors; a tensor without a gradient is skipped in that step, and keeps its moments."""

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.trained = list(trained)
        self._first = [torch.zeros_like(one.value) for one in trained]
        self._second = [torch.zeros_like(one.value) for one in trained]
        self._steps = 0

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """One step at ``factor`` times the learning rates; gradients are freed."""
        self._steps += 1
        b1, b2 = MOMENTS
        for one, first, second in zip(self.trained, self._first, self._second, strict=True):
            gradient = one.value.grad
            if gradient is None:
                continue
            first.lerp_(gradient, 1 - b1)
            second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            size = (second / (1 - b2**self._steps)).sqrt_().add_(EPSILON)
            one.value.sub_((first / size).mul_(one.unit * (factor * one.rate / (1 - b1**self._steps))))
            one.value.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Moments, by position, and the number of steps."""
        moments = zip(self._first, self._second, strict=True)
        return {"steps": self._steps, "moments": [[first, second] for first, second in moments]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self._steps = int(state["steps"])
        for first, second, (saved_first, saved_second) in zip(
            self._first, self._second, state["moments"], strict=True
        ):
            first.copy_(saved_first)
            second.copy_(saved_second)
