"""How configurations do on the scoring images, and which of them is the best.

What counts is where fine-tuning starts: the float weights with levels fitted at the configuration's bits, corrected as
calibration corrects them. ``saq quantize --policy FOUND --epochs 0`` scores that very network.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from saqcli.algorithms.searchers.problem import Batch, Scored, SearchProblem
from saqcli.algorithms.searchers.supernet import Supernet
from saqcli.algorithms.training import evaluate
from saqcli.progress import SILENT


class Calibrated:
    """The network that fine-tuning would start from, at any configuration.

    Its weights are those of the problem's model when this is made; nothing is fitted before the first use.
    """

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = replace(problem, model=copy.deepcopy(problem.model))
        self._supernet: Supernet | None = None
        self._correct: Callable[[], None] = lambda: None

    def at(self, choice: Sequence[int]) -> nn.Module:
        """The network, calibrated at the bits of ``choice``; the same object each time."""
        if self._supernet is None:
            self._supernet = Supernet(self.problem)
            self._correct = self.problem.corrections(self.problem.model)
        model = self._supernet.at(choice)
        self._correct()
        return model


class Scorer:
    """Accuracy of configurations on the scoring images; each is evaluated once.

    Args:
        problem: of the search.
        at: gives the network of a configuration; ``Calibrated`` by default.

    Attributes:
        scored: everything so far, by choice.
    """

    def __init__(
        self, problem: SearchProblem, at: Callable[[Sequence[int]], nn.Module] | None = None
    ) -> None:
        self.problem = problem
        self._at = Calibrated(problem).at if at is None else at
        self.scored: dict[tuple[int, ...], Scored] = {}

    def __call__(self, choice: Sequence[int]) -> Scored:
        """How ``choice`` does."""
        key = tuple(choice)
        if key not in self.scored:
            model, problem = self._at(choice).eval(), self.problem
            with SILENT.task("", 0) as task:
                score = evaluate(model, problem.images.scoring, task, device=problem.device, shared=True)
            self.scored[key] = Scored(key, problem.space.cost(choice), score.top1, score.loss)
        return self.scored[key]

    def state_dict(self) -> dict[str, Any]:
        """Everything so far, in plain values."""
        return {"configurations": [[list(s.choice), s.top1, s.loss] for s in self.scored.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` gave."""
        for choice, top1, loss in state["configurations"]:
            cost = self.problem.space.cost(choice)
            self.scored[tuple(choice)] = Scored(tuple(choice), cost, top1, loss)


def score_all(
    problem: SearchProblem,
    scorer: Scorer,
    choices: Sequence[Sequence[int]],
    beside: Mapping[str, Any] | None = None,
    key: str = "calibrated",
) -> Scored:
    """Score ``choices`` one after the other and return the best; goes on where it was stopped.

    Args:
        problem: whose memory and progress are used.
        scorer: of the configurations.
        choices: at least one.
        beside: what else the memory is to hold.
        key: of what the scorer knows, in the memory.
    """
    scorer.load_state_dict((problem.memory.load() or {}).get(key, {"configurations": []}))
    found: list[Scored] = []
    images = sum(len(labels) for _, labels in problem.images.scoring)
    with problem.progress.task("scoring configurations", len(choices)) as task:
        for choice in choices:
            new = tuple(choice) not in scorer.scored
            found.append(scorer(choice))
            best = max(found, key=rank)
            task.advance(images=images if new else 0, best=best.top1, MBOPs=best.cost.bops / 1e6)
            problem.memory.offer(lambda: {**(beside or {}), key: scorer.state_dict()})
    return max(found, key=rank)


def rank(scored: Scored) -> tuple[float, float]:
    """Higher is better: accuracy, then loss."""
    return scored.top1, -scored.loss


def most_accurate(scored: Sequence[Scored], scoring: Sequence[Batch]) -> Scored:
    """The one of least loss among those whose accuracy on ``scoring`` cannot be told from the highest."""
    images = sum(len(labels) for _, labels in scoring)
    highest = max(found.top1 for found in scored) / 100
    error = (highest * (1 - highest) / max(images, 1)) ** 0.5
    tied = [found for found in scored if found.top1 / 100 >= highest - error]
    return min(tied, key=lambda found: (found.loss, -found.top1))
