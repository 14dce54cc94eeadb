"""Blocks of networks: where they are cut, and that together they are the network, bit for bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import saqcli
from saqcli.errors import UnsupportedModel
from saqcli.quant.calls import Call
from saqcli.quant.convert import wrap
from saqcli.quant.layer import quantized_layers
from saqcli.quant.products import quantized_products
from saqcli.reconstruction import blocks as finding
from saqcli.reconstruction.blocks import Block, find_blocks, output_of
from tests.support.modules import MODULES, build, inputs_of

IMAGE = (3, 16, 16)


class Inverted(nn.Module):
    """MobileNetV2 in small: an inverted block with a shortcut, written with operators that change their input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.expand, self.depthwise = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).clamp_(0, 6)
        y = F.relu6(self.expand(x), inplace=True)
        y = self.project(F.relu6(self.depthwise(y)))
        y += x
        return self.head(F.relu_(y).mean((2, 3)))


class Fire(nn.Module):
    """SqueezeNet in small: two branches that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 4, 1)
        self.one, self.three = nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(F.max_pool2d(F.relu(self.stem(x)), 2)))
        x = torch.cat([F.relu(self.one(x)), F.relu(self.three(x))], 1)
        return F.adaptive_avg_pool2d(F.relu(self.last(x)), 1).flatten(1)


class Dense(nn.Module):
    """DenseNet in small: every layer reads all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 4 * n, 4, 3, padding=1) for n in range(4))
        self.transition, self.head = nn.Conv2d(19, 8, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(F.relu(torch.cat(features, 1))))
        x = F.relu(self.transition(torch.cat(features, 1)))
        return self.head(x.mean((2, 3)))


class Repeated(nn.Module):
    """A layer that is called twice, with another one between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice = nn.Linear(12, 12), nn.Linear(12, 12)
        self.between, self.head = nn.Linear(12, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.stem(x))))
        return self.head(torch.tanh(self.twice(torch.tanh(self.between(x)))))


class Packed(nn.Module):
    """Attention over tokens that reads its packed projection, and writes to a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.out = nn.Linear(48, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        x = self.patch(F.unfold(x, 4, stride=4).transpose(1, 2))
        x = torch.cat([self.token.expand(count, -1, -1), x], 1)
        hidden = torch.zeros(x.shape[1], x.shape[1])
        hidden[0, -1] = float("-inf")
        q, k, v = F.linear(self.norm(x), self.qkv.weight, self.qkv.bias).chunk(3, -1)
        scores = (torch.matmul(q, k.transpose(-2, -1)) / 4 + hidden).softmax(-1)
        x = x + self.out(torch.matmul(scores, v))
        return self.head(x[:, 0])


class Attention(nn.Module):
    """torch's attention, a layer with another one and products in it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mixing = nn.Linear(12, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        x = x + self.mixing(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


class LayersFirst(nn.Module):
    """Tensors between the layers have the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        x = torch.stack([x, x / 2])
        return self.head(F.relu(self.two(x)).sum(0))


def own(name: str) -> tuple[nn.Module, Call]:
    """A module of this file or of the table, with a batch."""
    torch.manual_seed(0)
    if name in MODULES:
        return build(name).eval(), Call(inputs_of(name))
    kind, shape = OWN[name]
    generator = torch.Generator().manual_seed(1)
    return kind().eval(), Call((torch.randn(4, *shape, generator=generator),))


OWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "inverted": (Inverted, IMAGE),
    "fire": (Fire, IMAGE),
    "dense": (Dense, IMAGE),
    "repeated": (Repeated, (12,)),
    "packed": (Packed, IMAGE),
    "attention": (Attention, (7, 12)),
    "layers_first": (LayersFirst, (12,)),
}
EXPECTED = {
    "hand_written": [("stem",), ("left", "right"), ("head",)],
    "two_inputs": [("conv", "inner", "numbers"), ("head",)],
    "two_heads": [("conv",), ("inner",), ("scores", "box")],
    "tied": [("stem",), ("one", "two"), ("head",)],
    "pruned": [("0",), ("2",), ("6",)],
    "root_layer": [("",)],
    "inverted": [("stem",), ("expand", "depthwise", "project"), ("head",)],
    "fire": [("stem",), ("squeeze",), ("one", "three"), ("last",)],
    "dense": [("layers.0", "layers.1", "layers.2", "layers.3"), ("transition",), ("head",)],
    "repeated": [("stem",), ("twice", "between"), ("head",)],
    "packed": [("patch",), ("qkv", "products.0", "products.1", "out"), ("head",)],
    "attention": [
        ("patch",),
        ("mixing", "mixing.products.0", "mixing.products.1", "mixing.out_proj"),
        ("head",),
    ],
    "layers_first": [("one",), ("two",), ("head",)],
}


def quantized(name: str) -> tuple[nn.Module, Call]:
    model, call = own(name)
    q = saqcli.quantize_model(
        model, 3, calibration=[call], example=call, quantize_attention=name in ("packed", "attention")
    )
    return q, call


@torch.no_grad()
def assert_chain(model: nn.Module, blocks: list[Block], call: Call) -> None:
    """Every layer is in one block, and the blocks give the bits of the network, at several batch sizes."""
    placed = [name for block in blocks for name in block.layers]
    assert sorted(placed) == sorted([*quantized_layers(model), *quantized_products(model)])
    for count in (1, 3, 4):
        batch = call.map(lambda tensor, count=count: -tensor[:count])
        x: Any = batch if len(batch.tensors) > 1 else batch.tensors[0]
        before = [tensor.clone() for tensor in batch.tensors]
        for block in blocks:
            given = x.clone() if isinstance(x, Tensor) else None
            result = block(model, x)
            if given is not None:
                assert torch.equal(given, x)
            x = result
        assert torch.equal(x, output_of(batch.run(model)))
        assert all(torch.equal(one, other) for one, other in zip(before, batch.tensors, strict=True))


