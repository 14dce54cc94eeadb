"""Scaling the output channels of a quantized layer without changing a code of its weight.

Q(w) = step * code: with the steps of a channel times a, and the latent weight times a, the code of every weight stays
what it was, and Q(w) is a times what it was. Levels, steps and offsets of a quantizer all have the unit of the tensor,
and are scaled alike. Some quantizers do not take their codes from w / step (``dorefa``), or share statistics between
channels (weight normalization): whether a layer can be scaled, and how, is therefore tried, not looked up.

Short steps are rounded anew afterwards: then codes may move, and the factors are met to that rounding.
"""

import torch
from torch import Tensor

from saqcli.quant.layer import QuantizedLayer, stores_codes
from saqcli.quant.quantizers.base import Quantizer


@torch.no_grad()
def can_rescale(layer: QuantizedLayer) -> bool:
    """Whether ``rescale`` can scale every output channel by a factor of its own; nothing changes."""
    weight = layer.latent_weight()
    channels = weight.shape[layer.channel_dim]
    factors = torch.linspace(0.75, 1.5, channels, dtype=torch.float64, device=weight.device)
    tensors = tensors_of(layer)
    before = [tensor.clone() for tensor in tensors]
    possible = rescale(layer, factors)
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    return possible


@torch.no_grad()
def rescale(layer: QuantizedLayer, factors: Tensor) -> bool:
    """Multiply Q(w) of every output channel by its factor, in place; all codes stay bit for bit.

    Args:
        layer: with or without a weight quantizer; no other layer has its weight.
        factors: positive, (output channels,).

    Returns:
        Whether that was possible; otherwise nothing has changed.
    """
    weight, quantizer = layer.latent_weight(), layer.weight_quantizer
    if isinstance(quantizer, Quantizer) and quantizer.step_bits is not None:
        bits, quantizer.step_bits = quantizer.step_bits, None
        try:
            possible = rescale(layer, factors)
        finally:
            quantizer.step_bits = bits
        if possible:
            quantizer.settle(weight.detach(), layer.least_step())
        return possible
    shape = [-1 if d == layer.channel_dim else 1 for d in range(weight.dim())]
    factors = factors.double().view(shape)
    if not stores_codes(layer):
        return False
    if not isinstance(quantizer, Quantizer):
        weight.copy_(weight.double() * factors)
        return True
    if quantizer.shape != factors.shape:
        return False
    tensors = tensors_of(layer)
    before = [tensor.clone() for tensor in tensors]
    # `forward`, since hooks may move what the quantizer returns
    codes, wanted = quantizer.codes(weight), quantizer.forward(weight).double() * factors
    for level in tensors[1:]:
        level.copy_(level.double() * factors)
    for scaled in (
        (weight.double() * factors).to(weight),
        before[0],
    ):  # before[0]: codes may not depend on the scale
        moved = quantizer.codes(scaled) != codes
        weight.copy_(torch.where(moved, (quantizer.step() * codes).to(weight), scaled))
        quantized = quantizer.forward(weight).double()
        close = torch.allclose(quantized, wanted, rtol=1e-5, atol=0)
        if close and torch.equal(quantizer.codes(weight), codes):
            return True
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    return False


def tensors_of(layer: QuantizedLayer) -> list[Tensor]:
    """The latent weight, and the levels, steps and offsets of its quantizer for all candidates."""
    quantizer = layer.weight_quantizer
    return [layer.latent_weight(), *quantizer.parameters(), *quantizer.buffers()]
