"""What a block holds, found by running it once: its layers, the sizes of their inputs, biases and shifts of norms."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.reconstruction.blocks import Block

BatchNorm = nn.modules.batchnorm._BatchNorm
PROBED = 4  # images
LEAST_SCALE = 1e-20  # of an output that is constant


@dataclass
class Probe:
    """What one run of a block saw.

    Attributes:
        layers: its quantized layers, in order.
        values: of one image in the inputs of all layers together.
        shifts: biases of layers and shifts of batch norms, each with the scale of what it is added to.
    """

    layers: list[QuantizedLayer]
    values: int = 0
    shifts: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


@torch.no_grad()
def probe(block: Block, model: nn.Module, inputs: Any) -> Probe:
    """Run ``block`` on the first of ``inputs``."""
    named = quantized_layers(model)
    found = Probe([named[name] for name in block.layers if name in named])
    norms: list[Any] = []
    outputs: dict[QuantizedLayer, Any] = {}
    seen: list[Any] = []

    def note(layer: QuantizedLayer, given: Any, output: Any) -> None:
        seen.append(given[0] if given else None)
        outputs[layer] = output

    # hooks only take notes: the first pass of a block is recorded with all that happens in it
    handles: list[Any] = [
        module.register_forward_pre_hook(lambda norm, given: norms.append(norm))
        for module in model.modules()
        if isinstance(module, BatchNorm)
    ]
    handles += [layer.register_forward_hook(note) for layer in found.layers]
    count = min(len(inputs), PROBED)
    try:
        block(model, inputs[torch.arange(count)])
    finally:
        for handle in handles:
            handle.remove()
    found.values = sum(x.numel() for x in seen if isinstance(x, Tensor)) // max(1, count)
    for norm in norms:
        if norm.bias is not None:
            found.shifts.append((norm.bias, norm.weight.detach().abs().clone()))
    for layer, output in outputs.items():
        bias = layer._parameters.get("bias")
        if bias is not None and isinstance(output, Tensor):
            found.shifts.append((bias, output.std().clamp_min(LEAST_SCALE)))
    return found
