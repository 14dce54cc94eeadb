"""The minimizers written a second time, on plain float64 tensors: what the contract tests compare with.

Nothing here uses the modules, quantizers or perturbations of the package. A test states a network as a function
(``Problem``); a reference returns the gradient that the base optimizer gets. A minimizer of another package writes its
own beside its class, by ``ascended`` if it perturbs as SAQ does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shifts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """A training step of a quantized network as a function.

    Attributes:
        parameters: the trained tensors by name, leaves in float64; ``requires_grad`` is set.
        kinds: by name, ``latent_weights`` for the float weights of quantized layers; else ``biases``, ``norms``,
            ``activation_clips`` or ``weight_clips``.
        scales: names of the parameters that multiply: neither biases nor shifts.
        quantized: Q(w) by the name of w, detached.
        loss: the mean loss with tensors added: ``name`` to a parameter before it is used, ``Q(name)`` to a quantized
            weight.
    """

    parameters: Mapping[str, Tensor]
    kinds: Mapping[str, str]
    scales: frozenset[str]
    quantized: Mapping[str, Tensor]
    loss: Callable[[Shifts], Tensor]

    def gradients(self, shifts: Shifts | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss with ``shifts``, and its gradient to every parameter."""
        loss = self.loss(shifts or {})
        found = torch.autograd.grad(loss, list(self.parameters.values()))
        return loss.detach(), dict(zip(self.parameters, found, strict=True))


def plain(problem: Problem, state: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Plain training."""
    return problem.gradients()


def saq(problem: Problem, state: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q(w) + e), e along dL/dQ."""
    loss, shifts = ascended(problem, **options)
    return loss, problem.gradients(shifts)[1]


def case1(problem: Problem, state: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q(w) + e), e along dL/dw."""
    loss, shifts = ascended(problem, through_rounding=True, **options)
    return loss, problem.gradients(shifts)[1]


def asaq(
    problem: Problem, state: dict[str, Any], *, eta: float = 0.01, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q(w) + e), e relative to the magnitudes."""
    loss, shifts = ascended(problem, eta=eta, **options)
    return loss, problem.gradients(shifts)[1]


def sam(problem: Problem, state: dict[str, Any], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q(w + e)), e along dL/dw; all parameters ascend."""
    loss, shifts = ascended(problem, latent=True, **options)
    return loss, problem.gradients(shifts)[1]


def msam(
    problem: Problem, state: dict[str, Any], *, beta: float = 0.9, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """L(Q(w) + e), e along the decaying sum of the gradients that the base optimizer got so far."""
    sums: dict[str, Tensor] = state.get("sums", {})
    along = {
        name: sums[name] for name in sums if problem.kinds[name] in ("biases", "norms", "activation_clips")
    }
    along |= {f"Q({name})": sums[name] for name in problem.quantized if name in sums}
    loss, gradients = problem.gradients(_steepest(problem, along, **options) if along else None)
    state["sums"] = {name: beta * sums.get(name, 0) + gradient for name, gradient in gradients.items()}
    return loss, gradients


def ascended(
    problem: Problem,
    *,
    rho: float,
    rho_unit: str = "deviation",
    latent: bool = False,
    through_rounding: bool = False,
    eta: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss at the weights, and the perturbation: e = rho T**2 g / ||T g||, the norm over all tensors.

    Args:
        problem: the network.
        rho: radius.
        rho_unit: ``deviation`` or ``absolute``.
        latent: perturb float weights and their clipping levels (SAM) instead of quantized weights.
        through_rounding: take the gradient of the float weight for that of the quantized one (Case 1).
        eta: T is the magnitude plus ``eta`` units (ASAQ); None for the unit alone.
    """
    moved = {
        name: value
        for name, value in problem.parameters.items()
        if latent or problem.kinds[name] in ("biases", "norms", "activation_clips")
    }
    zeros = {name: torch.zeros_like(value) for name, value in moved.items()}
    if not latent:
        zeros |= {f"Q({name})": torch.zeros_like(value) for name, value in problem.quantized.items()}
    for zero in zeros.values():
        zero.requires_grad_(True)
    loss = problem.loss(zeros)
    found = torch.autograd.grad(loss, list(zeros.values()), retain_graph=True)
    gradients = dict(zip(zeros, found, strict=True))
    if through_rounding:
        weights = [problem.parameters[name] for name in problem.quantized]
        for name, gradient in zip(problem.quantized, torch.autograd.grad(loss, weights), strict=True):
            gradients[f"Q({name})"] = gradient
    return loss.detach(), _steepest(problem, gradients, rho, rho_unit, eta)


def _steepest(
    problem: Problem,
    gradients: Mapping[str, Tensor],
    rho: float,
    rho_unit: str = "deviation",
    eta: float | None = None,
) -> dict[str, Tensor]:
    """e = rho T**2 g / ||T g||."""
    scale = {name: _scale(problem, name, rho_unit, eta) for name in gradients}
    norm = sum((scale[name] * gradients[name]).square().sum() for name in gradients) ** 0.5
    return {name: rho * scale[name] ** 2 * gradients[name] / norm for name in gradients}


def _scale(problem: Problem, name: str, rho_unit: str, eta: float | None) -> Any:
    """T of a tensor."""
    weight = name.removeprefix("Q(").removesuffix(")")
    deviation: Any = 1.0
    if weight in problem.quantized and rho_unit == "deviation":
        value = problem.parameters[weight].detach()
        deviation = ((value - value.mean()).square().sum() / (value.numel() - 1)).sqrt()
    if eta is None:
        return deviation
    if name != weight:
        return problem.quantized[weight].abs() + eta * deviation
    if name in problem.scales:
        return problem.parameters[name].detach().abs() + eta * deviation
    return deviation
