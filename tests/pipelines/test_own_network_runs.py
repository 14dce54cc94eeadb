"""Every command with a network of one's own, as a user runs them in the folder of the package."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import saqcli
from saqcli.errors import BuilderError
from saqcli.export.restore import restore
from saqcli.export.safetensors import read_content, seal
from saqcli.models.load import ModelSpec, load_model
from saqcli.models.own import own_network
from tests.support.command_line import answer, last_error, saq
from tests.support.image_folders import MakeClasses, make_classes
from tests.support.own import mynets, no_imports

__all__ = ["make_classes", "mynets", "no_imports"]
NAME = "mynets.nets:build"
NETWORK = (NAME, "--weights", "w.pth", "--input-size", 16)
DATA = ("--data", "images", "--workers", 0)
RUN = ("runs/a", "--builder", NAME)


@pytest.fixture
def folder(mynets: Path, make_classes: MakeClasses) -> Path:
    """The folder with the package, images of four classes, weights and a finished run."""
    for split, count in (("train", 3), ("val", 2)):
        make_classes(mynets / "images" / split, dict.fromkeys("abcd", count))
    torch.manual_seed(0)
    net = load_model(ModelSpec(NAME, num_classes=4, input_size=16)).model
    torch.save(net.state_dict(), "w.pth")
    options = ("--bits", 4, "--epochs", 1, "--batch-size", 4, "--run-dir", "runs/a")
    assert answer("quantize", *NETWORK, *DATA, *options)["model"] == NAME
    return mynets


def test_all_commands_take_an_own_network(folder: Path) -> None:
    found = answer("eval", *RUN, *DATA)
    assert answer("eval", "runs/a/artifacts/model.onnx", *DATA)["images"] == 8
    assert answer("eval", *NETWORK, *DATA)["images"] == 8
    assert found["top1"] == answer("eval", "runs/a/artifacts/model.safetensors", *RUN[1:], *DATA)["top1"]
    assert answer("export", *RUN, "--onnx", "net.onnx")["style"] == "qdq"
    assert answer("analyze", *RUN, *DATA, "--flips", "--images", 4)["model"] == NAME
    assert answer("profile", *RUN)["bops"] == answer("profile", *NETWORK, "--bits", 4)["bops"]
    assert answer("rerun", *RUN)["identical"]
    assert answer("quantize", NAME, "--resume", "--run-dir", "runs/a")["model"] == NAME
    plan = answer("quantize", NAME, "--config", "runs/a/config.json", "--dry-run")
    assert (plan["run_dir"], plan["weights"]) == ("runs/mynets.nets.build-w4a4", "w.pth")
    searched = answer("search", *NETWORK, *DATA, "--budget", "w4a4", "--run-dir", "runs/s")
    assert searched["model"] == NAME
    options = ("--policy", "runs/s", "--epochs", 0, "--no-export", "--run-dir", "runs/p")
    assert answer("quantize", *NETWORK, *DATA, *options)["model"] == NAME
    images = torch.randn(2, 3, 16, 16)
    model = saqcli.load("runs/a", builder=NAME)
    own = own_network(NAME)
    assert torch.equal(model(images), saqcli.load("runs/a", model=own.source(4))(images))
    by_function, _ = restore(Path("runs/a/artifacts/model.safetensors"), own_network(own.source))
    assert torch.equal(model(images), by_function(images))


def test_nothing_that_a_file_names_is_imported(folder: Path, no_imports: None) -> None:
    content = read_content(Path("runs/a/artifacts/model.safetensors"))
    build = {**content.metadata.build, "name": "evil:build"}
    metadata = content.metadata.model_copy(update={"build": build})
    Path("evil.safetensors").write_bytes(save(content.tensors, seal(metadata, content.tensors)))
    evil = Path(shutil.copytree("runs/a", "runs/evil"))
    shutil.copy("evil.safetensors", evil / "artifacts/model.safetensors")
    for file in ("config.json", "policy.json", "manifest.json"):
        (evil / file).write_text((evil / file).read_text().replace(NAME, "evil:build"))
    for verb, *arguments in (
        ("eval", "evil.safetensors", *DATA),
        ("eval", "runs/evil", *DATA),
        ("eval", "evil.safetensors", "--bench"),
        ("eval", "runs/a/artifacts/model.onnx", "--bench"),
        ("export", "runs/evil", "--onnx", "x.onnx"),
        ("analyze", "evil.safetensors", *DATA),
        ("profile", "runs/evil"),
        ("profile", "evil.safetensors"),
        ("profile", "runs/a/artifacts/model.onnx"),
        ("rerun", "runs/evil"),
        ("quantize", "--resume", "--run-dir", "runs/evil"),
        ("quantize", "--config", "runs/evil/config.json", "--dry-run"),
        ("search", "--config", "runs/evil/config.json", "--dry-run"),
    ):
        result = saq(verb, *arguments, "--quiet")
        assert result.exit_code == 1, (verb, arguments)
        assert "names in files are never imported" in last_error(result), (verb, arguments)
    assert answer("eval", "runs/a/artifacts/model.onnx", *DATA)["images"] == 8
    with pytest.raises(BuilderError, match="use `builder=evil:build`"):
        saqcli.load("runs/evil")
    assert not Path("was_run").exists()


def test_other_builder_is_refused(folder: Path) -> None:
    other = ("--builder", "mynets.nets:Fixed", "--quiet")
    for verb, *arguments in (
        ("eval", "runs/a", *DATA),
        ("eval", "runs/a/artifacts/model.onnx", *DATA),
        ("export", "runs/a", "--onnx", "x.onnx"),
        ("rerun", "runs/a"),
    ):
        assert f"use --builder {NAME}" in last_error(saq(verb, *arguments, *other))
    assert "is a model name: remove it" in last_error(saq("profile", NAME, *other))
    # a network of the same name whose layers have changed
    nets = folder / "mynets" / "nets.py"
    nets.write_text(nets.read_text().replace("width=8", "width=4"))
    own = own_network(NAME).source.__globals__["Net"]
    with pytest.raises(saqcli.SaqError, match="its tensors are not those of"):
        restore(
            Path("runs/a/artifacts/model.safetensors"),
            own_network(lambda num_classes: own(num_classes, width=4)),
        )


def test_error_in_module_is_one_line(mynets: Path) -> None:
    arguments = ("quantize", "mynets.nets:deserting", "--bits", 4, "--dry-run")
    result = saq(*arguments)
    assert result.exit_code == 1
    assert "failed: KeyError: 'no such width' (mynets/nets.py:51)" in last_error(result)
    assert "Traceback" in saq(*arguments, "--verbose").stderr
