"""The family of searchers: a problem in, a bit configuration within the budget out.

A searcher is handed everything it may need (the wrapped model with its input statistics, costs, budget,
candidates) and returns one configuration that the budget admits. To add one: write
``saqcli/algorithms/searchers/NAME.py`` with a class that has ``search``, and add its line here. The contract
tests run over the table.
"""

from collections.abc import Callable

from saqcli.algorithms.searchers.error import ErrorKnapsack
from saqcli.algorithms.searchers.problem import Searcher, SearchProblem
from saqcli.algorithms.searchers.uniform import Uniform

SEARCHERS: dict[str, Callable[[], Searcher]] = {
    "error": ErrorKnapsack,
    "uniform": Uniform,
}

__all__ = ["SEARCHERS", "SearchProblem", "Searcher"]
