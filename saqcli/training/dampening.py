"""Dampening: latent weights are pulled to the levels that they are rounded to, so that their codes settle.

Under the straight-through estimator a weight whose best value lies between two levels moves back and forth across the
boundary between them until the learning rate is small, and batch-norm statistics follow codes that change at every
step. The pull adds the gradient of

    lambda(t) * sum over quantized weights of (Q(w) - clip(w))**2,    lambda(t) = lambda * (1 - cos(pi t)) / 2

where t is the share of the training that is done: weights are free at the beginning and settle at the end.

Source: Nagel et al., arXiv:2203.11086, section 4.1 (equations 6 and 7) and the cosine annealing of lambda in section 5.
"""

import math
from typing import Any

import torch
from torch import nn

from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers.base import Quantizer


class Dampening:
    """Adds the pull to the gradients before every step of an optimizer, after these were clipped.

    Args:
        model: its quantized layers are pulled, each weight once.
        optimizer: whose steps are dampened.
        weight: lambda, the weight of the pull at the end of the training.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, weight: float) -> None:
        self.weight, self._done = weight, 0.0
        self._layers = [layer for layer in quantized_layers(model).values() if not layer.tied_to]
        inner = getattr(optimizer, "_base_optimizer", optimizer)  # timm's lookahead runs no hooks of its own
        inner.register_step_pre_hook(self._pull)

    def set(self, done: float) -> None:
        """Set the share of the training that is done."""
        self._done = done

    @property
    def current(self) -> float:
        """lambda of the next step."""
        return self.weight * (1 - math.cos(math.pi * self._done)) / 2

    def _pull(self, *_: Any) -> None:
        """Add the gradient of the pull to those of the latent weights."""
        factor = 2 * self.current
        if not factor:
            return
        for layer in self._layers:
            latent, quantizer = layer.latent_weight(), layer.weight_quantizer
            if latent.grad is None or not isinstance(quantizer, Quantizer):
                continue
            with torch.enable_grad():
                weight = layer.effective_weight()
                quantized = quantizer(weight)
                distance = (weight - quantized).detach()  # straight through: no pull on clipped weights
                (pull,) = torch.autograd.grad(quantized, [latent], distance)
            latent.grad.add_(pull, alpha=factor)
