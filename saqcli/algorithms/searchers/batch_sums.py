"""Measuring on one batch after the other what adds up: dealt out to the ranks, and gone on with after a stop."""

from collections.abc import Callable, Iterable
from typing import Any

from saqcli import ranks
from saqcli.algorithms.searchers.problem import Memory


def sums_over_batches(
    count: int,
    measure: Callable[[int], Iterable[tuple[str, float]]],
    memory: Memory,
    pass_over: Callable[[int], None],
) -> dict[str, float]:
    """Sums by name, from where ``memory`` left off; every rank gets those of one process, bit for bit.

    Args:
        count: batches.
        measure: number of a batch to names and values; each batch is measured by one rank.
        memory: holds the sums.
        pass_over: told how many batches this rank need not measure again.
    """
    kept: dict[str, Any] = memory.load() or {"done": 0, "sums": {}}
    sums: dict[str, float] = kept["sums"]
    pass_over(kept["done"] // ranks.count())
    for first in range(kept["done"], count, ranks.count()):
        own = first + ranks.index()
        mine = list(measure(own)) if own < count else []
        for found in ranks.gathered(mine):  # in the order of the batches
            for name, value in found:
                sums[name] = sums.get(name, 0.0) + value
        done = min(first + ranks.count(), count)
        memory.offer(lambda done=done: {"done": done, "sums": sums})  # type: ignore[misc]
    return sums
