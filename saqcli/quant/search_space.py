"""The search space: bit options and costs of every group of layers.

A *decision* sets the bits of one group. Its options are the candidates, restricted by rules of the user:

    layer4.*=8                these bits only
    conv1=w8a4                different bits for weights and inputs
    *.conv1=3-5               a range: the candidates within it

First layer and classifier have 8 bits unless a rule names them. The members of a group have the options allowed by the
rules of all members.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from saqcli.errors import ConfigError, InfeasibleBudget
from saqcli.quant.bits import MAX_BITS, MIN_BITS, BitConfig, LayerBits
from saqcli.quant.cost import UNITS, Budget, Cost, CostModel, LayerCost
from saqcli.units import counted, format_quantity, format_range

_RULE = re.compile(r"(\d)(?:-(\d))?|w(\d)(?:-(\d))?a(\d)(?:-(\d))?", re.IGNORECASE)


class Candidates(NamedTuple):
    """Bit-widths of free layers.

    Attributes:
        weights: bit-widths of weights, ascending.
        activations: bit-widths of inputs, ascending; None ties them to the weights, one width for both.
    """

    weights: tuple[int, ...]
    activations: tuple[int, ...] | None = None

    def options(self) -> list[LayerBits]:
        """All combinations of weight and activation bits."""
        if self.activations is None:
            return [LayerBits(weight=bits, activation=bits) for bits in self.weights]
        return [LayerBits(weight=w, activation=a) for w in self.weights for a in self.activations]


class Rule(NamedTuple):
    """A range of bit-widths for the layers of a pattern.

    Attributes:
        text: the bits as given by the user.
        weights: (fewest, most) bits.
        activations: (fewest, most) bits.
    """

    text: str
    weights: tuple[int, int]
    activations: tuple[int, int]

    def admits(self, bits: LayerBits) -> bool:
        """Whether the rule allows ``bits``."""
        pairs = ((bits.weight, self.weights), (bits.activation, self.activations))
        return all(width is not None and least <= width <= most for width, (least, most) in pairs)

    @property
    def pin(self) -> LayerBits | None:
        """The bits of a rule without range, else None; they need not be among the candidates."""
        if self.weights[0] != self.weights[1] or self.activations[0] != self.activations[1]:
            return None
        return LayerBits(weight=self.weights[0], activation=self.activations[0])


def parse_rule(text: str, pattern: str = "...") -> Rule:
    """Parse ``4``, ``3-6``, ``w4a8`` or ``w2-4a8``; messages name ``pattern``.

    Raises:
        ConfigError: not of that form, or a width outside 2..8.
    """
    match = _RULE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(
            f"`quantization.pins={pattern}={text}` is not a bit-width: give 4, a range such as 3-6, or w4a8"
        )
    first, last, *apart = match.groups()
    if first is None:
        w_first, w_last, a_first, a_last = apart
    else:
        w_first, w_last, a_first, a_last = first, last, first, last
    weights, activations = (
        (int(one), int(other or one)) for one, other in ((w_first, w_last), (a_first, a_last))
    )
    for least, most in (weights, activations):
        if not MIN_BITS <= least <= most <= MAX_BITS:
            raise ConfigError(
                f"`quantization.pins={pattern}={text}`: bits go from {MIN_BITS} to {MAX_BITS}, the fewer first"
            )
    return Rule(text, weights, activations)


def parse_rules(pins: Mapping[str, str]) -> dict[str, Rule]:
    """The rules of ``pins``, by pattern of layer names.

    Raises:
        ConfigError: as ``parse_rule``.
    """
    return {pattern: parse_rule(str(text), pattern) for pattern, text in pins.items()}


@dataclass(frozen=True)
class Decision:
    """One choice: the bits of a group of layers.

    Attributes:
        members: layers in execution order.
        options: bits, from the cheapest to the most expensive.
        costs: total cost of all members, by option.
    """

    members: tuple[LayerCost, ...]
    options: tuple[LayerBits, ...]
    costs: tuple[Cost, ...]

    @property
    def name(self) -> str:
        """Name of its first layer."""
        return self.members[0].name


@dataclass(frozen=True)
class SearchSpace:
    """Every configuration that a search may return. A *choice* is one option index per decision.

    Attributes:
        model: canonical name of the network.
        costs: cost model of its layers.
        decisions: those with two options or more, in execution order.
        fixed: bits of all other layers.
    """

    model: str
    costs: CostModel
    decisions: tuple[Decision, ...]
    fixed: Mapping[str, LayerBits]

    def config(self, choice: Sequence[int]) -> BitConfig:
        """The bits of every layer under ``choice``."""
        chosen = dict(self.fixed)
        for decision, index in zip(self.decisions, choice, strict=True):
            chosen |= {layer.name: decision.options[index] for layer in decision.members}
        return BitConfig(
            model=self.model, layers={layer.name: chosen[layer.name] for layer in self.costs.layers}
        )

    def choice(self, config: BitConfig) -> list[int]:
        """The choice that gives ``config``.

        Raises:
            ValueError: no choice gives it.
        """
        return [decision.options.index(config.layers[decision.name]) for decision in self.decisions]

    def cost(self, choice: Sequence[int]) -> Cost:
        """Cost of a choice, including the fixed part."""
        chosen = [decision.costs[index] for decision, index in zip(self.decisions, choice, strict=True)]
        fixed = self.fixed_cost
        return Cost(fixed.bops + sum(c.bops for c in chosen), fixed.size + sum(c.size for c in chosen))

    @cached_property
    def fixed_cost(self) -> Cost:
        """Cost of the part that no decision changes."""
        floor, cheapest = self.floor, [decision.costs[0] for decision in self.decisions]
        return Cost(floor.bops - sum(c.bops for c in cheapest), floor.size - sum(c.size for c in cheapest))

    @cached_property
    def floor(self) -> Cost:
        """Cost of the cheapest configuration."""
        return self.costs.cost(self.config([0] * len(self.decisions)))

    @cached_property
    def ceiling(self) -> Cost:
        """Cost of the most expensive configuration."""
        return self.costs.cost(self.config([len(decision.options) - 1 for decision in self.decisions]))

    def cheaper(self, choice: Sequence[int], budget: Budget) -> list[list[int]]:
        """Every choice that differs in one decision, costs less of an exceeded bound, and no more of any bound.

        Empty if the choice is within the budget, or if nothing is cheaper.
        """
        cost = self.cost(choice)
        exceeded = [index for index, bound in budget.bounds() if cost[index] > bound]
        found = []
        for number, decision in enumerate(self.decisions):
            now = decision.costs[choice[number]]
            for option, then in enumerate(decision.costs):
                no_more = all(then[index] <= now[index] for index, _ in budget.bounds())
                if no_more and any(then[index] < now[index] for index in exceeded):
                    found.append([*choice[:number], option, *choice[number + 1 :]])
        return found

    def nearest(self, bits: LayerBits) -> list[int]:
        """The choice whose options are nearest to ``bits``."""

        def distance(option: LayerBits) -> int:
            pairs = ((option.weight, bits.weight), (option.activation, bits.activation))
            return sum(abs((one or 0) - (other or 0)) for one, other in pairs)

        return [
            min(range(len(decision.options)), key=lambda i, d=decision: distance(d.options[i]))  # type: ignore[misc]
            for decision in self.decisions
        ]

    def outlook(self, budget: Budget) -> list[str]:
        """Notes for a person: what can be reached, and whether the budget, if any, leaves anything to search."""
        floor, ceiling = self.floor, self.ceiling
        notes = [
            f"{self.model}: {counted(len(self.decisions), 'decision')}, reachable "
            f"{format_range(floor.bops, ceiling.bops, self.costs.unit)} and "
            f"{format_range(floor.size, ceiling.size, UNITS[1])}"
            + (f"; the budget is {budget}" if budget.bounds() else "")
        ]
        notes += self.costs.notes
        if budget.bounds() and budget.admits(ceiling):
            notes.append("the budget allows the most bits in every layer: there is nothing to search")
        return notes

    def check_reachable(self, budget: Budget) -> None:
        """Refuse a budget that no configuration meets.

        Raises:
            InfeasibleBudget: names the reachable range.
        """
        floor, ceiling = self.floor, self.ceiling
        if budget.admits(floor):
            return
        for index, bound in budget.bounds():
            unit = (self.costs.unit, UNITS[1])[index]
            if floor[index] > bound:
                fewest = min((o.weight or 8 for d in self.decisions for o in d.options), default=MIN_BITS)
                raise InfeasibleBudget(
                    f"no configuration of {self.model} meets {format_quantity(bound, unit)}: with every free layer "
                    f"at its fewest bits it needs {format_quantity(floor[index], unit)} (reachable: "
                    f"{format_range(floor[index], ceiling[index], unit)}). Raise the budget"
                    + (" or allow fewer bits with `quantization.candidates`" if fewest > MIN_BITS else "")
                )


def search_space(
    model: str, costs: CostModel, candidates: Candidates, rules: Mapping[str, Rule] | None = None
) -> SearchSpace:
    """The configurations that candidates and rules allow.

    Args:
        model: canonical name of the network.
        costs: cost model of its layers.
        candidates: bit-widths of free layers.
        rules: by pattern of layer names; if several match a layer, the last one applies.

    Raises:
        ConfigError: a pattern matches no layer, or a layer has no options left.
    """
    by_layer = _match(costs, rules or {})
    groups: dict[str, list[LayerCost]] = {}
    fixed: dict[str, LayerBits] = {}
    for layer in costs.layers:
        if layer.pinned is not None and layer.name not in by_layer:
            fixed[layer.name] = layer.pinned
        else:
            groups.setdefault(layer.group, []).append(layer)
    decisions = []
    for members in groups.values():
        options = _options(members, by_layer, candidates)
        if len(options) == 1:
            fixed |= {layer.name: options[0] for layer in members}
            continue
        paid = [_sum(costs.layer_cost(layer, bits) for layer in members) for bits in options]
        order = sorted(range(len(options)), key=lambda i, paid=paid: paid[i])  # type: ignore[misc]
        decisions.append(
            Decision(tuple(members), tuple(options[i] for i in order), tuple(paid[i] for i in order))
        )
    return SearchSpace(model, costs, tuple(decisions), fixed)


def _match(costs: CostModel, rules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rule of every layer that has one."""
    found: dict[str, Rule] = {}
    names = [layer.name for layer in costs.layers]
    for pattern, rule in rules.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise ConfigError(
                f"`quantization.pins={pattern}={rule.text}` matches no layer: names are such as "
                f"{', '.join(names[:4])}; `saq profile MODEL` lists them"
            )
        found |= dict.fromkeys(matching, rule)
    return found


def _options(
    members: Sequence[LayerCost], rules: Mapping[str, Rule], candidates: Candidates
) -> list[LayerBits]:
    given = [rules[layer.name] for layer in members if layer.name in rules]
    pins = {rule.pin for rule in given} - {None}
    options = [pin for pin in pins if pin is not None] or candidates.options()
    left = [bits for bits in options if all(rule.admits(bits) for rule in given)]
    if not left:
        names = ", ".join(layer.name for layer in members)
        raise ConfigError(
            f"`quantization.pins` leaves {names} no bits ({', '.join(rule.text for rule in given)}"
            + (", layers that share their bits" if len(members) > 1 else "")
            + f"): the candidates are {', '.join(map(str, candidates.options()))}"
        )
    return left


def _sum(costs: Iterable[Cost]) -> Cost:
    bops, sizes = zip(*costs, strict=True)
    return Cost(sum(bops), sum(sizes))
