"""Data sets by name: opening, subsets and fingerprints.

A name is the path of an ImageNet-style folder (see ``folders``), of data in another form (see ``forms``), or one of
timm's strings such as ``torch/cifar100``, ``hfds/NAME`` or ``wds/DIR``; ``@ROOT`` after it sets where the data set is
stored (default: the current folder for torch/ and tfds/, Hugging Face's cache for hfds/). Only hfds/ and remote wds/
data are downloaded.

A ``Split`` holds images and labels; ``loaders`` feeds them to a network.

A fingerprint identifies the images of a split in one line of text, since a run must resume with the same images. It is
made from file names and labels, so a million images take seconds; an image that was replaced under the same name is
not detected.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from saqcli.data.archives import Shards, read_split
from saqcli.data.cache import ImageCache
from saqcli.data.folders import SplitName, find_images, find_split, is_split_name
from saqcli.data.forms import find_form
from saqcli.data.forms.labelled import Labelled
from saqcli.data.images import ImageSet, ImageStream, check_label
from saqcli.data.unlabelled import find_unlabelled
from saqcli.errors import DataError
from saqcli.serialization import named_path, some
from saqcli.tasks.class_lists import find_class_lists, read_class_map
from saqcli.tasks.labels import Classes, Numbering, assign_labels, check_files
from saqcli.units import counted

BadImages = Literal["refuse", "skip", "replace"]

_RANDOM_ACCESS = ("torch", "hfds")
_STREAMED = ("hfids", "tfds")
_SHARDED = "wds"
_SPLIT_SYNONYMS = {"train": ("train",), "val": ("validation", "val", "test")}


@dataclass(frozen=True)
class Split:
    """The training or the validation part of a data set.

    Attributes:
        name: name in messages: its folder, or timm's string and the name of the split.
        dataset: the images; a loader copies it before it sets a transform, so that splits can be shared.
        class_names: names of all classes of the network, by index; empty if unknown.
        bad_images: treatment of an image that cannot be read. ``refuse``: an error names it. ``skip``: in training the
            next image replaces it; in evaluation its label is ``LEFT_OUT`` (-1), which counts as neither right nor
            wrong. ``replace``: the next image replaces it in evaluation too.
        folders: labels of the class folders, or of the classes of the data set; empty if unknown.
        class_order: source of the labels, see ``Numbering``.
        notes: choices made for the user, and ignored files, one line each.
        cache: keeps decoded images, for all subsets; None to read them in every epoch.
    """

    name: str
    dataset: ImageSet | ImageStream
    class_names: tuple[str, ...]
    bad_images: BadImages = "refuse"
    folders: Mapping[str, int] = field(default_factory=dict)
    class_order: str = "data set"
    notes: tuple[str, ...] = ()
    cache: ImageCache | None = None

    @property
    def images(self) -> int:
        """Number of images; approximate for a stream."""
        return len(self.dataset)


def open_split(
    data: str,
    split: SplitName,
    *,
    num_classes: Classes | int,
    bad_images: BadImages = "refuse",
    class_order: str | None = None,
    class_map: str | None = None,
    exif_transpose: bool = False,
) -> Split:
    """Open the ``split`` of ``data``, with labels for a network.

    Args:
        data: a folder with train/ and val/ (or validation/, test/), each with a folder per class; for ``val``
            also the folder of class folders itself; data in another form; or one of timm's strings,
            ``PREFIX/NAME[@ROOT]``.
        split: the part to open: ``train``, ``val``, or another by the name that the data gives it.
        num_classes: the network's number of classes, or all that is known of its classes.
        bad_images: see ``Split``; the readers of hfids/ and tfds/ ignore it.
        class_order: ``timm``, ``torchvision`` or a file of class names, if the user sets one.
        class_map: file that maps folders to classes.
        exif_transpose: rotate images by their EXIF orientation.

    Raises:
        ConfigError: a file of classes cannot be read.
        DataError: the data or the split does not exist, or its classes do not match the network.
    """
    classes = Classes(num_classes) if isinstance(num_classes, int) else num_classes
    check_files(class_order, class_map)
    prefix = data.partition("/")[0].lower()
    if prefix == _SHARDED and not named_path(data).exists():
        opened = _open_shards(data, split, classes, class_order, class_map)
    elif prefix in _RANDOM_ACCESS + _STREAMED and not named_path(data).exists():
        opened = _open_named(data, split, classes, class_order, class_map)
    else:
        skipped = bad_images != "refuse"
        path = named_path(data)
        if (form := find_form(path, split, dead_images=skipped)) is not None:
            opened = _open_form(form(), classes, class_order, class_map)
        else:
            opened = _open_folder(path, split, classes, class_order, class_map, dead_images=skipped)
    dataset = replace(opened.dataset, exif_transpose=exif_transpose)
    return replace(opened, dataset=dataset, bad_images=bad_images)


def open_unlabelled(
    path: str, classes: Classes, *, bad_images: BadImages = "refuse", exif_transpose: bool = False
) -> Split:
    """Open images without labels: a folder, a tar or a list file (see ``unlabelled``).

    Args:
        path: of the folder or file.
        classes: of the network, whose names the split has.
        bad_images: see ``Split``.
        exif_transpose: rotate images by their EXIF orientation.

    Raises:
        DataError: there are no images, or ``path`` cannot be read.
    """
    source, notes = find_unlabelled(named_path(path), dead_images=bad_images != "refuse")
    name = str(named_path(path))
    dataset = ImageSet(source, None, classes.count, name, exif_transpose=exif_transpose)
    return Split(name, dataset, classes.names, bad_images, class_order="", notes=notes)


def _open_folder(
    data: Path,
    split: SplitName,
    classes: Classes,
    order: str | None,
    class_map: str | None,
    *,
    dead_images: bool,
) -> Split:
    notes: list[str] = []
    folder = find_split(data, split, notes)
    images, passed_over = find_images(folder, dead_images=dead_images)
    places = [folder, data] if folder != data else [folder]
    if folder == data and is_split_name(folder.name):
        places.append(folder.absolute().parent)
    numbering = assign_labels(
        list(images),
        classes,
        str(folder),
        order=order,
        class_map=class_map,
        list_files=find_class_lists(places),
    )
    labels = numbering.labels
    source = [(file, labels[name]) for name, files in images.items() for file in files]
    dataset = ImageSet(source, [label for _, label in source], classes.count, str(folder))
    return _numbered(Split(str(folder), dataset, (), notes=(*notes, *passed_over)), numbering)


def _open_form(found: Labelled, classes: Classes, order: str | None, class_map: str | None) -> Split:
    """A split of data in another form than class folders, numbered as class folders are."""
    dataset = ImageSet(found.source, found.labels, classes.count, found.title)
    plain = Split(found.title, dataset, (), notes=found.notes)
    if not found.names:
        relabelled = _by_number(plain, classes, order, class_map)
        relabel = relabelled.dataset.relabel
        labels = [check_label(label, classes.count, found.title, relabel) for label in found.labels]
        return replace(relabelled, dataset=replace(dataset, labels=labels, relabel=relabel))
    numbering = assign_labels(
        list(found.names),
        classes,
        found.title,
        order=order,
        class_map=class_map,
        list_files=find_class_lists(found.places),
        in_order=found.in_order,
    )
    relabel = {place: numbering.labels[name] for place, name in enumerate(found.names)}
    labels = [relabel[label] for label in found.labels]
    return _numbered(replace(plain, dataset=replace(dataset, labels=labels, relabel=relabel)), numbering)


def _numbered(split: Split, numbering: Numbering) -> Split:
    return replace(
        split,
        class_names=numbering.names,
        folders=numbering.labels,
        class_order=numbering.order,
        notes=split.notes + numbering.notes,
    )


def check_same_classes(train: Split, val: Split) -> None:
    """Check that the labels of two splits denote the same classes.

    Raises:
        DataError: their classes or the labels of their classes differ.
    """
    differences = []
    for here, there in ((train, val), (val, train)):
        known = set(_meanings(there).values())
        alone = [name for name, meant in _meanings(here).items() if meant not in known]
        if alone:
            differences.append(f"only {here.name} has {some(alone)}")
    if differences:
        raise DataError(
            f"{train.name} and {val.name} have different classes: {'; '.join(differences)}. "
            "Give both the same class folders"
        )
    if train.class_names != val.class_names or any(
        label != val.folders.get(name, label) for name, label in train.folders.items()
    ):
        raise DataError(
            f"the classes of {train.name} and {val.name} are numbered differently ({train.class_order}, "
            f"{val.class_order}): give `data.class_order`, or the same class list to both"
        )


def _meanings(split: Split) -> dict[str, str | int]:
    """The classes of a split's folders: names, or indices if the classes have no names."""
    names = split.class_names
    return {name: names[label] if names else label for name, label in split.folders.items()}


