"""Data in other forms than class folders: tables, archives, parquet and arrow, CIFAR's pickles; and hostile ones."""

import io
import json
import math
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from saqcli.config import DataSection
from saqcli.data.datasets import Split, check_split_exists, fingerprint, open_split, subset
from saqcli.data.forms import cifar
from saqcli.data.images import LEFT_OUT
from saqcli.data.loaders import make_loader
from saqcli.data.splits import check_scored, scored_split
from saqcli.errors import ConfigError, DataError
from saqcli.models.preprocessing import Preprocessing
from tests.support.cifar_files import array, batch, dictionary, items, number, text, write_cifar10
from tests.support.command_line import answer, last_error, saq
from tests.support.mutations import bytes_of

CLASSES = ("cat", "dog", "owl")
FEW = 60  # mutations of a file
PLAIN = Preprocessing((3, 32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 1.0)


def png(value: int, side: int = 8) -> bytes:
    """A grey image whose pixels are all ``value``."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (value,) * 3).save(file, "png")
    return file.getvalue()


def images(each: int = 2) -> dict[str, bytes]:
    """Paths below a split, and images whose grey says the class and the place in it: 10 * class + place."""
    return {
        f"{name}/{place}.png": png(10 * number + place)
        for number, name in enumerate(CLASSES)
        for place in range(each)
    }


def opened(path: Path, split: str = "val", **options: Any) -> Split:
    check_split_exists(str(path), split)
    return open_split(str(path), split, num_classes=options.pop("num_classes", len(CLASSES)), **options)


def pairs(split: Split) -> list[tuple[int, int]]:
    """Grey value and label of every image, in order; read by two workers as well."""
    dataset = split.dataset
    found = [
        (np.asarray(image)[0, 0, 0].item(), label)
        for image, label in (dataset[i] for i in range(len(dataset)))
    ]  # type: ignore[index]
    options: Any = {
        "batch_size": 4,
        "training": False,
        "device": torch.device("cpu"),
        "seed": 0,
        "workers": 0,
    }
    for batch_images, labels in make_loader(split, PLAIN, **options):
        assert len(batch_images) == len(labels)
    return found


EXPECTED = [(10 * label + place, label) for label in range(3) for place in range(2)]


def write_zip(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


WRITERS: dict[str, Callable[[Path, Mapping[str, bytes]], Path]] = {"zip": write_zip, "tar": write_tar}


class TestArchives:
    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.parametrize(
        ("prefix", "split"),
        [
            *(("", "val"), ("photos/", "val"), ("photos/val/", "val"), ("a/b/train/", "train")),
            *(("Train/", "train"), ("test/", "val"), ("holdout/", "holdout"), ("./val/", "val")),
        ],
    )
    def test_class_folders_are_found(self, kind: str, prefix: str, split: str, tmp_path: Path) -> None:
        content = {f"{prefix}{name}": image for name, image in images().items()}
        if "val" in prefix:
            content |= {f"{prefix.replace('val', 'train')}cat/other.png": png(99)}
        path = WRITERS[kind](
            tmp_path / f"data.{kind}", {**content, "__MACOSX/cat/._1.png": b"", "readme.md": b""}
        )

        found = opened(path, split)

        assert pairs(found) == EXPECTED
        assert found.class_names == CLASSES

    @pytest.mark.parametrize("kind", WRITERS)
    def test_archive_for_each_split(self, kind: str, tmp_path: Path) -> None:
        WRITERS[kind](
            tmp_path / f"train.{kind}", {f"train/{name}": image for name, image in images().items()}
        )
        WRITERS[kind](tmp_path / f"val.{kind}", images())

        assert pairs(opened(tmp_path, "train")) == pairs(opened(tmp_path, "val")) == EXPECTED

    def test_stored_and_deflated_members_are_equal(self, tmp_path: Path) -> None:
        stored = opened(write_zip(tmp_path / "a.zip", images(), zipfile.ZIP_STORED))
        deflated = opened(write_zip(tmp_path / "b.zip", images()))

        assert pairs(stored) == pairs(deflated)
        assert fingerprint(stored) == fingerprint(deflated)

    def test_fingerprint_survives_a_move_and_sees_labels(self, tmp_path: Path) -> None:
        before = fingerprint(opened(write_tar(tmp_path / "a.tar", images())))
        (tmp_path / "moved").mkdir()
        moved = (tmp_path / "a.tar").rename(tmp_path / "moved" / "b.tar")
        (tmp_path / "classes.txt").write_text("owl\ncat\ndog\n")

        assert fingerprint(opened(moved)) == before
        assert fingerprint(opened(moved, class_order=str(tmp_path / "classes.txt"))) != before

    @pytest.mark.parametrize("kind", WRITERS)
    @pytest.mark.parametrize("name", ["../cat/1.png", "/etc/cat/1.png", "cat/../../1.png", "cat\\..\\1.png"])
    def test_names_that_lead_out_are_refused(self, kind: str, name: str, tmp_path: Path) -> None:
        path = WRITERS[kind](tmp_path / f"evil.{kind}", {**images(), name: png(1)})

        with pytest.raises(DataError, match="a name that leads out of it: pack plain relative names"):
            opened(path)
        assert [each.name for each in tmp_path.iterdir()] == [path.name]

    def test_absurd_size_is_refused_before_memory_is_taken(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "bomb.zip", {**images(), "owl/9.png": b"\0" * (2**28 + 1)})
        assert path.stat().st_size < 2**20

        with pytest.raises(DataError, match=r"owl/9\.png has 268,435,457 bytes, more than any image"):
            opened(path)

    def test_size_that_is_a_lie_is_damage(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "lie.zip", {**images(), "owl/9.png": b"\0" * 10_000})
        raw = path.read_bytes()
        path.write_bytes(raw.replace(struct.pack("<I", 10_000), struct.pack("<I", 10)))

        split = opened(path, bad_images="skip")

        assert split.images == 7
        with pytest.raises(
            DataError, match=r"\(owl/9\.png: its size or checksum is not that of the archive\)"
        ):
            opened(path).dataset[6]  # type: ignore[index]

    @pytest.mark.parametrize(
        ("files", "split", "says"),
        [
            ({"1.png": png(1)}, "val", "no class folders"),
            ({"notes.txt": b"x"}, "val", "holds no image"),
            (images(), "train", "has cat/, dog/, owl/, and no train or training"),
            (
                {f"train/{name}": image for name, image in images().items()},
                "val",
                "has train/, and no val or",
            ),
            (images(), "holdout", "has cat/, dog/, owl/, and no holdout"),
        ],
    )
    @pytest.mark.parametrize("kind", WRITERS)
    def test_unusable_archives_are_refused(
        self, kind: str, files: dict[str, bytes], split: str, says: str, tmp_path: Path
    ) -> None:
        path = WRITERS[kind](tmp_path / f"data.{kind}", files)

        with pytest.raises(DataError, match=says):
            opened(path, split)

    def test_compressed_and_encrypted_archives_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is compressed, and its images cannot be read in place"):
            opened(write_tar(tmp_path / "a.tar.gz", images(), "w:gz"))
        with pytest.raises(DataError, match="by method 12, which is not read in place"):
            opened(write_zip(tmp_path / "b.zip", images(), zipfile.ZIP_BZIP2))
        path = write_zip(tmp_path / "c.zip", images())
        raw = bytearray(path.read_bytes())
        raw[raw.index(b"PK\1\2") + 8] |= 1
        path.write_bytes(bytes(raw))
        with pytest.raises(DataError, match="is encrypted"):
            opened(path)

    @pytest.mark.parametrize("suffix", [".tar", ".zip"])
    def test_kind_is_told_by_the_first_bytes(self, suffix: str, tmp_path: Path) -> None:
        inner = write_zip(tmp_path / "inner", {"owl/1.png": png(9)}, zipfile.ZIP_STORED).read_bytes()
        files = {**images(), "zz/last.zip": inner + b"\0" * (-len(inner) % 512)}
        tar = write_tar(tmp_path / f"tar{suffix}", images())
        zipped = write_zip(tmp_path / "zip.tar", images())
        both = write_tar(tmp_path / "both.tar", files)

        assert pairs(opened(zipped)) == pairs(opened(tar)) == EXPECTED
        assert zipfile.is_zipfile(both)
        assert pairs(opened(both)) == EXPECTED

    def test_zip_with_a_program_before_it_is_a_zip(self, tmp_path: Path) -> None:
        path = write_zip(tmp_path / "a.zip", images())
        path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())

        assert pairs(opened(path)) == EXPECTED

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_image_twice_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for _ in range(2):
                archive.writestr("cat/1.png", png(1))

        with pytest.raises(DataError, match=r"holds cat/1\.png twice"):
            opened(tmp_path / "a.zip")


def write_images(folder: Path) -> list[tuple[str, str]]:
    """Images without class folders; their names and classes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, content in images().items():
        flat = name.replace("/", "_")
        (folder / flat).write_bytes(content)
        rows.append((flat, name.partition("/")[0]))
    return rows


def write_table(
    path: Path, rows: list[tuple[str, ...]], header: str = "filename,label", comma: str = ","
) -> Path:
    lines = [header.replace(",", comma)] if header else []
    path.write_text("\n".join([*lines, *(comma.join(row) for row in rows)]) + "\n")
    return path


class TestTables:
    @pytest.mark.parametrize(
        "header", ["filename,label", "image_id,breed", "File_Name,CLASS", "label,path", ""]
    )
    @pytest.mark.parametrize(("suffix", "comma"), [("csv", ","), ("csv", ";"), ("tsv", "\t")])
    def test_flat_folder_with_a_table(self, header: str, suffix: str, comma: str, tmp_path: Path) -> None:
        rows: list[tuple[str, ...]] = list(write_images(tmp_path))
        if header.startswith("label"):
            rows = [row[::-1] for row in rows]
        write_table(tmp_path / f"labels.{suffix}", rows, header, comma)

        for path in (tmp_path, tmp_path / f"labels.{suffix}"):
            found = opened(path)
            assert pairs(found) == EXPECTED
            assert found.class_names == CLASSES

    def test_tables_of_splits_share_a_folder_of_images(self, tmp_path: Path) -> None:
        rows = write_images(tmp_path / "images")
        write_table(tmp_path / "train.csv", rows)
        write_table(tmp_path / "test.csv", [(name.removesuffix(".png"), label) for name, label in rows])

        assert pairs(opened(tmp_path, "train")) == pairs(opened(tmp_path, "val")) == EXPECTED

    def test_tables_inside_the_folders_of_splits(self, tmp_path: Path) -> None:
        for split in ("train", "val"):
            write_table(
                tmp_path / split / "metadata.csv", write_images(tmp_path / split) and [], "file_name,label"
            )
            rows = write_images(tmp_path / split)
            write_table(tmp_path / split / "metadata.csv", rows, "file_name,label")

        assert pairs(opened(tmp_path, "train")) == pairs(opened(tmp_path, "val")) == EXPECTED

    def test_column_of_splits(self, tmp_path: Path) -> None:
        rows = write_images(tmp_path)
        kinds = ["train", "test", "holdout"]
        table = [(name, label, kinds[place % 3]) for place, (name, label) in enumerate(rows)]
        write_table(tmp_path / "labels.csv", table, "file,label,split")

        assert pairs(opened(tmp_path, "train")) == EXPECTED[::3]
        assert pairs(opened(tmp_path, "val")) == EXPECTED[1::3]
        assert pairs(opened(tmp_path, "holdout")) == EXPECTED[2::3]
        with pytest.raises(DataError, match="has train, test, holdout, and no other: give other data"):
            opened(tmp_path, "other")

    def test_spaces_around_cells_do_not_count(self, tmp_path: Path) -> None:
        table = [(f" {name}", f"{label} ", " val") for name, label in write_images(tmp_path)]
        write_table(tmp_path / "labels.csv", table, "file, label, split")

        assert pairs(opened(tmp_path)) == EXPECTED

    def test_lines_are_those_of_the_file(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        (tmp_path / "labels.csv").write_text("\nfilename,label\n\n\ncat_0.png,cat\n\ngone.png,cat\n")

        with pytest.raises(DataError, match=r"line 7 names no image, gone\.png"):
            opened(tmp_path)

    @pytest.mark.parametrize("bad_images", ["refuse", "skip"])
    @pytest.mark.parametrize("name", ["/etc/hostname", "../x.png", "images/../../x.png", "../data-2/x.png"])
    def test_names_that_lead_out_are_refused(self, name: str, bad_images: Any, tmp_path: Path) -> None:
        data = tmp_path / "data"
        rows = write_images(data)
        write_images(tmp_path / "data-2")
        for folder in (tmp_path, tmp_path / "data-2"):
            (folder / "x.png").write_bytes(png(7))
        write_table(data / "labels.csv", [*rows, (name, "cat")])

        with pytest.raises(
            DataError, match=r"line 8 names .*, which is outside .*/data: give paths inside it"
        ):
            opened(data, bad_images=bad_images)

    def test_paths_inside_the_data_folder_are_read(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        rows = write_images(data / "pictures")
        (data / "val").mkdir()
        table = [(f"../pictures/{name}", label) for name, label in rows[:3]]
        table += [(str(data / "pictures" / name), label) for name, label in rows[3:]]
        write_table(data / "val" / "labels.csv", table)
        (tmp_path / "link").symlink_to(data)

        assert pairs(opened(data)) == pairs(opened(tmp_path / "link")) == EXPECTED

    def test_missing_file_does_not_lead_out_when_skipped(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        rows = write_images(data)
        (tmp_path / "x.png").write_bytes(png(7))
        write_table(data / "labels.csv", [*rows, ("images/../gone.png", "cat")])

        source: Any = opened(data, bad_images="skip").dataset.source
        assert all(Path(source[index][0]).is_relative_to(data) for index in range(7))

    def test_numbers_are_labels_of_the_network(self, tmp_path: Path) -> None:
        rows = write_images(tmp_path)
        write_table(tmp_path / "labels.csv", [(name, str(2 - CLASSES.index(label))) for name, label in rows])

        assert [label for _, label in pairs(opened(tmp_path))] == [2, 2, 1, 1, 0, 0]
        with pytest.raises(DataError, match="has the label 2, the model has classes 0 to 1"):
            opened(tmp_path, num_classes=2)

    def test_class_folders_with_a_table_beside_them_stay_class_folders(self, tmp_path: Path) -> None:
        for name, content in images().items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        write_table(tmp_path / "labels.csv", [("cat", "0")], "folder,class")

        assert pairs(opened(tmp_path)) == EXPECTED

    def test_missing_images_are_named_or_skipped(self, tmp_path: Path) -> None:
        rows = write_images(tmp_path)
        write_table(tmp_path / "labels.csv", [*rows, ("gone.png", "owl")])

        with pytest.raises(
            DataError, match=r"labels.csv line 8 names no image, gone.png: give paths relative to"
        ):
            opened(tmp_path)
        skipped = opened(tmp_path, bad_images="skip")
        skipped.dataset.unreadable = "leave_out"
        assert skipped.dataset[6][1] == LEFT_OUT  # type: ignore[index]

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("", "is empty"),
            ("cat_0.png\n", "has one column"),
            ("filename,label\ncat_0.png\n", "line 2 has 1 cell"),
            ("filename,label\ncat_0.png,\n", "line 2 has no class"),
            ("filename,label\n,cat\n", "line 2 has no file"),
            ("filename,size\ncat_0.png,3\n", "has the columns filename, size, and no column of classes"),
            ("name,label\n", "no column of files"),
            ('filename,label\n"cat_0.png,cat\n', "cannot be read as a table"),
            ("filename,label\n", "names no image"),
            ("filename,label\ncat_0.png,wolf\n", "wolf|classes"),
        ],
    )
    def test_unusable_tables_are_refused(self, content: str, says: str, tmp_path: Path) -> None:
        write_images(tmp_path)
        (tmp_path / "labels.csv").write_text(content)

        with pytest.raises(DataError, match=says):
            opened(tmp_path)

    def test_device_and_folder_are_no_images(self, tmp_path: Path) -> None:
        write_images(tmp_path)
        os.mkfifo(tmp_path / "pipe.png")
        write_table(
            tmp_path / "labels.csv", [("pipe.png", "cat"), ("cat_0.png", "dog"), ("cat_1.png", "owl")]
        )

        with pytest.raises(DataError, match=r"line 2 names no image, pipe.png"):
            opened(tmp_path)


class TestCifar:
    def test_published_layout_is_read(self, tmp_path: Path) -> None:
        pixels = write_cifar10(tmp_path / "cifar-10-batches-py", list(CLASSES))

        train, val = opened(tmp_path, "train"), opened(tmp_path / "cifar-10-batches-py", "test")

        assert (train.images, val.images) == (20, 4)
        assert val.class_names == CLASSES
        read = [np.asarray(val.dataset[index][0]) for index in range(4)]  # type: ignore[index]
        assert np.array_equal(read, pixels)
        assert [val.dataset[index][1] for index in range(4)] == [0, 1, 2, 0]  # type: ignore[index]
        assert subset(train, 6, seed=0).images == 6
        assert fingerprint(opened(tmp_path, "val")) == fingerprint(val)

    def test_hundred_classes_have_fine_labels(self, tmp_path: Path) -> None:
        pixels = np.zeros((2, 3072), np.uint8)
        for file in ("train", "test"):
            (tmp_path / file).write_bytes(batch(pixels, [1, 2], b"fine_labels"))
        names = items([text(name.encode()) for name in CLASSES])
        (tmp_path / "meta").write_bytes(
            dictionary({b"fine_label_names": names, b"coarse_label_names": items([])})
        )

        assert [opened(tmp_path).dataset[index][1] for index in range(2)] == [1, 2]  # type: ignore[index]
        with pytest.raises(DataError, match="has train, test, and no holdout"):
            opened(tmp_path, "holdout")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (b"cos\nsystem\n(U\x04echotR.", "it names os.system"),
            (pickle.dumps({"data": 1}), "it has the opcode"),
            (b"\x80\x02]q\x01.", "it holds no dictionary"),
            (b"\x80\x02}q\x01", "it is damaged|it has no end"),
            (dictionary({b"labels": items([]), b"data": number(3)}), "its data is no array"),
            (dictionary({b"labels": items([number(7)]), b"data": number(3)}), "no list of classes 0 to 2"),
            (
                dictionary({b"labels": items([number(1)]), b"data": array(np.zeros((2, 3072), np.uint8))}),
                "1 x 3072",
            ),
            (
                dictionary(
                    {b"labels": items([number(1)]), b"data": array(np.zeros((1, 3072), np.uint8))}
                ).replace(b"_reconstruct", b"_frombuffer_"),
                "it names numpy.core.multiarray._frombuffer_",
            ),
            (b"\x80\x02cnumpy\nndarray\nU\x01x\x85R.", "it calls something else"),
            (b"", "it is damaged|it has no end"),
            (b"\x80\x02]K\x01e.", "its stack has no mark"),
            (b"\x80\x02](K\x01\x85a.", "list index out of range"),
            (b"]" * 1_100_000 + b".", "it has more than 1,000,000 opcodes"),
        ],
    )
    def test_anything_else_is_refused_without_running_it(
        self, content: bytes, says: str, tmp_path: Path
    ) -> None:
        write_cifar10(tmp_path / "set", list(CLASSES))
        (tmp_path / "set" / "test_batch").write_bytes(content)

        with pytest.raises(DataError, match=says):
            opened(tmp_path / "set")

    def test_marks_take_linear_time(self, tmp_path: Path) -> None:
        write_cifar10(tmp_path / "set", list(CLASSES))
        seconds: dict[int, float] = {}
        for size in (20_000, 200_000) * 3:  # the least of three times, since other processes disturb
            (tmp_path / "set" / "test_batch").write_bytes(b"]" * size + b"(e" * size + b".")
            start = time.process_time()
            with pytest.raises(DataError, match="it holds no dictionary"):
                opened(tmp_path / "set")
            seconds[size] = min(seconds.get(size, math.inf), time.process_time() - start)

        assert (
            seconds[200_000] < 40 * seconds[20_000]
        )  # a hundred times of it, if each mark were searched for

    def test_arrays_of_one_string_are_bounded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cifar, "LARGEST_FILE", 100_000)
        write_cifar10(tmp_path / "set", list(CLASSES))
        pixels = np.zeros((20, 3072), np.uint8)  # 61,440 bytes
        once, string = array(pixels), text(pixels.tobytes())
        kept = once.replace(string, string + b"q\x30")
        again = once.replace(string, b"h\x30")
        labels = items([number(0)] * 20)
        content = dictionary({b"labels": labels, b"data": kept, b"more": again})
        (tmp_path / "set" / "test_batch").write_bytes(content)
        assert len(content) < 70_000

        with pytest.raises(DataError, match="its arrays have more than 100,000 bytes"):
            opened(tmp_path / "set")

    def test_mutated_files_are_read_or_refused(self, tmp_path: Path) -> None:
        write_cifar10(tmp_path / "set", list(CLASSES))
        for name in ("test_batch", "batches.meta"):
            raw = (tmp_path / "set" / name).read_bytes()
            check_mutations(tmp_path / "set" / name, raw, lambda: opened(tmp_path / "set"))
            (tmp_path / "set" / name).write_bytes(raw)


