"""SAMQ: bits drawn by a controller that learns from the sharpness-aware loss of a supernet.

The supernet shares weights among all configurations; supernet and controller are trained in turns:

    for every epoch
        model phase         for every training batch: draw bits, one SAQ step of the supernet at these bits
        controller phase    for every held-out batch: draw bits b, one step of the controller on

            R(b) log pi(b) - entropy_weight * H(pi)          to be minimized; R is a cost
            R(b) = L(Q(w, b) + e) - L(Q(w, r)) + cost_weight * (c(b) / C - 1)**2          r a reference configuration

    then draw configurations that fit the budget, and take the best one

``e`` is SAQ's perturbation on the same held-out batch, over every searched layer. R is a plain number: no gradient
passes through it. Controller phases begin after ``warmup`` epochs. Source: Liu et al., arXiv:2111.12273, section 4,
Algorithm 1 and its released code.

Differs from the paper; the option in brackets restores the paper's behavior:

- A moving average of R is subtracted (``baseline="none"``). The loss of a fixed configuration r on the same images is
  subtracted too (``reference="none"``): it does not depend on b, and removes the noise of the batch from the reward. A
  batch is cut into parts of ``reward_images``, one draw each.
- The penalty is relative to the budget, so that one weight serves every model; ``cost_unit="M"`` with 1e-4 is the
  paper's on CIFAR, ``"G"`` with 5e-3 that for ImageNet. C is the middle of the searched window, in the paper the budget
  (``penalty_center="budget"``); of several bounds, the one that is used most counts.
- Draws are repeated until one fits the budget and uses it (``within="anything"``). The objective is then the mean
  cost given that a draw fits; with a baseline subtracted, omitting the probability of fitting from the gradient makes
  no difference on average. The controller starts at configurations that cost the budget (``prior="none"``), by
  default (``error``) at those with little quantization noise: uniform draws spend so much on a few layers that all
  others have 2 bits, and a short search would end before the controller unlearns them.
- Every reward is used ``replay`` times, clipped as in PPO (arXiv:1707.06347), since a search is short (``replay=1``).
- Draws are compared at the starting point of fine-tuning: float weights, calibrated at the draw's bits, with
  corrections (``score_in="supernet"`` compares them in the trained supernet). The configuration of least quantization
  noise is compared with them (``compare_reference=False``). The least divergence from the float network wins
  (``select_by="accuracy"`` as in the paper's text, ``sharpness`` as in the released code).
- The learning rate of the weights follows a cosine; ``milestones=[50]`` divides it as the paper says, ``[80]`` as the
  released scripts do. Adam's betas are torch's; those of the released code are (0.5, 0.999) (``controller_betas``).
- In the warm-up the untrained controller draws; the paper draws evenly (``warmup_draws="uniform"``).
- The paper's listing has the controller phase first in an epoch, the released code the model phase, as here.
- The released code perturbs the first layer and the classifier only, and keeps the reward attached to its graph.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from saqcli import distributed
from saqcli.errors import ConfigError
from saqcli.quant.cost import USE_MIDDLE, Budget
from saqcli.searchers.controller import ROUNDS, Baseline, Controller, Reinforce, draw_within
from saqcli.searchers.knapsack import (
    FRONT_DRAWS,
    best_choice,
    budget_logits,
    in_window,
    informed_logits,
    untrained_choice,
)
from saqcli.searchers.problem import SearchProblem, SearchResult, remaining_batches
from saqcli.searchers.separable import relative_noise
from saqcli.searchers.supernet import Scorer, Supernet, closeness, rank, score_all
from saqcli.tasks import classification
from saqcli.training.memory import retry_on_oom
from saqcli.training.minimizers import Chunk
from saqcli.training.minimizers.base import gradients_of
from saqcli.training.minimizers.cases import SAQ
from saqcli.training.objective import Objective, micro_batches
from saqcli.training.optimizer import Rates
from saqcli.training.options import (
    check_ascending,
    check_betas,
    check_choice,
    check_count,
    check_flag,
    check_number,
)
from saqcli.training.perturbation import PerturbedSet, RadiusUnit
from saqcli.training.step import Recovery, Stepper

T = TypeVar("T")
CostUnit = Literal["budget", "M", "G"]
_UNITS: dict[CostUnit, float] = {"M": 1e6, "G": 1e9}


class SharpnessAwareCost:
    """R of a configuration on a batch.

    Args:
        supernet: in eval mode at every call.
        perturbed: the tensors to perturb, including those of every searched layer.
        rho: radius; 0 for the loss at the quantized weights themselves.
        rho_unit: unit of ``rho``.
        cost_weight: weight of the penalty.
        cost_unit: unit of the costs in the penalty: the ``budget``, or 10**6 (``M``) or 10**9 (``G``) bit-operations.
        center: the penalty's least value is at this share of the budget.
        reference: a choice whose loss on the same images is subtracted; None for no subtraction.

    Attributes:
        recovery: holds the micro-batch size, reduced when memory runs out.
    """

    def __init__(
        self,
        supernet: Supernet,
        perturbed: PerturbedSet,
        *,
        rho: float,
        rho_unit: RadiusUnit,
        cost_weight: float,
        cost_unit: CostUnit,
        center: float,
        reference: Sequence[int] | None,
    ) -> None:
        self.supernet, self.perturbed, self.reference = supernet, perturbed, reference
        self.cost_unit: CostUnit = cost_unit
        self.center = center
        self.rho, self.cost_weight = rho, cost_weight
        self.rho_unit: RadiusUnit = rho_unit
        self.recovery = Recovery()

    def __call__(self, choice: Sequence[int], images: Tensor, labels: Tensor) -> float:
        """R of ``choice`` on images (N, C, H, W) and labels (N,)."""
        reference_loss = 0.0
        if self.reference is not None:
            self.supernet.select(self.reference)
            reference_loss = self.plain_loss(images, labels)
        self.supernet.select(choice)
        return self.losses(images, labels)[1] - reference_loss + self.penalty(choice)

    def penalty(self, choice: Sequence[int]) -> float:
        """The squared distance of ``choice`` from the center, in the unit of costs, times the weight."""
        problem = self.supernet.problem
        cost = problem.space.cost(choice)
        used, bound = max((cost[index] / bound, bound) for index, bound in problem.budget.bounds())
        if self.cost_unit == "budget":
            return self.cost_weight * (used / self.center - 1) ** 2
        return self.cost_weight * ((used - self.center) * bound / _UNITS[self.cost_unit]) ** 2

    def losses(self, images: Tensor, labels: Tensor) -> tuple[float, float]:
        """The loss at the selected bits, and at the perturbed point; both are equal if the radius is 0."""
        if not self.rho:
            value = self.plain_loss(images, labels)
            return value, value
        return self._retried(self._losses, images, labels)

    def plain_loss(self, images: Tensor, labels: Tensor) -> float:
        """The loss at the selected bits."""
        return self._retried(_mean, images, labels)

    def _losses(self, chunk: Chunk) -> tuple[float, float]:
        value, gradients = gradients_of(chunk, self.perturbed)
        ascent = self.perturbed.ascent(gradients, self.rho, self.rho_unit)
        with self.perturbed.applied(ascent):
            return float(value), _mean(chunk)

    def _retried(self, passes: Callable[[Chunk], T], images: Tensor, labels: Tensor) -> T:
        """``passes`` over a batch, in micro-batches that fit in memory; a retry restores nothing (eval mode)."""
        problem, model = self.supernet.problem, self.supernet.model
        images, labels = images.to(problem.device), labels.to(problem.device)
        return retry_on_oom(
            lambda: passes(micro_batches(model, images, labels, self.recovery.micro_batch)),
            lambda: self.recovery.shrink_micro_batch(len(labels), problem.progress.note),
        )

    def sharpness(self, choice: Sequence[int]) -> float:
        """Mean increase of the loss to the perturbed point, over the scoring images."""
        problem = self.supernet.problem
        self.supernet.select(choice)
        self.supernet.model.eval()
        rises = []
        for images, labels in problem.images.scoring:
            value, sharp = self.losses(images, labels)
            rises.append(sharp - value)
        return sum(rises) / len(rises)


@torch.no_grad()
def _mean(chunk: Chunk) -> float:
    return float(sum(loss() * share for loss, share in chunk))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of SAMQ.

    Attributes:
        epochs: of the search; each is a model phase and, after the first ``warmup``, a controller phase.
        warmup: epochs without a controller phase; the last epoch always has one.
        rho: radius of the perturbation in both phases; 0 for none.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        sharpness: whether the controller's cost is the loss at the perturbed point; False is the paper's ablation.
        cost_weight: weight of the penalty.
        cost_unit: see ``SharpnessAwareCost``.
        penalty_center: where the penalty is least: the middle of the ``window``, or the ``budget``.
        entropy_weight: see ``Reinforce``.
        baseline: see ``Reinforce``.
        reference: subtract the loss of a ``fixed`` configuration, or ``none``.
        prior: where the controller starts: at configurations that cost the budget (``budget``), at those of them with
            little quantization noise (``error``), or at uniform probabilities (``none``).
        prior_entropy: entropy of the prior ``error``, as a share of that of ``budget``.
        within: draws are from the ``window`` between ``BUDGET_USE`` of the budget and the budget, or ``anything``.
        controller_lr: learning rate of the controller, see ``Reinforce``.
        controller_decay: weight decay of the controller, see ``Reinforce``.
        controller_betas: betas of the controller's optimizer, see ``Reinforce``.
        milestones: epochs at which the weights' learning rate is divided by 10; none for a cosine to 0.
        warmup_draws: what draws in the epochs of the warm-up: the ``controller``, or ``uniform`` probabilities.
        replay: see ``Reinforce``.
        reward_images: images of a held-out batch per draw.
        draws: configurations to compare at the end.
        compare_reference: whether the configuration of least quantization noise is compared with the draws.
        select_by: least ``divergence`` from the float network on the scoring images, highest ``accuracy`` as in the
            paper, or least ``sharpness`` as in the released code.
        score_in: where draws are compared: in the ``calibrated`` network, which fine-tuning starts from, or in the
            trained ``supernet``; reported scores are calibrated in either case.

    Raises:
        ConfigError: an option has an unknown value or is out of range.
    """

    epochs: int = 3
    warmup: int = 1
    rho: float = 0.4
    rho_unit: RadiusUnit = "deviation"
    sharpness: bool = True
    cost_weight: float = 6.0
    cost_unit: CostUnit = "budget"
    penalty_center: Literal["window", "budget"] = "window"
    entropy_weight: float = 0.02
    baseline: Baseline = "ema"
    reference: Literal["fixed", "none"] = "fixed"
    prior: Literal["error", "budget", "none"] = "error"
    prior_entropy: float = 0.7
    within: Literal["window", "anything"] = "window"
    controller_lr: float = 1e-3
    controller_decay: float = 5e-5
    controller_betas: Sequence[float] = (0.9, 0.999)
    milestones: Sequence[int] = ()
    warmup_draws: Literal["controller", "uniform"] = "controller"
    replay: int = 16
    reward_images: int = 32
    draws: int = 20
    compare_reference: bool = True
    select_by: Literal["divergence", "accuracy", "sharpness"] = "divergence"
    score_in: Literal["calibrated", "supernet"] = "calibrated"

    def __post_init__(self) -> None:
        for option in ("epochs", "replay", "reward_images", "draws"):
            check_count(option, getattr(self, option))
        check_count("warmup", self.warmup, 0)
        check_flag("sharpness", self.sharpness)
        check_flag("compare_reference", self.compare_reference)
        check_betas("controller_betas", self.controller_betas)
        check_ascending("milestones", self.milestones)
        for option in (
            "rho", "cost_weight", "entropy_weight", "controller_lr", "controller_decay", "prior_entropy"
        ):  # fmt: skip
            check_number(option, getattr(self, option), 0)
        check_choice("rho_unit", self.rho_unit, ("deviation", "absolute"))
        check_choice("baseline", self.baseline, ("ema", "none"))
        check_choice("reference", self.reference, ("fixed", "none"))
        check_choice("prior", self.prior, ("error", "budget", "none"))
        check_choice("within", self.within, ("window", "anything"))
        check_choice("score_in", self.score_in, ("calibrated", "supernet"))
        check_choice("select_by", self.select_by, ("divergence", "accuracy", "sharpness"))
        check_choice("cost_unit", self.cost_unit, get_args(CostUnit))
        check_choice("penalty_center", self.penalty_center, ("window", "budget"))
        check_choice("warmup_draws", self.warmup_draws, ("controller", "uniform"))
        if self.select_by == "sharpness" and not (self.sharpness and self.rho):
            raise ConfigError(
                "select_by sharpness needs a perturbation: give rho above 0, and sharpness true"
            )


