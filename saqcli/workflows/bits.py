"""What a network is to be quantized to: given bits, a given policy, or a budget and what may be chosen under it."""

import re
from pathlib import Path

from saqcli.config import QuantizationSection
from saqcli.errors import ConfigError
from saqcli.quant.bits import BitConfig, LayerBits, parse_bits
from saqcli.quant.cost import Budget
from saqcli.quant.space import Candidates, Rule, SearchSpace, parse_rule, search_space
from saqcli.strict import named_path, parse_json, read_text
from saqcli.units import parse_quantity
from saqcli.workflows.setup import Network

UNIFORM_BUDGET = re.compile(r"w\d+a\d+", re.IGNORECASE)  # a budget given as what uniform bits cost


def check_bits(section: QuantizationSection) -> None:
    """Refuse what can be seen to be wrong before a network is loaded.

    Raises:
        ConfigError: bits, budgets or pins that are none.
    """
    if section.bits:
        parse_bits(section.bits)
    for option, text in (("--budget", section.bops), ("--size", section.size)):
        if text and UNIFORM_BUDGET.fullmatch(text.strip()):
            parse_bits(text, option)
        elif text:
            parse_quantity(text)
    _rules(section)


def space_of(section: QuantizationSection, network: Network) -> SearchSpace:
    """What may be chosen under a budget.

    Raises:
        ConfigError: pins that match no layer, or leave one no bits.
    """
    activations = section.activation_candidates
    candidates = Candidates(
        tuple(sorted(set(section.candidates))),
        None if activations is None else tuple(sorted(set(activations))),
    )
    return search_space(network.name, network.costs, candidates, _rules(section))


def _rules(section: QuantizationSection) -> dict[str, Rule]:
    """The pins, by pattern."""
    return {pattern: parse_rule(text, pattern) for pattern, text in section.pins.items()}


def budget_of(section: QuantizationSection, network: Network) -> Budget:
    """The bounds: ``34G``, ``5MB``, or ``w4a4`` for what uniform 4 bits cost in this network."""

    def bound(text: str | None, part: int) -> int | None:
        if text is None:
            return None
        if UNIFORM_BUDGET.fullmatch(text.strip()):
            return network.costs.cost(network.costs.uniform(network.name, parse_bits(text)))[part]
        return parse_quantity(text)

    return Budget(bops=bound(section.bops, 0), size=bound(section.size, 1))


def given_policy(section: QuantizationSection, network: Network) -> BitConfig | None:
    """The configuration that ``--bits`` or ``--policy`` gives; None where a search must find it.

    Raises:
        ConfigError: more than one of bits, budget and policy, or none.
    """
    ways = {
        "--bits": section.bits is not None,
        "--bops or --size": section.bops is not None or section.size is not None,
        "--policy": section.policy is not None,
    }
    given = [name for name, there in ways.items() if there]
    if len(given) != 1:
        raise ConfigError(
            "one of --bits, --bops (or --size) and --policy says what to quantize to, and "
            f"{' and '.join(given) or 'none of them'} was given"
        )
    if section.policy is not None:
        if section.pins:
            raise ConfigError("--policy gives the bits of every layer: edit it, and leave --pin away")
        return read_policy(named_path(section.policy), network)
    if section.bits is not None:
        bits = parse_bits(section.bits)
        assert bits.weight is not None
        assert bits.activation is not None
        only = Candidates((bits.weight,), (bits.activation,))
        return search_space(network.name, network.costs, only, _rules(section)).config([])
    return None


def read_policy(path: Path, network: Network) -> BitConfig:
    """A policy file, checked against the network.

    Raises:
        ConfigError: unreadable, of a foreign version, or with unknown keys.
        PolicyMismatch: made for another network.
    """
    policy = parse_json(BitConfig, read_text(path, f"--policy {path}"), str(path))
    return in_order(policy, network, f"the policy {path}")


def in_order(policy: BitConfig, network: Network, source: str) -> BitConfig:
    """``policy`` in the execution order of the network's layers.

    Raises:
        PolicyMismatch: made for another network; ``source`` is what the message calls it.
    """
    names = [layer.name for layer in network.costs.layers]
    policy.check_fits(network.name, names, source)
    return policy.model_copy(update={"layers": {name: policy.layers[name] for name in names}})


def float_policy(network: Network) -> BitConfig:
    """Every layer in floating point."""
    nothing = LayerBits(weight=None, activation=None)
    return BitConfig(model=network.name, layers={layer.name: nothing for layer in network.costs.layers})
