"""The networks of the papers: exact costs, and real weights load."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from saqcli.models.networks import NETWORKS, MobileNetV1, WideResNet


def layer_macs(model: nn.Module, side: int = 32) -> list[int]:
    """MACs of every convolution and linear layer for one image, counted by hooks."""
    counts: list[int] = []

    def count(layer: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        counts.append(layer.weight[0].numel() * output.numel())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return counts


def bops(macs: list[int], bits: int) -> int:
    """BOPs with first and last layer at 8 x 8 bits and the others at ``bits``."""
    return 64 * (macs[0] + macs[-1]) + bits**2 * sum(macs[1:-1])


@pytest.mark.parametrize(
    ("name", "layers", "float_bops", "four_bits", "three_bits"),
    [
        ("preresnet20", 22, 41798.6, 674.6, 392.1),
        ("mobilenetv2_cifar", 58, 93460.6, 1508.9, 877.1),
    ],
)
def test_bops_match_the_paper(
    name: str, layers: int, float_bops: float, four_bits: float, three_bits: float
) -> None:
    macs = layer_macs(NETWORKS[name].build(num_classes=100))
    assert len(macs) == layers
    assert round(1024 * sum(macs) / 1e6, 1) == float_bops
    assert round(bops(macs, 4) / 1e6, 1) == four_bits
    assert round(bops(macs, 3) / 1e6, 1) == three_bits


def test_preresnet20_costs_are_exact() -> None:
    macs = layer_macs(NETWORKS["preresnet20"].build(num_classes=100))
    assert sorted(macs) == sorted([442_368, *[2_359_296] * 16, *[1_179_648] * 2, *[131_072] * 2, 6_400])
    assert sum(macs) == 40_818_944
    assert bops(macs, 4) == 674_643_968


def test_resnet20_shortcuts_have_no_parameters() -> None:
    macs = layer_macs(NETWORKS["resnet20"].build(num_classes=100))
    assert len(macs) == 20
    assert sum(macs) == 40_556_800


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_accept_classes_and_channels(name: str) -> None:
    model = NETWORKS[name].build(num_classes=7, in_chans=1).eval()
    assert model(torch.randn(2, 1, *NETWORKS[name].input_size[1:])).shape == (2, 7)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
@pytest.mark.parametrize("family", ["resnet", "preresnet"])
def test_name_gives_the_depth(family: str, depth: int) -> None:
    model = NETWORKS[f"{family}{depth}"].build(num_classes=10)
    layers = [
        m for m in model.modules() if isinstance(m, nn.Linear) or getattr(m, "kernel_size", 0) == (3, 3)
    ]
    assert len(layers) == depth


@pytest.mark.parametrize("depth", [19, 2, 21])
def test_depth_must_be_6n_plus_2(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 2"):
        NETWORKS["resnet20"].build.func(depth, num_classes=10)  # type: ignore[attr-defined]


@pytest.mark.parametrize("depth", [4, 20, 27])
def test_depth_of_wide_networks_must_be_6n_plus_4(depth: int) -> None:
    with pytest.raises(ValueError, match="6n \\+ 4"):
        WideResNet(depth, 1, num_classes=10)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("resnet20", "cifar10_resnet20"),
        ("resnet56", "cifar10_resnet56"),
        ("resnet8s", "cifar100_resnet8s"),
        ("resnet20s", "cifar100_resnet20s"),
        ("resnet32s", "cifar100_resnet32s"),
        ("wrn16_1", "cifar10_wrn16_1"),
        ("wrn28_1", "cifar10_wrn28_1"),
        ("vit_cifar", "cifar10_vit_postnorm"),
        ("mobilenetv1_025", "imagenet_mobilenetv1_025"),
    ],
)
def test_real_weights_reproduce_outputs(
    shared: Path, name: str, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shared / "data" / "weights"
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import arch

    reference, expected = arch.load(weights)
    entry = NETWORKS[name]
    model = entry.build(num_classes=entry.num_classes).eval()
    model.load_state_dict(load_file(folder / f"{weights}.safetensors"), strict=True)
    assert (entry.mean, entry.std, entry.input_size[1]) == tuple(expected[k] for k in ("mean", "std", "size"))
    images = torch.randn(4, *entry.input_size)
    with torch.no_grad():
        assert torch.equal(model(images), reference(images))


def test_mobilenetv1_pads_like_tensorflow() -> None:
    """Odd and even sides, compared with timm's padding at full width."""
    import timm

    theirs = timm.create_model("mobilenetv1_100", pad_type="same", bn_eps=1e-3).eval()
    ours = MobileNetV1(1.0, num_classes=1000).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    for sides in ((32, 32), (33, 46)):
        images = torch.randn(2, 3, *sides)
        with torch.no_grad():
            assert torch.equal(ours(images), theirs(images))
