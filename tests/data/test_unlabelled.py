"""Images without labels: folders, tars and lists, broken and missing ones included."""

import io
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from saqcli.data.datasets import Split, fingerprint, open_unlabelled
from saqcli.data.loaders import calibration_loader
from saqcli.errors import DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.tasks.labels import Classes
from tests.support.image_folders import noise

NAMES = ("b10.png", "b2.png", "deep/er/a.png", "c.png")
ORDER = ["b2.png", "b10.png", "c.png", "deep/er/a.png"]


def write(folder: Path, names: Iterable[str] = NAMES) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(folder / name)
    return folder


def as_tar(folder: Path, path: Path, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for file in sorted(folder.rglob("*")):
            archive.add(file, file.relative_to(folder), recursive=False)
    return path


def as_list(folder: Path, path: Path) -> Path:
    path.write_text("\n".join(f"{folder.name}/{name}" for name in ORDER) + "\n\n")
    return path


def opened(path: Path, **options: object) -> Split:
    return open_unlabelled(str(path), Classes(3, names=("x", "y", "z")), **options)  # type: ignore[arg-type]


def pixels(split: Split, preprocessing: Preprocessing, count: int = 10) -> torch.Tensor:
    loader = calibration_loader(
        split, preprocessing, batch_size=2, workers=0, device=torch.device("cpu"), seed=0, images=count
    )
    return torch.cat([images for images, _ in loader])


def test_folder_tar_and_list_give_the_same_images(tmp_path: Path, cifar_like: Preprocessing) -> None:
    folder = write(tmp_path / "photos")
    tar, listed = as_tar(folder, tmp_path / "photos.tar"), as_list(folder, tmp_path / "photos.txt")

    splits = [opened(path) for path in (folder, tar, listed)]

    assert [split.images for split in splits] == [4, 4, 4]
    assert list(splits[0].dataset.source.names) == ORDER  # type: ignore[union-attr]
    first, *others = [pixels(split, cifar_like) for split in splits]
    assert all(torch.equal(first, other) for other in others)
    assert splits[0].class_names == ("x", "y", "z")
    assert not splits[0].folders


def test_absolute_paths_in_a_list(tmp_path: Path, cifar_like: Preprocessing) -> None:
    folder = write(tmp_path / "photos")
    (tmp_path / "elsewhere").mkdir()
    listed = tmp_path / "elsewhere" / "list"
    listed.write_text("\r\n".join(str(folder / name) for name in ORDER))

    assert torch.equal(pixels(opened(listed), cifar_like), pixels(opened(folder), cifar_like))


def test_linked_images_and_folders_are_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "photos", ["a.png"])
    (folder / "more").symlink_to(write(tmp_path / "other", ["b.png"]))
    (folder / "linked.png").symlink_to(folder / "a.png")

    assert opened(folder).images == 3


@pytest.mark.parametrize("kind", ["folder", "tar", "list"])
def test_broken_images_stop_or_are_skipped(kind: str, tmp_path: Path, cifar_like: Preprocessing) -> None:
    folder = write(tmp_path / "photos")
    (folder / "c.png").write_bytes(b"no image")
    ways = {"tar": as_tar, "list": as_list}
    path = ways[kind](folder, tmp_path / "made.tar") if kind in ways else folder

    with pytest.raises(DataError, match=r"cannot read .*c\.png.*it is not an image.*bad_images=skip"):
        pixels(opened(path), cifar_like)
    found = pixels(opened(path, bad_images="skip"), cifar_like)
    assert len(found) == 4  # the next image takes its place
    assert len(torch.unique(found, dim=0)) == 3


def test_broken_links_stop_or_are_skipped(tmp_path: Path, cifar_like: Preprocessing) -> None:
    folder = write(tmp_path / "photos")
    (folder / "dead.png").symlink_to(folder / "nowhere.png")

    with pytest.raises(DataError, match="broken link"):
        opened(folder)
    assert len(pixels(opened(folder, bad_images="skip"), cifar_like)) == 5


def test_missing_files_of_a_list_stop_or_are_skipped(tmp_path: Path, cifar_like: Preprocessing) -> None:
    folder = write(tmp_path / "photos")
    listed = as_list(folder, tmp_path / "list.txt")
    (folder / "c.png").unlink()

    with pytest.raises(DataError, match=r"list\.txt line 3 names no file, photos/c\.png"):
        opened(listed)
    assert len(pixels(opened(listed, bad_images="skip"), cifar_like)) == 4


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def no_images(path: Path) -> Path:
    path.mkdir()
    (path / "film.heic").touch()
    return path


def text(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def compressed(path: Path) -> Path:
    return as_tar(write(path.with_name("source")), path.with_suffix(".tgz"), "w:gz")


def truncated(path: Path) -> Path:
    whole = as_tar(write(path.with_name("source"), ["a.png"]), path).read_bytes()
    path.write_bytes(whole[:1500])
    return path


def no_image_in_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("notes.txt")
        member.size = 2
        archive.addfile(member, io.BytesIO(b"hi"))
    return path


def single(path: Path) -> Path:
    noise(0).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path, "does not exist: give a folder of images, a tar, or a list file"),
        (empty, "holds no image: give a folder with .jpg"),
        (no_images, "holds no image, but 1 .heic file"),
        (text(b""), "names no image"),
        (text(b"PK\x00\x00\x00\x00"), "is not a text file"),
        (text(b"\n.\n"), "line 2 names a folder"),
        (compressed, "is compressed, and its images cannot be read in place"),
        (truncated, "is truncated|cannot be read"),
        (no_image_in_tar, "holds no image: give a tar"),
        (single, "is a single image"),
    ],
)
def test_without_images_the_message_says_why(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        opened(make(tmp_path / "photos"))


def test_fingerprints_follow_names_not_places(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    tars = [as_tar(folder, tmp_path / f"{folder.name}.tar") for folder in (one, other)]

    assert fingerprint(opened(one)) == fingerprint(opened(other))
    assert fingerprint(opened(tars[0])) == fingerprint(opened(tars[1]))
    (other / "c.png").rename(other / "d.png")
    assert fingerprint(opened(one)) != fingerprint(opened(other))
