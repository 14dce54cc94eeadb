"""A greedy searcher: from the most bits down, always the layer whose lowering costs the least per bit-operation saved.

It stops as soon as the budget is met, so it may leave some of the budget unused.
"""

from collections.abc import Callable, Sequence

from saqcli.quant.cost import Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers import Scorer, SearcherEntry, SearchProblem, SearchResult, relative_noise
from saqcli.training.options import check_choice

Price = Callable[[Sequence[int]], float]


class Greedy:
    """Lowers one layer after the other.

    Args:
        by: ``error`` prices a configuration by its relative quantization errors, ``loss`` by its loss on images.
    """

    def __init__(self, *, by: str = "error") -> None:
        check_choice("by", by, ("error", "loss"))
        self.by = by

    def search(self, problem: SearchProblem) -> SearchResult:
        """Start at the most bits, and lower until the budget is met."""
        problem.space.check_reachable(problem.budget)
        if self.by == "error":
            losses = relative_noise(problem)

            def price(choice: Sequence[int]) -> float:
                return sum(row[index] for row, index in zip(losses, choice, strict=True))

            scorer, scored = None, []
            choice = lowered(problem.space, problem.budget, price)
        else:
            scorer = Scorer(problem)
            choice = self._by_loss(problem, scorer)
            scored = list(scorer.scored.values())

            def price(choice: Sequence[int]) -> float:
                return scorer(choice).loss

        return SearchResult(choice, lambda budget: [lowered(problem.space, budget, price)], scorer, scored)

    def _by_loss(self, problem: SearchProblem, scorer: Scorer) -> list[int]:
        """The search with scores; resumes from those that the memory holds."""
        scorer.load_state_dict(problem.memory.load() or {"configurations": []})
        with problem.progress.task("lowering bits", 0) as task:

            def price(choice: Sequence[int]) -> float:
                known = tuple(choice) in scorer.scored
                loss = scorer(choice).loss
                if not known:
                    task.advance(loss=loss)
                    problem.memory.offer(scorer.state_dict)
                return loss

            return lowered(problem.space, problem.budget, price)


def lowered(space: SearchSpace, budget: Budget, price: Price) -> list[int]:
    """The most bits, lowered until ``budget`` admits them."""
    choice = [len(decision.options) - 1 for decision in space.decisions]
    while not budget.admits(space.cost(choice)):
        cost, now = space.cost(choice), price(choice)

        def rise(other: Sequence[int], cost: tuple[int, ...] = cost, now: float = now) -> float:
            """Rise of the price per share of the budget saved."""
            there = space.cost(other)
            saved = sum((cost[index] - there[index]) / bound for index, bound in budget.bounds())
            return (price(other) - now) / saved

        choice = min(space.cheaper(choice, budget), key=rise)
    return choice


ENTRY = SearcherEntry(Greedy, "lowers the layer that costs the least, until the budget is met")
