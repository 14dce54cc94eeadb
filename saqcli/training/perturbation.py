"""The perturbations of sharpness-aware quantization: steepest ascent of the loss.

The perturbed set of SAQ (Case 3 of Liu et al., arXiv:2111.12273) is the *quantized* weight of every layer, and with it
biases, norm parameters and activation clipping levels, under one joint norm:

    e_p = rho * T_p**2 * g_p / sqrt(sum_q ||T_q g_q||**2)          g_p = dL/dp

    T_p = s_p                         SAQ, SAM, Case 1
    T_p = |p| + eta * s_p             adaptive (ASAQ): quantized weights, clipping levels, norm scales

``s_p`` is the standard deviation of the layer's float weight, 1 for everything else. With the paper's weight
normalization every deviation is 1 and this is its Eq. 11; without it, or if the weight is multiplied by its deviation
again, the same rho means the same relative change in any network. ``unit="absolute"`` sets every s_p to 1.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from saqcli.errors import UnperturbedLayer
from saqcli.quant.junctions.quantized import QuantizedJunction
from saqcli.quant.layer import (
    QuantizedLayer,
    moved,
    perturbed,
    quantized_layers,
    weight_owners,
    weights_constant,
    weights_given,
    weights_taken,
    zero_ports,
)
from saqcli.quant.products import QuantizedProduct

TINY = 1e-12  # guards a gradient of zero
RadiusUnit = Literal["deviation", "absolute"]
Gradients = list[Tensor | None]  # None for a tensor that the loss does not depend on
Kind = Literal["weights", "latent_weights", "biases", "norms", "activation_clips", "weight_clips"]
PERTURBED: tuple[Kind, ...] = (
    "weights",
    "biases",
    "norms",
    "activation_clips",
)  # as in the released SAQ code
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Perturbation:
    """The added tensors: one per layer for the quantized weights, one per other parameter.

    Attributes:
        weights: in the order of the layers, each with the shape of its layer's weight.
        parameters: in the order of the perturbed parameters.
        norm: joint L2 norm of T * g before scaling.
    """

    weights: list[Tensor]
    parameters: list[Tensor]
    norm: Tensor


@dataclass(frozen=True)
class Adaptive:
    """Radius relative to the magnitude of each number, as in ASAM (Kwon et al., arXiv:2102.11600).

    Attributes:
        eta: added to the magnitude, in deviations of the weight.
        numerator: ``t2`` as in ASAM; ``p2`` leaves eta out of the numerator, as the released ASAQ code does.
    """

    eta: float = 0.01
    numerator: Literal["t2", "p2"] = "t2"


class _Member(NamedTuple):
    """A parameter that is perturbed in place; ``weight`` returns the weight whose deviation is its unit."""

    parameter: nn.Parameter
    scales: bool  # it multiplies, so that a relative radius makes sense: not biases and shifts
    weight: Callable[[], Tensor] | None = None


class PerturbedSet:
    """The tensors of a model that the ascent moves.

    Attributes:
        layers: whose quantized weight is perturbed.
        parameters: biases, norms, clipping levels and latent weights that are perturbed in place.
    """

    def __init__(self, model: nn.Module, kinds: Sequence[Kind] = PERTURBED, *, frozen: bool = True) -> None:
        """Collect the kinds named in ``kinds``; a parameter that is frozen stays out.

        Args:
            model: wrapped, quantizers installed; a float model has norms, biases and ``latent_weights`` only.
            kinds: what the ascent moves.
            frozen: whether it moves the quantized weights of layers whose float weight is frozen.
        """
        layers = quantized_layers(model).values() if "weights" in kinds else ()
        self.layers = [layer for layer in layers if frozen or layer.latent_weight().requires_grad]
        self._members = list(_members(model, set(kinds)))
        self.parameters = [member.parameter for member in self._members]
        self._owners = weight_owners(model)
        perturbed_layers = set(self.layers)
        self._unmoved = [layer for layer in self._owners if layer not in perturbed_layers]
        self._moves_origins = not {"latent_weights", "weight_clips"}.isdisjoint(kinds)  # of quantized weights

    def gradients(
        self,
        loss: Callable[[], Tensor],
        *,
        through_rounding: bool = False,
        also: Sequence[nn.Parameter] = (),
        scale: float = 1.0,
    ) -> tuple[Tensor, Gradients]:
        """The loss and its gradients to the quantized weights, then to the parameters; none accumulates anywhere.

        Args:
            loss: runs the forward pass.
            through_rounding: take dL/dw, zero where w is clipped, in the place of dL/dQ(w) (Case 1).
            also: further parameters, whose gradients come last.
            scale: factor of the backward pass, by which the gradients are divided again.

        Raises:
            UnperturbedLayer: not one quantized layer, or no member at all, takes part in the loss.
        """
        through_origins = through_rounding or bool(also) or self._moves_origins
        with (
            weights_taken(self._owners) if through_origins else weights_constant(self._unmoved),
            torch.enable_grad(),
        ):
            ports, unserved = _ports(self.layers)
            with perturbed(list(unserved), list(unserved.values())):
                value = loss()
        weights = [layer.latent_weight() for layer in self.layers] if through_rounding else ports
        members = [*weights, *self.parameters]
        wanted = [*members, *also]
        gradients = torch.autograd.grad(scaled(value, scale), wanted, allow_unused=True) if members else ()
        if scale != 1.0:
            gradients = tuple(None if g is None else g / scale for g in gradients)
        if all(gradient is None for gradient in gradients[: len(ports) or len(members)]):
            what = "quantized layer" if self.layers else "tensor of the perturbed kinds"
            raise UnperturbedLayer(f"no {what} takes part in the loss: there is nothing to perturb")
        once = [
            None
            if layer.tied_to
            else gradient  # the first layer with that weight has the gradient of all uses
            for layer, gradient in zip(self.layers, gradients, strict=False)
        ]
        if through_rounding:
            once = self.at_quantized(once)
        return value.detach(), [*once, *gradients[len(once) :]]

    @torch.no_grad()
    def at_quantized(self, gradients: Sequence[Tensor | None]) -> Gradients:
        """Gradients to the layers' float weights, in the unit of the quantized ones: times a dropped deviation."""
        dropped = [layer.dropped_deviation() for layer in self.layers]
        return [g if g is None or d is None else g * d for g, d in zip(gradients, dropped, strict=True)]

    def ascent(
        self,
        gradients: Sequence[Tensor | None],
        rho: float,
        unit: RadiusUnit,
        adaptive: Adaptive | None = None,
    ) -> Perturbation:
        """The perturbation of radius ``rho`` that raises the loss most, to first order.

        Args:
            gradients: as from ``gradients``; None counts as zero (a layer that did not run).
            rho: radius, in units of each layer's weight deviation, or absolute.
            unit: which of the two.
            adaptive: relative to the magnitude of each number; None for the same radius everywhere.

        Returns:
            Detached tensors; zero where the gradient is zero. The joint norm of e / T is rho.
        """
        like: list[Tensor] = [*(layer.latent_weight() for layer in self.layers), *self.parameters]
        scales = self._scales(unit, adaptive)
        scaled = [g if g is None or t is None else g * t for g, t in zip(gradients, scales, strict=True)]
        squares = [_square(g) for g in scaled if g is not None]
        norm = torch.stack(squares).sum().sqrt()
        factor = rho / (norm + TINY)
        outer = (
            scales if adaptive is None or adaptive.numerator == "t2" else self._scales(unit, Adaptive(0.0))
        )
        inner = (
            scaled
            if outer is scales
            else [g if g is None or t is None else g * t for g, t in zip(gradients, outer, strict=True)]
        )
        steps = [
            torch.zeros_like(p) if g is None else g * (factor if t is None else factor * t)
            for p, g, t in zip(like, inner, outer, strict=True)
        ]
        count = len(self.layers)
        return Perturbation(steps[:count], steps[count:], norm)

    @torch.no_grad()
    def _scales(self, unit: RadiusUnit, adaptive: Adaptive | None) -> list[Tensor | None]:
        """T_p for every member of the set; None stands for 1."""
        weights = [
            _scale(
                layer.effective_weight,
                layer.quantized_weight,
                "absolute" if layer.dropped_deviation() is not None else unit,  # the deviation of Q(w) is 1
                adaptive,
            )
            for layer in self.layers
        ]
        return weights + [
            _scale(member.weight, member.parameter.detach, unit, adaptive if member.scales else None)
            for member in self._members
        ]

    @contextmanager
    def applied(self, perturbation: Perturbation) -> Iterator[None]:
        """Within the context the model computes at the perturbed point; afterwards bit for bit as before."""
        before = [parameter.detach().clone() for parameter in self.parameters]
        try:
            with torch.no_grad():
                for parameter, step in zip(self.parameters, perturbation.parameters, strict=True):
                    parameter.add_(step)
            anew = self._moves_origins and any(layer.given_weight is not None for layer in self._owners)
            with (
                weights_given(self._owners) if anew else nullcontext(),
                moved(self.layers, perturbation.weights),
            ):
                yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)


