"""Splits, class folders and image files of an ImageNet-style folder.

A missing image silently changes an accuracy. So a broken link is an error, and files that may be images but are not
read are noted; hidden files and all others are ignored.
"""

import errno
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from saqcli.errors import DataError
from saqcli.serialization import natural_key, printable, some
from saqcli.units import counted

SplitName = str  # ``train``, ``val``, or the name of another split

# The list of torchvision.datasets.folder; timm reads only .png, .jpg and .jpeg.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Suffixes that other programs use for images; the empty one may be an image too.
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
        images: name of each class folder to its files.
        notes: ignored files that may be images, one line each.
    """

    images: dict[str, list[str]]
    notes: tuple[str, ...]


def find_split(data: Path, split: SplitName, notes: list[str] | None = None) -> Path:
    """The folder in ``data`` with the class folders of ``split``.

    For ``val`` this is the first of val/, validation/ and test/, or ``data`` itself if it has no splits. If none of
    these exists, a single folder with such a name in other case, training/, valid/ or testing/ is accepted. Another
    split is the folder of that name.

    Args:
        data: folder of the data set.
        split: the split to find.
        notes: receives a line if another folder could also be the split.

    Raises:
        DataError: ``data`` is not a folder, or has no such split or several candidates.
    """
    _check_folder(data)
    there = sorted(entry.name for entry in _list(data) if entry.name[0] != "." and _is_folder(entry))
    if split not in _NAMES:
        if split in there:
            return data / split
        raise DataError(
            f"{data} has no folder {printable(split, 60)}/{f' (it has {some(there)})' if there else ''}: give a split "
            "that it has"
        )
    if (found := _split_folder(data, split)) is not None:
        others = [name for name in there if name.lower() in ("valid", "validation") and name != found.name]
        if found.name == "test" and others and notes is not None:
            notes.append(f"{found} is used for evaluation, not {some(others)}/: rename the right one to val/")
        return found
    train = _split_folder(data, "train")
    if split == "val" and (train is None or (len(there) > 1 and not _holds_classes(train))):
        return data  # a folder named train that contains images is a class
    seen = f" (it has {some([name + '/' for name in there])})" if there else ""
    if split == "train":
        raise DataError(
            f"{data} has no train/ folder with training images{seen}: give the folder that holds train/ and val/, "
            "each with a folder per class, or rename the right one"
        )
    raise DataError(
        f"{data} has a train/ folder but no {', '.join(f'{name}/' for name in VAL_FOLDERS)} to evaluate on{seen}: "
        "add one, rename the right one, or give a folder of class folders"
    )


def is_split_name(name: str) -> bool:
    """Whether ``name`` is a possible name of a split's folder."""
    return any(name.lower() in variants for variants in _VARIANTS.values())


def _split_folder(data: Path, split: SplitName) -> Path | None:
    """The folder of a split; None if there is none."""
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
            f"{data} has {' and '.join(f'{name}/' for name in meant)}: rename the right one to {split}/, and the "
            "others to another name"
        )
    return data / meant[0] if meant else None


def _holds_classes(folder: Path) -> bool:
    """Whether a folder contains folders and no images, so that it is a split and not a class of that name."""
    entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
    folders = [entry.name for entry in entries if _is_folder(entry)]
    return bool(folders) and not any(is_image(entry.name) for entry in entries if entry.name not in folders)


def find_images(folder: Path, *, dead_images: bool = False) -> Listing:
    """The image files below each class folder, at any depth; other files and hidden files are ignored.

    Args:
        folder: folder of class folders.
        dead_images: also list broken links with the suffix of an image.

    Returns:
        Classes and files in natural order (numbers as numbers), which is the same on every machine.

    Raises:
        DataError: there are no class folders, class folders without an image, broken links, or unreadable folders.
    """
    entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
    for entry in entries:
        if not (dead_images and is_image(entry.name)):
            _refuse_dead_link(entry)
    classes = _sort_names([entry.name for entry in entries if _is_folder(entry)])
    loose = [entry.name for entry in entries if is_image(entry.name) and entry.name not in classes]
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
            f"{folder} has {counted(len(classes), 'folder')} ({some(classes)}) but no image in them{seen}: give a "
            f"folder whose class folders contain {known} files"
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


