"""Learning rates that follow a cosine to 0, for searches that track their own progress."""

import math

import torch


class CosineRates:
    """The learning rates of some optimizers, from their current values to 0.

    Args:
        optimizers: whose groups are scheduled; they may load a state later.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._first = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def set(self, done: float) -> None:
        """Set the rates for the share ``done`` of all steps."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self._first, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
