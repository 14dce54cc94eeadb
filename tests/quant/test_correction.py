"""Corrections after quantization, compared with a slow reference that corrects one layer after the other."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from saqcli.quant.correction import _moments, bias_of, correct
from saqcli.quant.layer import quantized_layers
from saqcli.quant.quantizers import Quantizer
from tests.support import tiny

BIASED = ["mlp", "grouped", "transposed", "tokens"]
NORMED = ["conv_bn", "residual", "depthwise"]


def quantized(name: str, bits: int = 3) -> tuple[nn.Module, nn.Module, Tensor]:
    """A float64 network, its quantized copy, and images."""
    net, _ = tiny.build(name)
    x = tiny.images(tiny.TINY[name]()[1], 32)
    in_float = copy.deepcopy(net).double()
    tiny.quantized(net, x, bits)
    return in_float, net.double(), x.double()


@torch.no_grad()
def seen(net: nn.Module, module: str, x: Tensor, *, before: bool = False) -> Tensor:
    """The output or input of ``module``, as (numbers, channels)."""
    found: list[Tensor] = []
    target = net.get_submodule(module)
    note: Callable[..., None] = lambda m, given, *out: found.append(given[0] if before else out[0])  # noqa: E731
    handle: Any = target.register_forward_pre_hook(note) if before else target.register_forward_hook(note)
    net(x)
    handle.remove()
    channels = -1 if isinstance(target, nn.Linear) else 1
    return found[0].transpose(channels, -1).flatten(0, -2)


def order(net: nn.Module, x: Tensor, kinds: Any) -> list[str]:
    """Names of modules in execution order."""
    names: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
        for name, module in net.named_modules()
        if isinstance(module, kinds)
    ]
    net(x)
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize("name", BIASED)
def test_bias_correction_matches_reference(name: str) -> None:
    in_float, net, x = quantized(name)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for layer in order(in_float, x, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            difference = seen(in_float, layer, x).mean(0) - seen(twin, layer, x).mean(0)
            twin.get_submodule(layer).bias.add_(difference)  # type: ignore[operator,union-attr]
    before = {key: value.clone() for key, value in net.state_dict().items()}

    correct(net, [x], biases=True, norms=True)

    moved = 0.0
    for key, value in net.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[key], atol=1e-12, rtol=0)
        moved += float((value - before[key]).abs().sum())
        assert key.endswith("bias") or torch.equal(value, before[key])
    assert moved > 0.01
    for layer in quantized_layers(net):
        torch.testing.assert_close(seen(net, layer, x).mean(0), seen(in_float, layer, x).mean(0))


@torch.no_grad()
def test_biases_within_routed_parents_are_corrected() -> None:
    """torchvision's Swin multiplies with the weights of its projections itself, and never calls them."""
    torch.manual_seed(0)
    sizes: Any = {
        "patch_size": [4, 4],
        "embed_dim": 8,
        "depths": [2],
        "num_heads": [2],
        "window_size": [4, 4],
    }
    in_float, x = SwinTransformer(**sizes, num_classes=5).eval(), torch.randn(8, 3, 32, 32)
    net = copy.deepcopy(in_float)
    tiny.quantized(net, x, 3)
    before = {name: bias_of(layer).clone() for name, layer in quantized_layers(net).items()}  # type: ignore[union-attr]
    in_float, net, x = in_float.double(), net.double(), x.double()

    correct(net, [x], biases=True, norms=False)

    for name, layer in quantized_layers(net).items():
        assert not torch.equal(bias_of(layer).float(), before[name]), name  # type: ignore[union-attr]
    for parent in (
        "features.1.0.attn",
        "features.1.1.attn",
    ):  # whose outputs are those of their last projection
        means: list[Tensor] = []
        for each in (net, in_float):
            hook = each.get_submodule(parent).register_forward_hook(
                lambda *call, means=means: means.append(call[-1].mean((0, 1, 2)))
            )
            each(x)
            hook.remove()
        torch.testing.assert_close(*means)


