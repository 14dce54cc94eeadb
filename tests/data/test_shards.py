"""Sharded data (wds/): every image once, in a reproducible order; damage is reported."""

import io
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("webdataset")

from saqcli.data import archives as shards_module
from saqcli.data.batches import Loader
from saqcli.data.datasets import Split, class_subset, divide, fingerprint, open_split, subset
from saqcli.data.loaders import make_loader
from saqcli.errors import DataError
from saqcli.models.preprocessing import Preprocessing
from tests.support.shards import Sample, write_shard, write_shards

SIZES = (5, 1, 8, 0, 3, 6)  # images per file
COUNT = sum(SIZES)


def sample(number: int) -> Sample:
    """An image whose pixels and label are all ``number``."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (number,) * 3).save(file, "png")
    return f"{number:04d}", {"png": file.getvalue(), "cls": str(number).encode()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    numbers = iter(range(COUNT))
    files = [[sample(next(numbers)) for _ in range(size)] for size in SIZES]
    return write_shards(tmp_path / "set", {"train": files, "validation": files})


def opened(folder: Path, split: str = "val", bad_images: str = "refuse") -> Split:
    return open_split(f"wds/{folder}", split, num_classes=COUNT, bad_images=bad_images)  # type: ignore[arg-type]


def load(split: Split, **options: Any) -> Loader:
    plain = Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)
    defaults = {"batch_size": 4, "training": False, "workers": 0, "device": torch.device("cpu"), "seed": 0}
    return make_loader(split, plain, **(defaults | options))


def seen(loader: Loader, epoch: int = 0) -> list[int]:
    """The labels of one epoch; checks that images match labels and that the batch count is as announced."""
    loader.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    for images, labels in batches:
        assert torch.equal((images[:, 0, 0, 0] * 255).round().long()[labels >= 0], labels[labels >= 0])
    found: list[int] = torch.cat([labels for _, labels in batches]).tolist()
    assert len(found) == loader.images
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_visits_each_image_once(folder: Path, workers: int) -> None:
    for size in (1, 4, 7, 64):
        found = seen(load(opened(folder), workers=workers, batch_size=size))
        assert sorted(found) == list(range(COUNT))
        assert workers or found == sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_is_determined_by_seed_and_number(
    folder: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "SHUFFLE_BUFFER", 6)
    options: dict[str, Any] = {"training": True, "workers": workers, "drop_last": True, "batch_size": 4}
    loader = load(opened(folder, "train"), **options)
    first, second = seen(loader, 0), seen(loader, 1)
    assert len(set(first)) == len(first) == COUNT - COUNT % 4
    assert first != second
    assert sorted(first) != first
    assert seen(load(opened(folder, "train"), **options), 1) == second
    assert seen(load(opened(folder, "train"), **options, seed=1), 0) != first


def test_parts_are_disjoint_and_subsets_nested(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "IMAGES_PER_TURN", 2)
    split = opened(folder, "train")
    small, large, whole = (seen(load(subset(split, count, seed=3))) for count in (8, 15, 99))
    assert (len(small), len(large), sorted(whole)) == (8, 15, list(range(COUNT)))
    assert set(small) < set(large)
    assert seen(load(split, limit=8, seed=3)) == small
    assert set(small) != set(seen(load(subset(split, 8, seed=1))))
    held_out, rest = (seen(load(part)) for part in divide(subset(split, 20, seed=3), 0.3, seed=1))
    assert len(held_out) == 6
    assert Counter(held_out + rest) == Counter(seen(load(subset(split, 20, seed=3))))
    with pytest.raises(DataError, match="is a stream, which does not support drawing images"):
        class_subset(split, 2, seed=0)


def test_calibration_samples_across_shards(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one class per file, calibration sees more than the first class."""
    monkeypatch.setattr(shards_module, "IMAGES_PER_TURN", 2)
    file_of = [number for number, size in enumerate(SIZES) for _ in range(size)]
    for seed in range(3):
        drawn = subset(opened(folder, "train"), 9, seed)
        assert {file_of[image] for image in seen(load(drawn))} == {0, 1, 2, 4, 5}
        for part in divide(subset(opened(folder, "train"), 20, seed), 0.5, seed):
            assert {file_of[image] for image in seen(load(part))} >= {0, 2, 4, 5}


