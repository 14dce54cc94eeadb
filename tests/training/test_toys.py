"""On a problem with a known optimum, every loss-based searcher finds it."""

import math
from functools import cache
from itertools import product
from typing import Any

import pytest

from saqcli.quant.cost import Cost
from saqcli.searchers import SEARCHERS
from saqcli.searchers.problem import Scored, SearchProblem, SearchResult
from saqcli.searchers.supernet import closeness
from tests.support.sweeps import sweep
from tests.support.toys import RIGHT, branches

OPTIONS: dict[str, dict[str, Any]] = {
    "samq": {"epochs": 4, "draws": 8},
    "asga": {"epochs": 2},
    "random": {"draws": 8},
    "hawq": {},
    "sensitivity": {},
    "fisher": {},
    "swaps": {},
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


def test_candidate_nearest_to_float_is_chosen() -> None:
    _, drawn = found("random", 0)
    apart = {scored.choice: scored.divergence for scored in drawn.scored}
    assert apart[tuple(drawn.choice)] == min(apart.values())


def test_samq_takes_its_nearest_draw() -> None:
    _, sampled = found("samq", 0)
    scored = {one.choice: one for one in sampled.scored}
    assert scored[tuple(sampled.choice)].divergence == min(one.divergence for one in sampled.scored)


def test_unknown_divergence_is_worst() -> None:
    known, unknown = (Scored((0,), Cost(1, 1), 90.0, 0.1, value) for value in (5.0, math.nan))
    assert min([unknown, known], key=closeness) is known


def test_baselines_ignore_branch_importance() -> None:
    """Control: the least quantization error and equal bits are not the optimum."""
    for method in ("error", "uniform"):
        assert SEARCHERS[method].make().search(branches()).choice != RIGHT
