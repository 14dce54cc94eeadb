"""``saq export``: files are verified before they are published, with a verdict beside them."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

import saqcli
from saqcli.errors import ExportMismatch
from saqcli.export import STYLES, ModelMetadata
from saqcli.export.integers import Accumulator
from saqcli.export.qdq import QdqExporter
from saqcli.export.safetensors import SafetensorsExporter
from saqcli.models.load import ModelSpec, load_model
from saqcli.pipelines import export as exporting
from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import quantized_layers
from saqcli.quant.tracer import trace
from saqcli.verify import proof, publish
from saqcli.verify.layerwise import LayerCheck, LayerwiseCheck
from saqcli.verify.runtime import onnx_session
from saqcli.verify.verdict import IMAGES, Verdict, synthetic_batches, verdict_path, verdict_text
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options
from tests.support.sweeps import sweep

FIGURES = {
    "verified": bool,
    "images": int,
    "argmax_agreement": float,
    "pytorch_agreement": float,
    "max_abs_diff": float,
    "mean_abs_diff": float,
    "layers": int,
    "layers_error": float,
    "codes": int,
    "flipped_codes": int,
    "split_layers": list,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The safetensors file of a small network with random weights, at mixed bits."""
    plain = {"stem_type": "", "avg_down": False, "zero_init_last": False}  # no branch scaled by zero
    spec = ModelSpec(
        "timm/test_resnet", pretrained=False, num_classes=5, in_chans=1, input_size=16, kwargs=plain
    )
    torch.manual_seed(0)
    loaded = load_model(spec)
    size = loaded.preprocessing.input_size
    convert.wrap(loaded.model)
    traced = trace(loaded.model, torch.randn(1, *size))
    statistics = calibration.observe(loaded.model, [torch.randn(16, *size)])
    signed = {name: entry.signed for name, entry in statistics.items()}
    policy = BitConfig(
        model=loaded.name,
        layers={
            name: LayerBits(weight=4 + k % 3, activation=8 - k % 3) for k, name in enumerate(traced.layers)
        },
    )
    convert.install(loaded.model, Scheme(), policy, signed)
    calibration.fit(loaded.model, statistics)
    facts = ModelMetadata(
        saq_version=saqcli.__version__,
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=Scheme(),
        signed=signed,
        routed={},
        class_names=tuple("abcde"),
    )
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    SafetensorsExporter().export(loaded.model.eval(), torch.zeros(0), path, facts)
    return path


def near(path: Path) -> Any:
    """A runtime that rounds differently."""
    run = onnx_session(path, optimized=True)
    return lambda images: run(images) * (1 + 1e-6)


@pytest.fixture(scope="module")
def exact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Its file in style exact, also verified with another runtime, and the command's output."""
    path = tmp_path_factory.mktemp("exact") / "model.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(proof.RUNTIMES, "openvino", near)
        patch.setattr(proof, "version", lambda name: "1")
        return path, answer("export", model, "--onnx", path, "--style", "exact", "--verify", "openvino")


def test_output_reports_the_proof(exact: tuple[Path, dict[str, Any]]) -> None:
    path, found = exact

    assert found["onnx"] == str(path)
    assert found["verdict"] == str(path.with_suffix(".verdict.json"))
    assert (found["style"], found["opset"]) == ("exact", 21)
    assert found["verified"] is True
    assert (found["max_abs_diff"], found["argmax_agreement"], found["images"]) == (0.0, 1.0, IMAGES)
    assert found["size_bytes"] == path.stat().st_size
    assert 0 < found["largest_accumulator"] < 2**24
    assert sorted(each.name for each in path.parent.iterdir()) == ["model.onnx", "model.verdict.json"]


