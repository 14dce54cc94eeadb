"""Finding the images of an ImageNet-style folder, and the class that each folder stands for.

Labels are where an evaluation goes wrong in silence: ten folders of ImageNet classes, numbered 0 to 9, give
an accuracy near zero and no error. So a folder name that is an ImageNet synset keeps its place among the
classes of an ImageNet network, and a number of folders that does not fit the network is refused.
"""

import os
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from saqcli.errors import DataError

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
        Class folder's name to its files, both sorted as ``sort_classes`` and timm sort.

    Raises:
        DataError: no class folders, or some without an image.
    """
    from timm.data import create_dataset

    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    classes = sort_classes(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} {_describe(entries)}: give a folder that holds one folder per class")

    images: dict[str, list[str]] = {name: [] for name in classes}
    try:
        reader = create_dataset(
            "", root=str(folder), search_split=False, input_key=";".join(IMAGE_EXTENSIONS)
        ).reader
    except RuntimeError:  # timm's word for no image at all
        raise DataError(
            f"{folder} has {len(classes)} folders ({some(classes)}) and no image in any of them: "
            f"give a folder whose class folders hold {some(IMAGE_EXTENSIONS)} files"
        ) from None
    for file, _ in reader.samples:
        parts = os.path.relpath(file, folder).split(os.sep)
        if len(parts) > 1 and not any(part.startswith(".") for part in parts):
            images[parts[0]].append(file)

    if empty := [name for name in classes if not images[name]]:
        raise DataError(f"{folder} has class folders without an image: {some(empty)}; fill or remove them")
    return images


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
        f"{folder} has {len(names)} classes ({some(names)}), the model {num_classes}: "
        f"give --num-classes {len(names)} (a new head, to be fine-tuned), or {remedy}"
    )


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of their labels: sorted as text, or as numbers if all are numbers.

    Example:
        >>> sort_classes(["10", "9", "1"])
        ['1', '9', '10']
    """
    names = list(names)
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


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
    if folder.is_dir():
        return
    if folder.exists():
        raise DataError(f"{folder} is a file: give a folder (unpack an archive first)")
    parent = folder.absolute().parent
    siblings = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = [str(folder.parent / name) for name in get_close_matches(folder.name, siblings)]
    hint = (
        f"did you mean {' or '.join(near)}?" if near else "give an existing folder, or torch/NAME, hfds/NAME"
    )
    raise DataError(f"there is no folder {folder}: {hint}")


def _describe(entries: Sequence[Path]) -> str:
    """What is wrong with a folder of ``entries``, none of which is a class folder."""
    if not entries:
        return "is empty"
    images = sum(entry.suffix.lower() in IMAGE_EXTENSIONS for entry in entries)
    return f"holds {images} images but no class folders" if images else "holds no class folders"
