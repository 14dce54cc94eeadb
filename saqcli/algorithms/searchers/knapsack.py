"""The exact multiple-choice knapsack: one choice a group, least total loss, total cost within a limit.

Solved as an integer program by HiGHS through ``scipy.optimize.milp``. Costs are integers up to 10**15, the
solver works in floating point with a tolerance of about 1e-6: every answer is checked in exact integers, and
asked again with a slightly lower limit where the tolerance let it slip over.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from saqcli.errors import InfeasibleBudget


def choose(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int, least: int = 0
) -> list[int]:
    """The index of the chosen option of every group.

    Args:
        costs: of every option, by group.
        losses: likewise.
        limit: greatest total cost, never exceeded.
        least: least total cost wanted; given up where no choice lies in [least, limit].

    Raises:
        InfeasibleBudget: even the cheapest choices exceed the limit.
    """
    cheapest = [min(range(len(group)), key=group.__getitem__) for group in costs]
    if _total(costs, cheapest) > limit:
        raise InfeasibleBudget(f"the cheapest choice costs {_total(costs, cheapest)}, the limit is {limit}")
    for lower in dict.fromkeys((least, 0)):
        for slack in (0.0, 2e-6, 1e-5, 1e-4, 1e-3):
            chosen = _solve(costs, losses, limit * (1 - slack), lower)
            if chosen is None:
                break
            if _total(costs, chosen) <= limit:
                return chosen
    return cheapest


def _total(costs: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return sum(group[index] for group, index in zip(costs, chosen, strict=True))


def _solve(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: float, least: float
) -> list[int] | None:
    sizes = [len(group) for group in costs]
    edges = np.cumsum([0, *sizes])
    weight = np.array([cost / limit for group in costs for cost in group])
    loss = np.array([value for group in losses for value in group])
    loss = loss / max(float(np.abs(loss).max()), 1e-300)
    one_each = np.zeros((len(sizes), edges[-1]))
    for group, (first, last) in enumerate(pairwise(edges)):
        one_each[group, first:last] = 1
    answer = milp(
        loss,
        integrality=np.ones(edges[-1]),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], least / limit, 1)],
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if answer.x is None:
        return None
    return [int(np.argmax(answer.x[first:last])) for first, last in pairwise(edges)]
