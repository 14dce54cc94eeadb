"""Cost models: their contract, and searches whose budget counts another cost than bit-operations."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from saqcli.api.searching import priced
from saqcli.errors import ConfigError, InfeasibleBudget, PluginError
from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import Budget, CostModel, LayerCost
from saqcli.quant.costs import COSTS, CostEntry
from saqcli.quant.search_space import Candidates, search_space
from saqcli.searchers import best_choice
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options
from tests.support.spaces import random_space


def coarse(layer: LayerCost, bits: LayerBits) -> int:
    """Hardware of 2, 4, 8 and 32 bits, which runs 3 bits as 4."""

    def run(width: int | None) -> int:
        return next(there for there in (2, 4, 8, 32) if (width or 32) <= there)

    return layer.macs * run(bits.weight) * run(bits.activation)


@pytest.fixture
def coarse_costs() -> Iterator[None]:
    COSTS["coarse"] = CostEntry(coarse, "cycles")
    yield
    del COSTS["coarse"]


@pytest.mark.parametrize("name", COSTS)
def test_more_bits_never_cost_less(name: str) -> None:
    widths = [2, 3, 4, 5, 6, 7, 8, None]
    for seed in range(20):
        for layer in random_space(random.Random(seed)).costs.layers:
            for other in widths:
                rows = [
                    [COSTS[name].cost(layer, LayerBits(weight=width, activation=other)) for width in widths],
                    [COSTS[name].cost(layer, LayerBits(weight=other, activation=width)) for width in widths],
                ]
                for row in rows:
                    assert all(type(value) is int and value >= 0 for value in row)
                    assert all(less <= more for less, more in pairwise(row))


def test_search_counts_the_given_cost() -> None:
    layers = tuple(LayerCost(name, "Linear", 1000, 1000, name, None) for name in "ab")
    costs = replace(CostModel(layers), price=coarse, unit="cycles")
    space = search_space("m", costs, Candidates((2, 3, 4)))
    budget = Budget(bops=20_000, unit=costs.unit)

    chosen = space.config(best_choice(space, budget, [[2.0, 1.0, 0.0], [2.0, 1.5, 1.4]]))

    assert [bits.weight for bits in chosen.layers.values()] == [4, 2]  # since 3 bits cost as much as 4
    assert costs.cost(chosen).bops == 20_000
    assert costs.bops(chosen) == 1000 * (16 + 4) == CostModel(layers).cost(chosen).bops
    assert (space.floor.bops, space.ceiling.bops) == (8_000, 32_000)
    with pytest.raises(InfeasibleBudget, match="reachable: 8 K to 32 Kcycles"):
        space.check_reachable(Budget(bops=10, unit=costs.unit))
    assert str(budget) == "20 Kcycles"
    assert budget.bit_operations is None


def crashing(layer: LayerCost, bits: LayerBits) -> int:
    """No cost at all."""
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("price", "says"),
    [
        (crashing, r"ValueError: boom"),
        (
            lambda layer, bits: 0.5 * layer.bops(bits),
            r"layer a at w2a2 costs 2000\.0, which is no whole number",
        ),
        (lambda layer, bits: layer.macs * -1, r"costs -1000, which is no whole number from 0 on"),
        (lambda layer, bits: 99 - (bits.weight or 32), r"layer a costs 97 at w2a2 and less, 96, at w3a2"),
        (lambda layer, bits: 99 - (bits.activation or 32), r"layer a costs 97 at w2a2 and less, 96, at w2a3"),
    ],
)
def test_wrong_costs_are_refused(price: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "mine", CostEntry(price, "cycles"))
    costs = CostModel((LayerCost("a", "Linear", 1000, 1000, "a", None),))
    with pytest.raises(PluginError, match=rf"cost model mine failed \(.*{says}"):
        priced(costs, "mine")


def test_unit_of_bit_operations_is_reserved() -> None:
    with pytest.raises(ConfigError, match="only bit-operations have"):
        COSTS["coarse"] = CostEntry(coarse, "BOPs")


def test_saq_search_counts_another_cost(coarse_costs: None, digits: Path, tmp_path: Path) -> None:
    network = (MODEL, *float_options(digits, digits / "few"), "--batch-size", 32, "--workers", 0)
    options = ("--cost", "coarse", "--candidates", "2,3,4,8", "--run-dir", tmp_path)

    found = answer("search", *network, "--budget", "w4a4", *options)
    shown = saq("search", "--run-dir", tmp_path, "--resume")

    assert found["budget_bops"] is None
    assert found["cost_unit"] == "cycles"
    assert 0.985 * found["budget_cost"] <= found["cost"] <= found["budget_cost"]
    assert found["bops"] == sum(layer["bops"] for layer in found["layers"]) <= found["cost"]
    assert "cycles (" in shown.stdout
    assert json.loads((tmp_path / "config.json").read_text())["quantization"]["cost"] == "coarse"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--cost", "magic"), "--cost magic: there is no cost model 'magic': choose from bops"),
        (
            ("--cost", "coarse", "--pareto", 2),
            "--pareto 2 counts bit-operations: remove it, or --cost coarse",
        ),
    ],
)
def test_impossible_costs_are_refused(
    options: tuple[object, ...], says: str, coarse_costs: None, tmp_path: Path
) -> None:
    network = (
        MODEL,
        "--no-pretrained",
        "--data",
        tmp_path,
        "--budget",
        "w4a4",
        "--run-dir",
        tmp_path / "run",
    )
    assert says in last_error(saq("search", *network, *options))
