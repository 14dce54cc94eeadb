"""Finding the images of an ImageNet-style folder: its splits, its class folders, the files in them.

Whatever is left out changes an accuracy in silence. So a link to nothing is an error that names it, and files that may
be images and are not read are noted; hidden ones and other files are passed over.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

from saqcli.errors import DataError
from saqcli.serialization import natural_key, printable, some
from saqcli.units import counted

SplitName = Literal["train", "val"]

# As torchvision.datasets.folder has it; timm alone would see .png, .jpg and .jpeg only.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Images to other programs, or to somebody who left the ending away.
_OTHER_IMAGES = set(
    (
        ".gif .jfif .jpe .jif .jp2 .j2k .jxl .apng .avif .heic .heif .tga .dib .pbm .pnm .pfm .dng .npy .dcm"
    ).split()
) | {""}

VAL_FOLDERS = ("val", "validation", "test")
_NAMES = {"train": ("train",), "val": VAL_FOLDERS}
_VARIANTS = {
    "train": ("train", "training"),
    "val": ("val", "validation", "valid", "test", "testing"),
}  # in any case


class Listing(NamedTuple):
    """The images of a folder.

    Attributes:
        images: class folder's name to its files.
        notes: what was passed over and may be images, one line each.
    """

    images: dict[str, list[str]]
    notes: tuple[str, ...]


def find_split(data: Path, split: SplitName, notes: list[str] | None = None) -> Path:
    """The folder of ``data`` that holds the class folders of ``split``.

    For ``val`` that is the first of val/, validation/ and test/, or ``data`` itself when it has no split at all. Where
    none of these is there, a single folder of such a name in capitals, training/, valid/ or testing/ is taken.

    Args:
        data: that holds it.
        split: which one.
        notes: gets a line where another folder could have been meant.

    Raises:
        DataError: ``data`` is no folder, has no such split, or more than one that may be meant.
    """
    _check_folder(data)
    there = sorted(entry.name for entry in _list(data) if entry.name[0] != "." and _is_folder(entry))
    if (found := _split_folder(data, split)) is not None:
        others = [name for name in there if name.lower() in ("valid", "validation") and name != found.name]
        if found.name == "test" and others and notes is not None:
            notes.append(
                f"{found} is evaluated on, and not {some(others)}/: rename the one that is meant to val/"
            )
        return found
    train = _split_folder(data, "train")
    if split == "val" and (train is None or (len(there) > 1 and not _holds_classes(train))):
        return data  # a folder of images that is called train is a class
    seen = f" (it has {some([name + '/' for name in there])})" if there else ""
    if split == "train":
        raise DataError(
            f"{data} has no train/ folder to take training images from{seen}: give the folder that holds train/ and "
            "val/, each with a folder per class, or rename the one that is meant"
        )
    raise DataError(
        f"{data} has a train/ folder but no {', '.join(f'{name}/' for name in VAL_FOLDERS)} to evaluate on{seen}: "
        "add one, rename the one that is meant, or give a folder of class folders"
    )


def is_split_name(name: str) -> bool:
    """Whether a folder of that name may be a split."""
    return any(name.lower() in variants for variants in _VARIANTS.values())


def _split_folder(data: Path, split: SplitName) -> Path | None:
    """The folder of a split, if there is one."""
    entries = [entry for entry in _list(data) if entry.name.lower() in _VARIANTS[split]]
    for entry in entries:
        _refuse_dead_link(entry)
    folders = [entry.name for entry in entries if _is_folder(entry)]
    exact = next((name for name in _NAMES[split] if name in folders), None)
    meant = sorted(
        name
        for name in folders
        if name != exact and (exact is None or name.lower() == exact) and _holds_classes(data / name)
    )
    meant = [exact, *meant] if exact else meant
    if len(meant) > 1:
        raise DataError(
            f"{data} has {' and '.join(f'{name}/' for name in meant)}: rename the one that is meant to {split}/, and "
            "the others to another name"
        )
    return data / meant[0] if meant else None


def _holds_classes(folder: Path) -> bool:
    """Whether a folder has folders and no images, so that it is a split and no class of that name."""
    entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if _is_folder(entry)]
    return bool(folders) and not any(_is_image(entry.name) for entry in entries if entry.name not in folders)


def find_images(folder: Path, *, dead_images: bool = False) -> Listing:
    """The image files below each class folder, at any depth; other files and hidden ones are passed over.

    Args:
        folder: of class folders.
        dead_images: list links to nothing that are called images, too.

    Returns:
        Classes and files sorted with numbers as numbers, in the same order on every machine.

    Raises:
        DataError: no class folders, some without an image, links to nothing, or folders that cannot be read.
    """
    entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
    for entry in entries:
        if not (dead_images and _is_image(entry.name)):
            _refuse_dead_link(entry)
    classes = _sort_names([entry.name for entry in entries if _is_folder(entry)])
    loose = [entry.name for entry in entries if _is_image(entry.name) and entry.name not in classes]
    if not classes:
        raise DataError(
            f"{folder} {_describe(loose, entries)}: give a folder that holds one folder per class"
        )
    top, passed_over = _identity(folder), dict[str, list[str]]()
    images = {
        name: sorted(
            _image_files(folder / name, {top}, passed_over, dead_images),
            key=lambda path: natural_key(path[skipped:]),
        )
        for name, skipped in ((name, len(str(folder / name)) + 1) for name in classes)
    }
    others = _describe_passed_over(passed_over)
    known = ", ".join(IMAGE_EXTENSIONS)
    if not any(images.values()):
        seen = f", but {others}" if others else ""
        raise DataError(
            f"{folder} has {counted(len(classes), 'folder')} ({some(classes)}) and no image in any of them{seen}: give "
            f"a folder whose class folders hold {known} files"
        )
    if empty := [name for name in classes if not images[name]]:
        seen = f" ({others})" if others else ""
        raise DataError(
            f"{folder} has class folders without an image: {some(empty)}{seen}; fill or remove them"
        )
    notes = []
    if others:
        notes.append(f"{folder}: ignored: {others}; images are {known} files")
    if loose:
        notes.append(
            f"{folder}: ignored: {counted(len(loose), 'image')} outside the class folders ({some(loose, 3)})"
        )
    return Listing(images, tuple(notes))


def _image_files(
    folder: Path, above: Set[tuple[int, int]], passed_over: dict[str, list[str]], dead_images: bool
) -> Iterator[str]:
    """The image files below a folder, through links too.

    Args:
        folder: to be searched.
        above: identifies the folders that it lies in.
        passed_over: gets the files that may be images and are not read, by ending.
        dead_images: see ``find_images``.
    """
    identity = _identity(folder)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder that it lies in: remove it")
    for entry in _list(folder):
        if entry.name.startswith("."):
            continue
        if not (dead_images and _is_image(entry.name)):
            _refuse_dead_link(entry)
        if _is_folder(entry):
            yield from _image_files(Path(entry.path), above | {identity}, passed_over, dead_images)
        elif _is_image(entry.name):
            yield entry.path
        elif (ending := os.path.splitext(entry.name)[1].lower()) in _OTHER_IMAGES:
            passed_over.setdefault(ending, []).append(entry.path)


def _describe_passed_over(files: Mapping[str, Sequence[str]]) -> str:
    """What ``_image_files`` has passed over, for a message."""
    texts = []
    for ending, paths in sorted(files.items()):
        what = (
            counted(len(paths), f"{ending} file")
            if ending
            else f"{counted(len(paths), 'file')} without an ending"
        )
        texts.append(f"{what} (such as {printable(paths[0])})")
    return ", ".join(texts)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder, or a link to one.

    Raises:
        DataError: nobody can tell, as where a link leads to a place that may not be entered.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if _is_image(entry.name):
            return False  # whoever reads it finds out why it cannot be read
        raise _cannot_list(Path(entry.path), error) from error


def _refuse_dead_link(entry: "os.DirEntry[str]") -> None:
    """Refuse a link to nothing, or to itself."""
    if not entry.is_symlink():
        return
    try:
        entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        if _is_image(entry.name):
            raise DataError(
                f"cannot read {entry.path} (it is a link to nothing): replace or remove it, or use "
                "`data.bad_images=skip`"
            ) from None
        target = printable(os.readlink(entry.path), 200)
        raise DataError(
            f"{entry.path} is a link to nothing ({target}): restore what it leads to, or remove the link"
        ) from None


def _list(folder: Path) -> "list[os.DirEntry[str]]":
    """The entries of a folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _cannot_list(folder, error) from error


