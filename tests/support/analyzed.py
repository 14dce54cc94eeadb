"""Small quantized networks with images, to be analyzed."""

from collections.abc import Callable
from typing import Any

import torch

from saqcli.analysis import AnalysisInput
from saqcli.quant.bits import LayerBits
from tests.support.networks import CLASSES, NETWORKS, images, quantize

COUNT = 24
Bits = Callable[[Any], dict[str, LayerBits]]


def subject_of(
    name: str = "conv_bn", bits: Bits | None = None, batch: int = 7, dtype: torch.dtype = torch.float64
) -> AnalysisInput:
    """A quantized network and images labelled with its own answers, so that its loss is that of a trained network."""
    made = quantize(NETWORKS[name], bits) if bits else quantize(NETWORKS[name])
    model = made.model.to(dtype).eval()
    pictures = images(COUNT, seed=5).to(dtype)
    with torch.no_grad():
        labels = model(pictures).argmax(1)
        labels[::6] = (labels[::6] + 1) % CLASSES  # and a few misclassified
    batches = list(zip(pictures.split(batch), labels.split(batch), strict=True))
    return AnalysisInput(model, made.layers, batches, made.facts.scheme)
