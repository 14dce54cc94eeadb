"""How long functions take, measured in turns: a machine that others use too slows all of them alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from saqcli.progress import Task

WARM_UP = 3  # runs of each function that are not timed, before the rounds


@dataclass(frozen=True)
class Timing:
    """What one function took over all its timed runs.

    Attributes:
        median_s: seconds.
        spread_s: seconds from the first to the third quartile.
        runs: timed.
    """

    median_s: float
    spread_s: float
    runs: int


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    task: Task,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Run all contenders in every round, one after the other, and every second round in reverse order.

    A turn is two runs, of which the second is timed: the first brings back into the caches what the others have
    driven out, as in a program that runs nothing else.

    Args:
        contenders: functions by name.
        rounds: timed runs of each, at least 1.
        task: told about every round.
        clock: seconds that only go forward.
    """
    for run in contenders.values():
        for _ in range(WARM_UP):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        for name in order:
            run = contenders[name]
            run()
            start = clock()
            run()
            seconds[name].append(clock() - start)
        order.reverse()
        task.advance()
    return {name: summarize(values) for name, values in seconds.items()}


def summarize(seconds: list[float]) -> Timing:
    """Median and interquartile range of at least one duration."""
    low, median, high = np.percentile(seconds, (25, 50, 75))
    return Timing(float(median), float(high - low), len(seconds))
