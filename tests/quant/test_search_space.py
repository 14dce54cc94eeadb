"""The search space: rules, groups, pins and the cost of every choice, compared with brute force."""

import random
import re
from collections.abc import Mapping
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tests.support.strategies  # noqa: F401  (the profile)
from saqcli.errors import ConfigError, InfeasibleBudget
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.cost import Budget, Cost, CostModel, LayerCost
from saqcli.quant.search_space import Candidates, SearchSpace, parse_rule, search_space
from saqcli.units import format_quantity
from tests.support.spaces import every_cost, spaces
from tests.support.sweeps import examples

W8A8 = LayerBits(weight=8, activation=8)


def bits(weight: int, activation: int | None = None) -> LayerBits:
    return LayerBits(weight=weight, activation=activation or weight)


def layer(name: str, macs: int = 100, group: str = "", pinned: LayerBits | None = None) -> LayerCost:
    return LayerCost(name, "Conv2d", macs, 10 * macs + 1, group or name, pinned, channels=3)


# First layer and classifier pinned, two blocks whose second convolution shares bits with a shortcut.
BLOCKS = CostModel(
    (
        layer("conv1", 900, pinned=W8A8),
        layer("layer1.conv1", 500),
        layer("layer1.conv2", 700),
        layer("layer1.short", 60, "layer1.conv2"),
        layer("layer2.conv1", 40),
        layer("layer2.conv2", 30),
        layer("layer2.short", 20, "layer2.conv2"),
        layer("fc", 10, pinned=W8A8),
    ),
    other_bytes=1234,
)
FREE = ("layer1.conv1", "layer1.conv2", "layer2.conv1", "layer2.conv2")  # first layers of the decisions


def space_of(rules: Mapping[str, str] | None = None, *, apart: bool = False) -> SearchSpace:
    candidates = Candidates((2, 4, 6), (3, 8) if apart else None)
    return search_space("net", BLOCKS, candidates, {p: parse_rule(text) for p, text in (rules or {}).items()})


def options(space: SearchSpace) -> dict[str, set[LayerBits]]:
    """The options of every layer."""
    found = {name: {fixed} for name, fixed in space.fixed.items()}
    for decision in space.decisions:
        found |= {member.name: set(decision.options) for member in decision.members}
    return found


# Rules


@pytest.mark.parametrize(
    ("text", "weights", "activations"),
    [
        ("4", (4, 4), (4, 4)),
        (" 4 ", (4, 4), (4, 4)),
        ("3-6", (3, 6), (3, 6)),
        ("2-8", (2, 8), (2, 8)),
        ("w4a8", (4, 4), (8, 8)),
        ("W4A8", (4, 4), (8, 8)),
        ("w2-4a8", (2, 4), (8, 8)),
        ("w3a4-5", (3, 3), (4, 5)),
        ("w2-3a4-5", (2, 3), (4, 5)),
    ],
)
def test_rule_gives_minimum_and_maximum_bits(
    text: str, weights: tuple[int, int], activations: tuple[int, int]
) -> None:
    rule = parse_rule(text)
    assert (rule.weights, rule.activations) == (weights, activations)


@given(st.text(st.sampled_from("0123456789wa-WA ."), max_size=8))
@settings(max_examples=examples(300))
def test_any_rule_parses_or_names_its_text(text: str) -> None:
    try:
        rule = parse_rule(text)
    except ConfigError:
        with pytest.raises(ConfigError, match=re.escape(f"`quantization.pins=...={text}`")):
            parse_rule(text)
    else:
        for least, most in (rule.weights, rule.activations):
            assert 2 <= least <= most <= 8


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a bit-width"),
        ("four", "is not a bit-width"),
        ("4-", "is not a bit-width"),
        ("w4", "is not a bit-width"),
        ("a4", "is not a bit-width"),
        ("w4a", "is not a bit-width"),
        ("4,5", "is not a bit-width"),
        ("12", "is not a bit-width"),
        ("1", "from 2 to 8"),
        ("9", "from 2 to 8"),
        ("6-3", "the fewer first"),
        ("w4a9", "from 2 to 8"),
        ("w5-3a4", "the fewer first"),
    ],
)
def test_invalid_rule_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_rule(text)


