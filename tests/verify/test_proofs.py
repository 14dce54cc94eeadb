"""The reference an ONNX file is compared with, and the images used."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from saqcli.errors import DataError
from saqcli.export import EXPORTERS, ModelMetadata
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import SILENT
from saqcli.quant.convert import Scheme, active_bits
from saqcli.quant.layer import quantized_layers
from saqcli.verify import proof, shared
from saqcli.verify.proof import prove_graph
from saqcli.verify.publish import export_verified
from tests.support import tiny


class CastsToFloat32(nn.Module):
    """Converts to float32 in its forward, as some networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, tiny.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stem(x).relu().mean((2, 3)).to(torch.float32))
        return logits


def facts_of(model: nn.Module, x: Tensor) -> ModelMetadata:
    layers = list(quantized_layers(model))
    return ModelMetadata(
        saq_version="0",
        build={"num_classes": tiny.CLASSES},
        preprocessing=Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, "bilinear", 1.0).to_dict(),
        policy=active_bits(model, "tiny", layers),
        scheme=Scheme(),
        signed=dict.fromkeys(layers, True),
        routed={},
    )


def quantized(model: nn.Module, x: Tensor) -> nn.Module:
    tiny.quantized(model, x)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return tiny.images((3, 8, 8), 8)


@pytest.fixture(scope="module")
def plain(images: Tensor) -> nn.Module:
    return quantized(tiny.build("conv_bn")[0], images)


@pytest.fixture(scope="module")
def float32_only(images: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return quantized(CastsToFloat32(), images)


@pytest.fixture(scope="module")
def file(plain: nn.Module, images: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("proofs") / "model.onnx"
    EXPORTERS["qdq"]().export(plain, images[:2], path, facts_of(plain, images))
    return path


def labelled(x: Tensor, label: int) -> tuple[Tensor, Tensor]:
    return x, torch.full((len(x),), label)


def test_reference_is_float64(plain: nn.Module, images: Tensor) -> None:
    reference = shared.in_float64(plain, images[:1])
    with torch.no_grad():
        truth, near = reference(images), plain(images)

    assert truth.dtype == torch.float64
    assert near.dtype == torch.float32
    assert not torch.equal(truth.float(), near)
    assert float((truth - near).abs().max()) < 1e-4 * float(truth.abs().max())


def test_float32_model_is_its_own_reference(float32_only: nn.Module, images: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        float32_only.double()(images.double())
    float32_only.float()
    path = tmp_path / "model.onnx"
    verdict = export_verified(
        float32_only, facts_of(float32_only, images), path, "qdq", [labelled(images, 0)], 1, SILENT
    )

    assert shared.in_float64(float32_only, images[:1]) is float32_only
    assert {parameter.dtype for parameter in float32_only.parameters()} == {torch.float32}
    assert verdict.verified
    assert (verdict.images, verdict.pytorch_agreement) == (8, 1.0)
    assert path.is_file()


def test_unreadable_images_prove_nothing(plain: nn.Module, images: Tensor, file: Path) -> None:
    """They are replaced by zeros with a label below 0."""
    missing = labelled(torch.zeros_like(images), -1)
    mixed = images[:4], torch.tensor([-1, 0, -1, 0])
    verdict = prove_graph(file, plain, "qdq", [missing, mixed], 2, SILENT)

    assert verdict.verified
    assert verdict.images == 2
    assert torch.equal(proof._first_images([missing, mixed]), images[[1, 3]])


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_unreadable_images_write_nothing(
    batches: int, plain: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    missing = [labelled(images, -1)] * batches
    with pytest.raises(
        DataError, match=r"no image to verify the file on can be read: use another `data\.path`"
    ):
        export_verified(
            plain, facts_of(plain, images), tmp_path / "model.onnx", "qdq", missing, batches, SILENT
        )
    assert not list(tmp_path.iterdir())