class AlternatingSearch:
    """The state of one search: supernet, controller, and the position in the schedule."""

    def __init__(self, settings: Settings, problem: SearchProblem) -> None:
        self.settings, self.problem = settings, problem
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.scorer = Scorer(problem)  # copies the weights before they are trained
        self.supernet = Supernet(problem)
        self.supernet.settle()
        self.supernet.switch_norms()
        self.noise = relative_noise(problem)
        self.controller = Controller(problem.space, self._prior(problem.budget), self.generator)
        self.learner = Reinforce(
            self.controller,
            lr=settings.controller_lr,
            weight_decay=settings.controller_decay,
            betas=settings.controller_betas,
            entropy_weight=settings.entropy_weight,
            baseline=settings.baseline,
            replay=settings.replay,
        )
        self.optimizer = problem.optimizer(self.supernet.model)
        self.rates = Rates(self.optimizer)
        self.minimizer = SAQ(
            self.supernet.model, self.optimizer, rho=settings.rho, rho_unit=settings.rho_unit
        )
        whole = Objective(classification.loss)
        self.stepper = Stepper(
            self.supernet.model, self.minimizer, whole, sys.maxsize, Recovery(), problem.progress.note
        )
        self.reference = best_choice(problem.space, problem.budget, self.noise)
        self._rounds = ROUNDS if in_window(problem.space, problem.budget, self.reference) else 1
        self.cost = SharpnessAwareCost(
            self.supernet,
            self.minimizer.set,
            rho=settings.rho if settings.sharpness else 0.0,
            rho_unit=settings.rho_unit,
            cost_weight=settings.cost_weight,
            cost_unit=settings.cost_unit,
            center=USE_MIDDLE if settings.penalty_center == "window" else 1.0,
            reference=self.reference if settings.reference == "fixed" else None,
        )
        self.epoch, self.phase, self.step = 0, 0, 0
        self.best: tuple[float, list[int]] | None = None  # least cost of a draw in the window, and the draw
        kept = problem.memory.load()
        if kept is not None:
            self._load(kept)

    def train(self) -> None:
        """Run all phases of all epochs from the current position."""
        for epoch in range(self.epoch, self.settings.epochs):
            if self.phase == 0:
                self._model_phase(epoch)
                self.epoch, self.phase, self.step = epoch, 1, 0
            if epoch >= min(self.settings.warmup, self.settings.epochs - 1):
                self._controller_phase(epoch)
            self.epoch, self.phase, self.step = epoch + 1, 0, 0

    def _model_phase(self, epoch: int) -> None:
        batches, memory = self.problem.images.training, self.problem.memory
        self.supernet.model.train()
        steps = self.settings.epochs * len(batches)
        title = f"search epoch {epoch + 1} of {self.settings.epochs}, weights"
        with self.problem.progress.task(title, len(batches)) as task:
            task.advance(self.step)
            for index, (images, labels) in remaining_batches(batches, epoch, self.step, memory):
                if self.settings.milestones:
                    self.rates.scale(0.1 ** sum(epoch >= drop for drop in self.settings.milestones))
                else:
                    self.rates.cosine((epoch * len(batches) + index) / steps)
                evenly = self.settings.warmup_draws == "uniform" and epoch < self.settings.warmup
                self.supernet.select(self._drawn_evenly() if evenly else self._draw())
                self.stepper(images.to(self.problem.device), labels.to(self.problem.device))
                task.advance(images=len(labels), loss=self.stepper.loss)
                self.epoch, self.phase, self.step = epoch, 0, index + 1
                memory.offer(self._state, milestone=index + 1 == len(batches))

    def _controller_phase(self, epoch: int) -> None:
        batches, memory = self.problem.images.held_out, self.problem.memory
        self.supernet.model.eval()
        title = f"search epoch {epoch + 1} of {self.settings.epochs}, controller"
        entropy, (mean, best, mega_bops) = 0.0, self._statistics()
        with self.problem.progress.task(title, len(batches)) as task:
            task.advance(self.step)
            for index, batch in remaining_batches(batches, epoch, self.step, memory):
                size = max(
                    1, self.settings.reward_images // distributed.count()
                )  # of this rank: as many draws as on one
                parts = (torch.split(tensor, size) for tensor in batch)
                for part in zip(*parts, strict=True):
                    entropy = self._learn(*part)
                mean, best, mega_bops = self._statistics()
                task.advance(images=len(batch[1]), cost=mean, entropy=entropy, best=best, MBOPs=mega_bops)
                self.epoch, self.phase, self.step = epoch, 1, index + 1
                memory.offer(self._state, milestone=index + 1 == len(batches))
        least = (
            f"least cost {best:.3f} at {self.problem.space.cost(self.best[1])}"
            if self.best
            else "no draw fits yet"
        )
        self.problem.progress.note(
            f"search epoch {epoch + 1}: mean cost of a draw {mean:.3f}, {least}, entropy {entropy:.2f} per decision"
        )

    def _learn(self, images: Tensor, labels: Tensor) -> float:
        """Draw, score, update the controller; returns the entropy per decision."""
        choice = self._draw()
        cost = distributed.mean(self.cost(choice, images, labels))
        if in_window(self.problem.space, self.problem.budget, choice):
            self.best = min(self.best or (cost, choice), (cost, choice))
        return self.learner.learn(choice, cost) / len(choice)

    def _statistics(self) -> tuple[float, float, float]:
        """Mean cost, least cost of a configuration that fits, and its BOPs in millions; NaN without one."""
        mean = self.learner.average or 0.0
        if self.best is None:
            return mean, math.nan, math.nan
        return mean, self.best[0], self.problem.space.cost(self.best[1]).bops / 1e6

    def _prior(self, budget: Budget) -> list[Tensor]:
        """The controller's initial log-probabilities for ``budget``."""
        space, settings = self.problem.space, self.settings
        if settings.prior == "error":
            return informed_logits(space, budget, self.noise, settings.prior_entropy)
        return budget_logits(space, budget if settings.prior == "budget" else Budget())

    def _draw(self) -> list[int]:
        """Draw a configuration to train or score."""
        if self.settings.within == "window":
            return draw_within(self.controller, self.problem.budget, 1, self.generator, self._rounds)[0]
        choice: list[int] = self.controller.draw(1, self.generator).choices[0].tolist()
        return choice

    def _drawn_evenly(self) -> list[int]:
        """Draw a configuration with the same probability for every option."""
        options = (len(decision.options) for decision in self.problem.space.decisions)
        return [int(torch.randint(count, (), generator=self.generator)) for count in options]

    def finish(self) -> SearchResult:
        """Draw configurations that fit, score them together with the reference, take the best."""
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        choices = draw_within(self.controller, self.problem.budget, self.settings.draws, generator)
        if self.settings.compare_reference and self.reference not in choices:
            choices.append(self.reference)
        scorer, state = self.scorer, self._state()
        score_all(self.problem, scorer, choices, state)
        if self.settings.score_in == "supernet":
            scorer, state = (
                Scorer(self.problem, self.supernet.at, self.scorer.targets),
                state | {"calibrated": scorer.state_dict()},
            )
            score_all(self.problem, scorer, choices, state, "supernet")
        found = [scorer.scored[tuple(choice)] for choice in choices]
        best = min(found, key=closeness)
        if self.settings.select_by == "accuracy":
            best = max(found, key=rank)
        if self.settings.select_by == "sharpness":
            best = min(found, key=lambda scored: self.cost.sharpness(scored.choice))

        def propose(budget: Budget) -> list[list[int]]:
            self.controller.set_prior(self._prior(budget))
            return draw_within(self.controller, budget, FRONT_DRAWS, generator)

        return SearchResult(list(best.choice), propose, self.scorer, list(self.scorer.scored.values()))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.supernet.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "minimizer": self.minimizer.state_dict(),
            "setbacks": vars(self.stepper.recovery),
            "micro_batch": self.cost.recovery.micro_batch,
            "learner": self.learner.state_dict(),
            "generator": self.generator.get_state(),
            "best": None if self.best is None else list(self.best),
            "position": [self.epoch, self.phase, self.step],
        }

    def _load(self, kept: dict[str, Any]) -> None:
        self.supernet.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.minimizer.load_state_dict(kept["minimizer"])
        vars(self.stepper.recovery).update(kept["setbacks"])
        self.cost.recovery.micro_batch = kept.get("micro_batch")
        self.learner.load_state_dict(kept["learner"])
        self.generator.set_state(kept["generator"])
        self.best = None if kept["best"] is None else (kept["best"][0], kept["best"][1])
        self.epoch, self.phase, self.step = kept["position"]


class SAMQ(Settings):
    """Supernet and controller, trained in turns."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Train supernet and controller in turns, draw, score, select."""
        space = problem.space
        space.check_reachable(problem.budget)
        if problem.budget.admits(space.ceiling):
            return untrained_choice(problem)
        run = AlternatingSearch(self, problem)
        run.train()
        return run.finish()
