"""Cost models: what a layer costs at given bits, in the unit of the budget ``quantization.bops``.

Bit-operations are the default. Hardware may count otherwise: where 3 bits run as 4, a search that knows it spends the
budget where it helps. To add a cost model, write a function of a layer and its bits and add it to the table below, or
in another package an entry point:

    [project.entry-points."saqcli.costs"]
    coarse = "my_package.coarse:ENTRY"          # ENTRY = CostEntry(coarse, "coarse BOPs", "one line about it")

``quantization.cost`` chooses it. Budgets, reachable ranges and shares are then counted in its unit. What is reported as
bit-operations stays that.
"""

from typing import Any, NamedTuple

from saqcli.plugins import Plugins
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
