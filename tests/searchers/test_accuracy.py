"""Accuracy as a budget: bisection over a ladder against exhaustive search, with and without noise."""

import math
import random
from collections.abc import Sequence
from itertools import pairwise, product

import pytest

from saqcli.quant.cost import BUDGET_USE, Budget
from saqcli.quant.search_space import SearchSpace
from saqcli.searchers.accuracy import (
    NEIGHBOURS,
    AccuracyBound,
    Met,
    bisect,
    keep_accuracy,
    keep_by_trials,
    ladder,
    meets,
    most_measured,
    step_down,
)
from saqcli.searchers.knapsack import best_choice
from saqcli.searchers.problem import Scored
from tests.support.spaces import random_space

COUNT = 40


class Front:
    """A made-up front: one configuration a rung, and the number of measurements."""

    def __init__(self, top1: Sequence[float]) -> None:
        self.top1, self.measured = top1, set[int]()

    def __call__(self, index: int) -> Scored:
        self.measured.add(index)
        return Scored((index,), (index + 1, index + 1), self.top1[index], 1.0)  # type: ignore[arg-type]


def rising(rng: random.Random, count: int) -> list[float]:
    """Accuracies that never fall, with plateaus."""
    return sorted(rng.choice([rng.uniform(0, 100), 50.0, 90.0]) for _ in range(count))


@pytest.mark.parametrize("seed", range(COUNT))
def test_bisection_equals_exhaustive_search(seed: int) -> None:
    rng = random.Random(seed)
    count = rng.randint(2, 300)
    front = Front([10.0, *rising(rng, count - 1)[:-1], 99.0] if count > 2 else [10.0, 99.0])
    front = Front(sorted(front.top1))
    least = rng.uniform(front.top1[0] + 1e-6, front.top1[-1])

    found = step_down(front, bisect(front, 0, count - 1, least), least)

    assert found == next(index for index in range(count) if front.top1[index] >= least)
    assert len(front.measured) <= math.ceil(math.log2(count)) + NEIGHBOURS + 1


@pytest.mark.parametrize("seed", range(COUNT))
def test_noisy_front_keeps_its_guarantees(seed: int) -> None:
    rng = random.Random(seed)
    count, noise = rng.randint(2, 300), rng.choice([0.1, 1.0, 5.0])
    trend = rising(rng, count)
    front = Front([top1 + rng.uniform(-noise, noise) for top1 in trend])
    least = rng.uniform(front.top1[0] + 1e-6, front.top1[-1])
    if not meets(front(count - 1), least) or meets(front(0), least):
        return

    found = step_down(front, bisect(front, 0, count - 1, least), least)

    assert front.top1[found] >= least
    assert all(front.top1[index] < least for index in range(max(found - NEIGHBOURS, 0), found))
    safe = next((index for index in range(count) if trend[index] >= least + noise), count - 1)
    assert found <= safe


def test_bisection_stops_after_its_trials() -> None:
    front = Front([0.0] * 40 + [100.0] * 60)
    assert bisect(front, -1, 99, 50.0, 0) == 99
    assert bisect(front, -1, 99, 50.0, 2) == 49
    assert front.measured == {49, 24}


# Over a search space


