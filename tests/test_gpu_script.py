"""The scheduling of ``benchmarks/gpu.py``, and the shards and batches of its training."""

import importlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a script by its name; they import each other by theirs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == FOLDER and "." not in name:
            del sys.modules[name]


class FakeWorker:
    """Answers at once; items called ``bad`` fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def run(self, name: str, limit: float) -> dict[str, Any]:
        self.ran.append(name)
        return {"status": "failed" if name == "bad" else "passed", "seconds": 0.0, "figures": {}}

    def close(self) -> None: ...


def run(gpu: Any, path: Path, group: dict[str, float], seconds: float, *, again: bool = False) -> list[str]:
    worker = FakeWorker()
    results = gpu.Results(path, again)
    gpu.Schedule(group, results, time.monotonic() + seconds, estimated=True).run([worker])
    return worker.ran


def test_items_that_do_not_fit_wait(scripts: Any, tmp_path: Path) -> None:
    gpu, path = scripts("gpu"), tmp_path / "gpu.json"

    assert run(gpu, path, {"short": 1.0, "long": 100.0, "other": 2.0}, 50) == ["short", "other"]
    assert run(gpu, path, {"short": 1.0, "long": 100.0, "other": 2.0}, 500) == ["long"]


def test_failures_are_kept_and_repeated_on_request(scripts: Any, tmp_path: Path) -> None:
    gpu, path = scripts("gpu"), tmp_path / "gpu.json"
    group = {"good": 1.0, "bad": 1.0}

    assert run(gpu, path, group, 50) == ["good", "bad"]
    assert json.loads(path.read_text())["items"]["bad"]["status"] == "failed"
    assert run(gpu, path, group, 50) == []
    assert run(gpu, path, group, 50, again=True) == ["bad"]


def picture(label: int, number: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((label, number)).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of each of two classes to train on, one to test."""
    for split, count in (("train", 3), ("test", 1)):
        for label, name in enumerate(("ant", "bee")):
            target = tmp_path / "images" / split / name
            target.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(picture(label, number)).save(target / f"{number}.png")
    return tmp_path


def test_shards_hold_the_images_exactly(scripts: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = scripts("gpu_training")
    monkeypatch.setattr(training, "PER_CLASS", 2)
    written = training.prepare(folder / "images", folder / "shards")
    images, labels, classes = training.read([folder / "shards"], "train-*.safetensors")

    assert [path.name for path in written] == [
        "train-0.safetensors",
        "train-1.safetensors",
        "test.safetensors",
    ]
    assert (labels.tolist(), classes) == ([0, 0, 1, 1, 0, 1], ["ant", "bee"])
    numbers = [0, 1, 0, 1, 2, 2]
    wanted = [
        torch.from_numpy(picture(*each)).permute(2, 0, 1)
        for each in zip(labels.tolist(), numbers, strict=True)
    ]
    assert torch.equal(images, torch.stack(wanted))


def test_crops_are_parts_of_the_padded_images(scripts: Any) -> None:
    training = scripts("gpu_training")
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    shifts, mirrored = torch.tensor([[0, 4, 8], [1, 4, 7]]), torch.tensor([False, False, True])
    found = training.cropped(images, shifts, mirrored)

    padded = torch.nn.functional.pad(images, (4,) * 4)
    assert torch.equal(found[0], padded[0, :, 0:8, 1:9])
    assert torch.equal(found[1], images[1])
    assert torch.equal(found[2], padded[2, :, 8:16, 7:15].flip(2))


def test_batches_follow_from_seed_and_epoch(scripts: Any) -> None:
    training = scripts("gpu_training")
    data = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8), torch.arange(300)

    def labels(seed: int, epoch: int) -> list[int]:
        batches = training.OnDevice(*data, ((0.5,) * 3, (0.2,) * 3), seed)
        batches.set_epoch(epoch)
        return [int(label) for _, part in batches for label in part]

    assert labels(0, 1) == labels(0, 1)
    assert len({tuple(labels(*each)) for each in ((0, 0), (0, 1), (1, 0))}) == 3
