"""The interface of searchers: problem, result, images, and resuming."""

import math
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
    """Images in a different order every epoch; all randomness follows from (seed, epoch)."""

    def __len__(self) -> int:
        """Number of batches per epoch."""

    def __iter__(self) -> Iterator[Batch]:
        """One epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Select the epoch of the next pass."""


@dataclass(frozen=True)
class SearchImages:
    """The images of a search; none of them are from the validation split.

    Attributes:
        training: augmented, to train on.
        held_out: disjoint from those, in their evaluation view.
        scoring: a fixed part of the held-out images, to compare configurations on.
        whole: all images, augmented, for a search that trains weights and bits on the same images.
        labelled: whether labels mean anything; without, scores have no accuracy and no loss.
    """

    training: Batches
    held_out: Batches
    scoring: Sequence[Batch]
    whole: Batches
    labelled: bool = True


class _NoBatches:
    """No images."""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(())

    def set_epoch(self, epoch: int) -> None:
        """Does nothing."""


NO_IMAGES = SearchImages(_NoBatches(), _NoBatches(), (), _NoBatches())  # for searchers without images


class Scored(NamedTuple):
    """A configuration and its score.

    Attributes:
        choice: one option index per decision.
        cost: of the configuration.
        top1: percent, on the scoring images, at the starting point of fine-tuning, from ``Comparison`` with a share of
            the error of weights; NaN without labels, as the loss.
        loss: mean cross-entropy on the same images.
        divergence: mean Kullback-Leibler divergence of its class probabilities from those of the float network, in
            nats, on the same images; labels do not enter. NaN where unknown.
    """

    choice: tuple[int, ...]
    cost: Cost
    top1: float
    loss: float
    divergence: float = math.nan


Propose = Callable[[Budget], list[list[int]]]
ScoreOf = Callable[[Sequence[int]], Scored]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        choice: the best configuration found, within the budget: one option index per decision.
        propose: configurations of the same search for other budgets, at least one for a reachable budget and all
            within it, without further training.
        score: scores a configuration, calibrated, with the whole error of weights; None if the search scored nothing.
        scored: every configuration that was scored, with the whole error of weights.
        losses: of every option, by decision, if the search minimizes their sum: kept in the run, so that it can be
            solved again for another budget.
    """

    choice: list[int]
    propose: Propose
    score: ScoreOf | None = None
    scored: Sequence[Scored] = ()
    losses: Sequence[Sequence[float]] | None = None


def no_corrections(model: nn.Module) -> Callable[[], None]:
    """No corrections."""
    return lambda: None


@dataclass(frozen=True)
class SearchProblem:
    """Find bits for every layer of a model under a budget.

    Attributes:
        model: wrapped, in floating point, no quantizers installed; the searcher may modify it.
        space: the options, and their costs in the network that the policy is for.
        budget: never exceeded.
        scheme: the quantizers to use.
        statistics: of every layer's input on calibration images.
        images: to search on.
        optimizer: builds the optimizer of a model's weights.
        seed: random seed.
        progress: receives the progress of the search.
        memory: saves and restores the state of the search.
        corrections: takes a model with fitted levels and returns a function; call it after every change of bits to
            bring the model to the starting point of fine-tuning.
        weight_error: the share of the quantization error of weights that configurations are compared with, 0 to 1.
            Training and reconstruction repair most of that error, but less of the error of inputs: a share below 1
            suits a policy that is trained or reconstructed (decision 0043).
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
    corrections: Callable[[nn.Module], Callable[[], None]] = field(default=no_corrections)
    weight_error: float = 1.0

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return next(self.model.parameters()).device

    def config(self, choice: Sequence[int]) -> BitConfig:
        """The bits of every layer."""
        return self.space.config(choice)


class Searcher(Protocol):
    """Finds the best configuration it can, within the budget."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """The best configuration found, with proposals and scores.

        Raises:
            InfeasibleBudget: the budget is below the smallest reachable cost.
            Interrupted: stopped by the user; the memory holds the progress.
        """


def remaining_batches(batches: Batches, epoch: int, done: int, memory: Memory) -> Iterator[tuple[int, Batch]]:
    """The batches of ``epoch`` from number ``done``, identical to those of an uninterrupted pass."""
    batches.set_epoch(epoch)
    for index, batch in enumerate(batches):
        if index >= done:
            yield index, batch
        elif index == done - 1:
            memory.restore_random()
