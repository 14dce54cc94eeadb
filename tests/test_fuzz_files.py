"""Mutated files are read as what they say or refused in one line; no code is run.

Model files of saq are attacked in ``pipelines/test_strange_files.py``; here are all others: settings, policies,
manifests, readings, float weights and ONNX graphs.
"""

import functools
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import save_file
from torch import Tensor, nn

from saqcli._version import __version__
from saqcli.analysis import Settings
from saqcli.analysis.sensitivity import Candidate, LayerSensitivity, SensitivityReading
from saqcli.config import ModelSection, resolve
from saqcli.errors import ConfigError, CorruptArtifact, SaqError, UnsafeWeights
from saqcli.export import ModelMetadata
from saqcli.export.model_metadata import properties
from saqcli.export.tracing import INPUT, OUTPUT
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.weights import load_into, read_weights
from saqcli.pipelines.analyze import AnalysisFolder
from saqcli.pipelines.bits import read_policy
from saqcli.pipelines.predictors import open_onnx
from saqcli.pipelines.setup import Network, load_float, wrap_and_trace
from saqcli.progress import SILENT
from saqcli.quant.bits import BitConfig, LayerBits, uniform
from saqcli.quant.convert import Scheme
from saqcli.report.analysis_file import SubjectMetadata
from saqcli.runs.directory import RunDirectory, RunManifest
from saqcli.serialization import named_path
from saqcli.verify.runtime import open_file, runner
from tests.support.command_line import last_error, saq
from tests.support.mutations import bytes_of, texts_of
from tests.support.sweeps import sweep

SECONDS = 5  # for any one file; most take a millisecond
MEGABYTES = 600  # that reading one may add to peak memory
FEW, MANY = 60, 3000
COUNTS = sweep([FEW, MANY], lambda count: count == FEW)
BITS = LayerBits(weight=4, activation=4)

Read = Callable[[Path], object]


@contextmanager
def bounded() -> Iterator[None]:
    """Limit time and memory within the context."""

    def stop(*_: object) -> None:
        raise AssertionError(f"a file was read for more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held < MEGABYTES * 1024


def refusal_of(read: Read, path: Path) -> str | None:
    """The one line that refuses a file, or None if it is accepted."""
    try:
        with bounded():
            read(path)
    except SaqError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1200, message
        assert str(path) in message, message
        return message
    return None


def refused(read: Read, path: Path) -> str:
    message = refusal_of(read, path)
    assert message is not None
    return message


def attack(read: Read, path: Path, files: Iterable[bytes]) -> None:
    """Read every file under this name; most must be refused, and each refused or accepted cleanly."""
    outcomes = []
    for number, raw in enumerate(files):
        path.write_bytes(raw)
        try:
            outcomes.append(refusal_of(read, path) is not None)
        except Exception as error:
            raise AssertionError(f"file {number}, {raw[:2000]!r}: {error!r}") from error
    assert sum(outcomes) > len(outcomes) / 2


# Policies, settings and manifests.


@pytest.fixture(scope="module")
def network() -> Network:
    return wrap_and_trace(load_float(ModelSection(name="saq/resnet20", pretrained=False), SILENT))


def policy(network: Network) -> dict[str, Any]:
    return uniform(
        network.name, dict.fromkeys(layer.name for layer in network.costs.layers), BITS
    ).model_dump()


def settings() -> dict[str, Any]:
    """A configuration with as many settings as possible."""
    options = {
        "model.name": "saq/resnet20",
        "model.kwargs": {"a": 1},
        "data.path": "images",
        "quantization.bits": "4",
        "quantization.pins": {"layer1.*": "3-6"},
        "training.minimizer": {"rho": 0.1},
        "search.options": {"random": {"count": 3}},
        "search.proxy": {"data": "images"},
    }
    return resolve(options=options).model_dump(mode="json")


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        **RunManifest(
            command=["saq", "quantize"],
            status="finished",
            started="2026-01-01T00:00:00+00:00",
            versions={"saq": __version__},
            artifacts={"artifacts/model.onnx": "0" * 64, "artifacts/sub/model.safetensors": "0" * 64},
            results={"top1": 90.5, "policy": {"conv1": {"weight": 4}}},
        ).model_dump(),
        **changes,
    }


def read_config(path: Path) -> str:
    return resolve(file=path).to_json()


def read_manifest(path: Path) -> str:
    return RunDirectory.open(path.parent).manifest().model_dump_json()


