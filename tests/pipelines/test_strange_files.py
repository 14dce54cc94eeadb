"""Untrusted files: every manipulated file is refused in one line, or computes what its metadata says.

The hash detects accidents. If an attacker recomputes it, only the content can be checked.
"""

import json
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import saqcli
from saqcli.cli import app
from saqcli.errors import CorruptArtifact
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.safetensors import SafetensorsExporter
from saqcli.machine import library_versions
from saqcli.models.load import ModelSpec, load_model
from saqcli.quant import calibration, convert
from saqcli.quant.bits import BitConfig, LayerBits
from saqcli.quant.convert import Scheme
from saqcli.quant.tracer import trace
from tests.support.sealing import Json, entry_of, join, sealed, split, with_metadata, write

SIDE, CLASSES = 8, 5
SECONDS = 2.0  # of processor time, for any one file


def quantized(name: str = "saq/resnet20", side: int = SIDE, **build: Any) -> tuple[nn.Module, ModelMetadata]:
    """A registered network at mixed bits, calibrated on noise."""
    torch.manual_seed(0)
    spec = ModelSpec(name, pretrained=False, num_classes=CLASSES, input_size=side, kwargs=build)
    loaded = load_model(spec)
    size = loaded.preprocessing.input_size
    convert.wrap(loaded.model)
    traced = trace(loaded.model, torch.randn(1, *size))
    convert.leave_float(loaded.model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(loaded.model, [parent], children)
    statistics = calibration.observe(loaded.model, [torch.randn(4, *size)])
    bits = {name: LayerBits(weight=2 + i % 7, activation=2 + i % 5) for i, name in enumerate(traced.layers)}
    policy = BitConfig(model=loaded.name, layers=bits)
    signed = {name: entry.signed for name, entry in statistics.items()}
    convert.install(loaded.model, Scheme(), policy, signed)
    calibration.fit(loaded.model, statistics)
    facts = ModelMetadata(
        saq_version=saqcli.__version__,
        versions=library_versions(),
        build=loaded.build,
        preprocessing=loaded.preprocessing.to_dict(),
        policy=policy,
        scheme=Scheme(),
        signed=signed,
        routed=traced.routed,
        class_names=tuple("abcde"),
        source="random",
        source_sha256="0" * 64,
    )
    return loaded.model.eval(), facts


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import timm  # noqa: F401  # imports what networks come from, before any clock starts
    import torchvision  # noqa: F401

    model, facts = quantized()
    path = tmp_path_factory.mktemp("good") / "model.safetensors"
    SafetensorsExporter().export(model, torch.zeros(0), path, facts)
    return path


@pytest.fixture(scope="module")
def raw(good: Path) -> bytes:
    return good.read_bytes()


@torch.no_grad()
def answer(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    logits: Tensor = model(torch.randn(2, 3, SIDE, SIDE, generator=generator))
    return logits


@pytest.fixture(scope="module")
def truth(good: Path) -> Tensor:
    return answer(saqcli.load(good))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block network access: every connection fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file made saq open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load_or_refusal(path: Path) -> tuple[nn.Module | None, str]:
    """The model in ``path``, or the one line that refuses it; any other outcome fails."""
    start, model, message = time.process_time(), None, ""
    try:
        model = saqcli.load(path)
    except CorruptArtifact as error:
        message = str(error)
    assert time.process_time() - start < SECONDS
    if model is None:
        assert message.isprintable()
        assert str(path) in message
        assert len(message) < 1000
    return model, message


def refused(path: Path) -> str:
    model, message = load_or_refusal(path)
    assert model is None
    return message


def test_valid_file_loads_bit_identically(good: Path, truth: Tensor) -> None:
    assert torch.equal(truth, answer(quantized()[0]))


# Accidents.


def test_file_truncated_anywhere_is_refused(raw: bytes, tmp_path: Path) -> None:
    header, data = split(raw)
    start = len(raw) - len(data)
    ends = [start + entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    places = {*range(20), *range(start - 9, start + 9), *(end + k for end in ends for k in (-1, 0, 1))}
    for place in sorted(place for place in places if place < len(raw)):
        message = refused(write(tmp_path / "model.safetensors", raw[:place]))
        assert "is truncated" in message or "is empty" in message, place


def flipped(raw: bytes, randomness: random.Random, until: int) -> bytes:
    broken = bytearray(raw)
    for _ in range(randomness.choice((1, 1, 2, 8))):
        broken[randomness.randrange(until)] ^= 1 << randomness.randrange(8)
    return bytes(broken)


def flip_many(raw: bytes, path: Path, count: int, seed: int) -> None:
    """Check that a flip of any bit is detected."""
    randomness = random.Random(seed)
    start = len(raw) - len(split(raw)[1])
    for until in (8, start, len(raw)):
        for _ in range(count):
            broken = flipped(raw, randomness, until)
            if broken != raw:
                refused(write(path, broken))


def test_flipped_bits_are_refused(raw: bytes, tmp_path: Path) -> None:
    flip_many(raw, tmp_path / "model.safetensors", 120, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_flipped_bits_are_refused(seed: int, raw: bytes, tmp_path: Path) -> None:
    flip_many(raw, tmp_path / "model.safetensors", 1000, seed)


def test_edited_bytes_are_refused(raw: bytes, tmp_path: Path) -> None:
    randomness = random.Random(0)
    for _ in range(60):
        one, other = sorted(randomness.sample(range(len(raw)), 2))
        some = randomness.randbytes(randomness.randrange(1, 40))
        for broken in (
            raw[:one] + some + raw[one:],
            raw[:one] + raw[other:],
            raw[:one] + some + raw[one + len(some) :],
            raw[:one] + raw[one:other][::-1] + raw[other:],
        ):
            if broken != raw:
                refused(write(tmp_path / "model.safetensors", broken))


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return shutil.copyfile, (__file__, str(self.mark))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_disguised_pickle_is_not_executed(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save({"weight": Bomb(tmp_path / "mark")}, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)

    assert "nothing in it was run" in message
    assert ("is a zip archive" if zipped else "is a pickle") in message
    assert not (tmp_path / "mark").exists()


# Attacks with a correct hash.

OTHERS: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**40, 10**12, 10**30, 0.5, -2.5, 1e300, float("nan"), float("inf"),
    "", "0", "timm/resnet18", "hf-hub:timm/resnet18", "../../etc/passwd", "a\nb\x1b[0m", "x" * 5000,
    [], [1], [[[[[[1]]]]]], [3, SIDE, SIDE], [1] * 3000, {}, {"a": 1}, {"a": {"b": {"c": {"d": {"e": 1}}}}},
]  # fmt: skip


def places(value: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every node of a JSON tree except its root."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def changed(place: tuple[str | int, ...], value: Any) -> Callable[[Any], None]:
    def change(facts: Any) -> None:
        for key in place[:-1]:
            facts = facts[key]
        facts[place[-1]] = value

    return change


def dropped(place: tuple[str | int, ...]) -> Callable[[Any], None]:
    def change(facts: Any) -> None:
        for key in place[:-1]:
            facts = facts[key]
        del facts[place[-1]]

    return change


def renamed(place: tuple[str | int, ...], name: str) -> Callable[[Any], None]:
    def change(facts: Any) -> None:
        for key in place[:-1]:
            facts = facts[key]
        if isinstance(facts, dict):
            facts[name] = facts.pop(place[-1])

    return change


# Metadata that changes the computation, and so gives another model of the same tensors where accepted.
DECISIVE = {"policy", "signed", "routed", "scheme", "build"}


def take(
    path: Path, raw: bytes, place: tuple[str | int, ...], change: Callable[[Any], None], truth: Tensor
) -> None:
    """Check that the file is refused or gives a model that runs, unchanged where the change is irrelevant."""
    model, _ = load_or_refusal(write(path, with_metadata(raw, change)))
    if model is None:
        return
    logits = answer(model)
    assert logits.shape == truth.shape
    if place[0] not in DECISIVE:
        assert torch.equal(logits, truth), place


def attacks(raw: bytes) -> list[tuple[tuple[str | int, ...], Callable[[Any], None]]]:
    found: list[tuple[tuple[str | int, ...], Callable[[Any], None]]] = []
    for place in places(entry_of(split(raw)[0])["facts"]):
        found += [(place, changed(place, value)) for value in OTHERS]
        found += [(place, dropped(place)), (place, renamed(place, "conv1")), (place, renamed(place, "x\ny"))]
    return found


def test_sampled_metadata_changes_are_safe(raw: bytes, truth: Tensor, tmp_path: Path) -> None:
    for place, change in random.Random(0).sample(attacks(raw), 100):
        take(tmp_path / "model.safetensors", raw, place, change, truth)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_all_metadata_changes_are_safe(part: int, raw: bytes, truth: Tensor, tmp_path: Path) -> None:
    for place, change in attacks(raw)[part::8]:
        take(tmp_path / "model.safetensors", raw, place, change, truth)


KWARGS: list[tuple[str, Any]] = [
    ("pretrained", True),
    ("pretrained", False),
    ("pretrained_cfg", {"file": "weights.pth"}),
    ("pretrained_cfg", "a1_in1k"),
    ("pretrained_cfg_overlay", {"url": "https://example.invalid/weights.pth"}),
    ("checkpoint_path", "weights.pth"),
    ("cache_dir", "somewhere"),
    ("weights", "IMAGENET1K_V1"),
    ("weights_backbone", "IMAGENET1K_V1"),
    ("features_only", True),
    ("feature_cls", "fx"),
    ("scriptable", True),
    ("exportable", True),
    ("no_jit", True),
    ("device", "cuda"),
    ("dtype", "float16"),
    ("num_classes", 7),
    ("model_name", "resnet50"),
    ("pruned", True),
    ("global_pool", "../avg"),
    ("global_pool", "https://example.invalid"),
    ("drop_rate", float("nan")),
    ("layers", [10**9, 1, 1, 1]),
    ("layers", [60_000, 1, 1, 1]),
    ("channels", [60_000, 60_000, 60_000, 60_000]),
    ("base_width", 60_000),
    ("block", "BasicBlock"),
    ("block", {"__class__": "os.system"}),
    ("act_layer", "__import__"),
    ("norm_layer", "os.system"),
]


@pytest.fixture(scope="module")
def timm_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model, facts = quantized("timm/test_resnet", 32)
    path = tmp_path_factory.mktemp("timm") / "model.safetensors"
    SafetensorsExporter().export(model, torch.zeros(0), path, facts)
    return path.read_bytes()


@pytest.mark.parametrize(("key", "value"), KWARGS, ids=[f"{key}-{i}" for i, (key, _) in enumerate(KWARGS)])
def test_unsafe_builder_arguments_are_refused(key: str, value: Any, timm_file: bytes, tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")

    refused(
        write(
            tmp_path / "model.safetensors",
            with_metadata(timm_file, changed(("build", "kwargs"), {key: value})),
        )
    )


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:timm/resnet18",
        "timm/hf-hub:timm/resnet18",
        "local-dir:/tmp",
        "timm/local-dir:/tmp",
        "timm/resnet18.local-dir:/tmp",
        "timm/resnet18.nonsense",
        "timm/../resnet18",
        "torchvision/fcn_resnet50",
        "torchvision/raft_large",
        "os/system",
        "",
        "/",
        "timm/",
    ],
)
def test_unknown_network_names_are_refused(name: str, raw: bytes, tmp_path: Path) -> None:
    assert "unknown model" in refused(
        write(tmp_path / "model.safetensors", with_metadata(raw, changed(("build", "name"), name)))
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("build", "num_classes"), 10**7),
        (("build", "name"), "timm/vit_giant_patch14_224"),
        (("build", "name"), "torchvision/regnet_y_128gf"),
        (("build", "name"), "torchvision/vgg19"),
    ],
)
def test_oversized_network_is_never_built(
    place: tuple[str, str], value: Any, raw: bytes, tmp_path: Path
) -> None:
    message = refused(write(tmp_path / "model.safetensors", with_metadata(raw, changed(place, value))))

    assert "a larger network than its tensors belong to" in message


@pytest.mark.parametrize("key", ["num_classes", "in_chans"])
@pytest.mark.parametrize("value", [10**12, 10**30, 0, -1, 2.0, "3", True, None, [3]])
def test_impossible_counts_are_refused(key: str, value: Any, raw: bytes, tmp_path: Path) -> None:
    message = refused(
        write(tmp_path / "model.safetensors", with_metadata(raw, changed(("build", key), value)))
    )

    assert f"its build has no valid {key}" in message


@pytest.mark.parametrize(
    "size",
    [[3, 10**6, 10**6], [3, 0, 8], [3, 8], [3, -8, 8], [1, 8, 8], [10**9, 8, 8], "3x8x8", [3, 8, 1e400]],
)
def test_impossible_image_sizes_are_refused(size: Any, raw: bytes, tmp_path: Path) -> None:
    refused(
        write(
            tmp_path / "model.safetensors", with_metadata(raw, changed(("preprocessing", "input_size"), size))
        )
    )


@pytest.mark.parametrize("crop", [0, -1, 1e-9, float("nan"), float("inf"), "a", None])
def test_impossible_crops_are_refused(crop: Any, raw: bytes, tmp_path: Path) -> None:
    refused(
        write(
            tmp_path / "model.safetensors", with_metadata(raw, changed(("preprocessing", "crop_pct"), crop))
        )
    )


def test_network_refusing_its_images_is_refused(tmp_path: Path) -> None:
    """A vision transformer has positions for one size."""
    model, facts = quantized("timm/vit_tiny_patch16_224", 32)
    path = tmp_path / "model.safetensors"
    SafetensorsExporter().export(model, torch.zeros(0), path, facts)
    smaller = with_metadata(path.read_bytes(), changed(("preprocessing", "input_size"), [3, 64, 64]))

    assert load_or_refusal(path)[0] is not None
    assert "does not turn images of 3 x 64 x 64 into 5 logits" in refused(write(path, smaller))


def test_other_library_versions_are_named(raw: bytes, tmp_path: Path) -> None:
    def older(facts: Json) -> None:
        facts["versions"]["timm"] = "0.1"
        facts["build"]["name"] = "timm/network_of_the_past"

    message = refused(write(tmp_path / "model.safetensors", with_metadata(raw, older)))
    assert "it was written with timm 0.1, here is torch" in message


@pytest.mark.parametrize(
    "dtype", ["I8", "I32", "F16", "BF16", "F64", "F8_E4M3", "F4", "C64", "U64", "BOOL", "X"]
)
def test_wrong_tensor_types_are_refused(dtype: str, raw: bytes, tmp_path: Path) -> None:
    header, data = split(raw)
    for name in ("conv1.codes", "conv1.step", "bn1.weight", "bn1.num_batches_tracked"):
        other = {**header, name: {**header[name], "dtype": dtype}}
        if other != header:
            refused(write(tmp_path / "model.safetensors", sealed(other, data, entry_of(header))))


def test_wrong_shapes_and_names_are_refused(raw: bytes, tmp_path: Path) -> None:
    header, data = split(raw)
    name = "conv1.codes"
    start, end = header[name]["data_offsets"]
    shapes: list[Any] = [[], [0], [1, end - start], [2**62, 2**62], [-1], [end], None, "a", [[1]], [1.5]]
    offsets: list[Any] = [
        [0, 1],
        [end, start],
        [start, end + 1],
        [0, 2**63],
        [-1, end],
        [2**70, 2**71],
        [1],
        None,
    ]
    others: list[Json] = [{**header, name: {**header[name], "shape": shape}} for shape in shapes]
    others += [{**header, name: {**header[name], "data_offsets": offset}} for offset in offsets]
    others += [{**header, name: value} for value in (None, {}, [], 1)]
    others += [
        {**{k: v for k, v in header.items() if k != name}, other: header[name]} for other in ("", "a\nb")
    ]
    for other in others:
        for file in (join(other, data), join({**other, "__metadata__": {"saq": "{}"}}, data)):
            refused(write(tmp_path / "model.safetensors", file))


@pytest.mark.parametrize(
    "metadata", [None, [], {"saq": 1}, {"saq": None}, {"saq": {}}, {"saq": ["a"]}, "saq"]
)
def test_wrong_metadata_types_are_refused(metadata: Any, raw: bytes, tmp_path: Path) -> None:
    header, data = split(raw)

    refused(write(tmp_path / "model.safetensors", join({**header, "__metadata__": metadata}, data)))


def test_deeply_nested_header_is_refused(tmp_path: Path) -> None:
    for text in (
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b"{" + b" " * 10**6,
        b'{"a":"' + b"\xff" * 100 + b'"}',
    ):
        refused(write(tmp_path / "model.safetensors", len(text).to_bytes(8, "little") + text))


# Error messages.


@pytest.mark.parametrize("what", ["truncated", "foreign", "newer", "changed", "larger"])
def test_eval_error_is_one_line(what: str, raw: bytes, tmp_path: Path) -> None:
    header, data = split(raw)
    content, expected = {
        "truncated": (raw[:-5], "is truncated"),
        "foreign": (b"PK\x03\x04" + raw, "is a zip archive"),
        "newer": (sealed(header, data, {**entry_of(header), "version": 2}), "upgrade saq"),
        "changed": (raw[:-1] + bytes([raw[-1] ^ 1]), "was changed after it was written"),
        "larger": (with_metadata(raw, changed(("build", "num_classes"), 10**7)), "a larger network"),
    }[what]
    path = write(tmp_path / "model.safetensors", content)
    result = CliRunner().invoke(app, ["eval", str(path), "--data", str(tmp_path)])

    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {path}")
    assert expected in result.stderr
    assert result.stderr.count("\n") == 1


def test_stored_json_is_readable_by_others(raw: bytes) -> None:
    facts = entry_of(split(raw)[0])["facts"]

    assert facts["versions"].keys() == {"torch", "torchvision", "timm"}
    assert facts["source_sha256"] == "0" * 64
    assert json.loads(json.dumps(facts)) == facts
