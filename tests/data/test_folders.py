"""Data folders: what is found, and what is reported instead of ignored: broken links, capitals, other suffixes."""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from saqcli.data.datasets import Split, open_split
from saqcli.data.images import LEFT_OUT
from saqcli.errors import DataError
from tests.support.command_line import answer, last_error, saq
from tests.support.digits import MODEL, float_options

MakeClasses = Callable[[Path, Mapping[str, int]], Path]
links = pytest.mark.skipif(sys.platform == "win32", reason="no links")

TENCH, GOLDFISH = "n01440764", "n01443537"


def val(root: Path, classes: int = 2, **options: str) -> Split:
    return open_split(str(root), "val", num_classes=classes, **options)  # type: ignore[arg-type]


@links
class TestBrokenLinks:
    @pytest.fixture
    def folder(self, tmp_path: Path, make_classes: MakeClasses) -> Path:
        make_classes(tmp_path / "val", {"cat": 2, "dog": 1})
        return tmp_path

    @pytest.mark.parametrize(
        "place",
        ["val/truck", "val/truck.txt", "val/cat/more", "val/cat/deep/more", "val", "train", "Val", "test"],
    )
    def test_broken_class_folder_is_named(self, place: str, folder: Path, make_classes: MakeClasses) -> None:
        if place == "val":
            (folder / "val").rename(folder / "test")  # which must not be used instead
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).symlink_to("/nowhere/truck")
        with pytest.raises(
            DataError, match=rf"{folder / place} is a broken link \(/nowhere/truck\): "
        ) as caught:
            open_split(str(folder), "train" if place == "train" else "val", num_classes=2, bad_images="skip")
        assert "\n" not in str(caught.value)

    def test_link_to_itself_is_named(self, folder: Path) -> None:
        (folder / "val" / "loop").symlink_to(folder / "val" / "loop")
        with pytest.raises(DataError, match="loop is a broken link"):
            val(folder)

    def test_broken_data_root_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "data").symlink_to("nowhere")
        with pytest.raises(DataError, match=r"data is a broken link \(nowhere\)"):
            val(tmp_path / "data")

    def test_broken_synset_folder_is_named(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        make_classes(tmp_path, {TENCH: 1})
        (tmp_path / GOLDFISH).symlink_to("/nowhere")
        with pytest.raises(DataError, match=f"{GOLDFISH} is a broken link"):
            val(tmp_path, 1000)

    def test_broken_image_is_named_or_counted(self, folder: Path) -> None:
        (folder / "val" / "cat" / "9.png").symlink_to("/nowhere/9.png")
        with pytest.raises(
            DataError, match=r"cannot read .*9.png \(it is a broken link\).*`data.bad_images=skip`"
        ):
            val(folder)
        split = val(folder, bad_images="skip")
        assert split.images == 4
        found = replace(split.dataset, unreadable="leave_out")
        assert [found[index][1] for index in range(4)] == [0, 0, LEFT_OUT, 1]  # type: ignore[index]

    def test_hidden_links_are_ignored(self, folder: Path) -> None:
        (folder / "val" / ".old").symlink_to("/nowhere")
        (folder / "val" / "cat" / ".old").symlink_to("/nowhere")
        assert val(folder).images == 3

    def test_valid_links_are_followed(self, folder: Path, tmp_path: Path) -> None:
        (folder / "val" / "dog" / "far.png").symlink_to(folder / "val" / "cat" / "0.png")
        (folder / "val" / "dog" / "more").symlink_to(folder / "val" / "cat")
        assert val(folder).images == 6


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("place", ["val/cat", "val/cat/more"])
def test_unreadable_folder_is_named(place: str, tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place).chmod(0)
    try:
        with pytest.raises(DataError, match=f"cannot read the folder {tmp_path / place}"):
            val(tmp_path)
    finally:
        (tmp_path / place).chmod(0o700)


class TestSplits:
    @pytest.mark.parametrize(
        ("train", "name"),
        [
            *[("Train", "Val"), ("TRAIN", "VAL"), ("training", "valid"), ("Training", "Validation")],
            *[("train", "Test"), ("train", "testing"), ("train", "Valid")],
        ],
    )
    def test_split_aliases_are_accepted(
        self, train: str, name: str, tmp_path: Path, make_classes: MakeClasses
    ) -> None:
        make_classes(tmp_path / train, {"cat": 3, "dog": 2})
        make_classes(tmp_path / name, {"cat": 1, "dog": 2})
        found = [open_split(str(tmp_path), split, num_classes=2) for split in ("train", "val")]  # type: ignore[arg-type]
        assert [(split.name, split.images) for split in found] == [
            (str(tmp_path / train), 5),
            (str(tmp_path / name), 3),
        ]

    @pytest.mark.parametrize("names", [("Val", "Test"), ("valid", "VAL"), ("val", "Val")])
    def test_ambiguous_splits_are_refused(
        self, names: tuple[str, str], tmp_path: Path, make_classes: MakeClasses
    ) -> None:
        for name in names:
            make_classes(tmp_path / name, {"cat": 1, "dog": 1})
        if len(list(tmp_path.iterdir())) < 2:
            pytest.skip("a file system without capitals")
        with pytest.raises(DataError, match=rf"has .*{names[0]}/.*: rename the right one to val/"):
            val(tmp_path)

    def test_test_preferred_over_valid_is_noted(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        for name in ("train", "valid", "test"):
            make_classes(tmp_path / name, {"cat": 1, "dog": 1})
        split = val(tmp_path)
        assert split.name == str(tmp_path / "test")
        assert "not valid/" in split.notes[0]

    def test_classes_may_be_named_like_splits(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        make_classes(tmp_path, {"Bus": 1, "train": 2, "Test": 1})
        assert val(tmp_path, 3).folders == {"Bus": 0, "Test": 1, "train": 2}

    @pytest.mark.parametrize(
        ("split", "there", "message"),
        [
            ("val", ["train", "dev"], r"a train/ folder but no val/.*\(it has dev/, train/\).*rename"),
            ("train", ["Fit", "Val"], r"no train/ folder.*\(it has Fit/, Val/\).*rename"),
        ],
    )
    def test_missing_split_lists_contents(
        self, split: str, there: list[str], message: str, tmp_path: Path, make_classes: MakeClasses
    ) -> None:
        for name in there:
            make_classes(tmp_path / name, {"cat": 1, "dog": 1})
        with pytest.raises(DataError, match=message):
            open_split(str(tmp_path), split, num_classes=2)  # type: ignore[arg-type]


class TestIgnoredFiles:
    def test_uppercase_suffixes_count(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        make_classes(tmp_path, {"cat": 4, "dog": 1})
        for number, ending in enumerate((".JPEG", ".TIF", ".Png", ".webp")):
            (tmp_path / "cat" / f"{number}.png").rename(tmp_path / "cat" / f"{number}{ending}")
        split = val(tmp_path)
        assert (split.images, split.notes) == (5, ())

    def test_ignored_image_like_files_are_noted(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        make_classes(tmp_path, {"cat": 2, "dog": 1})
        for name in (
            "cat/a.gif",
            "cat/b.GIF",
            "dog/img001",
            "dog/c.heic",
            "dog/notes.txt",
            "loose.png",
            "readme.md",
        ):
            (tmp_path / name).touch()
        split = val(tmp_path)
        assert split.images == 3
        assert "2 .gif files (such as" in split.notes[0]
        assert "1 .heic file (such" in split.notes[0]
        assert "1 file without a suffix" in split.notes[0]
        assert "ignored: 1 image outside the class folders (loose.png)" in split.notes[1]
        assert "notes" not in " ".join(split.notes)

    def test_class_without_images_lists_suffixes(self, tmp_path: Path, make_classes: MakeClasses) -> None:
        make_classes(tmp_path, {"cat": 1, "dog": 0})
        (tmp_path / "dog" / "a.gif").touch()
        with pytest.raises(DataError, match=r"without an image: dog \(1 .gif file \(such as .*a.gif\)\)"):
            val(tmp_path)


@links
def test_commands_name_a_broken_class_folder(digits: Path, tmp_path: Path) -> None:
    for label in range(9):
        (tmp_path / str(label)).symlink_to(digits / "few" / "val" / str(label))
    (tmp_path / "9").symlink_to("/nowhere/9")
    options = [MODEL, *float_options(digits, tmp_path)]
    refused = saq("eval", *options, "--quiet")
    assert refused.exit_code == 1
    assert f"{tmp_path / '9'} is a broken link (/nowhere/9)" in last_error(refused)
    (tmp_path / "9").unlink()
    (tmp_path / "9").symlink_to(digits / "few" / "val" / "9")
    images = len(list((digits / "few" / "val").rglob("*.png")))
    assert answer("eval", *options)["images"] == images


@links
def test_broken_images_can_be_skipped(tmp_path: Path, make_classes: MakeClasses) -> None:
    make_classes(tmp_path / "val", {"cat": 2, "dog": 1})
    (tmp_path / "val" / "stray.png").symlink_to("/nowhere/stray.png")
    with pytest.raises(DataError, match=r"`data\.bad_images=skip`"):
        val(tmp_path)
    assert val(tmp_path, bad_images="skip").images == 3
