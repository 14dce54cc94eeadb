"""Searchers: the knapsack against brute force, and the contract of every searcher on random problems.

The contract runs over the table of searchers. Those that train get fewer problems and few epochs.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from saqcli.errors import InfeasibleBudget
from saqcli.quant import convert
from saqcli.quant.bits import LayerBits
from saqcli.quant.calibration import InputStatistics
from saqcli.quant.cost import Budget, CostModel, LayerCost
from saqcli.quant.search_space import Candidates, SearchSpace, search_space
from saqcli.searchers import SEARCHERS, SearchProblem, SearchResult
from saqcli.searchers.baselines import relative_noise
from saqcli.searchers.knapsack import Resource, best_choice, solve_knapsack
from saqcli.units import format_quantity
from tests.support.searching import fresh, problem_of, random_problem, search_images, tiny_problem
from tests.support.spaces import admitted, budget_within, every_cost, every_loss, spaces, used
from tests.support.sweeps import examples, sweep
from tests.support.tiny import TINY

HUGE = 10**15

# The knapsack.

Costs = list[list[int]]
Losses = list[list[float]]


def brute_force(costs: Costs, losses: Losses, limit: int, least: int = 0) -> float | None:
    """The least loss of all choices with a cost in [least, limit], by trying them all."""
    best = None
    for chosen in product(*(range(len(group)) for group in costs)):
        if least <= sum(group[i] for group, i in zip(costs, chosen, strict=True)) <= limit:
            loss = sum(group[i] for group, i in zip(losses, chosen, strict=True))
            best = loss if best is None else min(best, loss)
    return best


def total(rows: Sequence[Sequence[float]], chosen: list[int]) -> float:
    return sum(row[i] for row, i in zip(rows, chosen, strict=True))


@st.composite
def instances(draw: st.DrawFn) -> tuple[Costs, Losses, int]:
    """Groups of options with costs that are small, huge, or huge and one apart, and a feasible limit."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    base = draw(st.sampled_from([0, 1000, HUGE // 7, HUGE]))
    cost = st.one_of(st.integers(0, 40), st.integers(0, HUGE), st.integers(base, base + 3))
    costs = [draw(st.lists(cost, min_size=n, max_size=n)) for n in sizes]
    losses = [draw(st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n)) for n in sizes]
    floor, ceiling = (sum(pick(group) for group in costs) for pick in (min, max))
    some = sum(draw(st.sampled_from(group)) for group in costs)
    limit = draw(st.one_of(st.just(some), st.integers(floor, ceiling), st.just(some + 1)))
    return costs, losses, limit


def allowance(losses: Losses) -> float:
    """The tolerance of the solver: its gap of 1e-6, of the largest loss and of the sum, and the same per binary."""
    largest = max(abs(value) for group in losses for value in group)
    return 1e-6 * largest * (1 + len(losses) + sum(len(group) for group in losses))


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(instances())
def test_knapsack_choice_is_optimal(instance: tuple[Costs, Losses, int]) -> None:
    costs, losses, limit = instance
    chosen = solve_knapsack(losses, [Resource(costs, limit)])
    best = brute_force(costs, losses, limit)

    assert total(costs, chosen) <= limit
    assert best is not None
    assert total(losses, chosen) <= best + allowance(losses)


@settings(max_examples=examples(250), deadline=None, derandomize=True)
@given(instances(), st.integers(900, 1000))
def test_minimum_cost_is_met_where_possible(instance: tuple[Costs, Losses, int], per_mille: int) -> None:
    costs, losses, limit = instance
    least = limit * per_mille // 1000
    chosen = solve_knapsack(losses, [Resource(costs, limit, least)])
    best = brute_force(costs, losses, limit, least)

    assert total(costs, chosen) <= limit
    if best is None:
        assert total(losses, chosen) <= brute_force(costs, losses, limit) + allowance(losses)  # type: ignore[operator]
    else:
        assert total(costs, chosen) >= least
        assert total(losses, chosen) <= best + allowance(losses)


