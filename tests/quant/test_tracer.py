"""The traced pass: exact costs, groups, norms and signs, and budgets based on them."""

import functools
from math import ceil

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from saqcli.errors import InfeasibleBudget, UnsupportedModel
from saqcli.models.networks import NETWORKS
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.cost import Budget, Cost, CostModel, LayerCost, cost_model
from saqcli.quant.search_space import Candidates, SearchSpace, search_space
from saqcli.quant.tracer import Trace, trace
from saqcli.tasks.classification import check_output
from tests.support import tiny
from tests.support.golden import FLOAT, GOLDEN, MACS, Golden

W8A8 = LayerBits(weight=8, activation=8)
BUILDERS = {
    "resnet18": (torchvision.models.resnet18, 224),
    "resnet50": (torchvision.models.resnet50, 224),
    "mobilenetv2": (torchvision.models.mobilenet_v2, 224),
    "mobilenetv2_100": (functools.partial(torchvision.models.mobilenet_v2, num_classes=100), 224),
    "preresnet20": (functools.partial(NETWORKS["preresnet20"].build, num_classes=100), 32),
    "mobilenetv2_cifar": (functools.partial(NETWORKS["mobilenetv2_cifar"].build, num_classes=100), 32),
}


def traced(net: nn.Module, shape: tuple[int, ...]) -> Trace:
    convert.wrap(net)
    return trace(net, tiny.images(shape, 1))


@functools.cache
def known(name: str, side: int | None = None) -> Trace:
    """One of ``BUILDERS``, traced once; a smaller image is faster where only the graph matters."""
    build, full = BUILDERS[name]
    return traced(build(), (3, side or full, side or full))


def at(costs: CostModel, bits: int) -> int:
    """BOPs with all free layers at ``bits``."""
    if bits == FLOAT:
        return costs.float_bops
    return costs.bops(costs.uniform("", LayerBits(weight=bits, activation=bits)))


def groups(found: Trace) -> list[list[str]]:
    """The groups of more than one layer."""
    members: dict[str, list[str]] = {}
    for layer in found.layers.values():
        members.setdefault(layer.group, []).append(layer.name)
    return [names for names in members.values() if len(names) > 1]


# Golden numbers


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda g: f"{g.network}-{g.bits}")
def test_bops_match_the_published_exactly(golden: Golden) -> None:
    assert at(cost_model(known(golden.network)), golden.bits) == golden.bops


@pytest.mark.parametrize("name", MACS)
def test_macs_match_the_published_exactly(name: str) -> None:
    assert cost_model(known(name)).macs == MACS[name]


@pytest.mark.parametrize("golden", [g for g in GOLDEN if g.published], ids=lambda g: f"{g.network}-{g.bits}")
def test_golden_integers_round_to_paper_values(golden: Golden) -> None:
    value, unit = golden.published.split()
    assert f"{golden.bops / {'M': 1e6, 'G': 1e9}[unit]:.1f}" == value


def test_timm_and_torchvision_costs_agree() -> None:
    assert cost_model(traced(timm.create_model("resnet18"), (3, 224, 224))).macs == MACS["resnet18"]


def test_preresnet20_layer_costs() -> None:
    macs = sorted(layer.macs for layer in known("preresnet20").layers.values())
    assert macs == sorted([442_368, *[2_359_296] * 16, *[1_179_648] * 2, *[131_072] * 2, 6_400])


# Another counter


