"""Brevitas: learned scales of inputs, weights per channel."""

from peer import main, replace_layers
from torch import Tensor, nn


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    import brevitas.nn as qnn
    import torch
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat, Uint8ActPerTensorFloat

    def build(layer: nn.Module, signed: bool, ends: bool) -> nn.Module:
        bits = 8 if ends else 4
        options = {
            "bias": layer.bias is not None,
            "weight_quant": Int8WeightPerChannelFloat,
            "weight_bit_width": bits,
            "input_quant": Int8ActPerTensorFloat if signed else Uint8ActPerTensorFloat,
            "input_bit_width": bits,
        }
        if isinstance(layer, nn.Linear):
            made = qnn.QuantLinear(layer.in_features, layer.out_features, **options)
        else:
            shape = (layer.in_channels, layer.out_channels, layer.kernel_size)
            made = qnn.QuantConv2d(
                *shape, stride=layer.stride, padding=layer.padding, groups=layer.groups, **options
            )
        made.weight, made.bias = layer.weight, layer.bias
        return made

    replace_layers(model, build).to(images.device).eval()
    with torch.no_grad(), calibration_mode(model):  # otherwise the first 300 steps collect statistics
        model(images)
    return model.train()


if __name__ == "__main__":
    main("Brevitas", "brevitas", "w4a4", quantized)
