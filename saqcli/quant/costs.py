"""Cost models: what a layer costs at given bits, in the unit of the budget ``quantization.bops``.

Bit-operations are the default. Hardware may count otherwise: where 3 bits run as 4, a search that knows it spends the
budget where it helps. To add a cost model, write a function of a layer and its bits and add it to the table below, or
in another package an entry point:

    [project.entry-points."saqcli.costs"]
    coarse = "my_package.coarse:ENTRY"          # ENTRY = CostEntry(coarse, "coarse BOPs", "one line about it")

``quantization.cost`` chooses it. Budgets, reachable ranges and shares are then counted in its unit. What is reported as
bit-operations stays that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, NamedTuple

from saqcli.plugins import Plugins
from saqcli.quant.bits import MAX_BITS, MIN_BITS, LayerBits
from saqcli.quant.cost import UNITS, LayerCost, Price


class CostEntry(NamedTuple):
    """A cost model in the table.

    Attributes:
        cost: a whole number, 0 or more, for one image, from a layer (``macs``, ``product_macs`` of the products that
            follow it, ``kind``, ``channels``, ...) and its bits, where None is floating point. More bits of weights or
            inputs never cost less. Modules that stay in floating point are counted too, with ``macs`` alone.
        unit: as in ``34.7 Gcycles``, without prefix; only the first entry counts ``BOPs``.
        description: one line for lists of cost models.
    """

    cost: Price
    unit: str
    description: str = ""


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    if not isinstance(plugin, CostEntry):
        return f"it is a {type(plugin).__name__}, not a CostEntry"
    if plugin.unit == UNITS[0]:
        return f"its unit is {UNITS[0]}, which only bit-operations have"
    return None if callable(plugin.cost) else "its `cost` cannot be called"


_OURS = {"bops": CostEntry(LayerCost.bops, UNITS[0], "MACs times weight bits times activation bits")}
COSTS: Plugins[CostEntry] = Plugins("costs", "cost model", _OURS, _problem)


@dataclass(frozen=True)
class _Watched:
    """The price of a cost model of another package, which is named if it fails."""

    name: str
    price: Price

    def __call__(self, layer: LayerCost, bits: LayerBits) -> int:
        with COSTS.blamed(self.name):
            price = self.price(layer, bits)
        if type(price) is not int or price < 0:
            reason = f"layer {layer.name} at {bits} costs {price!r}, which is no whole number from 0 on"
            raise COSTS.failure(self.name, reason)
        return price


def price_of(name: str, layers: Iterable[LayerCost]) -> Price:
    """The price of the cost model ``name``; one of another package is watched, and tried on ``layers``.

    Raises:
        ConfigError: there is no such cost model.
        PluginError: one of another package failed, returned no whole number from 0 on, or less for more bits.
    """
    entry = COSTS.find(name, "quantization.cost")
    if COSTS.is_ours(name):
        return entry.cost
    price = _Watched(name, entry.cost)
    for layer in layers:
        _check_grows(name, price, layer)
    return price


def _check_grows(name: str, price: Price, layer: LayerCost) -> None:
    """Check that no layer costs less with more bits of weights or of inputs."""
    widths = (*range(MIN_BITS, MAX_BITS + 1), None)
    table = {(w, a): price(layer, LayerBits(weight=w, activation=a)) for w, a in product(widths, repeat=2)}
    for fewer, more in pairwise(widths):
        for other in widths:
            for less, then in (((fewer, other), (more, other)), ((other, fewer), (other, more))):
                if table[less] > table[then]:
                    low, high = (LayerBits(weight=w, activation=a) for w, a in (less, then))
                    reason = (
                        f"layer {layer.name} costs {table[less]} at {low} and less, {table[then]}, at {high}"
                    )
                    raise COSTS.failure(name, reason)
