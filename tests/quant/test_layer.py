"""The class swap: nothing changes until quantizers are installed; then every reader of a weight gets Q(w)."""

import copy
import io
import pickle
import warnings
from collections.abc import Iterator

import pytest
import timm
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from saqcli.errors import ConfigError, PolicyMismatch, UnsupportedModel
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.layer import QuantizedLayer, frozen_batch_stats, perturbed, quantized_layers, zero_ports
from saqcli.quant.quantizers import QUANTIZERS, Quantizer
from saqcli.quant.routing import RoutedParent
from saqcli.quant.tracer import trace
from saqcli.quant.wrapping import unwrap_layer, wrap_layer
from tests.support import tiny
from tests.support.cases import scheme_with

every_net = pytest.mark.parametrize("name", tiny.TINY)
every_exact_net = pytest.mark.parametrize("name", tiny.EXACT)
every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS)


def run(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def names_of_float(net: nn.Module) -> list[str]:
    return [n for n, m in net.named_modules() if isinstance(m, convert.WRAPPED)]


class Halve(nn.Module):
    """A stand-in quantizer whose use is visible."""

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


# Wrapping


@every_exact_net
@pytest.mark.parametrize("training", [False, True])
def test_wrapping_is_bit_identical(name: str, training: bool) -> None:
    net, x = tiny.build(name)
    net.train(training)
    expected = run(net, x)
    convert.wrap(net)
    assert torch.equal(run(net, x), expected)


@every_exact_net
def test_wrapped_gradients_are_bit_identical(name: str) -> None:
    net, x = tiny.build(name)
    net(x).square().sum().backward()
    expected = {n: p.grad for n, p in net.named_parameters()}
    net.zero_grad()
    convert.wrap(net)
    net(x).square().sum().backward()
    for n, p in net.named_parameters():
        assert torch.equal(p.grad, expected[n])


@every_net
def test_all_layer_types_are_wrapped(name: str) -> None:
    net, _ = tiny.build(name)
    expected = names_of_float(net)
    assert expected
    assert list(convert.wrap(net)) == expected


@every_net
def test_wrapping_keeps_keys_and_parameters(name: str) -> None:
    net, _ = tiny.build(name)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    parameters = dict(net.named_parameters())
    convert.wrap(net)
    assert list(net.state_dict()) == list(state)
    for key, parameter in net.named_parameters():
        assert parameter is parameters[key]
    net.load_state_dict(state)  # a float checkpoint fits


@every_net
def test_installing_quantizers_only_adds_keys(name: str) -> None:
    net, x = tiny.build(name)
    keys = set(net.state_dict())
    tiny.quantized(net, x)
    added = set(net.state_dict()) - keys
    assert keys <= set(net.state_dict())
    assert added
    assert all(key.endswith("_quantizer.clipping_level") for key in added)


@every_net
@every_quantizer
def test_installed_quantizers_change_the_output(name: str, quantizer: str) -> None:
    net, x = tiny.build(name)
    expected = run(net, x)
    tiny.quantized(net, x, 3, scheme_with(quantizer))
    assert not torch.equal(run(net, x), expected)


@every_net
def test_8_bits_are_closer_than_2(name: str) -> None:
    net, x = tiny.build(name)
    expected = run(net, x)
    tiny.quantized(net, x, 8, candidates=(2,))
    fine = (run(net, x) - expected).norm()
    layers = quantized_layers(net)
    two = LayerBits(weight=2, activation=2)
    convert.apply(net, BitConfig(model="tiny", layers=dict.fromkeys(layers, two)))
    assert fine < 0.25 * (run(net, x) - expected).norm()


@every_net
def test_every_layer_quantizes_weight_and_input(name: str) -> None:
    """Weight and input each change the output on their own, in every layer."""
    net, x = tiny.build(name)
    layers = tiny.quantized(net, x)
    for layer in layers.values():
        layer.weight_quantizer = layer.input_quantizer = nn.Identity()
    expected = run(net, x)
    for layer_name, layer in layers.items():
        for operand in ("weight_quantizer", "input_quantizer"):
            setattr(layer, operand, Halve())
            assert not torch.equal(run(net, x), expected), f"{layer_name}.{operand} is not used"
            setattr(layer, operand, nn.Identity())
    assert torch.equal(run(net, x), expected)


@every_net
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_independent(name: str, how: str) -> None:
    net, x = tiny.build(name)
    tiny.quantized(net, x)
    expected = run(net, x)
    if how == "deepcopy":
        twin = copy.deepcopy(net)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(net))
    else:
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(run(twin, x), expected)
    assert [type(m) for m in twin.modules()] == [type(m) for m in net.modules()]
    for layer in quantized_layers(twin).values():
        layer.latent_weight().data.zero_()
    assert torch.equal(run(net, x), expected)
    assert not torch.equal(run(twin, x), expected)