def read_run_config(path: Path) -> str:
    return RunDirectory(path.parent).config().to_json()


TOML = b"""
recipe = "quick"
[model]
name = "saq/resnet20"
kwargs = {a = 1, b = [1, 2]}
[quantization]
bits = "w4a4"
pins = {"layer1.*" = "4"}
[training]
epochs = 1
lr = 1e-2
"""


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_policies_are_safe(count: int, network: Network, tmp_path: Path) -> None:
    attack(
        lambda path: read_policy(path, network), tmp_path / "policy.json", texts_of(policy(network), count)
    )


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_settings_are_safe(count: int, tmp_path: Path) -> None:
    attack(read_config, tmp_path / "config.json", texts_of(settings(), count))
    attack(read_config, tmp_path / "config.toml", bytes_of(TOML, count))


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_run_directories_are_safe(count: int, tmp_path: Path) -> None:
    attack(read_manifest, tmp_path / "manifest.json", texts_of(manifest(), count))
    attack(read_run_config, tmp_path / "config.json", texts_of(settings(), count))


KINDS = {"policy.json": "layers", "config.json": "model", "config.toml": "model", "manifest.json": "versions"}


@pytest.mark.parametrize("name", KINDS)
def test_duplicate_and_unknown_keys_are_named(name: str, network: Network, tmp_path: Path) -> None:
    trees = {"policy.json": policy(network), "config.json": settings(), "manifest.json": manifest()}
    reads: dict[str, Read] = {
        "policy.json": lambda path: read_policy(path, network),
        "manifest.json": read_manifest,
    }
    path, read = tmp_path / name, reads.get(name, read_config)

    def message(change: dict[str, Any], start: str) -> str:
        """Of the file with other keys, and with further text at its beginning."""
        if path.suffix == ".toml":
            changes = "".join(f"{key} = {value}\n" for key, value in change.items())
            path.write_bytes(changes.encode() + start.encode() + TOML)
        else:
            path.write_text("{" + start + json.dumps({**trees[name], **change})[1:])
        return refused(read, path)

    twice = f"[{KINDS[name]}]\n" if path.suffix == ".toml" else f'"{KINDS[name]}": {{}}, '
    assert ("twice" if path.suffix == ".json" else "not TOML") in message({}, twice)
    assert "unknown key 'surprise'" in message({"surprise": 1}, "")
    newer = message({"schema_version": 2, "surprise": 1}, "")
    assert "another version of saq" in newer
    assert "upgrade saq" in newer


OUTSIDE = [
    *(
        "../../x",
        "/etc/passwd",
        "artifacts/../../x",
        "artifacts/..",
        "artifacts",
        "artifacts/",
        "artifacts//x",
        "x",
        "",
    ),
    *("artifacts/./x", "artifacts/a\0b", "artifacts\\..\\x", "C:\\x", "~/x", "artifacts/x\n/../y"),
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_artifacts_outside_the_run_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest(artifacts={name: ""})))

    assert "below artifacts/" in refused(read_manifest, path)


def test_endless_files_are_not_read_fully(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("a." * 100_000 + "a = 1")  # quadratic time and memory in the TOML reader

    assert "nested deeper" in refused(read_config, path)
    assert "more than" in refused(lambda path: read_policy(path, network), Path("/dev/zero"))


# Readings.


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_readings_are_safe(count: int, tmp_path: Path) -> None:
    candidates = [
        Candidate(bits=bits, loss=0.5, top1=80.0, loss_change=0.1, top1_change=-1.0) for bits in (2, 8)
    ]
    layers = [
        LayerSensitivity(name=name, weight_bits=4, activation_bits=None, candidates=candidates)
        for name in ("conv1", "fc")
    ]
    facts = SubjectMetadata(
        target="run", model="saq/resnet20", sha256="0" * 64, latent_weights=True, split="val", images=10,
        images_sha256="1" * 64, seed=0, loss=0.4, top1=81.0,
    )  # fmt: skip
    folder = AnalysisFolder(tmp_path, facts, Settings())
    reading = SensitivityReading(loss=0.4, top1=81.0, layers=layers)
    folder.save("sensitivity", reading)
    path = folder.path_of("sensitivity")

    def read(path: Path) -> None:
        assert folder.load("sensitivity") == reading  # whatever else changed

    read(path)
    attack(read, path, texts_of(json.loads(path.read_text()), count))


# Float weights.


def float_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))


def load_weights(path: Path) -> None:
    load_into(float_network(), read_weights(path).tensors, str(path))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["zip.pth", "legacy.pt", "w.safetensors"])
