"""The quantized layer: its float class with a quantized ``weight``.

Wrapping swaps a module's ``__class__`` for a subclass created at run time. The float Parameter stays in
``_parameters["weight"]``, so ``parameters()``, ``state_dict()``, optimizers and data-parallel wrappers see it under its
old name; every forward that reads ``self.weight``, timm's or torch's, computes with Q(w). No list of layer types is
needed.

While a weight is *given*, ``quantized_weight()`` returns it in the place of Q(w): the weights of a step, or of an
evaluation, are quantized once and serve all of its passes. A given weight is a leaf that collects dL/dQ(w); a perturbed
pass is given Q(w) + e. To autograd, and to a compiler, all passes of a step look the same.

Outside a step the *port* serves the same purpose: ``quantized_weight()`` returns ``Q(w) + perturbation`` while a
perturbation is set. A zero leaf in the port collects dL/dQ(w), bit for bit the gradient that ``retain_grad`` on Q(w)
would give.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.bits import LayerBits
from saqcli.quant.grid import LevelTable
from saqcli.quant.junctions.places import Place
from saqcli.quant.kernels.saved import rounded_again
from saqcli.quant.products import QuantizedProduct
from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.short_steps.rounding import bits_that_fit, least_step, rounded_bias

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
        given_weight: serves as Q(w) while it is set; None, or a tensor in the shape of ``effective_weight``.
        given_from: Q(w) with its graph, from which ``given_weight`` was detached; None where none is needed.
        routed: a parent reads ``weight`` and multiplies with it (see ``routing``).
        tied_to: the first layer with the same Parameter, the only one to quantize it, in a tuple; empty for that layer.
        followers: products of activations that have the bits of this layer's input (see ``products``).
        tensor_read: the first reader of the tensor that is its input (see ``junctions``); empty if it is the only one.
        requantizes: places of quantizers that its input passes first.
        original_dtype: dtype of a float layer that is not float32, else None; the quantized layer computes in float32
            and returns this dtype.
        short_steps: most significant bits of the layer's steps, with which its bias lies on the grid of its sums; None
            if neither is restricted.
    """

    float_class: type[nn.Module]
    weight_name = "weight"
    weight_quantizer: nn.Module
    input_quantizer: nn.Module
    perturbation: Tensor | None
    given_weight: Tensor | None
    given_from: Tensor | None
    routed: bool
    tied_to: "tuple[QuantizedLayer, ...]"  # in a tuple, so that it is not a child
    followers: "tuple[QuantizedProduct, ...]"
    tensor_read: str
    requantizes: tuple[Place, ...]
    original_dtype: torch.dtype | None
    short_steps: int | None

    def latent_weight(self) -> nn.Parameter:
        """The float weight that training updates."""
        weight = self._parameters[self.weight_name]
        assert weight is not None
        return weight

    def effective_weight(self) -> Tensor:
        """The weight that the float layer multiplies with: the latent weight, or one derived from it."""
        return self.latent_weight()

    def quantized_weight(self) -> Tensor:
        """Q(w), or the given weight, plus what fills the port; the same for all layers that share the weight."""
        if self.tied_to:
            return self.tied_to[0].quantized_weight()
        quantized = self.given_weight
        if quantized is None:
            quantized = self.weight_quantizer(self.effective_weight())
        return quantized if self.perturbation is None else quantized + self.perturbation

    def quantized_input(self, x: Tensor) -> Tensor:
        """``x`` on the grid of the input, by way of the grid of the tensor that other readers share."""
        for place in self.requantizes:
            x = place.quantizer(x)
        quantized: Tensor = self.input_quantizer(x)
        return quantized

    def dropped_deviation(self) -> Tensor | None:
        """The deviation of the effective weight that Q(w) leaves out, a scalar; None if there is none."""
        quantizer = (self.tied_to[0] if self.tied_to else self).weight_quantizer
        if not isinstance(quantizer, Quantizer):
            return None
        return quantizer.dropped_deviation(self.effective_weight())

    def quantized_bias(self) -> Tensor | None:
        """The bias that the layer adds: the parameter, with short steps rounded to multiples of ``unit_of_sums``."""
        bias = self._parameters["bias"]
        unit = None if bias is None or self.short_steps is None else self.unit_of_sums()
        if bias is None or unit is None:
            return bias
        return rounded_bias(bias, unit.repeat(len(bias) // len(unit)))

    @torch.no_grad()
    def unit_of_sums(self) -> Tensor | None:
        """The steps of weights times that of the input, (channels,) or (1,); None where a grid is not uniform.

        Groups of a transposed convolution share their channels' steps.
        """
        owner = self.tied_to[0] if self.tied_to else self
        weights, inputs = owner.weight_quantizer, self.input_quantizer
        if not (isinstance(weights, Quantizer) and isinstance(inputs, Quantizer) and stores_codes(self)):
            return None
        if isinstance(inputs.grid(), LevelTable):
            return None
        weights, _ = weights.fold(owner.latent_weight())
        return weights.step().flatten() * inputs.step()

    @torch.no_grad()
    def least_step(self) -> Tensor | None:
        """The least steps of the weight, in their shape, with which the bias leaves room for exact sums; None for any.

        To be called when the step of the input is known.
        """
        weights, inputs, bias = self.weight_quantizer, self.input_quantizer, self._parameters.get("bias")
        if bias is None or not (isinstance(weights, Quantizer) and isinstance(inputs, Quantizer)):
            return None
        if weights.step_bits is None or inputs.step_bits is None:
            return None
        least = least_step(bias, inputs.step(), weights.step_bits + inputs.step_bits)
        channels = self.latent_weight().shape[self.channel_dim] if weights.shape else 1
        return least.view(-1, channels).amax(0).view(weights.shape)

    def allot_step_bits(self) -> None:
        """Give the steps of weights and input their significant bits; to be called when bits change.

        Products of activations that follow this layer get all bits that were asked for.
        """
        owner = self.tied_to[0] if self.tied_to else self
        weights, inputs, most = owner.weight_quantizer, self.input_quantizer, self.short_steps
        own: list[Any] = [weights, inputs]
        for product in self.followers:
            own += [product.input_quantizer, product.weight_quantizer]
        for quantizer in own:
            if isinstance(quantizer, Quantizer):
                quantizer.step_bits = most
        if most is not None and isinstance(weights, Quantizer) and isinstance(inputs, Quantizer):
            weight = owner.latent_weight()
            fan_in = weight.numel() // weight.shape[owner.channel_dim]
            weights.step_bits, inputs.step_bits = bits_that_fit(
                weights.largest_code(), inputs.largest_code(), fan_in, most
            )

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
        quantized = self.quantized_input(input)
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


def weight_owners(model: nn.Module) -> list[QuantizedLayer]:
    """The layers that quantize a weight: of those that share one, the first."""
    return [layer for layer in quantized_layers(model).values() if not layer.tied_to]


@contextmanager
def weights_given(layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """Within the context ``layers``, see ``weight_owners``, compute with weights that are quantized once, at its start.

    Under autograd every given weight is a leaf, see ``back_propagate``. What Q(w) is computed from must not change.
    What fills the ports is added at every use, as without given weights.
    """
    with weights_taken(layers):
        for layer in layers:
            value = layer.weight_quantizer(layer.effective_weight())
            if isinstance(value, nn.Parameter):  # without a quantizer; the layer would register it once more
                value = value.view_as(value)
            layer.given_from = value if value.requires_grad else None
            layer.given_weight = value.detach().requires_grad_(value.requires_grad)
        yield


@contextmanager
def quantized_once(model: nn.Module) -> Iterator[None]:
    """Within the context, of an evaluation, ``model`` computes with weights that are quantized once.

    Those that are given already stay: evaluations in two threads leave no weights behind.
    """
    with weights_given([layer for layer in weight_owners(model) if layer.given_weight is None]):
        yield


@contextmanager
def weights_taken(layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """Within the context ``layers`` quantize their weights at every use; afterwards given weights serve again."""
    before = [(layer, layer.given_weight, layer.given_from) for layer in layers]
    try:
        for layer in layers:
            layer.given_weight = layer.given_from = None
        yield
    finally:
        for layer, given, origin in before:
            layer.given_weight, layer.given_from = given, origin


@contextmanager
def weights_constant(layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """Within the context the given weights of ``layers`` collect no gradients."""
    before = [(layer, layer.given_weight) for layer in layers]
    try:
        for layer, given in before:
            layer.given_weight = None if given is None else given.detach()
        yield
    finally:
        for layer, given in before:
            layer.given_weight = given


def back_propagate(layers: Iterable[QuantizedLayer]) -> None:
    """Pass the gradients that given weights collected on to the parameters that these were computed from."""
    origins, gradients = [], []
    for layer in layers:
        given, origin = layer.given_weight, layer.given_from
        if given is not None and given.grad is not None and origin is not None:
            origins.append(origin)
            gradients.append(given.grad)
            given.grad = None
    if origins:
        torch.autograd.backward(origins, gradients, retain_graph=True)


@contextmanager
def moved(layers: Sequence[QuantizedLayer], steps: Sequence[Tensor]) -> Iterator[None]:
    """Within the context every layer computes with its weight, given or not, plus a step."""
    before = [(layer, layer.given_weight) for layer in layers]
    try:
        for (layer, given), step in zip(before, steps, strict=True):
            if given is None:
                layer.perturbation = step
            else:
                layer.given_weight = (given.detach() + step).requires_grad_(given.requires_grad)
        yield
    finally:
        for layer, given in before:
            layer.perturbation, layer.given_weight = None, given


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


_NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


@contextmanager
def frozen_batch_stats(model: nn.Module) -> Iterator[None]:
    """Within the context batch and instance norms compute as before; at its end running statistics are restored."""
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, _NORMS) and module.training and module.track_running_stats
        for buffer in module._buffers.values()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
