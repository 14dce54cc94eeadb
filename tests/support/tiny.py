"""Networks of fewer than 10,000 parameters, one for each structure that the code must handle.

Every builder returns a float module and the shape (C, H, W) of one image. ``build`` adds settled batch norms, since
freshly made running statistics (mean 0, variance 1) would hide mistakes; ``quantized`` installs real quantizers the
way the workflows do.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.tracer import trace

Shape = tuple[int, int, int]
CLASSES = 5


def mlp() -> tuple[nn.Module, Shape]:
    """Three linear layers."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, CLASSES)
    )
    return net, (3, 4, 4)


def _head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)]


def _conv_norm(c_in: int, c_out: int, size: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(c_out),
    ]


def conv_bn() -> tuple[nn.Module, Shape]:
    """Convolutions, each followed by a batch norm."""
    layers = [*_conv_norm(3, 8), nn.ReLU(), *_conv_norm(8, 8, stride=2), nn.ReLU(), *_head(8)]
    return nn.Sequential(*layers), (3, 8, 8)


class Residual(nn.Module):
    """Two convolutions and a shortcut: a projection where the shape changes, else the identity."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *_conv_norm(c_in, c_out, stride=stride), nn.ReLU(), *_conv_norm(c_out, c_out)
        )
        same = c_in == c_out and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_conv_norm(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.shortcut(x))


def residual() -> tuple[nn.Module, Shape]:
    """A block with a projection shortcut, then one with the identity."""
    layers = [*_conv_norm(3, 6), nn.ReLU(), Residual(6, 8, stride=2), Residual(8, 8), *_head(8)]
    return nn.Sequential(*layers), (3, 8, 8)


class Inverted(nn.Module):
    """Expand, depthwise, project, ReLU6 between, a linear bottleneck, the identity shortcut (MobileNetV2)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(*_conv_norm(channels, hidden, 1), nn.ReLU6())
        self.depthwise = nn.Sequential(*_conv_norm(hidden, hidden, groups=hidden), nn.ReLU6())
        self.project = nn.Sequential(*_conv_norm(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.project(self.depthwise(self.expand(x)))


def depthwise() -> tuple[nn.Module, Shape]:
    """Depthwise convolutions with ReLU6, whose bottlenecks output negative values."""
    layers = [*_conv_norm(3, 8, stride=2), Inverted(8, 16), Inverted(8, 16), nn.ReLU6(), *_head(8)]
    return nn.Sequential(*layers), (3, 8, 8)


def grouped() -> tuple[nn.Module, Shape]:
    """Grouped convolutions with biases, without norms."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1, groups=4),
        nn.ReLU(),
        *_head(12),
    )
    return net, (3, 6, 6)


def transposed() -> tuple[nn.Module, Shape]:
    """A transposed convolution, whose output channels are dimension 1 of its weight."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
        *_head(6),
    )
    return net, (3, 8, 8)


class Tokens(nn.Module):
    """Patches as tokens, (N, L, E), through norm, two linear layers and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def tokens() -> tuple[nn.Module, Shape]:
    """Linear layers over (N, L, E)."""
    return Tokens(), (3, 8, 8)


class Borrower(nn.Module):
    """Multiplies with its child's weight itself, as Swin V2 and BEiT do, bypassing the child's forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, self.bias)


def functional() -> tuple[nn.Module, Shape]:
    """A parent that uses its child's weight."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), Borrower(16), nn.ReLU(), nn.Linear(16, CLASSES)
    )
    return net, (3, 4, 4)


class Attention(nn.Module):
    """Patches, self-attention with packed projections, head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def attention() -> tuple[nn.Module, Shape]:
    """``nn.MultiheadAttention``, computed differently when wrapped: equal to float up to rounding."""
    return Attention(), (3, 8, 8)


# Networks that are bit-identical when wrapped without quantizers.
EXACT: dict[str, Callable[[], tuple[nn.Module, Shape]]] = {
    "mlp": mlp,
    "conv_bn": conv_bn,
    "residual": residual,
    "depthwise": depthwise,
    "grouped": grouped,
    "transposed": transposed,
    "tokens": tokens,
    "functional": functional,
}
TINY = {**EXACT, "attention": attention}


def images(shape: Shape, count: int = 4, seed: int = 0) -> Tensor:
    """Normal images, (count, C, H, W), the same for the same seed."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def build(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A network of ``TINY`` in eval mode with recalibrated batch norms, and four images."""
    torch.manual_seed(seed)
    net, shape = TINY[name]()
    net.train()
    with torch.no_grad():
        for k in range(3):
            net(images(shape, 16, seed=100 + k))
    return net.eval(), images(shape)


def quantized(
    net: nn.Module,
    x: Tensor,
    bits: int = 4,
    scheme: convert.Scheme | None = None,
    candidates: tuple[int, ...] = (),
) -> dict[str, QuantizedLayer]:
    """Quantize ``net`` in place at ``bits``, with levels fitted on ``x``, and return its layers by name."""
    convert.wrap(net)
    traced = trace(net, x[:1])
    convert.leave_float(net, traced.idle)
    convert.route(net, traced.routed, [name for names in traced.routed.values() for name in names])
    statistics = calibration.observe(net, [x])
    layers = quantized_layers(net)
    config = BitConfig(model="tiny", layers=dict.fromkeys(layers, LayerBits(weight=bits, activation=bits)))
    signed = {name: statistics[name].signed for name in layers}
    more = [LayerBits(weight=width, activation=width) for width in candidates]
    convert.install(net, scheme or convert.Scheme(), config, signed, dict.fromkeys(layers, more))
    calibration.fit(net, statistics)
    return layers
