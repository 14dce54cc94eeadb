"""Opening a data set by name, and the fingerprint of its images.

Opening a data set by what a user calls it: a folder, or one of timm's data-set strings.

A path is an ImageNet-style folder (see ``folders.py``). A string such as ``torch/cifar100``,
``hfds/NAME`` or ``wds/DIR`` goes to timm; ``@ROOT`` after it says where it is stored (by default the current
folder for torch/ and tfds/, Hugging Face's cache for hfds/). Nothing is downloaded but what Hugging Face's
library fetches by itself.

A ``Split`` knows what its images and labels are; how they are fed to a network is ``loaders.py``.

Which images a split holds, as a line of text: a run that goes on must go on with the same ones.

No file is opened or looked at, so that a million names take seconds; an image that was replaced under its name is
not noticed.
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
from saqcli.data.folders import SplitName, find_images, find_split, is_split_name
from saqcli.data.images import ImageSet, ImageStream
from saqcli.errors import DataError
from saqcli.serialization import named_path, some
from saqcli.tasks.class_lists import find_class_lists, read_class_map
from saqcli.tasks.labels import Classes, Numbering, check_files, number_classes
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
        name: what messages call it: its folder, or timm's string and the name of the split.
        dataset: the images; a loader copies it before it sets a transform, so that splits can be shared.
        class_names: of all classes of the network, by index; empty where unknown.
        bad_images: what happens to an image that cannot be read. ``refuse``: an error names it. ``skip``: in
            training the next one takes its place; in evaluation its label is ``LEFT_OUT`` (-1), to be counted
            neither right nor wrong. ``replace``: the next one takes its place in evaluation too.
        folders: class folders, or classes of the data set, and their labels; empty where unknown.
        class_order: what decided on the labels, see ``Numbering``.
        notes: what was decided for the user, or passed over, one line each.
    """

    name: str
    dataset: ImageSet | ImageStream
    class_names: tuple[str, ...]
    bad_images: BadImages = "refuse"
    folders: Mapping[str, int] = field(default_factory=dict)
    class_order: str = "data set"
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        """How many there are; of a stream, about."""
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
    """The ``split`` of ``data``, with labels that fit a network.

    Args:
        data: a folder with train/ and val/ (or validation/, test/), each with a folder per class; for ``val``
            also the folder of class folders itself; or one of timm's strings, ``PREFIX/NAME[@ROOT]``.
        split: which part.
        num_classes: of the network, or all that is known of its classes.
        bad_images: see ``Split``; the readers of hfids/ and tfds/ decide instead.
        class_order: ``timm``, ``torchvision``, or a file of class names, where the user says so.
        class_map: a file that says which class a folder is.
        exif_transpose: turn images as their EXIF orientation says.

    Raises:
        ConfigError: a file of classes that cannot be read.
        DataError: nothing there, no such split, or classes that do not fit the network.
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
        opened = _open_folder(named_path(data), split, classes, class_order, class_map, dead_images=skipped)
    dataset = replace(opened.dataset, exif_transpose=exif_transpose)
    return replace(opened, dataset=dataset, bad_images=bad_images)


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
    numbering = number_classes(
        list(images),
        classes,
        str(folder),
        order=order,
        class_map=class_map,
        beside=find_class_lists(places),
    )
    labels = numbering.labels
    source = [(file, labels[name]) for name, files in images.items() for file in files]
    dataset = ImageSet(source, [label for _, label in source], classes.count, str(folder))
    return _numbered(Split(str(folder), dataset, (), notes=(*notes, *passed_over)), numbering)


def _numbered(split: Split, numbering: Numbering) -> Split:
    return replace(
        split,
        class_names=numbering.names,
        folders=numbering.labels,
        class_order=numbering.order,
        notes=split.notes + numbering.notes,
    )


def check_same_classes(train: Split, val: Split) -> None:
    """Refuse two splits whose labels mean different things.

    Raises:
        DataError: their classes differ; the message says which.
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
    """What the folders of a split stand for: names of classes, or indices where these have none."""
    names = split.class_names
    return {name: names[label] if names else label for name, label in split.folders.items()}


def subset(split: Split, count: int, seed: int) -> Split:
    """``count`` images of ``split``, drawn evenly over its classes; all of them if it has no more.

    The same (split, seed) gives the same order whatever the count, so that a smaller subset is the beginning
    of a larger one, and classes take turns, so that its first batch shows many of them. Where the labels are
    not known beforehand (hfds/) the draw is uniform; shards (wds/) give their first images, a few each, and a
    smaller subset is a part of a larger one.

    Raises:
        DataError: a stream, which cannot be drawn from.
    """
    if (shards := sharded(split)) is not None:
        return _with_shards(split, shards.draw(count, seed))
    return replace(split, dataset=_random_access(split).pick(_order(split, seed)[:count]))


