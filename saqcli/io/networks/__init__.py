"""Networks that neither timm nor torchvision has, those of the papers and some for which weights circulate.

All but ``mobilenetv1_025`` take 32 x 32 images. They have no published weights under these names: train one, or load
a file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from saqcli.io.networks.mobilenetv1 import MobileNetV1
from saqcli.io.networks.mobilenetv2_cifar import MobileNetV2Cifar
from saqcli.io.networks.preresnet_cifar import PreResNet
from saqcli.io.networks.resnet_cifar import ResNet
from saqcli.io.networks.resnet_s_cifar import ResNetS
from saqcli.io.networks.vit_cifar import ViTCifar

__all__ = ["NETWORKS", "NetworkEntry"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what the known ResNet weights were trained with
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # of TensorFlow's MobileNets
_CIFAR10 = (
    (0.4914, 0.4822, 0.4465),
    (0.2023, 0.1994, 0.2010),
)  # what the known ViT weights were trained with
_CIFAR100 = ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
_CIFAR100_S = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))  # what the known "s" weights were trained with


@dataclass(frozen=True)
class NetworkEntry:
    """How to build a network of ours, and what it expects of an image.

    Attributes:
        build: called with ``num_classes`` and optionally ``in_chans`` (3); random weights.
        num_classes: the classes of the paper's data set.
        description: one line for a listing.
        mean: per channel, of pixels scaled to 0..1.
        std: likewise.
        input_size: (C, H, W).
        crop_pct: side of the crop over the side that an image is scaled to.
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
    "mobilenetv2_cifar": NetworkEntry(
        MobileNetV2Cifar, 100, "MobileNetV2 for CIFAR-100, the network of the SAQ paper", *_CIFAR100
    ),
    "vit_cifar": NetworkEntry(
        ViTCifar, 10, "vision transformer for CIFAR-10, normalized behind additions", *_CIFAR10
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
