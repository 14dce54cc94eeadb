"""The exact multiple-choice knapsack, and random configurations that use a budget.

The knapsack takes one option per group with the least total loss and total costs within limits. HiGHS solves it as an
integer program through ``scipy.optimize.milp``. Costs are integers up to 10**15, but the solver works in floating point
with a tolerance of about 1e-6. Every solution is therefore checked in exact integers; one that exceeds a bound within
the tolerance is excluded, and the program is solved again. Only after ``MAX_REJECTED`` such solutions in a row the
bounds are tightened by the tolerance.

Random configurations use the budget and do not exceed it. Bits drawn uniformly nearly always cost too much or too
little. Drawn with probabilities

    p(option) ~ exp(-m . cost)          for every decision independently

they cost the budget on average, for suitable multipliers m >= 0 (one per bound). Configurations of the same cost are
equally likely, since their probabilities depend on the cost alone: drawing until one lies between ``BUDGET_USE`` of the
budget and the budget gives nearly uniform draws from all of these. This is the distribution of greatest entropy with
that mean cost (Jaynes, 1957). The multipliers minimize a convex function, m . target + the sum of the decisions' log
partition functions.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp, minimize
from torch import Tensor

from saqcli.errors import InfeasibleBudget
from saqcli.quant.cost import USE_MIDDLE, Budget, least_use
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.problem import SearchProblem, SearchResult
from saqcli.searchers.separable import Losses

MAX_REJECTED = 20  # solutions beyond a bound, within the tolerance, before the bounds are tightened
FRONT_DRAWS = 4  # configurations proposed per budget of a front
DRAWS = 500  # failed draws before the knapsack moves a draw into the window
BISECTIONS, MAX_LOG_SCALE = 16, 9.0  # bisection steps for the temperature, and upper end of its interval
MAX_MULTIPLIER = 1e4  # largest multiplier, per share of the budget: other options have probability e**-10000


class Resource(NamedTuple):
    """A cost that every option has.

    Attributes:
        costs: of every option, by group.
        limit: greatest total, never exceeded.
        least: smallest desired total.
    """

    costs: Sequence[Sequence[int]]
    limit: int
    least: int = 0

    def total(self, chosen: Sequence[int]) -> int:
        """Total cost of a choice."""
        return sum(group[index] for group, index in zip(self.costs, chosen, strict=True))

    def admits(self, chosen: Sequence[int]) -> bool:
        """Whether the total cost is within the bounds."""
        return self.least <= self.total(chosen) <= self.limit


def best_choice(space: SearchSpace, budget: Budget, losses: Sequence[Sequence[float]]) -> list[int]:
    """The choice of least total loss within the budget; it uses the budget if any choice does.

    Args:
        space: the search space.
        budget: never exceeded.
        losses: of every option, by decision; summed over decisions. NaN and infinity count as worse than all others.

    Raises:
        InfeasibleBudget: the budget is below the smallest reachable cost.
    """
    space.check_reachable(budget)
    losses = _finite(losses)
    ceiling = [len(decision.options) - 1 for decision in space.decisions]
    if budget.admits(space.ceiling):
        return ceiling  # even if fewer bits have the same loss
    resources = [
        Resource(
            [[cost[index] for cost in decision.costs] for decision in space.decisions],
            bound - space.fixed_cost[index],
        )
        for index, bound in budget.bounds()
    ]
    chosen = solve_knapsack(losses, resources)
    if budget.used_by(space.cost(chosen)):
        return chosen
    best: list[int] | None = None
    for place, (index, bound) in enumerate(budget.bounds()):
        with_least = list(resources)
        with_least[place] = with_least[place]._replace(least=least_use(bound) - space.fixed_cost[index])
        found = _best_within(losses, with_least)
        if found is not None and (best is None or _loss(losses, found) < _loss(losses, best)):
            best = found
    return chosen if best is None else best


def untrained_choice(problem: SearchProblem) -> SearchResult:
    """A choice that fits and uses the budget, without any preference among options; for a search without training."""
    space = problem.space
    equal_losses = [[0.0] * len(decision.options) for decision in space.decisions]
    return SearchResult(
        best_choice(space, problem.budget, equal_losses),
        lambda budget: [best_choice(space, budget, equal_losses)],
    )


def solve_knapsack(losses: Sequence[Sequence[float]], resources: Sequence[Resource]) -> list[int]:
    """The index of the chosen option of every group.

    Args:
        losses: of every option, by group.
        resources: with their limits; a ``least`` is ignored if no choice lies between it and the limit.

    Raises:
        InfeasibleBudget: no choice is within the limits.
    """
    chosen = _best_within(losses, resources)
    if chosen is None and any(resource.least > 0 for resource in resources):
        chosen = _best_within(losses, [resource._replace(least=0) for resource in resources])
    if chosen is not None:
        return chosen
    # If the solver misses an existing solution, that is the cheapest choice, within rounding of the limit.
    cheapest = [min(range(len(group)), key=group.__getitem__) for group in resources[0].costs]
    for resource in resources:
        if resource.total(cheapest) > resource.limit:
            raise InfeasibleBudget(
                f"the cheapest choice costs {resource.total(cheapest)}, the limit is {resource.limit}"
            )
    return cheapest


def _finite(losses: Sequence[Sequence[float]]) -> Sequence[Sequence[float]]:
    known = [loss for row in losses for loss in row if math.isfinite(loss)] or [0.0]
    worse = max(known) + max(map(abs, known)) + 1.0
    return [[loss if math.isfinite(loss) else worse for loss in row] for row in losses]


def _loss(losses: Sequence[Sequence[float]], chosen: Sequence[int]) -> float:
    return sum(group[index] for group, index in zip(losses, chosen, strict=True))


def _best_within(losses: Sequence[Sequence[float]], resources: Sequence[Resource]) -> list[int] | None:
    """The best choice within all bounds, checked in exact integers; None if there is none."""
    if not losses:
        return [] if all(resource.admits([]) for resource in resources) else None
    rejected: list[list[int]] = []
    for slack in (*(0.0,) * MAX_REJECTED, 2e-6, 1e-5, 1e-4, 1e-3):
        chosen = _solve(losses, resources, slack, rejected)
        if chosen is None and not slack:
            return None
        if chosen is not None:
            if all(resource.admits(chosen) for resource in resources):
                return chosen
            rejected.append(chosen)
    return None


def _solve(
    losses: Sequence[Sequence[float]],
    resources: Sequence[Resource],
    slack: float,
    rejected: Sequence[Sequence[int]],
) -> list[int] | None:
    """The best choice within bounds tightened by ``slack``, to the solver's tolerance."""
    edges = np.cumsum([0, *(len(group) for group in losses)])
    one_each = np.zeros((len(losses), edges[-1]))
    for group, (first, last) in enumerate(pairwise(edges)):
        one_each[group, first:last] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    usable = np.ones(edges[-1], dtype=bool)
    for costs, limit, least in resources:
        spare = limit - sum(min(group) for group in costs)
        affordable = np.array([cost - min(group) <= spare for group in costs for cost in group])
        weight = np.array([cost / max(limit, 1) for group in costs for cost in group]) * affordable
        lower = max(least, 0) / max(limit, 1)
        constraints.append(LinearConstraint(weight[None], lower + (slack if lower else 0), 1 - slack))
        usable &= affordable
    for chosen in rejected:
        same = np.zeros(edges[-1])
        same[edges[:-1] + chosen] = 1
        constraints.append(LinearConstraint(same[None], 0, len(losses) - 1))
    loss = np.array([value for group in losses for value in group]) * usable
    loss = loss / max(float(np.abs(loss).max()), 1e-300)
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


