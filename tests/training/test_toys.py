"""On a problem with a known optimum, every loss-based searcher finds it."""

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch

from saqcli.quant.cost import Cost
from saqcli.searchers import SEARCHERS
from saqcli.searchers.problem import Scored, SearchProblem, SearchResult
from saqcli.searchers.supernet import most_accurate
from tests.support.sweeps import sweep
from tests.support.toys import RIGHT, branches

TRIO = ((90.0, 0.5), (88.0, 0.4), (86.0, 0.1))  # accuracy and loss

OPTIONS: dict[str, dict[str, Any]] = {
    "samq": {"epochs": 4, "draws": 8},
    "asga": {"epochs": 2},
    "random": {"draws": 8},
    "hawq": {},
    "sensitivity": {},
}


@cache
def found(method: str, seed: int) -> tuple[SearchProblem, SearchResult]:
    problem = branches(seed)
    return problem, SEARCHERS[method].make(**OPTIONS[method]).search(problem)


# Searchers that train take seconds.
@pytest.mark.parametrize(
    ("method", "seed"),
    sweep(product(OPTIONS, range(3)), lambda method, seed: seed == 0 or not SEARCHERS[method].trains),
)
def test_best_configuration_is_found(method: str, seed: int) -> None:
    assert found(method, seed)[1].choice == RIGHT


def test_most_accurate_candidate_is_chosen() -> None:
    _, drawn = found("random", 0)
    top1 = {scored.choice: scored.top1 for scored in drawn.scored}
    assert top1[tuple(drawn.choice)] == max(top1.values())


def test_samq_breaks_accuracy_ties_by_loss() -> None:
    problem, sampled = found("samq", 0)
    scored = {one.choice: one for one in sampled.scored}
    chosen, best = scored[tuple(sampled.choice)], max(one.top1 for one in sampled.scored)
    images = sum(len(labels) for _, labels in problem.images.scoring)
    error = 100 * ((best / 100) * (1 - best / 100) / images) ** 0.5
    tied = [one for one in sampled.scored if one.top1 >= best - error]
    assert chosen in tied
    assert chosen.loss == min(one.loss for one in tied)


def test_loss_decides_within_standard_error() -> None:
    images = [(torch.zeros(100, 1), torch.zeros(100, dtype=torch.long))]  # at 90 % an error of 3 points
    one, two, three = (Scored((i,), Cost(1, 1), top1, loss) for i, (top1, loss) in enumerate(TRIO))
    assert most_accurate([one, two, three], images) is two


def test_baselines_ignore_branch_importance() -> None:
    """Control: the least quantization error and equal bits are not the optimum."""
    for method in ("error", "uniform"):
        assert SEARCHERS[method].make().search(branches()).choice != RIGHT
