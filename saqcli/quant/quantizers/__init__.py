"""The family of quantizers: one file each, one line each in the table.

A quantizer is a module that maps a tensor onto a ``Grid``, with a clipping level for every candidate
bit-width. To add one: write ``saqcli/quant/quantizers/NAME.py`` with a weight and an activation class derived
from ``Quantizer``, and add its line here. The property tests run over the table.
"""

from typing import NamedTuple

from saqcli.quant.quantizers.base import Quantizer
from saqcli.quant.quantizers.clip import ClipActivation, ClipWeight


class Family(NamedTuple):
    """The two halves of a quantizer and what a list of quantizers says about it."""

    weight: type[Quantizer]
    activation: type[Quantizer]
    description: str


QUANTIZERS: dict[str, Family] = {
    "clip": Family(ClipWeight, ClipActivation, "learned clipping level, as in SAQ (arXiv:2111.12273)"),
}

__all__ = ["QUANTIZERS", "Family", "Quantizer"]
