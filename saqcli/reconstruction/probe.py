"""What a block holds, found by running it once: its layers, the sizes of their inputs, the scales of their outputs."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.reconstruction.blocks import Block

PROBED = 4  # images
LEAST_SCALE = 1e-20  # of an output that is constant


@dataclass
class Probe:
    """What one run of a block saw.

    Attributes:
        layers: its quantized layers, in order.
        values: of one image in the inputs and outputs of all layers together.
        biases: of the layers, each with the scale of what it is added to.
    """

    layers: list[QuantizedLayer]
    values: int = 0
    biases: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


@torch.no_grad()
def probe(block: Block, model: nn.Module, inputs: Any) -> Probe:
    """Run ``block`` on the first of ``inputs``."""
    named = quantized_layers(model)
    found = Probe([named[name] for name in block.layers if name in named])
    outputs: dict[QuantizedLayer, Any] = {}
    seen = 0

    def note(layer: QuantizedLayer, given: Any, output: Any) -> None:
        nonlocal seen
        seen += sum(x.numel() for x in (*given, output) if isinstance(x, Tensor))
        outputs[layer] = output

    count = min(len(inputs), PROBED)
    few = inputs[torch.arange(count)]
    block(model, few)  # the first pass with this number of images is recorded, with all that happens in it
    handles = [layer.register_forward_hook(note) for layer in found.layers]
    try:
        block(model, few)
    finally:
        for handle in handles:
            handle.remove()
    found.values = seen // max(1, count)
    for layer, output in outputs.items():
        bias = layer._parameters.get("bias")
        if bias is not None and isinstance(output, Tensor):
            found.biases.append((bias, output.std().clamp_min(LEAST_SCALE)))
    return found
