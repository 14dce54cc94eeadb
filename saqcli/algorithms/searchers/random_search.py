"""The best of a number of random configurations: what any search must beat at the same cost."""

import torch

from saqcli.algorithms.options import check_count
from saqcli.algorithms.searchers.problem import Found, SearchProblem
from saqcli.algorithms.searchers.sampling import FRONT_DRAWS, Sampler
from saqcli.algorithms.searchers.scoring import Scorer, score_all
from saqcli.quant.cost import Budget


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
