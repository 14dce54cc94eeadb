"""Where the loss rises fastest: the perturbation of sharpness-aware quantization.

The perturbed set of SAQ (Case 3 of Liu et al., arXiv:2111.12273) is the *quantized* weight of every layer,
and with it biases, norm parameters and activation clipping levels, under one joint norm:

    e_p = rho * s_p**2 * g_p / sqrt(sum_q ||s_q g_q||**2 + tiny)          g_p = dL/dp at Q(w)

``s_p`` is the standard deviation of the layer's float weight, 1 for everything else. With the paper's weight
normalization every deviation is 1 and this is its Eq. 11; without it, the same rho means the same relative
change in any network. ``unit="absolute"`` sets every s_p to 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saqcli.errors import UnperturbedLayer
from saqcli.quant.layers import QuantizedLayer, perturbed, quantized_layers, zero_ports

TINY = 1e-12  # guards a gradient of zero
RadiusUnit = Literal["deviation", "absolute"]
Kind = Literal["weights", "biases", "norms", "activation_clips", "weight_clips"]
PERTURBED: tuple[Kind, ...] = (
    "weights",
    "biases",
    "norms",
    "activation_clips",
)  # as in the released SAQ code
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Perturbation:
    """What is added where: one tensor a layer for the quantized weights, one a parameter for the rest.

    Attributes:
        weights: in the order of the layers, each with the shape of its layer's weight.
        parameters: in the order of the perturbed parameters.
        norm: joint L2 norm of s * g before scaling.
    """

    weights: list[Tensor]
    parameters: list[Tensor]
    norm: Tensor


class PerturbedSet:
    """The tensors of a model that the ascent moves.

    Attributes:
        layers: whose quantized weight is perturbed.
        parameters: biases, norms and clipping levels that are perturbed in place.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[Kind] = PERTURBED) -> None:
        """Collect the kinds named in ``kinds``; a parameter that is frozen stays out."""
        self.layers = list(quantized_layers(model).values()) if "weights" in kinds else []
        self.parameters = list(_parameters(model, set(kinds)))

    def gradients(self, loss: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and its gradients to the quantized weights, then to the parameters; none accumulates
        anywhere.

        Raises:
            UnperturbedLayer: not one quantized layer, or no member at all, takes part in the loss.
        """
        ports = zero_ports(self.layers)
        with perturbed(self.layers, ports), torch.enable_grad():
            value = loss()
        members = [*ports, *self.parameters]
        gradients = torch.autograd.grad(value, members, allow_unused=True) if members else ()
        if all(gradient is None for gradient in gradients[: len(ports) or None]):
            what = "quantized layer" if self.layers else "tensor of the perturbed kinds"
            raise UnperturbedLayer(f"no {what} takes part in the loss: there is nothing to perturb")
        return value.detach(), list(gradients)

    def deviations(self, unit: RadiusUnit) -> list[Tensor | None]:
        """s_p for every member of the set; None stands for 1."""
        if unit == "absolute":
            return [None] * (len(self.layers) + len(self.parameters))
        weights: list[Tensor | None] = [_deviation(layer) for layer in self.layers]
        return weights + [None] * len(self.parameters)

    def ascent(self, gradients: Sequence[Tensor | None], rho: float, unit: RadiusUnit) -> Perturbation:
        """The perturbation of radius ``rho`` that raises the loss most, to first order.

        Args:
            gradients: as from ``gradients``; None counts as zero (a layer that did not run).
            rho: radius, in units of each layer's weight deviation, or absolute.
            unit: which of the two.

        Returns:
            Detached tensors; zero where the gradient is zero. The joint norm of e / s is rho.
        """
        members: list[Tensor] = [*(layer.latent_weight() for layer in self.layers), *self.parameters]
        scales = self.deviations(unit)
        scaled = [g if s is None or g is None else g * s for g, s in zip(gradients, scales, strict=True)]
        squares = [
            s.float().square().sum() if s.dtype != torch.float64 else s.square().sum()
            for s in scaled
            if s is not None
        ]
        norm = torch.stack(squares).sum().sqrt()
        factor = rho / (norm + TINY)
        steps = [
            torch.zeros_like(p) if g is None else (g * factor if s is None else g * (factor * s))
            for p, g, s in zip(members, scaled, scales, strict=True)
        ]
        count = len(self.layers)
        return Perturbation(steps[:count], steps[count:], norm)

    @contextmanager
    def applied(self, perturbation: Perturbation) -> Iterator[None]:
        """Within the context the model computes at the perturbed point; afterwards bit for bit as before."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                for parameter, step in zip(self.parameters, perturbation.parameters, strict=True):
                    parameter.add_(step)
            with perturbed(self.layers, perturbation.weights):
                yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)


def _deviation(layer: QuantizedLayer) -> Tensor:
    """Of the weight; a single number has none and gives its magnitude."""
    with torch.no_grad():
        weight = layer.effective_weight()
        return weight.std() if weight.numel() > 1 else weight.abs().sum()


def _parameters(model: nn.Module, kinds: set[Kind]) -> Iterator[nn.Parameter]:
    """Parameters of the asked kinds, each once, in order of registration."""
    seen: set[int] = set()
    for module in model.modules():
        chosen: list[nn.Parameter | None] = []
        if isinstance(module, _NORMS) and "norms" in kinds:
            chosen += [module.weight, module.bias]
        if isinstance(module, QuantizedLayer):
            if "biases" in kinds:
                chosen += [module._parameters.get("bias"), module._parameters.get("in_proj_bias")]
            if "activation_clips" in kinds:
                chosen.append(getattr(module.input_quantizer, "clipping_level", None))
            if "weight_clips" in kinds:
                chosen.append(getattr(module.weight_quantizer, "clipping_level", None))
        for parameter in chosen:
            if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
