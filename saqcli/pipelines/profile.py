"""``saq profile``: costs of a network at given bits, layer by layer."""

from dataclasses import dataclass

from saqcli.api.arguments import widths_of
from saqcli.api.costs import Profile, measure
from saqcli.api.networks import float_policy, in_order
from saqcli.api.sources import EVALUATED, Source, check_no_model_options, find_source, named_builder
from saqcli.config import ModelSection, QuantizationSection
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export.restore import open_from_metadata
from saqcli.models.own import OwnNetwork, check_named
from saqcli.pipelines.bits import (
    BUDGET_WAYS,
    budget_of,
    check_bits,
    explain_shares,
    given_policy,
    own_target,
    read_policy,
    scheme_of,
    space_of,
)
from saqcli.pipelines.checks import check_builds, check_model
from saqcli.pipelines.latency.measure import Latency, LatencySettings, measure_latency
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.progress import Progress
from saqcli.quant.bits import BitConfig
from saqcli.quant.convert import Scheme
from saqcli.quant.search_space import search_space
from saqcli.runs.directory import RunDirectory
from saqcli.searchers.uniforms import largest_uniform
from saqcli.serialization import parse_object
from saqcli.target import PAPER, TARGETS, Target, target_of

OWN = {  # settings that a run or a model file has of its own
    "bits": "bits",
    "policy": "bits",
    "bops": "bits",
    "size": "bits",
    "target": "target",
    "quantize_attention": "attention",
}


