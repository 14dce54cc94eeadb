"""Given bits, a given policy, or a budget with its searcher and search space."""

import copy
from typing import Any, get_args

import torch
from torch import nn

from saqcli.api.arguments import space_for, widths_of
from saqcli.api.budgets import REFERENCE, bound_of, cost_unit, priced, relative_bound
from saqcli.api.networks import in_order, uniform_policy
from saqcli.api.searching import check_takes_weight_error, searcher_with
from saqcli.api.sources import policy_file
from saqcli.config import QuantizationSection, RunConfig, names_table
from saqcli.errors import ConfigError, Problems
from saqcli.export.model_metadata import ModelMetadata
from saqcli.pipelines.setup import Network
from saqcli.quant.bits import BitConfig, parse_bits
from saqcli.quant.convert import Scheme, unwrap, wrap
from saqcli.quant.cost import UNITS, Budget, CostModel
from saqcli.quant.search_space import SearchSpace, parse_rule
from saqcli.quant.tracer import trace
from saqcli.runs.directory import RunDirectory
from saqcli.searchers import SEARCHERS, Searcher
from saqcli.searchers.accuracy import AccuracyBound, middle
from saqcli.serialization import parse_json, read_text
from saqcli.target import PAPER, TARGETS, Target, find_deployment, target_of
from saqcli.units import SETTINGS, Quantity, format_quantity, parse_cost, parse_quantity, parse_share

TO_BE_TRAINED = 0.5  # share of the error of weights, decision 0043
BUDGETS: tuple[tuple[str, Quantity], ...] = (
    ("bops", "bops"),
    ("size", "size"),
)  # setting and quantity
BUDGET_WAYS = (  # of cost, and of accuracy; both may be given
    "`quantization.bops` or `quantization.size`",
    "`quantization.max_drop` or `quantization.min_top1`",
)


def check_bits(section: QuantizationSection, *, files: bool = True) -> None:
    """Check bits, budgets, pins and policy before a network is loaded.

    Args:
        section: the settings.
        files: whether the policy file must exist.

    Raises:
        SaqError: all problems in one message.
    """
    problems, table = Problems(), section.contents.get("cost")
    if section.bits is not None:
        problems.attempt(parse_bits, section.bits)
    for text, quantity in BUDGETS:
        if quantity != "bops" or not names_table(section.cost):
            problems.attempt(_check_budget, getattr(section, text), quantity)
    known = files or table is not None or not names_table(section.cost)
    unit = problems.attempt(cost_unit, section.cost, table) if known else None
    if unit is not None and names_table(section.cost) and section.bops is not None:
        problems.attempt(_check_budget, section.bops, "bops", unit)
    for pattern, text in section.pins.items():
        problems.attempt(parse_rule, text, pattern)
    if section.policy is not None and section.pins:
        problems.add(
            ConfigError(
                "`quantization.policy` gives the bits of every layer: edit it, and remove `quantization.pins`"
            )
        )
    if section.policy is not None and files:
        problems.attempt(_parse_policy, section.policy)
    problems.check()


def _check_budget(text: str | None, quantity: Quantity, unit: str | None = None) -> None:
    """Check a budget; one of a table of costs is in its ``unit``."""
    if text is None or relative_bound(text, quantity) is not None:
        return
    if unit is not None:
        parse_cost(text, unit)
    else:
        parse_quantity(text, quantity)


def check_bits_source(section: QuantizationSection) -> None:
    """Check that exactly one of bits, budget and policy is given; a budget of cost, of accuracy, or of both.

    Raises:
        ConfigError: none or more than one.
    """
    cost, accuracy = BUDGET_WAYS
    ways = {
        "`quantization.bits`": section.bits is not None,
        cost: section.bops is not None or section.size is not None,
        accuracy: accuracy_bound(section) is not None,
        "`quantization.policy`": section.policy is not None,
    }
    given = [name for name, there in ways.items() if there]
    if set(given) != set(BUDGET_WAYS) and len(given) != 1:
        found = f"{' and '.join(given)} were given" if given else "no bits and no budget were given"
        raise ConfigError(
            f"{found}: give exactly one of `quantization.bits=4`, `quantization.bops=34G` "
            "(or `quantization.size=5MB`, `quantization.max_drop=1`, or several), `quantization.policy=FILE`"
        )