def _ports(layers: Sequence[QuantizedLayer]) -> tuple[list[Tensor], dict[QuantizedLayer, Tensor]]:
    """The leaf that collects dL/dQ(w), for every layer; and the leaves that still must be set as perturbations.

    Given weights are leaves by themselves.
    """
    unserved = [
        layer for layer in layers if layer.given_weight is None or not layer.given_weight.requires_grad
    ]
    zeros = dict(zip(unserved, zero_ports(unserved), strict=True))
    ports = [zeros.get(layer, layer.given_weight) for layer in layers]
    return [port for port in ports if port is not None], zeros


def add_up(sums: Gradients, gradients: Gradients, factor: float = 1.0) -> Gradients:
    """``sums + factor * gradients``, tensor by tensor; None stands for zero, and no ``sums`` for all zeros."""
    if factor != 1.0:
        gradients = [None if g is None else g * factor for g in gradients]
    if not sums:
        return gradients
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, gradients, strict=True)]


def scaled(loss: Tensor, scale: float) -> Tensor:
    """``scale * loss``, in float32 at least; the loss itself for 1."""
    return loss if scale == 1.0 else loss * torch.tensor(scale, device=loss.device)


def _square(g: Tensor) -> Tensor:
    """Sum of squares, in float32 at least."""
    return (g if g.dtype == torch.float64 else g.float()).square().sum()


