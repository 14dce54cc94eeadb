"""Bits by quantization error alone: seconds, no training, an exact knapsack.

The output noise of a layer, relative to its signal, is to first order the sum of the noise-to-signal ratios
of its weight and of its input, each on the scheme's grid at the level of least squared error, whatever the
quantizer. The searcher minimises the sum of these over all layers under the budget. It knows nothing of how
much a layer's noise matters to the loss; it is what a learned search must beat.
"""

from saqcli.algorithms.searchers.knapsack import best_choice
from saqcli.algorithms.searchers.problem import Found, SearchProblem
from saqcli.algorithms.searchers.separable import relative_noise


class ErrorKnapsack:
    """Least sum of relative quantization errors."""

    def search(self, problem: SearchProblem) -> Found:
        """Measure every layer at every width, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = relative_noise(problem)
        choice = best_choice(problem.space, problem.budget, losses)
        return Found(choice, lambda budget: [best_choice(problem.space, budget, losses)])
