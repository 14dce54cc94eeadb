"""Files of modules of one's own: saved, loaded, exported; what they say, and what is refused."""

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import saqcli as saq
from saqcli.errors import BuilderError, ConfigError, CorruptArtifact, ExportMismatch, UnsupportedModel
from saqcli.export import safetensors as files
from tests.support.command_line import last_error
from tests.support.command_line import saq as command
from tests.support.modules import MODULES, HandWritten, build, inputs_of, labels_of, scores_of

each_module = pytest.mark.parametrize("name", MODULES)


def quantized(name: str, **options: Any) -> nn.Module:
    batches = [(*inputs_of(name, seed=seed), labels_of(seed=seed)) for seed in range(2)]
    return saq.quantize_model(build(name), "w3a4", calibration=batches, **options).eval()


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return scores_of(model(*inputs))


@each_module
def test_saved_modules_load_bit_identically(name: str, tmp_path: Path) -> None:
    q, path = quantized(name), tmp_path / "net.safetensors"
    saq.save(q, path)
    loaded = saq.load(path, model=build(name, seed=5), example=inputs_of(name))

    assert torch.equal(outputs(loaded, inputs_of(name)), outputs(q, inputs_of(name)))
    assert saq.bits(loaded) == saq.bits(q)
    assert saq.bops(loaded) == saq.bops(q)


def test_named_network_loads_by_its_name(tmp_path: Path) -> None:
    net = saq.load_model("saq/resnet20", pretrained=False, num_classes=10, mean=(0.1, 0.2, 0.3))
    q = saq.quantize_model(net, 4)
    saq.save(q, tmp_path / "net.safetensors")
    loaded = saq.load(str(tmp_path / "net.safetensors"))

    image = torch.rand(2, 3, 32, 32)
    assert torch.equal(outputs(loaded, (image,)), outputs(q, (image,)))
    assert saq.info(loaded).preprocessing == saq.info(net).preprocessing
    assert saq.bops(loaded) == saq.bops(q)


class Louder(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.relu()


def changed(how: str) -> nn.Module:
    """A network of a library, changed after it was loaded."""
    torch.manual_seed(3)
    net: Any = saq.load_model("timm/resnet10t", pretrained=False, num_classes=4, input_size=32)
    if how == "head":
        net.fc = nn.Linear(net.fc.in_features, 7)
    elif how == "width":
        net.fc = nn.Sequential(nn.Linear(net.fc.in_features, 5), nn.ReLU(), nn.Linear(5, 4))
    else:
        first = next(name for name, module in net.named_modules() if isinstance(module, nn.ReLU))
        net.set_submodule(first, Louder())
    return net  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["head", "width", "activation"])
def test_changed_network_does_not_pass_for_the_library_s(how: str, tmp_path: Path) -> None:
    image = torch.randn(2, 3, 32, 32)
    q = saq.quantize_model(changed(how), 4, calibration=[image])
    saq.save(q, tmp_path / "net.safetensors")

    with pytest.raises(saq.SaqError, match=r"timm\.models\.resnet:ResNet"):
        saq.load(tmp_path / "net.safetensors")
    assert "which no name builds" in last_error(
        command("eval", tmp_path / "net.safetensors", "--data", tmp_path)
    )
    loaded = saq.load(tmp_path / "net.safetensors", model=changed(how))
    assert torch.equal(outputs(loaded, (image,)), outputs(q.eval(), (image,)))
    assert saq.export_onnx(q, tmp_path / "net.onnx").verified


@pytest.mark.parametrize("side", [24, 48])
def test_costs_are_those_of_the_traced_size(side: int, tmp_path: Path) -> None:
    net = saq.load_model("timm/resnet10t", pretrained=False, num_classes=4)
    image = torch.randn(2, 3, side, side)
    q = saq.quantize_model(net, 4, calibration=[image])
    saq.save(q, tmp_path / "net.safetensors")
    loaded = saq.load(tmp_path / "net.safetensors")

    assert saq.bops(loaded) == saq.bops(q)
    assert saq.info(loaded).preprocessing.input_size == (3, side, side)
    verdict = saq.export_onnx(q, tmp_path / "net.onnx", verify=[image, image], verify_images=3)
    assert (verdict.verified, verdict.images) == (True, 3)
    with pytest.raises(ConfigError, match="verify_images=0`: give a number of at least 1"):
        saq.export_onnx(q, tmp_path / "more.onnx", verify=[image], verify_images=0)


