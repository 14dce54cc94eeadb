"""NNCF: its fake quantization trains at 8 bits only."""

from peer import main
from torch import Tensor, nn


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    import nncf

    made: nn.Module = nncf.quantize(model.eval(), nncf.Dataset([images]), subset_size=1)
    return made.train()


if __name__ == "__main__":
    main("NNCF", "nncf", "w8a8", quantized)
