"""Networks that neither timm nor torchvision has, with their sources.

These are the networks of the papers, and some with public weights. All but ``mobilenetv1_025`` take 32 x 32 images.
They have no published weights under these names: train one, or load a file. The class docstrings describe each network
and its source; ``NETWORKS`` lists them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def blocks_per_stage(depth: int) -> int:
    """Blocks per stage, n, of a residual network with ``depth`` = 6n + 2 layers.

    The network has a stem, three stages of n blocks with two convolutions each, and a classifier.

    Raises:
        ValueError: depth is not 6n + 2.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
    return blocks


def _stage(
    block: Callable[[int, int, int], nn.Module], blocks: int, c_in: int, c_out: int, stride: int
) -> nn.Sequential:
    """Blocks of ``c_out`` channels, the first from ``c_in`` channels with the stride."""
    return nn.Sequential(block(c_in, c_out, stride), *(block(c_out, c_out, 1) for _ in range(blocks - 1)))


def _initialize(network: nn.Module) -> None:
    """Initialize convolutions as He et al. do."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class _BasicBlock(nn.Module):
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

    Three stages of n basic blocks with 16, 32 and 64 channels, then a linear classifier. A shortcut that changes shape
    has no parameters (option A): it takes every second pixel and pads channels with zeros.

    Source: He et al., arXiv:1512.03385, section 4.2. Parameter names are those of the public weights:
    ``conv1``, ``bn1``, ``layer{1,2,3}.{i}.{conv1,bn1,conv2,bn2}``, ``linear``.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(_BasicBlock, blocks, 16, 16, stride=1)
        self.layer2 = _stage(_BasicBlock, blocks, 16, 32, stride=2)
        self.layer3 = _stage(_BasicBlock, blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))  # (N, 64, H / 4, W / 4)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


class _PreActivationBlock(nn.Module):
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

    Like ``ResNet``, with batch norm and ReLU before each convolution. Where the shape changes, in the first block of
    stages 2 and 3, the shortcut is a 1 x 1 convolution without batch norm. In the first block of *each* stage the
    shortcut starts after the block's batch norm and ReLU; elsewhere it is the block's input.

    At depth 20, the ResNet-20 of the SAQ paper, and 100 classes it has 40.8189 M MACs, the count behind the paper's
    41798.6 / 674.6 / 392.1 M BOPs.

    Source: He et al., arXiv:1603.05027; Liu et al. (SAQ), arXiv:2111.12273.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.layer1 = _pre_activation_stage(blocks, 16, 16, stride=1)
        self.layer2 = _pre_activation_stage(blocks, 16, 32, stride=2)
        self.layer3 = _pre_activation_stage(blocks, 32, 64, stride=2)
        self.bn = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        x = F.relu(self.bn(x))  # (N, 64, H / 4, W / 4)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _pre_activation_stage(blocks: int, c_in: int, c_out: int, stride: int) -> nn.Sequential:
    rest = (_PreActivationBlock(c_out, c_out, 1, first=False) for _ in range(blocks - 1))
    return nn.Sequential(_PreActivationBlock(c_in, c_out, stride, first=True), *rest)


class _WideBlock(nn.Module):
    """bn-relu-conv-bn-relu-conv + shortcut; a shortcut that changes shape is a convolution after the first bn-relu."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.convShortcut = None if c_in == c_out else nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) to (N, C_out, H / stride, W / stride)."""
        active = F.relu(self.bn1(x))
        y: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return y + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(nn.Module):
    """WRN-``depth``-``width`` of ``depth`` = 6n + 4 layers, 32 x 32 images to class scores.

    A stem of 16 channels, three stages of n pre-activation blocks with 16, 32 and 64 times ``width`` channels, batch
    norm and ReLU, the mean over all pixels, a linear classifier. Unlike ``PreResNet``, a shortcut of the same shape is
    always the block's input.

    Source: Zagoruyko and Komodakis, arXiv:1605.07146. Parameter names are those of public CIFAR-10 weights:
    ``conv1``, ``layer{1,2,3}.layer.{i}.{bn1,conv1,bn2,conv2,convShortcut}``, ``bn1``, ``linear``.

    Raises:
        ValueError: depth is not 6n + 4.
    """

    def __init__(self, depth: int, width: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"a wide ResNet has 6n + 4 layers, not {depth}")
        blocks, channels = (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.layer1, self.layer2, self.layer3 = (
            nn.ModuleDict({"layer": _stage(_WideBlock, blocks, c_in, c_out, stride)})
            for c_in, c_out, stride in zip(channels, channels[1:], (1, 2, 2), strict=False)
        )
        self.bn1 = nn.BatchNorm2d(channels[-1])
        self.linear = nn.Linear(channels[-1], num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = self.conv1(x)
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage["layer"](x)
        x = F.relu(self.bn1(x))  # (N, 64 * width, H / 4, W / 4)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


class _WideStemBlock(nn.Module):
    """conv-bn-relu-conv-bn + shortcut, without a final ReLU."""

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
    """ResNet "s" of ``depth`` = 6n + 2 layers, with a wide stem, 32 x 32 images to class scores.

    Differs from ``ResNet``: the stem has 64 channels, stage 1 narrows them to 16; a ReLU follows each stage, not each
    block; a shortcut that changes shape is a 1 x 1 convolution with batch norm; the last feature map is averaged over
    4 x 4 pixels, which leaves 64 x 2 x 2 features for the classifier.

    Source: the ``pretrained`` networks of github.com/karanchahal/distiller, with the same parameter names, for which
    CIFAR-100 weights are public.

    Raises:
        ValueError: depth is not 6n + 2.
    """

    def __init__(self, depth: int, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(_WideStemBlock, blocks, 64, 16, stride=1)
        self.layer2 = _stage(_WideStemBlock, blocks, 16, 32, stride=2)
        self.layer3 = _stage(_WideStemBlock, blocks, 32, 64, stride=2)
        self.linear = nn.Linear(64 * 2 * 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, 32, 32) to (N, num_classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = F.relu(stage(x))
        scores: Tensor = self.linear(F.avg_pool2d(x, 4).flatten(1))
        return scores


STAGES = ((64, 1, 1), (128, 2, 2), (256, 2, 2), (512, 6, 2), (1024, 2, 2))  # channels, blocks, first stride
EPSILON = 1e-3


class _SeparableBlock(nn.Module):
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
    """MobileNetV1 with ``width`` times the channels of the paper, 224 x 224 images to class scores.

    The network as TensorFlow builds it; timm has only the full width. A convolution and thirteen pairs of a depthwise
    and a pointwise convolution, each with batch norm (epsilon 0.001) and ReLU6; then the mean over all pixels and a
    linear classifier. Padding is TensorFlow's "same": one more pixel below and to the right if the stride is 2 and the
    side even.

    Source: Howard et al., arXiv:1704.04861, table 1. Parameter names are those of timm's ``mobilenetv1_100``.
    """

    def __init__(self, width: float, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        channels = int(32 * width)
        self.conv_stem = nn.Conv2d(in_chans, channels, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels, eps=EPSILON)
        stages = []
        for full, count, stride in STAGES:
            blocks = []
            for i in range(count):
                blocks.append(_SeparableBlock(channels, int(full * width), stride if i == 0 else 1))
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
    """``x`` with TensorFlow's zero padding for a 3 x 3 convolution."""
    sides = []
    for side in (x.shape[3], x.shape[2]):
        missing = 2 if stride == 1 or side % 2 else 1
        sides += [missing // 2, missing - missing // 2]
    return F.pad(x, sides)


_STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class _InvertedResidual(nn.Module):
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
    """MobileNetV2 as the SAQ paper measured it on CIFAR-100, 32 x 32 images to class scores.

    Differs from the ImageNet network: strides (stem 1; stages 1, 1, 2, 2, 1, 2, 1); ReLU instead of ReLU6; the first
    block also has an expanding 1 x 1 convolution; every block of stride 1 has a shortcut, which is a 1 x 1 convolution
    with batch norm where the width changes (four of them).

    At 100 classes it has 58 layers and 91.2701 M MACs, the count behind the paper's 93460.6 / 1508.9 / 877.1 M BOPs.

    Source: Sandler et al., arXiv:1801.04381; Liu et al. (SAQ), arXiv:2111.12273.
    """

    def __init__(self, num_classes: int, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        blocks, c_in = [], 32
        for expansion, c_out, repeats, stride in _STAGES:
            for index in range(repeats):
                blocks.append(_InvertedResidual(c_in, c_out, expansion, stride if index == 0 else 1))
                c_in = c_out
        self.blocks = nn.Sequential(*blocks)
        self.conv2 = nn.Conv2d(c_in, 1280, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) to (N, num_classes)."""
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))  # (N, 1280, H / 8, W / 8)
        scores: Tensor = self.linear(x.mean((2, 3)))
        return scores


def _projection(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out))


SIDE = 8  # patches per side of the image


class ViTCifar(nn.Module):
    """Small vision transformer with normalization after each addition, 32 x 32 images to class scores.

    Patches of 4 x 4 pixels, a class token, six of torch's encoder layers: 8 heads over 128 features, a hidden layer of
    256 with ReLU, and normalization *after* each addition. timm's transformers normalize before, so these weights fit
    none of them.

    Source: ``vit_cifar10.pth`` of github.com/smmk47/CIFAR10-Classification (public CIFAR-10 weights), with the same
    parameter names.
    """

    def __init__(
        self, num_classes: int, in_chans: int = 3, dim: int = 128, depth: int = 6, heads: int = 8
    ) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, dim, 4, 4)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + SIDE**2, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.mlp_head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, num_classes))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_chans, 32, 32) to (N, num_classes)."""
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (N, 64, dim)
        tokens = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), patches), 1) + self.pos_embed
        scores: Tensor = self.mlp_head(self.transformer(tokens)[:, 0])
        return scores


__all__ = ["NETWORKS", "NetworkEntry"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # of the public ResNet weights
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of TensorFlow's MobileNets
_CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # of the public ViT and WRN weights
_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_CIFAR100_S = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))  # of the public "s" weights


@dataclass(frozen=True)
class NetworkEntry:
    """Builder and preprocessing of a network in this file.

    Attributes:
        build: builder, called with ``num_classes`` and optionally ``in_chans`` (3); gives random weights.
        num_classes: number of classes of the paper's data set.
        description: one line.
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, of pixels scaled to 0..1.
        input_size: (C, H, W).
        crop_pct: side of the crop divided by the side of the scaled image.
    """

    build: Callable[..., nn.Module]
    num_classes: int
    description: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int] = (3, 32, 32)
    crop_pct: float = 1.0


def _resnet(depth: int) -> NetworkEntry:
    description = f"ResNet-{depth} for CIFAR-10 with parameter-free shortcuts"
    return NetworkEntry(partial(ResNet, depth), 10, description, *_IMAGENET)


def _preresnet(depth: int) -> NetworkEntry:
    description = f"pre-activation ResNet-{depth} for CIFAR-100, the network of the SAQ paper"
    return NetworkEntry(partial(PreResNet, depth), 100, description, *_CIFAR100)


def _wide(depth: int, width: int) -> NetworkEntry:
    description = f"wide ResNet WRN-{depth}-{width} for CIFAR-10"
    return NetworkEntry(partial(WideResNet, depth, width), 10, description, *_CIFAR10)


def _resnet_s(depth: int) -> NetworkEntry:
    description = f"ResNet-{depth} with a stem of 64 channels for CIFAR-100"
    return NetworkEntry(partial(ResNetS, depth), 100, description, *_CIFAR100_S)


NETWORKS: dict[str, NetworkEntry] = {
    "preresnet20": _preresnet(20),
    "preresnet32": _preresnet(32),
    "preresnet44": _preresnet(44),
    "preresnet56": _preresnet(56),
    "resnet8s": _resnet_s(8),
    "resnet20s": _resnet_s(20),
    "resnet32s": _resnet_s(32),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet44": _resnet(44),
    "resnet56": _resnet(56),
    "wrn16_1": _wide(16, 1),
    "wrn28_1": _wide(28, 1),
    "mobilenetv2_cifar": NetworkEntry(
        MobileNetV2Cifar, 100, "MobileNetV2 for CIFAR-100, the network of the SAQ paper", *_CIFAR100
    ),
    "vit_cifar": NetworkEntry(
        ViTCifar, 10, "vision transformer for CIFAR-10, normalized after additions", *_CIFAR10
    ),
    "mobilenetv1_025": NetworkEntry(
        partial(MobileNetV1, 0.25),
        1000,
        "MobileNetV1 of a quarter of its width for ImageNet",
        *_HALF,
        input_size=(3, 224, 224),
        crop_pct=0.875,
    ),
}
