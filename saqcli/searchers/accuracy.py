"""Accuracy as a budget: the cheapest configuration of a search that keeps a given top-1.

A search proposes a configuration for any budget. The *ladder* is a list of budgets from the lowest to the highest
cost, 1.5 % apart, since a configuration may leave that share unused (``BUDGET_USE``). Accuracy rises along it, so that
bisection finds the cheapest rung that is accurate enough in log2 of the rungs. Accuracy is measured and noisy: it is
not exactly monotone. Therefore:

- The result was measured, and meets the bound.
- The next ``NEIGHBOURS`` cheaper configurations of the ladder were measured too, and miss it; one that meets it is
  taken instead, and its own neighbours are tried.
- Of all configurations that were measured, the result is the cheapest that meets the bound.

If accuracy is a rising function plus noise of at most e, the result is no higher on the ladder than the first rung
where that function exceeds the bound by e. With no noise it is the cheapest rung that meets the bound.

Where costs are bounded as well, the configuration that the search has found under these bounds is the result if it is
accurate enough. Else its cheaper neighbours are measured, the most accurate configuration within the bounds is kept,
and bisection above the bounds finds what the accuracy would cost.

The shadow price is the slope of top-1 over the logarithm of a cost, by least squares on the measured rungs within
``SPAN`` of the result's cost: Lagrange's multiplier of the bound, up to the noise of the measurement.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from saqcli import distributed
from saqcli.progress import SILENT, Progress
from saqcli.quant.cost import BUDGET_USE, UNITS, Budget, Cost
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.problem import Propose, Scored, ScoreOf
from saqcli.searchers.supernet import rank

NEIGHBOURS = 2  # cheaper configurations that must miss the bound
SPAN = 1.25  # largest ratio of the costs that a shadow price is read from
REACH = 7  # rungs on either side of the result that it is read from, about 11 % of the cost
TOLERANCE = 1e-9  # of sums of percentages, in points


class AccuracyBound(NamedTuple):
    """A lower bound of top-1, as it was asked for; one of the two is None.

    Attributes:
        max_drop: largest difference from the float network, in points of top-1.
        min_top1: least top-1, in percent.
    """

    max_drop: float | None = None
    min_top1: float | None = None

    def __str__(self) -> str:
        """As in ``a drop of at most 1.00 points``."""
        if self.max_drop is not None:
            return f"a drop of at most {self.max_drop:.2f} points"
        return f"a top-1 of at least {self.min_top1:.2f} %"

    def drop(self, float_top1: float) -> float:
        """The largest drop, in points, of a network that has ``float_top1`` in floating point."""
        return self.max_drop if self.max_drop is not None else float_top1 - (self.min_top1 or 0.0)


class Price(NamedTuple):
    """The shadow price of an accuracy bound in one unit of cost.

    Attributes:
        unit: of the cost.
        per_point: cost of one more point of top-1.
        per_percent: points of top-1 that one percent more of the cost gives.
    """

    unit: str
    per_point: int
    per_percent: float


@dataclass(frozen=True)
class Met:
    """What became of an accuracy bound.

    Attributes:
        kept: the configuration that was chosen.
        met: whether it keeps the bound.
        needed: cost of the cheapest measured configuration that keeps the bound; None if none does.
        measured: number of configurations that were measured for this.
        prices: shadow prices of the bounds; without those that the measurement does not resolve.
    """

    kept: Scored
    met: bool
    needed: Cost | None
    measured: int
    prices: Sequence[Price] = ()


@dataclass(frozen=True)
class Accuracy:
    """An accuracy bound and what became of it.

    Attributes:
        bound: as it was asked for.
        drop: largest drop in points on the held-out images, which follows from the bound.
        float_top1: percent, of the float network on the held-out images.
        images: number of held-out images.
        method: how configurations were measured: ``calibrated``, ``reconstructed`` or ``fine-tuned``.
        budget: bounds of the cost that were asked for besides.
        result: the configuration that was chosen.
    """

    bound: AccuracyBound
    drop: float
    float_top1: float
    images: int
    method: str
    budget: Budget
    result: Met

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as ``accuracy`` in ``search.json``; accuracies in percent, drops in points."""
        found, needed = self.result, self.result.needed
        unit = self.budget.unit
        return {
            "max_drop": self.bound.max_drop,
            "min_top1": self.bound.min_top1,
            "allowed_drop": self.drop,
            "held_out_images": self.images,
            "held_out_float_top1": self.float_top1,
            "held_out_top1": found.kept.top1,
            "held_out_drop": self.float_top1 - found.kept.top1,
            "method": self.method,
            "met": found.met,
            "measured": found.measured,
            "cost_unit": unit,
            "budget_cost": self.budget.bops,
            "budget_bytes": self.budget.size,
            "needed_cost": None if needed is None else needed.bops,
            "needed_bytes": None if needed is None else needed.size,
            "shadow_price": [price._asdict() for price in found.prices],
        }


