"""``saq profile``: costs of a network at given bits, layer by layer."""

from pathlib import Path

from saqcli.api.costs import Profile, measure, space_of_candidates
from saqcli.api.networks import float_policy, in_order
from saqcli.api.sources import EVALUATED, Source, check_no_model_options, find_source, named_builder
from saqcli.config import ModelSection, QuantizationSection
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export.restore import open_from_metadata
from saqcli.models.own import OwnNetwork, check_named
from saqcli.pipelines.bits import check_bits, read_policy
from saqcli.pipelines.checks import check_builds, check_model
from saqcli.pipelines.latency.measure import Latency, LatencySettings, measure_latency
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.progress import Progress
from saqcli.quant.bits import BitConfig, parse_bits
from saqcli.runs.directory import RunDirectory


def check_profile(
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    quantize_attention: bool,
    builder: str | None = None,
) -> Source:
    """Check the arguments before the network is built; returns the target ``section.name``.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    target = problems.attempt(find_source, section.name, EVALUATED, "MODEL")
    problems.attempt(named_builder, target, builder)
    if target is not None and target.kind == "model":
        problems.attempt(check_model, section)
    elif target is not None:
        problems.attempt(check_no_model_options, section.name, section)
        for option, given in (("bits", bits), ("policy", policy)):
            if given is not None:
                problems.add(ConfigError(f"{section.name} has its own bits: remove `{option}`"))
        if quantize_attention:
            problems.add(
                ConfigError(f"{section.name} has its own attention: remove `quantization.quantize_attention`")
            )
    if bits is not None and policy is not None:
        problems.add(ConfigError("`bits` and `policy` both give the bits: give one of them"))
    given_bits = {"bits": bits, "policy": None if policy is None else str(policy)}
    problems.attempt(check_bits, QuantizationSection.model_validate(given_bits))
    if target is not None and target.kind == "model":
        check_builds(problems, section)
    problems.check()
    assert target is not None
    return target


def profile(
    section: ModelSection,
    *,
    bits: str | None,
    policy: Path | None,
    candidates: tuple[int, ...],
    progress: Progress,
    quantize_attention: bool = False,
    pretrained: bool = False,
    builder: str | None = None,
) -> Profile:
    """The costs of a network at ``bits``, under ``policy``, or by default in floating point.

    With ``quantize_attention`` products of two activations are counted too. ``section.name`` may also be a run
    directory or a file of a quantized model, which has its own bits; ``builder`` names the user's own network that it
    was made from, if it was.

    Raises:
        SaqError: unknown model, or a policy of another network.
    """
    target = check_profile(section, bits, policy, quantize_attention, builder)
    if target.kind != "model":
        network, config = _quantized(target, builder, progress)
        return measure(network, config, space_of_candidates(network, candidates))
    if not pretrained or section.weights is not None:  # costs do not depend on published weights
        section = section.model_copy(update={"pretrained": False})
    network = wrap_and_trace(
        load_float(section, progress), QuantizationSection(quantize_attention=quantize_attention)
    )
    if policy is not None:
        config = read_policy(str(policy), network)
    elif bits is not None:
        config = network.costs.uniform(network.name, parse_bits(bits))
    else:
        config = float_policy(network)
    return measure(network, config, space_of_candidates(network, candidates))


def profile_latency(
    section: ModelSection,
    settings: LatencySettings,
    *,
    bits: str | None,
    policy: Path | None,
    progress: Progress,
    quantize_attention: bool = False,
    builder: str | None = None,
) -> Latency:
    """The latency of every layer of a network at the widths of ``settings``; other arguments as in ``profile``.

    Raises:
        SaqError: unknown model, invalid settings, or bits, which ``settings`` have.
    """
    for option, given in (("bits", bits), ("policy", policy)):
        if given is not None:
            raise ConfigError(f"`measure=True` measures several widths: use `widths`, and remove `{option}`")
    target = check_profile(section, None, None, quantize_attention, builder)
    if target.kind != "model":
        return measure_latency(_quantized(target, builder, progress)[0], settings, progress)
    loaded = load_float(section.model_copy(update={"pretrained": False}), progress)
    network = wrap_and_trace(loaded, QuantizationSection(quantize_attention=quantize_attention))
    return measure_latency(network, settings, progress)


def _quantized(target: Source, builder: str | None, progress: Progress) -> tuple[Network, BitConfig]:
    """The network and the bits of a run or a model file."""
    path, run, own = target.path, target.run, named_builder(target, builder)
    if run is not None:
        if not run.safetensors_path.is_file():
            return _of_settings(run, own, progress)
        path = run.safetensors_path
    assert path is not None
    loaded, metadata = open_from_metadata(path, own)
    network = wrap_and_trace(loaded, QuantizationSection(quantize_attention=bool(metadata.products)))
    return network, in_order(metadata.policy, network, str(path))


def _of_settings(run: RunDirectory, own: OwnNetwork | None, progress: Progress) -> tuple[Network, BitConfig]:
    """The network and the bits of a search or an unfinished run, built from its settings."""
    if not run.policy_path.is_file():
        raise RunDirectoryError(f"{run.path} has no bits yet: it {run.status_text()}, {run.next_step()}")
    config = run.config()
    check_named(config.model.name, own, str(run.path))
    loaded = load_float(config.model.model_copy(update={"pretrained": False}), progress)
    network = wrap_and_trace(loaded, config.quantization)
    return network, read_policy(str(run.path), network)
