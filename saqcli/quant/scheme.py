"""How a network is quantized, apart from the bits of each layer: from a layer and its candidates to its quantizers."""

from collections.abc import Iterable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from saqcli.errors import ConfigError
from saqcli.quant import grids
from saqcli.quant.calibrate import ClipInit
from saqcli.quant.grids import WeightGrid
from saqcli.quant.layers import QuantizedLayer, is_convolution
from saqcli.quant.quantizers import QUANTIZERS, Family, Quantizer


class Scheme(BaseModel):
    """How a network is quantized, apart from the bits of each layer.

    Attributes:
        quantizer: name in ``QUANTIZERS``.
        weight_grid: ``auto`` (the paper's up to 7 bits, int8 at 8), ``paper`` or ``zero``.
        granularity: a clipping level per output ``channel`` of a weight, or one per ``tensor``.
        weight_normalization: quantize the weights of convolutions in deviations from their mean (``clip`` alone).
        clip_init: levels start at the least squared ``error``, or as in the SAQ ``paper`` (``clip`` alone).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quantizer: str = "clip"
    weight_grid: WeightGrid = "auto"
    granularity: Literal["channel", "tensor"] = "channel"
    weight_normalization: bool = False
    clip_init: ClipInit = "error"

    def check(self) -> None:
        """Refuse an unknown quantizer, and options that the quantizer does not have.

        Raises:
            ConfigError: names the option.
        """
        if _family(self.quantizer).normalized is not None:
            return
        able = ", ".join(name for name, family in QUANTIZERS.items() if family.normalized is not None)
        if self.weight_normalization:
            raise ConfigError(
                f"quantizer {self.quantizer} has no weight normalization: choose {able}, or --no-weight-norm"
            )
        if self.clip_init == "paper":
            raise ConfigError(
                f"clip_init paper is not defined for quantizer {self.quantizer}: choose {able}, or clip_init error"
            )

    def level_shape(self, layer: QuantizedLayer) -> tuple[int, ...]:
        """Shape of one clipping level of the layer's weight; broadcasts against it."""
        weight = layer.latent_weight()
        if self.granularity == "tensor":
            return ()
        return tuple(size if d == layer.channel_dim else 1 for d, size in enumerate(weight.shape))

    def weight_quantizer(self, layer: QuantizedLayer, candidates: Iterable[int]) -> Quantizer:
        """A quantizer for the layer's weight, its levels not yet fitted."""
        self.check()
        family = _family(self.quantizer)
        kind = family.weight
        if self.weight_normalization and is_convolution(layer):
            assert family.normalized is not None
            kind = family.normalized
        by_bits = {bits: grids.weights(bits, self.weight_grid) for bits in candidates}
        return kind(by_bits, self.level_shape(layer)).to(layer.latent_weight().device)

    def input_quantizer(self, layer: QuantizedLayer, candidates: Iterable[int], *, signed: bool) -> Quantizer:
        """A quantizer for the layer's input, its levels not yet fitted."""
        family = _family(self.quantizer)
        by_bits = {bits: grids.activations(bits, signed=signed) for bits in candidates}
        return family.activation(by_bits).to(layer.latent_weight().device)


def _family(name: str) -> Family:
    if name not in QUANTIZERS:
        raise ConfigError(f"there is no quantizer {name!r}: choose from {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name]