class Ladder(NamedTuple):
    """Budgets in ascending order.

    Attributes:
        budgets: the last admits the most bits, the first only the fewest.
        own: index of the budget that was asked for; None if no cost is bounded.
    """

    budgets: list[Budget]
    own: int | None


def ladder(space: SearchSpace, asked: Budget) -> Ladder:
    """Budgets over the whole range of a space: of what ``asked`` bounds, together, or else of BOPs."""
    bounds = {unit: min(bound, space.ceiling[unit]) for unit, bound in asked.bounds()}
    bounds = bounds or {0: space.ceiling.bops}

    def budget(power: int) -> Budget:
        held = {
            unit: min(max(round(bound * BUDGET_USE**-power), space.floor[unit]), space.ceiling[unit])
            for unit, bound in bounds.items()
        }
        if not power:
            held = bounds  # exact, whatever its size
        return Budget(held.get(0), held.get(1), asked.unit)

    below: list[Budget] = []
    above: list[Budget] = []
    for found, direction, end in ((below, -1, space.floor), (above, 1, space.ceiling)):
        last = budget(0)
        while any((last.bops, last.size)[unit] != end[unit] for unit in bounds):
            last = budget(direction * (len(found) + 1))
            found.append(last)
    return Ladder([*reversed(below), budget(0), *above], len(below) if asked.bounds() else None)


def middle(space: SearchSpace) -> Budget:
    """The budget of a search without one, of which only the proposals for other budgets are used."""
    least, most = space.floor.bops, space.ceiling.bops
    return Budget(bops=max(round(math.sqrt(least) * math.sqrt(most)), least), unit=space.costs.unit)


class Rungs:
    """The configurations of a ladder, proposed and measured when they are used.

    Args:
        budgets: of the ladder.
        propose: configurations for a budget; of several the most accurate counts.
        score: measures a configuration.

    Attributes:
        measured: the rungs that were used, by index.
    """

    def __init__(self, budgets: Sequence[Budget], propose: Propose, score: ScoreOf) -> None:
        self._budgets, self._propose, self._score = budgets, propose, score
        self.measured: dict[int, Scored] = {}

    def __len__(self) -> int:
        return len(self._budgets)

    def __call__(self, index: int) -> Scored:
        """The configuration at ``index``, measured."""
        if index not in self.measured:
            # The ranks may have different processors, and the solver of a knapsack other ties.
            choices = distributed.from_first(lambda: self._propose(self._budgets[index]))
            self.measured[index] = max((self._score(choice) for choice in choices), key=rank)
        return self.measured[index]


def meets(scored: Scored, least: float) -> bool:
    """Whether a configuration has a top-1 of at least ``least`` percent."""
    return math.isfinite(scored.loss) and scored.top1 >= least - TOLERANCE