def flop_counter_macs(net: nn.Module, shape: tuple[int, ...]) -> int:
    """torch counts two operations a multiply-accumulate."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(tiny.images(shape, 1))
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", tiny.EXACT)
def test_tiny_network_macs_match_torch_counter(name: str) -> None:
    net, shape = tiny.EXACT[name]()
    expected = flop_counter_macs(net, shape)
    assert expected > 0
    found = traced(net, shape)
    assert sum(layer.macs for layer in found.layers.values()) == expected
    assert not found.unquantized


@pytest.mark.parametrize(
    "build",
    [
        torchvision.models.resnet18,
        torchvision.models.mobilenet_v2,
        functools.partial(timm.create_model, "resnet18"),
        functools.partial(timm.create_model, "mobilenetv2_100"),
    ],
    ids=["torchvision resnet18", "torchvision mobilenet_v2", "timm resnet18", "timm mobilenetv2_100"],
)
def test_known_network_macs_match_torch_counter(build: object) -> None:
    net = build()  # type: ignore[operator]
    expected = flop_counter_macs(net, (3, 64, 64))
    assert cost_model(traced(net, (3, 64, 64))).macs == expected


def test_packed_attention_macs() -> None:
    net, shape = tiny.attention()
    found = traced(net, shape)
    tokens = 4
    assert found.layers["attention"].macs == tokens * 12 * 36
    assert found.layers["attention.out_proj"].macs == tokens * 12 * 12


class Cross(nn.Module):
    """Tokens attended by learned queries: query, key and value are different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.queries = nn.Parameter(torch.randn(1, 5, 12))
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # (N, 4, 12)
        queries = self.queries.expand(len(x), -1, -1)  # (N, 5, 12)
        return self.head(self.attention(queries, x, x, need_weights=False)[0].mean(1))


def test_cross_attention_is_one_layer() -> None:
    found = traced(Cross(), (3, 8, 8))
    assert not found.idle
    assert not found.unquantized
    assert found.layers["attention"].macs == (5 + 4 + 4) * 12 * 12


# Groups, norms, signs


def test_resnet18_shortcuts_share_bits() -> None:
    expected = [[f"layer{k}.0.conv2", f"layer{k}.0.downsample.0"] for k in (2, 3, 4)]
    assert groups(known("resnet18", 64)) == expected
    assert groups(traced(timm.create_model("resnet18"), (3, 64, 64))) == expected


def test_resnet50_shortcuts_share_bits() -> None:
    assert groups(known("resnet50", 64)) == [
        [f"layer{k}.0.conv3", f"layer{k}.0.downsample.0"] for k in (1, 2, 3, 4)
    ]


def test_preresnet20_shortcuts_share_bits() -> None:
    pairs = groups(known("preresnet20"))
    assert [set(pair) for pair in pairs] == [{f"layer{k}.0.conv2", f"layer{k}.0.shortcut"} for k in (2, 3)]


def test_mobilenetv2_cifar_projections_are_tied() -> None:
    pairs = groups(known("mobilenetv2_cifar"))
    assert [len(pair) for pair in pairs] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["mobilenetv2", "resnet18"])
def test_identity_shortcuts_tie_nothing(name: str) -> None:
    found = known(name, 64)
    tied = {layer for pair in groups(found) for layer in pair}
    assert all(layer.group == layer.name for layer in found.layers.values() if layer.name not in tied)
    assert name != "mobilenetv2" or not tied


def test_tiny_residual_ties_only_its_projection() -> None:
    net, shape = tiny.residual()
    assert groups(traced(net, shape)) == [["3.main.3", "3.shortcut.0"]]


def test_resnet18_convolutions_name_their_norm() -> None:
    layers = known("resnet18", 64).layers
    for name, layer in layers.items():
        expected = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
        assert layer.norm == (None if name == "fc" else expected)


def test_norm_after_addition_has_no_layer() -> None:
    layers = known("preresnet20").layers
    assert layers["layer1.0.conv1"].norm == "layer1.0.bn2"
    assert layers["layer1.0.conv2"].norm is None


def test_layer_norm_belongs_to_previous_layer() -> None:
    net, shape = tiny.tokens()
    layers = traced(net, shape).layers
    assert {name: layer.norm for name, layer in layers.items() if layer.norm} == {"patches": "norm"}


def test_only_negative_inputs_are_signed() -> None:
    assert [n for n, layer in known("resnet18", 64).layers.items() if layer.input_is_signed] == ["conv1"]
    net, shape = tiny.depthwise()
    signed = [n for n, layer in traced(net, shape).layers.items() if layer.input_is_signed]
    assert signed == ["0", "2.expand.0", "3.expand.0"]  # image and linear bottlenecks


