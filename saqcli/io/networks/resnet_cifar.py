"""ResNet-(6n+2) for 32 x 32 images, as in the paper that introduced it.

Three stages of n basic blocks with 16, 32 and 64 channels, then a linear classifier. A shortcut that
changes shape has no parameters (option A): it takes every second pixel and pads channels with zeros.

Source: He et al., arXiv:1512.03385, section 4.2. Parameter names are those of the weights that circulate
for it: ``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from saqcli.io.networks.depth import blocks_per_stage


class _Block(nn.Module):
    """relu(conv-bn-relu-conv-bn + shortcut)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.stride = stride
        self.padding = (c_out - c_in) // 2  # zero channels on either side

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.padding:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class ResNet(nn.Module):
    """ResNet of ``depth`` = 6n + 2 layers, 32 x 32 images to class scores.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, stride=1)
        self.layer2 = _stage(blocks, 16, 32, stride=2)
        self.layer3 = _stage(blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H / 4, W / 4)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_Block(c_in, c_out, stride), *(_Block(c_out, c_out, 1) for _ in range(blocks - 1)))
