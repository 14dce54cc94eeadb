"""Published costs as exact integers.

Counting rule: one image; convolutions (projection shortcuts included) and linear layers; multiply-accumulates times
weight bits times activation bits; first layer and classifier at 8 / 8; norms, biases, additions, pooling and
activations are free. The float model counts 32 / 32 everywhere, first and last layer too.

Source: Liu et al. (SAQ), arXiv:2111.12273, tables 1 to 4. The paper prints rounded values (``published``); the
integers behind them follow from the layer tables by the rule. ResNet-50 and MobileNetV2 with 1000 classes are not in
the paper: their integers come from two counters that agree to the last digit. For MobileNetV2 the paper prints the
cost with 100 classes.
"""

from typing import NamedTuple

FLOAT = 32


class Golden(NamedTuple):
    """BOPs of a network at uniform ``bits`` in all layers that are free."""

    network: str
    bits: int
    bops: int
    published: str = ""


MACS = {
    "resnet18": 1_814_073_344,
    "resnet50": 4_089_184_256,
    "mobilenetv2": 300_774_272,
    "mobilenetv2_100": 299_622_272,
    "preresnet20": 40_818_944,
    "mobilenetv2_cifar": 91_270_144,
}

GOLDEN = (
    Golden("resnet18", FLOAT, 1_857_611_104_256, "1857.6 G"),
    Golden("resnet18", 4, 34_714_419_200, "34.7 G"),
    Golden("resnet18", 2, 14_367_850_496, "14.4 G"),
    Golden("resnet50", FLOAT, 4_187_324_678_144),
    Golden("resnet50", 5, 106_912_022_528),
    Golden("resnet50", 4, 71_189_921_792),
    Golden("resnet50", 3, 43_406_065_664),
    Golden("mobilenetv2", 4, 5_394_053_120),
    Golden("mobilenetv2_100", FLOAT, 306_813_206_528, "306.8 G"),
    Golden("mobilenetv2_100", 4, 5_320_325_120, "5.3 G"),
    Golden("preresnet20", FLOAT, 41_798_598_656, "41798.6 M"),
    Golden("preresnet20", 4, 674_643_968, "674.6 M"),
    Golden("preresnet20", 3, 392_052_736, "392.1 M"),
    Golden("mobilenetv2_cifar", FLOAT, 93_460_627_456, "93460.6 M"),
    Golden("mobilenetv2_cifar", 4, 1_508_933_632, "1508.9 M"),
    Golden("mobilenetv2_cifar", 3, 877_131_776, "877.1 M"),
)
