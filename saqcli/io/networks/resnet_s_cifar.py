"""ResNet-(6n+2) "s" for 32 x 32 images: a variant with a wide stem, for which CIFAR-100 weights circulate.

Differs from ``resnet_cifar``: the stem has 64 channels, stage 1 narrows them to 16; a ReLU stands behind each
stage and not behind each block; a shortcut that changes shape is a 1 x 1 convolution with batch norm; the last
feature map is averaged over 4 x 4 pixels, which leaves 64 x 2 x 2 features for the classifier.

Source: the ``pretrained`` networks of github.com/karanchahal/distiller, whose parameter names these are.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from saqcli.io.networks.depth import blocks_per_stage


class _Block(nn.Module):
    """conv-bn-relu-conv-bn + shortcut, no ReLU behind."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if (c_in, stride) != (c_out, 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shifted: Tensor = y + self.shortcut(x)
        return shifted


class ResNetS(nn.Module):
    """ResNet "s" of ``depth`` = 6n + 2 layers, 32 x 32 images to class scores.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(blocks, 64, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, 32, 32) to (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = F.relu(stage(x))
        scores: Tensor = self.linear(F.avg_pool2d(x, 4).flatten(1))
        return scores


def _stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(c_in, c_out, stride), *(_Block(c_out, c_out, 1) for _ in range(blocks - 1)))
