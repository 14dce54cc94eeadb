"""ASGA: bits by gradient descent on a small data set, with aligned gradients.

The search prefers bits whose loss is low and stays low nearby; its result is meant for a network on another data set.
Every free layer computes with all its options at once (``search.mixture``). Weights w and logits A are trained
together on the loss L, on the loss at a perturbed point, and on the excess over the budget:

    pass 1    L, g = dL/dp,  p the mixed quantized weights, biases and norm parameters
    ascent    e = (rho / ||s g|| - a) s**2 g,  s the deviation of a layer's weights, 1 for the other parameters
    pass 2    L_p = L at p + e, batch statistics frozen
    update    1/2 grad L + 1/2 grad L_p  to w and A,  and to A once
              lambda sum_k max(0, E[c_k] / C_k - 1)**2 + 0.001 E[c_k] / C_k,  k over the bounds C_k of the budget
    radius    rho = clip(ln(1 + h), rho_min, rho_max) for the next step,  h = max(0, L_p - L), a running mean

The expected cost weights the options by their shares; once the shares are 0 or 1 it is exactly the cost of the
choice. Lambda rises from 0 over the first tenth of the steps; learning rates follow a cosine to 0. The result is the
likeliest choice within the budget: the least sum of -log p_o, solved as an exact knapsack. If the likeliest option of
every decision fits and uses the budget, that is the result.

Sources: the idea, the radius and the proxy set are those of "Learning from Loss Landscape: Generalizable
Mixed-Precision Quantization via Adaptive Sharpness-Aware Gradient Aligning" (ASGA, arXiv:2505.04877), whose full text
was not available. The update is that of SAGM (Wang et al., CVPR 2023, arXiv:2303.10353), as released; the mixtures
follow EdMIPS (arXiv:2004.05795).

Differs from ASGA:

- rho does not fall below ``rho_min``: to first order h = rho ||g||, so ln(1 + h) alone shrinks to 0 wherever
  ||g|| < 1. A running mean of h is used.
- rho is in units of weight deviations, and the perturbation is added to quantized weights, as in SAQ.
- An exact knapsack replaces lowering bits one by one until the budget is met.
- Logits have their own optimizer, Adam, and a step uses few images: less than an epoch suffices instead of 90
  (``logit_optimizer="sgd"``, ``step_images`` and ``epochs`` as published: recipe ``paper-asga``).
- ``bilevel`` trains weights and logits on different images, alternating by epoch (DARTS, arXiv:1806.09055, alternates
  by step).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from saqcli import distributed
from saqcli.errors import ConfigError, TrainingDiverged
from saqcli.quant.layer import frozen_batch_stats
from saqcli.searchers.knapsack import best_choice, untrained_choice
from saqcli.searchers.mixture import Mixtures
from saqcli.searchers.problem import Batches, SearchProblem, SearchResult, remaining_batches
from saqcli.searchers.supernet import Scorer, Supernet
from saqcli.training.memory import retry_on_oom
from saqcli.training.minimizers import Chunk
from saqcli.training.minimizers.base import average_gradients, check_step, gradients_of, running_statistics
from saqcli.training.objective import cut, micro_batches
from saqcli.training.optimizer import Rates
from saqcli.training.options import check_choice, check_count, check_flag, check_number
from saqcli.training.perturbation import Gradients, Perturbation, PerturbedSet, RadiusUnit, add_up
from saqcli.training.step import Recovery, Snapshot
from saqcli.units import format_quantity

Align = Literal["sagm", "none"]
RAMP_SHARE = 0.1  # share of the steps over which the budget's weight rises to its full value
EXPECTED_COST_WEIGHT = 1e-3  # weight of the expected cost itself
GAP_DECAY = 0.9  # decay of the running mean of the gap


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of ASGA.

    Attributes:
        epochs: passes over the images; a fraction stops within an epoch.
        step_images: images per step; a batch is cut into such parts.
        rho_min: least radius.
        rho_max: greatest radius, and the first.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        alignment: ``a``, which shortens the ascent along the gradient and so aligns the two gradients.
        align: ``sagm``, or ``none`` for the same search on the plain loss, without a second pass.
        cost_weight: ``lambda``.
        logit_lr: initial learning rate of the logits.
        logit_optimizer: ``adam``, or ``sgd`` with momentum 0.9 as in EdMIPS.
        temperature_end: softmax temperature at the last step, from 1 at the first; 1 keeps it constant.
        bilevel: train the logits on held-out images.

    Raises:
        ConfigError: an option has an unknown value or is out of range.
    """

    epochs: float = 0.25
    step_images: int = 32
    rho_min: float = 0.01
    rho_max: float = 0.1
    rho_unit: RadiusUnit = "deviation"
    alignment: float = 1e-3
    align: Align = "sagm"
    cost_weight: float = 3.0
    logit_lr: float = 0.1
    logit_optimizer: Literal["adam", "sgd"] = "adam"
    temperature_end: float = 1.0
    bilevel: bool = False

    def __post_init__(self) -> None:
        check_number("epochs", self.epochs, 0)
        if not self.epochs:
            raise ConfigError(f"epochs {self.epochs!r} is out of range: give more than 0")
        check_number("rho_min", self.rho_min, 0)
        check_number("rho_max", self.rho_max, self.rho_min)
        for option in ("alignment", "cost_weight", "logit_lr"):
            check_number(option, getattr(self, option), 0)
        check_number("temperature_end", self.temperature_end, 0.01)
        check_count("step_images", self.step_images)
        check_flag("bilevel", self.bilevel)
        check_choice("rho_unit", self.rho_unit, get_args(RadiusUnit))
        check_choice("align", self.align, get_args(Align))
        check_choice("logit_optimizer", self.logit_optimizer, ("adam", "sgd"))


