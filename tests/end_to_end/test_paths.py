"""Folders may have any name, and a run writes only to its own folder."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from saqcli.models.weights import sha256_of
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

NAME = "données de test/Ωmega  'x' \"y\" [/b] $1$ :x: 名"
UNIFORM = ("--budget", "w4a4", "--searcher", "uniform")


def files_in(*folders: Path) -> dict[Path, str]:
    """Everything below the folders, by type or SHA-256."""
    return {
        path: sha256_of(path) if path.is_file() else "folder"
        for folder in folders
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of that name, with images and weights."""
    place = tmp_path_factory.mktemp("place") / NAME
    for split in ("train", "val"):
        for folder in sorted((digits / "images" / split).iterdir()):
            target = place / "des images" / split / f"classe {folder.name} [ü]"
            target.mkdir(parents=True)
            for image in sorted(folder.iterdir())[:3]:
                shutil.copy(image, target / f"é {image.name}")
    shutil.copy(digits / "float.safetensors", place / "poids 'α'.safetensors")
    (place / "réglages.toml").write_text(
        "[training]\nepochs = 0\n[data]\ncalibration_images = 30\n", encoding="utf-8"
    )
    return place


def options(digits: Path, place: Path) -> list[str]:
    named = float_options(digits, place / "des images")
    named[1] = str(place / "poids 'α'.safetensors")
    return [*named, "--workers", "0"]


@pytest.fixture(scope="module")
def quantized(digits: Path, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A quantization in a process with its own home and temporary folder: its output and the files it wrote."""
    run, temporary, home = (
        place / "un run",
        tmp_path_factory.mktemp("temporary"),
        tmp_path_factory.mktemp("home"),
    )
    before = files_in(place, temporary, home)
    settings = ("--bits", "4", "--config", place / "réglages.toml", "--run-dir", run, "--json")
    unset = ("ORT_DISABLE_TELEMETRY", "TORCHINDUCTOR_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    process = subprocess.run(
        [sys.executable, "-m", "saqcli", "quantize", MODEL, *options(digits, place), *map(str, settings)],
        env={**environment, "HOME": str(home), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    after = files_in(place, temporary, home)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    elsewhere = sorted(changed - {run, *run.rglob("*")})
    return {"run": run, "printed": json.loads(process.stdout), "elsewhere": elsewhere}


def test_writes_only_inside_the_run(quantized: dict[str, Any]) -> None:
    """And the kernels of quantizers, in the user's cache folder."""
    kernels = [file for file in quantized["elsewhere"] if file.suffix == ".so"]
    folders = {folder for file in kernels for folder in file.parents}
    assert all(file.parts[-3:-1] == ("saq", "kernels") for file in kernels)
    assert len(kernels) <= 1
    assert {*quantized["elsewhere"]} <= {*kernels, *folders}
    assert not any(path.name.startswith(".") for path in quantized["run"].rglob("*"))


def test_run_works_in_any_folder_name(quantized: dict[str, Any], place: Path) -> None:
    run, data = quantized["run"], ("--data", place / "des images")
    for target in (run, run / "artifacts" / "model.onnx"):
        assert answer("eval", target, *data)["top1"] == pytest.approx(quantized["printed"]["top1"], abs=5)
    network = ("--num-classes", 10, "--in-chans", 1, "--input-size", 16)
    assert answer("profile", MODEL, *network, "--policy", run / "policy.json")["model"] == MODEL


@pytest.mark.slow
def test_commands_work_in_any_folder_name(
    quantized: dict[str, Any], digits: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, data = quantized["run"], ("--data", place / "des images")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    graph, readings, found = place / "le modèle.onnx", place / "une analyse", place / "une recherche"
    assert answer("export", run, "--onnx", graph, *data)["onnx"] == str(graph)

    measured = ("--images", 30, "--sharpness", "--eigenvalue", "--starts", 1, "--out", readings)
    shown = saq("analyze", run, *data, *measured, "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert str(readings) in shown.stdout
    assert (readings / "eigenvalue.png").is_file()

    shown = saq("search", MODEL, *options(digits, place), *UNIFORM, "--run-dir", found, "--quiet")
    assert shown.exit_code == 0, shown.stderr
    assert f"wrote {found / 'policy.json'}" in shown.stdout.splitlines()
    assert not any(tmp_path.iterdir())


def test_resume_command_is_shell_quoted(quantized: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / NAME
    run.mkdir(parents=True)
    shutil.copy(quantized["run"] / "manifest.json", run)

    _, command, _ = last_error(saq("eval", run, "--data", tmp_path, "--quiet")).split("`")

    assert shlex.split(command) == ["saq", "quantize", "--run-dir", str(run), "--resume"]


def test_artifact_link_out_of_run_is_refused(quantized: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(quantized["run"], run)
    (run / "artifacts" / "model.onnx").rename(tmp_path / "model.onnx")
    (run / "artifacts" / "model.onnx").symlink_to(tmp_path / "model.onnx")

    result = saq("eval", run, "--bench", "--quiet")

    assert result.exit_code == 1
    assert "leads out of the run" in last_error(result)


def test_modified_search_results_are_refused(
    quantized: dict[str, Any], digits: Path, place: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = (
        "search",
        MODEL,
        *options(digits, place),
        "--budget",
        "w4a4",
        "--searcher",
        "uniform",
        "--run-dir",
        run,
    )
    assert saq(*command, "--quiet").exit_code == 0
    again = saq(*command, "--resume", "--quiet")
    assert again.exit_code == 0
    tree = json.loads((run / "manifest.json").read_text())
    for key in ("layers", "policy", "bops", "artifacts"):
        other = {**tree, "results": {name: value for name, value in tree["results"].items() if name != key}}
        (run / "manifest.json").write_text(json.dumps(other))

        assert f"key '{key}' is missing" in last_error(saq(*command, "--resume", "--quiet"))