def test_verdict_lists_layers_and_file_hash(exact: tuple[Path, dict[str, Any]], model: Path) -> None:
    path, printed = exact
    verdict = json.loads(verdict_path(path).read_text())
    layers = list(saqcli.load(model).state_dict())

    assert verdict["schema_version"] == 1
    assert (verdict["file"], verdict["style"], verdict["opset"]) == ("model.onnx", "exact", 21)
    assert verdict["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert verdict["size_bytes"] == path.stat().st_size
    assert set(verdict["versions"]) == {"saq", "torch", "onnx", "onnxruntime", "openvino"}
    assert verdict["hazards"] == []
    for name, kind in FIGURES.items():
        assert type(verdict[name]) is kind, name
        assert verdict[name] == printed[name]
    assert len(verdict["per_layer"]) == verdict["layers"] == len(quantized_layers(saqcli.load(model)))
    for entry in verdict["per_layer"]:
        assert f"{entry['layer']}.weight_quantizer.clipping_level" in layers
        assert entry["wrong"] == 0
        assert entry["codes"] > 0
        assert entry["error"] < 1e-4
        assert entry["accumulator"] > 0
        assert entry["parts"] == 1
    assert sum(entry["codes"] for entry in verdict["per_layer"]) == verdict["codes"]


def test_verdict_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"file")
    verdict = Verdict(4, 1.0, 0.5, 0.1, accumulators=(Accumulator("one", 2**25, 3), Accumulator("two", 7, 1)))
    tree = json.loads(verdict_text(verdict, path, {"style": "qdq"}), parse_constant=pytest.fail)

    assert tree["largest_accumulator"] == 2**25
    assert tree["split_layers"] == ["one"]
    assert tree["per_layer"] == []


def test_loaded_exact_form_equals_the_file(exact: tuple[Path, dict[str, Any]], model: Path) -> None:
    path, _ = exact
    form = saqcli.load(model, exact=True)
    x = torch.randn(7, 1, 16, 16)
    with torch.no_grad():
        expected = form(x)
        near = saqcli.load(model)(x)
    for optimized in (False, True):
        assert torch.equal(onnx_session(path, optimized=optimized)(x), expected)
        assert torch.equal(onnx_session(path, optimized=optimized)(x[:1]), expected[:1])
    assert not form.training
    assert float((near - expected).abs().mean()) < 0.1 * float(near.std())


@pytest.mark.parametrize("style", [style for style in STYLES if not STYLES[style].bit_equal])
def test_every_style_is_verified(style: str, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.onnx"
    found = answer("export", model, "--onnx", path, "--style", style)
    verdict = json.loads(verdict_path(path).read_text())

    assert found["style"] == verdict["style"] == style
    assert set(verdict["versions"]) == {"saq", "torch", "onnx", "onnxruntime"}
    assert found["verified"]
    assert found["largest_accumulator"] is None
    assert {entry.key for entry in onnx.load(str(path)).metadata_props} >= {"saq.facts", "preprocessing"}


class Broken(QdqExporter):
    """An exporter that drops the weights of one layer."""

    def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelMetadata) -> None:
        super().export(model, example, path, facts)
        graph = ir.load(path)
        name = next(name for name in graph.graph.initializers if name.endswith("conv2.codes"))
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.tensor(-1 * array.astype("int8"), dtype=ir.DataType.INT8, name=name)
        ir.save(graph, path)