def check_mutations(path: Path, raw: bytes, read: Callable[[], Split]) -> None:
    """Mutated content of a file gives a split, or one line of error; reading its images too."""
    errors = []
    for content in bytes_of(raw, FEW):
        path.write_bytes(content)
        try:
            split = read()
            for index in range(split.images):
                split.dataset[index]  # type: ignore[index]
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert not [error for error in errors if "\n" in error]


@pytest.mark.parametrize("kind", WRITERS)
def test_mutated_archives_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path / f"data.{kind}", images())

    check_mutations(path, path.read_bytes(), lambda: opened(path))


def test_mutated_tables_are_read_or_refused(tmp_path: Path) -> None:
    path = write_table(tmp_path / "labels.csv", list(write_images(tmp_path)))

    check_mutations(path, path.read_bytes(), lambda: opened(tmp_path))


@pytest.fixture
def arrow() -> Any:
    return pytest.importorskip("pyarrow")


def arrow_table(pa: Any, *, named: bool = True, label: str = "label") -> Any:
    content = [{"bytes": image, "path": None} for image in images().values()]
    labels = [CLASSES.index(name.partition("/")[0]) for name in images()]
    table = pa.table({"image": content, label: labels if named else [CLASSES[each] for each in labels]})
    features = {
        "image": {"_type": "Image"},
        label: {"names": list(CLASSES), "_type": "ClassLabel"} if named else {"dtype": "string"},
    }
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def write_arrow(pa: Any, path: Path, table: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        for part in table.to_batches(max_chunksize=4):
            stream.write_batch(part)
    return path


class TestArrow:
    def test_parquet_of_the_hub_in_two_files(self, arrow: Any, tmp_path: Path) -> None:
        from pyarrow.parquet import write_table as write

        table = arrow_table(arrow)
        (tmp_path / "data").mkdir()
        for split in ("train", "validation"):
            for place, part in enumerate((table.slice(0, 4), table.slice(4))):
                write(part, tmp_path / "data" / f"{split}-{place:05d}-of-00002.parquet", row_group_size=3)

        for split in ("train", "val"):
            found = opened(tmp_path, split)
            assert pairs(found) == EXPECTED
            assert found.class_names == CLASSES
        with pytest.raises(DataError, match="has train, validation, and no holdout"):
            opened(tmp_path, "holdout")

    def test_folder_of_save_to_disk(self, arrow: Any, tmp_path: Path) -> None:
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
        for split in ("train", "test"):
            write_arrow(arrow, tmp_path / split / "data-00000-of-00001.arrow", arrow_table(arrow))
            (tmp_path / split / "state.json").write_text("{}")

        assert pairs(opened(tmp_path, "train")) == pairs(opened(tmp_path, "test")) == EXPECTED

    @pytest.mark.parametrize("listed", [True, False])
    def test_caches_of_datasets_are_no_data(self, listed: bool, arrow: Any, tmp_path: Path) -> None:
        table, folder = arrow_table(arrow), tmp_path / "val"
        name = "data-00000-of-00001.arrow"
        for file in (name, "cache-1f2e3d4c5b6a7980.arrow", "tmp.arrow"):
            write_arrow(arrow, folder / file, table)
        state = {"_data_files": [{"filename": name}]} if listed else {}
        (folder / "state.json").write_text(json.dumps(state))

        assert pairs(opened(tmp_path)) == EXPECTED
        (folder / name).unlink()
        if listed:
            with pytest.raises(DataError, match=r"state.json lists data-00000-of-00001.arrow, not in"):
                opened(tmp_path)

    @pytest.mark.parametrize("name", ["../other.arrow", "/etc/x.arrow", 3, None])
    def test_list_of_files_outside_is_not_followed(self, name: Any, arrow: Any, tmp_path: Path) -> None:
        write_arrow(arrow, tmp_path / "other.arrow", arrow_table(arrow).slice(0, 1))
        write_arrow(arrow, tmp_path / "val" / "data-00000-of-00001.arrow", arrow_table(arrow))
        (tmp_path / "val" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))

        assert pairs(opened(tmp_path)) == EXPECTED

    @pytest.mark.parametrize(
        ("train", "val"),
        [
            ("train-00000-of-00001-a09b74b3ef9c3b56", "test-00000-of-00001-1c2d3e4f5a6b7c8d"),
            ("cifar10-train-00000-of-00002", "cifar10-test-00000-of-00002"),
            ("my-own.set-train-00000-of-00001", "my-own.set-validation-00000-of-00001"),
            ("train", "val"),
            ("cifar10-train", "cifar10-test"),
        ],
    )
    def test_names_of_shards_say_the_split(self, train: str, val: str, arrow: Any, tmp_path: Path) -> None:
        table = arrow_table(arrow)
        for stem, part in ((train, table.slice(0, 2)), (val, table)):
            write_arrow(arrow, tmp_path / f"{stem}.arrow", part)

        assert pairs(opened(tmp_path, "train")) == EXPECTED[:2]
        assert pairs(opened(tmp_path, "val")) == EXPECTED

    @pytest.mark.parametrize("below", ["", "val"])
    def test_class_folders_with_a_file_beside_them_stay_class_folders(
        self, below: str, arrow: Any, tmp_path: Path
    ) -> None:
        for name, content in images().items():
            (tmp_path / below / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / below / name).write_bytes(content)
        write_arrow(arrow, tmp_path / below / "index.arrow", arrow.table({"path": ["cat/0.png"]}))

        assert pairs(opened(tmp_path)) == EXPECTED

    def test_text_labels_of_a_single_file(self, arrow: Any, tmp_path: Path) -> None:
        from pyarrow.parquet import write_table as write

        write(arrow_table(arrow, named=False, label="class"), tmp_path / "mine.parquet")

        assert pairs(opened(tmp_path / "mine.parquet")) == EXPECTED
        with pytest.raises(DataError, match="has no splits, and no train"):
            opened(tmp_path / "mine.parquet", "train")

    def test_order_of_the_features_is_kept(self, arrow: Any, tmp_path: Path) -> None:
        table = arrow_table(arrow)
        features = {
            "label": {"names": ["owl", "cat", "dog"], "_type": "ClassLabel"},
            "image": {"_type": "Image"},
        }
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})

        found = opened(write_arrow(arrow, tmp_path / "mine.arrow", table))

        assert found.class_names == ("owl", "cat", "dog")
        assert pairs(found) == EXPECTED

    @pytest.mark.parametrize(
        ("columns", "says"),
        [
            ({"picture": [1], "other": [2]}, "and none of labels"),
            ({"label": [1]}, "and none of images"),
            ({"image": [b"x"], "label": [None]}, r"has no label in row 0 \(None\)"),
            ({"image": [b"x"], "label": [-1]}, r"has no label in row 0 \(-1\)"),
            ({"image": [b"x"] * 2, "label": [0, -2]}, r"has no label in row 1 \(-2\)"),
            ({"image": [b"x"], "label": [0.5]}, r"has no label in row 0 \(0\.5\)"),
            ({"image": [b"x"] * 2, "label": ["cat", ""]}, r"has no label in row 1 \(''\)"),
            ({"image": [b"x"], "label": [2**40]}, r"has no label in row 0 \(1099511627776\)"),
            ({"image": [b"x"], "label": [[1] * 100_000]}, r"has no label in row 0 \(\[1, .{90,110}\): give"),
            ({"image": [b"x"], "label": [9]}, "has the label 9, the model has classes 0 to 2"),
            ({"image": [], "label": []}, "has no rows"),
        ],
    )
    def test_unusable_columns_are_refused(
        self, columns: dict[str, list[Any]], says: str, arrow: Any, tmp_path: Path
    ) -> None:
        path = write_arrow(arrow, tmp_path / "a.arrow", arrow.table(columns))

        with pytest.raises(DataError, match=says):
            opened(path)

    def test_booleans_are_labels(self, arrow: Any, tmp_path: Path) -> None:
        table = arrow.table({"image": [png(1), png(2)], "label": [True, False]})

        found = opened(write_arrow(arrow, tmp_path / "a.arrow", table), num_classes=2)

        assert pairs(found) == [(1, 1), (2, 0)]

    def test_labels_of_two_kinds_are_refused(self, arrow: Any, tmp_path: Path) -> None:
        for place, label in enumerate((1, "cat")):
            table = arrow.table({"image": [png(1)], "label": [label]})
            write_arrow(arrow, tmp_path / f"val-{place:05d}-of-00002.arrow", table)

        with pytest.raises(DataError, match="has numbers and texts as labels in label: give"):
            opened(tmp_path)

    def test_cell_without_an_image_is_named(self, arrow: Any, tmp_path: Path) -> None:
        path = write_arrow(arrow, tmp_path / "a.arrow", arrow.table({"image": [None, b"x"], "label": [0, 1]}))
        split = opened(path)

        with pytest.raises(DataError, match=r"\(row 0 of .*a.arrow has no image in the table\)"):
            split.dataset[0]  # type: ignore[index]
        with pytest.raises(DataError, match=r"row 1 of .*a.arrow \(it is not an image\)"):
            split.dataset[1]  # type: ignore[index]

    def test_images_that_stay_in_memory_are_bounded(
        self, arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from pyarrow.parquet import write_table as write

        noise = np.random.default_rng(0).bytes(10_000)
        cells = [png(place) + noise for place in range(200)]
        path = tmp_path / "a.parquet"
        table = arrow.table({"image": cells, "label": [0] * 200})
        write(table, path, row_group_size=150, use_dictionary=False)
        monkeypatch.setattr("saqcli.data.forms.arrow.KEPT", 200_000)
        split = opened(path)
        source: Any = split.dataset.source

        for index in (0, 149, 3, 150, 199, 151, 0, 80, 79, 78, 160, *range(200)):
            assert np.asarray(split.dataset[index][0])[0, 0, 0] == index  # type: ignore[index]
            held = sum(len(part) for part in source._window.kept)
            assert 0 < held <= 40  # 20 images of 10,000 bytes fit, and one batch of them is read at once
            assert source._window.size < 400_000

    def test_sizes_are_checked_before_reading(self, arrow: Any, tmp_path: Path) -> None:
        from pyarrow.parquet import write_table as write

        path, table = tmp_path / "a.parquet", {"image": [b"\0" * 2**26] * 6, "label": [0] * 6}
        write(arrow.table(table), path, compression="zstd", use_dictionary=False)
        assert path.stat().st_size < 2**20

        allocated = arrow.total_allocated_bytes()
        with pytest.raises(
            DataError, match=r"rows 0 to 5 have 402,\d{3},\d{3} bytes of images, too many for"
        ):
            opened(path)
        assert arrow.total_allocated_bytes() - allocated < 2**24

    def test_large_compressed_arrow_is_refused(
        self, arrow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.arrow"
        table = arrow.table({"image": [png(0) + b"\0" * 100_000], "label": [0]})
        options = arrow.ipc.IpcWriteOptions(compression="zstd")
        with (
            arrow.OSFile(str(path), "wb") as file,
            arrow.ipc.new_stream(file, table.schema, options=options) as stream,
        ):
            stream.write_table(table)
        assert opened(path).images == 1
        monkeypatch.setattr("saqcli.data.forms.arrow.LARGEST_UNPACKED", 10_000)

        with pytest.raises(DataError, match="is compressed, and has more than 10,000 bytes: save it without"):
            opened(path)

    @pytest.mark.parametrize("suffix", ["arrow", "parquet"])
    def test_fingerprint_sees_images_and_survives_a_move(
        self, suffix: str, arrow: Any, tmp_path: Path
    ) -> None:
        from pyarrow.parquet import write_table as write

        prints = []
        for folder, grey in (("a", 1), ("b", 2), ("c", 1)):
            table = arrow.table({"image": [png(1) + bytes([grey])], "label": [0]})
            path = tmp_path / folder / f"x.{suffix}"
            write_arrow(arrow, path, table)
            if suffix == "parquet":
                write(table, path)
            prints.append(fingerprint(opened(path)))

        assert prints[0] == prints[2] != prints[1]

    @pytest.mark.parametrize("suffix", ["arrow", "parquet"])
    def test_mutated_files_are_read_or_refused(self, suffix: str, arrow: Any, tmp_path: Path) -> None:
        from pyarrow.parquet import write_table as write

        path = tmp_path / f"a.{suffix}"
        if suffix == "arrow":
            write_arrow(arrow, path, arrow_table(arrow))
        else:
            write(arrow_table(arrow), path)

        check_mutations(path, path.read_bytes(), lambda: opened(path))


def test_missing_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")

    with pytest.raises(DataError, match=r'needs a package that is missing: pip install "saq\[parquet\]"'):
        opened(tmp_path / "a.parquet")


class TestSplits:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for split, shift in (("train", 0), ("val", 0), ("holdout", 100)):
            for place, name in enumerate(CLASSES):
                (tmp_path / split / name).mkdir(parents=True)
                (tmp_path / split / name / "1.png").write_bytes(png(shift + 10 * place))
        return tmp_path

    def test_split_by_its_name(self, folder: Path) -> None:
        assert pairs(opened(folder, "holdout")) == [(100, 0), (110, 1), (120, 2)]
        with pytest.raises(DataError, match=r"has no folder nosuch/ \(it has holdout, train, val\)"):
            opened(folder, "nosuch")

    def test_setting_stands_in_for_val_only(self) -> None:
        section = DataSection(path="x", split="holdout")

        assert (scored_split(section, "val"), scored_split(section, "train")) == ("holdout", "train")
        assert "split" not in json.loads(DataSection(path="x").model_dump_json())
        assert json.loads(section.model_dump_json())["split"] == "holdout"

    def test_commands_check_the_split_first(self, folder: Path) -> None:
        base = ("saq/resnet8s", "--no-pretrained", "--data", folder, "--split", "nosuch")

        for command in (("eval", *base), ("quantize", *base, "--bits", 4), ("analyze", *base, "--bits", 4)):
            assert "has no folder nosuch/ (it has holdout, train, val)" in last_error(saq(*command))

    @pytest.mark.parametrize("name", ["train", "training", "Train"])
    def test_training_images_measure_no_accuracy(self, name: str, folder: Path) -> None:
        base = ("saq/resnet8s", "--no-pretrained", "--data", folder, "--split", name)
        says = "would measure accuracy on the images that the run learns from: name another split"

        assert says in last_error(saq("quantize", *base, "--bits", 4))
        given = ("--calibration", folder / "val", "--bits", 4)
        assert says in last_error(saq("quantize", *base, *given, "--epochs", 1))
        with pytest.raises(ConfigError, match=says):
            check_scored(DataSection(path=str(folder), split=name))

    def test_training_images_may_be_evaluated(self, folder: Path) -> None:
        result = answer(
            *("eval", "saq/resnet8s", "--no-pretrained", "--data", folder, "--split", "train"),
            "--num-classes",
            3,
        )

        assert result["images"] == 3
