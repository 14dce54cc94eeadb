"""Products of two activations: found, counted, and quantized at the bits of the layer they follow."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saqcli.quant import calibration, convert, products
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.layer import quantized_layers
from saqcli.quant.products import QuantizedProduct, quantized_products
from saqcli.quant.routing import RoutedParent
from saqcli.quant.tracer import Trace, trace
from saqcli.training.perturbation import PerturbedSet
from tests.support import tiny

GIGA = 10**9


class Attend(nn.Module):
    """Self-attention over tokens (N, L, 8), by ``multiply(q, k, v)``."""

    def __init__(self, multiply: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.qkv, self.proj, self.multiply = nn.Linear(8, 24), nn.Linear(8, 8), multiply

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj(self.multiply(q, k, v))


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


def by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(input=q * q.shape[-1] ** -0.5, other=k.mT)
    return torch.matmul(scores.softmax(-1), other=v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.bmm(q * q.shape[-1] ** -0.5, mat2=k.mT)
    return torch.bmm(scores.softmax(-1), v)


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("nqc,nkc->nqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("...qk, ...kc -> ...qc", [scores.softmax(-1), v])


WAYS = {"fused": fused, "matmul": by_matmul, "named": by_name, "bmm": by_bmm, "einsum": by_einsum}


class Network(nn.Module):
    """Patches, a block of attention, a head."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.patches, self.block, self.head = nn.Conv2d(3, 8, 4, 4), block, nn.Linear(8, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def network(way: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Network(Attend(WAYS[way])).eval(), tiny.images((3, 16, 16), 4)


def quantized(
    net: nn.Module, x: Tensor, bits: int, more: tuple[int, ...] = (), quantizer: str = "clip"
) -> tuple[Trace, CostModel, dict[str, Any]]:
    """Quantize ``net`` with its products, as the pipelines do."""
    convert.wrap(net)
    found = trace(net, x[:1])
    for parent, children in found.routed.items():
        convert.route(net, [parent], children)
    convert.add_products(net, {p.name: p.follows for p in found.products if p.follows})
    costs = cost_model(found, products=True)
    statistics = calibration.observe(net, [x])
    config = BitConfig(
        model="tiny", layers=dict.fromkeys(quantized_layers(net), LayerBits(weight=bits, activation=bits))
    )
    wider = [LayerBits(weight=width, activation=width) for width in more]
    options = {name: wider for name in config.layers}  # noqa: C420
    signed = {name: s.signed for name, s in statistics.items()}
    convert.install(net, Scheme(quantizer=quantizer), config, signed, options)
    calibration.fit(net, statistics)
    return found, costs, statistics


def by_hand(net: nn.Module, x: Tensor) -> Tensor:
    """The whole quantized network in float64, with explicit products, steps and codes."""

    def on_grid(quantizer: Any, values: Tensor) -> Tensor:
        step, grid = quantizer.step().double(), quantizer.grid()
        return (values / step).round().clamp(grid.lowest, grid.highest) * step

    def weight(layer: Any) -> Tensor:
        return layer.quantized_weight().double()

    block = net.block
    first, second = (block.products[name] for name in ("0", "1"))
    x = F.conv2d(
        on_grid(net.patches.input_quantizer, x.double()), weight(net.patches), net.patches.bias.double(), 4
    )
    x = x.flatten(2).transpose(1, 2)
    q, k, v = F.linear(
        on_grid(block.qkv.input_quantizer, x), weight(block.qkv), block.qkv.bias.double()
    ).chunk(3, -1)
    if block.multiply is not fused:
        q = q * 8**-0.5
    scores = on_grid(first.input_quantizer, q) @ on_grid(first.weight_quantizer, k).mT
    if block.multiply is fused:
        scores = scores * 8**-0.5
    mixed = on_grid(second.input_quantizer, scores.softmax(-1)) @ on_grid(second.weight_quantizer, v)
    x = x + F.linear(on_grid(block.proj.input_quantizer, mixed), weight(block.proj), block.proj.bias.double())
    return F.linear(on_grid(net.head.input_quantizer, x.mean(1)), weight(net.head), net.head.bias.double())


# Found and counted