@pytest.mark.parametrize("name", [*MODULES, *OWN])
def test_blocks_are_the_network(name: str) -> None:
    q, call = quantized(name)

    blocks = find_blocks(q, call)

    assert_chain(q, blocks, call)
    if name in EXPECTED:
        assert [block.layers for block in blocks] == EXPECTED[name]
    assert not any(block.note for block in blocks)


@pytest.mark.parametrize("name", ["hand_written", "packed", "inverted"])
def test_float_networks_have_the_same_blocks(name: str) -> None:
    q, call = quantized(name)
    model, _ = own(name)
    wrap(model)

    assert_chain(model, find_blocks(model, call), call)
    if name != "packed":  # which has products only once it is quantized
        assert [block.layers for block in find_blocks(model, call)] == [
            block.layers for block in find_blocks(q, call)
        ]


def test_resnet20_is_stem_residual_blocks_classifier() -> None:
    net = saqcli.load_model("saq/resnet20", pretrained=False, num_classes=10).eval()
    wrap(net)
    images = torch.randn(4, 3, 32, 32)

    blocks = find_blocks(net, images)

    names = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert [block.name for block in blocks] == ["conv1", *names, "linear"]
    assert [len(block.layers) for block in blocks] == [1] + 9 * [2] + [1]
    assert_chain(net, blocks, Call((images,)))


def test_vit_cifar_is_cut_along_its_residual_stream() -> None:
    net = saqcli.load_model("saq/vit_cifar", pretrained=False, num_classes=10).eval()
    wrap(net)
    images = torch.randn(4, 3, 32, 32)

    blocks = find_blocks(net, images)

    assert len(blocks) == 1 + 2 * 6 + 1
    assert_chain(net, blocks, Call((images,)))


def test_blocks_compute_on_the_live_modules() -> None:
    q, call = quantized("hand_written")
    blocks = find_blocks(q, call)
    x = blocks[0](q, call.tensors[0]).detach()
    before = blocks[1](q, x)
    with torch.no_grad():
        q.get_submodule("left").latent_weight().mul_(2)  # type: ignore[operator]
        q.mixing.mul_(3)  # type: ignore[operator]

    after = blocks[1](q, x)
    after.square().sum().backward()  # type: ignore[no-untyped-call]

    assert not torch.equal(before, after)
    assert q.mixing.grad is not None
    assert q.get_submodule("left").latent_weight().grad.abs().sum() > 0  # type: ignore[operator]
    assert q.stem.latent_weight().grad is None  # type: ignore[operator, union-attr]


def test_gradients_are_those_of_the_network() -> None:
    q, call = quantized("inverted")
    parameters = [p for p in q.parameters() if p.requires_grad]
    expected = torch.autograd.grad(call.run(q.eval()).square().sum(), parameters)
    x = call.tensors[0]
    for block in find_blocks(q, call):
        x = block(q, x)

    found = torch.autograd.grad(x.square().sum(), parameters)

    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_modes_and_hooks_are_restored() -> None:
    q, call = quantized("hand_written")
    q.train()
    q.norm.eval()  # type: ignore[union-attr, operator]
    modes = [module.training for module in q.modules()]
    statistics = q.norm.running_mean.clone()  # type: ignore[union-attr, operator]

    find_blocks(q, call)[0](q, call.tensors[0])

    assert [module.training for module in q.modules()] == modes
    assert torch.equal(q.norm.running_mean, statistics)  # type: ignore[union-attr, arg-type]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in q.modules())
    assert not any("quantized_weight" in vars(module) for module in q.modules())


class Unseen(nn.Module):
    """Between its modules a scripted function that no recording sees."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8))
        self.second, self.plain = nn.Sequential(nn.Linear(8, 5), _Scripted()), plain

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return x if self.plain else _doubled(x) + x


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone().mul_(2)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * gradient


def _doubled(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        doubled: Tensor = _Doubled.apply(x)
    return doubled


class _Scripted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _doubled(x)


@pytest.mark.parametrize("plain", [True, False])
def test_what_cannot_be_recorded_is_cut_at_modules(plain: bool) -> None:
    torch.manual_seed(0)
    net = Unseen(plain).eval()
    wrap(net)
    call = Call((torch.randn(4, 12),))

    blocks = find_blocks(net, call)

    if plain:
        assert [block.layers for block in blocks] == [("first.0",), ("first.2",), ("second.0",)]
        assert all("at its modules" in block.note for block in blocks)
    else:
        assert [block.layers for block in blocks] == [("first.0", "first.2", "second.0")]
        assert "is one block" in blocks[0].note
    assert_chain(net, blocks, call)


def test_a_large_block_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finding, "MANY_LAYERS", 3)
    q, call = quantized("dense")

    assert [block.note for block in find_blocks(q, call)] == [
        "4 layers are one block: no single tensor passes between them",
        "",
        "",
    ]


def test_lists_of_tensors_are_refused() -> None:
    model, _ = own("repeated")
    wrap(model)
    with pytest.raises(UnsupportedModel, match="takes lists"):
        find_blocks(model, Call(([torch.zeros(12), torch.zeros(12), torch.zeros(12)],)))
