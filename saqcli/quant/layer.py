"""The quantized layer: its float class with a quantized ``weight``.

Wrapping swaps a module's ``__class__`` for a subclass created at run time. The float Parameter stays in
``_parameters["weight"]``, so ``parameters()``, ``state_dict()``, optimizers and data-parallel wrappers see it under its
old name; every forward that reads ``self.weight``, timm's or torch's, computes with Q(w). No list of layer types is
needed.

The *port* serves sharpness-aware training: ``quantized_weight()`` returns ``Q(w) + perturbation`` while a perturbation
is set. A zero leaf in the port collects dL/dQ(w), bit for bit the gradient that ``retain_grad`` on Q(w) would give.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.bits import LayerBits
from saqcli.quant.kernels.saved import rounded_again
from saqcli.quant.products import QuantizedProduct
from saqcli.quant.quantizers.base import Quantizer

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WRAPPED = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear, nn.MultiheadAttention)


class QuantizedLayer(nn.Module):
    """Mixin of every quantized layer; comes first in the method resolution order.

    Attributes:
        float_class: the module's class before wrapping.
        weight_quantizer: identity until ``convert.install`` sets a ``Quantizer``.
        input_quantizer: the same for the layer's input.
        perturbation: the port; None, or a tensor in the shape of ``effective_weight``.
        routed: a parent reads ``weight`` and multiplies with it (see ``routing``).
        tied_to: the first layer with the same Parameter, the only one to quantize it, in a tuple; empty for that layer.
        followers: products of activations that have the bits of this layer's input (see ``products``).
        original_dtype: dtype of a float layer that is not float32, else None; the quantized layer computes in float32
            and returns this dtype.
    """

    float_class: type[nn.Module]
    weight_name = "weight"
    weight_quantizer: nn.Module
    input_quantizer: nn.Module
    perturbation: Tensor | None
    routed: bool
    tied_to: "tuple[QuantizedLayer, ...]"  # in a tuple, so that it is not a child
    followers: "tuple[QuantizedProduct, ...]"
    original_dtype: torch.dtype | None

    def latent_weight(self) -> nn.Parameter:
        """The float weight that training updates."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight

    def effective_weight(self) -> Tensor:
        """The weight that the float layer multiplies with: the latent weight, or one derived from it."""
        return self.latent_weight()

    def quantized_weight(self) -> Tensor:
        """Q(w), or Q(w) + perturbation while the port is filled; the same for all layers that share the weight."""
        if self.tied_to:
            return self.tied_to[0].quantized_weight()
        quantized: Tensor = self.weight_quantizer(self.effective_weight())
        return quantized if self.perturbation is None else quantized + self.perturbation

    @property
    def bits(self) -> LayerBits:
        """The active bit-widths; None for an operand in floating point."""
        weight = (self.tied_to[0] if self.tied_to else self).weight_quantizer
        inputs = self.input_quantizer
        return LayerBits(
            weight=weight.bits if isinstance(weight, Quantizer) else None,
            activation=inputs.bits if isinstance(inputs, Quantizer) else None,
        )

    @property
    def channel_dim(self) -> int:
        """The dimension of the weight's output channels."""
        return 1 if issubclass(self.float_class, TRANSPOSED) else 0

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the float class on a quantized input."""
        if self.original_dtype is not None:
            input = input.float()
        quantized = self.input_quantizer(input)
        with rounded_again(quantized):
            output: Tensor = super().forward(quantized, *args, **kwargs)
        return output if self.original_dtype is None else output.to(self.original_dtype)


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer by qualified name, in order of registration."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def is_convolution(layer: QuantizedLayer) -> bool:
    """Whether the float layer is a convolution, transposed or not."""
    return issubclass(layer.float_class, (*CONVOLUTIONS, *TRANSPOSED))


def stores_codes(layer: QuantizedLayer) -> bool:
    """Whether codes represent the latent weight; False if the layer derives another weight from it."""
    return type(layer).effective_weight is QuantizedLayer.effective_weight


def zero_ports(layers: Iterable[QuantizedLayer]) -> list[Tensor]:
    """A zero leaf for every layer, in the shape and dtype of its effective weight; its gradient is dL/dQ(w)."""
    return [torch.zeros_like(layer.latent_weight(), requires_grad=True) for layer in layers]


@contextmanager
def perturbed(layers: Sequence[QuantizedLayer], perturbations: Sequence[Tensor]) -> Iterator[None]:
    """Within the context every layer computes with Q(w) + perturbation; afterwards with Q(w), also after errors."""
    try:
        for layer, perturbation in zip(layers, perturbations, strict=True):
            layer.perturbation = perturbation
        yield
    finally:
        for layer in layers:
            layer.perturbation = None


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the context ``model`` is in eval mode; afterwards every module has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def frozen_batch_stats(model: nn.Module) -> Iterator[None]:
    """Within the context batch and instance norms normalize as before but do not update their running statistics.

    Instance norms update whatever statistics they hold, so these are taken away; they do not normalize by them.
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.training
        and module.track_running_stats
    ]
    kept = [
        (module, module.running_mean, module.running_var)
        for module in model.modules()
        if isinstance(module, nn.modules.instancenorm._InstanceNorm)
        and module.training
        and module.track_running_stats
    ]
    try:
        for norm in norms:
            norm.track_running_stats = False
        for instance_norm, _, _ in kept:
            instance_norm.running_mean = instance_norm.running_var = None
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for instance_norm, mean, variance in kept:
            instance_norm.running_mean, instance_norm.running_var = mean, variance
