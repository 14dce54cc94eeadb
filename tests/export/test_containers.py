"""Storage containers of the weights compared with their true bits, read from the graph."""

from pathlib import Path

import pytest
from torch import nn

from saqcli.export import EXPORTERS
from saqcli.export.containers import StoredWeight, WeightStorage, weight_storage
from saqcli.quant.convert import Scheme
from tests.support.networks import images, quantize, same_bits

COUNT = 64 * 3 * 9  # weights of the one layer


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def stored(style: str, bits: int, grid: str, path: Path) -> WeightStorage:
    quantized = quantize(network, same_bits(bits), Scheme(weight_grid=grid))  # type: ignore[arg-type]
    EXPORTERS[style]().export(quantized.model, images(2), path, quantized.facts)
    return weight_storage(path)


@pytest.mark.parametrize(
    ("style", "bits", "grid", "width"),
    [
        ("qdq", 3, "auto", 4),
        ("qdq", 4, "auto", 8),
        ("qdq", 4, "zero", 4),
        ("qdq", 8, "auto", 8),
        ("qdq", 8, "paper", 16),
        ("exact", 4, "auto", 4),
        ("trt", 4, "zero", 8),
        ("qonnx", 4, "zero", 32),
    ],
)
def test_containers_are_read_from_the_graph(
    style: str, bits: int, grid: str, width: int, tmp_path: Path
) -> None:
    found = stored(style, bits, grid, tmp_path / "model.onnx")

    (weight,) = found.weights
    assert weight.reach <= {"paper": 255, "zero": 2 ** (bits - 1)}.get(
        grid, 127 if bits == 8 else 2**bits - 1
    )
    assert (weight.layer, weight.count, weight.bits, weight.width) == ("0", COUNT, bits, width)
    assert (found.weight_bytes, found.true_bytes) == (COUNT * width // 8, COUNT * bits // 8)
    assert found.file_bytes == (tmp_path / "model.onnx").stat().st_size


def test_grid_with_zero_has_predicted_size(tmp_path: Path) -> None:
    auto, zero = (stored("qdq", 4, grid, tmp_path / f"{grid}.onnx") for grid in ("auto", "zero"))

    assert auto.file_bytes - zero.file_bytes == pytest.approx(COUNT / 2, abs=16)
    assert auto.with_zero_grid() == pytest.approx(zero.file_bytes, abs=16)
    assert zero.with_zero_grid() == zero.file_bytes


def test_much_larger_file_is_explained() -> None:
    weights = tuple(StoredWeight(f"layer{k}", 40_000, 4, "INT8", 8, 15) for k in range(3))
    found = WeightStorage(150_000, weights)

    assert found.explain_size(120_001, "qdq") is None
    assert found.explain_size(80_000, "qdq") == (
        "the ONNX file has 150 KB where the true bits need 80 KB: 60 KB for wider containers (4-bit weights of 3 "
        "layers in INT8, their codes reach 15) and 10 KB for graph, names and metadata. Quantized with "
        "`quantization.weight_grid=zero` it can shrink to about 90 KB: compare the accuracy"
    )


@pytest.mark.parametrize(("reach", "says"), [(15, "only"), (7, "only: style qdq has smaller ones")])
def test_smaller_style_is_suggested_if_smaller(reach: int, says: str) -> None:
    found = WeightStorage(150_000, (StoredWeight("layer", 120_000, 4, "INT8", 8, reach),))

    assert str(found.explain_size(80_000, "trt")).endswith(f". Style trt has INT8 containers {says}")