# Calls


class Odd(nn.Module):
    """A layer that runs twice, one that never runs, and a convolution mixed per image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.auxiliary = nn.Linear(8, 5)
        self.experts = nn.Parameter(torch.randn(2, 8, 8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(F.relu(self.twice(self.stem(x))))
        x = F.conv2d(x, self.experts.mean(0))
        x = x.mean((2, 3))
        return self.head(x) if not self.training else self.auxiliary(x)


def test_repeated_layer_is_counted_twice() -> None:
    layer = traced(Odd(), (3, 4, 4)).layers["twice"]
    assert layer.calls == 2
    assert layer.macs == 2 * 8 * 8 * 9 * 16
    assert layer.weight_count == 8 * 8 * 9


def test_unused_layer_is_idle() -> None:
    found = traced(Odd(), (3, 4, 4))
    assert found.idle == ["auxiliary"]
    assert list(found.layers) == ["stem", "twice", "head"]


def test_mixed_convolution_counts_at_32_bits() -> None:
    found = traced(Odd(), (3, 4, 4))
    (entry,) = found.unquantized.values()
    mixed = 8 * 8 * 16
    assert entry.macs == mixed
    costs = cost_model(found)
    quantized_macs = sum(layer.macs for layer in costs.layers)
    assert costs.macs == quantized_macs + mixed
    assert at(costs, 8) == 64 * quantized_macs + 1024 * mixed
    assert at(costs, 2) == 64 * (3 * 8 + 0) * 16 + 64 * 40 + 4 * found.layers["twice"].macs + 1024 * mixed


def test_timm_conditional_convolution_is_found() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.mixed = timm.layers.CondConv2d(4, 6, 3, padding=1, num_experts=2)
            self.head = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mixed(self.stem(x), torch.full((len(x), 2), 0.5))
            return self.head(x.mean((2, 3)))

    found = traced(Conditional(), (3, 4, 4))
    assert {name: entry.macs for name, entry in found.unquantized.items()} == {"mixed": 4 * 6 * 9 * 16}


def test_routed_weight_belongs_to_its_layer() -> None:
    net, shape = tiny.functional()
    found = traced(net, shape)
    assert found.routed == {"3": ["3.qkv"]}
    assert found.layers["3.qkv"].macs == 16 * 16


def test_tracing_leaves_the_model_unchanged() -> None:
    net, shape = tiny.conv_bn()
    net.train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    traced(net, shape)
    assert net.training
    assert all(module.training for module in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_traced_model_is_bit_identical() -> None:
    net, x = tiny.build("residual")
    with torch.no_grad():
        expected = net(x[:1])
    convert.wrap(net)
    assert torch.equal(trace(net, x[:1]).outputs, expected)


@pytest.mark.parametrize("side", [1, 3])
def test_image_shape_mismatch_is_refused(side: int) -> None:
    net, _ = tiny.mlp()
    with pytest.raises(UnsupportedModel, match=f"does not run on an image of 3x{side}x{side}"):
        traced(net, (3, side, side))


@pytest.mark.parametrize("output", [lambda x: (x, x), lambda x: x.unsqueeze(-1), lambda x: x.flatten()])
def test_non_logit_output_is_refused(output: object) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.shape = tiny.mlp()

        def forward(self, x: Tensor) -> object:
            return output(self.net(x))  # type: ignore[operator]

    with pytest.raises(UnsupportedModel, match="class scores"):
        check_output(traced(Strange(), (3, 4, 4)).outputs, 1)


# Pins, budget, size


def test_first_and_last_layers_are_pinned() -> None:
    pins = cost_model(known("resnet18", 64)).pins
    assert {name: pin for name, pin in pins.items() if pin} == {"conv1": W8A8, "fc": W8A8}


def test_all_stems_and_classifiers_are_pinned() -> None:
    class TwoStems(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.mid = nn.Conv2d(4, 4, 1)
            self.head, self.distilled = nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.mid(self.one(x) * self.two(x)).mean((2, 3))
            return (self.distilled(x) + self.head(x)) / 2

    costs = cost_model(traced(TwoStems(), (3, 4, 4)), classifiers=["distilled"])
    assert [name for name, pin in costs.pins.items() if pin is None] == ["mid"]


def test_float_layer_costs_32_bits() -> None:
    layer = LayerCost("a", "Linear", 10, 10, "a", None)
    assert layer.bops(LayerBits(weight=None, activation=None)) == 10 * 1024
    assert layer.bops(LayerBits(weight=4, activation=None)) == 10 * 128


def test_budget_bound_is_inclusive() -> None:
    for budget in (Budget(100), Budget(100, 7), Budget(size=7)):
        assert budget.admits(Cost(100, 7))
    assert not Budget(100).admits(Cost(101, 0))
    assert not Budget(size=7).admits(Cost(0, 8))
    assert not Budget(100, 7).admits(Cost(101, 7))
    assert not Budget(100, 7).admits(Cost(100, 8))


def space_of(costs: CostModel, *candidates: int) -> SearchSpace:
    return search_space("timm/resnet18", costs, Candidates(candidates))


def test_reachable_range() -> None:
    costs = cost_model(known("resnet18"))
    space = space_of(costs, 4, 2, 3)
    assert (space.floor.bops, space.ceiling.bops) == (at(costs, 2), at(costs, 4))
    for end, bits in ((space.floor, 2), (space.ceiling, 4)):
        assert end == costs.cost(costs.uniform("", LayerBits(weight=bits, activation=bits)))


def test_budget_below_floor_names_the_range() -> None:
    costs = cost_model(known("resnet18"))
    floor = 14_367_850_496
    space_of(costs, 2, 4).check_reachable(Budget(floor))
    with pytest.raises(InfeasibleBudget) as refusal:
        space_of(costs, 2, 4).check_reachable(Budget(floor - 1))
    for part in ("timm/resnet18", "at its fewest bits", "14.37 G to 34.71 GBOPs", "Raise the budget"):
        assert part in str(refusal.value)
    assert "candidates" not in str(refusal.value)  # 2 bits are the minimum
    with pytest.raises(InfeasibleBudget, match=r"`quantization\.candidates`"):
        space_of(costs, 3, 4).check_reachable(Budget(floor))


def test_group_is_one_decision_and_pins_none() -> None:
    costs = cost_model(known("resnet18"))
    found = space_of(costs, 2, 3, 4).decisions
    assert len(found) == 16  # the count of SAMQ's decisions on ResNet-18
    assert {layer.name for decision in found for layer in decision.members} == {
        name for name, pin in costs.pins.items() if pin is None
    }


def test_size_includes_steps_and_float_tensors() -> None:
    net, shape = tiny.conv_bn()
    config = BitConfig(
        model="tiny",
        layers={
            "0": W8A8,
            "3": LayerBits(weight=3, activation=3),
            "8": LayerBits(weight=None, activation=4),
        },
    )
    weights = 3 * 8 * 9 + 4 * 8 + ceil(8 * 8 * 9 * 3 / 8) + 4 * 8 + 4 * 8 * 5
    rest = 4 * (5 + 2 * (8 + 8 + 8 + 8))  # the head's bias; scale, shift, mean and variance of two norms
    costs = cost_model(traced(net, shape))
    assert costs.size(config) == costs.cost(config).size == weights + rest


@pytest.mark.parametrize("name", tiny.TINY)
def test_float_size_is_four_bytes_per_number(name: str) -> None:
    net, shape = tiny.TINY[name]()
    numbers = [*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())]
    expected = 4 * sum(t.numel() for t in numbers)
    assert cost_model(traced(net, shape)).float_size == expected


def test_unused_layer_is_stored_as_float() -> None:
    net = Odd()
    costs = cost_model(traced(net, (3, 4, 4)))
    config = costs.uniform("", W8A8)
    assert costs.float_size == 4 * sum(p.numel() for p in net.parameters())
    quantized = [net.stem, net.twice, net.head]
    packed = sum(layer.weight.numel() + 4 * layer.weight.shape[0] for layer in quantized)
    floats = sum(p.numel() for p in net.parameters()) - sum(layer.weight.numel() for layer in quantized)
    assert costs.size(config) == packed + 4 * floats


def test_tied_weight_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 12, bias=False), nn.Linear(12, 12, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x.flatten(1)))

    costs = cost_model(traced(Tied(), (3, 2, 2)))
    config = BitConfig(model="tiny", layers=dict.fromkeys(("one", "two"), LayerBits(weight=4, activation=4)))
    assert costs.size(config) == 72 + 4 * 12
    assert costs.float_size == 4 * 144
    assert len({layer.group for layer in costs.layers}) == 1  # they cannot have different bits either


@pytest.mark.parametrize("name", tiny.TINY)
def test_tiny_networks_are_small(name: str) -> None:
    net, _ = tiny.TINY[name]()
    assert sum(p.numel() for p in net.parameters()) < 10_000


# Where tensors meet, and what stays in floating point


class Branches(nn.Module):
    """Two concatenated branches, as in an inception block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(12, tiny.CLASSES)
        self.one, self.two = (
            nn.Conv2d(4, 8, 1),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([F.relu(self.one(x)), F.relu_(self.two(x))], 1)
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all previous ones, as in a dense block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * i, 2, 3, padding=1) for i in range(3))
        self.head = nn.Linear(9, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


def test_concatenated_branches_form_a_group() -> None:
    assert groups(traced(Branches(), (3, 8, 8))) == [["one", "two.1"]]
    dense = groups(traced(Dense(), (3, 8, 8)))
    assert dense == []


class Sum(nn.Module):
    """Three branches that are added, and a fourth that is also used elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, tiny.CLASSES)
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b, c, d = (branch(x) for branch in self.branches)
        return self.head((F.relu(sum([a, b])) + c + d - d.mean()).mean((2, 3)))


def test_all_summands_form_a_group() -> None:
    assert groups(traced(Sum(), (3, 8, 8))) == [["branches.0", "branches.1", "branches.2"]]


def test_fire_modules_share_bits() -> None:
    squeezenet = traced(torchvision.models.squeezenet1_1(), (3, 64, 64))
    assert [names for names in groups(squeezenet) if "features.3" in names[0]] == [
        ["features.3.expand1x1", "features.3.expand3x3"]
    ]
    assert groups(traced(timm.create_model("densenet121"), (3, 64, 64))) == []


def test_recurrent_layer_stays_float() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows, self.head = nn.LSTM(24, 5, batch_first=True, bidirectional=True), nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rows(x.flatten(2).reshape(len(x), 8, 24))[0].mean(1))

    (left,) = traced(Recurrent(), (3, 8, 8)).unquantized.values()
    assert (left.name, left.kind) == ("rows", "LSTM")
    assert left.macs == 2 * 8 * (24 + 5) * 4 * 5  # directions, steps, gates of input and state
    assert "recurrent" in left.reason


def test_input_dependent_weight_stays_float() -> None:
    net = timm.create_model("efficientnet_cc_b0_4e")
    found = traced(net, (3, 64, 64)).unquantized
    assert {layer.kind for layer in found.values()} == {"CondConv2d"}
    assert all("depends on the image" in layer.reason for layer in found.values())


@pytest.mark.parametrize("how", ["matmul", "slice"])
def test_unsupported_weight_use_is_reported(how: str) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.head = nn.Linear(48, 48), nn.Linear(48, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            if how == "matmul":
                return self.head(x @ self.used.weight.T)
            return self.head(F.linear(x, self.used.weight[:48], self.used.bias))

    found = traced(Strange(), (3, 4, 4))
    (left,) = found.unquantized.values()
    assert left.macs == 48 * 48
    assert left.reason == "multiplies with the weight of used in a way that cannot be followed"
    assert not found.products