def test_mutated_weights_are_safe(name: str, count: int, tmp_path: Path) -> None:
    path, state = tmp_path / name, float_network().state_dict()
    checkpoint = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"betas": (0.9, 0.999), "groups": [{"lr": 0.1}]},
    }
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(checkpoint, path, _use_new_zipfile_serialization=name.startswith("zip"))
    raw = path.read_bytes()
    load_weights(path)

    attack(load_weights, path, bytes_of(raw, count))


class Call:
    """Calls a function when unpickled unsafely."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(mark: Path) -> dict[str, Any]:
    touch = f"touch {mark}"
    python = f"__import__('os').system({touch!r})"
    return {
        "os.system": Call(os.system, touch),
        "builtins.eval": Call(eval, python),
        "builtins.exec": Call(exec, python),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(mark)]),
        "functools.partial": Call(functools.partial, os.system, touch),
        "torch.load": Call(torch.load, str(mark)),
        "torch.hub": Call(torch.hub.list, "x"),
        "torch.jit": Call(torch.jit.load, str(mark)),
        "torch._utils": Call(torch._utils._import_dotted_name, "os.system"),
        "torch._rebuild_from_type": Call(
            torch._tensor._rebuild_from_type_v2, os.system, nn.Module, (touch,), {}
        ),
    }


@pytest.mark.parametrize("how", ["zip", "legacy", "pickle0", "pickle2", "pickle4"])
def test_code_in_weights_is_never_executed(how: str, tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "w.pth"
    for name, call in payloads(mark).items():
        nests = [
            call,
            [call],
            {"state_dict": {"weight": call}},
            {"deep": [({"x": [call]},)], "state_dict": {}},
        ]
        for content in nests:
            if how.startswith("pickle"):
                path.write_bytes(pickle.dumps(content, protocol=int(how[-1])))
            else:
                torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
            with pytest.raises((UnsafeWeights, CorruptArtifact)):
                read_weights(path)
            refused(read_weights, path)
            assert not mark.exists(), name


def doubled(levels: int) -> bytes:
    """A pickle that ends with a tuple of 2 ** ``levels`` empty tuples, most of them shared."""
    steps = b"".join(b"h%ch%c\x86q%c" % (level, level, level + 1) for level in range(levels))
    return b"\x80\x02)q\x00" + steps


ENDLESS = {
    "a key of 2 ** 60 tuples": doubled(60) + b"}h\x3cK\x01s.",
    "a call of a list of 2 ** 60 lists": b"\x80\x02]q\x00"
    + b"".join(b"](h%ch%ceq%c" % (level, level, level + 1) for level in range(60))
    + b")R.",
    "a dictionary that is its own state_dict": b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "100 gigabytes of zeros": b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x19\x85R.",
}


@pytest.mark.parametrize("case", ENDLESS)
def test_pickle_bomb_is_refused(case: str, tmp_path: Path) -> None:
    (path := tmp_path / "w.pth").write_bytes(ENDLESS[case])
    assert "nothing was run" in refused(read_weights, path)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/data.pkl", ENDLESS[case])
        archive.writestr("w/version", "3\n")
    assert "nothing was run" in refused(read_weights, path)


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(path := tmp_path / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.writestr("w/data/0", bytes(2**26))

    assert "nothing was run" in refused(read_weights, path)


def larger_than_its_storage() -> Call:
    storage = torch.storage.TypedStorage(1, dtype=torch.float32, _internal=True)
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (999, 999), (999, 1), False, OrderedDict())


WITHOUT_NUMBERS: dict[str, Callable[[], Any]] = {
    "damaged or foreign": larger_than_its_storage,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta tensor": lambda: torch.ones(3, device="meta"),
}


@pytest.mark.parametrize("expected", WITHOUT_NUMBERS)
def test_incomplete_tensors_are_refused(expected: str, tmp_path: Path) -> None:
    torch.save({"weight": WITHOUT_NUMBERS[expected]()}, path := tmp_path / "w.pth")

    assert expected in refused(read_weights, path)


@pytest.mark.parametrize("key", ["module." * 200_000 + "x", ("a", "b"), 3])
def test_invalid_tensor_names_are_refused(key: Any, tmp_path: Path) -> None:
    torch.save({key: torch.ones(1)}, path := tmp_path / "w.pth")

    assert "no tensors by name" in refused(read_weights, path)


# ONNX files.

CHANNELS, SIDE, CLASSES = 3, 8, 5


def onnx_model() -> Any:
    """A convolution and a mean with quantized weights, and the metadata that saq writes."""
    images = helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", CHANNELS, SIDE, SIDE])
    logits = helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", CLASSES])
    shape = (CLASSES, CHANNELS, 3, 3)
    codes = [(7 * k) % 15 - 7 for k in range(CLASSES * CHANNELS * 9)]
    weights = [
        helper.make_tensor("codes", TensorProto.INT8, shape, bytes(code % 256 for code in codes), raw=True),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.1]),
        helper.make_tensor("zero", TensorProto.INT8, [], [0]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", [INPUT, "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
        helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("GlobalAveragePool", ["y"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], [OUTPUT]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "network", [images], [logits], weights),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    preprocessing = Preprocessing((CHANNELS, SIDE, SIDE), (0.5,) * 3, (0.2,) * 3, "bilinear", 1.0)
    facts = ModelMetadata(
        saq_version=__version__,
        build={"name": "saq/resnet20", "num_classes": CLASSES, "in_chans": CHANNELS, "kwargs": {}},
        preprocessing=preprocessing.to_dict(),
        policy=BitConfig(model="saq/resnet20", layers={"conv1": BITS}),
        scheme=Scheme(),
        signed={"conv1": True},
        routed={},
    )
    helper.set_model_props(model, properties(facts))
    return model


def examples() -> Tensor:
    return torch.randn(2, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def read_and_run(path: Path) -> None:
    """As ``saq eval`` does."""
    open_onnx(path).predict(examples())


def count_and_run(path: Path) -> None:
    """As ``saq eval --bench`` does."""
    open_file(path)
    runner(path, 1)(examples())


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_onnx_is_safe(count: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = onnx_model().SerializeToString()
    path = tmp_path / "model.onnx"
    for read in (read_and_run, count_and_run):
        path.write_bytes(raw)
        assert refusal_of(read, path) is None
        attack(read, path, bytes_of(raw, count))

    assert capfd.readouterr().out == ""


def test_onnx_with_nan_is_refused(tmp_path: Path) -> None:
    model = onnx_model()
    model.graph.initializer[1].float_data[0] = math.nan
    (path := tmp_path / "model.onnx").write_bytes(model.SerializeToString())

    assert "NaN values in scale" in refused(read_and_run, path)


def tensor_elsewhere(location: str) -> Any:
    tensor = helper.make_tensor("other", TensorProto.INT8, [4], b"abcd", raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


@pytest.mark.parametrize(
    "location", ["../../../../../../../etc/passwd", "/etc/passwd", "beside.bin", "/dev/zero"]
)
@pytest.mark.parametrize("place", ["initializer", "attribute", "branch", "function"])
@pytest.mark.parametrize("read", [read_and_run, count_and_run])
def test_external_tensor_files_are_never_read(read: Read, place: str, location: str, tmp_path: Path) -> None:
    model, tensor = onnx_model(), tensor_elsewhere(location)
    (tmp_path / "beside.bin").write_bytes(b"abcd")
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    if place == "initializer":
        model.graph.initializer.append(tensor)
    elif place == "attribute":
        model.graph.node.append(constant)
    elif place == "branch":
        branch = helper.make_graph([constant], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["b"], ["i"], then_branch=branch, else_branch=branch))
    else:
        model.functions.append(helper.make_function("own", "f", [], ["c"], [constant], model.opset_import))
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())

    assert "in other files" in refused(read, path)


def test_custom_operators_are_refused(tmp_path: Path) -> None:
    model = onnx_model()
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node[3].op_type, model.graph.node[3].domain = "Run", "evil"
    model.graph.node[3].attribute.append(helper.make_attribute("library", "/tmp/evil.so"))
    onnx.save(model, str(path := tmp_path / "model.onnx"))

    assert "ONNX Runtime cannot run" in refused(read_and_run, path)


# Error messages.


def test_impossible_name_is_one_line_error(tmp_path: Path) -> None:
    for target in (
        "x" * 5000,
        "~nobody/" + "y" * 300 + "/z",
        "x" * 300 + ".safetensors",
        "x" * 300 + ".onnx",
    ):
        result = saq("eval", target, "--data", tmp_path)
        assert result.exit_code == 1
        assert "unexpected" not in last_error(result)
    for text in ("x" * 300, "a\0b", "\0"):
        with pytest.raises(ConfigError, match="is not a path"):
            named_path(text)