def test_default_rules_pin_first_and_last() -> None:
    space = space_of()
    assert space.fixed == {"conv1": W8A8, "fc": W8A8}
    assert [decision.name for decision in space.decisions] == list(FREE)
    assert all(decision.options == (bits(2), bits(4), bits(6)) for decision in space.decisions)


def test_untied_options_are_all_candidate_pairs() -> None:
    expected = {bits(w, a) for w, a in product((2, 4, 6), (3, 8))}
    assert all(set(decision.options) == expected for decision in space_of(apart=True).decisions)


def test_groups_share_one_decision() -> None:
    members = [[member.name for member in decision.members] for decision in space_of().decisions]
    assert members == [
        ["layer1.conv1"], ["layer1.conv2", "layer1.short"], ["layer2.conv1"], ["layer2.conv2", "layer2.short"]
    ]  # fmt: skip


def test_pin_fixes_only_matching_layers() -> None:
    found = options(space_of({"layer1.*": "4"}))
    every = {bits(2), bits(4), bits(6)}
    assert found == {
        **{name: {W8A8} for name in ("conv1", "fc")},
        **{name: {bits(4)} for name in ("layer1.conv1", "layer1.conv2", "layer1.short")},
        **dict.fromkeys(("layer2.conv1", "layer2.conv2", "layer2.short"), every),
    }


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("text", ["5", "w4a8", "w8a2", "7"])
def test_pinned_bits_need_not_be_candidates(text: str, apart: bool) -> None:
    pinned = parse_rule(text)
    assert options(space_of({"layer2.conv1": text}, apart=apart))["layer2.conv1"] == {pinned.pin}
    assert pinned.pin is not None


def test_range_keeps_candidates_within_it() -> None:
    assert options(space_of({"layer1.conv1": "3-6"}))["layer1.conv1"] == {bits(4), bits(6)}
    apart = options(space_of({"layer1.conv1": "w2-5a8"}, apart=True))["layer1.conv1"]
    assert apart == {bits(2, 8), bits(4, 8)}


def test_single_candidate_range_is_no_decision() -> None:
    space = space_of({"layer1.conv1": "3-5"})
    assert space.fixed["layer1.conv1"] == bits(4)
    assert "layer1.conv1" not in [decision.name for decision in space.decisions]


def test_last_matching_rule_wins() -> None:
    assert options(space_of({"layer1.*": "4", "*.conv1": "6"}))["layer1.conv1"] == {bits(6)}
    assert options(space_of({"*.conv1": "6", "layer1.*": "4"}))["layer1.conv1"] == {bits(4)}
    widened = options(space_of({"layer1.conv1": "4", "layer1.conv*": "2-4"}))
    assert widened["layer1.conv1"] == {bits(2), bits(4)}


@pytest.mark.parametrize("member", ["layer1.conv2", "layer1.short"])
@pytest.mark.parametrize(("text", "left"), [("4", {bits(4)}), ("4-8", {bits(4), bits(6)})])
def test_rule_on_one_member_applies_to_group(member: str, text: str, left: set[LayerBits]) -> None:
    found = options(space_of({member: text}))
    assert found["layer1.conv2"] == found["layer1.short"] == left


def test_rules_of_group_members_intersect() -> None:
    found = options(space_of({"layer1.conv2": "2-4", "layer1.short": "4-6"}))
    assert found["layer1.conv2"] == found["layer1.short"] == {bits(4)}


