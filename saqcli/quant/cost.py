"""Cost of a bit configuration: bit-operations and bytes, from the trace.

    BOPs  = sum over layers of MACs * weight bits * activation bits          for one image
    bytes = weights packed at their bits, a 32-bit step per output channel, and 32-bit floats for the rest

Convolutions (including projection shortcuts) and linear layers (including the classifier) are counted, and, where
attention is quantized, its products of activations: tokens**2 * width * (b_q b_k + b_p b_v) per block. Biases, norms,
pooling, additions and activations are free; an operand in floating point counts 32 bits. First layer and classifier
have 8 bits. This is the counter of Liu et al. (arXiv:2111.12273), to the last digit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import ceil
from typing import NamedTuple

from saqcli.quant.bits import FLOAT_BITS, PINNED_BITS, BitConfig, LayerBits, uniform
from saqcli.quant.tracer import LayerTrace, Trace
from saqcli.units import format_quantity

BUDGET_USE = 0.985  # least share of the budget to use, if the candidates allow it
USE_MIDDLE = (1 + BUDGET_USE) / 2  # middle of the window between that share and the budget
UNITS = ("BOPs", "B")  # of the two parts of a cost


class Cost(NamedTuple):
    """The cost of a configuration.

    Attributes:
        bops: bit-operations for one image; in a search under another cost model, what that counts.
        size: bytes.
    """

    bops: int
    size: int

    def __str__(self) -> str:
        """As in ``34.71 GBOPs, 5.87 MB``."""
        return f"{format_quantity(self.bops, 'BOPs')}, {format_quantity(self.size, 'B')}"


@dataclass(frozen=True)
class LayerCost:
    """The quantities of a layer that its cost depends on.

    Attributes:
        name: qualified name in the float model.
        kind: class name of the float layer.
        macs: multiply-accumulates for one image.
        weight_count: elements of the weight.
        group: layers of one group share their bits.
        pinned: fixed bits, or None if they are free.
        channels: output channels, each with its step.
        stored: False if another layer holds the same weight.
        product_macs: multiply-accumulates of products of activations whose operands both have the bits of its input.
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

    def layer_bops(self, bits: LayerBits) -> int:
        """Bit-operations of the layer at ``bits``, without products."""
        return self.macs * (bits.weight or FLOAT_BITS) * (bits.activation or FLOAT_BITS)

    def bops(self, bits: LayerBits) -> int:
        """Bit-operations at ``bits``, including the products that follow the layer."""
        return self.layer_bops(bits) + self.product_macs * (bits.activation or FLOAT_BITS) ** 2

    def size(self, bits: LayerBits) -> int:
        """Bytes of the weight at ``bits``."""
        if not self.stored:
            return 0
        steps = 4 * self.channels if bits.weight else 0
        return ceil(self.weight_count * (bits.weight or FLOAT_BITS) / 8) + steps


Price = Callable[[LayerCost, LayerBits], int]  # of a layer at bits, for one image


