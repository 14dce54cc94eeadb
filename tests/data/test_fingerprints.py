"""Fingerprints of the images in a split."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from saqcli.config import resolve
from saqcli.data.datasets import Split, check_fingerprint, fingerprint, open_split
from saqcli.data.images import ImageSet
from saqcli.data.splits import Images
from saqcli.errors import DataError
from saqcli.models.preprocessing import Preprocessing

MakeClasses = Callable[[Path, Mapping[str, int]], Path]


def opened(folder: Path) -> Split:
    return open_split(str(folder), "val", num_classes=2)


def test_fingerprint_survives_moves_only(
    tmp_path: Path, make_classes: MakeClasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_classes(tmp_path / "set", {"cat": 3, "dog": 2})
    (folder / "cat" / os_name(b"\xff.png")).touch()
    kept = fingerprint(opened(folder))
    assert kept.startswith("6:")
    shutil.copytree(folder, tmp_path / "elsewhere" / "moved")
    moved = opened(tmp_path / "elsewhere" / "moved")
    check_fingerprint(kept, moved, "validation")
    monkeypatch.chdir(folder)
    check_fingerprint(kept, opened(Path(".")), "validation")

    (folder / "cat" / "0.png").rename(folder / "cat" / "9.png")
    with pytest.raises(
        DataError, match=r"set are not those .* \(6 expected and found, with other names or labels\)"
    ):
        check_fingerprint(kept, opened(folder), "validation")
    (folder / "cat" / "9.png").rename(folder / "dog" / "0b.png")
    assert fingerprint(opened(folder)) != kept
    (folder / "dog" / "0b.png").unlink()
    with pytest.raises(
        DataError, match=r"\(6 expected, 5 found\): restore them, or start again with `overwrite=True`"
    ):
        check_fingerprint(kept, opened(folder), "validation")


def os_name(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def test_fingerprint_includes_labels() -> None:
    kept = [
        fingerprint(Split(name, ImageSet(source, labels, 3, name), ()))
        for name, source, labels in (
            ("set", [("set/a", 0), ("set/b", 1)], [0, 1]),
            ("set", [("set/a", 0), ("set/b", 2)], [0, 2]),
            ("set", [("set/b", 1), ("set/a", 0)], [1, 0]),
            ("torch/x@/data (test)", range(2), [0, 1]),
            ("torch/x@/data (test)", range(2), [0, 2]),
            ("torch/y@/data (test)", range(2), [0, 1]),
        )
    ]
    assert len(set(kept)) == len(kept)
    moved = Split("torch/x@/other (test)", ImageSet(range(2), [0, 1], 3, "x"), ())  # type: ignore[arg-type]
    assert fingerprint(moved) == kept[3]


def test_resume_requires_the_same_images(tmp_path: Path, make_classes: MakeClasses) -> None:
    for split in ("train", "val"):
        make_classes(tmp_path / split, {"cat": 2, "dog": 2})
    config = resolve(options={"data.path": str(tmp_path), "model.name": "x"})
    plain = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)

    def images() -> Images:
        return Images.open(config, 2, plain, torch.device("cpu"))

    kept = images().fingerprints()
    images().check_fingerprints(kept)
    images().check_fingerprints({})
    (tmp_path / "train" / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match=r"^the training images in .*train are not those"):
        images().check_fingerprints(kept)
    images().check_fingerprints({"val": kept["val"]})