def make_searcher(config: RunConfig) -> Searcher:
    """The searcher with its options.

    Raises:
        ConfigError: unknown searcher or unknown options.
    """
    name, section = config.quantization.searcher, config.search
    entry = SEARCHERS.find(name)
    unknown = set(section.options) - set(SEARCHERS)
    if unknown:
        raise ConfigError(
            f"search.options.{sorted(unknown)[0]} belongs to no searcher: choose from {', '.join(SEARCHERS)}"
        )
    if section.pareto and config.quantization.cost != "bops":
        raise ConfigError(
            f"`search.pareto={section.pareto}` counts bit-operations: remove it, or "
            f"`quantization.cost={config.quantization.cost}`"
        )
    check_takes_weight_error(name, section.weight_error, "search.weight_error")
    options = dict(section.options.get(name, {}))
    if section.epochs is not None:
        if not entry.trains:
            raise ConfigError(f"searcher {name} does not train: remove `search.epochs`")
        whole = section.epochs == int(section.epochs)
        options["epochs"] = int(section.epochs) if whole else section.epochs
    if section.rho is not None:
        options["rho"] = section.rho
    try:
        return searcher_with(name, options)
    except ConfigError as error:
        option, _, rest = str(error).partition(" ")
        if option not in options:
            raise
        common = getattr(section, option, None) is not None
        setting = f"`search.{option}`" if common else f"search.options.{name}.{option}"
        raise ConfigError(f"{setting} {rest}") from None


def weight_error_of(config: RunConfig) -> float:
    """The share of the quantization error of weights that a search compares configurations with.

    Unless it is given, it is ``TO_BE_TRAINED`` for a policy that the settings train or reconstruct. It is 1 where
    calibrated accuracy is asked for, under a bound of accuracy or for a front, and for a searcher that does not take
    a share.
    """
    if config.search.weight_error is not None:
        return config.search.weight_error
    repaired = config.training.epochs > 0 or config.reconstruction.enabled
    calibrated = bool(config.search.pareto) or accuracy_bound(config.quantization) is not None
    able = SEARCHERS.find(config.quantization.searcher).takes_weight_error
    return TO_BE_TRAINED if able and repaired and not calibrated else 1.0


def space_of(section: QuantizationSection, network: Network) -> SearchSpace:
    """The search space of the settings.

    Raises:
        ConfigError: pins that match no layer, or leave a layer without options.
        UnsupportedModel: the target cannot run bits of a layer that a pin allows.
    """
    return space_for(
        network.name,
        costs_of(section, network),
        widths_of(section.candidates, section.activation_candidates, target_of(section)),
        section.pins,
        target_of(section),
    )


def costs_of(section: QuantizationSection, network: Network) -> CostModel:
    """The network's costs, counted by the cost model of the settings.

    Raises:
        ConfigError: there is no such cost model.
    """
    return priced(network.costs, section.cost, section.contents.get("cost"))


def figures_of(
    section: QuantizationSection,
    network: Network,
    policy: BitConfig,
    space: SearchSpace | None,
    budget: Budget,
) -> dict[str, Any]:
    """What ``policy`` costs, the budget and what is reachable, where another cost model than bit-operations counts."""
    costs = costs_of(section, network)
    if costs.unit == UNITS[0]:
        return {}
    return {
        "cost": costs.cost(policy).bops,
        "cost_unit": costs.unit,
        "budget_cost": budget.bops,
        "floor_cost": None if space is None else space.floor.bops,
        "ceiling_cost": None if space is None else space.ceiling.bops,
    }


def keeps_scores(section: QuantizationSection) -> bool:
    """Whether the search of these settings can be solved for another budget from what it keeps."""
    return SEARCHERS.find(section.searcher).keeps_scores


