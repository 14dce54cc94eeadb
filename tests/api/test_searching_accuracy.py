"""A bound of accuracy in the library: labelled batches in memory, any module."""

import pytest
import torch
from torch import nn

import saqcli as saq
from saqcli.errors import AccuracyWarning, ConfigError, DataError


def trained() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A small network that separates two classes, and its data."""
    torch.manual_seed(0)
    labels = torch.arange(128) % 2
    images = torch.randn(128, 8) + 1.5 * (2 * labels[:, None] - 1)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    return net.eval(), list(zip(images.split(32), labels.split(32), strict=True))


def test_drop_alone_gives_fewer_bits() -> None:
    net, data = trained()
    found = saq.search(net, None, data, max_drop=5)
    assert found.accuracy is not None
    assert found.accuracy.result.met
    assert found.accuracy.float_top1 - found.accuracy.result.kept.top1 <= 5
    assert not found.budget.bounds()
    most = saq.search(net, "w8a8", data)
    assert most.accuracy is None
    assert found.cost.bops < most.cost.bops
    quantized = saq.quantize_model(net, max_drop=5, calibration=data)
    assert saq.bops(quantized, example=data[0][0][:1]) == found.cost.bops


def test_bound_that_cannot_be_met_is_said() -> None:
    net, data = trained()
    found = saq.search(net, "w2a2", data, min_top1=100, candidates=[2])
    assert found.accuracy is not None
    assert found.cost.bops <= found.budget.bops
    assert found.accuracy.result.met == (found.accuracy.result.kept.top1 == 100)


def test_bad_bounds_are_refused() -> None:
    net, data = trained()
    for given, error, expected in (
        ({"max_drop": 1, "min_top1": 70}, ConfigError, "give one of them"),
        ({"max_drop": 101}, ConfigError, "from 0 to 100"),
        ({}, ConfigError, "nothing to meet"),
    ):
        with pytest.raises(error, match=expected):
            saq.search(net, None, data, **given)
    with pytest.raises(DataError, match="labelled"):
        saq.search(net, None, [data[0][0]], max_drop=1)
    with pytest.raises(ConfigError, match="give exactly one"):
        saq.quantize_model(net, 4, max_drop=1, calibration=data)


def test_missed_bound_warns_in_one_line() -> None:
    net, data = trained()
    wrong = [(images, 1 - labels) for images, labels in data[:1]] + data[1:]
    with pytest.warns(AccuracyWarning) as raised:
        quantized = saq.quantize_model(net, min_top1=100, calibration=wrong)
    found = saq.search(net, None, wrong, min_top1=100).accuracy
    assert found is not None
    (warning,) = raised
    assert f"loses {found.float_top1 - found.result.kept.top1:.2f} points" in str(warning.message)
    assert f"the float network itself is {100 - found.float_top1:.2f} points below" in str(warning.message)
    assert "\n" not in str(warning.message)
    assert warning.filename == __file__
    assert quantized(wrong[0][0]).shape == (32, 2)


def test_share_of_the_error_of_weights_is_a_keyword() -> None:
    """Weights that cost nothing to round get fewer bits, and inputs more."""
    torch.manual_seed(0)
    net = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 2))
    data = [torch.randn(64, 8)]
    widths = {"candidates": (2, 3, 4, 5, 6, 8), "activation_candidates": "same"}
    whole, none = (saq.search(net, "w4a4", data, weight_error=share, **widths) for share in (1.0, 0.0))

    def bits_of(found: saq.FoundBits, operand: str) -> int:
        return sum(getattr(bits, operand) for bits in found.policy.layers.values())

    assert bits_of(none, "weight") < bits_of(whole, "weight")
    assert bits_of(none, "activation") > bits_of(whole, "activation")
    given = {"weight_error": 0.0, "activation_candidates": "same"}
    quantized = saq.quantize_model(
        net, budget="w4a4", calibration=data, search=given, candidates=(2, 3, 4, 5, 6, 8)
    )
    assert saq.bops(quantized, example=data[0][:1]) == none.cost.bops


@pytest.mark.parametrize(
    ("searcher", "share", "expected"),
    [("error", 1.5, "from 0 to 1"), ("samq", 0.5, "counts the whole error")],
)
def test_impossible_share_is_refused(searcher: str, share: float, expected: str) -> None:
    net, data = trained()
    with pytest.raises(ConfigError, match=expected):
        saq.search(net, "w4a4", data, searcher=searcher, weight_error=share)
