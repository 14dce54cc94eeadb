"""Bits per layer: the policy that a search returns and a run uses.

``policy.json`` is this object, one line per layer, and can be edited by hand.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from saqcli.errors import ConfigError, PolicyMismatch
from saqcli.serialization import json_text, printable

MIN_BITS, MAX_BITS = 2, 8
FLOAT_BITS = 32  # counted for an operand that stays in floating point
PINNED_BITS = 8  # of first layer and classifier, Liu et al. (arXiv:2111.12273), section 5

_WIDTHS = {str(bits) for bits in range(MIN_BITS, MAX_BITS + 1)}

Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS, strict=True)]


class LayerBits(BaseModel):
    """Bit-widths of one layer; None keeps that operand in floating point."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: Bits | None
    activation: Bits | None

    def __str__(self) -> str:
        """As in ``w4a4``."""
        return f"w{self.weight or FLOAT_BITS}a{self.activation or FLOAT_BITS}"


class BitConfig(BaseModel):
    """The bits of every quantized layer of one network; the content of ``policy.json``.

    Attributes:
        schema_version: version of the file format.
        model: canonical name, such as ``timm/resnet18``.
        layers: bits by qualified name in the float model, in execution order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    layers: dict[str, LayerBits]

    def check_fits(self, model: str, names: list[str], source: str = "the policy") -> None:
        """Check that the policy was made for this network; messages call the policy ``source``.

        Raises:
            PolicyMismatch: names the layers that differ.
        """
        missing = [name for name in names if name not in self.layers]
        unknown = [name for name in self.layers if name not in set(names)]
        if missing or unknown:
            parts = [
                f"{title} {', '.join(printable(name, 100) for name in some[:5])}"
                f"{f' and {len(some) - 5} more' if len(some) > 5 else ''}"
                for title, some in (("missing layers", missing), ("unknown layers", unknown))
                if some
            ]
            raise PolicyMismatch(
                f"{source}{'' if self.model == model else f', made for {printable(self.model, 100)},'} does not fit "
                f"{model}: "
                f"{'; '.join(parts)}. "
                "Search a policy for this model, or edit the names"
            )

    def to_json(self) -> str:
        """The text of ``policy.json``, one line per layer, so that it can be edited and compared."""
        lines = ",\n".join(
            f"    {json_text(name)}: {bits.model_dump_json()}" for name, bits in self.layers.items()
        )
        return (
            f'{{\n  "schema_version": {self.schema_version},\n  "model": {json_text(self.model)},\n'
            f'  "layers": {{\n{lines}\n  }}\n}}\n'
        )


def parse_bits(text: str, setting: str = "quantization.bits") -> LayerBits:
    """Parse ``4`` or ``w4a8``, the bits of every layer that is not pinned; messages name ``setting``.

    Raises:
        ConfigError: not of that form, or a width outside 2..8.

    Example:
        >>> str(parse_bits("w4a8"))
        'w4a8'
    """
    match = re.fullmatch(r"\s*(?:(\d+)|w(\d+)a(\d+))\s*", text, re.IGNORECASE)
    if match is None:
        raise ConfigError(f"`{setting}={text}` is not a bit-width: give one number such as 4, or w4a8")
    weight, activation = (int(match[1]),) * 2 if match[1] else (int(match[2]), int(match[3]))
    for bits in (weight, activation):
        if not MIN_BITS <= bits <= MAX_BITS:
            raise ConfigError(
                f"`{setting}={text}` asks for {bits} bits: quantizers have {MIN_BITS} to {MAX_BITS}. "
                "Omit `quantization.bits` for the float model"
            )
    return LayerBits(weight=weight, activation=activation)


def parse_candidates(text: str, setting: str = "quantization.candidates") -> tuple[int, ...]:
    """Parse ``2,3,4``, the bit-widths a layer may have; ascending, without repeats. Messages name ``setting``.

    Raises:
        ConfigError: not a list of integers from 2 to 8.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part in _WIDTHS for part in parts):
        raise ConfigError(
            f"`{setting}={text}`: give bit-widths from {MIN_BITS} to {MAX_BITS}, such as 2,3,4,5,6,8"
        )
    return tuple(sorted({int(part) for part in parts}))


def uniform(model: str, pins: Mapping[str, LayerBits | None], bits: LayerBits) -> BitConfig:
    """The configuration that gives ``bits`` to every layer that is not pinned.

    Args:
        model: canonical name of the network.
        pins: every layer by name, in execution order; its bits if it is pinned, else None.
        bits: of all other layers.
    """
    return BitConfig(model=model, layers={name: pin or bits for name, pin in pins.items()})


def mean_bits(layers: Mapping[str, LayerBits], macs: Mapping[str, int]) -> tuple[float, float]:
    """Mean bits of weights and of inputs over all multiply-accumulates.

    Args:
        layers: bits of every layer; an operand in floating point counts 32.
        macs: multiply-accumulates of every layer for one image.
    """
    total = sum(macs[name] for name in layers) or 1
    weights = sum(macs[name] * (bits.weight or FLOAT_BITS) for name, bits in layers.items())
    inputs = sum(macs[name] * (bits.activation or FLOAT_BITS) for name, bits in layers.items())
    return weights / total, inputs / total