def find_loose_images(folder: Path, *, dead_images: bool = False) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The image files below ``folder`` at any depth, whose folders mean nothing, and notes about ignored files.

    Args:
        folder: an existing folder.
        dead_images: also list broken links with the suffix of an image.

    Returns:
        Names relative to ``folder``, in natural order, and the notes.

    Raises:
        DataError: there is no image, a broken link, or an unreadable folder.
    """
    passed_over, prefix = dict[str, list[str]](), os.path.join(folder, "")
    found = _image_files(folder, set(), passed_over, dead_images)
    names = sorted((path.removeprefix(prefix) for path in found), key=natural_key)
    others, known = _describe_passed_over(passed_over), ", ".join(IMAGE_EXTENSIONS)
    if not names:
        seen = f", but {others}" if others else ""
        raise DataError(f"{folder} holds no image{seen}: give a folder with {known} files")
    notes = (f"{folder}: ignored: {others}; images are {known} files",) if others else ()
    return tuple(names), notes


def _image_files(
    folder: Path, above: Set[tuple[int, int]], passed_over: dict[str, list[str]], dead_images: bool
) -> Iterator[str]:
    """The image files below a folder, including linked folders.

    Args:
        folder: folder to search.
        above: identities of its parent folders.
        passed_over: receives the ignored files that may be images, by suffix.
        dead_images: see ``find_images``.
    """
    identity = _identity(folder)
    if identity in above:
        raise DataError(f"{folder} is a link to one of its parent folders: remove it")
    for entry in _list(folder):
        if entry.name.startswith("."):
            continue
        if not (dead_images and is_image(entry.name)):
            _refuse_dead_link(entry)
        if _is_folder(entry):
            yield from _image_files(Path(entry.path), above | {identity}, passed_over, dead_images)
        elif is_image(entry.name):
            yield entry.path
        elif (ending := os.path.splitext(entry.name)[1].lower()) in _OTHER_IMAGES:
            passed_over.setdefault(ending, []).append(entry.path)


def _describe_passed_over(files: Mapping[str, Sequence[str]]) -> str:
    """Text for a message about the ignored files of ``_image_files``."""
    texts = []
    for ending, paths in sorted(files.items()):
        what = (
            counted(len(paths), f"{ending} file")
            if ending
            else f"{counted(len(paths), 'file')} without a suffix"
        )
        texts.append(f"{what} (such as {printable(paths[0])})")
    return ", ".join(texts)


def is_image(name: str) -> bool:
    """Whether a file of this name is read as an image."""
    return name.lower().endswith(IMAGE_EXTENSIONS)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether ``entry`` is a folder or a link to one.

    Raises:
        DataError: the entry cannot be read, for example because the target of a link is not accessible.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if is_image(entry.name):
            return False  # reading the image will report the reason
        raise _cannot_list(Path(entry.path), error) from error


def _refuse_dead_link(entry: "os.DirEntry[str]") -> None:
    """Refuse a broken link, or a link to itself."""
    if not entry.is_symlink():
        return
    try:
        entry.stat()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return
        if is_image(entry.name):
            raise DataError(
                f"cannot read {entry.path} (it is a broken link): replace or remove it, or use `data.bad_images=skip`"
            ) from None
        target = printable(os.readlink(entry.path), 200)
        raise DataError(
            f"{entry.path} is a broken link ({target}): restore its target, or remove the link"
        ) from None


def _list(folder: Path) -> "list[os.DirEntry[str]]":
    """The entries of a folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _cannot_list(folder, error) from error


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode, which identify a folder independently of its path."""
    try:
        status = folder.stat()
    except OSError as error:
        raise _cannot_list(folder, error) from error
    return status.st_dev, status.st_ino


def _cannot_list(folder: Path, error: OSError) -> DataError:
    return DataError(f"cannot read the folder {folder} ({error.strerror}): give a readable folder")


def _sort_names(names: Sequence[str]) -> list[str]:
    """Names of class folders in the order of the image list, which may differ from the order of labels."""
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _check_folder(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        raise DataError(
            f"{folder} is a file: give a folder, a tar or zip of class folders, a .csv of files and classes, a "
            ".parquet or an .arrow"
        )
    if os.path.islink(folder):
        raise DataError(f"{folder} is a broken link ({os.readlink(folder)}): give an existing folder")
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
    """Text for a message about a folder without class folders."""
    if not entries:
        return "is empty"
    return f"has {counted(len(images), 'image')} but no class folders" if images else "has no class folders"
