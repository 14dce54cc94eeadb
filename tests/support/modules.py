"""Modules of a user's own: what no library of networks has, with a batch for each."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

CLASSES = 5


class HandWritten(nn.Module):
    """A CNN in functional style: a residual, a concatenation, a convolution of its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.mixing = nn.Parameter(torch.randn(8, 16, 1, 1) / 4)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        y = torch.cat([F.silu(self.left(x)), self.right(x)], 1)
        x = x + F.conv2d(y, self.mixing)
        return self.head(F.adaptive_avg_pool2d(F.relu(x), 1).flatten(1))


class TwoInputs(nn.Module):
    """An image and a vector of numbers about it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.numbers = nn.Linear(4, 8)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor, numbers: Tensor, scale: float = 1.0) -> Tensor:
        x = F.relu(self.inner(F.relu(self.conv(image)))).mean((2, 3))
        return self.head(torch.cat([x, F.relu(self.numbers(numbers))], 1)) * scale


class TwoHeads(nn.Module):
    """Class scores and a box, in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3)
        self.scores, self.box = nn.Linear(8, CLASSES), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.inner(F.relu(self.conv(x)))).mean((2, 3))
        return {"scores": self.scores(x), "box": self.box(x)}


class Tied(nn.Module):
    """Two layers with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.two(F.relu(self.one(F.relu(self.stem(x)))))))


def small(change: Callable[[nn.Module], Any] = lambda layer: None) -> nn.Module:
    """A small CNN, whose second convolution ``change`` gets."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    change(net[2])
    return net


def changed_resnet() -> nn.Module:
    """A network of a library that its user has changed: another stem, another head, a layer more."""
    import timm

    net: Any = timm.create_model("resnet10t", num_classes=7)
    net.conv1[0] = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)
    net.fc = nn.Sequential(nn.Linear(net.num_features, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return net.eval()  # type: ignore[no-any-return]


IMAGE = (3, 16, 16)
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...]]] = {
    "hand_written": (HandWritten, (IMAGE,)),
    "changed_resnet": (changed_resnet, ((3, 32, 32),)),
    "two_inputs": (TwoInputs, (IMAGE, (4,))),
    "two_heads": (TwoHeads, (IMAGE,)),
    "tied": (Tied, ((12,),)),
    "weight_norm": (lambda: small(weight_norm), (IMAGE,)),
    "hooked_weight_norm": (lambda: small(lambda layer: hooked_weight_norm(layer)), (IMAGE,)),
    "spectral_norm": (lambda: small(spectral_norm), (IMAGE,)),
    "pruned": (lambda: small(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), (IMAGE,)),
    "bfloat16": (lambda: small().bfloat16(), (IMAGE,)),
    "root_layer": (lambda: nn.Linear(12, CLASSES), ((12,),)),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A module of the table, with weights by seed."""
    torch.manual_seed(seed)
    return MODULES[name][0]()


def inputs_of(name: str, count: int = 8, seed: int = 1) -> tuple[Tensor, ...]:
    """A batch of inputs for a module of the table."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, *shape, generator=generator) for shape in MODULES[name][1])


def labels_of(count: int = 8, seed: int = 2) -> Tensor:
    """Labels for a batch."""
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def scores_of(output: Any) -> Tensor:
    """The class scores in an output."""
    scores: Tensor = output["scores"] if isinstance(output, dict) else output
    return scores
