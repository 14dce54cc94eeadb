"""Finding the images of an ImageNet-style folder, and the class that each folder stands for.

Labels are where an evaluation goes wrong in silence: ten folders of ImageNet classes, numbered 0 to 9, give
an accuracy near zero and no error. So a folder name that is an ImageNet synset keeps its place among the
classes of an ImageNet network, and a number of folders that does not fit the network is refused.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from saqcli.errors import DataError
from saqcli.units import counted

SplitName = Literal["train", "val"]

# As torchvision.datasets.folder has it; timm alone would see .png, .jpg and .jpeg only.
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
VAL_FOLDERS = ("val", "validation", "test")


def find_split(data: Path, split: SplitName) -> Path:
    """The folder of ``data`` that holds the class folders of ``split``.

    For ``val`` that is the first of val/, validation/ and test/, or ``data`` itself when it has none of them
    and no train/ either.

    Raises:
        DataError: ``data`` is no folder, or has no such split.
    """
    _check_folder(data)
    names = ("train",) if split == "train" else VAL_FOLDERS
    for name in names:
        if (data / name).is_dir():
            return data / name
    if split == "train":
        raise DataError(
            f"{data} has no train/ folder to take training images from: "
            "give the folder that holds train/ and val/, each with a folder per class"
        )
    if (data / "train").is_dir():
        raise DataError(
            f"{data} has a train/ folder but no {', '.join(f'{name}/' for name in names)} to evaluate on: "
            "add one, or give a folder of class folders"
        )
    return data


def find_images(folder: Path) -> dict[str, list[str]]:
    """The image files below each class folder, at any depth; other files and hidden ones are passed over.

    Returns:
        Class folder's name to its files; both sorted with numbers as numbers, as timm sorts, and in the same order
        on every machine.

    Raises:
        DataError: no class folders, some without an image, or folders that cannot be read.
    """
    entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
    classes = sort_classes(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise DataError(
            f"{folder} {_describe([entry.name for entry in entries])}: give a folder that holds one folder per class"
        )
    top = _identity(folder)
    images = {
        name: sorted(_image_files(folder / name, {top}), key=lambda path: _natural(path[skipped:]))
        for name, skipped in ((name, len(str(folder / name)) + 1) for name in classes)
    }
    if not any(images.values()):
        raise DataError(
            f"{folder} has {counted(len(classes), 'folder')} ({some(classes)}) and no image in any of them: "
            f"give a folder whose class folders hold {some(IMAGE_EXTENSIONS)} files"
        )
    if empty := [name for name in classes if not images[name]]:
        raise DataError(f"{folder} has class folders without an image: {some(empty)}; fill or remove them")
    return images


def _image_files(folder: Path, above: Set[tuple[int, int]]) -> Iterator[str]:
    """The image files below a folder, through links too; ``above`` identifies the folders that it lies in."""
    identity = _identity(folder)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder that it lies in: remove it")
    for entry in _list(folder):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _image_files(Path(entry.path), above | {identity})
        elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
            yield entry.path


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


def _natural(path: str) -> tuple[list[str | int], str]:
    """Sorts 2 before 10, as timm does; what that cannot tell apart (2 and 02), as text."""
    parts = re.split(r"(\d+)", path.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], path


def number_classes(names: Sequence[str], num_classes: int, folder: Path) -> dict[str, int]:
    """The label of each class folder.

    Folders that are all synsets (n01440764) of the ImageNet set with ``num_classes`` classes keep their index
    there, even if only some are present. Others are numbered 0 .. n - 1 in sorted order.

    Raises:
        DataError: folders that are no synsets, and not as many as the network has classes.
    """
    synsets = _synset_indices(num_classes)
    strangers = [name for name in names if name not in synsets]
    if not strangers:
        return {name: synsets[name] for name in names}
    if len(names) == num_classes:
        return {name: label for label, name in enumerate(sort_classes(names))}
    if not synsets:
        remedy = "data whose folders are the model's classes"
    elif len(strangers) < len(names):
        remedy = f"rename or remove what is no ImageNet synset ({some(strangers)})"
    else:
        remedy = "data whose folders are ImageNet synsets"
    raise DataError(
        f"{folder} has {counted(len(names), 'class')} ({some(names)}), the model {num_classes}: "
        f"give --num-classes {len(names)} (a new head, to be fine-tuned), or {remedy}"
    )


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: sorted as text, or as numbers if all are numbers.

    Example:
        >>> sort_classes(["10", "9", "1"])
        ['1', '9', '10']
    """
    names = sorted(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first ``limit`` names for a message, and how many more there are.

    Example:
        >>> some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _synset_indices(num_classes: int) -> dict[str, int]:
    """Synset to index in the ImageNet set of that many classes; empty if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return {}
    return {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}


def _check_folder(folder: Path) -> None:
    if os.path.isdir(folder):
        return
    if os.path.exists(folder):
        raise DataError(f"{folder} is a file: give a folder (unpack an archive first)")
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = [str(folder.parent / name) for name in get_close_matches(folder.name, siblings)]
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "give an existing folder, or torch/NAME, hfds/NAME, wds/DIR"
    )
    raise DataError(f"there is no folder {folder}: {hint}")


def _describe(names: Sequence[str]) -> str:
    """What is wrong with a folder of ``names``, none of which is a class folder."""
    if not names:
        return "is empty"
    images = sum(name.lower().endswith(IMAGE_EXTENSIONS) for name in names)
    return f"holds {counted(images, 'image')} but no class folders" if images else "holds no class folders"
