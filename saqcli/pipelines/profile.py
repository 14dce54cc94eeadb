"""``saq profile``: costs of a network at given bits, layer by layer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saqcli.config import ModelSection, QuantizationSection
from saqcli.errors import ConfigError, Problems, RunDirectoryError
from saqcli.export.restore import open_from_metadata
from saqcli.models.own import OwnNetwork, check_named
from saqcli.pipelines.bits import check_bits, float_policy, in_order, read_policy
from saqcli.pipelines.checks import check_builds, check_model
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.pipelines.targets import EVALUATED, Target, check_no_model_options, find_target, named_builder
from saqcli.progress import Progress
from saqcli.quant.bits import FLOAT_BITS, BitConfig, parse_bits
from saqcli.quant.cost import Cost
from saqcli.quant.search_space import Candidates, SearchSpace, search_space
from saqcli.quant.tracer import FUNCTIONAL, Trace
from saqcli.runs.directory import RunDirectory

NEVER_RUNS = "does not run in evaluation"


@dataclass(frozen=True)
class Profile:
    """Costs of a network under one bit configuration.

    Attributes:
        network: the traced network.
        policy: the bits.
        floor: cost with every free layer at the fewest bits.
        ceiling: cost with every free layer at the most bits.
    """

    network: Network
    policy: BitConfig
    floor: Cost
    ceiling: Cost

    @property
    def bops(self) -> int:
        """Bit-operations per image."""
        return self.network.costs.bops(self.policy)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        costs, traced = self.network.costs, self.network.traced
        return {
            "model": self.network.name,
            "input_size": list(self.network.loaded.preprocessing.input_size),
            "num_classes": self.network.loaded.num_classes,
            "macs": costs.macs,
            "bops": self.bops,
            "float_bops": costs.float_bops,
            "floor_bops": self.floor.bops,
            "ceiling_bops": self.ceiling.bops,
            "floor_size_bytes": self.floor.size,
            "ceiling_size_bytes": self.ceiling.size,
            "size_bytes": costs.size(self.policy),
            "float_size_bytes": costs.float_size,
            "layers": layer_rows(self.network, self.policy),
            "products": product_rows(self.network, self.policy),
            "unquantized": unquantized(traced),
        }


def layer_rows(network: Network, policy: BitConfig) -> list[dict[str, Any]]:
    """Every layer with its bits and costs under ``policy``, in execution order."""
    parents = {name: parent for parent, names in network.traced.routed.items() for name in names}
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "macs": layer.macs,
            "weight_bits": policy.layers[layer.name].weight,
            "activation_bits": policy.layers[layer.name].activation,
            "bops": layer.layer_bops(policy.layers[layer.name]),
            "pinned": layer.pinned is not None,
            "group": layer.group,
            "norm": network.traced.layers[layer.name].norm,
            "multiplied_in": parents.get(layer.name),
        }
        for layer in network.costs.layers
    ]


def product_rows(network: Network, policy: BitConfig) -> list[dict[str, Any]]:
    """Every product of two activations, with the bits of the layer it follows; None if it is not quantized."""
    rows = []
    for product in network.traced.products:
        followed = network.products.get(product.name)
        bits = policy.layers[followed].activation if followed else None
        counted = product.macs * (bits or FLOAT_BITS) ** 2 if followed else None
        rows.append(
            {
                "name": product.name,
                "macs": product.macs,
                "follows": product.follows,
                "bits": bits,
                "bops": counted,
            }
        )
    return rows


def unquantized(traced: Trace) -> list[dict[str, Any]]:
    """The modules that stay in floating point, with reasons and MACs."""
    multiplying = [
        {"name": layer.name, "kind": layer.kind, "macs": layer.macs, "reason": layer.reason}
        for layer in traced.unquantized.values()
    ]
    reported = {layer.reason for layer in traced.unquantized.values()}
    return multiplying + [
        {"name": name, "kind": None, "macs": 0, "reason": NEVER_RUNS}
        for name in traced.idle
        if FUNCTIONAL.format(name) not in reported
    ]


def check_profile(
    section: ModelSection,
    bits: str | None,
    policy: Path | None,
    quantize_attention: bool,
    builder: str | None = None,
) -> Target:
    """Check the arguments before the network is built; returns the target ``section.name``.

    Raises:
        SaqError: all problems in one message.
    """
    problems = Problems()
    target = problems.attempt(find_target, section.name, EVALUATED, "MODEL")
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
        return measure(network, config, search_space(network.name, network.costs, Candidates(candidates)))
    if not pretrained or section.weights is not None:  # costs do not depend on published weights
        section = section.model_copy(update={"pretrained": False})
    network = wrap_and_trace(load_float(section, progress), quantize_attention=quantize_attention)
    if policy is not None:
        config = read_policy(str(policy), network)
    elif bits is not None:
        config = network.costs.uniform(network.name, parse_bits(bits))
    else:
        config = float_policy(network)
    return measure(network, config, search_space(network.name, network.costs, Candidates(candidates)))


def _quantized(target: Target, builder: str | None, progress: Progress) -> tuple[Network, BitConfig]:
    """The network and the bits of a run or a model file."""
    path, run, own = target.path, target.run, named_builder(target, builder)
    if run is not None:
        if not run.safetensors_path.is_file():
            return _of_settings(run, own, progress)
        path = run.safetensors_path
    assert path is not None
    loaded, metadata = open_from_metadata(path, own)
    network = wrap_and_trace(loaded, quantize_attention=bool(metadata.products))
    return network, in_order(metadata.policy, network, str(path))


def _of_settings(run: RunDirectory, own: OwnNetwork | None, progress: Progress) -> tuple[Network, BitConfig]:
    """The network and the bits of a search or an unfinished run, built from its settings."""
    if not run.policy_path.is_file():
        raise RunDirectoryError(f"{run.path} has no bits yet: it {run.status_text()}, {run.next_step()}")
    config = run.config()
    check_named(config.model.name, own, str(run.path))
    loaded = load_float(config.model.model_copy(update={"pretrained": False}), progress)
    network = wrap_and_trace(loaded, quantize_attention=config.quantization.quantize_attention)
    return network, read_policy(str(run.path), network)


def measure(network: Network, policy: BitConfig, space: SearchSpace) -> Profile:
    """The costs of a traced network under ``policy``, and the reachable costs in ``space``."""
    return Profile(network, policy, space.floor, space.ceiling)
