"""A table of costs as a cost model: milliseconds, energy or cycles of each layer by the widths of its operands.

    {
      "schema_version": 1,
      "unit": "ms",
      "layers": {"conv1": {"w8a8": 0.12, "float": 0.21}, "layer1.0.conv1": {"w4a8": 0.29, "w8a8": 0.31, "float": 0.66}},
      "other": 0.4
    }

A table has few widths, those that its device has. A layer at other bits runs in a wider container, and may always do
so. Therefore

    cost(weight bits w, input bits a) = least cost of the entries wW aA of the layer with W >= w and A >= a

which never falls when bits rise, whatever noise the entries have: an entry that costs more than a wider one counts as
that wider one, and a note names the layer. ``float`` is the cost of a layer that stays in floating point, and no upper
bound: integers may be slower.

Costs are counted in whole numbers, so that a budget is met exactly: times in picoseconds, energies in picojoules,
rounded up; other units must be whole numbers.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saqcli.errors import ConfigError
from saqcli.quant.bits import LayerBits
from saqcli.quant.cost import UNITS, CostModel, LayerCost
from saqcli.serialization import printable, some
from saqcli.units import FINE_UNITS, counted, fine_unit

IN_FLOAT = "float"
_WIDTHS = re.compile(r"w([1-9]|[12]\d|3[0-2])a([1-9]|[12]\d|3[0-2])")
_UNIT = re.compile(r"[A-Za-z][A-Za-z0-9-]{0,19}")
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class CostTable(BaseModel):
    """The content of a file of costs.

    Attributes:
        schema_version: version of the file format.
        unit: of all costs: a time (``s``, ``ms``, ``us``, ``ns``, ``ps``), an energy (``J``, ``mJ``, ...), or a word
            for whole numbers, such as ``cycles``.
        layers: by qualified name in the float model, costs by widths (``w4a8``, ``float``).
        other: cost of everything else, whatever the bits.
        about: where the costs come from, for people.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    unit: str
    layers: dict[str, dict[str, Amount]]
    other: Amount = 0.0
    about: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_as_documented(self) -> Self:
        fine, _ = fine_unit(self.unit)
        if not _UNIT.fullmatch(self.unit) or self.unit.lower() in {unit.lower() for unit in UNITS}:
            raise ValueError(f"unit {printable(self.unit, 40)!r} is not one such as ms, mJ or cycles")
        for name, costs in self.layers.items():
            for widths in costs:
                if widths != IN_FLOAT and not _WIDTHS.fullmatch(widths):
                    raise ValueError(
                        f"layer {printable(name, 80)} has {printable(widths, 40)!r} in the place of widths such as w4a8"
                    )
        amounts = [cost for costs in self.layers.values() for cost in costs.values()] + [self.other]
        if fine not in FINE_UNITS and any(amount != int(amount) for amount in amounts):
            raise ValueError(f"costs in {self.unit} are whole numbers: choose a smaller unit")
        return self

    @property
    def counted_in(self) -> str:
        """The unit of the whole numbers that a search counts."""
        return fine_unit(self.unit)[0]

    def whole(self, amount: float) -> int:
        """``amount`` in ``counted_in``, rounded up."""
        exact = Fraction(str(amount)) * fine_unit(self.unit)[1]
        return -int(-exact // 1)


@dataclass(frozen=True)
class TablePrice:
    """The price of a layer at bits, from a table.

    Attributes:
        table: the costs.
        source: the file, for messages.
    """

    table: CostTable
    source: str

    @cached_property
    def _entries(self) -> dict[str, dict[tuple[int, int], int]]:
        """Costs of every layer by its widths of weights and inputs."""
        return {
            name: {
                (int(match[1]), int(match[2])): self.table.whole(cost)
                for widths, cost in costs.items()
                if (match := _WIDTHS.fullmatch(widths))
            }
            for name, costs in self.table.layers.items()
        }

    def __call__(self, layer: LayerCost, bits: LayerBits) -> int:
        """The cost of ``layer`` in ``table.counted_in``; a module that is never quantized may be absent.

        Raises:
            ConfigError: the table has no cost of it.
        """
        if bits.weight is None or bits.activation is None:
            cost = self.table.layers.get(layer.name, {}).get(IN_FLOAT)
            return 0 if cost is None else self.table.whole(cost)
        fits = self._fitting(layer.name, bits.weight, bits.activation)
        if not fits:
            has = ", ".join(self.table.layers.get(layer.name, {})) or "nothing"
            raise ConfigError(
                f"`quantization.cost={self.source}` has no cost of layer {layer.name} at {bits} or wider, it has "
                f"{has}: add it, or use other `quantization.candidates`"
            )
        return min(fits.values())

    def _fitting(self, name: str, weight: int, activation: int) -> dict[tuple[int, int], int]:
        found = self._entries.get(name, {})
        return {each: cost for each, cost in found.items() if each[0] >= weight and each[1] >= activation}

    def repaired(self) -> list[str]:
        """The layers with an entry that costs more than a wider one, and counts as that."""
        return [
            name
            for name, found in self._entries.items()
            if any(min(self._fitting(name, *widths).values()) < cost for widths, cost in found.items())
        ]

    def applied(self, costs: CostModel) -> CostModel:
        """``costs``, counted by the table.

        Raises:
            ConfigError: layers of the network are missing.
        """
        missing = [layer.name for layer in costs.layers if not self._entries.get(layer.name)]
        if missing:
            raise ConfigError(
                f"`quantization.cost={self.source}` has no costs of {counted(len(missing), 'layer')} of this network "
                f"({some(missing, 3)}): add them, or measure another table"
            )
        return replace(
            costs,
            price=self,
            unit=self.table.counted_in,
            other_price=self.table.whole(self.table.other),
            notes=tuple(self._notes()),
        )

    def _notes(self) -> Iterable[str]:
        repaired = self.repaired()
        if repaired:
            yield (
                f"{self.source}: {counted(len(repaired), 'layer')} ({some(repaired, 3)}) cost more at some bits than "
                "at more bits, and count as the latter"
            )
