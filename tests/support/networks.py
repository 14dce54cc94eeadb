"""Networks of a few hundred weights, one for every kind of product, and a short way to quantize them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle

import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from saqcli.export import ModelMetadata
from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, quantized_layers
from saqcli.quant.tracer import trace

CHANNELS, SIDE, CLASSES = 3, 6, 5
ALL_BITS = range(2, 9)


class Tokens(nn.Module):
    """Images (N, C, H, W) as tokens (N, H * W, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Mean(nn.Module):
    """The mean over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        mixed: Tensor = self.attention(y, y, y, need_weights=False)[0]
        return x + mixed


class Residual(nn.Module):
    """A block whose shortcut is a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.shortcut(x))


class TwoHeads(nn.Module):
    """A network with an optional head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(CHANNELS, 4, 3)
        self.head = nn.Linear(4 * 16, CLASSES)
        self.auxiliary = nn.Linear(4 * 16, CLASSES)
        self.use_auxiliary = True

    def forward(self, x: Tensor) -> Tensor:
        features = torch.relu(self.stem(x)).flatten(1)
        logits: Tensor = self.head(features)
        return logits + self.auxiliary(features) if self.use_auxiliary else logits


def conv_bn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 9, CLASSES),
    )


def residual() -> nn.Module:
    return nn.Sequential(Residual(CHANNELS, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


def depthwise() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 6, 1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 6, 3, groups=6, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU6(),
        nn.Conv2d(6, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 36, CLASSES, bias=False),
    )


def token_mlp() -> nn.Module:
    return nn.Sequential(
        Tokens(), nn.Linear(CHANNELS, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8), Mean(), nn.Linear(8, CLASSES)
    )  # fmt: skip


def attention() -> nn.Module:
    return nn.Sequential(Tokens(), nn.Linear(CHANNELS, 8), SelfAttention(8), Mean(), nn.Linear(8, CLASSES))


def standardized() -> nn.Module:
    return nn.Sequential(
        StdConv2d(CHANNELS, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        StdConv2d(4, 6, 3),
        nn.Flatten(),
        nn.Linear(6 * 36, CLASSES),
    )


def transposed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(CHANNELS, 4, 2, stride=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 36, CLASSES),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv_bn": conv_bn,
    "residual": residual,
    "depthwise": depthwise,
    "token_mlp": token_mlp,
    "attention": attention,
    "standardized": standardized,
    "transposed": transposed,
}


def _with_zero_channel(layer: nn.Conv2d) -> nn.Conv2d:
    with torch.no_grad():
        layer.weight[1] = 0
    return layer


# One layer each, with its input layout and outputs of (N, anything).
SINGLE: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(CHANNELS, 4, 3, padding=1, bias=False),
    "conv_bias_stride": lambda: nn.Conv2d(CHANNELS, 4, 3, stride=2, padding=1),
    "depthwise": lambda: nn.Conv2d(CHANNELS, 6, 3, groups=CHANNELS),
    "conv_unsigned": lambda: nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, 4, 3)),
    "zero_channel": lambda: _with_zero_channel(nn.Conv2d(CHANNELS, 4, 3)),
    "conv1d": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(CHANNELS, 4, 3)),
    "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 4, 2, stride=2),
    "standardized": lambda: StdConv2d(CHANNELS, 4, 3),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE**2, CLASSES)),
    "linear_no_bias": lambda: nn.Sequential(nn.Flatten(), nn.Linear(CHANNELS * SIDE**2, CLASSES, bias=False)),
    "tokens": lambda: nn.Sequential(Tokens(), nn.Linear(CHANNELS, CLASSES)),
}


class Bank(nn.Module):
    """Every layer of ``SINGLE`` at every bit-width, side by side over the same images."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleDict(
            {f"{kind}_{bits}": SINGLE[kind]() for kind in SINGLE for bits in ALL_BITS}
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x).flatten(1) for branch in self.branches.values()], 1)


def bank_bits(names: Iterable[str]) -> dict[str, LayerBits]:
    """The bits given in the names of the branches."""
    widths = {name: int(name.split(".")[1].rpartition("_")[2]) for name in names}
    return {name: LayerBits(weight=bits, activation=bits) for name, bits in widths.items()}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's random state within the context, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@dataclass
class Quantized:
    """A quantized network in eval mode, and the arguments of an exporter."""

    model: nn.Module
    facts: ModelMetadata

    @property
    def layers(self) -> dict[str, QuantizedLayer]:
        return quantized_layers(self.model)


def mixed_bits(names: Iterable[str]) -> dict[str, LayerBits]:
    """Different widths for neighbouring layers, and for weights and activations."""
    widths = cycle(((4, 8), (2, 3), (7, 5), (3, 2), (8, 4), (5, 7), (6, 6)))
    return {name: LayerBits(weight=w, activation=a) for name, (w, a) in zip(names, widths, strict=False)}


def same_bits(bits: int) -> Callable[[Iterable[str]], dict[str, LayerBits]]:
    return lambda names: {name: LayerBits(weight=bits, activation=bits) for name in names}


def randomize_norms(model: nn.Module) -> None:
    """Statistics and affine parameters as after training: none at 0 or 1."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                module.running_mean.uniform_(-0.3, 0.3)
                module.running_var.uniform_(0.5, 1.5)


def quantize(
    make: Callable[[], nn.Module],
    choose: Callable[[Iterable[str]], dict[str, LayerBits]] = mixed_bits,
    scheme: Scheme | None = None,
    seed: int = 0,
    *,
    products: bool = False,
) -> Quantized:
    """``make()`` wrapped, calibrated on noise and quantized; ``products`` also quantizes activation products."""
    scheme = scheme or Scheme()
    with seeded(seed):
        model = make().eval()
        randomize_norms(model)
    convert.wrap(model)
    traced = trace(model, images(1))
    for parent, children in traced.routed.items():
        convert.route(model, [parent], children)
    if products:
        convert.add_products(model, {each.name: each.follows for each in traced.products if each.follows})
    statistics = calibration.observe(model, [images(32, seed=1)])
    signed = {name: entry.signed for name, entry in statistics.items()}
    policy = BitConfig(model="tests/tiny", layers=choose(traced.layers))
    convert.install(model, scheme, policy, signed)
    calibration.fit(model, statistics)
    facts = ModelMetadata(
        saq_version="0.0.0",
        build={"name": "tests/tiny", "num_classes": CLASSES},
        preprocessing={"input_size": [CHANNELS, SIDE, SIDE]},
        policy=policy,
        scheme=scheme,
        signed=signed,
        routed=traced.routed,
    )
    return Quantized(model, facts)
