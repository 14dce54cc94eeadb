"""Configurations at random that use a budget and do not exceed it.

Bits drawn evenly nearly always cost too much or too little. Drawn instead with probabilities

    p(option) ~ exp(-m . cost)          for every decision on its own

they cost the budget on average, where the multipliers m >= 0 (one a bound) are chosen so. Among configurations of the
same cost all are equally likely, since their probabilities depend on the cost alone: drawing until one lies between
``BUDGET_USE`` of the budget and the budget gives nearly even draws from all of these. This is the distribution of
greatest entropy with that mean cost (Jaynes, 1957). The multipliers minimise a convex function, m . target + the sum of
the decisions' log partition functions.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from saqcli.algorithms.searchers.knapsack import best_choice
from saqcli.algorithms.searchers.separable import Losses
from saqcli.quant.cost import USE_MIDDLE, Budget
from saqcli.quant.space import SearchSpace

FRONT_DRAWS = 4  # configurations proposed for another budget
DRAWS = 500  # in vain, before the knapsack makes a configuration fit
HALVINGS, HOTTEST = 16, 9.0  # of the search for a temperature
STEEPEST = (
    1e4  # of a multiplier, per share of the budget: the cheapest option in all but one of e**10000 draws
)


def budget_logits(space: SearchSpace, budget: Budget, losses: Losses | None = None) -> list[Tensor]:
    """Log-probabilities of every option, by decision, float64, with which the mean cost is that of the window.

    Where the budget is beyond the mean, or has no bounds, the cost makes no difference.

    Args:
        space: what may be chosen.
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
        bounds=[(0, STEEPEST)] * len(bounds),
        options={"ftol": 0.0, "gtol": 1e-8},  # the gradient is how far the mean misses the target
    )
    return [
        torch.log_softmax(torch.from_numpy(-share @ answer.x - energy), 0)
        for share, energy in zip(shares, energies, strict=True)
    ]


def informed_logits(space: SearchSpace, budget: Budget, losses: Losses, entropy: float) -> list[Tensor]:
    """``budget_logits`` with losses at the temperature where the mean entropy of a decision is ``entropy``.

    The entropy is in units of what it is without losses: 1 ignores them, near 0 there is no choice left.
    """
    scale = max((max(row) - min(row) for row in losses), default=0.0)
    if scale <= 0:
        return budget_logits(space, budget)
    wanted = entropy * _entropy(budget_logits(space, budget))
    low, high = 0.0, HOTTEST  # of the logarithm of the inverse temperature, in units of 1 / scale
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        scaled = [[math.expm1(middle) * loss / scale for loss in row] for row in losses]
        logits = budget_logits(space, budget, scaled)
        low, high = (middle, high) if _entropy(logits) > wanted else (low, middle)
    return logits


def _entropy(logits: Sequence[Tensor]) -> float:
    """Summed over decisions."""
    return sum(float(-(row.exp() * row).nan_to_num().sum()) for row in logits)


class Sampler:
    """Draws configurations that the budget admits, and that use it where configurations do.

    Args:
        space: to draw from.
        budget: to draw for.
        generator: of the random numbers.
    """

    def __init__(self, space: SearchSpace, budget: Budget, generator: torch.Generator) -> None:
        space.check_reachable(budget)
        self.space, self.budget, self.generator = space, budget, generator
        self.logits = budget_logits(space, budget)
        self._draws = DRAWS

    def draw(self) -> list[int]:
        """One configuration; the dearest where the budget admits it."""
        if self.budget.admits(self.space.ceiling):
            return [len(decision.options) - 1 for decision in self.space.decisions]
        for _ in range(self._draws):
            choice = self._any()
            if in_window(self.space, self.budget, choice):
                return choice
        self._draws = 0  # they are too rare to be found so
        return best_choice(self.space, self.budget, [(-noisy).tolist() for noisy in self._noisy()])

    def draw_distinct(self, count: int) -> list[list[int]]:
        """Up to ``count`` different ones; fewer where hardly more exist."""
        found: dict[tuple[int, ...], list[int]] = {}
        for _ in range(4 * count):
            choice = self.draw()
            found.setdefault(tuple(choice), choice)
            if len(found) == count:
                break
        return list(found.values())

    def _any(self) -> list[int]:
        return [int(noisy.argmax()) for noisy in self._noisy()]

    def _noisy(self) -> list[Tensor]:
        """Logits plus Gumbel noise: the greatest of each is a draw."""
        uniform = (torch.rand(len(row), generator=self.generator, dtype=torch.float64) for row in self.logits)
        return [
            row - torch.log(-torch.log(u.clamp(1e-300, 1 - 1e-16)))
            for row, u in zip(self.logits, uniform, strict=True)
        ]


def in_window(space: SearchSpace, budget: Budget, choice: Sequence[int]) -> bool:
    """Whether the budget admits ``choice`` and it uses the budget, or it is all there is to use."""
    cost = space.cost(choice)
    return budget.admits(cost) and (budget.used_by(cost) or cost == space.ceiling)