class Descent:
    """The state of one search: trained tensors, optimizers and progress.

    Attributes:
        model: with mixtures in place of quantizers.
        phases: of an epoch: images, and what is trained on them.
        total: batches of the whole search.
        done: batches so far; a step may cover a part of one.
        rho: radius of the next step.
        gap: running mean of h; None before the first step.
        trace: loss and h of every step so far.
    """

    def __init__(self, settings: Settings, problem: SearchProblem) -> None:
        self.settings, self.problem = settings, problem
        self.supernet = Supernet(problem)
        self.supernet.settle()
        self.model = problem.model
        self.optimizer = problem.optimizer(self.model)
        self.mixtures = Mixtures(self.supernet)
        self.logits = self.mixtures.parameters()
        self.logit_optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.logits, lr=settings.logit_lr)
            if settings.logit_optimizer == "adam"
            else torch.optim.SGD(self.logits, lr=settings.logit_lr, momentum=0.9)
        )
        groups = self.optimizer.param_groups
        self.weights = [p for group in groups for p in group["params"] if p.requires_grad]
        self.set = PerturbedSet(self.model, ("weights", "biases", "norms"))
        self._rates = Rates(self.optimizer, self.logit_optimizer)
        images = problem.images
        self.phases: list[tuple[Batches, set[str]]] = [(images.whole, {"weights", "logits"})]
        if settings.bilevel:
            self.phases = [(images.training, {"weights"}), (images.held_out, {"logits"})]
        self.total = settings.epochs * sum(len(batches) for batches, _ in self.phases)
        self.done = 0.0
        self.rho = settings.rho_max
        self.gap: float | None = None
        self.trace: list[tuple[float, float]] = []
        self._since = 0  # number of steps before this epoch
        self.recovery = Recovery()

    def run(self) -> None:
        """Run all steps, from the position in the memory."""
        kept = self.problem.memory.load()
        epoch, phase, index = (0, 0, 0) if kept is None else self._load(kept)
        self.model.train()
        while epoch < self.settings.epochs:
            self._run_phase(epoch, phase, index)
            phase, index = phase + 1, 0
            if phase == len(self.phases):
                self._report_epoch(epoch)
                epoch, phase = epoch + 1, 0
        if not self.trace:
            raise distributed.reported_once(
                TrainingDiverged("no step of the search had a finite loss: give a lower search.lr")
            )

    def _run_phase(self, epoch: int, place: int, start: int) -> None:
        """Run one phase of an epoch, from batch ``start``."""
        problem, (batches, learning) = self.problem, self.phases[place]
        count = min(len(batches), math.ceil((self.settings.epochs - epoch) * len(batches)))
        with problem.progress.task(f"search epoch {epoch + 1} of {self.settings.epochs:g}", count) as task:
            task.advance(start)
            for index, (images, labels) in remaining_batches(batches, epoch, start, problem.memory):
                if index == count:
                    break
                on_device = [tensor.to(problem.device) for tensor in (images, labels)]
                for part in cut(on_device, max(1, self.settings.step_images // distributed.count())):
                    self.step(
                        partial(micro_batches, self.model, part[0], part[1]),
                        len(part[1]),
                        len(part[1]) / len(labels),
                        weights="weights" in learning,
                        logits="logits" in learning,
                    )
                task.advance(
                    images=len(labels),
                    loss=self.trace[-1][0] if self.trace else math.nan,
                    entropy=self.mixtures.entropy(),
                    cost=max(self.mixtures.used(problem.budget).tolist()),
                )
                problem.memory.offer(
                    partial(self._state, epoch, place, index + 1), milestone=index + 1 == count
                )

    def step(
        self,
        parts: Callable[[int | None], Chunk],
        images: int,
        share: float = 1.0,
        *,
        weights: bool = True,
        logits: bool = True,
    ) -> None:
        """One update of weights, logits or both.

        Args:
            parts: the images of the step, in micro-batches of at most the given size.
            images: number of images of the step on this rank.
            share: of a batch that the step covers.
            weights: whether to update the weights.
            logits: whether to update the logits.

        Raises:
            TrainingDiverged: the loss is NaN or infinite in many steps in a row.
            DeviceMemoryError: out of memory even with the smallest micro-batch.
        """
        self._schedule()
        learned = [*(self.weights if weights else ()), *(self.logits if logits else ())]
        snapshot, note = Snapshot(self.model), self.problem.progress.note

        def shrink_micro_batch() -> None:
            snapshot.restore()
            self.recovery.shrink_micro_batch(images, note)

        value, raised, norm, total = retry_on_oom(
            lambda: self._passes(parts(self.recovery.micro_batch), learned, weights), shrink_micro_batch
        )
        for parameter, gradient in zip(learned, total, strict=True):
            parameter.grad = gradient
        average_gradients(
            learned, [value, raised, norm, *(running_statistics(self.model) if weights else ())]
        )
        try:
            check_step(value, norm, raised)
        except TrainingDiverged as error:
            snapshot.restore(random=False)
            self.recovery.skip_step(error, note)
            self.done += share
            return
        self.recovery.in_row = 0
        gap = max(0.0, float(raised - value)) if self.settings.align == "sagm" else 0.0
        if logits:
            for parameter, price in zip(self.logits, self._cost_gradients(), strict=True):
                if price is not None:
                    parameter.grad = price if parameter.grad is None else parameter.grad + price
        if weights:
            self.optimizer.step()
        if logits:
            self.logit_optimizer.step()
        self._update_radius(float(value), gap)
        self.done += share

    def _passes(
        self, chunk: Chunk, learned: Sequence[nn.Parameter], weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        """The loss, the loss at the perturbed point, the norm (must be finite too), the gradients."""
        with nullcontext() if weights else frozen_batch_stats(self.model):
            value, gradients = gradients_of(chunk, self.set, also=learned)
        members, total = gradients[: -len(learned)], gradients[-len(learned) :]
        if self.settings.align == "none":
            return value, value.clone(), torch.zeros_like(value), total
        raised, norm, above = self._perturbed_pass(chunk, members, value, learned)
        return value, raised, norm, add_up(add_up([], total, 0.5), above, 0.5)

    def _perturbed_pass(
        self, chunk: Chunk, members: Gradients, value: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss at the perturbed point, the gradient norm, and the gradients there."""
        unit = self.set.ascent(members, 1.0, self.settings.rho_unit)
        factor = self.rho - self.settings.alignment * unit.norm  # of e in units of s**2 g / ||s g||
        weights, parameters = ([factor * e for e in part] for part in (unit.weights, unit.parameters))
        moved = self.set.applied(Perturbation(weights, parameters, unit.norm))
        raised, above = torch.zeros_like(value), list[Tensor | None]()
        with moved, frozen_batch_stats(self.model), torch.enable_grad():
            for loss, share in chunk:
                part = loss()
                above = add_up(above, list(torch.autograd.grad(part, learned, allow_unused=True)), share)
                raised += part.detach() * share
        return raised, unit.norm, above

    def _cost_gradients(self) -> Gradients:
        """Gradients of the expected cost with respect to the logits."""
        weight = self.settings.cost_weight * min(1.0, self.done / max(RAMP_SHARE * self.total, 1.0))
        with torch.enable_grad():
            used = self.mixtures.used(self.problem.budget)
            price = weight * (used - 1).clamp_min(0).square().sum() + EXPECTED_COST_WEIGHT * used.sum()
        return list(torch.autograd.grad(price, self.logits))

    def _schedule(self) -> None:
        """Set learning rates and temperature of the next step."""
        fraction = min(1.0, self.done / max(self.total, 1))
        self._rates.cosine(fraction)
        self.mixtures.set_temperature(self.settings.temperature_end**fraction)

    def _update_radius(self, loss: float, gap: float) -> None:
        """Record a step, and adapt the radius to the gap."""
        self.trace.append((loss, gap))
        self.gap = gap if self.gap is None else GAP_DECAY * self.gap + (1 - GAP_DECAY) * gap
        self.rho = min(self.settings.rho_max, max(self.settings.rho_min, math.log1p(self.gap)))

    def _report_epoch(self, epoch: int) -> None:
        """Report an epoch on one line."""
        problem = self.problem
        losses, gaps = zip(*(self.trace[self._since :] or [(math.nan, math.nan)]), strict=True)
        self._since = len(self.trace)
        choice = best_choice(problem.space, problem.budget, self.mixtures.losses())
        problem.progress.note(
            f"search epoch {epoch + 1} of {self.settings.epochs:g}: loss {sum(losses) / len(losses):.4f}, "
            f"gap {sum(gaps) / len(gaps):.4f} (at most {max(gaps):.4f}), entropy {self.mixtures.entropy():.3f}, "
            f"the current choice costs {format_quantity(problem.space.cost(choice).bops, problem.space.costs.unit)}"
        )

    def _state(self, epoch: int, phase: int, index: int) -> dict[str, Any]:
        """The state that the search resumes from."""
        return {
            "at": [epoch, phase, index],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "logits": [logits.detach() for logits in self.logits],
            "logit_optimizer": self.logit_optimizer.state_dict(),
            "done": self.done,
            "since": self._since,
            "rho": self.rho,
            "gap": self.gap,
            "trace": [list(step) for step in self.trace],
            "setbacks": vars(self.recovery),
        }

    def _load(self, state: dict[str, Any]) -> tuple[int, int, int]:
        """Restore what ``_state`` returned; returns epoch, phase and batch."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.logit_optimizer.load_state_dict(state["logit_optimizer"])
        with torch.no_grad():
            for logits, kept in zip(self.logits, state["logits"], strict=True):
                logits.copy_(kept)
        self.rho, self.gap = state["rho"], state["gap"]
        self.done, self._since = state["done"], state["since"]
        self.trace = [(loss, gap) for loss, gap in state["trace"]]
        vars(self.recovery).update(state["setbacks"])
        epoch, phase, index = state["at"]
        return epoch, phase, index


class ASGA(Settings):
    """Trains option shares together with the weights, by sharpness-aware gradient alignment."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Train shares and weights, then take the likeliest choice; no training if every option fits the budget.

        Raises:
            InfeasibleBudget: the budget is below the smallest reachable cost.
            TrainingDiverged: the loss is NaN or infinite.
            Interrupted: stopped by the user; the memory holds the progress.
        """
        space = problem.space
        space.check_reachable(problem.budget)
        if problem.budget.admits(space.ceiling):
            return untrained_choice(problem)
        scorer = Scorer(problem)  # before the weights move
        descent = Descent(self, problem)
        descent.run()
        losses = descent.mixtures.losses()
        choice = best_choice(space, problem.budget, losses)
        scored = [scorer(choice)]
        return SearchResult(choice, lambda budget: [best_choice(space, budget, losses)], scorer, scored)
