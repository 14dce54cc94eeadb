"""The exact multiple-choice knapsack: one choice a group, least total loss, total cost within a limit.

Solved as an integer program by HiGHS through ``scipy.optimize.milp``. Costs are integers up to 10**15, the solver
works in floating point with a tolerance of about 1e-6: every answer is checked in exact integers, and one that the
tolerance let slip out of bounds is ruled out before asking again. Only where more than ``RULED_OUT`` such answers
come in a row are the bounds drawn in by the tolerance instead.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from saqcli.errors import InfeasibleBudget

RULED_OUT = 20  # answers out of bounds by the solver's tolerance, before the bounds are drawn in


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
    for lower in dict.fromkeys((max(least, 0), 0)):
        chosen = _within(costs, losses, limit, lower)
        if chosen is not None:
            return chosen
    return cheapest


def _within(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int, lower: int
) -> list[int] | None:
    """The best choice with a total cost in [lower, limit], checked in exact integers; None where there is none."""
    refused: list[list[int]] = []
    for slack in (*(0.0,) * RULED_OUT, 2e-6, 1e-5, 1e-4, 1e-3):
        chosen = _solve(
            costs, losses, limit, lower / max(limit, 1) + (slack if lower else 0), 1 - slack, refused
        )
        if chosen is None and not slack:
            return None
        if chosen is not None:
            if lower <= _total(costs, chosen) <= limit:
                return chosen
            refused.append(chosen)
    return None


def _total(costs: Sequence[Sequence[int]], chosen: Sequence[int]) -> int:
    return sum(group[index] for group, index in zip(costs, chosen, strict=True))


def _solve(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    limit: int,
    least: float,
    most: float,
    refused: Sequence[Sequence[int]],
) -> list[int] | None:
    """The best choice that costs between ``least`` and ``most`` times ``limit``, to the solver's tolerance."""
    edges = np.cumsum([0, *(len(group) for group in costs)])
    spare = limit - sum(min(group) for group in costs)
    usable = np.array([cost - min(group) <= spare for group in costs for cost in group])
    weight = np.array([cost / max(limit, 1) for group in costs for cost in group]) * usable
    loss = np.array([value for group in losses for value in group]) * usable
    loss = loss / max(float(np.abs(loss).max()), 1e-300)
    one_each = np.zeros((len(costs), edges[-1]))
    for group, (first, last) in enumerate(pairwise(edges)):
        one_each[group, first:last] = 1
    constraints = [LinearConstraint(one_each, 1, 1), LinearConstraint(weight[None], least, most)]
    for chosen in refused:
        same = np.zeros(edges[-1])
        same[edges[:-1] + chosen] = 1
        constraints.append(LinearConstraint(same[None], 0, len(costs) - 1))
    answer = milp(
        loss,
        integrality=np.ones(edges[-1]),
        bounds=Bounds(0, usable.astype(float)),
        constraints=constraints,
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if answer.x is None:
        return None
    return [int(np.argmax(answer.x[first:last])) for first, last in pairwise(edges)]
