"""Quantizers: modules that map a tensor onto a ``Grid``.

Every candidate bit-width has its own parameters. To add a quantizer, write ``saqcli/quant/quantizers/NAME.py`` with a
weight and an activation class derived from ``Quantizer``, and add a line to the table below. The property tests run
over the table.
"""

from typing import Any, NamedTuple

from saqcli.plugins import Plugins
from saqcli.quant.quantizers.base import Quantizer, quantizers_of
from saqcli.quant.quantizers.clip import ClipActivation, ClipWeight, NormalizedClipWeight
from saqcli.quant.quantizers.dorefa import DorefaActivation, DorefaWeight, PactActivation, PactWeight
from saqcli.quant.quantizers.learned_step import LsqActivation, LsqPlusActivation, LsqPlusWeight, LsqWeight


class Family(NamedTuple):
    """The classes of a quantizer and its description.

    Attributes:
        weight: class for weights.
        activation: class for the inputs of layers.
        description: one line for lists of quantizers.
        normalized: class for weights with weight normalization; None if not supported.
    """

    weight: type[Quantizer]
    activation: type[Quantizer]
    description: str
    normalized: type[Quantizer] | None = None


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    return None if isinstance(plugin, Family) else f"it is a {type(plugin).__name__}, not a Family"


_OURS = {
    "clip": Family(
        ClipWeight,
        ClipActivation,
        "learned clipping level, as in SAQ (arXiv:2111.12273)",
        NormalizedClipWeight,
    ),
    "lsq": Family(LsqWeight, LsqActivation, "learned step (arXiv:1902.08153)"),
    "lsq_plus": Family(
        LsqPlusWeight, LsqPlusActivation, "learned step, inputs with a learned offset (arXiv:2004.09576)"
    ),
    "pact": Family(
        PactWeight, PactActivation, "tanh weights, inputs clipped where learned (arXiv:1805.06085)"
    ),
    "dorefa": Family(DorefaWeight, DorefaActivation, "tanh weights, nothing learned (arXiv:1606.06160)"),
}
QUANTIZERS: Plugins[Family] = Plugins("quantizers", "quantizer", _OURS, _problem)

__all__ = ["QUANTIZERS", "Family", "Quantizer", "quantizers_of"]
