"""The plainest baseline: the same bits everywhere, as many as the budget allows."""

from saqcli.algorithms.searchers.problem import SearchProblem
from saqcli.quant.bits import BitConfig, LayerBits


class Uniform:
    """The greatest candidate that fits when every free layer has it."""

    def search(self, problem: SearchProblem) -> BitConfig:
        """Try the candidates from the top."""
        problem.budget.check_reachable(problem.costs, problem.candidates, problem.name)
        configs = (
            problem.costs.uniform(problem.name, LayerBits(weight=bits, activation=bits))
            for bits in reversed(problem.candidates)
        )
        return next(config for config in configs if problem.budget.admits(problem.costs.bops(config)))
