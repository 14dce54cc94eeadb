"""Baselines: uniform bits, least quantization error, the best of random configurations.

The plainest baseline: the same bits everywhere, as many as the budget allows.

Bits by quantization error alone: seconds, no training, an exact knapsack.

The output noise of a layer, relative to its signal, is to first order the sum of the noise-to-signal ratios
of its weight and of its input, each on the scheme's grid at the level of least squared error, whatever the
quantizer. The searcher minimises the sum of these over all layers under the budget. It knows nothing of how
much a layer's noise matters to the loss; it is what a learned search must beat.

The best of a number of random configurations: what any search must beat at the same cost.
"""

import torch

from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.search.knapsack import FRONT_DRAWS, Sampler, best_choice
from saqcli.search.problem import Found, SearchProblem
from saqcli.search.separable import relative_noise
from saqcli.search.supernet import Scorer, score_all
from saqcli.training.options import check_count


class Uniform:
    """The greatest width that fits when every free layer has it, or what rules leave nearest to it."""

    def search(self, problem: SearchProblem) -> Found:
        """Try the widths from the top."""
        problem.space.check_reachable(problem.budget)
        return Found(
            greatest(problem.space, problem.budget), lambda budget: [greatest(problem.space, budget)]
        )


def greatest(space: SearchSpace, budget: Budget) -> list[int]:
    """The uniform choice with the most bits that ``budget`` admits; the cheapest choice where none is."""
    options = [bits for decision in space.decisions for bits in decision.options]
    widths = {width for bits in options for width in (bits.weight, bits.activation)}
    for width in sorted(filter(None, widths), reverse=True):
        choice = space.nearest(LayerBits(weight=width, activation=width))
        if budget.admits(space.cost(choice)):
            return choice
    return [0] * len(space.decisions)


class ErrorKnapsack:
    """Least sum of relative quantization errors."""

    def search(self, problem: SearchProblem) -> Found:
        """Measure every layer at every width, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = relative_noise(problem)
        choice = best_choice(problem.space, problem.budget, losses)
        return Found(choice, lambda budget: [best_choice(problem.space, budget, losses)])


class RandomSearch:
    """Draws configurations that use the budget and takes the one with the highest accuracy, calibrated.

    Args:
        draws: how many.
    """

    def __init__(self, *, draws: int = 32) -> None:
        check_count("draws", draws)
        self.draws = draws

    def search(self, problem: SearchProblem) -> Found:
        """Draw, score, take the best."""
        generator = torch.Generator().manual_seed(problem.seed)
        choices = Sampler(problem.space, problem.budget, generator).draw_distinct(self.draws)
        scorer = Scorer(problem)
        best = score_all(problem, scorer, choices)

        def propose(budget: Budget) -> list[list[int]]:
            return Sampler(problem.space, budget, generator).draw_distinct(FRONT_DRAWS)

        return Found(list(best.choice), propose, scorer, list(scorer.scored.values()))
