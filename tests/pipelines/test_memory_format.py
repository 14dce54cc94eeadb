"""The memory format of `saq eval`: chosen by a rule, stated in the result, and undone where a network fails in it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import UnsupportedModel
from saqcli.models.preprocessing import Preprocessing
from saqcli.pipelines.predictors import Predictor, with_memory_format
from saqcli.progress import SILENT
from saqcli.tasks.labels import Classes
from tests.support import tiny
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options


class Viewed(nn.Module):
    """Views its features as only contiguous tensors can be viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(len(x), -1)


class Notes:
    """Keeps the notes of a pipeline."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def predictor(network: nn.Module, side: int = 96, device: str = "cpu") -> Predictor:
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing((3, side, side), half, half, "bilinear", 1.0)
    return Predictor(network, "net", tiny.CLASSES, preprocessing, torch.device(device), Classes(tiny.CLASSES))


def first_weight(network: nn.Module) -> Tensor:
    """The latent weight of the first convolution."""
    convolution = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    weight = convolution._parameters["weight"]
    assert weight is not None
    return weight


@pytest.mark.parametrize("quantized", [False, True])
def test_channels_last_computes_the_same_network(quantized: bool) -> None:
    net, x = tiny.build("residual")
    if quantized:
        tiny.quantized(net, x, bits=8)
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = net.eval()(images)
        found = with_memory_format(predictor(net), "auto", SILENT)

        assert found.memory_format == "channels_last"
        assert first_weight(net).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(net(images), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "side", "device", "requested"),
    [
        ("residual", 64, "cpu", "auto"),
        ("residual", 96, "meta", "auto"),
        ("residual", 96, "cpu", "contiguous"),
        ("mlp", 96, "cpu", "auto"),
    ],
)
def test_other_cases_stay_contiguous(name: str, side: int, device: str, requested: str) -> None:
    net, _ = tiny.build(name)
    given = predictor(net, side, device)

    assert with_memory_format(given, requested, SILENT) is given
    assert given.memory_format == "contiguous"


def test_network_that_fails_in_channels_last() -> None:
    net, notes = Viewed().eval(), Notes()
    found = with_memory_format(predictor(net), "auto", notes)

    assert found.memory_format == "contiguous"
    assert first_weight(net).is_contiguous()
    assert len(notes.texts) == 1
    assert "stay contiguous: view size is not compatible" in notes.texts[0]
    with pytest.raises(UnsupportedModel, match=r"fails in channels_last .*remove `memory_format"):
        with_memory_format(predictor(net), "channels_last", SILENT)


def test_result_states_the_memory_format(digits: Path) -> None:
    few = ("eval", MODEL, *float_options(digits, digits / "few"), "--workers", 0)
    plain, other = answer(*few), answer(*few, "--memory-format", "channels_last")

    assert (plain["memory_format"], other["memory_format"]) == ("contiguous", "channels_last")
    assert plain["top1"] == other["top1"]
    assert plain["loss"] == pytest.approx(other["loss"])


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        (
            MODEL,
            "nhwc",
            "--memory-format nhwc: there is no such memory format, use auto, contiguous, channels_last",
        ),
        (
            "x.onnx",
            "contiguous",
            "--memory-format contiguous applies to PyTorch, and x.onnx runs in ONNX Runtime",
        ),
    ],
)
def test_memory_format_that_cannot_be_used(
    target: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.onnx").touch()
    result = saq("eval", target, "--data", tmp_path, "--memory-format", value)

    assert result.exit_code == 1
    assert message in last_error(result)


def test_memory_format_without_images() -> None:
    result = saq("eval", MODEL, "--bench", "--memory-format", "channels_last")

    assert result.exit_code == 1
    assert "--memory-format channels_last applies to the accuracy" in last_error(result)
