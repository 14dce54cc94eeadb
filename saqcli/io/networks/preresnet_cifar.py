"""Pre-activation ResNet-(6n+2) for 32 x 32 images: the ResNet-20 of the SAQ paper.

As ``resnet_cifar``, with batch norm and ReLU in front of each convolution. Where the shape changes, in the
first block of stages 2 and 3, the shortcut is a 1 x 1 convolution without batch norm. In the first block of
*each* stage the shortcut starts after the block's batch norm and ReLU, elsewhere it is the block's input.

At 100 classes it has 40.8189 M MACs, the count behind the paper's 41798.6 / 674.6 / 392.1 M BOPs.

Source: He et al., arXiv:1603.05027; Liu et al. (SAQ), arXiv:2111.12273.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from saqcli.io.networks.depth import blocks_per_stage


class _Block(nn.Module):
    """bn-relu-conv-bn-relu-conv + shortcut; ``first`` takes the shortcut after the first bn-relu."""

    def __init__(self, c_in: int, c_out: int, stride: int, *, first: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.shortcut = (
            nn.Identity() if (c_in, stride) == (c_out, 1) else nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        )
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        x = self.shortcut(active if self.first else x)
        return x + y


class PreResNet(nn.Module):
    """Pre-activation ResNet of ``depth`` = 6n + 2 layers, 32 x 32 images to class scores.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.bn = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))  # (N, 64, H / 4, W / 4)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    rest = (_Block(c_out, c_out, 1, first=False) for _ in range(blocks - 1))
    return nn.Sequential(_Block(c_in, c_out, stride, first=True), *rest)
