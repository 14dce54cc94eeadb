"""ASGA under way: what learns, step by step. The formulas stand in ``asga``."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from saqcli import ranks
from saqcli.algorithms.divergence import check_step
from saqcli.algorithms.minimizers import Chunk
from saqcli.algorithms.minimizers.batches import gradients_of
from saqcli.algorithms.minimizers.passes import average_gradients, running_statistics
from saqcli.algorithms.objective import cut, micro_batches
from saqcli.algorithms.searchers.cosine import CosineRates
from saqcli.algorithms.searchers.descent_settings import Settings
from saqcli.algorithms.searchers.knapsack import best_choice
from saqcli.algorithms.searchers.mixture import Mixtures
from saqcli.algorithms.searchers.problem import Batches, SearchProblem, remaining
from saqcli.algorithms.searchers.supernet import Supernet
from saqcli.algorithms.sharpness import Gradients, Perturbation, PerturbedSet, add_up
from saqcli.algorithms.steps import Before, Setbacks, fitting
from saqcli.errors import TrainingDiverged
from saqcli.quant.layers import frozen_batch_stats
from saqcli.units import format_quantity

RISE = 0.1  # of all steps, until the budget weighs in full
THRIFT = 1e-3  # weight of the expected cost itself
MEMORY = 0.9  # of the running mean of the gap


class Descent:
    """One search under way: what learns, and how far it is.

    Attributes:
        model: with mixtures for quantizers.
        phases: of an epoch: images, and what learns on them.
        total: batches of the whole search.
        done: batches so far; a step may be on a part of one.
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
        self.logit_optimizer = torch.optim.Adam(self.logits, lr=settings.logit_lr)
        groups = self.optimizer.param_groups
        self.weights = [p for group in groups for p in group["params"] if p.requires_grad]
        self.set = PerturbedSet(self.model, ("weights", "biases", "norms"))
        self._rates = CosineRates(self.optimizer, self.logit_optimizer)
        images = problem.images
        self.phases: list[tuple[Batches, set[str]]] = [(images.whole, {"weights", "logits"})]
        if settings.bilevel:
            self.phases = [(images.training, {"weights"}), (images.held_out, {"logits"})]
        self.total = settings.epochs * sum(len(batches) for batches, _ in self.phases)
        self.done = 0.0
        self.rho = settings.rho_max
        self.gap: float | None = None
        self.trace: list[tuple[float, float]] = []
        self._since = 0  # steps before this epoch
        self.setbacks = Setbacks()

    def run(self) -> None:
        """All steps, from where the memory left off."""
        kept = self.problem.memory.load()
        epoch, phase, index = (0, 0, 0) if kept is None else self._load(kept)
        self.model.train()
        while epoch < self.settings.epochs:
            self._pass(epoch, phase, index)
            phase, index = phase + 1, 0
            if phase == len(self.phases):
                self._note(epoch)
                epoch, phase = epoch + 1, 0
        if not self.trace:
            raise ranks.agreed(
                TrainingDiverged("not one step of the search had a loss: give a lower search.lr")
            )

    def _pass(self, epoch: int, place: int, start: int) -> None:
        """One phase of an epoch, from batch number ``start`` on."""
        problem, (batches, learning) = self.problem, self.phases[place]
        count = min(len(batches), math.ceil((self.settings.epochs - epoch) * len(batches)))
        with problem.progress.task(f"search epoch {epoch + 1} of {self.settings.epochs:g}", count) as task:
            task.advance(start)
            for index, (images, labels) in remaining(batches, epoch, start, problem.memory):
                if index == count:
                    break
                on_device = [tensor.to(problem.device) for tensor in (images, labels)]
                for part in cut(on_device, max(1, self.settings.step_images // ranks.count())):
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
            parts: the images of the step, in micro-batches of at most that many.
            images: how many these are on this rank.
            share: of a batch.
            weights: whether these learn.
            logits: likewise.

        Raises:
            TrainingDiverged: the loss is no finite number, in many steps in a row.
            DeviceMemoryError: out of memory, however small the micro-batches.
        """
        self._schedule()
        learned = [*(self.weights if weights else ()), *(self.logits if logits else ())]
        before, note = Before(self.model), self.problem.progress.note

        def need_less() -> None:
            before.restore()
            self.setbacks.halve(images, note)

        value, raised, norm, total = fitting(
            lambda: self._passes(parts(self.setbacks.micro_batch), learned, weights), need_less
        )
        for parameter, gradient in zip(learned, total, strict=True):
            parameter.grad = gradient
        average_gradients(
            learned, [value, raised, norm, *(running_statistics(self.model) if weights else ())]
        )
        try:
            check_step(value, norm, raised)
        except TrainingDiverged as error:
            before.restore(random=False)
            self.setbacks.leave_out(error, note)
            self.done += share
            return
        self.setbacks.in_row = 0
        gap = max(0.0, float(raised - value)) if self.settings.align == "sagm" else 0.0
        if logits:
            for parameter, price in zip(self.logits, self._prices(), strict=True):
                if price is not None:
                    parameter.grad = price if parameter.grad is None else parameter.grad + price
        if weights:
            self.optimizer.step()
        if logits:
            self.logit_optimizer.step()
        self._follow(float(value), gap)
        self.done += share

    def _passes(
        self, chunk: Chunk, learned: Sequence[nn.Parameter], weights: bool
    ) -> tuple[Tensor, Tensor, Tensor, Gradients]:
        """The loss, that at the perturbed point, the norm that must be finite too, and the gradients of the step."""
        with nullcontext() if weights else frozen_batch_stats(self.model):
            value, gradients = gradients_of(chunk, self.set, also=learned)
        members, total = gradients[: -len(learned)], gradients[-len(learned) :]
        if self.settings.align == "none":
            return value, value.clone(), torch.zeros_like(value), total
        raised, norm, above = self._raised(chunk, members, value, learned)
        return value, raised, norm, add_up(add_up([], total, 0.5), above, 0.5)

    def _raised(
        self, chunk: Chunk, members: Gradients, value: Tensor, learned: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Gradients]:
        """The loss at the perturbed point, the norm, and the gradients there."""
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

    def _prices(self) -> Gradients:
        """Gradients to the logits of what the mixtures cost."""
        weight = self.settings.cost_weight * min(1.0, self.done / max(RISE * self.total, 1.0))
        with torch.enable_grad():
            used = self.mixtures.used(self.problem.budget)
            price = weight * (used - 1).clamp_min(0).square().sum() + THRIFT * used.sum()
        return list(torch.autograd.grad(price, self.logits))

    def _schedule(self) -> None:
        """Learning rates and temperature of the coming step."""
        fraction = min(1.0, self.done / max(self.total, 1))
        self._rates.set(fraction)
        self.mixtures.set_temperature(self.settings.temperature_end**fraction)

    def _follow(self, loss: float, gap: float) -> None:
        """Note a step, and adapt the radius to the gap."""
        self.trace.append((loss, gap))
        self.gap = gap if self.gap is None else MEMORY * self.gap + (1 - MEMORY) * gap
        self.rho = min(self.settings.rho_max, max(self.settings.rho_min, math.log1p(self.gap)))

    def _note(self, epoch: int) -> None:
        """One line on an epoch."""
        problem = self.problem
        losses, gaps = zip(*(self.trace[self._since :] or [(math.nan, math.nan)]), strict=True)
        self._since = len(self.trace)
        choice = best_choice(problem.space, problem.budget, self.mixtures.losses())
        problem.progress.note(
            f"search epoch {epoch + 1} of {self.settings.epochs:g}: loss {sum(losses) / len(losses):.4f}, "
            f"gap {sum(gaps) / len(gaps):.4f} (at most {max(gaps):.4f}), entropy {self.mixtures.entropy():.3f}, "
            f"the present choice costs {format_quantity(problem.space.cost(choice).bops, 'BOPs')}"
        )

    def _state(self, epoch: int, phase: int, index: int) -> dict[str, Any]:
        """All that the search goes on from."""
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
            "setbacks": vars(self.setbacks),
        }

    def _load(self, state: dict[str, Any]) -> tuple[int, int, int]:
        """Put back what ``_state`` gave; returns epoch, phase and batch."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.logit_optimizer.load_state_dict(state["logit_optimizer"])
        with torch.no_grad():
            for logits, kept in zip(self.logits, state["logits"], strict=True):
                logits.copy_(kept)
        self.rho, self.gap = state["rho"], state["gap"]
        self.done, self._since = state["done"], state["since"]
        self.trace = [(loss, gap) for loss, gap in state["trace"]]
        vars(self.setbacks).update(state["setbacks"])
        epoch, phase, index = state["at"]
        return epoch, phase, index