class Space:
    """A random space whose configurations have a made-up accuracy that rises with their bits."""

    def __init__(self, seed: int, noise: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.space: SearchSpace = random_space(self.rng, 2, 4)
        while not self.space.decisions:
            self.space = random_space(self.rng, 2, 4)
        self.losses = [
            sorted((self.rng.random() for _ in decision.options), reverse=True)
            for decision in self.space.decisions
        ]
        self.noise, self.calls = noise, 0
        self._noise: dict[tuple[int, ...], float] = {}

    def propose(self, budget: Budget) -> list[list[int]]:
        return [best_choice(self.space, budget, self.losses)]

    def score(self, choice: Sequence[int]) -> Scored:
        self.calls += 1
        key = tuple(choice)
        loss = sum(row[index] for row, index in zip(self.losses, choice, strict=True))
        spread = self._noise.setdefault(key, self.rng.uniform(-self.noise, self.noise))
        return Scored(key, self.space.cost(choice), 100 * math.exp(-loss) + spread, loss)

    def keep(self, least: float, asked: Budget = Budget()) -> Met:
        choice = self.propose(asked)[0] if asked.bounds() else [0] * len(self.space.decisions)
        return keep_accuracy(self.space, asked, choice, self.propose, self.score, least)

    def ends(self) -> tuple[Scored, Scored]:
        most = [len(decision.options) - 1 for decision in self.space.decisions]
        return self.score([0] * len(most)), self.score(most)


@pytest.mark.parametrize("seed", [0, 4, 5, 10])
def test_cheapest_of_the_front_is_found(seed: int) -> None:
    made = Space(seed)
    low, high = made.ends()
    least = (low.top1 + high.top1) / 2

    met = made.keep(least)

    assert met.met
    assert met.kept.top1 >= least
    assert met.needed == met.kept.cost
    budgets = ladder(made.space, Budget()).budgets
    front = [made.score(made.propose(budget)[0]) for budget in budgets]
    misses = [index for index, one in enumerate(front) if one.top1 < least]
    assert met.kept.cost.bops <= budgets[misses[-1] + 1 if misses else 0].bops  # type: ignore[operator]


def test_fewest_bits_are_taken_at_once() -> None:
    made = Space(1)
    met = made.keep(0.0)
    assert met.met
    assert met.kept.cost.bops == made.space.floor.bops
    assert met.measured <= 3  # the floor, and the shadow price


def test_unreachable_accuracy_keeps_the_best() -> None:
    made = Space(2)
    met = made.keep(101.0)
    assert not met.met
    assert met.needed is None
    assert met.kept.choice == made.ends()[1].choice


@pytest.mark.parametrize("seed", [0, 3, 5, 6])
def test_both_bounds_hold_or_say_what_is_needed(seed: int) -> None:
    made = Space(seed)
    low, high = made.ends()
    least = (low.top1 + high.top1) / 2
    bops = round(math.sqrt(made.space.floor.bops * made.space.ceiling.bops))
    for asked in (
        Budget(bops=bops),
        Budget(size=(made.space.floor.size + made.space.ceiling.size) // 2),
        Budget(bops=bops, size=made.space.ceiling.size),
    ):
        met = made.keep(least, asked)
        own = made.score(made.propose(asked)[0])
        assert asked.admits(met.kept.cost)
        if own.top1 >= least:
            assert met.met
            assert met.kept.choice == own.choice
        else:
            assert met.kept.top1 >= own.top1
            assert met.needed is not None
            assert met.met or not asked.admits(met.needed)


def test_noise_never_breaks_the_result() -> None:
    for seed in range(6):
        made = Space(seed, noise=5.0)
        low, high = made.ends()
        least = (low.top1 + high.top1) / 2
        met = made.keep(least)
        if met.met:
            assert met.kept.top1 >= least - 1e-9
        else:
            assert high.top1 < least


def test_trials_find_a_cheaper_configuration() -> None:
    made = Space(3)
    low, high = made.ends()
    least = 0.3 * low.top1 + 0.7 * high.top1
    met = made.keep(least)
    tried: list[Scored] = []

    def tried_with(top1: float, trials: int) -> tuple[Met, bool]:
        def trial(choice: Sequence[int]) -> Scored:
            tried.append(made.score(choice)._replace(top1=top1))
            return tried[-1]

        tried.clear()
        return keep_by_trials(made.space, Budget(), met, made.propose, made.score, trial, least, trials)

    better, by_trial = tried_with(100.0, 3)
    assert by_trial
    assert 1 <= len(tried) <= 3
    assert better.kept == min(tried, key=lambda one: one.cost)
    assert better.kept.cost <= met.kept.cost
    assert tried_with(0.0, 3) == (met, False)
    assert len(tried) <= 3
    assert tried_with(100.0, 0) == (met, False)
    assert not tried


def test_trial_meets_what_calibration_misses() -> None:
    made = Space(4)
    least = made.ends()[1].top1 - 1e-6
    asked = Budget(bops=made.space.floor.bops)
    met = made.keep(least, asked)
    assert not met.met

    def good(choice: Sequence[int]) -> Scored:
        return made.score(choice)._replace(top1=100.0)

    kept, by_trial = keep_by_trials(made.space, asked, met, made.propose, made.score, good, least, 3)
    assert (kept.met, by_trial, kept.kept.choice) == (True, True, met.kept.choice)

    def bad(choice: Sequence[int]) -> Scored:
        return made.score(choice)._replace(top1=0.0)

    kept, by_trial = keep_by_trials(made.space, asked, met, made.propose, made.score, bad, least, 3)
    assert (kept.met, by_trial, kept.kept.top1) == (False, True, 0.0)


@pytest.mark.parametrize("seed", range(20))
def test_ladder_covers_the_range(seed: int) -> None:
    rng = random.Random(seed)
    space = random_space(rng)
    if space.floor == space.ceiling:
        return
    bops, size = (rng.randint(*ends) for ends in zip(space.floor, space.ceiling, strict=True))
    for asked, (has_bops, has_size) in zip(
        (Budget(), Budget(bops), Budget(size=size), Budget(bops, size)),
        ((True, False), (True, False), (False, True), (True, True)),
        strict=True,
    ):
        rising, own = ladder(space, asked)
        for name, index, wanted in (("bops", 0, has_bops), ("size", 1, has_size)):
            bounds = [getattr(budget, name) for budget in rising]
            if not wanted:
                assert set(bounds) == {None}
                continue
            assert bounds == sorted(bounds)
            assert (bounds[0], bounds[-1]) == (space.floor[index], space.ceiling[index])
            assert all(b <= a / BUDGET_USE * (1 + 1e-9) + 2 for a, b in pairwise(bounds))
        assert (own is None) == (not asked.bounds())
        assert own is None or rising[own] == asked


def test_prices_are_the_slope_of_the_front() -> None:
    """Accuracy that is linear in the logarithm of the cost has the same price everywhere."""
    made = Space(5)

    def score(choice: Sequence[int]) -> Scored:
        cost = made.space.cost(choice)
        return Scored(tuple(choice), cost, 10 + 7 * math.log(cost.bops / made.space.floor.bops), 1.0)

    least = (score([0] * len(made.space.decisions)).top1 + score(made.ends()[1].choice).top1) / 2
    met = keep_accuracy(made.space, Budget(), [0] * len(made.space.decisions), made.propose, score, least)
    for price in met.prices:
        assert price.per_percent == pytest.approx(0.07)
        assert price.per_point == pytest.approx(met.kept.cost.bops / 7, abs=1)


def test_bound_becomes_a_drop() -> None:
    assert AccuracyBound(max_drop=1.5).drop(70.0) == 1.5
    assert AccuracyBound(min_top1=69.0).drop(70.0) == 1.0
    assert str(AccuracyBound(min_top1=69.0)) == "a top-1 of at least 69.00 %"
    assert most_measured(1) == 1
    assert most_measured(180) == 14


def test_every_configuration_is_scored_once() -> None:
    made = Space(6)
    low, high = made.ends()
    made.calls = 0
    met = made.keep((low.top1 + high.top1) / 2)
    assert made.calls == met.measured <= len(list(product(*(d.options for d in made.space.decisions))))
