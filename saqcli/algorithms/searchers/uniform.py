"""The plainest baseline: the same bits everywhere, as many as the budget allows."""

from saqcli.algorithms.searchers.problem import Found, SearchProblem
from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget
from saqcli.quant.space import SearchSpace


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
