"""SAMQ under way: supernet and controller in turns. The formulas stand in ``samq``."""

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from saqcli import ranks
from saqcli.algorithms.minimizers.saq import SAQ
from saqcli.algorithms.objective import Objective
from saqcli.algorithms.options import check_choice, check_count, check_flag, check_number
from saqcli.algorithms.searchers.controller import ROUNDS, Controller, draw_within
from saqcli.algorithms.searchers.cosine import CosineRates
from saqcli.algorithms.searchers.knapsack import best_choice
from saqcli.algorithms.searchers.problem import Found, SearchProblem, remaining
from saqcli.algorithms.searchers.reinforce import Baseline, Reinforce
from saqcli.algorithms.searchers.sampling import FRONT_DRAWS, budget_logits, in_window, informed_logits
from saqcli.algorithms.searchers.scoring import Scorer, most_accurate, score_all
from saqcli.algorithms.searchers.separable import relative_noise
from saqcli.algorithms.searchers.sharp_cost import SharpCost
from saqcli.algorithms.searchers.supernet import Supernet
from saqcli.algorithms.sharpness import RadiusUnit
from saqcli.algorithms.steps import Setbacks, Stepper
from saqcli.errors import ConfigError
from saqcli.quant.cost import Budget


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How SAMQ searches: its options.

    Attributes:
        epochs: of the search; each is a model phase and, after the first ``warmup``, a controller phase.
        warmup: epochs without one; the last always has one.
        rho: radius of the perturbation in both phases; 0 for none.
        rho_unit: ``deviation`` (of each layer's weights) or ``absolute``.
        sharpness: whether the controller's cost is the loss at the perturbed point; False is the paper's ablation.
        cost_weight: of the penalty.
        entropy_weight: see ``Reinforce``.
        baseline: likewise.
        reference: whether the loss of a ``fixed`` configuration is subtracted, or ``none``.
        prior: where the controller starts: at configurations that cost the budget (``budget``), at those of them with
            little quantization noise (``error``), or at even probabilities (``none``).
        prior_entropy: of the prior ``error``, as a share of that of ``budget``.
        within: draws are from the ``window`` between ``BUDGET_USE`` of the budget and the budget, or ``anything``.
        controller_lr: see ``Reinforce``.
        controller_decay: likewise, of the weights.
        replay: likewise.
        reward_images: of a held-out batch, for one draw.
        draws: configurations that are compared in the end.
        select_by: ``accuracy`` on the scoring images, or least ``sharpness`` as the released code does.
        score_in: where draws are compared: in the ``calibrated`` network, which fine-tuning starts from, or in the
            trained ``supernet``; what is reported of them is calibrated in either case.

    Raises:
        ConfigError: an option that is not possible.
    """

    epochs: int = 3
    warmup: int = 1
    rho: float = 0.4
    rho_unit: RadiusUnit = "deviation"
    sharpness: bool = True
    cost_weight: float = 6.0
    entropy_weight: float = 0.02
    baseline: Baseline = "ema"
    reference: Literal["fixed", "none"] = "fixed"
    prior: Literal["error", "budget", "none"] = "error"
    prior_entropy: float = 0.7
    within: Literal["window", "anything"] = "window"
    controller_lr: float = 1e-3
    controller_decay: float = 5e-5
    replay: int = 16
    reward_images: int = 32
    draws: int = 20
    select_by: Literal["accuracy", "sharpness"] = "accuracy"
    score_in: Literal["calibrated", "supernet"] = "calibrated"

    def __post_init__(self) -> None:
        for option in ("epochs", "replay", "reward_images", "draws"):
            check_count(option, getattr(self, option))
        check_count("warmup", self.warmup, 0)
        check_flag("sharpness", self.sharpness)
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
        check_choice("select_by", self.select_by, ("accuracy", "sharpness"))
        if self.select_by == "sharpness" and not (self.sharpness and self.rho):
            raise ConfigError(
                "select_by sharpness needs a perturbation: give rho above 0, and sharpness true"
            )


class Alternation:
    """One search under way: supernet, controller, and where in the schedule they are."""

    def __init__(self, settings: Settings, problem: SearchProblem) -> None:
        self.settings, self.problem = settings, problem
        self.generator = torch.Generator().manual_seed(problem.seed)
        self.scorer = Scorer(problem)  # before the weights move
        self.supernet = Supernet(problem)
        self.supernet.settle()
        self.supernet.switch_norms()
        self.noise = relative_noise(problem)
        self.controller = Controller(problem.space, self._prior(problem.budget), self.generator)
        self.learner = Reinforce(
            self.controller,
            lr=settings.controller_lr,
            weight_decay=settings.controller_decay,
            entropy_weight=settings.entropy_weight,
            baseline=settings.baseline,
            replay=settings.replay,
        )
        self.optimizer = problem.optimizer(self.supernet.model)
        self.rates = CosineRates(self.optimizer)
        self.minimizer = SAQ(
            self.supernet.model, self.optimizer, rho=settings.rho, rho_unit=settings.rho_unit
        )
        whole = Objective(F.cross_entropy)
        self.stepper = Stepper(
            self.supernet.model, self.minimizer, whole, sys.maxsize, Setbacks(), problem.progress.note
        )
        self.reference = best_choice(problem.space, problem.budget, self.noise)
        self._rounds = ROUNDS if in_window(problem.space, problem.budget, self.reference) else 1  # of draws
        self.cost = SharpCost(
            self.supernet,
            self.minimizer.set,
            rho=settings.rho if settings.sharpness else 0.0,
            rho_unit=settings.rho_unit,
            cost_weight=settings.cost_weight,
            reference=self.reference if settings.reference == "fixed" else None,
        )
        self.epoch, self.phase, self.step = 0, 0, 0
        self.best: tuple[float, list[int]] | None = None  # least cost of a draw in the window
        kept = problem.memory.load()
        if kept is not None:
            self._load(kept)

    def train(self) -> None:
        """All phases of all epochs, from where it is on."""
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
            for index, (images, labels) in remaining(batches, epoch, self.step, memory):
                self.rates.set((epoch * len(batches) + index) / steps)
                self.supernet.select(self._draw())
                self.stepper(images.to(self.problem.device), labels.to(self.problem.device))
                task.advance(images=len(labels), loss=self.stepper.loss)
                self.epoch, self.phase, self.step = epoch, 0, index + 1
                memory.offer(self._state, milestone=index + 1 == len(batches))

    def _controller_phase(self, epoch: int) -> None:
        batches, memory = self.problem.images.held_out, self.problem.memory
        self.supernet.model.eval()
        title = f"search epoch {epoch + 1} of {self.settings.epochs}, controller"
        entropy, (mean, best, mega_bops) = 0.0, self._so_far()
        with self.problem.progress.task(title, len(batches)) as task:
            task.advance(self.step)
            for index, batch in remaining(batches, epoch, self.step, memory):
                size = max(
                    1, self.settings.reward_images // ranks.count()
                )  # of this rank, as often as without others
                parts = (torch.split(tensor, size) for tensor in batch)
                for part in zip(*parts, strict=True):
                    entropy = self._learn(*part)
                mean, best, mega_bops = self._so_far()
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
        """Draw, judge, learn; returns the entropy of a decision."""
        choice = self._draw()
        cost = ranks.mean(self.cost(choice, images, labels))
        if in_window(self.problem.space, self.problem.budget, choice):
            self.best = min(self.best or (cost, choice), (cost, choice))
        return self.learner.learn(choice, cost) / len(choice)

    def _so_far(self) -> tuple[float, float, float]:
        """Mean cost, and the least of a configuration that fits with its BOPs in millions; NaN before there is one."""
        mean = self.learner.average or 0.0
        if self.best is None:
            return mean, math.nan, math.nan
        return mean, self.best[0], self.problem.space.cost(self.best[1]).bops / 1e6

    def _prior(self, budget: Budget) -> list[Tensor]:
        """Where the controller starts if ``budget`` is the one to use."""
        space, settings = self.problem.space, self.settings
        if settings.prior == "error":
            return informed_logits(space, budget, self.noise, settings.prior_entropy)
        return budget_logits(space, budget if settings.prior == "budget" else Budget())

    def _draw(self) -> list[int]:
        """A configuration to train or to be judged."""
        if self.settings.within == "window":
            return draw_within(self.controller, self.problem.budget, 1, self.generator, self._rounds)[0]
        choice: list[int] = self.controller.draw(1, self.generator).choices[0].tolist()
        return choice

    def finish(self) -> Found:
        """Draw configurations that fit, score them beside the reference, take the best."""
        generator = torch.Generator().manual_seed(self.problem.seed + 1)
        choices = draw_within(self.controller, self.problem.budget, self.settings.draws, generator)
        choices += [self.reference] if self.reference not in choices else []
        judge, state = self.scorer, self._state()
        score_all(self.problem, judge, choices, state)
        if self.settings.score_in == "supernet":
            judge, state = Scorer(self.problem, self.supernet.at), state | {"calibrated": judge.state_dict()}
            score_all(self.problem, judge, choices, state, "supernet")
        found = [judge.scored[tuple(choice)] for choice in choices]
        best = most_accurate(found, self.problem.images.scoring)
        if self.settings.select_by == "sharpness":
            best = min(found, key=lambda scored: self.cost.sharpness(scored.choice))

        def propose(budget: Budget) -> list[list[int]]:
            self.controller.set_prior(self._prior(budget))
            return draw_within(self.controller, budget, FRONT_DRAWS, generator)

        return Found(list(best.choice), propose, self.scorer, list(self.scorer.scored.values()))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.supernet.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "minimizer": self.minimizer.state_dict(),
            "setbacks": vars(self.stepper.setbacks),
            "micro_batch": self.cost.setbacks.micro_batch,
            "learner": self.learner.state_dict(),
            "generator": self.generator.get_state(),
            "best": None if self.best is None else list(self.best),
            "position": [self.epoch, self.phase, self.step],
        }

    def _load(self, kept: dict[str, Any]) -> None:
        self.supernet.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.minimizer.load_state_dict(kept["minimizer"])
        vars(self.stepper.setbacks).update(kept["setbacks"])
        self.cost.setbacks.micro_batch = kept.get("micro_batch")
        self.learner.load_state_dict(kept["learner"])
        self.generator.set_state(kept["generator"])
        self.best = None if kept["best"] is None else (kept["best"][0], kept["best"][1])
        self.epoch, self.phase, self.step = kept["position"]
