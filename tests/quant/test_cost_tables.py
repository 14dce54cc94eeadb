"""Tables of costs: reading them, what they cost at bits that they do not have, and searches in their unit."""

import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from saqcli.api.budgets import bound_of, priced
from saqcli.errors import ConfigError
from saqcli.pipelines.demo import SIDE
from saqcli.quant.bits import MAX_BITS, MIN_BITS, LayerBits
from saqcli.quant.cost import Budget, CostModel, LayerCost
from saqcli.quant.search_space import Candidates, search_space
from saqcli.searchers.knapsack import best_choice
from saqcli.units import format_quantity, parse_cost
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

LAYERS = tuple(LayerCost(name, "Linear", 1000, 1000, name, None) for name in "ab")
TABLE: dict[str, Any] = {
    "schema_version": 1,
    "unit": "ms",
    "layers": {
        "a": {"w4a8": 0.2, "w8a8": 0.5, "w4a4": 0.1, "float": 0.4},
        "b": {"w8a8": 0.25, "w4a8": 0.3},
    },
    "other": 0.05,
}


def table(folder: Path, **changes: Any) -> str:
    path = folder / "costs.json"
    path.write_text(json.dumps(TABLE | changes))
    return str(path)


@pytest.fixture
def costs(tmp_path: Path) -> CostModel:
    return priced(CostModel(LAYERS), table(tmp_path))


def test_other_bits_cost_what_holds_them(costs: CostModel) -> None:
    def cost(layer: LayerCost, weight: int | None, activation: int | None) -> str:
        return format_quantity(
            costs.price(layer, LayerBits(weight=weight, activation=activation)), costs.unit
        )

    a, b = LAYERS
    assert [cost(a, *bits) for bits in ((4, 4), (2, 3), (4, 5), (3, 8), (5, 2))] == [
        *("100 us", "100 us", "200 us", "200 us", "500 us")
    ]
    assert cost(b, 4, 8) == cost(b, 2, 2) == "250 us"  # not the 300 of its entry
    assert (cost(a, None, None), cost(b, None, None)) == ("400 us", "0 ms")
    assert costs.notes == (
        f"{costs.price.source}: 1 layer (b) cost more at some bits than at more bits, and count as the latter",  # type: ignore[attr-defined]
    )


def test_costs_never_fall_with_more_bits(costs: CostModel) -> None:
    widths = range(MIN_BITS, MAX_BITS + 1)
    for layer, other in product(LAYERS, widths):
        for one, more in pairwise(widths):
            assert costs.price(layer, LayerBits(weight=one, activation=other)) <= costs.price(
                layer, LayerBits(weight=more, activation=other)
            )
            assert costs.price(layer, LayerBits(weight=other, activation=one)) <= costs.price(
                layer, LayerBits(weight=other, activation=more)
            )


def test_search_meets_a_budget_of_time(costs: CostModel) -> None:
    space = search_space("m", costs, Candidates((4, 8)))
    budget = Budget(bops=bound_of("0.4ms", "bops", "m", costs), unit=costs.unit)

    chosen = space.config(best_choice(space, budget, [[1.0, 0.0], [1.0, 0.0]]))

    assert [bits.weight for bits in chosen.layers.values()] == [4, 8]
    assert costs.cost(chosen).bops == parse_cost("400us", "ps") == 4 * 10**8  # with 0.05 ms of the rest
    assert str(budget) == "400 us"
    assert costs.bops(chosen) == 1000 * (16 + 64)
    assert "reachable 400 us to 800 us" in space.outlook(budget)[0]
    assert bound_of("w8a8", "bops", "m", costs) == 8 * 10**8


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": 2}, "its schema_version is 2, saq .* reads 1"),
        ({"more": 1}, "more"),
        ({"unit": "BOPs"}, "'BOPs' is not one such as ms, mJ or cycles"),
        ({"unit": "cycles"}, "costs in cycles are whole numbers"),
        ({"layers": {"a": {"4": 1}}}, "layer a has '4' in the place of widths"),
        ({"layers": {"a": {"w4a4": -1}}}, "greater than or equal to 0"),
        ({"layers": {"a": {"w4a4": True}}}, "valid number"),
        ({"layers": {"a": {"w4a8": 1}}}, r"no costs of 1 layer of this network \(b\): add them"),
        ({"layers": {"a": {"w4a8": 1}, "b": {"float": 1}}}, r"no costs of 1 layer of this network \(b\)"),
    ],
)
def test_damaged_tables_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        priced(CostModel(LAYERS), table(tmp_path, **changes))


def test_missing_widths_are_named(tmp_path: Path) -> None:
    few = {"a": {"w4a4": 1.0}, "b": {"w8a8": 1.0}}
    costs = priced(CostModel(LAYERS), table(tmp_path, layers=few))
    search_space("m", costs, Candidates((2, 4)))
    with pytest.raises(ConfigError, match="no cost of layer a at w8a8 or wider, it has w4a4: add it, or use"):
        search_space("m", costs, Candidates((4, 8)))


@pytest.mark.parametrize("text", ["34G", "5", "0ms", "2mJ", "-1ms"])
def test_other_units_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"not a budget in the unit of `quantization\.cost`: give one"):
        parse_cost(text, "ps")


def test_saq_search_takes_a_table(digits: Path, tmp_path: Path) -> None:
    network = (MODEL, *float_options(digits, digits / "few"), "--batch-size", 32, "--workers", 0)
    profile = answer("profile", MODEL, "--num-classes", 10, "--in-chans", 1, "--input-size", SIDE)
    layers = {row["name"]: {"w8a8": 2.0, "w4a8": 1.5, "w4a4": 1.0} for row in profile["layers"]}
    path, count = table(tmp_path, layers=layers, other=0.5, unit="uJ"), len(layers)
    options = ("--cost", path, "--candidates", "4,8", "--run-dir", tmp_path / "run")
    budget = f"{0.5 + 1.5 * count:g}uJ"

    found = answer("search", *network, "--budget", budget, *options)
    shown = saq("search", "--run-dir", tmp_path / "run", "--resume")
    costs = {(8, 8): 2.0, (8, 4): 2.0, (4, 8): 1.5, (4, 4): 1.0}  # w8a4 runs as w8a8
    spent = sum(costs[bits["weight"], bits["activation"]] for bits in found["policy"].values())

    assert (found["cost_unit"], found["budget_bops"]) == ("pJ", None)
    assert found["cost"] == 10**6 * (0.5 + spent) <= found["budget_cost"]
    assert "uJ (" in shown.stdout
    assert "is not a budget in the unit of --cost" in last_error(
        saq("search", *network, "--budget", "34G", "--cost", path, "--run-dir", tmp_path / "other")
    )
    assert "--cost none.json" in last_error(
        saq("search", *network, "--budget", "3uJ", "--cost", "none.json", "--run-dir", tmp_path / "other")
    )
