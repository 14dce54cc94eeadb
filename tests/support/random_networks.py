"""Random small networks from the building blocks of image models, randomly quantized; one per seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saqcli.export import ModelMetadata
from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.tracer import trace
from tests.support.networks import Mean, Quantized, SelfAttention, Tokens, seeded

CLASSES = 7
ACTIVATIONS: tuple[Callable[[], nn.Module], ...] = (
    nn.ReLU, nn.ReLU, nn.ReLU, nn.ReLU6, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.Identity,
)  # fmt: skip


class Sum(nn.Module):
    """The sum of branches; a branch may be the identity."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches[0](x)
        for branch in list(self.branches)[1:]:
            total = total + branch(x)
        return total


class Concat(nn.Module):
    """Concatenated branches."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(channels, 2, 1), nn.Conv2d(2, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.excite(torch.relu(self.squeeze(means))))


class Attention(nn.Module):
    """Attention as timm writes it, over tokens (N, L, C)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        count, length, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(count, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.unbind(0))
        return x + self.out(mixed.transpose(1, 2).reshape(count, length, width))


class Mixer(nn.Module):
    """A linear layer over positions, then one over channels."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.norm, self.across = nn.LayerNorm(width), nn.Linear(length, length)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.down(nn.functional.gelu(self.up(x)))


@dataclass
class Builder:
    """Blocks in sequence, for images of ``channels`` channels and ``side`` pixels."""

    dice: random.Random
    channels: int
    side: int

    def activation(self) -> nn.Module:
        return self.dice.choice(ACTIVATIONS)()

    def norm(self, channels: int) -> nn.Module:
        draw = self.dice.random()
        if draw < 0.65:
            return nn.BatchNorm2d(channels)
        return nn.GroupNorm(2, channels) if draw < 0.7 and channels % 2 == 0 else nn.Identity()

    def convolution(self, inputs: int, outputs: int, stride: int = 1, size: int | None = None) -> nn.Module:
        size = size or self.dice.choice((1, 1, 3, 3, 3, 5))
        groups = 1
        if self.dice.random() < 0.3:
            groups = next((g for g in (inputs, 2, 3) if inputs % g == 0 and outputs % g == 0), 1)
        return nn.Conv2d(
            inputs, outputs, size, stride, size // 2, groups=groups, bias=self.dice.random() < 0.5,
            dilation=1,
        )  # fmt: skip

    def unit(self, inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        return nn.Sequential(self.convolution(inputs, outputs, stride), self.norm(outputs), self.activation())

    def block(self) -> nn.Module:
        """Add a block, updating channels and pixels."""
        kinds = [
            "unit",
            "unit",
            "unit",
            "residual",
            "projected",
            "concat",
            "gate",
            "pool",
            "average",
            "norm_first",
        ]
        kinds += ["transposed", "depthwise", "resample"]
        made: nn.Module = getattr(self, f"_{self.dice.choice(kinds)}")()
        return made

    def _unit(self) -> nn.Module:
        outputs, stride = self.dice.choice((4, 6, 8)), 2 if self.side > 4 and self.dice.random() < 0.4 else 1
        made = self.unit(self.channels, outputs, stride)
        self.channels, self.side = outputs, -(-self.side // stride)
        return made

    def _residual(self) -> nn.Module:
        branch = nn.Sequential(
            self.unit(self.channels, 6), self.convolution(6, self.channels), self.norm(self.channels)
        )
        return nn.Sequential(Sum(branch, nn.Identity()), self.activation())

    def _projected(self) -> nn.Module:
        outputs = self.dice.choice((4, 8))
        branch = nn.Sequential(
            self.unit(self.channels, outputs), self.convolution(outputs, outputs), self.norm(outputs)
        )
        shortcut = nn.Sequential(self.convolution(self.channels, outputs, size=1), self.norm(outputs))
        self.channels = outputs
        return nn.Sequential(Sum(branch, shortcut), self.activation())

    def _concat(self) -> nn.Module:
        branches = [self.unit(self.channels, outputs) for outputs in (2, 4)]
        branches += [nn.MaxPool2d(3, 1, 1)] if self.dice.random() < 0.5 else []
        self.channels = 6 + (self.channels if len(branches) == 3 else 0)
        return Concat(*branches)

    def _gate(self) -> nn.Module:
        return Gate(self.channels, self.dice.choice((nn.Sigmoid, nn.Hardsigmoid))())

    def _pool(self) -> nn.Module:
        if self.side < 4:
            return self._unit()
        made = self.dice.choice((nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)))
        self._measure(made)
        return made

    def _average(self) -> nn.Module:
        if self.side < 4:
            return self._unit()
        made = self.dice.choice(
            (
                nn.AvgPool2d(2),
                nn.AvgPool2d(3, 2, 1),
                nn.AvgPool2d(3, 1, 1, count_include_pad=False),
                nn.AvgPool2d(3, 2, ceil_mode=True),
                nn.AdaptiveAvgPool2d(3),
            )
        )
        self._measure(made)
        return made

    def _norm_first(self) -> nn.Module:
        outputs = self.dice.choice((4, 6))
        made = nn.Sequential(
            nn.BatchNorm2d(self.channels), self.activation(), self.convolution(self.channels, outputs)
        )
        self.channels = outputs
        return made

    def _transposed(self) -> nn.Module:
        if self.side > 8:
            return self._unit()
        groups = self.dice.choice((1, 1, 2)) if self.channels % 2 == 0 else 1
        made = nn.Sequential(
            nn.ConvTranspose2d(self.channels, 4, 2, 2, groups=groups, bias=self.dice.random() < 0.5),
            self.norm(4),
            self.activation(),
        )
        self.channels = 4
        self.side *= 2
        return made

    def _depthwise(self) -> nn.Module:
        c = self.channels
        made = nn.Sequential(
            nn.Conv2d(c, 2 * c, 1, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU6(),
            nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c, bias=False), nn.BatchNorm2d(2 * c), nn.ReLU6(),
            nn.Conv2d(2 * c, c, 1, bias=False), nn.BatchNorm2d(c),
        )  # fmt: skip
        return Sum(nn.Identity(), made)

    def _resample(self) -> nn.Module:
        if self.side > 6 and self.dice.random() < 0.5:
            made: nn.Module = nn.Upsample(scale_factor=2, mode="nearest")
            self.side *= 2
            shrink = nn.MaxPool2d(2)
            self.side //= 2
            return nn.Sequential(made, shrink)
        made = nn.Sequential(self.convolution(self.channels, 16), nn.PixelShuffle(2), nn.MaxPool2d(2))
        self.channels = 4
        return made

    def _measure(self, made: nn.Module) -> None:
        self.side = made(torch.zeros(1, self.channels, self.side, self.side)).shape[-1]

    def head(self) -> nn.Module:
        """Add the head: pooling, flattening or tokens, to logits."""
        bias = self.dice.random() < 0.8
        draw = self.dice.random()
        if draw < 0.35:
            return nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.channels, CLASSES, bias)
            )
        if draw < 0.5:
            width = self.channels * self.side**2
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(width, 8),
                self.activation(),
                nn.Dropout(),
                nn.Linear(8, CLASSES, bias),
            )
        if draw < 0.65:
            width = self.channels * 4
            return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(width, CLASSES, bias))
        if draw < 0.7:
            return nn.Sequential(
                nn.Conv2d(self.channels, CLASSES, 1, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
        body = self.dice.choice((SelfAttention(8), Attention(8), Mixer(self.side**2, 8)))
        return nn.Sequential(
            nn.Conv2d(self.channels, 8, 1),
            Tokens(),
            body,
            nn.LayerNorm(8),
            Mean(),
            nn.Linear(8, CLASSES, bias),
        )


def build(dice: random.Random) -> tuple[nn.Module, tuple[int, int, int]]:
    """A float network in eval mode with recalibrated norms, and its image size."""
    size = (dice.choice((3, 3, 1, 4)), *(dice.choice((8, 9, 12)),) * 2)
    builder = Builder(dice, size[0], size[1])
    blocks = [builder.block() for _ in range(dice.randint(2, 4))]
    net = nn.Sequential(*blocks, builder.head()).train()
    with torch.no_grad():
        for _ in range(4):
            net(torch.randn(16, *size))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.3, 0.3)
                if dice.random() < 0.5:  # gains below zero, and zero, as at the end of residual branches
                    module.weight[:: dice.randint(1, 3)] *= -1
                    module.weight[dice.randrange(len(module.weight))] = 0
            elif isinstance(module, nn.Conv2d | nn.Linear) and dice.random() < 0.15:
                module.weight[dice.randrange(len(module.weight))] = 0
    return net.eval(), size


def scheme(dice: random.Random) -> Scheme:
    quantizer = dice.choice(("clip", "clip", "lsq_plus", "lsq_plus", "lsq"))
    return Scheme(
        quantizer=quantizer,
        weight_grid=dice.choice(("auto", "paper", "zero")),  # type: ignore[arg-type]
        granularity=dice.choice(("channel", "channel", "tensor")),  # type: ignore[arg-type]
        weight_normalization=quantizer == "clip" and dice.random() < 0.2,
    )


def random_network(seed: int) -> Quantized:
    """The network of ``seed``, calibrated on noise: mixed bits, the same bits everywhere, or 8 bits."""
    dice = random.Random(seed)
    with seeded(seed):
        model, size = build(dice)
        noise = torch.randn(32, *size)
    convert.wrap(model)
    traced = trace(model, noise[:1])
    for parent, children in traced.routed.items():
        convert.route(model, [parent], children)
    statistics = calibration.observe(model, [noise])
    signed = {name: entry.signed for name, entry in statistics.items()}
    style = dice.choice(("mixed", "mixed", "same", "eight"))
    bits = 8 if style == "eight" else dice.randint(2, 8)

    def width() -> int:
        return dice.randint(2, 8) if style == "mixed" else bits

    policy = BitConfig(
        model="tests/random",
        layers={name: LayerBits(weight=width(), activation=width()) for name in traced.layers},
    )
    chosen = scheme(dice)
    convert.install(model, chosen, policy, signed)
    calibration.fit(model, statistics)
    facts = ModelMetadata(
        saq_version="0.0.0",
        build={"name": "tests/random", "num_classes": CLASSES},
        preprocessing={"input_size": list(size)},
        policy=policy,
        scheme=chosen,
        signed=signed,
        routed=traced.routed,
    )
    return Quantized(model, facts)
