"""Measuring on one batch after the other what adds up: dealt out to the ranks, and gone on with after a stop."""

from collections.abc import Callable, Iterable
from typing import Any

from saqcli import ranks
from saqcli.algorithms.searchers.problem import SearchProblem
from saqcli.progress import Task


def sums_over_batches(
    problem: SearchProblem,
    title: str,
    count: int,
    measure: Callable[[int, Task], Iterable[tuple[str, float]]],
    steps: int = 1,
) -> dict[str, float]:
    """Sums by name, from where the memory left off; every rank gets those of one process, bit for bit.

    Args:
        problem: whose memory holds the sums, and whose progress is told.
        title: of the task.
        count: batches.
        measure: number of a batch to names and values, each batch by one rank; advances the task.
        steps: by which it does so for a batch.
    """
    kept: dict[str, Any] = problem.memory.load() or {"done": 0, "sums": {}}
    sums: dict[str, float] = kept["sums"]
    with problem.progress.task(title, -(-count // ranks.count()) * steps) as task:
        task.advance(kept["done"] // ranks.count() * steps)
        for first in range(kept["done"], count, ranks.count()):
            own = first + ranks.index()
            mine = list(measure(own, task)) if own < count else []
            for found in ranks.gathered(mine):  # in the order of the batches
                for name, value in found:
                    sums[name] = sums.get(name, 0.0) + value
            done = min(first + ranks.count(), count)
            problem.memory.offer(lambda done=done: {"done": done, "sums": sums})  # type: ignore[misc]
    return sums
