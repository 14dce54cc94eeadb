"""Baselines: uniform bits, least quantization error, best of random configurations.

``Uniform`` gives every layer the same bits, as many as the budget allows. ``RandomSearch`` takes the best of several
random configurations: any search must beat it at the same cost.

``ErrorKnapsack`` uses the quantization error alone: it takes seconds, trains nothing and solves an exact knapsack. To
first order the output noise of a layer, relative to its signal, is the sum of the noise-to-signal ratios of its weight
and of its input, each on the scheme's grid at the level of least squared error, whatever the quantizer. The searcher
minimizes the sum of these over all layers under the budget (of the error of weights, the share
``SearchProblem.weight_error``). It ignores how much a layer's noise matters to the loss; a learned search must beat it.
"""

import torch

from saqcli.quant.cost import Budget
from saqcli.searchers.knapsack import FRONT_DRAWS, Sampler, best_choice
from saqcli.searchers.problem import SearchProblem, SearchResult
from saqcli.searchers.separable import relative_noise
from saqcli.searchers.supernet import Comparison, score_all
from saqcli.searchers.uniforms import largest_uniform
from saqcli.training.options import check_count


class Uniform:
    """The greatest width that fits when every free layer has it; rules move a layer to its nearest option."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Try the widths in descending order."""
        problem.space.check_reachable(problem.budget)
        return SearchResult(
            largest_uniform(problem.space, problem.budget),
            lambda budget: [largest_uniform(problem.space, budget)],
        )


class ErrorKnapsack:
    """Minimizes the sum of relative quantization errors."""

    def search(self, problem: SearchProblem) -> SearchResult:
        """Measure every layer at every width, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = relative_noise(problem)
        choice = best_choice(problem.space, problem.budget, losses)
        return SearchResult(
            choice, lambda budget: [best_choice(problem.space, budget, losses)], losses=losses
        )


class RandomSearch:
    """Draws configurations that use the budget; takes the one that diverges least from the float network.

    Args:
        draws: number of configurations.
    """

    def __init__(self, *, draws: int = 32) -> None:
        check_count("draws", draws)
        self.draws = draws

    def search(self, problem: SearchProblem) -> SearchResult:
        """Draw, score, take the best."""
        generator = torch.Generator().manual_seed(problem.seed)
        choices = Sampler(problem.space, problem.budget, generator).draw_distinct(self.draws)
        scorer = Comparison(problem)
        best = score_all(problem, scorer, choices)

        def propose(budget: Budget) -> list[list[int]]:
            return Sampler(problem.space, budget, generator).draw_distinct(FRONT_DRAWS)

        return scorer.result(best.choice, propose)
