"""torch's own learnable fake-quantization kernel (LSQ), around the same layers as saq's quantizers."""

import torch
from peer import calibrated, main, replace_layers
from torch import Tensor, nn


class Layer(nn.Module):
    """A convolution or linear layer between two learnable fake quantizers."""

    def __init__(self, layer: nn.Module, signed: bool, bits: int) -> None:
        super().__init__()
        from torch.ao.quantization import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
        from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

        half = 2 ** (bits - 1)
        low, high, dtype = (-half, half - 1, torch.qint8) if signed else (0, 2 * half - 1, torch.quint8)
        self.layer = layer
        self.input_quantizer = _LearnableFakeQuantize(
            MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype, use_grad_scaling=True
        )
        self.weight_quantizer = _LearnableFakeQuantize(
            MovingAveragePerChannelMinMaxObserver,
            quant_min=-half,
            quant_max=half - 1,
            channel_len=len(layer.weight),
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            use_grad_scaling=True,
        )
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            quantizer.enable_static_estimate()

    def learn(self) -> None:
        """Train the scales from now on."""
        for quantizer in (self.input_quantizer, self.weight_quantizer):
            quantizer.enable_param_learning()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for ``x``, both fake-quantized."""
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.layer.weight)
        if isinstance(self.layer, nn.Linear):
            return nn.functional.linear(x, weight, self.layer.bias)
        output: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return output


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    replace_layers(model, lambda layer, signed, ends: Layer(layer, signed, 8 if ends else 4))
    calibrated(model.to(images.device), images)
    for module in model.modules():
        if isinstance(module, Layer):
            module.learn()
    return model


if __name__ == "__main__":
    main("torch's learnable kernel", "torch", "w4a4", quantized)
