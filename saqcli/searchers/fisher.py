"""Fisher: bits by the divergence that each operand's noise causes, measured with one backward pass an image.

The divergences (``divergences``) are summed over layers, and the knapsack is solved exactly.
"""

from saqcli.searchers.divergences import add_divergences, divergences
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import SearchProblem, SearchResult
from saqcli.training.options import check_count


class Fisher:
    """Minimizes the sum of second-order divergences of softened class probabilities.

    Args:
        images: number of scoring images; a backward pass for each.
    """

    def __init__(self, *, images: int = 64) -> None:
        check_count("images", images)
        self.images = images

    def search(self, problem: SearchProblem) -> SearchResult:
        """Measure every operand at every width, then solve the knapsack exactly."""
        problem.space.check_reachable(problem.budget)
        losses = add_divergences(problem.space, divergences(problem, self.images))
        choice = best_choice(problem.space, problem.budget, losses)
        return SearchResult(
            choice, lambda budget: [best_choice(problem.space, budget, losses)], losses=losses
        )