def subset(split: Split, count: int, seed: int) -> Split:
    """``count`` images of ``split``, drawn evenly over its classes; all of them if it has no more.

    The order depends only on (split, seed), so a smaller subset is the beginning of a larger one; classes alternate, so
    the first batch contains many of them. If labels are unknown before reading (hfds/), the draw is uniform. Shards
    (wds/) give their first images, a few each, and a smaller subset is contained in a larger one.

    Raises:
        DataError: the split is a stream, which does not support subsets.
    """
    if (shards := sharded(split)) is not None:
        return _with_shards(split, shards.draw(count, seed))
    return replace(split, dataset=_random_access(split).pick(_order(split, seed)[:count]))


def sharded(split: Split) -> Shards | None:
    """The shards of a split; None if it is not stored in shards."""
    source = split.dataset.source
    return source if isinstance(source, Shards) else None


def _with_shards(split: Split, shards: Shards) -> Split:
    assert isinstance(split.dataset, ImageStream)
    return replace(split, dataset=replace(split.dataset, source=shards))


def _random_access(split: Split) -> ImageSet:
    if isinstance(split.dataset, ImageStream):
        raise DataError(
            f"{split.name} is a stream, which does not support drawing images: give a folder of images"
        )
    return split.dataset


def _order(split: Split, seed: int) -> list[int]:
    """All images in random order, with alternating classes."""
    order = np.random.default_rng(seed).permutation(split.images)
    labels = _random_access(split).labels
    found: list[int] = (order if labels is None else _alternate_classes(order, labels)).tolist()
    return found


