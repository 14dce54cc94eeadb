"""What a searcher is asked, what it must give back, and how it is stopped and resumed."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from saqcli.progress import SILENT, Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import Budget, Cost
from saqcli.quant.search_space import SearchSpace
from saqcli.training.loop import NO_MEMORY, Memory

Batch = tuple[Tensor, Tensor]  # images (N, C, H, W) and labels (N,)


class Batches(Protocol):
    """Images that come in another order every epoch; what is random about it follows from (seed, epoch)."""

    def __len__(self) -> int:
        """Batches of an epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of ``epoch``."""


@dataclass(frozen=True)
class SearchImages:
    """What a search may look at; none of it is of the validation split.

    Attributes:
        training: augmented, to train on.
        held_out: apart from those, in their evaluation view.
        scoring: a fixed part of the held-out ones, to compare configurations on.
        whole: all images, augmented: for a search that learns weights and bits on the same ones.
    """

    training: Batches
    held_out: Batches
    scoring: Sequence[Batch]
    whole: Batches


class _NoBatches:
    """Nothing to look at."""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(())

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


NO_IMAGES = SearchImages(_NoBatches(), _NoBatches(), (), _NoBatches())  # for searchers that look at none


class Scored(NamedTuple):
    """A configuration and how it did.

    Attributes:
        choice: an option's index a decision.
        cost: of it.
        top1: percent, on the scoring images, as fine-tuning would start from it.
        loss: mean cross-entropy there.
    """

    choice: tuple[int, ...]
    cost: Cost
    top1: float
    loss: float


Propose = Callable[[Budget], list[list[int]]]
ScoreOf = Callable[[Sequence[int]], Scored]


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        choice: the best configuration found, which the budget admits.
        propose: what the same search would take under other budgets; nothing is trained for it.
        score: how a configuration does, calibrated; None where the search scored nothing.
        scored: every configuration that was scored so.
    """

    choice: list[int]
    propose: Propose
    score: ScoreOf | None = None
    scored: Sequence[Scored] = ()


def uncorrected(model: nn.Module) -> Callable[[], None]:
    """Corrects nothing."""
    return lambda: None


@dataclass(frozen=True)
class SearchProblem:
    """Find bits for every layer of a model under a budget.

    Attributes:
        model: wrapped, in floating point, no quantizers installed; the searcher's own, to do with as it likes.
        space: what may be chosen, and what it costs in the network that the policy is for.
        budget: never to be exceeded.
        scheme: which quantizers will be used.
        statistics: of every layer's input on calibration images.
        images: to search on.
        optimizer: makes the one that trains a model's weights.
        seed: of everything random.
        progress: where to tell how far the search is.
        memory: for what would be lost.
        corrections: of a model with fitted levels: what is to be called at any bits, and as often as these change, to
            make of it what fine-tuning would start from.
    """

    model: nn.Module
    space: SearchSpace
    budget: Budget
    scheme: Scheme
    statistics: Mapping[str, InputStatistics]
    images: SearchImages
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    seed: int = 0
    progress: Progress = SILENT
    memory: Memory = field(default=NO_MEMORY)
    corrections: Callable[[nn.Module], Callable[[], None]] = field(default=uncorrected)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def config(self, choice: Sequence[int]) -> BitConfig:
        """The bits of every layer."""
        return self.space.config(choice)


class Searcher(Protocol):
    """Finds the best configuration it can; the budget admits what it returns."""

    def search(self, problem: SearchProblem) -> Found:
        """The best configuration found, and what else was learned.

        Raises:
            InfeasibleBudget: no configuration meets the budget.
            Interrupted: asked to stop; the memory holds what was done.
        """


def remaining(batches: Batches, epoch: int, done: int, memory: Memory) -> Iterator[tuple[int, Batch]]:
    """The batches of ``epoch`` from number ``done`` on, just as an uninterrupted pass would give them."""
    batches.set_epoch(epoch)
    for index, batch in enumerate(batches):
        if index >= done:
            yield index, batch
        elif index == done - 1:
            memory.restore_random()
