"""MobileNetV1 for images of 224 pixels, narrowed, as TensorFlow builds it: timm has it at full width only.

A convolution and thirteen pairs of a depthwise and a pointwise convolution, each with batch norm (epsilon 0.001) and
ReLU6; then the mean over all pixels and a linear classifier. Padding is TensorFlow's "same", one pixel more below
and to the right where the stride is 2 and the side even.

Source: Howard et al., arXiv:1704.04861, table 1. Parameter names are those of timm's ``mobilenetv1_100``.
"""

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))  # channels, blocks, first stride
EPSILON = 1e-3


class _Block(nn.Module):
    """conv 3x3 depthwise - bn - relu6 - conv 1x1 - bn - relu6."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(c_in, c_in, 3, stride, groups=c_in, bias=False)
        self.bn1 = nn.BatchNorm2d(c_in, eps=EPSILON)
        self.conv_pw = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out, eps=EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        x = F.relu6(self.bn1(self.conv_dw(_padded(x, self.conv_dw.stride[0]))))
        return F.relu6(self.bn2(self.conv_pw(x)))


class MobileNetV1(nn.Module):
    """MobileNetV1 of ``width`` times the channels of the paper, images to class scores."""

    def __init__(self, width: float, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=EPSILON)
        stages = []
        for full, count, stride in STAGES:
            blocks = []
            for i in range(count):
                blocks.append(_Block(channels, int(full * width), stride if i == 0 else 1))
                channels = int(full * width)
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = F.relu6(self.bn1(self.conv_stem(_padded(x, 2))))
        scores: Tensor = self.classifier(self.blocks(x).mean((2, 3)))
        return scores


def _padded(x: Tensor, stride: int) -> Tensor:
    """``x`` with TensorFlow's zeros for a convolution of 3 x 3."""
    sides = []
    for side in (x.shape[3], x.shape[2]):
        missing = 2 if stride == 1 or side % 2 else 1
        sides += [missing // 2, missing - missing // 2]
    return F.pad(x, sides)
