"""What sharpness-aware minimizers share: a step of two passes.


    pass 1    gradients at the quantized weights, which accumulate nowhere
    ascent    the perturbation of radius rho that raises the loss most         see ``training.perturbation``
    pass 2    gradients at the perturbed point, by the straight-through estimator; batch statistics frozen
    update    the base optimizer's step on the unperturbed weights

Every chunk of a batch and every process ascends on its own data, as sharpness-aware minimization prescribes (Foret et
al., arXiv:2010.01412, section 4.1: m-sharpness). With an ``interval`` of k the ascent takes place at every k-th step,
the first one included; the steps in between are plain, or reuse the last ascent (``LookAhead``). The first ``start``
steps are plain: sharpness matters late in training (Zhou et al., arXiv:2410.10373).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from saqcli.errors import ConfigError
from saqcli.models.preprocessing import SMALL_IMAGES
from saqcli.quant.layer import frozen_batch_stats, quantized_layers
from saqcli.training.minimizers.base import (
    Ascent,
    Chunk,
    Minimizer,
    Passes,
    gradients_of,
    inner,
    orthogonal_part,
)
from saqcli.training.options import check_choice, check_count, plain_number
from saqcli.training.perturbation import (
    PERTURBED,
    Adaptive,
    Kind,
    Perturbation,
    PerturbedSet,
    RadiusUnit,
)
from saqcli.training.radii import published_radius

ROUNDING = 1e-5  # relative to g_s; a smaller g_v is rounding error between equal gradients


class LookAhead:
    """Reuses the last ascent in the steps until the next one (LookSAM).

    At a step with an ascent, g is the gradient at the weights and g_s the one at the perturbed point. Their difference
    changes slowly, so it is stored and added to the plain gradients at its relative size:

        g_v = g_s - (<g, g_s> / <g, g>) g                   the part of g_s that is orthogonal to g
        g + reuse * ||g|| / ||g_v|| * g_v                   at the steps in between

    Norms are joint over all trained parameters. Source: Liu et al., arXiv:2203.02714, Algorithm 1, whose alpha is
    ``reuse`` (0.7 there). Differs from the paper: norms are joint instead of per layer.

    Args:
        parameters: the trained parameters.
        reuse: length of the added vector relative to the plain gradient.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], reuse: float) -> None:
        self.parameters = list(parameters)
        self.reuse = reuse
        self._direction: list[Tensor] | None = None  # g_v / ||g_v||

    @torch.no_grad()
    def remember(self, plain: Sequence[Tensor]) -> None:
        """Store g_v: ``plain`` is g, one tensor per parameter; ``grad`` holds g_s, both the means over all ranks."""
        ascended = [_gradient(p) for p in self.parameters]
        orthogonal = orthogonal_part(ascended, plain)
        norm, whole = inner(orthogonal, orthogonal).sqrt(), inner(ascended, ascended).sqrt()
        scale = torch.where(norm > ROUNDING * whole, 1 / norm, torch.zeros_like(norm))
        self._direction = [g * scale for g in orthogonal]

    @torch.no_grad()
    def add(self) -> None:
        """Add the stored direction to the gradients of a plain pass; nothing before the first ascent."""
        if self._direction is None:
            return
        plain = [_gradient(p) for p in self.parameters]
        length = self.reuse * inner(plain, plain).sqrt()
        for parameter, direction in zip(self.parameters, self._direction, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(direction * length)

    def state_dict(self) -> dict[str, Any]:
        """The direction."""
        return {"direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        kept = state["direction"]
        if kept is not None:
            kept = [value.to(p.device) for value, p in zip(kept, self.parameters, strict=True)]
        self._direction = kept


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class SharpnessAware(Minimizer):
    """Descends on the loss at a perturbed point.

    What the perturbation is computed on:

    ranks               each rank's own images; gradients of pass 2 are averaged (m-sharpness)
    micro-batches       all of a chunk share one; ``step([closure, ...])`` is one chunk
    chunks              each has its own; ``step([[closure], ...])``
    autocast            gradients in float32, of a forward pass in lower precision; quantizers compute in float32;
                        parameters in bfloat16 are perturbed in bfloat16
    GradScaler          gradients divided by the scale; skipped if gradients overflow, raises if the loss of pass 1 does
    gradient clipping   acts on the gradients of pass 2; the ascent is not clipped
    weight decay        belongs to the base optimizer: the perturbation does not see it
    batch norms         batch statistics in both passes; running statistics, also of instance norms, are those of pass 1
    dropout             each pass draws its own mask, as in other implementations of SAM
    frozen parameters   not perturbed; after freezing or unfreezing, make the minimizer anew
    outside the base    parameters that the base optimizer does not update are perturbed unless frozen
    tied weights        one tensor with one perturbation, from the sum of the gradients of all uses in quantized layers

    Args:
        model: wrapped, quantizers installed; SAM takes a float model too.
        base: the optimizer that updates the weights.
        rho: perturbation radius; None for the paper's radius for the mean bit-width of the weights, on images larger
            than 64 pixels (0.15 for 2 and 3 bits, 0.3 from 4 bits on), which is in deviations.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        perturb: kinds of tensors that ascend; None for those of the method.
        bn_second_pass: ``update`` lets pass 2 update the running statistics of batch norms.
        interval: ascend at every ``interval``-th step.
        reuse: share of the last ascent added in the steps between, see ``LookAhead``; 0 for none.
        start: number of plain steps before the first ascent.

    Raises:
        ConfigError: a value is not among the choices, ``perturb`` is empty, an absolute radius is not given, an
            interval is below 1, or the method perturbs quantized weights and the model has none.
    """

    perturbed_kinds: ClassVar[tuple[Kind, ...]] = PERTURBED
    through_rounding: ClassVar[bool] = False
    adaptive: Adaptive | None = None

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float | None = None,
        rho_unit: RadiusUnit = "deviation",
        perturb: Sequence[Kind] | None = None,
        bn_second_pass: Literal["freeze", "update"] = "freeze",
        interval: int = 1,
        reuse: float = 0.0,
        start: int = 0,
    ) -> None:
        super().__init__(model, base)
        if rho is not None:
            rho = plain_number("rho", rho, least=0)
        reuse = plain_number("reuse", reuse, least=0)
        check_count("interval", interval)
        check_count("start", start, least=0)
        check_choice("rho_unit", rho_unit, get_args(RadiusUnit))
        if rho is None and rho_unit == "absolute":
            raise ConfigError(
                "the paper's radius is in deviations of the weights: give `rho` with an absolute unit"
            )
        self.rho = published_radius(model, SMALL_IMAGES + 1).rho if rho is None else rho
        self.rho_unit: RadiusUnit = rho_unit
        check_choice("bn_second_pass", bn_second_pass, ("freeze", "update"))
        for kind in [perturb] if isinstance(perturb, str) else perturb or ():
            check_choice("perturb", kind, get_args(Kind))
        if isinstance(perturb, str):
            raise ConfigError(f"perturb {perturb!r} is one word: give a list, such as [{perturb!r}]")
        if perturb is not None and not perturb:
            raise ConfigError("perturb is empty: name what ascends, None for the method's kinds, or use QAT")
        self.freeze = bn_second_pass == "freeze"
        kinds = self.perturbed_kinds if perturb is None else perturb
        if "weights" in kinds and not quantized_layers(model):
            raise ConfigError(
                f"{type(self).__name__} perturbs quantized weights and the model has none: quantize it first, or use "
                "SAM, which perturbs float weights"
            )
        self.set = PerturbedSet(model, kinds, frozen=False)
        self.interval, self.start = interval, start
        self.done = 0  # steps so far
        self.look_ahead = LookAhead(self.trained, reuse) if reuse and interval > 1 else None
        self._trainable = self._now_trainable()

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        """As in ``Minimizer``.

        Raises:
            ConfigError: other parameters require gradients than when the minimizer was made.
        """
        now, then = self._now_trainable(), self._trainable
        if len(now) != len(then) or any(p is not other for p, other in zip(now, then, strict=True)):
            raise ConfigError(
                "other parameters require gradients than when the minimizer was made, and it perturbs those of then: "
                "after freezing, unfreezing or replacing parameters, make the minimizer anew over the same optimizer"
            )
        return super().gradients(chunks)

    def _now_trainable(self) -> list[nn.Parameter]:
        """What can ascend, and what a stored direction is for."""
        kept = self.trained if self.look_ahead else []
        return [*(p for p in self.model.parameters() if p.requires_grad), *kept]

    @property
    def ascends(self) -> bool:
        """Whether the next step has an ascent."""
        later = self.done - self.start
        return later >= 0 and later % self.interval == 0

    def ascend(self, chunk: Chunk) -> Ascent | None:
        """The chunk is perturbed by its own gradient; None between two ascents, and before the first."""
        if not self.ascends:
            return None
        also = self.trained if self.look_ahead or self.wants_plain else []
        loss, gradients = gradients_of(
            chunk, self.set, ascent=True, through_rounding=self.through_rounding, also=also, scale=self.scale
        )
        members = len(gradients) - len(also)
        perturbation = self.set.ascent(gradients[:members], self.rho, self.rho_unit, self.adaptive)
        return Ascent(loss, self._at(perturbation), [perturbation.norm], gradients[members:])

    @contextmanager
    def _at(self, perturbation: Perturbation) -> Iterator[None]:
        """The model at the perturbed point."""
        stats = frozen_batch_stats(self.model) if self.freeze else nullcontext()
        with self.set.applied(perturbation), stats:
            yield

    def descend(self, passes: Passes) -> None:
        """Between two ascents, adds what the last one added, if that is reused."""
        if self.look_ahead and passes.ascended:
            self.look_ahead.remember(passes.plain)
        elif self.look_ahead:
            self.look_ahead.add()
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        """The position in the interval, and the direction that is reused."""
        return {"done": self.done, "look_ahead": self.look_ahead and self.look_ahead.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of ``state_dict``."""
        self.done = state["done"]
        if self.look_ahead:
            self.look_ahead.load_state_dict(state["look_ahead"])