def budget_logits(space: SearchSpace, budget: Budget, losses: Losses | None = None) -> list[Tensor]:
    """Log-probabilities of every option, by decision, float64, whose mean cost is the middle of the window.

    If the budget is above the mean cost, or has no bounds, cost has no influence.

    Args:
        space: the search space.
        budget: to be used.
        losses: of every option, by decision; p ~ exp(-loss - m . cost). None for 0.
    """
    bounds = budget.bounds()
    energies = [
        np.asarray(losses[d] if losses else [0.0] * len(decision.options))
        for d, decision in enumerate(space.decisions)
    ]
    if not bounds:
        return [torch.log_softmax(torch.from_numpy(-energy), 0) for energy in energies]
    shares = [
        np.array([[cost[index] / bound for index, bound in bounds] for cost in decision.costs])
        for decision in space.decisions
    ]  # (options, bounds) each
    fixed = np.array([space.fixed_cost[index] / bound for index, bound in bounds])
    target = USE_MIDDLE - fixed

    def dual(m: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = float(m @ target), target.copy()
        for share, energy in zip(shares, energies, strict=True):
            logits = -share @ m - energy
            top = logits.max()
            weights = np.exp(logits - top)
            value += top + np.log(weights.sum())
            gradient -= weights / weights.sum() @ share
        return value, gradient

    answer = minimize(
        dual,
        np.zeros(len(bounds)),
        jac=True,
        bounds=[(0, MAX_MULTIPLIER)] * len(bounds),
        options={"ftol": 0.0, "gtol": 1e-8},  # the gradient is the distance of the mean from the target
    )
    return [
        torch.log_softmax(torch.from_numpy(-share @ answer.x - energy), 0)
        for share, energy in zip(shares, energies, strict=True)
    ]


def informed_logits(space: SearchSpace, budget: Budget, losses: Losses, entropy: float) -> list[Tensor]:
    """``budget_logits`` with losses, at the temperature where the mean entropy of a decision is ``entropy``.

    The entropy is relative to that without losses: 1 ignores the losses, near 0 the choice is deterministic.
    """
    scale = max((max(row) - min(row) for row in losses), default=0.0)
    if scale <= 0:
        return budget_logits(space, budget)
    wanted = entropy * _entropy(budget_logits(space, budget))
    low, high = 0.0, MAX_LOG_SCALE  # logarithm of the inverse temperature, in units of 1 / scale
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        scaled = [[math.expm1(middle) * loss / scale for loss in row] for row in losses]
        logits = budget_logits(space, budget, scaled)
        low, high = (middle, high) if _entropy(logits) > wanted else (low, middle)
    return logits


def _entropy(logits: Sequence[Tensor]) -> float:
    """Sum over decisions."""
    return sum(float(-(row.exp() * row).nan_to_num().sum()) for row in logits)


class Sampler:
    """Draws configurations within the budget that use it, if any do.

    Args:
        space: the search space.
        budget: to draw for.
        generator: of random numbers.
    """

    def __init__(self, space: SearchSpace, budget: Budget, generator: torch.Generator) -> None:
        space.check_reachable(budget)
        self.space, self.budget, self.generator = space, budget, generator
        self.logits = budget_logits(space, budget)
        self._draws = DRAWS

    def draw(self) -> list[int]:
        """Draw one configuration; the most expensive one if it is within the budget."""
        if self.budget.admits(self.space.ceiling):
            return [len(decision.options) - 1 for decision in self.space.decisions]
        for _ in range(self._draws):
            choice = self._sample()
            if in_window(self.space, self.budget, choice):
                return choice
        self._draws = 0  # such draws are too rare: do not try again
        return best_choice(self.space, self.budget, [(-noisy).tolist() for noisy in self._noisy_logits()])

    def draw_distinct(self, count: int) -> list[list[int]]:
        """Draw up to ``count`` distinct configurations; fewer if hardly more exist."""
        found: dict[tuple[int, ...], list[int]] = {}
        for _ in range(4 * count):
            choice = self.draw()
            found.setdefault(tuple(choice), choice)
            if len(found) == count:
                break
        return list(found.values())

    def _sample(self) -> list[int]:
        return [int(noisy.argmax()) for noisy in self._noisy_logits()]

    def _noisy_logits(self) -> list[Tensor]:
        """Logits plus Gumbel noise; the argmax of each row is a draw."""
        uniform = (torch.rand(len(row), generator=self.generator, dtype=torch.float64) for row in self.logits)
        return [
            row - torch.log(-torch.log(u.clamp(1e-300, 1 - 1e-16)))
            for row, u in zip(self.logits, uniform, strict=True)
        ]


def in_window(space: SearchSpace, budget: Budget, choice: Sequence[int]) -> bool:
    """Whether ``choice`` is within the budget and uses it, or is the most expensive choice."""
    cost = space.cost(choice)
    return budget.admits(cost) and (budget.used_by(cost) or cost == space.ceiling)