@every_net
def test_unwrapping_restores_objects_and_bits(name: str) -> None:
    net, x = tiny.build(name)
    expected = run(net, x)
    modules, parameters = dict(net.named_modules()), dict(net.named_parameters())
    classes = {n: type(m) for n, m in modules.items()}
    attributes = {n: set(m.__dict__) for n, m in modules.items()}
    tiny.quantized(net, x)
    convert.unwrap(net)
    assert torch.equal(run(net, x), expected)
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[n] for n, p in net.named_parameters())
    assert {n: type(m) for n, m in net.named_modules()} == classes
    assert all(m is modules[n] for n, m in net.named_modules())
    assert {n: set(m.__dict__) for n, m in net.named_modules()} == attributes


def test_quantized_model_is_not_wrapped_again() -> None:
    net, _ = tiny.mlp()
    convert.wrap(net)
    with pytest.raises(UnsupportedModel, match="already quantized"):
        convert.wrap(net)


def test_model_without_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="nothing to quantize"):
        convert.wrap(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


@pytest.mark.parametrize("options", [{"kdim": 3}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_unpacked_attention_is_refused(options: dict) -> None:
    net = nn.ModuleDict({"first": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2, **options)})
    with pytest.raises(UnsupportedModel, match="attention attention"):
        convert.wrap(net)
    assert not quantized_layers(net)


def test_policy_of_another_network_is_refused() -> None:
    net, _ = tiny.mlp()
    convert.wrap(net)
    config = BitConfig(model="other", layers={"9": LayerBits(weight=4, activation=4)})
    with pytest.raises(PolicyMismatch):
        convert.install(net, convert.Scheme(), config, {})


def test_unknown_quantizer_lists_the_known() -> None:
    layer = wrap_layer(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="clip"):
        convert.Scheme(quantizer="magic").new_weight_quantizer(layer, [4])


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 4), (4, 1)),
        (nn.Conv2d(6, 4, 3), (4, 1, 1, 1)),
        (nn.Conv1d(6, 4, 3), (4, 1, 1)),
        (nn.ConvTranspose2d(6, 4, 3), (1, 4, 1, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_per_channel_levels_follow_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    wrapped = wrap_layer(layer)
    assert convert.Scheme().level_shape(wrapped) == shape
    assert convert.Scheme(granularity="tensor").level_shape(wrapped) == ()


@every_net
def test_applied_bits_are_read_back(name: str) -> None:
    net, x = tiny.build(name)
    layers = tiny.quantized(net, x, 4, candidates=(2, 3, 8))
    mixed = {n: LayerBits(weight=2 + k % 2, activation=8 - 4 * (k % 2)) for k, n in enumerate(layers)}
    config = BitConfig(model="tiny", layers=mixed)
    convert.apply(net, config)
    assert convert.active_bits(net, "tiny", mixed) == config


def test_operand_without_bits_stays_float() -> None:
    net, x = tiny.build("mlp")
    layers = convert.wrap(net)
    expected = run(net, x)
    none = LayerBits(weight=None, activation=None)
    config = BitConfig(model="tiny", layers=dict.fromkeys(layers, none))
    convert.install(net, convert.Scheme(), config, dict.fromkeys(layers, True))
    assert convert.active_bits(net, "tiny", layers) == config
    assert torch.equal(run(net, x), expected)


def test_unquantized_layer_is_the_float_layer() -> None:
    net, _ = tiny.mlp()
    convert.wrap(net)
    convert.leave_float(net, ["3"])
    assert type(net[3]) is nn.Linear
    assert list(quantized_layers(net)) == ["1", "5"]


def test_attribute_error_in_quantizer_is_raised() -> None:
    """nn.Module turns a property's AttributeError into a lookup, which finds the float Parameter."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.no_such_thing

    layer = wrap_layer(nn.Linear(3, 3))
    layer.weight_quantizer = Broken()
    with pytest.raises(RuntimeError, match="quantized weight of Linear"):
        layer(torch.randn(2, 3))


# The port


def closure(net: nn.Module, x: Tensor) -> None:
    net(x).square().sum().backward()


@every_net
@pytest.mark.parametrize("bits", [2, 8])
def test_port_gradient_is_bit_identical(name: str, bits: int) -> None:
    net, x = tiny.build(name)
    layers = list(tiny.quantized(net, x, bits).values())
    kept: dict[int, Tensor] = {}

    def keep(quantizer: nn.Module, _: object, output: Tensor) -> None:
        output.retain_grad()
        kept[id(quantizer)] = output

    handles = [layer.weight_quantizer.register_forward_hook(keep) for layer in layers]
    closure(net, x)
    for handle in handles:
        handle.remove()
    ports = zero_ports(layers)
    with perturbed(layers, ports):
        closure(net, x)
    for layer, port in zip(layers, ports, strict=True):
        assert port.grad is not None
        assert port.grad.any()
        assert torch.equal(port.grad, kept[id(layer.weight_quantizer)].grad)


@every_net
def test_perturbation_adds_to_quantized_weight(name: str) -> None:
    net, x = tiny.build(name)
    layers = list(tiny.quantized(net, x).values())
    expected = run(net, x)
    noise = [0.1 * torch.randn_like(layer.latent_weight()) for layer in layers]
    with torch.no_grad():
        targets = [layer.quantized_weight() + e for layer, e in zip(layers, noise, strict=True)]
        with perturbed(layers, noise):
            for layer, target in zip(layers, targets, strict=True):
                assert torch.equal(layer.quantized_weight(), target)
            assert not torch.equal(net(x), expected)
    assert torch.equal(run(net, x), expected)


def test_ports_are_cleared_after_exceptions() -> None:
    net, x = tiny.build("conv_bn")
    layers = list(tiny.quantized(net, x).values())
    with pytest.raises(KeyboardInterrupt), perturbed(layers, zero_ports(layers)):
        raise KeyboardInterrupt
    assert all(layer.perturbation is None for layer in layers)


def test_ports_are_cleared_if_too_few_perturbations() -> None:
    net, x = tiny.build("conv_bn")
    layers = list(tiny.quantized(net, x).values())
    with pytest.raises(ValueError, match="shorter"), perturbed(layers, zero_ports(layers)[:-1]):
        pass
    assert all(layer.perturbation is None for layer in layers)


@pytest.fixture(params=["torch", "timm", "instance"])
def normed(request: pytest.FixtureRequest) -> Iterator[tuple[nn.Module, Tensor]]:
    """A network in train mode with a norm of torch, of timm with built-in activation, or of instances."""
    norm: nn.Module = nn.BatchNorm2d(4) if request.param == "torch" else timm.layers.BatchNormAct2d(4)
    if request.param == "instance":
        norm = nn.InstanceNorm2d(4, track_running_stats=True)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm).train(), torch.randn(8, 3, 4, 4)


def test_frozen_norms_keep_their_statistics(normed: tuple[nn.Module, Tensor]) -> None:
    net, x = normed
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with frozen_batch_stats(net):
        frozen = net(x)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert torch.equal(net(x), frozen)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    assert net[1].num_batches_tracked == (0 if isinstance(net[1], nn.InstanceNorm2d) else 1)


def test_norms_unfreeze_after_exceptions(normed: tuple[nn.Module, Tensor]) -> None:
    net, _ = normed
    with pytest.raises(KeyError), frozen_batch_stats(net):
        {}["stop"]
    assert net[1].track_running_stats
    assert net[1].running_mean is not None


def test_eval_norms_are_not_frozen() -> None:
    frozen, plain = nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, track_running_stats=False)
    net = nn.Sequential(frozen, plain)
    with frozen_batch_stats(net):
        assert frozen.track_running_stats
    assert not plain.track_running_stats


# Layers with a custom forward


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d])
def test_conv1d_and_conv3d_are_bit_identical(kind: type[nn.Module]) -> None:
    layer = kind(4, 6, 3)
    x = torch.randn(2, 4, *[5] * (1 if "1d" in kind.__name__ else 3))
    expected = run(layer, x)
    assert torch.equal(run(wrap_layer(layer), x), expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_is_bit_identical(stride: int) -> None:
    layer, x = Conv2dSame(3, 4, 3, stride), torch.randn(2, 3, 7, 7)
    expected = run(layer, x)
    assert torch.equal(run(wrap_layer(layer), x), expected)


STANDARDIZED = [StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame]
every_standardized = pytest.mark.parametrize("kind", STANDARDIZED, ids=lambda kind: kind.__name__)


@every_standardized
@pytest.mark.parametrize("stride", [1, 2])
def test_standardized_convolutions_are_bit_identical(kind: type[nn.Module], stride: int) -> None:
    layer, x = kind(3, 4, 3, stride), torch.randn(2, 3, 7, 7)
    expected = run(layer, x)
    wrapped = wrap_layer(layer)
    assert torch.equal(run(wrapped, x), expected)
    unwrap_layer(wrapped)
    assert type(layer) is kind
    assert torch.equal(run(layer, x), expected)


@every_standardized
def test_standardization_precedes_quantization(kind: type[nn.Module]) -> None:
    """Standardizing a quantized weight would leave the grid."""
    net = nn.Sequential(kind(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    x = torch.randn(2, 3, 7, 7)
    layer = tiny.quantized(net, x, 3)["0"]
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Quantizer)
    with torch.no_grad():
        codes = layer.quantized_weight() / quantizer.step()
        assert torch.allclose(codes, codes.round(), atol=1e-5)
        assert torch.equal(quantizer.codes(layer.effective_weight()), codes.round().int())
        before = net(x)
        layer.latent_weight().mul_(3)  # standardization removes a factor, up to its epsilon
        assert torch.allclose(net(x), before, atol=1e-3)


# nn.MultiheadAttention


def masks() -> dict[str, dict[str, Tensor]]:
    blocked = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    numbers = torch.linspace(-1, 1, 25).view(5, 5)
    many = torch.linspace(-2, 2, 2 * 4 * 25).view(8, 5, 5)
    hidden = torch.zeros(2, 5).masked_fill(padding, float("-inf"))
    return {
        "none": {},
        "boolean": {"attn_mask": blocked},
        "additive": {"attn_mask": numbers},
        "a head": {"attn_mask": many},
        "a head, boolean": {"attn_mask": blocked.expand(8, 5, 5)},
        "padding": {"key_padding_mask": padding},
        "additive padding": {"key_padding_mask": hidden},
        "finite padding": {"key_padding_mask": torch.linspace(-1, 1, 10).view(2, 5)},
        "both boolean": {"attn_mask": blocked, "key_padding_mask": padding},
        "both additive": {"attn_mask": numbers, "key_padding_mask": hidden},
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("mask", masks())
def test_wrapped_attention_equals_float(batch_first: bool, cross: bool, mask: str) -> None:
    attention = nn.MultiheadAttention(12, 4, batch_first=batch_first).eval()
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    query, other = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    if not batch_first:
        query, other = query.transpose(0, 1), other.transpose(0, 1)
    arguments = (query, other, other) if cross else (query, query, query)
    options = masks()[mask]
    with torch.no_grad():
        expected = attention(*arguments, need_weights=False, **options)[0]
        convert.wrap(attention)
        actual = attention(*arguments, need_weights=False, **options)[0]
    # Outputs are of order 1; products are summed in another order.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layer", ["attention", "attention.out_proj"])
@pytest.mark.parametrize("operand", ["weight_quantizer", "input_quantizer"])
def test_attention_projections_are_quantized(layer: str, operand: str) -> None:
    net, x = tiny.build("attention")
    layers = convert.wrap(net)
    expected = run(net, x)
    setattr(layers[layer], operand, Halve())
    assert not torch.allclose(run(net, x), expected, atol=1e-4)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fused_encoder_layer_is_quantized(norm_first: bool, stacked: bool, padded: bool) -> None:
    net: nn.Module = nn.TransformerEncoderLayer(12, 2, 16, batch_first=True, norm_first=norm_first)
    if stacked:
        net = nn.TransformerEncoder(net, 1, enable_nested_tensor=not norm_first)
    net.eval()
    x = torch.randn(2, 5, 12)
    options = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 4 + [True]])} if padded else {}
    seen = torch.ones(2, 5, dtype=torch.bool) if not padded else ~options["src_key_padding_mask"]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nested tensors are a prototype
        expected = net(x, **options)
        layers = convert.wrap(net)
        assert len(layers) == 4
        wrapped = net(x, **options)
        torch.testing.assert_close(wrapped[seen], expected[seen], rtol=0, atol=2e-6)
        for name, layer in layers.items():
            for operand in ("weight_quantizer", "input_quantizer"):
                setattr(layer, operand, Halve())
                assert not torch.equal(net(x, **options)[seen], wrapped[seen]), (
                    f"{name}.{operand} is bypassed"
                )
                setattr(layer, operand, nn.Identity())


def test_unwrapped_encoder_layer_may_fuse_again() -> None:
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 16, batch_first=True), 1).eval()
    before = {n: dict(m.__dict__) for n, m in net.named_modules()}
    convert.wrap(net)
    assert net.layers[0].activation_relu_or_gelu == 0
    assert not net.use_nested_tensor
    convert.unwrap(net)
    assert {n: m.__dict__ for n, m in net.named_modules()} == before


# Parents that use a child's weight


def swin_v2() -> nn.Module:
    return timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=16, patch_size=4, embed_dim=12, depths=(1,), num_heads=(2,), window_size=4, num_classes=5
    )


def beit() -> nn.Module:
    return timm.models.beit.Beit(img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=5)


@pytest.mark.parametrize(
    "build", [swin_v2, beit, lambda: tiny.functional()[0]], ids=["swin_v2", "beit", "tiny"]
)
def test_routed_layer_quantizes_its_input(build: object) -> None:
    net = build().eval()  # type: ignore[operator]
    x = torch.randn(2, 3, 16, 16) if not isinstance(net, nn.Sequential) else torch.randn(2, 3, 4, 4)
    expected = run(net, x)
    layers = convert.wrap(net)
    assert torch.equal(run(net, x), expected)
    found = trace(net, x[:1])
    (routed,) = [name for names in found.routed.values() for name in names]
    assert routed.endswith("qkv")
    for module in net.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)  # Swin V2 initializes branches to zero
    expected = run(net, x)
    with torch.no_grad():
        layers[routed].input_quantizer = nn.Hardtanh(-0.1, 0.1)  # cosine attention is invariant to a factor
        assert torch.equal(net(x), expected), "unrouted, the input quantizer is never called"
        convert.route(net, found.routed, [routed])
        assert not torch.equal(net(x), expected)
        layers[routed].input_quantizer = nn.Identity()
        assert torch.equal(net(x), expected)
    convert.unwrap(net)
    assert not any(isinstance(m, QuantizedLayer | RoutedParent) for m in net.modules())
    assert torch.equal(run(net, x), expected)


def test_routed_input_matches_the_formula() -> None:
    net, x = tiny.build("functional")
    layers = tiny.quantized(net, x, 3)
    layer, parent = layers["3.qkv"], net[3]
    hidden = torch.randn(4, 16).relu()
    with torch.no_grad():
        expected = F.linear(layer.input_quantizer(hidden), layer.quantized_weight(), parent.bias)
        assert torch.equal(parent(hidden), expected)


def test_called_and_routed_layer_quantizes_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.shared, self.head = nn.Flatten(), nn.Linear(48, 48), nn.Linear(48, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.flat(x)
            return self.head(F.linear(self.shared(x), self.shared.weight))

    torch.manual_seed(0)
    net, x = Both().eval(), torch.randn(4, 3, 4, 4)
    layers = tiny.quantized(net, x)
    shared = layers["shared"]
    with torch.no_grad():
        q = shared.input_quantizer
        h = F.linear(q(x.flatten(1)), shared.quantized_weight(), shared.bias)
        expected = layers["head"](F.linear(q(h), shared.quantized_weight()))
        assert torch.equal(net(x), expected)