@pytest.mark.parametrize("variance", [False, True], ids=["bias", "bn"])
@pytest.mark.parametrize("name", NORMED)
def test_norm_recalibration_matches_reference(name: str, variance: bool) -> None:
    in_float, net, x = quantized(name)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for norm in order(in_float, x, nn.BatchNorm2d):
            ours, theirs = seen(twin, norm, x, before=True), seen(in_float, norm, x, before=True)
            target: Any = twin.get_submodule(norm)
            ratio = (ours.var(0, correction=0) + target.eps) / (theirs.var(0, correction=0) + target.eps)
            after = target.running_var * (ratio if variance else 1)
            scale = ((after + target.eps) / (target.running_var + target.eps)).sqrt()
            target.running_mean = ours.mean(0) - (theirs.mean(0) - target.running_mean) * scale
            target.running_var = after

    correct(net, [x], biases=not variance, norms=variance)

    for key, value in twin.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(net.state_dict()[key], value, atol=1e-12, rtol=1e-10)
    norm = order(in_float, x, nn.BatchNorm2d)[-1]
    torch.testing.assert_close(seen(net, norm, x).mean(0), seen(in_float, norm, x).mean(0))
    if variance:
        scale = seen(net, norm, x).var(0) / seen(in_float, norm, x).var(0)
        torch.testing.assert_close(scale, torch.ones_like(scale), atol=0.01, rtol=0)


def test_batches_are_weighted_by_image_count() -> None:
    _, net, x = quantized("mlp")
    parts = [copy.deepcopy(net), copy.deepcopy(net)]
    batches = [x[:24], x[24:]]
    for part, batch in zip(parts, batches, strict=True):
        correct(part, [batch], biases=True, norms=False)

    correct(net, batches, biases=True, norms=False)

    for name, value in net.state_dict().items():
        first, second = (part.state_dict()[name] for part in parts)
        torch.testing.assert_close(value, (24 * first + 8 * second) / 32)


def test_packed_projection_keeps_its_mean() -> None:
    in_float, net, x = quantized("attention")
    before = net.attention.in_proj_bias.clone()  # type: ignore[union-attr,operator]

    correct(net, [x], biases=True, norms=False)

    attention: Any = net.attention
    tokens = seen_tokens(net, x)
    with torch.no_grad():
        ours = attention.input_quantizer(tokens) @ attention.quantized_weight().T + attention.in_proj_bias
        theirs = seen_tokens(in_float, x) @ in_float.attention.in_proj_weight.T + before  # type: ignore[union-attr,operator]
    assert not torch.equal(before, attention.in_proj_bias)
    torch.testing.assert_close(ours.mean((0, 1)), theirs.mean((0, 1)))


@torch.no_grad()
def seen_tokens(net: Any, x: Tensor) -> Tensor:
    tokens: Tensor = net.patches(x).flatten(2).transpose(1, 2)
    return tokens


def test_non_adjacent_norm_is_left_alone() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5)
    )
    x = torch.randn(8, 3, 4, 4)
    tiny.quantized(net.eval(), x, 2)
    correct(net, [x], biases=True, norms=False)
    assert torch.equal(net[2].running_mean, torch.zeros(4))
    correct(net, [x], biases=False, norms=True)
    assert not torch.equal(net[2].running_mean, torch.zeros(4))


def test_weights_levels_and_modes_are_unchanged() -> None:
    _, net, x = quantized("residual")
    next(net.children()).train()
    modes = [module.training for module in net.modules()]
    quantizers = [module for module in net.modules() if isinstance(module, Quantizer)]
    parameters = {name: value.clone() for name, value in net.named_parameters()}

    correct(net, [x], biases=True, norms=True)

    assert [module.training for module in net.modules()] == modes
    assert [module for module in net.modules() if isinstance(module, Quantizer)] == quantizers
    changed = {name for name, value in net.named_parameters() if not torch.equal(value, parameters[name])}
    assert changed == {f"{list(quantized_layers(net))[-1]}.bias"}


@pytest.mark.parametrize(
    ("shape", "channels"), [((8, 6, 5, 4), 1), ((3, 7, 6), -1), ((9, 6), 1), ((2, 3, 6, 4, 2), 2)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_are_means_and_variances(shape: tuple[int, ...], channels: int, dtype: torch.dtype) -> None:
    x = (torch.randn(shape, dtype=torch.float64) * 3 + 4).to(dtype)
    mean, variance = _moments(x, channels)
    dims = [d for d in range(x.dim()) if d != channels % x.dim()]
    expected = torch.var_mean(x.double(), dims, correction=0)
    assert mean.dtype == variance.dtype == dtype
    accuracy = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, 1e-2)
    torch.testing.assert_close((variance.double(), mean.double()), expected, rtol=accuracy, atol=0.0)


def test_moments_of_many_half_precision_values_are_finite() -> None:
    mean, variance = _moments(
        torch.full((64, 2, 64, 64), 3.0).half() * torch.tensor([1.0, 2.0]).half()[:, None, None], 1
    )
    assert mean.tolist() == [3.0, 6.0]
    assert variance.tolist() == [0.0, 0.0]
    _, variance = _moments(torch.randn(256, 8, 32, 32).half(), 1)
    assert torch.allclose(variance.float(), torch.ones(8), rtol=0.02)
