"""What a bit configuration costs: bit-operations and bytes, from the traced layers alone.

    BOPs = sum over layers of MACs * weight bits * activation bits          for one image

Counted are convolutions (projection shortcuts included) and linear layers (the classifier included); biases,
norms, pooling, additions and activations are free; an operand left in floating point counts 32 bits. First
layer and classifier have 8 bits. This is the counter of Liu et al. (arXiv:2111.12273), to the last digit.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from torch import nn

from saqcli.errors import InfeasibleBudget
from saqcli.quant.bits import FLOAT_BITS, PINNED_BITS, BitConfig, LayerBits, uniform
from saqcli.quant.layers import QuantizedLayer
from saqcli.quant.quantizers import quantizers_of
from saqcli.quant.trace import LayerTrace, Trace
from saqcli.units import format_quantity

BUDGET_USE = 0.985  # share of the budget that a configuration should use where the candidates allow it


@dataclass(frozen=True)
class LayerCost:
    """A layer as the budget sees it.

    Attributes:
        name: qualified name in the float model.
        kind: class name of the float layer.
        macs: multiply-accumulates for one image.
        weight_count: elements of the weight.
        group: layers of one group share their bits.
        pinned: bits that are fixed beforehand, or None where they are free.
    """

    name: str
    kind: str
    macs: int
    weight_count: int
    group: str
    pinned: LayerBits | None

    def bops(self, bits: LayerBits) -> int:
        """Bit-operations at ``bits``."""
        return self.macs * (bits.weight or FLOAT_BITS) * (bits.activation or FLOAT_BITS)


@dataclass(frozen=True)
class CostModel:
    """All layers of a network in execution order, and what runs in floating point whatever the bits.

    Attributes:
        layers: the quantized ones.
        unquantized: modules that multiply but are not quantized; counted at 32 bits.
    """

    layers: tuple[LayerCost, ...]
    unquantized: tuple[LayerTrace, ...] = ()

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(layer.macs for layer in self.layers) + sum(layer.macs for layer in self.unquantized)

    @property
    def float_bops(self) -> int:
        """Bit-operations of the float model: 1024 a multiply-accumulate."""
        return self.macs * FLOAT_BITS**2

    @property
    def pins(self) -> dict[str, LayerBits | None]:
        """The pinned bits of every layer, None where free."""
        return {layer.name: layer.pinned for layer in self.layers}

    def bops(self, config: BitConfig) -> int:
        """Bit-operations under ``config``."""
        fixed = sum(layer.macs for layer in self.unquantized) * FLOAT_BITS**2
        return fixed + sum(layer.bops(config.layers[layer.name]) for layer in self.layers)

    def uniform(self, model: str, bits: LayerBits) -> BitConfig:
        """The configuration with ``bits`` in every layer that is not pinned."""
        return uniform(model, self.pins, bits)

    def reachable(self, candidates: Sequence[int]) -> tuple[int, int]:
        """BOPs with all free layers at the fewest and at the most bits: floor and ceiling."""
        return tuple(  # type: ignore[return-value]
            self.bops(self.uniform("", LayerBits(weight=bits, activation=bits)))
            for bits in (min(candidates), max(candidates))
        )


@dataclass(frozen=True)
class Budget:
    """An upper bound on bit-operations."""

    bops: int

    def admits(self, bops: int) -> bool:
        """Whether a configuration of that cost may be used."""
        return bops <= self.bops

    def check_reachable(self, costs: CostModel, candidates: Sequence[int], model: str) -> None:
        """Refuse at once what no configuration can meet.

        Raises:
            InfeasibleBudget: names the reachable range.
        """
        floor, ceiling = costs.reachable(candidates)
        if self.bops < floor:
            raise InfeasibleBudget(
                f"no configuration of {model} meets {format_quantity(self.bops, 'BOPs')}: with every free layer at "
                f"{min(candidates)} bits it needs {format_quantity(floor, 'BOPs')} "
                f"(reachable: {format_quantity(floor)} to {format_quantity(ceiling, 'BOPs')}). Raise the budget"
                + (" or allow fewer bits with --candidates" if min(candidates) > 2 else "")
            )


def cost_model(traced: Trace, classifiers: Iterable[str] = ()) -> CostModel:
    """The layers as the budget sees them; first and last layer are pinned to 8 bits.

    Args:
        traced: of the wrapped float model.
        classifiers: names of further layers that give class scores (a distillation head).
    """
    names = list(traced.layers)
    reading = {name for name, layer in traced.layers.items() if layer.reads_image} or {names[0]}
    pinned = reading | {names[-1]} | set(classifiers)
    bits = LayerBits(weight=PINNED_BITS, activation=PINNED_BITS)
    layers = tuple(
        LayerCost(t.name, t.kind, t.macs, t.weight_count, t.group, bits if t.name in pinned else None)
        for t in traced.layers.values()
    )
    return CostModel(layers, tuple(traced.unquantized.values()))


def size_bytes(model: nn.Module, config: BitConfig | None) -> int:
    """Bytes of the weights at their bits, packed, and of everything else in 32-bit floats.

    Args:
        model: wrapped or float.
        config: bits of the quantized layers; None counts the float model.
    """
    total, packed = 0, set()
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        weight = layer.latent_weight()
        bits = config.layers[name].weight if config and name in config.layers else None
        if id(weight) not in packed:
            packed.add(id(weight))
            total += ceil(weight.numel() * (bits or FLOAT_BITS) / 8)
            total += 4 * weight.shape[layer.channel_dim] if bits else 0
    counted = packed | {id(t) for q in quantizers_of(model) for t in (*q.parameters(), *q.buffers())}
    total += sum(4 * p.numel() for p in model.parameters() if id(p) not in counted)
    return total + sum(
        4 * b.numel() for b in model.buffers() if b.is_floating_point() and id(b) not in counted
    )


def decisions(layers: Iterable[LayerCost]) -> Mapping[str, list[LayerCost]]:
    """Free layers by group, in execution order; each group takes one decision."""
    groups: dict[str, list[LayerCost]] = {}
    for layer in layers:
        if layer.pinned is None:
            groups.setdefault(layer.group, []).append(layer)
    return groups