def sharded(split: Split) -> Shards | None:
    """The shards that a split is stored in, if any."""
    source = split.dataset.source
    return source if isinstance(source, Shards) else None


def _with_shards(split: Split, shards: Shards) -> Split:
    assert isinstance(split.dataset, ImageStream)
    return replace(split, dataset=replace(split.dataset, source=shards))


def _random_access(split: Split) -> ImageSet:
    if isinstance(split.dataset, ImageStream):
        raise DataError(
            f"{split.name} is a stream, from which no images can be drawn: give a folder of images"
        )
    return split.dataset


def _order(split: Split, seed: int) -> list[int]:
    """All images, shuffled, classes taking turns."""
    order = np.random.default_rng(seed).permutation(split.images)
    labels = _random_access(split).labels
    found: list[int] = (order if labels is None else _taking_turns(order, labels)).tolist()
    return found


def divide(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Two parts of ``split``, each with its part of every class: ``share`` of the images, and the rest.

    Of shards (wds/), whose labels are not known beforehand, each part gets its share of every file.

    Raises:
        DataError: a stream, or a part without an image.
    """
    count = round(share * split.images)
    if not 0 < count < split.images:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, too few to hold {share:.0%} of them out: "
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


def some_classes(split: Split, count: int, seed: int) -> Split:
    """The images of ``count`` classes of ``split``, drawn by ``seed``; labels and the number of classes stay.

    Raises:
        DataError: a stream, or labels that are not known beforehand.
    """
    labels = _random_access(split).labels
    if labels is None:
        raise DataError(f"the labels of {split.name} are not known beforehand: classes cannot be drawn")
    present = sorted(set(labels))
    chosen = set(np.random.default_rng(seed).permutation(present)[:count].tolist())
    kept = [index for index, label in enumerate(labels) if label in chosen]
    return replace(split, dataset=_random_access(split).pick(kept))


def _taking_turns(order: "np.ndarray[Any, np.dtype[np.int64]]", labels: Sequence[int]) -> Any:
    """``order`` so rearranged that first comes the first image of each class, then the second of each."""
    seen: Counter[int] = Counter()
    turns = []
    for index in order:
        turns.append(seen[labels[index]])
        seen[labels[index]] += 1
    return order[np.argsort(turns, kind="stable")]


def _open_shards(
    data: str, split: SplitName, classes: Classes, order: str | None, class_map: str | None
) -> Split:
    """Tar files in the layout that timm reads, whose labels are numbers."""
    name, _, root = data.partition("@")
    root = os.path.expanduser(root or name.partition("/")[2])
    found, parts = read_split(root, _SPLIT_SYNONYMS[split], data)
    title = f"{data} ({found})"
    return _by_number(
        Split(title, ImageStream(Shards(root, parts), classes.count, title), ()), classes, order, class_map
    )


def _by_number(split: Split, classes: Classes, order: str | None, class_map: str | None) -> Split:
    """A split whose labels are numbers without names: those of the network, unless a class map says otherwise.

    Raises:
        DataError: an order of names, or a map from names.
    """
    if order is not None:
        raise DataError(
            f"{split.name} has numbers for labels and no class names, so they cannot be reordered: remove "
            "`data.class_order`"
        )
    if class_map is None:
        return replace(split, class_names=classes.names)
    mapped = read_class_map(named_path(class_map), ())
    if wrong := [name for name in mapped if not name.isdecimal()]:
        raise DataError(
            f"{split.name} has numbers for labels, and {class_map} maps {some(wrong, 3)}: give lines "
            "`LABEL CLASS`"
        )
    numbering = number_classes(list(mapped), classes, split.name, class_map=class_map)
    relabel = {int(name): label for name, label in numbering.labels.items()}
    return _numbered(replace(split, dataset=replace(split.dataset, relabel=relabel)), numbering)


def _open_named(
    data: str, split: SplitName, classes: Classes, order: str | None, class_map: str | None
) -> Split:
    """A data set that timm knows by name, under the first name of the split that it has."""
    from timm.data import create_dataset

    name, _, root = data.partition("@")
    prefix = name.partition("/")[0].lower()
    where = root or {"hfds": None, "hfids": None}.get(prefix, ".")
    failures = []
    for synonym in _SPLIT_SYNONYMS[split]:
        try:
            opened = create_dataset(
                name, root=where, split=synonym, is_training=split == "train", download=False
            )
            break
        except ImportError as error:
            raise DataError(
                f"{data} needs a package that is missing ({error}): install it, or give a folder of images"
            ) from error
        except Exception as error:  # whatever the library behind the prefix raises
            failures.append(" ".join(str(error).split()) or type(error).__name__)
    else:
        raise DataError(
            f"cannot open the {split} split of {data} in {where or 'its cache'} ({failures[0]}): "
            f"check the name, or say where it is stored with {name}@ROOT"
        )

    title = f"{data} ({synonym})"
    if prefix in _STREAMED:
        return _by_number(
            Split(title, ImageStream(opened, classes.count, title), ()), classes, order, class_map
        )
    if hasattr(opened, "loader"):
        opened.loader = (
            str  # of torchvision's folders: the path, since its own reading clips what has more than 8 bits
        )
    labels = getattr(opened, "targets", None)
    source = getattr(opened, "reader", opened)  # past timm's own reading, which takes a neighbour in silence
    dataset = ImageSet(source, None if labels is None else list(map(int, labels)), classes.count, title)
    plain = Split(title, dataset, ())
    names = _class_names(opened)
    if not names or len(set(names)) < len(names):
        return _by_number(plain, classes, order, class_map)
    numbering = number_classes(names, classes, title, order=order, class_map=class_map, in_order=True)
    relabel = {place: numbering.labels[name] for place, name in enumerate(names)}
    if any(place != label for place, label in relabel.items()):
        labels = None if dataset.labels is None else [relabel[label] for label in dataset.labels]
        plain = replace(plain, dataset=replace(dataset, labels=labels, relabel=relabel))
    return _numbered(plain, numbering)


def _class_names(opened: Any) -> tuple[str, ...]:
    """In the order of their labels; those of torchvision's ImageNet are synsets."""
    names = getattr(opened, "wnids", None) or getattr(opened, "classes", None)
    if names is not None:
        return tuple(names)
    indices: dict[str, int] = getattr(getattr(opened, "reader", None), "class_to_idx", {})
    return tuple(sorted(indices, key=indices.__getitem__))


def check_there(data: str, split: SplitName) -> None:
    """Refuse a folder that has no such split; nothing in it is opened, and no name of timm's is looked up.

    Raises:
        DataError: says what is missing.
    """
    prefix = data.partition("/")[0].lower()
    if prefix not in (_SHARDED, *_RANDOM_ACCESS, *_STREAMED) or named_path(data).exists():
        find_split(named_path(data), split)


def fingerprint(split: Split) -> str:
    """``COUNT:SHA256`` over what is known of the images of ``split``, in order.

    Of a folder these are file names, relative to it, and labels, so that a data set may be moved; of shards the names
    of the files and how many images each holds; of other named sets the name, without where it is stored, their
    number, and the labels where they are known.
    """
    hashed = hashlib.sha256()
    for line in _lines(split):
        hashed.update(line.encode(errors="surrogateescape") + b"\n")
    return f"{split.images}:{hashed.hexdigest()}"


def check_fingerprint(kept: str, split: Split, called: str, then: str = "the run started with") -> None:
    """Refuse other images than those that a run started with.

    Args:
        kept: what ``fingerprint`` gave then.
        split: as it is now.
        called: the split's name in the message, such as ``training``.
        then: who saw the others, in the message.

    Raises:
        DataError: they differ.
    """
    if fingerprint(split) == kept:
        return
    before = kept.partition(":")[0]
    count = int(before) if before.isdecimal() else -1
    counts = f"{count:,} expected, {split.images:,} found"
    if count == split.images:
        counts = f"{count:,} expected and found, with other names or labels"
    raise DataError(
        f"the {called} images in {split.name} are not those that {then} ({counts}): "
        "restore them, or start again with `overwrite=True`"
    )


def _lines(split: Split) -> Iterator[str]:
    """What the fingerprint is of; NUL, which no name holds, stands between name and number."""
    for label, meant in sorted((split.dataset.relabel or {}).items()):
        yield f"\0{label}\0{meant}"
    if (shards := sharded(split)) is not None:
        for part in shards.parts:
            yield f"{part.file}\0{part.images}\0{part.start}\0{part.stop}"
        return
    dataset = split.dataset
    if isinstance(dataset, ImageSet) and isinstance(dataset.source, list):
        folder = os.path.join(split.name, "")  # the split is called by it
        for file, label in dataset.source:
            yield f"{file.removeprefix(folder)}\0{label}".replace(os.sep, "/")
        return
    yield re.sub(r"@.*(?= \(\w+\)$)", "", split.name)
    yield str(split.images)
    if isinstance(dataset, ImageSet) and dataset.labels is not None:
        yield from map(str, dataset.labels)
