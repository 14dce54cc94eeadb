"""What a bit configuration costs: bit-operations and bytes, from the traced layers alone.

    BOPs  = sum over layers of MACs * weight bits * activation bits          for one image
    bytes = weights at their bits, packed, a 32-bit step an output channel, and 32-bit floats for the rest

Counted are convolutions (projection shortcuts included) and linear layers (the classifier included), and, where
attention is quantized, its products of activations: tokens**2 * width * (b_q b_k + b_p b_v) a block; biases,
norms, pooling, additions and activations are free; an operand left in floating point counts 32 bits. First
layer and classifier have 8 bits. This is the counter of Liu et al. (arXiv:2111.12273), to the last digit.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from saqcli.quant.bits import FLOAT_BITS, PINNED_BITS, BitConfig, LayerBits, uniform
from saqcli.quant.tracer import LayerTrace, Trace
from saqcli.units import format_quantity

BUDGET_USE = 0.985  # share of the budget that a configuration should use where the candidates allow it
USE_MIDDLE = (1 + BUDGET_USE) / 2  # of the window between that share and the budget
UNITS = ("BOPs", "B")  # of the two parts of a cost


class Cost(NamedTuple):
    """What is paid for a configuration.

    Attributes:
        bops: bit-operations for one image.
        size: bytes.
    """

    bops: int
    size: int

    def __str__(self) -> str:
        """As in ``34.71 GBOPs, 5.87 MB``."""
        return f"{format_quantity(self.bops, 'BOPs')}, {format_quantity(self.size, 'B')}"


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
        channels: output channels, each with a step of its own.
        stored: False where another layer holds the same weight.
        product_macs: of products of activations that have the bits of its input, for both operands.
    """

    name: str
    kind: str
    macs: int
    weight_count: int
    group: str
    pinned: LayerBits | None
    channels: int = 0
    stored: bool = True
    product_macs: int = 0

    def own_bops(self, bits: LayerBits) -> int:
        """Bit-operations at ``bits``, of the layer alone."""
        return self.macs * (bits.weight or FLOAT_BITS) * (bits.activation or FLOAT_BITS)

    def bops(self, bits: LayerBits) -> int:
        """Bit-operations at ``bits``, those of the products that follow it included."""
        return self.own_bops(bits) + self.product_macs * (bits.activation or FLOAT_BITS) ** 2

    def size(self, bits: LayerBits) -> int:
        """Bytes of the weight at ``bits``."""
        if not self.stored:
            return 0
        steps = 4 * self.channels if bits.weight else 0
        return ceil(self.weight_count * (bits.weight or FLOAT_BITS) / 8) + steps

    def cost(self, bits: LayerBits) -> Cost:
        """Both."""
        return Cost(self.bops(bits), self.size(bits))


@dataclass(frozen=True)
class CostModel:
    """All layers of a network in execution order, and what runs in floating point whatever the bits.

    Attributes:
        layers: the quantized ones.
        unquantized: modules that multiply but are not quantized; counted at 32 bits.
        other_bytes: of everything that is no weight of a layer.
    """

    layers: tuple[LayerCost, ...]
    unquantized: tuple[LayerTrace, ...] = ()
    other_bytes: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        own = sum(layer.macs + layer.product_macs for layer in self.layers)
        return own + sum(layer.macs for layer in self.unquantized)

    @property
    def float_bops(self) -> int:
        """Bit-operations of the float model: 1024 a multiply-accumulate."""
        return self.macs * FLOAT_BITS**2

    @property
    def float_size(self) -> int:
        """Bytes of the float model."""
        nothing = LayerBits(weight=None, activation=None)
        return self.other_bytes + sum(layer.size(nothing) for layer in self.layers)

    @property
    def pins(self) -> dict[str, LayerBits | None]:
        """The pinned bits of every layer, None where free."""
        return {layer.name: layer.pinned for layer in self.layers}

    def bops(self, config: BitConfig) -> int:
        """Bit-operations under ``config``."""
        return self.cost(config).bops

    def size(self, config: BitConfig) -> int:
        """Bytes under ``config``."""
        return self.cost(config).size

    def cost(self, config: BitConfig) -> Cost:
        """Both."""
        costs = [layer.cost(config.layers[layer.name]) for layer in self.layers]
        fixed = sum(layer.macs for layer in self.unquantized) * FLOAT_BITS**2
        return Cost(
            fixed + sum(cost.bops for cost in costs), self.other_bytes + sum(cost.size for cost in costs)
        )

    def uniform(self, model: str, bits: LayerBits) -> BitConfig:
        """The configuration with ``bits`` in every layer that is not pinned."""
        return uniform(model, self.pins, bits)


@dataclass(frozen=True)
class Budget:
    """Upper bounds; None where there is none.

    Attributes:
        bops: bit-operations for one image.
        size: bytes.
    """

    bops: int | None = None
    size: int | None = None

    def bounds(self) -> list[tuple[int, int]]:
        """Index into a ``Cost`` and value of every bound."""
        return [(index, bound) for index, bound in enumerate((self.bops, self.size)) if bound is not None]

    def admits(self, cost: Cost) -> bool:
        """Whether a configuration of that cost may be used."""
        return all(cost[index] <= bound for index, bound in self.bounds())

    def used_by(self, cost: Cost) -> bool:
        """Whether that cost is ``BUDGET_USE`` of a bound at least, so that little is left over."""
        return any(cost[index] >= least_use(bound) for index, bound in self.bounds())

    def shares(self, cost: Cost) -> str:
        """As in ``499 MBOPs (99.8 % of the budget), 120 KB``: every part of a cost that is bounded, with its share."""
        bounds = dict(self.bounds())
        return ", ".join(
            format_quantity(part, unit)
            + (f" ({100 * part / bounds[index]:.1f} % of the budget)" if index in bounds else "")
            for index, (part, unit) in enumerate(zip(cost, UNITS, strict=True))
        )

    def __str__(self) -> str:
        """As in ``34 GBOPs and 5 MB``."""
        return " and ".join(format_quantity(bound, UNITS[index]) for index, bound in self.bounds())


def least_use(bound: int) -> int:
    """The least that uses ``bound``: ``BUDGET_USE`` of it, rounded up."""
    return -(-round(1000 * BUDGET_USE) * bound // 1000)


def cost_model(traced: Trace, classifiers: Iterable[str] = (), *, products: bool = False) -> CostModel:
    """The layers as the budget sees them; first and last layer are pinned to 8 bits.

    Args:
        traced: of the wrapped float model.
        classifiers: names of further layers that give class scores (a distillation head).
        products: count products of activations too, as in quantized attention.
    """
    following: dict[str, int] = {}
    for product in traced.products if products else ():
        if product.follows is not None:
            following[product.follows] = following.get(product.follows, 0) + product.macs
    names = list(traced.layers)
    reading = {name for name, layer in traced.layers.items() if layer.reads_image} or {names[0]}
    pinned = reading | {names[-1]} | set(classifiers)
    bits = LayerBits(weight=PINNED_BITS, activation=PINNED_BITS)
    layers = tuple(
        LayerCost(
            name=t.name,
            kind=t.kind,
            macs=t.macs,
            weight_count=t.weight_count,
            group=t.group,
            pinned=bits if t.name in pinned else None,
            channels=t.channels,
            stored=t.stored,
            product_macs=following.get(t.name, 0),
        )
        for t in traced.layers.values()
    )
    return CostModel(layers, tuple(traced.unquantized.values()), traced.other_bytes)
