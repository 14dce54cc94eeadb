"""Budgets as they are given: numbers, quantities with units, and the cost of uniform bits."""

import math
import operator
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from typing import Any

from saqcli.config import names_table
from saqcli.errors import ConfigError
from saqcli.quant.bits import LayerBits, parse_bits
from saqcli.quant.cost import Budget, CostModel
from saqcli.quant.cost_tables.table import CostTable, TablePrice
from saqcli.quant.costs import COSTS, price_of
from saqcli.serialization import named_path, parse_json, parse_object, read_text
from saqcli.units import SETTINGS, Quantity, parse_cost, parse_quantity, parse_share

UNIFORM_BUDGET = re.compile(r"w\d+a\d+", re.IGNORECASE)  # a budget given as the cost of uniform bits
REFERENCE = LayerBits(weight=8, activation=8)  # bits whose cost a percentage refers to
BUDGETS = 'give bit-operations such as 500_000_000, "34G", "w4a4" or "50%", or a saqcli.Budget'


def read_costs(cost: str, content: Mapping[str, Any] | None = None) -> TablePrice:
    """The table of costs in the file ``cost``, or with its recorded ``content``.

    Raises:
        ConfigError: unreadable, of another version, or not as documented.
    """
    if content is not None:
        return TablePrice(parse_object(CostTable, {**content}, cost), cost)
    path = named_path(cost)
    text = read_text(path, f"`quantization.cost={cost}`")
    return TablePrice(parse_json(CostTable, text, str(path)), cost)


def cost_unit(cost: str, content: Mapping[str, Any] | None = None) -> str:
    """The unit in which ``quantization.cost`` counts.

    Raises:
        ConfigError: there is no such cost model, or no such table.
    """
    if names_table(cost):
        return read_costs(cost, content).table.counted_in
    return COSTS.find(cost, "quantization.cost").unit


def priced(costs: CostModel, cost: str, content: Mapping[str, Any] | None = None) -> CostModel:
    """``costs``, counted by the cost model of this name, or by the table in this file or with this ``content``.

    Raises:
        ConfigError: there is no such cost model, or the table is damaged or of another network.
        PluginError: one of another package is not as documented.
    """
    if names_table(cost):
        return read_costs(cost, content).applied(costs)
    price = price_of(cost, costs.layers)
    return replace(costs, price=price, unit=COSTS[cost].unit)


def budget_of(budget: int | str | Budget, name: str, costs: CostModel) -> Budget:
    """``34G``, a number of bit-operations, ``w4a4``, or ``50%`` of the cost of uniform 8 bits, as a ``Budget``.

    Raises:
        ConfigError: no such quantity.
    """
    if isinstance(budget, Budget):
        bops, size = _whole(budget.bops), _whole(budget.size)
        if bops is None and size is None:
            raise ConfigError("`budget=saqcli.Budget()` bounds nothing: give it `bops`, `size` or both")
        return Budget(bops, size, costs.unit)
    if isinstance(budget, str):
        return Budget(bops=bound_of(budget, "bops", name, costs), unit=costs.unit)
    if budget is None:
        raise ConfigError(f"`budget=None` bounds nothing: {BUDGETS}")
    return Budget(bops=_whole(budget), unit=costs.unit)


def _whole(bound: Any) -> int | None:
    """A bound as an int; floats that are whole numbers are, such as ``34e9``.

    Raises:
        ConfigError: something else.
    """
    if bound is None:
        return None
    if isinstance(bound, float) and bound.is_integer():
        return int(bound)
    if not isinstance(bound, bool):
        with suppress(TypeError):
            return operator.index(bound)
    raise ConfigError(f"a bound of `budget` is {bound!r}, which is not a whole number: {BUDGETS}")


def relative_bound(text: str, quantity: Quantity = "bops") -> tuple[LayerBits, Fraction] | None:
    """The uniform bits, and the share of their cost, that ``w4a4`` or ``50%`` stands for; None for other texts.

    Raises:
        ConfigError: bits out of range, or a share that is zero or above 100 %.
    """
    if UNIFORM_BUDGET.fullmatch(text.strip()):
        return parse_bits(text, SETTINGS[quantity]), Fraction(1)
    share = parse_share(text, quantity)
    return None if share is None else (REFERENCE, share)


def bound_of(text: str, quantity: Quantity, name: str, costs: CostModel) -> int:
    """``34G``, ``5MB``, ``w4a4`` for the cost of uniform 4 bits, or ``50%`` of that of uniform 8 bits, as a number.

    Raises:
        ConfigError: no such quantity.
    """
    if (relative := relative_bound(text, quantity)) is not None:
        bits, share = relative
        cost = costs.cost(costs.uniform(name, bits))
        return math.floor(share * (cost.bops if quantity == "bops" else cost.size))
    if quantity == "bops" and isinstance(costs.price, TablePrice):
        return parse_cost(text, costs.unit)
    return parse_quantity(text, quantity)