def divide(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Divide ``split`` into ``share`` of its images and the rest, with the same share of every class.

    For shards (wds/), whose labels are unknown before reading, it is the same share of every file.

    Raises:
        DataError: the split is a stream, or a part would be empty.
    """
    count = round(share * split.images)
    if not 0 < count < split.images:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, too few to hold out {share:.0%} of them: "
            "give more images"
        )
    if (shards := sharded(split)) is not None:
        first, rest = shards.divide(count, seed)
        return _with_shards(split, first), _with_shards(split, rest)
    order = _order(split, seed)
    return (
        replace(split, dataset=_random_access(split).pick(order[:count])),
        replace(split, dataset=_random_access(split).pick(order[count:])),
    )


def class_subset(split: Split, count: int, seed: int) -> Split:
    """The images of ``count`` classes of ``split``, drawn by ``seed``; labels and the number of classes stay the same.

    Raises:
        DataError: the split is a stream, or its labels are unknown before reading.
    """
    labels = _random_access(split).labels
    if labels is None:
        raise DataError(f"the labels of {split.name} are unknown before reading: classes cannot be drawn")
    present = sorted(set(labels))
    chosen = set(np.random.default_rng(seed).permutation(present)[:count].tolist())
    kept = [index for index, label in enumerate(labels) if label in chosen]
    return replace(split, dataset=_random_access(split).pick(kept))


def _alternate_classes(order: "np.ndarray[Any, np.dtype[np.int64]]", labels: Sequence[int]) -> Any:
    """``order`` rearranged: the first image of each class, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    turns = []
    for index in order:
        turns.append(seen[labels[index]])
        seen[labels[index]] += 1
    return order[np.argsort(turns, kind="stable")]


def _open_shards(
    data: str, split: SplitName, classes: Classes, order: str | None, class_map: str | None
) -> Split:
    """Open tar files in timm's layout, whose labels are numbers."""
    root = _root_of_shards(data)
    found, parts = read_split(root, _SPLIT_SYNONYMS.get(split, (split,)), data)
    title = f"{data} ({found})"
    return _by_number(
        Split(title, ImageStream(Shards(root, parts), classes.count, title), ()), classes, order, class_map
    )


def _root_of_shards(data: str) -> str:
    name, _, root = data.partition("@")
    return os.path.expanduser(root or name.partition("/")[2])


def _by_number(split: Split, classes: Classes, order: str | None, class_map: str | None) -> Split:
    """Label a split whose labels are numbers: these are the network's labels, unless a class map is given.

    Raises:
        DataError: ``order`` is given, or the class map contains names.
    """
    if order is not None:
        raise DataError(
            f"{split.name} has numbers as labels and no class names, so they cannot be reordered: remove "
            "`data.class_order`"
        )
    if class_map is None:
        return replace(split, class_names=classes.names)
    mapped = read_class_map(named_path(class_map), ())
    if wrong := [name for name in mapped if not name.isdecimal()]:
        raise DataError(
            f"{split.name} has numbers as labels, but {class_map} maps {some(wrong, 3)}: give lines `LABEL CLASS`"
        )
    numbering = assign_labels(list(mapped), classes, split.name, class_map=class_map)
    relabel = {int(name): label for name, label in numbering.labels.items()}
    return _numbered(replace(split, dataset=replace(split.dataset, relabel=relabel)), numbering)


def _open_named(
    data: str, split: SplitName, classes: Classes, order: str | None, class_map: str | None
) -> Split:
    """Open one of timm's data sets."""
    opened, synonym = _created(data, split)
    prefix = data.partition("/")[0].lower()
    title = f"{data} ({synonym})"
    if prefix in _STREAMED:
        return _by_number(
            Split(title, ImageStream(opened, classes.count, title), ()), classes, order, class_map
        )
    if hasattr(opened, "loader"):
        opened.loader = str  # torchvision's folders give paths; their reader clips images of more than 8 bits
    labels = getattr(opened, "targets", None)
    source = getattr(opened, "reader", opened)  # bypasses timm's reading, which silently replaces bad images
    dataset = ImageSet(source, None if labels is None else list(map(int, labels)), classes.count, title)
    plain = Split(title, dataset, ())
    names = _class_names(opened)
    if not names or len(set(names)) < len(names):
        return _by_number(plain, classes, order, class_map)
    numbering = assign_labels(names, classes, title, order=order, class_map=class_map, in_order=True)
    relabel = {place: numbering.labels[name] for place, name in enumerate(names)}
    if any(place != label for place, label in relabel.items()):
        labels = None if dataset.labels is None else [relabel[label] for label in dataset.labels]
        plain = replace(plain, dataset=replace(dataset, labels=labels, relabel=relabel))
    return _numbered(plain, numbering)


def _created(data: str, split: SplitName) -> tuple[Any, str]:
    """One of timm's data sets, and the first existing name of the split.

    Raises:
        DataError: it is not there, or its package is missing.
    """
    from timm.data import create_dataset

    name, _, root = data.partition("@")
    prefix = name.partition("/")[0].lower()
    where = root or {"hfds": None, "hfids": None}.get(prefix, ".")
    failures = []
    for synonym in _SPLIT_SYNONYMS.get(split, (split,)):
        try:
            opened = create_dataset(
                name, root=where, split=synonym, is_training=split == "train", download=False
            )
            break
        except ImportError as error:
            raise DataError(
                f"{data} needs a package that is missing ({error}): install it, or give a folder of images"
            ) from error
        except Exception as error:  # the library of the prefix may raise anything
            failures.append(" ".join(str(error).split()) or type(error).__name__)
    else:
        raise DataError(
            f"cannot open the {split} split of {data} in {where or 'its cache'} ({failures[0]}): "
            f"check the name, or give its location with {name}@ROOT"
        )
    return opened, synonym


def _class_names(opened: Any) -> tuple[str, ...]:
    """Class names in the order of their labels; for torchvision's ImageNet these are synsets."""
    names = getattr(opened, "wnids", None) or getattr(opened, "classes", None)
    if names is not None:
        return tuple(names)
    indices: dict[str, int] = getattr(getattr(opened, "reader", None), "class_to_idx", {})
    return tuple(sorted(indices, key=indices.__getitem__))


def check_split_exists(data: str, split: SplitName) -> None:
    """Check that a folder has the split, without opening its files; timm's strings are not checked.

    Raises:
        DataError: the folder or the split does not exist.
    """
    prefix = data.partition("/")[0].lower()
    if prefix not in (_SHARDED, *_RANDOM_ACCESS, *_STREAMED) or named_path(data).exists():
        path = named_path(data)
        if find_form(path, split) is None:
            find_split(path, split)


def check_set_opens(data: str, split: SplitName) -> None:
    """As ``check_split_exists``, but timm's strings are checked by opening the data set.

    Raises:
        DataError: the data or the split does not exist.
    """
    prefix = data.partition("/")[0].lower()
    if prefix in _RANDOM_ACCESS + _STREAMED and not named_path(data).exists():
        _created(data, split)
    elif prefix == _SHARDED and not named_path(data).exists():
        read_split(_root_of_shards(data), _SPLIT_SYNONYMS.get(split, (split,)), data)
    else:
        check_split_exists(data, split)


def fingerprint(split: Split) -> str:
    """``COUNT:SHA256`` of the images of ``split``, in order.

    The hash covers, for a folder, the file names relative to it and the labels, so the data set may be moved; for
    shards, the file names and their numbers of images; for another form, the ``lines`` of its source; for other data
    sets, the name without its location, the number of images, and the labels if known.
    """
    hashed = hashlib.sha256()
    for line in _lines(split):
        hashed.update(line.encode(errors="surrogateescape") + b"\n")
    return f"{split.images}:{hashed.hexdigest()}"


def check_fingerprint(
    recorded: str, split: Split, called: str, expected_by: str = "the run started with"
) -> None:
    """Check that ``split`` still holds the images with the fingerprint ``recorded``.

    Args:
        recorded: earlier result of ``fingerprint``.
        split: the split to check.
        called: the split's name in the message, such as ``training``.
        expected_by: continues "the images that" in the message.

    Raises:
        DataError: the fingerprints differ.
    """
    if fingerprint(split) == recorded:
        return
    before = recorded.partition(":")[0]
    count = int(before) if before.isdecimal() else -1
    counts = f"{count:,} expected, {split.images:,} found"
    if count == split.images:
        counts = f"{count:,} expected and found, with other names or labels"
    raise DataError(
        f"the {called} images in {split.name} are not those that {expected_by} ({counts}): "
        "restore them, or start again with `overwrite=True`"
    )


def _lines(split: Split) -> Iterator[str]:
    """The lines that are hashed; NUL, which no file name contains, separates names and numbers."""
    for label, meant in sorted((split.dataset.relabel or {}).items()):
        yield f"\0{label}\0{meant}"
    if (shards := sharded(split)) is not None:
        for part in shards.parts:
            yield f"{part.file}\0{part.images}\0{part.start}\0{part.stop}"
        return
    dataset = split.dataset
    if isinstance(dataset, ImageSet) and hasattr(dataset.source, "lines"):
        yield from dataset.source.lines()
        return
    if isinstance(dataset, ImageSet) and isinstance(dataset.source, list):
        folder = os.path.join(split.name, "")  # the split's name is its folder
        for file, label in dataset.source:
            yield f"{file.removeprefix(folder)}\0{label}".replace(os.sep, "/")
        return
    yield re.sub(r"@.*(?= \(\w+\)$)", "", split.name)
    yield str(split.images)
    if isinstance(dataset, ImageSet) and dataset.labels is not None:
        yield from map(str, dataset.labels)
