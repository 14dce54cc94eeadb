"""Quantizers: modules that map a tensor onto a grid.

Every candidate bit-width has its own parameters. To add a quantizer, write ``saqcli/quant/quantizers/NAME.py`` with
classes for weights, for inputs of layers, or for both, derived from ``Quantizer``, and add a line to the table below;
another package declares an entry point (see ``saqcli.plugins``). The property tests run over the table.
"""

from dataclasses import dataclass
from typing import Any

from saqcli.plugins import Plugins
from saqcli.quant.grid import AnyGrid, Grid, LevelTable, ShiftedGrid
from saqcli.quant.quantizers.asymmetric import AsymmetricActivation, AsymmetricWeight
from saqcli.quant.quantizers.base import LevelQuantizer, Quantizer, quantizers_of
from saqcli.quant.quantizers.clip import ClipActivation, ClipWeight, NormalizedClipWeight
from saqcli.quant.quantizers.dorefa import DorefaActivation, DorefaWeight, PactActivation, PactWeight
from saqcli.quant.quantizers.learned_step import LsqActivation, LsqPlusActivation, LsqPlusWeight, LsqWeight
from saqcli.quant.quantizers.levels import AdaptiveActivation, Log2Activation


@dataclass(frozen=True)
class QuantizerEntry:
    """The classes of a quantizer and its description.

    Attributes:
        description: one line for lists of quantizers.
        weight: class for weights; None if it has none.
        activation: class for the inputs of layers; None if it has none.
        normalized: class for weights with weight normalization; None if not supported.
    """

    description: str
    weight: type[Quantizer] | None = None
    activation: type[Quantizer] | None = None
    normalized: type[Quantizer] | None = None


def _problem(plugin: Any) -> str | None:
    """Why ``plugin`` is no entry of the table, or None."""
    if not isinstance(plugin, QuantizerEntry):
        return f"it is a {type(plugin).__name__}, not a QuantizerEntry"
    if plugin.weight is None and plugin.activation is None:
        return "it has neither a weight nor an activation class"
    kinds: list[Any] = [plugin.weight, plugin.normalized, plugin.activation]
    for kind in filter(None, kinds):
        if not (isinstance(kind, type) and issubclass(kind, Quantizer)):
            return f"{kind!r} is not derived from Quantizer"
        missing = sorted(kind.__abstractmethods__)
        if missing:
            return f"{kind.__name__} does not define {', '.join(missing)}"
    return next((reason for bits in range(2, 9) for reason in _wrong_grids(plugin, bits)), None)


def _wrong_grids(entry: QuantizerEntry, bits: int) -> list[str]:
    grids: list[tuple[type[Quantizer], Any]] = []
    for weight in filter(None, (entry.weight, entry.normalized)):
        grids += [(weight, weight.weight_grid(bits, kind)) for kind in weight.weight_grids]
    if entry.activation:
        inputs = entry.activation
        grids += [(inputs, inputs.activation_grid(bits, signed=signed)) for signed in (False, True)]
    return [
        f"the grid of {kind.__name__} is not a Grid or LevelTable of at most {2**bits} codes at {bits} bits"
        for kind, grid in grids
        if not isinstance(grid, AnyGrid) or grid.levels > 2**bits
    ]


_OURS = {
    "clip": QuantizerEntry(
        "learned clipping level, as in SAQ (arXiv:2111.12273)",
        ClipWeight,
        ClipActivation,
        NormalizedClipWeight,
    ),
    "lsq": QuantizerEntry("learned step (arXiv:1902.08153)", LsqWeight, LsqActivation),
    "lsq_plus": QuantizerEntry(
        "learned step, inputs with a learned offset (arXiv:2004.09576)", LsqPlusWeight, LsqPlusActivation
    ),
    "asymmetric": QuantizerEntry(
        "learned step, ranges from a lowest code of each channel (arXiv:1712.05877)",
        AsymmetricWeight,
        AsymmetricActivation,
    ),
    "pact": QuantizerEntry(
        "tanh weights, inputs clipped where learned (arXiv:1805.06085)", PactWeight, PactActivation
    ),
    "dorefa": QuantizerEntry(
        "tanh weights, nothing learned (arXiv:1606.06160)", DorefaWeight, DorefaActivation
    ),
    "log2": QuantizerEntry("inputs on powers of two (arXiv:2111.13824)", activation=Log2Activation),
    "adaptive": QuantizerEntry(
        "inputs on the best of uniform, split and log2 levels", activation=AdaptiveActivation
    ),
}
QUANTIZERS: Plugins[QuantizerEntry] = Plugins("quantizers", "quantizer", _OURS, _problem)


def name_of(quantizer: Quantizer) -> str:
    """The name in ``QUANTIZERS`` of the entry that has the class of ``quantizer``, else the name of the class."""
    kind = type(quantizer)
    names = (
        name
        for name, entry in QUANTIZERS.items()
        if kind in (entry.weight, entry.activation, entry.normalized)
    )
    return next(names, kind.__name__)


__all__ = [
    "QUANTIZERS",
    "ClipActivation",
    "ClipWeight",
    "Grid",
    "LevelQuantizer",
    "LevelTable",
    "NormalizedClipWeight",
    "Quantizer",
    "QuantizerEntry",
    "ShiftedGrid",
    "name_of",
    "quantizers_of",
]
