"""``saq rerun``: same command and seed give the same bits, and every difference is named."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import onnx
import pytest
import torch

import saqcli
from saqcli.random_state import torch_threads
from saqcli.runs.directory import RunDirectory
from tests.support import sealing
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options
from tests.support.processes import figures

BATCH, STEPS = 16, 12
SHORT = ("--epochs", 1, "--batch-size", BATCH, "--workers", 0, "--set", "data.augmentation=none")


def options(folder: Path) -> list[object]:
    """Network, weights and images, relative to ``folder``."""
    return [MODEL, *(text.removeprefix(f"{folder}/") for text in float_options(folder))]


@pytest.fixture(scope="module")
def place(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the float network and a dozen batches of digits."""
    folder = tmp_path_factory.mktemp("place")
    for split, count in (("train", BATCH * STEPS // 10 + 1), ("val", 6)):
        for label in map(str, range(10)):
            target = folder / "images" / split / label
            target.mkdir(parents=True)
            for file in sorted((digits / "images" / split / label).iterdir())[:count]:
                shutil.copy(file, target)
    shutil.copy(digits / "float.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def searched(place: Path) -> Path:
    """A search whose paths are relative, with one thread."""
    with chdir(place), torch_threads(1):
        small = ("--search-images", 40, "--scoring-images", 20, "--set", "search.options.random.draws=2")
        bits = ("--budget", "w3a3", "--searcher", "random", *small, "--deterministic")
        answer("search", *options(place), *bits, "--run-dir", "found")
    return place / "found"


@pytest.fixture(scope="module")
def run(place: Path, searched: Path) -> Path:
    """A run of a dozen steps with bits from a deleted file, relative paths and one thread."""
    with chdir(place), torch_threads(1):
        shutil.copy(searched / "policy.json", "bits.json")
        found = answer("quantize", *options(place), "--policy", "bits.json", *SHORT, "--run-dir", "run")
        assert found["policy"] == json.loads((searched / "policy.json").read_text())["layers"]
        Path("bits.json").unlink()
    return place / "run"


@pytest.fixture(scope="module")
def again(run: Path) -> Path:
    """The same run in another process with another number of threads and working directory."""
    done = subprocess.run(
        [sys.executable, "-m", "saqcli", "rerun", "../run", "--run-dir", "../again", "--json"],
        cwd=run.parent / "images",
        env={**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(Path(saqcli.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert found["identical"]
    assert found["compared"] == ["policy", "metrics", "figures", "weights", "onnx"]
    return run.parent / "again"


def test_another_process_is_bit_identical(run: Path, again: Path) -> None:
    for name in ("metrics.jsonl", "policy.json", "artifacts/model.safetensors", "artifacts/model.onnx"):
        assert (run / name).read_bytes() == (again / name).read_bytes(), name
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5
    then, now = (RunDirectory.open(path).manifest().circumstances[0] for path in (run, again))
    assert then == now
    assert then.directory == str(run.parent)
    assert then.threads == 1


def change_metrics(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "loss": 0.5})
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def change_policy(run: Path) -> None:
    policy = json.loads((run / "policy.json").read_text())
    policy["layers"]["layer2.0.conv1"]["weight"] = 7
    (run / "policy.json").write_text(json.dumps(policy))


def change_weight(run: Path) -> None:
    path = run / "artifacts" / "model.safetensors"
    header, data = sealing.split(path.read_bytes())
    start, _ = header["bn1.bias"]["data_offsets"]
    (value,) = struct.unpack_from("<f", data, start)
    data = data[:start] + struct.pack("<f", value + 0.25) + data[start + 4 :]
    path.write_bytes(sealing.sealed(header, data, sealing.entry_of(header)))


def change_onnx(run: Path) -> None:
    path = run / "artifacts" / "model.onnx"
    model = onnx.load(str(path))
    tensor = next(each for each in model.graph.initializer if len(each.raw_data) >= 4)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 1]) + tensor.raw_data[1:]
    onnx.save(model, str(path))


@pytest.mark.parametrize(
    ("change", "what", "detail", "reason"),
    [
        (change_metrics, "metrics", "line 3 (train, epoch 1): loss: 0.5 -> ", "nothing that is recorded"),
        (change_policy, "policy", "layer2.0.conv1.weight: 7 -> ", "policy.json was changed after the run"),
        (
            change_weight,
            "weights",
            r"1 of \d+ tensors, 1 of [\d,]+ numbers; the largest difference is 0.25, in bn1.bias",
            "artifacts/model.safetensors was changed",
        ),
        (change_onnx, "onnx", r"1 of \d+ initializers differ, ", "artifacts/model.onnx was changed"),
    ],
)
def test_modified_results_are_found_and_named(
    change: Callable[[Path], None],
    what: str,
    detail: str,
    reason: str,
    run: Path,
    again: Path,
    tmp_path: Path,
) -> None:
    changed = shutil.copytree(run, tmp_path / "changed")
    change(changed)

    result = saq("rerun", changed, "--run-dir", again, "--resume", "--json")

    assert result.exit_code == 3
    found = json.loads(result.stdout)
    assert not found["identical"]
    assert [difference["what"] for difference in found["differences"]] == [what]
    pattern = detail if change in (change_weight, change_onnx) else re.escape(detail)
    assert re.match(pattern, found["differences"][0]["detail"])
    assert reason in found["reasons"][0]
    assert what in last_error(result)
    table = saq("rerun", changed, "--run-dir", again, "--resume", "--quiet").stdout
    assert found["differences"][0]["detail"] in table
    assert table.count("bit-identical") == 4


def test_rerun_of_several_processes_names_the_commands(searched: Path, tmp_path: Path) -> None:
    two, new = Path(shutil.copytree(searched, tmp_path / "two")), tmp_path / "new"
    manifest = json.loads((two / "manifest.json").read_text())
    manifest["circumstances"][0]["processes"] = 2
    (two / "manifest.json").write_text(json.dumps(manifest))

    notes = saq("rerun", two, "--run-dir", new).stderr

    start = f"`torchrun --nproc-per-node 2 -m saqcli search --config {two}/config.json --run-dir {new}-2`"
    assert start in notes
    assert f"compare with `saq rerun {two} --run-dir {new}-2 --resume`" in notes


def test_search_reruns_with_moved_images(searched: Path, tmp_path: Path) -> None:
    moved = shutil.move(searched.parent / "images", tmp_path / "images")
    try:
        gone = saq("rerun", searched, "--run-dir", tmp_path / "new", "--quiet")
        with torch_threads(2):
            found = answer("rerun", searched, "--run-dir", tmp_path / "new", "--data", moved)
            assert torch.get_num_threads() == 2
    finally:
        shutil.move(moved, searched.parent / "images")

    assert gone.exit_code == 1
    assert "--data" in last_error(gone)
    assert found["identical"]
    assert found["compared"] == ["policy", "search"]
    assert figures(tmp_path / "new") == figures(searched)
    assert not torch.are_deterministic_algorithms_enabled()


def test_impossible_rerun_is_one_line_error(run: Path, again: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    unfinished, damaged = (shutil.copytree(run, tmp_path / name) for name in ("unfinished", "damaged"))
    manifest = json.loads((run / "manifest.json").read_text())
    (unfinished / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    (damaged / "metrics.jsonl").write_text("{\n")
    other = shutil.copytree(again, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    settings["run"]["seed"] = 1
    (other / "config.json").write_text(json.dumps(settings))
    for asked, said in (
        ([unfinished], "was interrupted, so there is nothing to compare with: resume with `saq"),
        ([damaged], "metrics.jsonl line 1"),
        ([tmp_path / "nothing"], "there is no run directory or file"),
        ([run, "--run-dir", run, "--overwrite"], "must not change"),
        ([run, "--run-dir", run / "artifacts" / "new"], "must not change"),
        ([run, "--run-dir", again], "--overwrite"),
        ([run, "--run-dir", other, "--resume"], "run.seed: 0 -> 1"),
        ([run, "--run-dir", tmp_path / "new", "--weights", "none.pth"], "--weights"),
    ):
        result = saq("rerun", *asked, "--quiet")

        assert result.exit_code == 1, asked
        assert said in last_error(result)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_worker_count_does_not_change_results(run: Path, tmp_path: Path) -> None:
    assert answer("rerun", run, "--run-dir", tmp_path / "new", "--workers", 2)["identical"]


@pytest.mark.slow
def test_interrupted_rerun_resumes(run: Path, again: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(again, tmp_path / "stopped")
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps({**manifest, "status": "interrupted"}))
    shutil.rmtree(stopped / "artifacts")

    assert answer("rerun", run, "--run-dir", stopped, "--resume")["identical"]


@pytest.mark.slow
def test_deterministic_kernels_change_no_cpu_result(run: Path, tmp_path: Path) -> None:
    answer(
        "quantize", "--config", run / "config.json", "--deterministic", *float_options(run.parent),
        *("--policy", run / "policy.json", "--run-dir", tmp_path / "new"),
    )  # fmt: skip

    for name in ("model.safetensors", "model.onnx"):
        assert (tmp_path / "new" / "artifacts" / name).read_bytes() == (run / "artifacts" / name).read_bytes()
