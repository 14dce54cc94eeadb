"""MobileNetV2 for 32 x 32 images: the variant that the SAQ paper measured on CIFAR-100.

It differs from the ImageNet network in its strides (stem 1; stages 1, 1, 2, 2, 1, 2, 1), in ReLU instead of
ReLU6, in the expanding 1 x 1 convolution that even the first block keeps, and in the shortcuts: every
stride-1 block has one, a 1 x 1 convolution with batch norm where the width changes (four of them).

At 100 classes it has 58 layers and 91.2701 M MACs, the count behind the paper's 93460.6 / 1508.9 / 877.1 M
BOPs.

Source: Sandler et al., arXiv:1801.04381; Liu et al. (SAQ), arXiv:2111.12273.
"""

import torch.nn.functional as F
from torch import Tensor, nn

_STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class _Block(nn.Module):
    """Expand, filter depthwise, project; plus a shortcut if the block keeps the image's size."""

    def __init__(self, c_in: int, c_out: int, expansion: int, stride: int) -> None:
        super().__init__()
        width = expansion * c_in
        self.conv1 = nn.Conv2d(c_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, c_out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(c_out)
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Identity() if c_in == c_out else _projection(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y: Tensor = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.shortcut is None:
            return y
        x = self.shortcut(x)
        return x + y


class MobileNetV2Cifar(nn.Module):
    """MobileNetV2, 32 x 32 images to class scores."""

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, c_in = [], 32
        for expansion, c_out, repeats, stride in _STAGES:
            for index in range(repeats):
                blocks.append(_Block(c_in, c_out, expansion, stride if index == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(c_in, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))  # (N, 1280, H / 8, W / 8)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _projection(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))
