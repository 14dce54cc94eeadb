"""torch.ao's FX graph mode: fused moving-average observers with fixed fake quantization, batch norms fused."""

from peer import calibrated, main
from torch import Tensor, nn


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    import torch
    from torch.ao.quantization import (
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
        QConfig,
        QConfigMapping,
    )
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    activation = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8
    )
    weight = FusedMovingAvgObsFakeQuantize.with_args(
        observer=MovingAveragePerChannelMinMaxObserver,
        quant_min=-8,
        quant_max=7,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    return calibrated(prepare_qat_fx(model.train(), mapping, (images,)), images)


if __name__ == "__main__":
    main("torch.ao FX", "torch", "w4a4", quantized)
