"""torchao's PT2E: the exported graph, annotated by the quantizer of its tests (for XNNPACK)."""

from peer import main
from torch import Tensor, nn


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    import torch
    from torchao.quantization.pt2e import allow_exported_model_train_eval
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.testing.pt2e._xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    config = get_symmetric_quantization_config(
        is_per_channel=True, is_qat=True, act_qmin=-8, act_qmax=7, weight_qmin=-8, weight_qmax=7
    )
    exported = torch.export.export(model.train(), (images,)).module()
    prepared: nn.Module = prepare_qat_pt2e(exported, XNNPACKQuantizer().set_global(config))
    allow_exported_model_train_eval(prepared)
    prepared.train()  # returns nothing
    return prepared


if __name__ == "__main__":
    main("PT2E", "torchao", "w4a4", quantized)