@pytest.mark.filterwarnings("ignore")  # timm leaves the files open
def test_saq_and_timm_read_the_same(folder: Path) -> None:
    from timm.data import create_dataset

    theirs = [
        label for _, label in create_dataset("wds/", root=str(folder), split="validation", is_training=False)
    ]
    assert seen(load(opened(folder))) == theirs


def test_shards_can_come_from_a_pipe(folder: Path) -> None:
    split = open_split(f"wds/set@pipe:cat {folder}", "val", num_classes=COUNT)
    assert sorted(seen(load(split))) == list(range(COUNT))
    assert len(seen(load(split, limit=2))) == 2


def rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    info = json.loads((folder / "_info.json").read_text())
    change(info["splits"])
    (folder / "_info.json").write_text(json.dumps(info))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def spoil(path: Path) -> None:
    """Corrupt a header in the middle; Python's tarfile then reports the end of the file."""
    content = bytearray(path.read_bytes())
    content[4096:4096] = b"\xff" * 512
    path.write_bytes(content)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such split": (
        lambda f: rewrite(f, lambda s: s.pop("validation")),
        r"has the splits train, but not validation or val or test",
    ),
    "no info": (
        lambda f: (f / "_info.json").unlink(),
        r"_info.json \(No such file or directory\)\): give wds/DIR",
    ),
    "no json": (lambda f: (f / "_info.json").write_text("{"), "_info.json is not JSON"),
    "no object": (lambda f: (f / "_info.json").write_text("[]"), "has no splits"),
    "deep": (lambda f: (f / "_info.json").write_text("[" * 100_000), "is not JSON"),
    "sum": (lambda f: rewrite(f, lambda s: s["validation"].update(num_samples=9)), "is inconsistent"),
    "kinds": (lambda f: rewrite(f, lambda s: s["validation"].update(filenames=[1])), "is inconsistent"),
    "labels": (lambda f: rewrite(f, lambda s: s["validation"].update(alt_label="x")), "labels under 'x'"),
    "outside": (
        lambda f: rewrite(f, lambda s: s["validation"]["filenames"].__setitem__(0, "../a.tar")),
        "names the file '../a.tar'",
    ),
    "no file": (lambda f: (f / "validation-0002.tar").unlink(), r"cannot open .*0002.tar \(No such file"),
    "zero bytes": (lambda f: (f / "validation-0002.tar").write_bytes(b""), r"0002.tar \(empty file\)"),
    "no tar": (
        lambda f: (f / "validation-0002.tar").write_bytes(b"x" * 9000),
        r"0002.tar \(it is not a tar file\)",
    ),
    "cut short": (lambda f: cut(f / "validation-0002.tar"), "0002.tar .*unexpected end of data"),
    "spoiled": (
        lambda f: spoil(f / "validation-0002.tar"),
        "0002.tar ends after 2 images, _info.json says 8",
    ),
    "one more": (
        lambda f: write_shard(f / "validation-0001.tar", [sample(1), sample(2)]),
        "0001.tar holds more than the 1 image of",
    ),
    "no image": (
        lambda f: write_shard(f / "validation-0001.tar", [("a", {"cls": b"1", "txt": b""})]),
        "a in .*0001.tar has .cls, .txt: a sample needs",
    ),
    "no label": (
        lambda f: write_shard(f / "validation-0001.tar", [("a", {"png": b""})]),
        "a in .*0001.tar has .png: a sample needs",
    ),
    "no number": (
        lambda f: write_shard(f / "validation-0001.tar", [("a", {"png": b"", "cls": b"cat"})]),
        "no number in its .cls",
    ),
    "label": (
        lambda f: write_shard(f / "validation-0001.tar", [("a", {"png": b"", "cls": b"99"})]),
        "has the label 99, the model has classes 0 to 22",
    ),
    "bad image": (
        lambda f: write_shard(f / "validation-0001.tar", [("a", {"png": b"\x89PNG", "cls": b"9"})]),
        r"cannot read a in .*0001.tar \(it is not an image\): .* `data.bad_images=skip`",
    ),
}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_broken_shards_are_one_line_errors(tmp_path: Path, workers: int) -> None:
    numbers = range(COUNT)
    files = [
        [sample(number) for number in numbers[sum(SIZES[:i]) : sum(SIZES[: i + 1])]]
        for i in range(len(SIZES))
    ]
    for name, (fault, message) in FAULTS.items():
        folder = write_shards(tmp_path / name, {"train": files[:1], "validation": files})
        fault(folder)
        with pytest.raises(DataError) as caught:
            seen(load(opened(folder), workers=workers))
        assert re.search(message, str(caught.value)), name
        assert "\n" not in str(caught.value)