def bisect(
    rung: Callable[[int], Scored], low: int, high: int, least: float, trials: int | None = None
) -> int:
    """An index in (low, high] that meets the bound while the one below it misses it, by bisection.

    Args:
        rung: measures the configuration at an index.
        low: an index that misses the bound, or is outside of the ladder.
        high: one that meets it.
        least: top-1 in percent.
        trials: most measurements; None for as many as it takes, ceil(log2(high - low)). With fewer, the rungs between
            the result and the last one that missed are unknown.
    """
    while high - low > 1 and trials != 0:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(rung(middle), least) else (middle, high)
        trials = None if trials is None else trials - 1
    return high


def step_down(rung: Callable[[int], Scored], start: int, least: float, first: int = 0) -> int:
    """From ``start`` down as long as one of the next ``NEIGHBOURS`` cheaper configurations meets the bound."""
    index, misses, last = start, 0, rung(start).choice
    for below in range(start - 1, first - 1, -1):
        found = rung(below)
        if found.choice != last:
            last = found.choice
            misses = 0 if meets(found, least) else misses + 1
        if meets(found, least):
            index = below
        if misses == NEIGHBOURS:
            break
    return index


def most_measured(count: int) -> int:
    """The most rungs of ``count`` that are measured without noise: both ends, bisection, neighbours, shadow price."""
    return min(count, 2 + math.ceil(math.log2(max(count, 1))) + NEIGHBOURS + 2)


def keep_accuracy(
    space: SearchSpace,
    asked: Budget,
    choice: Sequence[int],
    propose: Propose,
    score: ScoreOf,
    least: float,
    known: Iterable[Scored] = (),
    progress: Progress = SILENT,
) -> Met:
    """The cheapest configuration that keeps a top-1; with bounds of the cost, one within them.

    Args:
        space: of the search.
        asked: bounds of the cost; ``Budget()`` for none.
        choice: what the search has found; within ``asked``.
        propose: configurations for other budgets.
        score: measures a configuration.
        least: top-1 in percent.
        known: configurations that the search has measured in the same way.
        progress: reports every measurement.
    """
    rising = ladder(space, asked)
    scored = {one.choice: one for one in known}
    new: set[tuple[int, ...]] = set()
    with progress.task("measuring accuracy", most_measured(len(rising.budgets))) as task:

        def measure(configuration: Sequence[int]) -> Scored:
            key = tuple(configuration)
            if key not in new:
                new.add(key)
                scored[key] = score(key)
                task.advance(top1=scored[key].top1, MBOPs=scored[key].cost.bops / 1e6)
            return scored[key]

        rungs = Rungs(rising.budgets, propose, measure)
        if rising.own is not None:
            rungs.measured[rising.own] = measure(choice)

        def cheap(one: Scored) -> tuple[Any, ...]:
            return _by_cost(one, asked)

        def pick() -> Scored:
            """Of all that were measured, the best result."""
            if rising.own is None:
                good = [one for one in scored.values() if meets(one, least)]
                return min(good, key=cheap) if good else max(scored.values(), key=rank)
            if meets(rungs(rising.own), least):
                return rungs(rising.own)
            return max((one for one in scored.values() if asked.admits(one.cost)), key=rank)

        if rising.own is None:
            _find_cheapest(rungs, least)
        elif not meets(rungs(rising.own), least):
            step_down(rungs, rising.own, least)
            if not meets(pick(), least):
                _find_above(rungs, rising.own, least)
        around = _nearest(rising.budgets, pick().cost)
        for index in sorted({max(around - REACH, 0), around, min(around + REACH, len(rungs) - 1)}):
            rungs(index)
        if rising.own is None and _nearest(rising.budgets, pick().cost) < around:  # one of these, by noise
            step_down(rungs, _nearest(rising.budgets, pick().cost), least)
    good = [one for one in scored.values() if meets(one, least)]
    kept = pick()
    needed = min(good, key=cheap).cost if good else None
    return Met(kept, meets(kept, least), needed, len(new), prices(rungs.measured.values(), kept.cost, asked))


