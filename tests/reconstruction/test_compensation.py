"""Closed-form compensation, compared with a slow reference that corrects one place after the other."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saqcli.quant.convert import Scheme, wrap
from saqcli.quant.layer import quantized_layers
from saqcli.quant.short_steps.rescaling import can_rescale, rescale
from saqcli.reconstruction.compensation import LARGEST, SPREAD, Moments, compensate
from tests.support import tiny


def pair(name: str, bits: int = 3) -> tuple[nn.Module, nn.Module, Tensor]:
    """A wrapped float network, its quantized copy and images, all float64."""
    net, _ = tiny.build(name)
    x = tiny.images(tiny.TINY[name]()[1], 32)
    in_float = copy.deepcopy(net)
    wrap(in_float)
    tiny.quantized(net, x, bits)
    return in_float.double(), net.double(), x.double()


def columns(y: Tensor, channels: int) -> Tensor:
    """``y`` as (values, channels)."""
    return y.transpose(channels, -1).flatten(0, -2)


def least_squares(y: Tensor, t: Tensor, images: int, *, offset: bool = True) -> tuple[Tensor, Tensor]:
    """Scale and offset of every column with the ridge, by solving the normal equations."""
    a, b = [], []
    for one, wanted in zip(y.T, t.T, strict=True):
        mean = (one.mean(), wanted.mean()) if offset else (0.0, 0.0)
        y0, t0 = one - mean[0], wanted - mean[1]
        ridge = (y0 - t0).square().mean() / (images * SPREAD**2)
        rows = torch.cat([y0 / len(y0) ** 0.5, ridge.sqrt().view(1)])
        sides = torch.cat([t0 / len(y0) ** 0.5, ridge.sqrt().view(1)])
        scale = torch.linalg.lstsq(rows.unsqueeze(1), sides.unsqueeze(1)).solution[0, 0]
        scale = scale.clamp(1 / LARGEST, LARGEST)
        a.append(scale)
        b.append(mean[1] - scale * mean[0])
    return torch.stack(a), torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in b])


@pytest.mark.parametrize("offset", [False, True])
def test_moments_over_batches_equal_least_squares(offset: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(30, 5, 4, generator=generator, dtype=torch.float64) + 2
    t = 0.8 * y + 0.3 * torch.randn(30, 5, 4, generator=generator, dtype=torch.float64) - 1
    moments = Moments()
    for start, stop in ((0, 7), (7, 8), (8, 30)):
        moments.add(y[start:stop], t[start:stop], 1, stop - start)
    a, b = moments.affine(offset=offset)
    wanted = least_squares(columns(y, 1), columns(t, 1), 30, offset=offset)
    torch.testing.assert_close((a, b), wanted)
    error = columns(y, 1) * a + b - columns(t, 1)
    assert (error.square().mean(0) <= columns(y - t, 1).square().mean(0)).all()


def test_constant_channel_keeps_its_scale() -> None:
    y, t = torch.full((8, 2, 3), 2.0), torch.randn(8, 2, 3)
    moments = Moments()
    moments.add(y, t, 1, 8)
    a, b = moments.affine()
    assert torch.equal(a, torch.ones(2).double())
    torch.testing.assert_close(b, columns(t, 1).mean(0).double() - 2)


def test_few_images_change_little() -> None:
    y, t = torch.randn(64, 1), torch.randn(64, 1)
    scales = []
    for images in (1, 16, 4096):
        moments = Moments()
        moments.add(y, t, 1, images)
        scales.append(float(moments.affine()[0]))
    assert 1 > scales[0] > scales[1] > scales[2]


@torch.no_grad()
def seen(net: nn.Module, module: str, x: Tensor) -> Tensor:
    """The output of ``module``."""
    found: list[Tensor] = []
    handle = net.get_submodule(module).register_forward_hook(lambda m, _, y: found.append(y.clone()))
    net(x)
    handle.remove()
    return found[0]


@torch.no_grad()
def test_chain_matches_reference() -> None:
    in_float, net, x = pair("conv_bn")
    twin = copy.deepcopy(net)
    for name, channels in (("1", 1), ("4", 1), ("8", -1)):
        y, t = (columns(seen(each, name, x), channels) for each in (twin, in_float))
        a, b = least_squares(y, t, len(x))
        module: Any = twin.get_submodule(name)
        if name == "8":
            assert rescale(module, a)
            module.bias.copy_(module.bias * a + b)
        else:
            module.weight.copy_(module.weight * a)
            module.bias.copy_(module.bias * a + b)
    found = compensate(net, in_float, [x])
    assert found.places == ("1", "4", "8")
    assert found.after < found.before
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


@torch.no_grad()
def test_branch_makes_up_for_its_shortcut() -> None:
    """The last norm before an addition is fitted to the float sum minus the quantized shortcut."""
    in_float, net, x = pair("residual")
    before = copy.deepcopy(net)
    found = compensate(net, in_float, [x])
    for each in ("0", "1", "3", "4.main.0", "4.main.1"):  # all that comes earlier
        before.get_submodule(each).load_state_dict(net.get_submodule(each).state_dict())
    name = "4.main.4"
    total = {}
    for which, each in (("float", in_float), ("quantized", before)):
        shortcut = seen(each, "3", x)
        total[which] = (seen(each, name, x), shortcut)
    target = sum(total["float"]) - total["quantized"][1]
    a, b = least_squares(columns(total["quantized"][0], 1), columns(target, 1), len(x))
    norm: Any = before.get_submodule(name)
    after: Any = net.get_submodule(name)
    torch.testing.assert_close(after.weight, norm.weight * a)
    torch.testing.assert_close(after.bias, norm.bias * a + b)
    assert name in found.places


@pytest.mark.parametrize("name", tiny.TINY)
@torch.no_grad()
def test_codes_stay_and_error_falls(name: str) -> None:
    in_float, net, x = pair(name)
    net, in_float, x = net.float(), in_float.float(), x.float()
    codes = {key: layer.weight_quantizer.codes(layer.latent_weight()) for key, layer in layers(net)}
    kept = {key: value.clone() for key, value in in_float.state_dict().items()}
    before = (net(x) - in_float(x)).square().mean()
    found = compensate(net, in_float, [x[:16], x[16:]])
    after = (net(x) - in_float(x)).square().mean()
    assert found.after < found.before
    assert after < before
    for key, layer in layers(net):
        assert torch.equal(layer.weight_quantizer.codes(layer.latent_weight()), codes[key])
    assert all(torch.equal(value, kept[key]) for key, value in in_float.state_dict().items())


def layers(net: nn.Module) -> list[tuple[str, Any]]:
    return list(quantized_layers(net).items())


def test_network_without_error_stays() -> None:
    net, x = tiny.build("tokens")
    wrap(net)
    in_float = copy.deepcopy(net)
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    found = compensate(net, in_float, [x])
    assert (found.places, found.before, found.after) == ((), 0, 0)
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("quantizer", ["clip", "lsq", "lsq_plus", "dorefa", "pact"])
@pytest.mark.parametrize("name", ["grouped", "transposed"])
def test_rescaling_keeps_every_code(quantizer: str, name: str) -> None:
    net, x = tiny.build(name)
    tiny.quantized(net, x, 4, Scheme(quantizer=quantizer), candidates=(2,))
    for _, layer in layers(net):
        weight = layer.latent_weight()
        factors = torch.rand(weight.shape[layer.channel_dim]) + 0.5
        shape = [-1 if d == layer.channel_dim else 1 for d in range(weight.dim())]
        codes, before = layer.weight_quantizer.codes(weight), layer.weight_quantizer(weight)
        assert can_rescale(layer)
        assert torch.equal(layer.weight_quantizer(weight), before)
        assert rescale(layer, factors)
        assert torch.equal(layer.weight_quantizer.codes(weight), codes)
        torch.testing.assert_close(layer.weight_quantizer(weight), before * factors.view(shape))


@pytest.mark.parametrize("scheme", [Scheme(granularity="tensor"), Scheme(weight_normalization=True)])
def test_layers_without_scale_are_refused(scheme: Scheme) -> None:
    net, x = tiny.build("grouped")
    tiny.quantized(net, x, 4, scheme)
    kept = {key: value.clone() for key, value in net.state_dict().items()}
    layer = layers(net)[0][1]
    assert not can_rescale(layer)
    assert not rescale(layer, torch.full((8,), 1.5))
    assert all(torch.equal(value, kept[key]) for key, value in net.state_dict().items())


class NormAct(nn.BatchNorm2d):
    """A batch norm and an activation function in one module, as timm's ``BatchNormAct2d``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