def test_pipe_failures_are_one_line_errors(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for command, message in (
        (f"cat {tmp_path}/nothing", "is not JSON|command ended with 1"),
        (f"f() {{ head -c 3000 $1; case $1 in *.tar) exit 7;; esac; }}; f {folder}", "command ended with 7"),
        ("s3", None),
    ):
        root = f"pipe:{command}" if message else "s3://bucket/set"
        with pytest.raises(DataError, match=message or "no gopen handler"):
            seen(load(open_split(f"wds/set@{root}", "val", num_classes=COUNT)))
    marked = tmp_path / "marked"
    rewrite(folder, lambda s: s["validation"]["filenames"].__setitem__(0, f"a.tar; touch {marked}"))
    with pytest.raises(DataError, match="names the file"):
        seen(load(open_split(f"wds/set@pipe:cat {folder}", "val", num_classes=COUNT)))
    assert not marked.exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_counted(folder: Path, workers: int) -> None:
    for split in ("validation", "train"):
        write_shard(folder / f"{split}-0001.tar", [("a", {"png": b"\x89PNG", "cls": b"5"})])
    found = seen(load(opened(folder, bad_images="skip"), workers=workers))
    assert sorted(found) == sorted([-1, *range(5), *range(6, COUNT)])
    found = seen(load(opened(folder, "train", "skip"), workers=workers, training=True))
    assert len(found) == COUNT
    assert set(found) == {*range(COUNT)} - {5}
    for place, size in enumerate(SIZES):
        write_shard(
            folder / f"train-{place:04d}.tar", [(str(i), {"png": b"", "cls": b"5"}) for i in range(size)]
        )
    with pytest.raises(DataError, match=r"none of the .* images"):
        seen(load(opened(folder, "train", "skip"), workers=workers, training=True))


def test_ranks_partition_the_images(folder: Path) -> None:
    from dataclasses import replace

    from saqcli.data.datasets import sharded

    shards = sharded(opened(folder, "train"))
    assert shards is not None
    for drop_last in (False, True):
        passes = [
            [
                label
                for _, label in replace(
                    shards, batch_size=5, shuffled=True, drop_last=drop_last, share=(rank, 2)
                )
            ]
            for rank in range(2)
        ]
        assert [len(own) for own in passes] == ([10, 10] if drop_last else [10, COUNT - 10])
        assert len({*passes[0], *passes[1]}) == (20 if drop_last else COUNT)


def test_missing_webdataset_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "webdataset", None)
    with pytest.raises(DataError, match=r'pip install "saq\[wds\]"'):
        opened(folder)


def test_shard_labels_can_be_mapped_not_sorted(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", {"validation": [[sample(number) for number in range(3)]]})
    (tmp_path / "map.txt").write_text("0 5\n1 7\n2 9\n")
    mapped = open_split(f"wds/{folder}", "val", num_classes=10, class_map=str(tmp_path / "map.txt"))
    assert fingerprint(mapped) != fingerprint(open_split(f"wds/{folder}", "val", num_classes=10))
    assert [int(label) for _, labels in load(mapped) for label in labels] == [5, 7, 9]
    (tmp_path / "map.txt").write_text("0 5\n1 7\n")
    short = open_split(f"wds/{folder}", "val", num_classes=10, class_map=str(tmp_path / "map.txt"))
    with pytest.raises(DataError, match=r"has the label 2, but `data\.class_map` has no line"):
        list(load(short))
    with pytest.raises(DataError, match=r"numbers as labels and no class names.*remove `data.class_order`"):
        open_split(f"wds/{folder}", "val", num_classes=10, class_order="timm")