def test_failed_verification_publishes_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a new file nor an existing one is touched; the exit code is 3."""
    monkeypatch.setitem(STYLES, "qdq", Broken)
    path = tmp_path / "model.onnx"
    result = saq("export", model, "--onnx", path, "--quiet")

    assert result.exit_code == 3
    message = last_error(result)
    assert "model.onnx does not match the model" in message
    assert "no file was written" in message
    assert "given the same codes, it differs before" in message
    assert not list(tmp_path.iterdir())

    path.write_bytes(b"before")
    assert saq("export", model, "--onnx", path, "--quiet", "--overwrite").exit_code == 3
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


def _node(*arguments: Any, **attributes: Any) -> onnx.NodeProto:
    return onnx.helper.make_node(*arguments, **attributes)


# Graphs from images to logits that ONNX Runtime refuses, and the message.
NOT_TAKEN = {
    "hazard": (
        [
            _node("Relu", ["images"], ["a"]),
            _node("Clip", ["a", "zero", "one"], ["b"], name="clip"),
            _node("QuantizeLinear", ["b", "one", "code"], ["c"], name="narrow"),
            _node("DequantizeLinear", ["c", "one", "code"], ["d"]),
            _node("Flatten", ["d"], ["logits"]),
        ],
        "hazard H3 at narrow: a Clip before a quantizer below 8 bits makes the session fail",
    ),
    "operator": (
        [_node("Mystery", ["images"], ["logits"], domain="nowhere")],
        "ONNX Runtime cannot run model.onnx",
    ),
}


@pytest.mark.parametrize("kind", NOT_TAKEN)
def test_unloadable_graph_is_not_published(
    kind: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known hazard is named before ONNX Runtime's less specific message."""
    nodes, says = NOT_TAKEN[kind]

    class NotTaken(QdqExporter):
        def export(self, model: nn.Module, example: Tensor, path: Path, facts: ModelMetadata) -> None:
            values = {"zero": np.float32(0), "one": np.float32(1), "code": np.array(0, ml_dtypes.uint4)}
            constants = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in values.items()]
            ends = [
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
                for name in ("images", "logits")
            ]
            graph = onnx.helper.make_graph(nodes, "graph", ends[:1], ends[1:], constants)
            opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nowhere", 1)]
            onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))

    monkeypatch.setitem(STYLES, "qdq", NotTaken)
    result = saq("export", model, "--onnx", tmp_path / "model.onnx", "--quiet")

    assert result.exit_code == ExportMismatch.exit_code == 3
    assert says in last_error(result)
    assert "no file was written" in last_error(result)
    assert not list(tmp_path.iterdir())


def test_synthetic_images_are_generated_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def count(*arguments: Any) -> Any:
        made.append(synthetic_batches(*arguments))
        return made[-1][:1]

    monkeypatch.setattr(exporting, "synthetic_batches", count)
    found = answer("export", model, "--onnx", tmp_path / "model.onnx")

    assert len(made) == 1
    assert found["images"] == len(made[0][0][0])


