"""Safetensors files: equal to the model, minimal in size, reproducible, and checked when read."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saqcli.errors import CorruptArtifact
from saqcli.export.safetensors import (
    BLANK,
    DTYPES,
    SafetensorsExporter,
    content_digest,
    read_content,
    rebuild,
    seal,
)
from saqcli.quant.convert import Scheme
from saqcli.quant.layer import QuantizedLayer, quantized_layers, stores_codes
from saqcli.quant.quantizers import Quantizer
from tests.support.networks import (
    ALL_BITS,
    NETWORKS,
    Bank,
    Quantized,
    bank_bits,
    images,
    quantize,
    same_bits,
)
from tests.support.sealing import entry_of, join, sealed, sha256_of, split, with_metadata, write
from tests.support.sweeps import sweep
from tests.support.tampering import TAMPERED

GRIDS = ("auto", "paper", "zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("safetensors")


@cache
def network(name: str, grid: str = "auto", granularity: str = "channel") -> Quantized:
    """A network of ``NETWORKS`` at mixed bits, or all single layers at all bits."""
    scheme = Scheme(weight_grid=grid, granularity=granularity)  # type: ignore[arg-type]
    return quantize(Bank, bank_bits, scheme) if name == "bank" else quantize(NETWORKS[name], scheme=scheme)


def architecture(name: str) -> nn.Module:
    """The float network with other weights."""
    torch.manual_seed(77)
    return Bank() if name == "bank" else NETWORKS[name]()


def export(quantized: Quantized, path: Path) -> Path:
    SafetensorsExporter().export(quantized.model, images(2), path, quantized.facts)
    return path


def written(folder: Path, name: str, grid: str = "auto", granularity: str = "channel") -> Path:
    """The file of a network, written once per test session."""
    path = folder / f"{name}-{grid}-{granularity}.safetensors"
    if not path.exists():
        export(network(name, grid, granularity), path.with_name(f"{os.getpid()}-{path.name}")).replace(path)
    return path


@pytest.fixture
def good(folder: Path) -> Path:
    return written(folder, "conv_bn")


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    logits: Tensor = model(x)
    return logits


def coded_layers(quantized: Quantized) -> dict[str, QuantizedLayer]:
    return {
        name: layer
        for name, layer in quantized.layers.items()
        if isinstance(layer.weight_quantizer, Quantizer) and stores_codes(layer)
    }


def reread(path: Path, name: str = "conv_bn") -> nn.Module:
    facts, tensors = read_content(path)
    return rebuild(architecture(name), facts, tensors, str(path))


def refused(path: Path) -> str:
    """The one-line message that refuses ``path``."""
    with pytest.raises(CorruptArtifact) as refusal:
        reread(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Writing.


@pytest.mark.parametrize(
    ("name", "grid", "granularity"),
    sweep(
        product(["bank", *NETWORKS], GRIDS, ("channel", "tensor")),
        lambda name, *scheme: name == "bank" or scheme in (("auto", "channel"), ("zero", "tensor")),
    ),
)
def test_rebuilt_model_is_bit_identical(name: str, grid: str, granularity: str, folder: Path) -> None:
    quantized = network(name, grid, granularity)
    model = reread(written(folder, name, grid, granularity), name)

    assert torch.equal(answer(model, images(16)), answer(quantized.model, images(16)))
    for one, other in zip(quantized_layers(model).values(), quantized.layers.values(), strict=True):
        assert torch.equal(one.quantized_weight(), other.quantized_weight())
        assert one.bits == other.bits
    latent = {f"{n}.{layer.weight_name}" for n, layer in coded_layers(quantized).items()}
    state = model.state_dict()
    for key, value in quantized.model.state_dict().items():
        assert key in latent or torch.equal(state[key], value), key
    assert not model.training


@pytest.mark.parametrize("name", ["conv_bn", "attention", "standardized"])
def test_rebuilt_model_saves_the_same_file(name: str, folder: Path, tmp_path: Path) -> None:
    path = written(folder, name)
    again = export(Quantized(reread(path, name), network(name).facts), tmp_path / "again.safetensors")

    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("grid", GRIDS)
def test_codes_are_packed_exactly(grid: str, folder: Path) -> None:
    tensors = read_content(written(folder, "bank", grid)).tensors
    stored = coded_layers(network("bank", grid))

    assert {layer.bits.weight for layer in stored.values()} == set(ALL_BITS)
    for name, layer in stored.items():
        assert tensors[f"{name}.codes"].dtype == torch.uint8
        assert tensors[f"{name}.codes"].numel() == ceil(layer.latent_weight().numel() * layer.bits.weight / 8)  # type: ignore[operator]
        assert f"{name}.{layer.weight_name}" not in tensors


def test_file_is_header_and_tensors_only(good: Path) -> None:
    data = sum(value.numel() * value.element_size() for value in read_content(good).tensors.values())
    header = int.from_bytes(good.read_bytes()[:8], "little")

    assert good.stat().st_size == 8 + header + data


def test_file_holds_only_tensors_and_json(good: Path) -> None:
    with safetensors.safe_open(good, "pt") as file:
        assert set(file.metadata()) == {"saq"}
    assert set(entry_of(split(good.read_bytes())[0])) == {"format", "version", "sha256", "facts"}


def test_float_layers_are_stored_unchanged(tmp_path: Path) -> None:
    def half(names: Any) -> Any:
        bits = same_bits(4)(names)
        return {name: b.model_copy(update={"weight": None}) if name == "0" else b for name, b in bits.items()}

    quantized = quantize(NETWORKS["conv_bn"], half)
    path = export(quantized, tmp_path / "model.safetensors")
    tensors = read_content(path).tensors

    assert torch.equal(tensors["0.weight"], quantized.layers["0"].latent_weight())
    assert "0.codes" not in tensors
    assert torch.equal(answer(reread(path), images(4)), answer(quantized.model, images(4)))


@pytest.mark.parametrize("name", ["conv_bn", "attention"])
def test_saving_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    one, other = (export(network(name), tmp_path / which) for which in ("one", "other"))

    assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow  # starting it takes seconds; every test run covers another process through saq rerun
def test_another_process_saves_the_same_bytes(good: Path, tmp_path: Path) -> None:
    """No order depends on hash seeds, which differ between processes."""
    path = tmp_path / "model.safetensors"
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import networks; "
        "from saqcli.export.safetensors import SafetensorsExporter; "
        "q = networks.quantize(networks.NETWORKS['conv_bn']); "
        "SafetensorsExporter().export(q.model, networks.images(2), pathlib.Path(sys.argv[2]), q.facts)"
    )
    here = Path(__file__).parent
    subprocess.run(
        [sys.executable, "-c", code, str(here), str(path)], check=True, timeout=120, cwd=here.parents[1]
    )

    assert path.read_bytes() == good.read_bytes()


# The hash.


@pytest.mark.parametrize("name", ["bank", *NETWORKS])
def test_hash_matches_the_documentation(name: str, folder: Path) -> None:
    header, data = split(written(folder, name).read_bytes())

    assert entry_of(header)["sha256"] == sha256_of(header, data)


def test_documented_check_detects_changes(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
    (check,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "sha256" in block]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "model.safetensors", good.read_bytes())

    exec(check, {})
    write(path, good.read_bytes()[:-1] + b"\x55")
    with pytest.raises(AssertionError):
        exec(check, {})


def test_hash_covers_header_and_data() -> None:
    ramp = torch.arange(6, dtype=torch.float32)
    base = {"a": ramp, "b": torch.zeros(2)}
    others: list[tuple[str, dict[str, Tensor]]] = [
        ("text", base),
        ("", {"a": ramp.reshape(2, 3), "b": base["b"]}),
        ("", {"a": ramp.view(torch.int32), "b": base["b"]}),
        ("", {"a": base["b"], "b": ramp}),
        ("", {"a": ramp, "c": base["b"]}),
        ("", {"a": ramp}),
        ("", {**base, "c": torch.zeros(0)}),
        ("", {"a": torch.cat([ramp, base["b"]]), "b": torch.zeros(0)}),
        ("", {"a": -ramp, "b": base["b"]}),
        ("", {"a": ramp, "b": -base["b"]}),  # -0.0
        ("", {"a": torch.tensor(0.0), "b": base["b"]}),
    ]
    hashes = [content_digest(text, tensors) for text, tensors in [("", base), *others]]

    assert len(set(hashes)) == len(hashes)
    assert content_digest("", dict(reversed(base.items()))) == hashes[0]
    assert content_digest("", {"a": ramp.reshape(3, 2).T.reshape(6), "b": base["b"]}) not in hashes[:1]


def test_hash_ignores_strides() -> None:
    x = torch.arange(6.0).reshape(2, 3)

    assert content_digest("", {"x": x.T}) == content_digest("", {"x": x.T.contiguous()})


def test_every_flipped_data_bit_is_detected(good: Path, tmp_path: Path) -> None:
    raw = good.read_bytes()
    start = len(raw) - len(split(raw)[1])
    for place in range(start, len(raw), 7):
        broken = bytearray(raw)
        broken[place] ^= 1 << place % 8
        assert "was changed after it was written" in refused(
            write(tmp_path / "model.safetensors", bytes(broken))
        )


def test_changed_metadata_is_detected(good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    text = header["__metadata__"]["saq"].replace('"saq_version":"0.0.0"', '"saq_version":"0.0.1"')
    path = write(tmp_path / "model.safetensors", join({**header, "__metadata__": {"saq": text}}, data))

    assert "was changed after it was written" in refused(path)


@pytest.mark.parametrize("sha256", [None, 7, "", "0" * 63, "G" * 64, BLANK, "A" * 64, ["0" * 64]])
def test_missing_or_wrong_hash_is_refused(sha256: Any, good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    text = json.dumps({**entry_of(header), "sha256": sha256})

    refused(write(tmp_path / "model.safetensors", join({**header, "__metadata__": {"saq": text}}, data)))


# Truncated files, foreign files, other versions.


@pytest.mark.parametrize("part", [1, 7, 8, 9, 100, 0.3, 0.6, 0.9, -1])
def test_truncated_file_is_named_as_such(part: float, good: Path, tmp_path: Path) -> None:
    whole = good.read_bytes()
    cut = whole[: int(part * len(whole)) if isinstance(part, float) else part]

    assert "is truncated" in refused(write(tmp_path / "model.safetensors", cut))


def test_empty_and_overlong_files_are_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"

    assert "is empty" in refused(write(path, b""))
    assert "is damaged" in refused(write(path, good.read_bytes() + b"\0"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "is a picture"),
        (b"PK\x03\x04" + bytes(200), "is a zip archive"),
        (b"\x80\x04\x95" + bytes(64), "is a pickle"),
        (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer"),
        (bytes(range(256)), "is not a safetensors file"),
        (b"\xff" * 64, "is not a safetensors file"),
        (b"hello, world, this is text", "is not a safetensors file"),
        ((2).to_bytes(8, "little") + b"{]", "is damaged"),
        ((2).to_bytes(8, "little") + b"{}", "contains no quantized model"),
    ],
)
def test_foreign_file_type_is_named(content: bytes, what: str, tmp_path: Path) -> None:
    assert what in refused(write(tmp_path / "model.safetensors", content))


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"format": "saq.model.2"}, {"facts": "{}"}])
def test_foreign_safetensors_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)

    assert "contains no quantized model of saq" in refused(path)


def test_unversioned_file_is_named_as_such(good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    facts = json.dumps(entry_of(header)["facts"])
    header["__metadata__"] = {"format": "saq.model", "facts": facts}

    assert "before the first released format" in refused(
        write(tmp_path / "model.safetensors", join(header, data))
    )


@pytest.mark.parametrize("right", [True, False], ids=["hashed", "not_hashed"])
def test_newer_format_is_reported_first(right: bool, good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    entry: dict[str, Any] = {
        "format": "saq.model",
        "version": 3,
        "facts": {"saq_version": "9.1", "unheard": [1]},
    }
    entry |= {"sha256": ""} if right else {"blake3": "00"}
    message = refused(write(tmp_path / "model.safetensors", sealed(header, data, entry)))

    assert "was written by saq 9.1, format version 3" in message
    assert "reads up to 1: upgrade saq" in message


def test_newer_metadata_version_is_reported(good: Path, tmp_path: Path) -> None:
    def newer(facts: dict[str, Any]) -> None:
        facts |= {"schema_version": 3, "saq_version": "9.1", "unheard": 1}

    message = refused(write(tmp_path / "model.safetensors", with_metadata(good.read_bytes(), newer)))
    assert "was written by saq 9.1, description version 3" in message
    assert "upgrade saq" in message


@pytest.mark.parametrize("version", [None, 0, -1, "1", 1.0, True, [1], 10**400])
def test_invalid_version_is_refused(version: Any, good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())

    refused(
        write(tmp_path / "model.safetensors", sealed(header, data, {**entry_of(header), "version": version}))
    )


@pytest.mark.parametrize(
    "entry", [None, [], "saq", 1, {}, {"format": "saq.model"}, {"format": ["saq.model"]}]
)
def test_malformed_metadata_is_refused(entry: Any, good: Path, tmp_path: Path) -> None:
    refused(write(tmp_path / "model.safetensors", sealed(*split(good.read_bytes()), entry)))


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, '{"format":"saq.model","version":' + "9" * 10_000 + "}"]
)
def test_invalid_json_metadata_is_refused(text: str, good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())

    refused(write(tmp_path / "model.safetensors", join({**header, "__metadata__": {"saq": text}}, data)))


def test_unknown_key_is_refused(good: Path, tmp_path: Path) -> None:
    header, data = split(good.read_bytes())
    path = write(tmp_path / "model.safetensors", sealed(header, data, {**entry_of(header), "surprise": 1}))

    assert "unknown key 'surprise'" in refused(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors")
    refused(tmp_path)


# Contradictions with a recomputed hash.


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED)
def test_tampered_metadata_is_refused(
    change: Callable[[dict[str, Any]], None], good: Path, tmp_path: Path
) -> None:
    refused(write(tmp_path / "model.safetensors", with_metadata(good.read_bytes(), change)))


def _without(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(key)


def _with(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: change(tensors[key]).contiguous()})


LEVEL, NUMBER, STEP = "3.weight_quantizer.clipping_level", "3.input_quantizer.clipping_level", "3.step"
CHANGED: dict[str, tuple[str, Callable[[dict[str, Tensor]], object]]] = {
    "codes_missing": ("missing 3.codes", _without("3.codes")),
    "steps_missing": ("missing 3.step", _without(STEP)),
    "level_missing": ("missing", _without(LEVEL)),
    "input_level_missing": ("missing", _without(NUMBER)),
    "norm_missing": ("missing 1.running_mean", _without("1.running_mean")),
    "counter_missing": ("missing", _without("1.num_batches_tracked")),
    "codes_short": ("3.codes is uint8", _with("3.codes", lambda x: x[:-1])),
    "codes_long": ("3.codes is uint8", _with("3.codes", lambda x: torch.cat([x, x]))),
    "codes_empty": ("3.codes is uint8 [0]", _with("3.codes", lambda x: x[:0])),
    "codes_in_float": ("3.codes is float32", _with("3.codes", Tensor.float)),
    "codes_signed": ("3.codes is int8", _with("3.codes", lambda x: x.view(torch.int8))),
    "codes_folded": ("3.codes is uint8", _with("3.codes", lambda x: x.reshape(2, -1))),
    "codes_beyond_the_grid": ("outside a grid", _with("7.codes", lambda x: torch.full_like(x, 255))),
    "step_scaled": ("do not match", _with(STEP, lambda x: x * 2)),
    "step_next": ("do not match", _with(STEP, lambda x: torch.nextafter(x, x + 1))),
    "step_negative": ("do not match", _with(STEP, lambda x: -x)),
    "step_zero": ("do not match", _with(STEP, lambda x: x * 0)),
    "step_no_number": ("do not match", _with(STEP, lambda x: x * torch.nan)),
    "step_of_another_shape": ("3.step is float32", _with(STEP, lambda x: x[:1])),
    "step_double": ("3.step is float64", _with(STEP, Tensor.double)),
    "level_of_another_shape": ("is float32", _with(LEVEL, lambda x: x[:, :1])),
    "level_empty": ("is float32 [0", _with(LEVEL, lambda x: x[:0])),
    "level_no_number": ("NaN or infinite", _with(LEVEL, lambda x: x * torch.nan)),
    "level_infinite": ("NaN or infinite", _with(LEVEL, lambda x: x * torch.inf)),
    "level_zero": ("do not match", _with(LEVEL, lambda x: x * 0)),
    "input_level_no_number": ("NaN or infinite", _with(NUMBER, lambda x: x * torch.nan)),
    "input_level_infinite": ("NaN or infinite", _with(NUMBER, lambda x: x * -torch.inf)),
    "input_level_empty": ("float32 [0]", _with(NUMBER, lambda x: x[:0])),
    "norm_of_another_shape": ("1.weight is float32 [3]", _with("1.weight", lambda x: x[:-1])),
    "norm_empty": ("1.weight is float32 [0]", _with("1.weight", lambda x: x[:0])),
    "norm_no_number": ("1.running_mean has NaN values (", _with("1.running_mean", lambda x: x * torch.nan)),
    "variance_infinite": ("1.running_var has infinite", _with("1.running_var", lambda x: x * torch.inf)),
    "variance_negative": ("1.running_var has negative", _with("1.running_var", lambda x: -x - 1)),
    "bias_infinite": ("7.bias has infinite", _with("7.bias", lambda x: x + torch.inf)),
    "norm_half": ("1.weight is float16", _with("1.weight", Tensor.half)),
    "counter_empty": ("int64 [0]", _with("1.num_batches_tracked", lambda x: x.reshape(1)[:0])),
    "counter_in_a_list": ("int64 [1]", _with("1.num_batches_tracked", lambda x: x.reshape(1))),
    "counter_in_float": ("float32 []", _with("1.num_batches_tracked", Tensor.float)),
    "something_more": ("unexpected surprise", lambda tensors: tensors.update(surprise=torch.zeros(1))),
    "unpacked_too": ("unexpected 3.weight", lambda t: t.update({"3.weight": torch.zeros(6, 4, 3, 3)})),
    "complex": ("unexpected", lambda t: t.update(surprise=torch.zeros(1, dtype=torch.complex64))),
    "unknown_type": ("unknown type", lambda t: t.update(surprise=torch.zeros(1, dtype=torch.float8_e4m3fn))),
}


@pytest.mark.parametrize(("what", "change"), CHANGED.values(), ids=CHANGED)
def test_changed_tensors_are_refused(
    what: str, change: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    quantized = quantize(NETWORKS["conv_bn"], same_bits(8), Scheme(weight_grid="zero"))
    path = export(quantized, tmp_path / "model.safetensors")
    tensors = read_content(path).tensors
    change(tensors)
    known = {name: x for name, x in tensors.items() if x.dtype in DTYPES}
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata=seal(quantized.facts, known))

    assert what in refused(path)


@pytest.mark.parametrize("key", [LEVEL, NUMBER])
def test_sign_of_clip_level_is_ignored(key: str, good: Path, tmp_path: Path) -> None:
    """A level may cross zero in training; formats.md defines the step by its magnitude."""
    facts, tensors = read_content(good)
    tensors[key] = -tensors[key]
    path = tmp_path / "model.safetensors"
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata=seal(facts, tensors))

    assert torch.equal(answer(reread(path), images(8)), answer(network("conv_bn").model, images(8)))


def test_nan_offset_is_refused(tmp_path: Path) -> None:
    quantized = quantize(NETWORKS["conv_bn"], scheme=Scheme(quantizer="lsq_plus"))
    path = export(quantized, tmp_path / "model.safetensors")
    tensors = read_content(path).tensors
    tensors["3.input_quantizer.offset"] *= torch.nan
    save_file({name: x.clone() for name, x in tensors.items()}, path, metadata=seal(quantized.facts, tensors))

    assert "3.input_quantizer has a NaN or infinite level, step or offset" in refused(path)


def test_other_architecture_is_refused(good: Path) -> None:
    facts, tensors = read_content(good)
    wider = NETWORKS["conv_bn"]()
    wider[3] = nn.Conv2d(4, 7, 3)  # type: ignore[operator]

    for other in (wider, NETWORKS["attention"]()):
        with pytest.raises(CorruptArtifact):
            rebuild(other, facts, tensors, str(good))


def test_error_is_always_one_line(good: Path, tmp_path: Path) -> None:
    def shout(facts: dict[str, Any]) -> None:
        layers = facts["policy"]["layers"]
        layers["3\nerror: \x1b[31mnothing works\u2028" + "!" * 10_000] = layers.pop("3")
        facts["signed"] = dict.fromkeys(layers, True)

    message = refused(write(tmp_path / "model.safetensors", with_metadata(good.read_bytes(), shout)))
    assert "\x1b" not in message
    assert len(message) < 1000
