"""Random search spaces, and the cost of every configuration in them by brute force."""

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from saqcli.errors import ConfigError
from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import BUDGET_USE, Budget, CostModel, LayerCost
from saqcli.quant.search_space import Candidates, SearchSpace, parse_rule, search_space
from saqcli.quant.tracer import LayerTrace

W8A8 = LayerBits(weight=8, activation=8)


def random_space(rng: random.Random, fewest: int = 1, most: int = 6) -> SearchSpace:
    """Layers with groups, default pins, shared weights and rules; candidates tied or not."""
    while True:
        try:
            return _random_space(rng, rng.randint(fewest, most))
        except ConfigError:  # rules that leave a layer no bits
            continue


def _random_space(rng: random.Random, count: int) -> SearchSpace:
    layers: list[LayerCost] = []
    scale = 10 ** rng.randint(1, 12)
    for index in range(count):
        earlier = [other.group for other in layers] if rng.random() < 0.5 else []
        name = f"part{index % 2}.{index}"
        layers.append(
            LayerCost(
                name,
                "Linear",
                rng.randint(0 if rng.random() < 0.1 else 1, scale),
                rng.randint(1, 1000),
                rng.choice([*earlier, name]),
                W8A8 if rng.random() < 0.15 else None,
                channels=rng.randint(1, 9),
                stored=rng.random() < 0.9,
            )
        )
    extra = (LayerTrace("extra", "CondConv", 1, macs=rng.randint(1, scale // 50 + 1)),)
    costs = CostModel(tuple(layers), extra if rng.random() < 0.3 else (), rng.randint(0, 1000))
    weights = tuple(sorted(rng.sample(range(2, 9), rng.randint(1, 4))))
    apart = tuple(sorted(rng.sample(range(2, 9), rng.randint(1, 2)))) if rng.random() < 0.4 else None
    rules = {}
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        least, most = sorted(rng.choices(range(2, 9), k=2))
        pattern = rng.choice(["part0.*", "part1.*", "*", rng.choice(layers).name])
        rules[pattern] = parse_rule(rng.choice([f"{least}", f"{least}-{most}", f"w{least}a{most}"]))
    return search_space("random", costs, Candidates(weights, apart), rules)


def spaces() -> st.SearchStrategy[SearchSpace]:
    """Random spaces, by seed."""
    return st.integers(0, 10**9).map(lambda seed: random_space(random.Random(seed)))


def budget_within(space: SearchSpace, rng: random.Random, kind: str | None = None) -> Budget:
    """A reachable budget of BOPs, of bytes, or of both."""
    kind = kind or rng.choice(["bops", "size", "both"])
    bops, size = (rng.randint(*ends) for ends in zip(space.floor, space.ceiling, strict=True))
    return Budget(bops if kind != "size" else None, size if kind != "bops" else None)


def every_cost(space: SearchSpace) -> np.ndarray:
    """BOPs and bytes of every configuration, (configurations, 2), in the order of ``itertools.product``."""
    found = np.array([space.fixed_cost], dtype=np.int64)
    for decision in space.decisions:
        found = (found[:, None] + np.array(decision.costs, dtype=np.int64)[None]).reshape(-1, 2)
    return found


def every_loss(losses: Sequence[Sequence[float]]) -> np.ndarray:
    """The total loss of every configuration, in the same order."""
    found = np.zeros(1)
    for row in losses:
        found = (found[:, None] + np.array(row)[None]).reshape(-1)
    return found


def admitted(costs: np.ndarray, budget: Budget) -> np.ndarray:
    """Which configurations meet a budget."""
    found = np.ones(len(costs), dtype=bool)
    for index, bound in budget.bounds():
        found &= costs[:, index] <= bound
    return found


def used(costs: np.ndarray, budget: Budget) -> np.ndarray:
    """Which of them use at least 98.5 % of a bound."""
    assert BUDGET_USE == 0.985
    found = np.zeros(len(costs), dtype=bool)
    for index, bound in budget.bounds():
        found |= 1000 * costs[:, index] >= 985 * bound
    return found