@pytest.mark.parametrize("way", WAYS)
def test_products_are_found_in_every_spelling(way: str) -> None:
    net, x = network(way)
    convert.wrap(net)
    found = trace(net, x[:1]).products
    assert [(p.name, p.follows, p.macs) for p in found] == [
        ("block.products.0", "block.qkv", 16 * 16 * 8),
        ("block.products.1", "block.qkv", 16 * 16 * 8),
    ]


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_mambaout"])
def test_macs_match_torch_counter(name: str) -> None:
    net = timm.create_model(name).eval()
    size = net.pretrained_cfg["input_size"]
    x = torch.zeros(1, *size)
    # Not every version of torch counts its fused attention kernels.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(x)
    convert.wrap(net)
    found = trace(net, x)
    products_alone = sum(product.macs for product in found.products)
    assert 2 * (cost_model(found).macs + products_alone) == counter.get_total_flops()
    assert cost_model(found, products=True).macs == cost_model(found).macs + products_alone


@pytest.mark.parametrize(
    ("name", "full", "by_bits"),
    [
        ("deit_tiny_patch16_224", 1283.772, {4: 21.455, 3: 12.883, 2: 6.760}),
        pytest.param(
            "deit_small_patch16_224", 4709.255, {4: 76.375, 3: 44.590, 2: 21.887}, marks=pytest.mark.slow
        ),
        pytest.param(
            "vit_base_patch16_224", 17985.360, {4: 286.607, 3: 164.475, 2: 77.238}, marks=pytest.mark.slow
        ),
        pytest.param(
            "swin_tiny_patch4_window7_224",
            3610.607,
            {4: 57.146, 3: 32.571, 2: 15.017},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_transformer_bops_match_the_published(name: str, full: float, by_bits: dict[int, float]) -> None:
    net = timm.create_model(name).eval()
    convert.wrap(net)
    costs = cost_model(trace(net, torch.zeros(1, 3, 224, 224)), products=True)
    assert round(costs.float_bops / GIGA, 3) == full
    for bits, published in by_bits.items():
        config = costs.uniform(name, LayerBits(weight=bits, activation=bits))
        assert round(costs.bops(config) / GIGA, 3) == published


def test_matmul_with_parameter_is_no_product() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + (x @ self.table.T).softmax(-1) @ (x * 2)

    net = Network(Table()).eval()
    convert.wrap(net)
    found = trace(net, tiny.images((3, 16, 16), 1))
    (left,) = found.unquantized.values()
    assert (left.name, left.macs) == ("block", 16 * 16 * 8)
    (product,) = found.products
    assert (product.name, product.macs, product.follows) == ("block.products.1", 16 * 16 * 8, "patches")


# torch's attention, written out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.randn(1, 1, 6, 6, dtype=torch.double)},
        {"attn_mask": torch.eye(6, dtype=torch.bool)},
        {
            "attn_mask": torch.eye(6, dtype=torch.bool)[[0, 1, 2, 3, 4, 4]]
            & torch.tensor([[True]] * 5 + [[False]])
        },
        {"enable_gqa": True},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_decomposed_attention_equals_torch(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    heads = 2 if options.get("enable_gqa") else 4
    q, k, v = (
        torch.randn(2, 4, 6, 5).double(),
        torch.randn(2, heads, 6, 5).double(),
        torch.randn(2, heads, 6, 7).double(),
    )
    written, _ = products.attention(QuantizedProduct(), QuantizedProduct(), q, k, v, **options)
    torch.testing.assert_close(written, F.scaled_dot_product_attention(q, k, v, **options))


def test_attention_dropout_is_kept() -> None:
    q = torch.randn(1, 1, 64, 8)
    written, _ = products.attention(
        QuantizedProduct(), QuantizedProduct(), q, q, torch.ones(1, 1, 64, 1), dropout_p=0.5
    )
    assert written.std() > 0.05  # without it every row of probabilities adds up to 1


# Quantized


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [3, 8])
def test_quantized_network_matches_float64(way: str, bits: int) -> None:
    net, x = network(way)
    quantized(net, x, bits)
    with torch.no_grad():
        difference = (net(x).double() - by_hand(net, x)).abs()
    assert difference.median() < 1e-5  # a value at the edge between two codes may round to the other side
    assert difference.max() < 0.01
    unsigned = net.block.products["1"].input_quantizer  # probabilities
    assert unsigned.grid().lowest == 0


def test_nested_modules_quantize_operands_once() -> None:
    """A child's product is not its parent's, though it runs within the parent's forward."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.inner = Child(), Attend(by_matmul)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x)
            scores = x @ x.mT + self.position(x)
            return scores.softmax(-1) @ x

    torch.manual_seed(0)
    net, x = Network(Parent()).eval(), tiny.images((3, 16, 16), 4)
    found, _, statistics = quantized(net, x, 4)
    assert [p.name for p in found.products] == [
        "block.inner.products.0",
        "block.inner.products.1",
        "block.products.2",
        "block.products.4",
    ]
    calls: list[str] = []
    for name, product in quantized_products(net).items():
        product.register_forward_hook(lambda *_, name=name: calls.append(name))
    net(x)
    assert calls == [p.name for p in found.products]
    assert (
        statistics["block.products.4.left"].highest <= 1
    )  # the probabilities, not what the child multiplies


def test_packed_torch_attention_has_products() -> None:
    net, x = tiny.build("attention")
    with torch.no_grad():
        expected = net(x)
    found, _, _ = quantized(net, x, 8)
    assert [p.name for p in found.products] == ["attention.products.0", "attention.products.1"]
    calls: list[None] = []
    for product in quantized_products(net).values():
        product.register_forward_hook(lambda *_: calls.append(None))
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=0, atol=0.05)
    assert len(calls) == 2


def test_product_bits_follow_their_layer() -> None:
    net, x = network("fused")
    _, costs, _ = quantized(net, x, 8, more=(2, 4))
    layer = quantized_layers(net)["block.qkv"]
    for bits in (2, 4, 8):
        convert.set_bits(layer, LayerBits(weight=8, activation=bits))
        for product in layer.followers:
            assert [product.input_quantizer.bits, product.weight_quantizer.bits] == [bits, bits]
    cost = next(each for each in costs.layers if each.name == "block.qkv")
    both = 2 * 16 * 16 * 8
    assert cost.bops(LayerBits(weight=4, activation=3)) == 16 * 8 * 24 * 4 * 3 + both * 3 * 3
    assert cost.layer_bops(LayerBits(weight=4, activation=3)) == 16 * 8 * 24 * 4 * 3


@pytest.mark.parametrize("way", ["fused", "matmul"])
def test_copy_pickle_and_unwrap(way: str) -> None:
    net, x = network(way)
    with torch.no_grad():
        plain = net(x)
        quantized(net, x, 4)
        expected = net(x)
        twin = copy.deepcopy(net)
        assert torch.equal(twin(x), expected)
        followers = quantized_layers(twin)["block.qkv"].followers
        assert {id(p) for p in followers} == {id(p) for p in quantized_products(twin).values()}
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), expected)
        convert.unwrap(net)
        assert torch.equal(net(x), plain)
    assert not any(isinstance(m, QuantizedProduct | RoutedParent) for m in net.modules())


def test_activation_clips_include_products() -> None:
    net, x = network("fused")
    quantized(net, x, 4)
    kinds = PerturbedSet(net, ["activation_clips"])
    own = {id(p) for product in quantized_products(net).values() for p in product.parameters()}
    assert own
    assert own <= {id(p) for p in kinds.parameters}
    _, gradients = kinds.gradients(lambda: net(x).square().sum())
    assert all(g is not None and bool(g.any()) for g in gradients)


def test_products_take_quantizers_that_learn_nothing() -> None:
    net, x = network("fused")
    before = net(x)
    quantized(net, x, 8, quantizer="dorefa")
    assert not any(list(product.parameters()) for product in quantized_products(net).values())
    assert torch.allclose(net(x), before, atol=0.1 * float(before.detach().abs().max()))


def test_layer_with_own_products_keeps_them_float() -> None:
    class Squaring(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return (x @ x.mT).softmax(-1) @ x

    net = Network(Squaring(8, 8)).eval()
    convert.wrap(net)
    found = trace(net, tiny.images((3, 16, 16), 1))
    assert [product.follows for product in found.products] == [None, None]
    assert cost_model(found, products=True).macs == cost_model(found).macs