def budget_of(section: QuantizationSection, network: Network) -> Budget:
    """The budget of cost: ``34G``, ``5MB``, ``w4a4`` for the cost of uniform 4 bits, or ``50%`` of that of 8 bits."""
    costs = costs_of(section, network)
    bops, size = (
        None if text is None else bound_of(text, quantity, network.name, costs)
        for text, quantity in zip((section.bops, section.size), get_args(Quantity), strict=True)
    )
    return Budget(bops=bops, size=size, unit=costs.unit)


def explain_shares(section: QuantizationSection, budget: Budget) -> list[str]:
    """What the percentages in the settings stand for, one line each."""
    found = []
    for (setting, quantity), bound in zip(BUDGETS, (budget.bops, budget.size), strict=True):
        text = getattr(section, setting)
        if bound is not None and parse_share(text, quantity) is not None:
            cost = format_quantity(bound, budget.unit if quantity == "bops" else "B")
            found.append(f"`{SETTINGS[quantity]}={text}`: of the cost of {REFERENCE} in every layer, {cost}")
    return found


def search_budget(
    section: QuantizationSection, network: Network, space: SearchSpace
) -> tuple[Budget, Budget]:
    """The budget that was asked for, without bounds if accuracy alone is, and the budget to search under."""
    asked = budget_of(section, network)
    return asked, asked if asked.bounds() else middle(space)


def accuracy_bound(section: QuantizationSection) -> AccuracyBound | None:
    """The budget of accuracy, or None."""
    if section.max_drop is None and section.min_top1 is None:
        return None
    return AccuracyBound(section.max_drop, section.min_top1)


def check_accuracy(config: RunConfig) -> None:
    """Check that a budget of accuracy, if there is one, can be measured.

    Raises:
        ConfigError: two bounds, or a network whose accuracy in floating point says nothing.
    """
    section, problems = config.quantization, Problems()
    if accuracy_bound(section) is None:
        return
    if section.max_drop is not None and section.min_top1 is not None:
        problems.add(
            ConfigError(
                "`quantization.max_drop` and `quantization.min_top1` bound the same accuracy: remove one of them"
            )
        )
    if config.search.proxy is not None:
        problems.add(
            ConfigError(
                "a budget of accuracy is one of the network itself, and `search.proxy` measures another: remove "
                "`search.proxy`, or `quantization.max_drop` and `quantization.min_top1`"
            )
        )
    if config.model.new_head:
        problems.add(
            ConfigError(
                "a budget of accuracy compares with the float network, whose classifier is random with "
                "`model.new_head`: use a budget such as `quantization.bops=34G`"
            )
        )
    problems.check()


def check_compares(network: Network) -> None:
    """Check that the float network is trained, so that a drop of its accuracy means something.

    Raises:
        ConfigError: its weights, or those of its classifier, are random.
    """
    if not network.loaded.trained:
        raise ConfigError(
            f"a budget of accuracy needs a trained float network, but weights of {network.name}, or of its "
            "classifier, are random: use `model.weights=FILE` with all weights"
        )


def given_policy(section: QuantizationSection, network: Network) -> BitConfig | None:
    """The configuration given by ``bits`` or ``policy``; None for a budget.

    Raises:
        ConfigError: none or more than one of bits, budget and policy.
        UnsupportedModel: the target cannot run the bits of a layer.
    """
    check_bits_source(section)
    policy = None
    if section.policy is not None:
        policy = read_policy(section.policy, network)
    elif section.bits is not None:
        policy = uniform_policy(network, parse_bits(section.bits), section.pins)
    if policy is not None:
        target_of(section).check_policy(policy.layers)
    return policy


def scheme_of(section: QuantizationSection) -> Scheme:
    """The quantizers of the settings."""
    return Scheme(
        quantizer=section.quantizer,
        weight_grid=section.weight_grid,
        granularity=section.granularity,
        weight_normalization=section.weight_normalization,
        restore_deviation=section.restore_deviation,
        clip_init=section.clip_init,
        weight_quantizer=section.weight_quantizer,
        activation_quantizer=section.activation_quantizer,
        error_power=section.error_power,
        short_steps=section.short_steps,
        target=target_of(section).name,
    )