@torch.no_grad()
def test_norm_with_activation_is_fitted_before_it() -> None:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)]
    apart = nn.Sequential(*parts).eval()
    joined = nn.Sequential(parts[0], NormAct(8), parts[3], parts[4]).eval()
    joined[1].load_state_dict(parts[1].state_dict())
    x = torch.randn(32, 3, 8, 8)
    found = []
    for net in (apart, copy.deepcopy(joined)):
        in_float = copy.deepcopy(net)
        wrap(in_float)
        tiny.quantized(net, x, 3)
        assert compensate(net, in_float, [x]).places == ("1", "4" if net is apart else "3")
        found.append(net[1].weight)
    assert torch.equal(*found)
    assert not torch.equal(found[0], torch.ones(8))


@torch.no_grad()
def test_added_constant_is_no_branch() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.two((self.one(x) + 3.0).relu())

    torch.manual_seed(0)
    net, x = Shifted(), torch.randn(64, 6)
    in_float = copy.deepcopy(net)
    wrap(in_float)
    tiny.quantized(net, x, 3)
    t, y = in_float.one(x), net.one(x)
    before = net.one.bias.clone()
    compensate(net, in_float, [x])
    a, b = least_squares(y.double(), t.double(), 64)
    torch.testing.assert_close(net.one.bias, (before * a + b).float(), rtol=1e-4, atol=1e-5)