def test_load_names_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    saq.save(quantized("hand_written"), path)
    with pytest.raises(BuilderError, match="give `model`, a float module like it"):
        saq.load(path)
    with pytest.raises(ConfigError, match="give one of them"):
        saq.load(path, model=build("hand_written"), builder="nets:build")
    with pytest.raises(ConfigError, match="and `model` is a Tied"):
        saq.load(path, model=build("tied"))


def test_save_needs_the_suffix(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not end with \.safetensors"):
        saq.save(quantized("hand_written"), tmp_path / "net.pt")


def test_module_without_tensors_is_not_saved(tmp_path: Path) -> None:
    class Opaque(HandWritten):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            scores = super().forward(x)
            return lambda: scores

    q = saq.quantize_model(Opaque(), 4, calibration=list(inputs_of("hand_written")))
    with pytest.raises(ExportMismatch):
        saq.save(q, tmp_path / "net.safetensors")


def test_loading_leaves_the_given_module_unchanged(tmp_path: Path) -> None:
    saq.save(quantized("hand_written"), tmp_path / "net.safetensors")
    net, twin = build("hand_written", 5), build("hand_written", 5)
    saq.load(tmp_path / "net.safetensors", model=net)

    assert type(net) is HandWritten
    assert torch.equal(outputs(net, inputs_of("hand_written")), outputs(twin, inputs_of("hand_written")))


def test_file_of_own_module_names_its_class(tmp_path: Path) -> None:
    saq.save(quantized("hand_written"), tmp_path / "net.safetensors")
    with pytest.raises(Exception, match=r"tests\.support\.modules:HandWritten") as caught:
        saq.load(tmp_path / "net.safetensors")
    assert isinstance(caught.value, saq.SaqError)
    assert len(str(caught.value).splitlines()) == 1


def test_another_module_is_refused(tmp_path: Path) -> None:
    saq.save(quantized("hand_written"), tmp_path / "net.safetensors")

    class Wider(HandWritten):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 9)

    with pytest.raises(CorruptArtifact):
        saq.load(tmp_path / "net.safetensors", model=Wider())


def test_file_that_differs_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack = files.pack
    monkeypatch.setattr(files, "pack", lambda codes, *rest: pack(codes.clone().fill_(1), *rest))
    with pytest.raises(ExportMismatch, match="no file was written"):
        saq.save(quantized("hand_written"), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_float_module_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not quantized"):
        saq.save(build("hand_written"), tmp_path / "net.safetensors")


@pytest.mark.parametrize("name", ["hand_written", "changed_resnet", "weight_norm", "pruned"])
def test_own_modules_export_with_proof(name: str, tmp_path: Path) -> None:
    q, path = quantized(name), tmp_path / "net.onnx"
    verdict = saq.export_onnx(q, path, verify=[inputs_of(name)[0]])

    assert verdict.verified
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (image,) = inputs_of(name)
    (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), outputs(q, (image,)), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("style", ["exact", "trt", "qonnx"])
def test_other_styles_export(style: str, tmp_path: Path) -> None:
    assert saq.export_onnx(quantized("changed_resnet"), tmp_path / "net.onnx", style).verified


def test_export_needs_overwrite(tmp_path: Path) -> None:
    q, path = quantized("weight_norm"), tmp_path / "net.onnx"
    saq.export_onnx(q, path)
    with pytest.raises(ConfigError, match="already exists"):
        saq.export_onnx(q, path)
    saq.export_onnx(q, path, overwrite=True)


@pytest.mark.parametrize(
    ("name", "match"), [("two_inputs", "takes 3x16x16, 4"), ("two_heads", "returns a dict"), ("tied", "takes 12")]
)  # fmt: skip
def test_what_no_file_can_hold_is_refused(name: str, match: str, tmp_path: Path) -> None:
    q = quantized(name)
    for attempt in (
        lambda: saq.export_onnx(q, tmp_path / "net.onnx"),
        lambda: saq.check_export(q),
        lambda: saq.check_export(build(name), example=inputs_of(name)),
    ):
        with pytest.raises(UnsupportedModel, match=match):
            attempt()
    assert not list(tmp_path.iterdir())


def test_check_export_refuses_an_operator() -> None:
    class Odd(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.mean()) < 1e9 else x

    with pytest.raises(UnsupportedModel, match="depends on the values of a tensor"):
        saq.check_export(Odd(), example=inputs_of("hand_written"))


def test_export_keeps_the_module(tmp_path: Path) -> None:
    q = quantized("hand_written").train()
    saq.export_onnx(q, tmp_path / "net.onnx")
    saq.save(q, tmp_path / "net.safetensors")
    assert q.training