@given(instances())
@settings(max_examples=examples(50), deadline=None, derandomize=True)
def test_limit_below_every_choice_is_refused(instance: tuple[Costs, Losses, int]) -> None:
    costs, losses, _ = instance
    floor = sum(min(group) for group in costs)

    with pytest.raises(InfeasibleBudget, match=str(floor)):
        solve_knapsack(losses, [Resource(costs, floor - 1)])


def test_limit_holds_to_1_in_1e15() -> None:
    costs, losses = [[HUGE, HUGE + 1, 5]], [[0.5, 0.0, 0.9]]

    assert solve_knapsack(losses, [Resource(costs, HUGE)]) == [0]


def test_unaffordable_options_are_ignored() -> None:
    costs, losses = [[1, 2, HUGE]], [[1e-3, 0.0, 1e6]]

    assert solve_knapsack(losses, [Resource(costs, 2)]) == [1]


@st.composite
def two_resources(draw: st.DrawFn) -> tuple[Losses, list[Resource]]:
    """Groups of options with two independent costs, and limits around some choice."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    losses = [draw(st.lists(st.floats(-1, 1, width=32), min_size=n, max_size=n)) for n in sizes]
    some = [draw(st.integers(0, n - 1)) for n in sizes]
    resources = []
    for _ in range(2):
        cost = draw(st.sampled_from([st.integers(0, 40), st.integers(0, HUGE)]))
        costs = [draw(st.lists(cost, min_size=n, max_size=n)) for n in sizes]
        limit = total(costs, some) + draw(st.integers(0, 20)) * draw(st.sampled_from([1, HUGE // 100]))
        least = draw(st.sampled_from([0, limit * 985 // 1000, limit // 2]))
        resources.append(Resource(costs, limit, least))
    return losses, resources


def best_within(losses: Losses, resources: Sequence[Resource]) -> float | None:
    """The least loss within all bounds, by trying them all."""
    within = [
        total(losses, list(chosen))
        for chosen in product(*(range(len(group)) for group in losses))
        if all(
            resource.least <= total(resource.costs, list(chosen)) <= resource.limit for resource in resources
        )
    ]
    return min(within, default=None)


@settings(max_examples=examples(300), deadline=None, derandomize=True)
@given(two_resources())
def test_two_limits_hold_and_choice_is_optimal(
    instance: tuple[Losses, list[Resource]],
) -> None:
    losses, resources = instance
    chosen = solve_knapsack(losses, resources)
    best = best_within(losses, resources)

    assert all(total(resource.costs, chosen) <= resource.limit for resource in resources)
    if best is None:
        best = best_within(losses, [resource._replace(least=0) for resource in resources])
    else:
        assert all(resource.admits(chosen) for resource in resources)
    assert best is not None
    assert total(losses, chosen) <= best + allowance(losses)


def test_empty_problem_has_an_empty_choice() -> None:
    assert solve_knapsack([], [Resource([], 5)]) == []


# The best choice under a budget.


@settings(max_examples=examples(400), deadline=None, derandomize=True)
@given(spaces(), st.integers(0, 10**6), st.sampled_from(["bops", "size", "both"]), st.booleans())
def test_best_choice_uses_the_budget(space: SearchSpace, seed: int, kind: str, monotone: bool) -> None:
    rng = random.Random(seed)
    budget = budget_within(space, rng, kind)
    losses = [[rng.uniform(-1, 1) for _ in decision.options] for decision in space.decisions]
    if monotone:
        losses = [sorted(row, reverse=True) for row in losses]
    costs = every_cost(space)
    possible = admitted(costs, budget)
    wanted = possible & used(costs, budget)

    chosen = best_choice(space, budget, losses)
    cost = space.cost(chosen)

    assert budget.admits(cost)
    assert budget.used_by(cost) or not wanted.any()
    if budget.admits(space.ceiling):
        assert cost == space.ceiling
    else:
        best = every_loss(losses)[wanted if wanted.any() else possible].min()
        slack = allowance(losses) if losses else 0
        assert total(losses, chosen) <= best + slack


def test_exactly_98_5_percent_counts_as_used() -> None:
    """Of budget 16000: (4, 2) bits cost 15760, (2, 4) cost 9040 and err less, (4, 4) cost too much."""
    names = zip(("a", "b"), (900, 340), strict=True)
    costs = CostModel(tuple(LayerCost(name, "Linear", macs, 4, name, None) for name, macs in names))
    space = search_space("exact", costs, Candidates((2, 4)))

    assert space.cost(best_choice(space, Budget(16000), [[1, 1], [1, 0]])).bops == 15760
    assert space.cost(best_choice(space, Budget(16002), [[1, 1], [1, 0]])).bops == 9040


# The contract.

# Options that make a searcher fast enough to run many times.
FAST: dict[str, dict[str, Any]] = {
    "samq": {"epochs": 1, "warmup": 0, "draws": 4},
    "asga": {"epochs": 1},
    "random": {"draws": 6},
    "hawq": {"samples": 2},
    "fisher": {"images": 8},
    "swaps": {"images": 8, "swaps": 8, "patience": 4},
}


PARTS = 8


def cases(method: str, share: int = 1, part: int | None = None) -> range:
    """Seeds of the problems; ``share`` keeps a fraction of them, and ``part`` every eighth of these."""
    count = 24 if SEARCHERS[method].trains else 120
    return range(0, count, share) if part is None else range(share * part, count, PARTS * share)


@cache
def problem(seed: int) -> SearchProblem:
    return random_problem(seed)


def search(method: str, asked: SearchProblem, **changes: Any) -> SearchResult:
    """Search on a copy of the model."""
    return SEARCHERS[method].make(**FAST.get(method, {})).search(fresh(asked, **changes))


@cache
def solved(method: str, seed: int) -> SearchResult:
    return search(method, problem(seed))


@cache
def costs_of(seed: int) -> np.ndarray:
    return every_cost(problem(seed).space)


each_searcher = pytest.mark.parametrize("method", SEARCHERS)
each_part = pytest.mark.parametrize("part", sweep(range(PARTS), lambda part: part == 0))


def test_problems_cover_all_features() -> None:
    """Otherwise the tests below would be weaker than they seem."""
    spaces = [problem(seed).space for seed in range(120)]
    for trains in (24, 120):
        some = spaces[:trains]
        assert sum(any(len(d.members) > 1 for d in space.decisions) for space in some) >= 5
        assert sum(any(layer.pinned for layer in space.costs.layers) for space in some) >= 5
        apart = [any(o.weight != o.activation for d in space.decisions for o in d.options) for space in some]
        assert sum(apart) >= 5
        assert sum(len(space.decisions) > 1 for space in some) >= 12


@each_part
@each_searcher
def test_result_meets_the_budget(method: str, part: int) -> None:
    for seed in cases(method, part=part):
        asked = problem(seed)
        assert asked.budget.admits(asked.space.cost(solved(method, seed).choice)), seed


@each_part
@each_searcher
def test_98_5_percent_is_used_where_possible(method: str, part: int) -> None:
    if not SEARCHERS[method].fills_budget:
        pytest.skip("does not promise it")
    wherever = 0
    for seed in cases(method, part=part):
        asked, costs = problem(seed), costs_of(seed)
        if (admitted(costs, asked.budget) & used(costs, asked.budget)).any():
            wherever += 1
            assert asked.budget.used_by(asked.space.cost(solved(method, seed).choice)), seed
    assert wherever > len(cases(method, part=part)) // 4  # the cases are not trivial


@each_part
@each_searcher
def test_policy_lists_every_layer_in_order(method: str, part: int) -> None:
    for seed in cases(method, part=part):
        space = problem(seed).space
        config = space.config(solved(method, seed).choice)
        assert config.model == space.model
        assert list(config.layers) == [layer.name for layer in space.costs.layers]
        for name, bits in space.fixed.items():
            assert config.layers[name] == bits
        for decision in space.decisions:
            for member in decision.members:
                assert config.layers[member.name] in decision.options


@each_part
@each_searcher
def test_group_members_get_equal_bits(method: str, part: int) -> None:
    for seed in cases(method, part=part):
        space = problem(seed).space
        config = space.config(solved(method, seed).choice)
        for decision in space.decisions:
            assert len({config.layers[member.name] for member in decision.members}) == 1, seed


@each_part
@each_searcher
def test_same_seed_gives_the_same_result(method: str, part: int) -> None:
    for seed in cases(method, 4, part):
        torch.manual_seed(seed + 12345)
        again = search(method, problem(seed))
        first = solved(method, seed)
        assert again.choice == first.choice, seed
        assert sorted(again.scored) == sorted(first.scored), seed


@each_part
@each_searcher
def test_other_budgets_are_met(method: str, part: int) -> None:
    for seed in cases(method, 2, part):
        asked, costs = problem(seed), costs_of(seed)
        for kind in ("bops", "size", "both"):
            other = budget_within(asked.space, random.Random(seed + 1), kind)
            proposed = solved(method, seed).propose(other)
            assert proposed, (seed, kind)
            for choice in proposed:
                cost = asked.space.cost(choice)
                assert other.admits(cost), (seed, kind)
                if SEARCHERS[method].fills_budget and (admitted(costs, other) & used(costs, other)).any():
                    assert other.used_by(cost), (seed, kind)


@each_part
@each_searcher
def test_scores_match_reported_choices(method: str, part: int) -> None:
    for seed in cases(method, 6, part):
        found, space = solved(method, seed), problem(seed).space
        for one in list(found.scored)[:3]:
            assert one.cost == space.cost(one.choice)
            assert 0 <= one.top1 <= 100
            assert found.score is not None
            assert found.score(one.choice) == one


def bounded(asked: SearchProblem, bops: int, size: int) -> Budget:
    """A budget of the same kind."""
    return Budget(None if asked.budget.bops is None else bops, None if asked.budget.size is None else size)


@each_searcher
def test_budget_below_floor_names_the_range(method: str) -> None:
    for seed in cases(method, 4):
        asked = problem(seed)
        floor, ceiling = asked.space.floor, asked.space.ceiling
        below = bounded(asked, floor.bops - 1, floor.size - 1)
        index, unit = (0, "BOPs") if below.bops is not None else (1, "B")
        with pytest.raises(InfeasibleBudget) as refusal:
            search(method, asked, budget=below)
        for part in (
            f"it needs {format_quantity(floor[index], unit)}",
            f"reachable: {format_quantity(floor[index])} to {format_quantity(ceiling[index], unit)}",
            "Raise the budget",
        ):
            assert part in str(refusal.value)


@each_part
@each_searcher
def test_budget_at_floor_gives_floor(method: str, part: int) -> None:
    for seed in cases(method, 2, part):
        asked = problem(seed)
        budget = bounded(asked, *asked.space.floor)
        cost = asked.space.cost(search(method, asked, budget=budget).choice)
        for index, bound in budget.bounds():
            assert cost[index] == bound == asked.space.floor[index], seed


@each_part
@each_searcher
@pytest.mark.parametrize("factor", [1, 3])
def test_budget_at_ceiling_gives_ceiling(method: str, factor: int, part: int) -> None:
    for seed in cases(method, 2, part):
        asked = problem(seed)
        ceiling = asked.space.ceiling
        budget = bounded(asked, factor * ceiling.bops, factor * ceiling.size)
        assert asked.space.cost(search(method, asked, budget=budget).choice) == ceiling, seed


@each_searcher
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_exact_layers_get_maximum_bits(method: str, value: float) -> None:
    for seed in cases(method, 12):
        easy = fresh(problem(seed))
        for parameter in easy.model.parameters():
            nn.init.constant_(parameter, value)
        statistics = {name: InputStatistics() for name in easy.statistics}
        for entry in statistics.values():
            entry.update(torch.full((8,), value), torch.Generator())
        ceiling = easy.space.ceiling
        found = search(method, easy, statistics=statistics, budget=Budget(2 * ceiling.bops, 2 * ceiling.size))
        assert easy.space.cost(found.choice) == ceiling, seed


@pytest.mark.parametrize(
    ("network", "method"),
    sweep(
        product(TINY, SEARCHERS),
        lambda network, method: network in ("residual", "attention") or method == "error",
    ),
)
def test_traced_networks_meet_their_budget(network: str, method: str) -> None:
    asked = tiny_problem(network)  # 4 bits everywhere would use it all
    cost = asked.space.cost(search(method, asked).choice)

    assert asked.budget.admits(cost)
    if SEARCHERS[method].fills_budget:
        assert 1000 * cost.bops >= 985 * asked.budget.bops  # type: ignore[operator]


# One searcher each.


@each_part
def test_uniform_is_the_largest_fitting_width(part: int) -> None:
    for seed in cases("uniform", part=part):
        asked = problem(seed)
        space = asked.space
        widths = {width for d in space.decisions for o in d.options for width in (o.weight, o.activation)}
        choices = [space.nearest(LayerBits(weight=width, activation=width)) for width in sorted(widths)]  # type: ignore[type-var]
        fitting = [choice for choice in choices if asked.budget.admits(space.cost(choice))]
        expected = fitting[-1] if fitting else [0] * len(space.decisions)
        assert solved("uniform", seed).choice == expected, seed


@each_part
def test_error_search_minimizes_noise(part: int) -> None:
    for seed in cases("error", part=part):
        asked, costs = problem(seed), costs_of(seed)
        losses = relative_noise(asked)
        if not losses or asked.budget.admits(asked.space.ceiling):
            continue
        possible = admitted(costs, asked.budget)
        wanted = possible & used(costs, asked.budget)
        best = every_loss(losses)[wanted if wanted.any() else possible].min()
        assert total(losses, solved("error", seed).choice) <= best + allowance(losses), seed


def test_option_noise_adds_weights_and_inputs() -> None:
    """4 bits hold weight and inputs exactly, so noise occurs only with fewer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 5)).eval()
    levels = torch.arange(-7, 8).float()
    nn.init.zeros_(model[1].weight)
    model[1].weight.data.flatten()[:15] = levels
    convert.wrap(model)
    costs = CostModel(
        (LayerCost("1", "Linear", 16, 16, "1", None), LayerCost("3", "Linear", 20, 20, "3", None))
    )
    space = search_space("m", costs, Candidates((2, 4), (2, 8)))
    asked = problem_of(
        model, space, Budget(10**6), search_images((1, 2, 2)), convert.Scheme(granularity="tensor")
    )
    losses = dict(zip(space.decisions[0].options, relative_noise(asked)[0], strict=True))

    apart = losses[LayerBits(weight=2, activation=8)] - losses[LayerBits(weight=4, activation=8)]
    same = losses[LayerBits(weight=2, activation=2)] - losses[LayerBits(weight=4, activation=2)]
    assert apart == pytest.approx(same, rel=1e-6)
    assert apart > 0.01


@each_part
def test_random_picks_its_nearest_draw(part: int) -> None:
    for seed in cases("random", 3, part):
        found = solved("random", seed)
        best = min(found.scored, key=lambda one: (one.divergence, one.loss))
        assert tuple(found.choice) == best.choice
        assert 1 <= len(found.scored) <= FAST["random"]["draws"]
