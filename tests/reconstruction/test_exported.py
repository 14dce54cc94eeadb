"""Files of reconstructed networks: every style is proved, and a saved network computes the same."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import saqcli as saq
from saqcli.quant.layer import quantized_layers
from tests.support import tiny

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
FORMS: dict[str, dict[str, Any]] = {
    "straight": {},
    "soft": {"rounding": "soft", "rounding_lr": 0.3},
    "descent": {"form": "descent"},
}


@functools.cache
def fitted(form: str) -> nn.Module:
    """A residual network of 3 bits: compensated, then fitted; some codes have changed."""
    net, _ = tiny.build("residual")
    model = saq.quantize_model(net, 3, calibration=[IMAGES])
    before = codes(model)
    assert saq.compensate(model, [IMAGES]).places
    assert all(torch.equal(one, other) for one, other in zip(before, codes(model), strict=True))
    errors = saq.reconstruct(model, [IMAGES], float_model=net, iterations=25, drop=0, **FORMS[form])
    assert any(error.after < error.before for error in errors)
    assert not all(torch.equal(one, other) for one, other in zip(before, codes(model), strict=True))
    return model.eval()


def codes(model: nn.Module) -> list[torch.Tensor]:
    layers: Any = quantized_layers(model).values()
    return [layer.weight_quantizer.codes(layer.latent_weight()) for layer in layers]


def cases() -> list[Any]:
    """Every form in every style; the strictest style, and all of one form, without ``slow``."""
    return [
        pytest.param(form, style, marks=[] if form == "straight" or style == "exact" else pytest.mark.slow)
        for form in FORMS
        for style in ("qdq", "qonnx", "exact", "trt")
    ]


@pytest.mark.parametrize(("form", "style"), cases())
def test_every_style_is_proved(tmp_path: Path, form: str, style: str) -> None:
    verdict = saq.export_onnx(fitted(form), tmp_path / "net.onnx", style)
    assert verdict.verified
    if style == "exact":
        assert verdict.bit_equal
        assert verdict.max_abs_diff == 0.0


def test_integer_file_is_proved(tmp_path: Path) -> None:
    """Of a network for ONNX Runtime, whose additions and pools are quantized too."""
    net, _ = tiny.build("residual")
    model = saq.quantize_model(net, "w4a8", calibration=[IMAGES], target="ort-cpu", weight_grid="zero")
    before = codes(model)
    errors = saq.reconstruct(model, [IMAGES], iterations=25)
    assert any(error.after < error.before for error in errors)
    assert not all(torch.equal(one, other) for one, other in zip(before, codes(model), strict=True))
    assert saq.export_onnx(model.eval(), tmp_path / "net.onnx", "ort").verified


@pytest.mark.parametrize("form", FORMS)
def test_saved_network_computes_the_same(tmp_path: Path, form: str) -> None:
    saq.save(fitted(form), tmp_path / "net.safetensors")
    loaded = saq.load(tmp_path / "net.safetensors", model=tiny.build("residual")[0]).eval()
    assert torch.equal(loaded(IMAGES), fitted(form)(IMAGES))
