"""What all sharpness-aware minimizers do, whatever they perturb and by which gradient.

    pass 1    gradients at the quantized weights; they accumulate nowhere
    ascent    the perturbation of radius rho that raises the loss most         see ``sharpness``
    pass 2    gradients at the perturbed point, through the straight-through estimator; batch statistics frozen
    update    the base optimizer's step on the unperturbed weights

Chunks of a batch and data-parallel shards each ascend on their own data, as sharpness-aware minimization prescribes
(Foret et al., arXiv:2010.01412, section 4.1: m-sharpness).

With an ``interval`` of k only every k-th step ascends, the first one included; the others are plain, or go on with
what the last ascent added (``look_ahead``).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from saqcli.algorithms.minimizers.batches import Chunk, accumulate, gradients_of
from saqcli.algorithms.minimizers.look_ahead import LookAhead
from saqcli.algorithms.minimizers.passes import Passes, agree
from saqcli.algorithms.options import check_choice, check_count, check_number
from saqcli.algorithms.sharpness import (
    PERTURBED,
    Adaptive,
    Gradients,
    Kind,
    PerturbedSet,
    RadiusUnit,
    add_up,
)
from saqcli.errors import ConfigError
from saqcli.quant.layers import frozen_batch_stats


class SharpnessAware:
    """Descends on the loss at a perturbed point.

    Args:
        model: wrapped, quantizers installed.
        base: the optimizer that moves the weights.
        rho: perturbation radius.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        perturb: which tensors ascend; None for what the method is known for.
        bn_second_pass: whether pass 2 updates the running statistics of batch norms.
        interval: ascend at every ``interval``-th step.
        reuse: at the steps between, how much of the last ascent is added, see ``LookAhead``; 0 for nothing.

    Raises:
        ConfigError: a word that is not among an option's choices, or an interval below 1.
    """

    perturbed_kinds: ClassVar[tuple[Kind, ...]] = PERTURBED
    through_rounding: ClassVar[bool] = False
    adaptive: Adaptive | None = None

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        *,
        rho: float,
        rho_unit: RadiusUnit = "deviation",
        perturb: Sequence[Kind] | None = None,
        bn_second_pass: Literal["freeze", "update"] = "freeze",
        interval: int = 1,
        reuse: float = 0.0,
    ) -> None:
        check_number("rho", rho, least=0)
        check_number("reuse", reuse, least=0)
        check_count("interval", interval)
        self.model = model
        self.base = base
        self.rho = rho
        self.rho_unit: RadiusUnit = rho_unit
        check_choice("bn_second_pass", bn_second_pass, ("freeze", "update"))
        check_choice("rho_unit", rho_unit, get_args(RadiusUnit))
        for kind in [perturb] if isinstance(perturb, str) else perturb or ():
            check_choice("perturb", kind, get_args(Kind))
        if isinstance(perturb, str):
            raise ConfigError(f"perturb {perturb!r} is one word: give a list, such as [{perturb!r}]")
        self.freeze = bn_second_pass == "freeze"
        self.set = PerturbedSet(model, self.perturbed_kinds if perturb is None else perturb)
        self.interval = interval
        self.done = 0  # steps so far
        trained = [p for group in base.param_groups for p in group["params"] if p.requires_grad]
        self.look_ahead = LookAhead(trained, reuse) if reuse and interval > 1 else None

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """One update; every chunk is perturbed by its own gradient."""
        return self.update(self.gradients(chunks))

    def gradients(self, chunks: Sequence[Chunk]) -> Passes:
        """Both passes over every chunk, or the plain one between two ascents; gradients are left in the parameters."""
        self.base.zero_grad()
        if self.done % self.interval == 0:
            return self._ascend(chunks)
        return Passes(torch.stack([accumulate(chunk) for chunk in chunks]).sum(), [], [])

    def update(self, passes: Passes) -> Tensor:
        """The base optimizer's step, with what the last ascent added where that is gone on with."""
        passes = agree(self.model, self.base, passes)
        if self.look_ahead and passes.ascended:
            self.look_ahead.remember(passes.plain)
        elif self.look_ahead:
            self.look_ahead.add()
        self.base.step()
        self.done += 1
        return passes.loss

    def _ascend(self, chunks: Sequence[Chunk]) -> Passes:
        """Both passes; gradients at the perturbed points are left in the parameters, those at the weights given back
        where the look-ahead wants them."""
        losses, norms = [], []
        also = self.look_ahead.parameters if self.look_ahead else []
        plain: Gradients = []
        for chunk in chunks:
            share = sum(micro_batch.share for micro_batch in chunk)
            loss, gradients = self._first_pass(chunk)
            members = len(gradients) - len(also)
            plain = add_up(plain, gradients[members:], share)
            perturbation = self.set.ascent(gradients[:members], self.rho, self.rho_unit, self.adaptive)
            stats = frozen_batch_stats(self.model) if self.freeze else nullcontext()
            with self.set.applied(perturbation), stats:
                perturbed_loss = accumulate(chunk)
            losses.append(loss * share)
            norms += [perturbation.norm, perturbed_loss]
        known = [torch.zeros_like(p) if g is None else g for p, g in zip(also, plain, strict=True)]
        return Passes(torch.stack(losses).sum(), norms, known, ascended=True)

    def _first_pass(self, chunk: Chunk) -> tuple[Tensor, Gradients]:
        """Mean loss of the chunk and its gradients to the perturbed set, then to what the look-ahead follows."""
        also = self.look_ahead.parameters if self.look_ahead else []
        return gradients_of(chunk, self.set, ascent=True, through_rounding=self.through_rounding, also=also)

    def state_dict(self) -> dict[str, Any]:
        """Where in the interval it is, and what it goes on with."""
        return {"done": self.done, "look_ahead": self.look_ahead and self.look_ahead.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        self.done = state["done"]
        if self.look_ahead:
            self.look_ahead.load_state_dict(state["look_ahead"])
