"""Data sets: splits, classes, labels and subsets."""

import csv
import json
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from saqcli.data.datasets import Split, check_same_classes, fingerprint, open_split, subset
from saqcli.data.images import ImageSet, ImageStream
from saqcli.errors import DataError
from saqcli.tasks.labels import Classes

MakeClasses = Callable[[Path, Mapping[str, int]], Path]

TENCH, GOLDFISH, PARACHUTE = "n01440764", "n01443537", "n03888257"  # 0, 1 and 701 of ImageNet-1k


def labels(split: Split) -> list[int]:
    assert isinstance(split.dataset, ImageSet)
    assert split.dataset.labels is not None
    return list(split.dataset.labels)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_validation_folder_aliases_are_found(name: str, tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path / "train", {"cat": 3, "dog": 3})
    make_classes(tmp_path / name, {"cat": 2, "dog": 1})
    split = open_split(str(tmp_path), "val", num_classes=2)
    assert (split.name, split.images, split.class_names) == (str(tmp_path / name), 3, ("cat", "dog"))
    assert labels(split) == [0, 0, 1]


def test_bare_class_folders_can_be_evaluated(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"cat": 1, "dog": 2})
    assert open_split(str(tmp_path), "val", num_classes=2).images == 3


def test_bare_class_folders_cannot_be_trained(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"cat": 1, "dog": 2})
    with pytest.raises(DataError, match=r"has no train/ folder"):
        open_split(str(tmp_path), "train", num_classes=2)


def test_training_images_are_never_evaluated(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path / "train", {"cat": 1, "dog": 2})
    with pytest.raises(DataError, match=r"no val/, validation/, test/"):
        open_split(str(tmp_path), "val", num_classes=2)


def test_missing_folder_suggests_similar_paths(tmp_path: Path) -> None:
    (tmp_path / "imagenette").mkdir()
    with pytest.raises(DataError, match=r"did you mean .*imagenette\?"):
        open_split(str(tmp_path / "imagenete"), "val", num_classes=10)


def test_file_is_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "val.rar").touch()
    with pytest.raises(DataError, match="is a file: give a folder, a tar or zip of class folders"):
        open_split(str(tmp_path / "val.rar"), "val", num_classes=10)


def test_folder_without_classes_lists_its_contents(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        open_split(str(tmp_path), "val", num_classes=2)
    (tmp_path / "1.JPEG").touch()
    with pytest.raises(DataError, match="has 1 image but no class folders"):
        open_split(str(tmp_path), "val", num_classes=2)


def test_empty_class_folders_are_named(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"bird": 0, "cat": 0, "dog": 0})
    with pytest.raises(DataError, match=r"3 folders \(bird, cat, dog\) but no image in them"):
        open_split(str(tmp_path), "val", num_classes=3)
    (tmp_path / "cat" / "1.png").touch()
    with pytest.raises(DataError, match="without an image: bird, dog;"):
        open_split(str(tmp_path), "val", num_classes=3)


def test_hidden_and_foreign_files_are_ignored(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"cat": 2, "dog": 1, ".ipynb_checkpoints": 1})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "cat" / ".0.png").touch()
    (tmp_path / "cat" / "MORE").mkdir()
    (tmp_path / "cat" / "MORE" / "2.WEBP").touch()
    assert labels(open_split(str(tmp_path), "val", num_classes=2)) == [0, 0, 0, 1]


def test_numeric_class_names_sort_numerically(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {str(number): 1 for number in range(12)})
    split = open_split(str(tmp_path), "val", num_classes=12)
    assert split.class_names == tuple(map(str, range(12)))
    assert labels(split) == list(range(12))


def test_synsets_keep_imagenet_indices(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {TENCH: 1, GOLDFISH: 1, PARACHUTE: 1})
    assert labels(open_split(str(tmp_path), "val", num_classes=1000)) == [0, 1, 701]


def test_synsets_start_at_zero_for_new_head(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {TENCH: 1, GOLDFISH: 1, PARACHUTE: 1})
    assert labels(open_split(str(tmp_path), "val", num_classes=3)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("names", "num_classes", "message"),
    [
        (["cat", "dog"], 10, r"2 classes \(cat, dog\), the model 10: give `model.num_classes=2`"),
        (["ant", "cat", "dog"], 2, r"3 classes .*, the model 2: give `model.num_classes=3`"),
        (["cat", "dog"], 1000, r"the model 1000: .* data whose folders are ImageNet synsets"),
        (
            [TENCH, "n99999999"],
            1000,
            r"the model 1000: .* neither an ImageNet synset nor its name \(n99999999\)",
        ),
    ],
)
def test_class_count_mismatch_is_refused(
    names: list[str], num_classes: int, message: str, tmp_path: Path, make_classes: MakeClasses
) -> None:
    make_classes(tmp_path, dict.fromkeys(names, 1))
    with pytest.raises(DataError, match=message):
        open_split(str(tmp_path), "val", num_classes=num_classes)


def test_splits_with_other_classes_are_refused(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path / "train", {"ant": 1, "cat": 1})
    make_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    train, val = (open_split(str(tmp_path), name, num_classes=2) for name in ("train", "val"))
    check_same_classes(train, train)
    with pytest.raises(DataError, match=r"only .*train has ant; only .*val has dog"):
        check_same_classes(train, val)


