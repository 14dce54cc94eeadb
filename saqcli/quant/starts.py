"""The start of each layer's quantizers by the error of its output.

The least quantization error of a tensor is a guess at what matters, the error of the layer's output. So each quantizer
is fitted in several ways: under several exponents p of the error, and in ways of its own, such as with and without a
shift of the range. The one is kept with the least sum of squared errors of the layer's output on calibration images,

    weights    sum || X W' - X Q(W)' ||**2         inputs in floating point
    inputs     sum || X W' - Q(X) W' ||**2         weights in floating point

computed by the layer itself, so that strides, groups and padding are what they are. At equal error the first stays: the
way of the scheme.

Source: Nagel et al., arXiv:2004.10568, section 3, for the error of a layer's output as a proxy of the loss.
"""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from saqcli.quant.layer import QuantizedLayer
from saqcli.quant.quantizers.base import Quantizer

POWERS = (2.0, 2.4)  # exponents that are tried beside that of the scheme


@torch.no_grad()
def choose_starts(layer: QuantizedLayer, samples: Tensor | None, inputs: Sequence[Tensor]) -> None:
    """Fit the quantizers of ``layer`` for the least error of its output, each bit-width on its own.

    Args:
        layer: with fitted quantizers; those of a weight that it shares with another layer are left unchanged.
        samples: values of its input, to fit the input quantizer to; None to leave that as it is.
        inputs: of the layer, each (n, ...); nothing is changed if there are none.
    """
    if not inputs:
        return
    weights, own = layer.weight_quantizer, layer.input_quantizer
    device = layer.latent_weight().device
    inputs = [x.to(device) for x in inputs]
    try:
        layer.weight_quantizer = layer.input_quantizer = nn.Identity()
        exact = [_output(layer, x) for x in inputs]

        def error(attribute: str, quantizer: Quantizer) -> float:
            try:
                setattr(layer, attribute, quantizer)
                outputs = (_output(layer, x) for x in inputs)
                return sum(float((one - two).square().sum()) for one, two in zip(outputs, exact, strict=True))
            finally:
                setattr(layer, attribute, nn.Identity())

        if isinstance(weights, Quantizer) and not layer.tied_to:
            x = layer.effective_weight().detach()
            _choose(weights, x, lambda: error("weight_quantizer", weights))
        if isinstance(own, Quantizer) and samples is not None:
            _choose(own, samples.to(device), lambda: error("input_quantizer", own))
    finally:
        layer.weight_quantizer, layer.input_quantizer = weights, own


def _output(layer: QuantizedLayer, x: Tensor) -> Tensor:
    output: Tensor = layer(x)
    return output.double()


def _choose(quantizer: Quantizer, x: Tensor, error: Callable[[], float]) -> None:
    """Give every candidate of ``quantizer`` the parameters of the fit with the least ``error``."""
    power, active = quantizer.error_power, quantizer.bits
    best: dict[str, Tensor] = {}
    least: dict[int, float] = {}
    ways = product(dict.fromkeys((power, *POWERS)), quantizer.fits())
    try:
        for exponent, fit in ways:
            quantizer.error_power = exponent
            fit(x)
            state = quantizer.state_dict()
            best = best or {name: value.clone() for name, value in state.items()}
            for position, bits in enumerate(quantizer.candidates):
                quantizer.select(bits)
                found = error()
                if found < least.get(bits, float("inf")):
                    least[bits] = found
                    for name, value in best.items():
                        value[position] = state[name][position]
    finally:
        quantizer.error_power = power
        quantizer.select(active)
    quantizer.load_state_dict(best)
