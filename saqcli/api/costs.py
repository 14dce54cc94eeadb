"""Costs of any module at its bits: bit-operations and bytes, in total and layer by layer."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from saqcli.api.arguments import widths_of
from saqcli.api.batches import Inputs, class_scores
from saqcli.api.info import bits_of, info, unwrapped
from saqcli.api.networks import Policy, float_network, float_policy, policy_of, prepare
from saqcli.config import WIDTHS
from saqcli.errors import ConfigError
from saqcli.quant.bits import FLOAT_BITS, BitConfig, LayerBits, mean_bits
from saqcli.quant.cost import Cost
from saqcli.quant.network import Network
from saqcli.quant.search_space import SearchSpace, search_space
from saqcli.quant.tracer import FUNCTIONAL, Trace
from saqcli.units import format_quantity

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
        """Bit-operations for one sample."""
        return self.network.costs.bops(self.policy)

    @property
    def size(self) -> int:
        """Bytes: weights packed at their bits, steps, and 32-bit floats for the rest."""
        return self.network.costs.size(self.policy)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in JSON."""
        costs, traced = self.network.costs, self.network.traced
        scores = class_scores(traced.outputs)
        return {
            "model": self.network.name,
            "input_size": list(traced.inputs[0])
            if len(traced.inputs) == 1
            else list(map(list, traced.inputs)),
            "num_classes": None if scores is None else scores.shape[1],
            "macs": costs.macs,
            "bops": self.bops,
            "float_bops": costs.float_bops,
            "floor_bops": self.floor.bops,
            "ceiling_bops": self.ceiling.bops,
            "floor_size_bytes": self.floor.size,
            "ceiling_size_bytes": self.ceiling.size,
            "size_bytes": self.size,
            "float_size_bytes": costs.float_size,
            **({"junction_bops": costs.joined_bops} if costs.joined_bops else {}),
            "layers": layer_rows(self.network, self.policy),
            "products": product_rows(self.network, self.policy),
            "unquantized": unquantized(traced),
        }

    def __str__(self) -> str:
        """A table with a line for every layer, and the totals."""
        rows = [("layer", "kind", "bits", "MACs", "BOPs", "share")]
        for row in layer_rows(self.network, self.policy):
            bits = LayerBits(weight=row["weight_bits"], activation=row["activation_bits"])
            share = f"{100 * row['bops'] / max(self.bops, 1):.1f} %"
            macs, bops = format_quantity(row["macs"], ""), format_quantity(row["bops"], "")
            rows.append((row["name"] or "(root)", row["kind"], str(bits), macs, bops, share))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(_aligned(row, widths)) for row in rows]
        for each in unquantized(self.network.traced):
            lines.append(f"{each['name']} stays in floating point: {each['reason']}")
        costs = self.network.costs
        weights, activations = mean_bits(
            self.policy.layers, {layer.name: layer.macs for layer in costs.layers}
        )
        lines.append(
            f"{self.network.name}: {Cost(self.bops, self.size)} (float {Cost(costs.float_bops, costs.float_size)}), "
            f"mean bits {weights:.2f} of weights and {activations:.2f} of inputs"
        )
        return "\n".join(line.rstrip() for line in lines)


def _aligned(row: Iterable[str], widths: Iterable[int]) -> Iterator[str]:
    """The cells of a row: three of words, then numbers."""
    for column, (text, width) in enumerate(zip(row, widths, strict=True)):
        yield text.ljust(width) if column < 3 else text.rjust(width)


def profile(
    model: nn.Module,
    bits: int | str | None = None,
    *,
    policy: Policy | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    candidates: Iterable[int] = WIDTHS,
    quantize_attention: bool = False,
) -> Profile:
    """Costs of a module, layer by layer; the module is left unchanged.

    Args:
        model: a quantized module, which has its own bits, or any float module.
        bits: of a float module: ``4``, ``"w4a8"``; by default it stays in floating point.
        policy: of a float module, in the place of ``bits``; as in ``quantize_model``.
        example: inputs of a float module, as in ``quantize_model``.
        inputs: from ``example`` to the module's arguments.
        candidates: bit-widths of the reachable range ``floor`` to ``ceiling``.
        quantize_attention: also count products of activations in a float module.

    Raises:
        ConfigError: the inputs of the module are unknown, or both bits and a policy are given.
        UnsupportedModel: nothing to quantize, or the module does not run.
    """
    if bits is not None and policy is not None:
        raise ConfigError("`bits` and `policy` were given: give one of them")
    model = unwrapped(model)
    about = info(model)
    if about.quantization is not None:
        network, config = about.quantization.network(model, about.name), bits_of(model)
    else:
        ready = prepare(model, None, example, inputs, None)
        network = float_network(ready.model, ready.example, quantize_attention=quantize_attention)
        if bits is None and policy is None:
            config = float_policy(network)
        else:
            config = policy_of(network, bits=bits, policy=policy)
    return measure(network, config, space_of_candidates(network, candidates))


def bops(
    model: nn.Module, bits: int | str | None = None, *, example: Any = None, inputs: Inputs | None = None
) -> int:
    """Bit-operations for one sample: MACs x weight bits x activation bits, summed over the layers.

    A layer in floating point counts 32 bits. Source: Liu et al., arXiv:2111.12273.

    Args:
        model: as in ``profile``.
        bits: as in ``profile``.
        example: as in ``profile``.
        inputs: as in ``profile``.

    Example:
        >>> import saqcli as saq
        >>> net = saq.load_model("saq/resnet20", pretrained=False, num_classes=10)
        >>> saq.bops(net, "w4a4")
        670081024
    """
    return profile(model, bits, example=example, inputs=inputs).bops


def summary(
    model: nn.Module, bits: int | str | None = None, *, example: Any = None, inputs: Inputs | None = None
) -> str:
    """A table of the layers of a module, with their bits and costs, for ``print``; arguments as in ``profile``."""
    return str(profile(model, bits, example=example, inputs=inputs))


def measure(network: Network, policy: BitConfig, space: SearchSpace) -> Profile:
    """The costs of a traced network under ``policy``, and the reachable costs in ``space``."""
    return Profile(network, policy, space.floor, space.ceiling)


def space_of_candidates(network: Network, candidates: Iterable[int]) -> SearchSpace:
    """The search space of a network with these bit-widths in every free layer."""
    return search_space(network.name, network.costs, widths_of(candidates))


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