@pytest.mark.parametrize("one", ["4", "2-4"])
def test_contradicting_rules_name_the_layers(one: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        space_of({"layer1.conv2": one, "layer1.short": "6"})
    for part in ("layer1.conv2, layer1.short", one, "6", "layers that share their bits", "w2a2, w4a4, w6a6"):
        assert part in str(refusal.value)


def test_empty_range_lists_the_candidates() -> None:
    with pytest.raises(ConfigError, match=r"leaves layer1\.conv1 no bits") as refusal:
        space_of({"layer1.conv1": "7-8"})
    assert "w2a2, w4a4, w6a6" in str(refusal.value)
    assert "share" not in str(refusal.value)


def test_unmatched_pattern_suggests_layer_names() -> None:
    with pytest.raises(ConfigError, match=r"`quantization.pins=layer9\.\*=4` matches no layer") as refusal:
        space_of({"layer9.*": "4"})
    assert "conv1, layer1.conv1" in str(refusal.value)


def test_patterns_are_case_sensitive() -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        space_of({"Layer1.*": "4"})


@pytest.mark.parametrize("name", ["conv1", "fc"])
def test_rule_overrides_default_pin(name: str) -> None:
    found = options(space_of({name: "2-8"}))
    assert found[name] == {bits(2), bits(4), bits(6)}
    other = "fc" if name == "conv1" else "conv1"
    assert found[other] == {W8A8}
    assert options(space_of({name: "3"}))[name] == {bits(3)}


# Costs, on random networks


def choices(space: SearchSpace) -> list[tuple[int, ...]]:
    return list(product(*(range(len(decision.options)) for decision in space.decisions)))


@given(spaces(), st.randoms(use_true_random=False))
@settings(max_examples=examples(200))
def test_choice_cost_equals_configuration_cost(space: SearchSpace, rng: random.Random) -> None:
    for choice in rng.sample(found := choices(space), min(len(found), 20)):
        config = space.config(choice)
        bops = sum(entry.bops(config.layers[entry.name]) for entry in space.costs.layers)
        bops += 1024 * sum(entry.macs for entry in space.costs.unquantized)
        size = sum(entry.size(config.layers[entry.name]) for entry in space.costs.layers)
        assert space.cost(choice) == space.costs.cost(config) == Cost(bops, size + space.costs.other_bytes)
        assert space.choice(config) == list(choice)


@given(spaces())
@settings(max_examples=examples(200))
def test_floor_and_ceiling_bound_all_choices(
    space: SearchSpace,
) -> None:
    costs = [space.cost(choice) for choice in choices(space)]
    assert [tuple(row) for row in every_cost(space)] == costs
    assert space.floor == Cost(min(c.bops for c in costs), min(c.size for c in costs))
    assert space.ceiling == Cost(max(c.bops for c in costs), max(c.size for c in costs))


@given(spaces())
@settings(max_examples=examples(200))
def test_options_are_sorted_by_group_cost(space: SearchSpace) -> None:
    for decision in space.decisions:
        assert len(decision.options) > 1
        assert list(decision.costs) == sorted(decision.costs)
        for option, cost in zip(decision.options, decision.costs, strict=True):
            assert cost.bops == sum(member.bops(option) for member in decision.members)
            assert cost.size == sum(member.size(option) for member in decision.members)


@given(spaces())
@settings(max_examples=examples(100))
def test_every_layer_is_decided_once(space: SearchSpace) -> None:
    names = [member.name for decision in space.decisions for member in decision.members]
    assert sorted([*names, *space.fixed]) == sorted(entry.name for entry in space.costs.layers)
    ruled = options(space)
    for one, other in product(space.costs.layers, repeat=2):
        if one.group == other.group and one.name in names and other.name in names:
            assert ruled[one.name] == ruled[other.name]


@given(spaces(), st.integers(2, 8), st.integers(2, 8))
@settings(max_examples=examples(100))
def test_nearest_choice_minimizes_bit_distance(space: SearchSpace, weight: int, activation: int) -> None:
    asked = bits(weight, activation)
    for decision, index in zip(space.decisions, space.nearest(asked), strict=True):
        chosen = decision.options[index]
        assert asked not in decision.options or chosen == asked
        missed = [abs(o.weight - weight) + abs(o.activation - activation) for o in decision.options]  # type: ignore[operator]
        assert missed[index] == min(missed)


# Budgets


@given(spaces(), st.booleans(), st.booleans(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=examples(300))
def test_budget_is_refused_only_if_unreachable(
    space: SearchSpace, use_bops: bool, use_size: bool, bops_way: float, size_way: float
) -> None:
    def bound(floor: int, ceiling: int, way: float) -> int:
        return round(0.9 * floor + way * (1.1 * ceiling - 0.9 * floor))

    budget = Budget(
        bound(space.floor.bops, space.ceiling.bops, bops_way) if use_bops else None,
        bound(space.floor.size, space.ceiling.size, size_way) if use_size else None,
    )
    met = any(budget.admits(space.cost(choice)) for choice in choices(space))
    if met:
        space.check_reachable(budget)
    else:
        with pytest.raises(InfeasibleBudget):
            space.check_reachable(budget)


@pytest.mark.parametrize("index", [0, 1], ids=["bops", "bytes"])
def test_floor_is_the_smallest_reachable_budget(index: int) -> None:
    space = space_of()
    unit = ("BOPs", "B")[index]

    def budget(bound: int) -> Budget:
        return Budget(bops=bound) if index == 0 else Budget(size=bound)

    space.check_reachable(budget(space.floor[index]))
    with pytest.raises(InfeasibleBudget) as refusal:
        space.check_reachable(budget(space.floor[index] - 1))
    message = str(refusal.value)
    for part in (
        "no configuration of net meets",
        f"it needs {format_quantity(space.floor[index], unit)}",
        f"reachable: {format_quantity(space.floor[index])} to {format_quantity(space.ceiling[index], unit)}",
        "Raise the budget",
    ):
        assert part in message
    assert "candidates" not in message  # 2 bits are already allowed
    assert refusal.value.exit_code == 4


def test_unreachable_one_of_two_bounds_is_named() -> None:
    space = space_of()
    with pytest.raises(InfeasibleBudget, match="meets 1 KB:"):
        space.check_reachable(Budget(space.ceiling.bops, 1000))
    with pytest.raises(InfeasibleBudget, match="meets 1 KBOPs:"):
        space.check_reachable(Budget(1000, space.ceiling.size))


def test_fewer_candidates_are_suggested() -> None:
    space = search_space("net", BLOCKS, Candidates((3, 4)))
    with pytest.raises(InfeasibleBudget, match=r"allow fewer bits with `quantization\.candidates`"):
        space.check_reachable(Budget(space.floor.bops - 1))


def test_budget_is_used_from_98_5_percent() -> None:
    assert Budget(200_000).used_by(Cost(197_000, 0))
    assert not Budget(200_000).used_by(Cost(196_999, 10**9))
    assert Budget(200_000, 1000).used_by(Cost(0, 985))
    assert not Budget(200_000, 1000).used_by(Cost(196_999, 984))
    huge = 2 * 10**17 + 1000
    assert Budget(huge).used_by(Cost(985 * huge // 1000, 0))
    assert not Budget(huge).used_by(Cost(985 * huge // 1000 - 1, 0))


def test_budget_prints_its_bounds() -> None:
    assert str(Budget(34 * 10**9, 5 * 10**6)) == "34 GBOPs and 5 MB"
    assert str(Budget(size=5 * 10**6)) == "5 MB"


def test_uniform_bits_equal_the_uniform_choice() -> None:
    space = space_of()
    for index, width in enumerate((2, 4, 6)):
        config = BLOCKS.uniform("net", bits(width))
        assert isinstance(config, BitConfig)
        assert space.choice(config) == [index] * len(space.decisions) == space.nearest(bits(width))
        assert space.config([index] * len(space.decisions)) == config