def test_existing_file_needs_overwrite(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for taken in (verdict_path(path), path):
        taken.write_text("before")
        result = saq("export", model, "--onnx", path, "--quiet")

        assert result.exit_code == 1
        assert f"{taken} already exists: use --overwrite" in last_error(result)
        assert taken.read_text() == "before"
    assert answer("export", model, "--onnx", path, "--overwrite")["verified"]
    assert (
        json.loads(verdict_path(path).read_text())["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--onnx", "model.bin"), "--onnx model.bin does not end with .onnx"),
        (
            ("--onnx", "model.onnx", "--style", "tflite"),
            "there is no export style 'tflite': choose from qdq, qdq-vnni, exact",
        ),
        (("--onnx", "model.onnx", "--style", "safetensors"), "there is no export style 'safetensors'"),
        (
            ("--onnx", "model.onnx", "--verify", "tensorrt"),
            "--verify tensorrt is not a known runtime",
        ),
    ],
)
def test_meaningless_options_are_refused_early(
    options: tuple[str, ...], says: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = saq("export", model, *options, "--quiet")

    assert result.exit_code == 1
    assert says in last_error(result)
    assert not list(tmp_path.iterdir())


def test_openvino_verification_needs_openvino(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    result = saq("export", model, "--onnx", tmp_path / "model.onnx", "--verify", "openvino", "--quiet")

    assert result.exit_code == 1
    assert '--verify openvino needs OpenVINO: pip install "saq[openvino]"' in last_error(result)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", sweep(["qdq", "exact"], lambda style: style == "qdq"))
def test_additional_runtime_can_fail_the_file(
    style: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime with wrong results fails the file, whatever the style."""

    def wrong(path: Path) -> Any:
        run = onnx_session(path, optimized=True)
        return lambda images: run(images).flip(1)

    monkeypatch.setitem(proof.RUNTIMES, "openvino", wrong)
    monkeypatch.setattr(proof, "version", lambda name: "1")
    path = tmp_path / "model.onnx"
    result = saq("export", model, "--onnx", path, "--style", style, "--verify", "openvino", "--quiet")

    assert result.exit_code == 3
    assert not list(tmp_path.iterdir())


def test_exact_style_allows_other_runtimes_to_differ(exact: tuple[Path, dict[str, Any]]) -> None:
    path, found = exact

    assert (found["verified"], found["max_abs_diff"]) == (True, 0.0)
    assert "openvino" in json.loads(verdict_path(path).read_text())["versions"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders with 4 validation images each."""
    from PIL import Image

    folder, generator = tmp_path_factory.mktemp("few") / "images", np.random.default_rng(0)
    for name in "abcde":
        (folder / "val" / name).mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 255, (16, 16), np.uint8)
            Image.fromarray(pixels).save(folder / "val" / name / f"{index}.png")
    return folder


def seen_by(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that receives the images used for verification."""
    seen: list[Tensor] = []
    prove = proof.prove_graph

    def note(path: Path, model: nn.Module, style: str, batches: Any, *rest: Any) -> Verdict:
        kept = [(images.clone(), labels) for images, labels in batches]
        seen.extend(images for images, _ in kept)
        return prove(path, model, style, kept, *rest)

    monkeypatch.setattr(publish, "prove_graph", note)
    return seen


@pytest.mark.parametrize(
    ("given", "count"), [((), 20), (("--verify-images", "10"), 10), (("--verify-images", "all"), 20)]
)
def test_verify_images_sets_the_image_count(
    given: tuple[str, ...],
    count: int,
    model: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = seen_by(monkeypatch)
    path = tmp_path / "model.onnx"
    found = answer("export", model, "--onnx", path, "--data", few, *given)

    assert sum(map(len, seen)) == count
    assert (found["images"], found["images_available"], found["verified_on"]) == (count, 20, str(few))
    verdict = json.loads(verdict_path(path).read_text())
    assert (verdict["images"], verdict["images_available"], verdict["verified_on"]) == (count, 20, str(few))


def test_table_names_the_verification_images(model: Path, few: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    some = saq("export", model, "--onnx", path, "--data", few, "--verify-images", "5", "--quiet").stdout
    made = saq("export", model, "--onnx", path, "--overwrite", "--quiet").stdout
    figures = json.loads(verdict_path(path).read_text())

    assert f"5 of 20 images of {few}: --verify-images all uses all of them" in " ".join(some.split())
    assert "64 synthetic images: give --data DIR to verify on real images" in " ".join(made.split())
    assert (figures["verified_on"], figures["images_available"]) == ("synthetic images", None)
    difference = f"{figures['max_abs_diff']:.3g} (PyTorch float32: {figures['pytorch_max_abs_diff']:.3g})"
    assert f"largest logit difference: {difference}" in " ".join(made.split())


def test_flipped_code_is_explained() -> None:
    """Layers agree up to rounding, while logits do not."""
    check = LayerwiseCheck((LayerCheck("one", 100, 1, 0, 1.1e-6),), 2e-7)
    verdict = Verdict(500, 0.998, 1.604, 0.01, layerwise=check, pytorch_max_abs_diff=1.7, largest_logit=20.0)

    assert verdict.explanation is not None
    for figure in ("agrees to 1.1e-06", "by up to 1.6 from PyTorch's in float64", "in float32 by up to 1.7"):
        assert figure in verdict.explanation
    verdict.max_abs_diff = 1e-5
    assert verdict.explanation is None


def test_run_on_a_named_set_is_exported_from_any_folder(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, run = tmp_path / "started", tmp_path / "run"
    shutil.copytree(digits / "few", started)
    monkeypatch.chdir(started)
    options = ("--bits", 8, "--epochs", 0, "--run-dir", run, "--set", "data.verify_images=20", "--no-export")
    answer("quantize", MODEL, *float_options(digits, Path("torch/image_folder")), *options)
    monkeypatch.chdir(tmp_path)

    there = answer("export", run)
    started.rename(tmp_path / "moved")
    gone = saq("export", run, "--overwrite")

    assert there["verified_on"] == f"torch/image_folder@{started}"
    assert "64 synthetic images" in gone.stdout
    said = " ".join(gone.stderr.split())
    assert "cannot open the val split of torch/image_folder in ." in said
    assert "synthetic images are used" in said
    assert "cannot open the val split of torch/image_folder in ." in last_error(saq("eval", run))
