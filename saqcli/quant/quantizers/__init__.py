"""Quantizers: modules that map a tensor onto a ``Grid``.

Every candidate bit-width has parameters of its own. To add one, write ``saqcli/quant/quantizers/NAME.py`` with a weight
and an activation class derived from ``Quantizer``, and add its line here. The property tests run over the table.
"""

from typing import NamedTuple

from saqcli.quant.quantizers.base import Quantizer, quantizers_of
from saqcli.quant.quantizers.clip import ClipActivation, ClipWeight, NormalizedClipWeight
from saqcli.quant.quantizers.dorefa import DorefaActivation, DorefaWeight, PactActivation, PactWeight
from saqcli.quant.quantizers.learned_step import LsqActivation, LsqPlusActivation, LsqPlusWeight, LsqWeight


class Family(NamedTuple):
    """The two halves of a quantizer and what a list of quantizers says about it.

    Attributes:
        weight: class for weights.
        activation: class for the inputs of layers.
        description: one line.
        normalized: class for weights under weight normalization; None where there is none.
    """

    weight: type[Quantizer]
    activation: type[Quantizer]
    description: str
    normalized: type[Quantizer] | None = None


QUANTIZERS: dict[str, Family] = {
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

__all__ = ["QUANTIZERS", "Family", "Quantizer", "quantizers_of"]