def _identity(folder: Path) -> tuple[int, int]:
    """What tells a folder from all others, whatever way leads to it."""
    try:
        status = folder.stat()
    except OSError as error:
        raise _cannot_list(folder, error) from error
    return status.st_dev, status.st_ino


def _cannot_list(folder: Path, error: OSError) -> DataError:
    return DataError(f"cannot read the folder {folder} ({error.strerror}): give one that can be read")


def _sort_names(names: Sequence[str]) -> list[str]:
    """Names of class folders in the order in which their images are listed, which is not that of their labels."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _check_folder(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        raise DataError(f"{folder} is a file: give a folder (unpack an archive first)")
    if os.path.islink(folder):
        raise DataError(f"{folder} is a link to nothing ({os.readlink(folder)}): give a folder that is there")
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = [str(folder.parent / name) for name in get_close_matches(folder.name, siblings)]
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "give an existing folder, or torch/NAME, hfds/NAME, wds/DIR"
    )
    raise DataError(f"there is no folder {folder}: {hint}")


def _describe(images: Sequence[str], entries: Sequence[object]) -> str:
    """What is wrong with a folder that holds no class folder."""
    if not entries:
        return "is empty"
    return (
        f"holds {counted(len(images), 'image')} but no class folders" if images else "holds no class folders"
    )