@dataclass(frozen=True)
class CostModel:
    """All layers of a network in execution order, and the parts that always run in floating point.

    Attributes:
        layers: the quantized layers.
        unquantized: modules that multiply but are not quantized; counted at 32 bits.
        other_bytes: bytes of everything except weights of layers.
        price: what a search counts in the place of bit-operations.
        unit: of the price.
        joined_bops: bit-operations of junctions, if they are counted; the same whatever the bits of layers are.
    """

    layers: tuple[LayerCost, ...]
    unquantized: tuple[LayerTrace, ...] = ()
    other_bytes: int = 0
    price: Price = LayerCost.bops
    unit: str = UNITS[0]
    joined_bops: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        quantized = sum(layer.macs + layer.product_macs for layer in self.layers)
        return quantized + sum(layer.macs for layer in self.unquantized)

    @property
    def float_bops(self) -> int:
        """Bit-operations of the float model: 1024 per multiply-accumulate."""
        return self.macs * FLOAT_BITS**2

    @property
    def float_size(self) -> int:
        """Bytes of the float model."""
        unquantized = LayerBits(weight=None, activation=None)
        return self.other_bytes + sum(layer.size(unquantized) for layer in self.layers)

    @property
    def pins(self) -> dict[str, LayerBits | None]:
        """The pinned bits of every layer, None if free."""
        return {layer.name: layer.pinned for layer in self.layers}

    def bops(self, config: BitConfig) -> int:
        """Bit-operations under ``config``, whatever the price."""
        return replace(self, price=LayerCost.bops, unit=UNITS[0]).cost(config).bops

    def size(self, config: BitConfig) -> int:
        """Bytes under ``config``."""
        return self.cost(config).size

    def layer_cost(self, layer: LayerCost, bits: LayerBits) -> Cost:
        """Price and bytes of a layer at ``bits``."""
        return Cost(self.price(layer, bits), layer.size(bits))

    def cost(self, config: BitConfig) -> Cost:
        """Price, by default bit-operations, and bytes under ``config``."""
        costs = [self.layer_cost(layer, config.layers[layer.name]) for layer in self.layers]
        in_float = LayerBits(weight=None, activation=None)
        fixed = sum(
            self.price(LayerCost(layer.name, layer.kind, layer.macs, 0, layer.name, None), in_float)
            for layer in self.unquantized
        )
        if self.unit == UNITS[0]:
            fixed += self.joined_bops
        return Cost(
            fixed + sum(cost.bops for cost in costs), self.other_bytes + sum(cost.size for cost in costs)
        )

    def uniform(self, model: str, bits: LayerBits) -> BitConfig:
        """The configuration with ``bits`` in every layer that is not pinned."""
        return uniform(model, self.pins, bits)


@dataclass(frozen=True)
class Budget:
    """Upper bounds of a cost; None means unbounded.

    Attributes:
        bops: bit-operations for one image, or another cost, counted in ``unit``.
        size: bytes.
        unit: of ``bops``.
    """

    bops: int | None = None
    size: int | None = None
    unit: str = UNITS[0]

    @property
    def bit_operations(self) -> int | None:
        """The bound of bit-operations; None without one, or if another cost is bounded."""
        return self.bops if self.unit == UNITS[0] else None

    @property
    def units(self) -> tuple[str, str]:
        """Units of the two parts of a cost."""
        return self.unit, UNITS[1]

    def bounds(self) -> list[tuple[int, int]]:
        """Index into a ``Cost`` and value of every bound."""
        return [(index, bound) for index, bound in enumerate((self.bops, self.size)) if bound is not None]

    def admits(self, cost: Cost) -> bool:
        """Whether the cost is within all bounds."""
        return all(cost[index] <= bound for index, bound in self.bounds())

    def used_by(self, cost: Cost) -> bool:
        """Whether the cost is at least ``BUDGET_USE`` of a bound."""
        return any(cost[index] >= least_use(bound) for index, bound in self.bounds())

    def shares(self, cost: Cost) -> str:
        """As in ``499 MBOPs (99.8 % of the budget), 120 KB``: the cost, with the share of every bound."""
        bounds = dict(self.bounds())
        return ", ".join(
            format_quantity(part, unit)
            + (f" ({100 * part / bounds[index]:.1f} % of the budget)" if index in bounds else "")
            for index, (part, unit) in enumerate(zip(cost, self.units, strict=True))
        )

    def __str__(self) -> str:
        """As in ``34 GBOPs and 5 MB``."""
        return " and ".join(format_quantity(bound, self.units[index]) for index, bound in self.bounds())


def least_use(bound: int) -> int:
    """The smallest cost that uses ``bound``: ``BUDGET_USE`` of it, rounded up."""
    return -(-round(1000 * BUDGET_USE) * bound // 1000)


def cost_model(
    traced: Trace, classifiers: Iterable[str] = (), *, products: bool = False, joined_bops: int = 0
) -> CostModel:
    """The cost model of a traced network; first and last layer are pinned to 8 bits.

    Args:
        traced: trace of the wrapped float model.
        classifiers: names of further layers that return class scores (a distillation head).
        products: also count products of activations, as in quantized attention.
        joined_bops: bit-operations of junctions, which are free in the counter of the paper.
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
    return CostModel(layers, tuple(traced.unquantized.values()), traced.other_bytes, joined_bops=joined_bops)