def test_subset_is_balanced_and_nested(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"ant": 20, "cat": 10, "dog": 2})
    split = open_split(str(tmp_path), "val", num_classes=3)
    small, large = subset(split, 6, seed=1), subset(split, 12, seed=1)
    assert Counter(labels(small)) == {0: 2, 1: 2, 2: 2}
    assert Counter(labels(large)) == {0: 5, 1: 5, 2: 2}
    assert labels(large)[:6] == labels(small)


def test_subset_is_seeded_without_repeats(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"ant": 20, "cat": 20})
    split = open_split(str(tmp_path), "val", num_classes=2)
    drawn = [[subset(split, 10, seed).dataset.source[index][0] for index in range(10)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10


def test_oversized_subset_is_the_whole_split(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path, {"ant": 2, "cat": 1})
    split = open_split(str(tmp_path), "val", num_classes=2)
    assert sorted(labels(subset(split, 512, seed=0))) == [0, 0, 1]


def test_stream_cannot_be_subsampled() -> None:
    with pytest.raises(DataError, match="is a stream"):
        subset(Split("wds/x", ImageStream([], 2, "wds/x"), ()), 1, seed=0)  # type: ignore[arg-type]


def write_mnist(root: Path, images: int) -> None:
    """The four files of MNIST in their own format, with labels 0, 1, 2, ..."""
    (root / "MNIST" / "raw").mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = np.zeros((images, 28, 28), np.uint8)
        head = b"".join(number.to_bytes(4, "big") for number in (0x803, images, 28, 28))
        (root / "MNIST" / "raw" / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        head = b"".join(number.to_bytes(4, "big") for number in (0x801, images))
        (root / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(range(images)))


def test_timm_name_opens_torchvision_data(tmp_path: Path) -> None:
    write_mnist(tmp_path, images=4)
    split = open_split(f"torch/mnist@{tmp_path}", "val", num_classes=10)
    image, label = split.dataset[3]
    assert (split.images, len(split.class_names), label) == (4, 10, 3)
    assert (image.mode, image.size) == ("RGB", (28, 28))
    assert labels(subset(split, 2, seed=0)) != [0, 1, 2, 3]


def test_timm_data_class_mismatch_is_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path, images=4)
    with pytest.raises(DataError, match=r"10 classes .*, the model 100: give `model.num_classes=10`"):
        open_split(f"torch/mnist@{tmp_path}", "val", num_classes=100)


def test_timm_data_classes_can_be_remapped(tmp_path: Path) -> None:
    write_mnist(tmp_path, images=4)
    data = f"torch/mnist@{tmp_path}"
    plain = open_split(data, "val", num_classes=10)
    (tmp_path / "reversed.json").write_text(json.dumps(plain.class_names[::-1]))
    (tmp_path / "map.tsv").write_text(
        "".join(f"{name}\t{9 - k}\n" for k, name in enumerate(plain.class_names))
    )
    for split in (
        open_split(data, "val", num_classes=10, class_order=str(tmp_path / "reversed.json")),
        open_split(data, "val", num_classes=10, class_map=str(tmp_path / "map.tsv")),
        open_split(data, "val", num_classes=Classes(10, names=plain.class_names[::-1])),
    ):
        assert [split.dataset[index][1] for index in range(4)] == labels(split) == [9, 8, 7, 6]  # type: ignore[index]
        assert fingerprint(split) != fingerprint(plain)
    assert (plain.class_order, plain.notes) == ("data set", ())


def test_torchvision_folder_keeps_its_labels(tmp_path: Path) -> None:
    for name in ("c1", "c2", "c10"):
        (tmp_path / "validation" / name).mkdir(parents=True)
        deep = np.arange(0, 256, 4, dtype=np.int32).reshape(8, 8)
        Image.fromarray(deep).save(tmp_path / "validation" / name / "0.tif")
    split = open_split(f"torch/image_folder@{tmp_path}", "val", num_classes=3)
    assert split.class_names == ("c1", "c10", "c2")
    assert "as in the data set (c1, c10, c2); timm's order would be c1, c2, c10" in split.notes[0]
    assert np.array_equal(np.asarray(split.dataset[0][0])[..., 0], deep)  # type: ignore[index]


@pytest.mark.parametrize("name", ["torch/mnist", "torch/no_such_set"])
def test_unknown_timm_data_is_refused_with_advice(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"cannot open the val split of {name}@.* in {tmp_path}"):
        open_split(f"{name}@{tmp_path}", "val", num_classes=10)


def test_folder_takes_precedence_over_timm_name(
    tmp_path: Path, make_classes: MakeClasses, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_classes(tmp_path / "torch" / "mnist", {"cat": 1})
    monkeypatch.chdir(tmp_path)
    assert open_split("torch/mnist", "val", num_classes=1).images == 1


def test_imagenet_folders_get_official_labels(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    archive, table = data / "imagenette" / "val.tar", data / "imagenet-sample" / "labels.csv"
    if not (archive.is_file() and table.is_file()):
        pytest.skip("no ImageNet images or labels beside the repository")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    with table.open(newline="") as rows:
        index_of = {row["wnid"]: int(row["index"]) for row in csv.DictReader(rows)}

    split = open_split(str(tmp_path), "val", num_classes=1000)
    assert split.images == 400
    for index in range(0, split.images, 40):
        file, label = split.dataset.source[index]
        assert label == index_of[Path(file).parent.name]