def check_profile(
    section: ModelSection, quantization: QuantizationSection, builder: str | None = None
) -> Source:
    """Check the arguments before the network is built; returns the source ``section.name``.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    source = problems.attempt(find_source, section.name, EVALUATED, "SOURCE")
    problems.attempt(named_builder, source, builder)
    if source is not None and source.kind == "model":
        problems.attempt(check_model, section)
    elif source is not None:
        problems.attempt(check_no_model_options, section.name, section)
        for setting, what in OWN.items():
            if getattr(quantization, setting) != getattr(QuantizationSection(), setting):
                problems.add(
                    ConfigError(f"{section.name} has its own {what}: remove `quantization.{setting}`")
                )
    ways = {
        "`quantization.bits`": quantization.bits is not None,
        "`quantization.policy`": quantization.policy is not None,
        BUDGET_WAYS[0]: quantization.bops is not None or quantization.size is not None,
    }
    if len(given := [name for name, there in ways.items() if there]) > 1:
        problems.add(ConfigError(f"{' and '.join(given)} each give the bits: give one of them"))
    problems.attempt(check_bits, quantization)
    problems.attempt(target_of, quantization)
    if source is not None and source.kind == "model":
        check_builds(problems, section)
    problems.check()
    assert source is not None
    return source


def profile(
    section: ModelSection,
    quantization: QuantizationSection,
    *,
    progress: Progress,
    pretrained: bool = False,
    builder: str | None = None,
) -> Profile:
    """The costs of a network at its bits or under its policy, or by default in floating point, as its target counts.

    Under a budget, its bits are the most uniform ones within it, which need neither data nor weights.

    Args:
        section: the network; its name may also be a run directory or a file of a quantized model, which has bits,
            quantizers and target of its own.
        quantization: bits or policy, target, candidates of the reachable range, and whether attention is quantized.
        progress: receives notes.
        pretrained: whether published weights are loaded; no cost depends on them.
        builder: names the user's own network that a run or file was made from, if it was.

    Raises:
        SaqError: unknown model or target, a policy of another network, or bits that the target cannot run.
        InfeasibleBudget: the budget is below the smallest reachable cost.
    """
    opened = _open(section, quantization, builder, progress, pretrained=pretrained)
    candidates = widths_of(quantization.candidates, target=opened.target)
    space = search_space(opened.network.name, opened.network.costs, candidates)
    return measure(opened.network, opened.policy, space)


def profile_latency(
    section: ModelSection,
    quantization: QuantizationSection,
    settings: LatencySettings,
    *,
    progress: Progress,
    builder: str | None = None,
) -> Latency:
    """The latency of every layer of a network at the widths of ``settings``; other arguments as in ``profile``.

    The files have the quantizers and junctions of the run or model file, or of the target.

    Raises:
        SaqError: unknown model or target, invalid settings, or bits, which ``settings`` have.
    """
    for setting in ("bits", "policy", "bops", "size"):
        if getattr(quantization, setting) is not None:
            raise ConfigError(
                f"`measure=True` measures several widths: use `widths`, and remove `quantization.{setting}`"
            )
    opened = _open(section, quantization, builder, progress)
    opened.target.check_scheme(opened.scheme)
    return measure_latency(opened.network, settings, progress, opened.scheme, opened.target)


@dataclass(frozen=True)
class _Opened:
    """A traced network.

    Attributes:
        network: with the junctions of its target.
        policy: its bits.
        scheme: its quantizers.
        target: where it will run.
    """

    network: Network
    policy: BitConfig
    scheme: Scheme
    target: Target


def _open(
    section: ModelSection,
    quantization: QuantizationSection,
    builder: str | None,
    progress: Progress,
    *,
    pretrained: bool = False,
) -> _Opened:
    """The network of a name, a run or a model file."""
    source = check_profile(section, quantization, builder)
    if source.kind != "model":
        return _quantized(source, named_builder(source, builder), progress)
    if not pretrained or section.weights is not None:  # costs do not depend on published weights
        section = section.model_copy(update={"pretrained": False})
    quantization = _with_defaults(quantization)
    network = wrap_and_trace(load_float(section, progress), quantization)
    if quantization.bops is not None or quantization.size is not None:
        policy = _within_budget(quantization, network, progress)
    elif quantization.bits is None and quantization.policy is None:
        policy = float_policy(network)
    else:
        policy = given_policy(quantization, network) or float_policy(network)
    return _Opened(network, policy, scheme_of(quantization), target_of(quantization))


def _within_budget(quantization: QuantizationSection, network: Network, progress: Progress) -> BitConfig:
    """The most uniform bits within the budget; notes say so.

    Raises:
        InfeasibleBudget: the budget is below the smallest reachable cost.
    """
    space, budget = space_of(quantization, network), budget_of(quantization, network)
    for line in explain_shares(quantization, budget):
        progress.note(line)
    space.check_reachable(budget)
    progress.note(
        f"the most uniform bits within {budget}: `search({network.name!r})` spreads bits over the layers on images"
    )
    return space.config(largest_uniform(space, budget))


def _with_defaults(quantization: QuantizationSection) -> QuantizationSection:
    """The settings, with those of the target below what is given.

    Raises:
        ConfigError: the target has settings that do not exist.
    """
    target = target_of(quantization)
    given = quantization.model_dump(exclude_unset=True)
    settings = {**target.settings.get("quantization", {}), **given}
    return parse_object(QuantizationSection, settings, f"the settings of target {target.name}")


def _quantized(source: Source, own: OwnNetwork | None, progress: Progress) -> _Opened:
    """The network of a run or a model file, with its bits, quantizers and target."""
    path, run = source.path, source.run
    if run is not None:
        if not run.safetensors_path.is_file():
            return _of_settings(run, own, progress)
        path = run.safetensors_path
    assert path is not None
    loaded, metadata = open_from_metadata(path, own)
    network = wrap_and_trace(loaded, recorded=metadata)
    target = own_target(metadata, run)
    policy = in_order(metadata.policy, network, str(path))
    return _Opened(network, policy, metadata.scheme, target or TARGETS[PAPER])


def _of_settings(run: RunDirectory, own: OwnNetwork | None, progress: Progress) -> _Opened:
    """The network of a search or an unfinished run, built from its settings."""
    if not run.policy_path.is_file():
        raise RunDirectoryError(f"{run.path} has no bits yet: it {run.status_text()}, {run.next_step()}")
    config = run.config()
    check_named(config.model.name, own, str(run.path))
    loaded = load_float(config.model.model_copy(update={"pretrained": False}), progress)
    network, section = wrap_and_trace(loaded, config.quantization), config.quantization
    return _Opened(network, read_policy(str(run.path), network), scheme_of(section), target_of(section))