def _scale(
    weight: Callable[[], Tensor] | None,
    value: Callable[[], Tensor],
    unit: RadiusUnit,
    adaptive: Adaptive | None,
) -> Tensor | None:
    deviation = None if weight is None or unit == "absolute" else _deviation(weight)
    if adaptive is None:
        return deviation
    return value().abs() + adaptive.eta * (1.0 if deviation is None else deviation)


def _deviation(weight: Callable[[], Tensor]) -> Tensor:
    """Of the weight; a single number has none and gives its magnitude."""
    with torch.no_grad():
        value = weight()
        return value.std() if value.numel() > 1 else value.abs().sum()


def _members(model: nn.Module, kinds: set[Kind]) -> Iterator[_Member]:
    """Parameters of the asked kinds, each once, in order of registration."""
    seen: set[int] = set()
    in_float = not quantized_layers(model)
    for module in model.modules():
        chosen = _float_candidates(module, kinds) if in_float else _candidates(module, kinds)
        for member in chosen:
            if member.parameter.requires_grad and id(member.parameter) not in seen:
                seen.add(id(member.parameter))
                yield member


def _candidates(module: nn.Module, kinds: set[Kind]) -> Iterator[_Member]:
    """Parameters of a module of a quantized network."""
    if isinstance(module, QuantizedProduct | QuantizedJunction) and "activation_clips" in kinds:
        yield from _levels(module)
    if isinstance(module, _NORMS) and "norms" in kinds:
        yield from _present((module.weight, True), (module.bias, False))
    if isinstance(module, QuantizedLayer):
        if "latent_weights" in kinds:
            yield _Member(module.latent_weight(), True, module.effective_weight)
        if "biases" in kinds:
            yield from _present(*((module._parameters.get(name), False) for name in ("bias", "in_proj_bias")))
        if "activation_clips" in kinds:
            yield from _levels(module.input_quantizer)
        if "weight_clips" in kinds:
            yield from _levels(module.weight_quantizer)


def _float_candidates(module: nn.Module, kinds: set[Kind]) -> Iterator[_Member]:
    """Parameters of a module of a network without quantizers: of norms, biases, and all others as weights."""
    for name, parameter in module._parameters.items():
        if parameter is None:
            continue
        if isinstance(module, _NORMS):
            kind: Kind = "norms"
        else:
            kind = "biases" if name.endswith("bias") else "latent_weights"
        if kind in kinds:
            weight = parameter.detach if kind == "latent_weights" else None
            yield _Member(parameter, not name.endswith("bias"), weight)


def _present(*parameters: tuple[nn.Parameter | None, bool]) -> Iterator[_Member]:
    """Those that are not None; with each, whether it multiplies."""
    for parameter, multiplies in parameters:
        if parameter is not None:
            yield _Member(parameter, multiplies)


def _levels(quantizer: nn.Module) -> Iterator[_Member]:
    """What a quantizer learns: levels and steps multiply; an offset shifts."""
    for name, parameter in quantizer.named_parameters():
        yield _Member(parameter, name.rpartition(".")[2] != "offset")