def check_scheme(config: RunConfig) -> None:
    """Check quantizers and styles, also against the target, before a network is loaded.

    Raises:
        SaqError: all problems in one message.
    """
    target, scheme, problems = target_of(config.quantization), scheme_of(config.quantization), Problems()
    problems.attempt(scheme.check)
    problems.attempt(_check_comparisons, config)
    problems.attempt(target.check_scheme, scheme)
    problems.attempt(target.check_styles, config.export.styles)
    problems.check()


def _check_comparisons(config: RunConfig) -> None:
    """Refuse stages that compare outputs of layers with those of the float network, if their scale differs."""
    asked = {
        "quantization.correct_bias": config.quantization.correct_bias,
        "quantization.compensate": config.quantization.compensate,
        "reconstruction.enabled": config.reconstruction.enabled,
    }
    given = [f"`{setting}`" for setting, value in asked.items() if value]
    dropped = config.quantization.weight_normalization and not config.quantization.restore_deviation
    if given and dropped:
        raise ConfigError(
            f"{' and '.join(given)} compare outputs of layers with those of the float network, and "
            "`quantization.restore_deviation=False` changes their scale: remove either"
        )


def check_deployment(target: str) -> None:
    """Check that there is a target of this name, or in this file.

    Raises:
        ConfigError: there is none.
    """
    find_deployment(target)


def kinds_in(model: nn.Module, metadata: ModelMetadata) -> frozenset[str]:
    """The kinds of junctions in the network of a quantized model, quantized or not."""
    plain = copy.deepcopy(model)
    unwrap(plain)
    wrap(plain)
    found = trace(plain, torch.zeros(1, *metadata.preprocessing["input_size"]))
    return frozenset(junction.kind for junction in found.junctions)


def own_target(metadata: ModelMetadata, run: RunDirectory | None) -> Target | None:
    """The target that a model was quantized for; None if it was a file's, whose content is not known.

    Args:
        metadata: of the model, which has the name only.
        run: the run that it lies in, which has the content, if there is one.
    """
    name = metadata.scheme.target
    if run is not None and name != PAPER:
        settings = run.config().quantization
        if "target" in settings.contents:
            return target_of(settings)
    return TARGETS.get(name)


def style_for(
    metadata: ModelMetadata,
    model: nn.Module,
    style: str | None,
    target: str | None,
    run: RunDirectory | None = None,
) -> str:
    """The style that a model is written in for its target.

    Args:
        metadata: of the model.
        model: quantized; not changed.
        style: as the user gives it, or None.
        target: name or file of the target; None for that of the model.
        run: the run that it lies in, if there is one.

    Raises:
        ConfigError: the target does not read the style.
        UnsupportedModel: the target cannot run the model; the message names the reason.
    """
    deployment = own_target(metadata, run) if target is None else find_deployment(target)
    if deployment is None:
        return style or "qdq"
    if style is not None:
        deployment.check_styles((style,))
    if target is not None:
        operators = metadata.junctions.operators.values() if metadata.junctions else ()
        unquantized = kinds_in(model, metadata) - {each.kind for each in operators}
        policy = metadata.policy
        deployment.check_quantized(policy.model, metadata.scheme, policy.layers, unquantized)
    return style or (deployment.styles or ("qdq",))[0]


def read_policy(text: str, network: Network) -> BitConfig:
    """Read the policy ``text``, a file or run directory, and check it against the network.

    Raises:
        ConfigError: unreadable, of another version, or with unknown keys.
        RunDirectoryError: a run without a policy.
        PolicyMismatch: for another network.
    """
    return in_order(_parse_policy(text), network, f"the policy {text}")


def _parse_policy(text: str) -> BitConfig:
    path = policy_file(text)
    return parse_json(BitConfig, read_text(path, f"`quantization.policy={path}`"), str(path))
