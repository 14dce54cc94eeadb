"""Learning rates that fall to 0 along a cosine, for searches that count their own progress."""

import math

import torch


class CosineRates:
    """The learning rates of some optimizers, from where they are now to 0.

    Args:
        optimizers: whose groups they are; they may load a state later.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._first = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    def set(self, done: float) -> None:
        """Put them where they are after the share ``done`` of all steps."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self._first, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * done)) / 2