def _find_cheapest(rungs: Rungs, least: float) -> None:
    """Measure the ladder around the lowest rung that meets the bound."""
    top = len(rungs) - 1
    if meets(rungs(0), least):
        return
    if meets(rungs(top), least):
        step_down(rungs, bisect(rungs, 0, top, least), least)
    else:
        step_down(rungs, top, least)  # accuracy is not exactly monotone


def _find_above(rungs: Rungs, own: int, least: float) -> None:
    """Measure the ladder around the lowest rung above ``own`` that meets the bound."""
    top = len(rungs) - 1
    if own < top and meets(rungs(top), least):
        step_down(rungs, bisect(rungs, own, top, least), least, own + 1)


def keep_by_trials(
    space: SearchSpace,
    asked: Budget,
    met: Met,
    propose: Propose,
    score: ScoreOf,
    trial: ScoreOf,
    least: float,
    trials: int,
) -> tuple[Met, bool]:
    """The cheapest configuration that keeps a top-1 by a method that is too expensive for many measurements.

    Without bounds of the cost the trials bisect the ladder below the result of ``keep_accuracy``, which resolves the
    logarithm of its range to a share of 1 in 2**trials. With such bounds, or if nothing met the bound so far, the kept
    configuration is tried first: the method may raise its accuracy enough.

    Args:
        space: of the search.
        asked: bounds of the cost.
        met: from ``keep_accuracy``.
        propose: configurations for other budgets.
        score: the cheap measurement, which chooses among several configurations of a rung.
        trial: measures a configuration by the expensive method.
        least: top-1 in percent.
        trials: most calls of ``trial``.

    Returns:
        The result, and whether its accuracy is that of a trial.
    """
    tried: list[Scored] = []

    def attempt(choice: Sequence[int]) -> Scored:
        tried.append(trial(choice))
        return tried[-1]

    rising = ladder(space, asked)
    if not trials or (rising.own is not None and met.met):
        return met, False
    good = met.met or meets(attempt(met.kept.choice), least)
    if good and rising.own is None:
        cheap = Rungs(rising.budgets, propose, score)
        high = _nearest(rising.budgets, met.kept.cost)
        bisect(lambda index: attempt(cheap(index).choice), -1, high, least, trials - len(tried))
    found = [one for one in tried if meets(one, least)]
    if found:
        kept = min(found, key=lambda one: _by_cost(one, asked))
        return replace(met, kept=kept, met=True, needed=kept.cost), True
    return (met, False) if met.met else (replace(met, kept=max(tried, key=rank)), True)


def _by_cost(scored: Scored, asked: Budget) -> tuple[Any, ...]:
    """Ascending in the first unit that is bounded, then in the others; of equal costs the best first."""
    units = [unit for unit, _ in asked.bounds()]
    return (*(scored.cost[unit] for unit in units), *scored.cost, -scored.top1, scored.loss)


def _nearest(budgets: Sequence[Budget], cost: Cost) -> int:
    """The lowest rung that admits ``cost``."""
    return next((index for index, budget in enumerate(budgets) if budget.admits(cost)), len(budgets) - 1)


def prices(measured: Iterable[Scored], around: Cost, asked: Budget) -> list[Price]:
    """Shadow prices in every unit that is bounded, or in bit-operations; without those that are not positive.

    Args:
        measured: configurations of the ladder.
        around: cost of the result.
        asked: bounds of the cost.
    """
    found = []
    distinct = {one.choice: one for one in measured if math.isfinite(one.loss)}.values()
    for unit in dict(asked.bounds()) or {0: 0}:
        near = [one for one in distinct if around[unit] / SPAN <= one.cost[unit] <= around[unit] * SPAN]
        slope = _slope([(math.log(one.cost[unit]), one.top1) for one in near if one.cost[unit]])
        if slope > 0:
            name = (asked.unit, UNITS[1])[unit]
            found.append(Price(name, round(around[unit] / slope), slope / 100))
    return found


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """The slope of y over x by least squares; 0 if it is undetermined."""
    if len({x for x, _ in points}) < 2:
        return 0.0
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return float(sum((x - mean_x) * (y - mean_y) for x, y in points) / spread)
