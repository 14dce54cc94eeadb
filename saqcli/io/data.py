"""Opening a data set by what a user calls it: a folder, or one of timm's data-set strings.

``--data DIR`` is an ImageNet-style folder (see ``folders.py``). A string such as ``torch/cifar100``,
``hfds/NAME`` or ``wds/DIR`` goes to timm; ``@ROOT`` after it says where it is stored (by default the current
folder for torch/ and tfds/, Hugging Face's cache for hfds/). Nothing is downloaded but what Hugging Face's
library fetches by itself.

A ``Split`` knows what its images and labels are; how they are fed to a network is ``loaders.py``.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from saqcli.errors import DataError
from saqcli.io.archives import read_split
from saqcli.io.folders import SplitName, find_images, find_split, number_classes, some
from saqcli.io.images import ImageSet, ImageStream
from saqcli.io.shards import Shards
from saqcli.strict import named_path
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
        class_names: in the order of their labels; of an ImageNet folder only the classes that are there.
            Empty if unknown.
        bad_images: what happens to an image that cannot be read. ``refuse``: an error names it. ``skip``: in
            training the next one takes its place; in evaluation its label is ``LEFT_OUT`` (-1), to be counted
            neither right nor wrong. ``replace``: the next one takes its place in evaluation too.
    """

    name: str
    dataset: ImageSet | ImageStream
    class_names: tuple[str, ...]
    bad_images: BadImages = "refuse"

    @property
    def images(self) -> int:
        """How many there are; of a stream, about."""
        return len(self.dataset)


def open_split(data: str, split: SplitName, *, num_classes: int, bad_images: BadImages = "refuse") -> Split:
    """The ``split`` of ``data``, with labels that fit a network of ``num_classes`` classes.

    Args:
        data: a folder with train/ and val/ (or validation/, test/), each with a folder per class; for ``val``
            also the folder of class folders itself; or one of timm's strings, ``PREFIX/NAME[@ROOT]``.
        split: which part.
        num_classes: of the network.
        bad_images: see ``Split``; the readers of hfids/ and tfds/ decide instead.

    Raises:
        DataError: nothing there, no such split, or classes that do not fit the network.
    """
    prefix = data.partition("/")[0].lower()
    if prefix == _SHARDED and not named_path(data).exists():
        return replace(_open_shards(data, split, num_classes), bad_images=bad_images)
    if prefix in _RANDOM_ACCESS + _STREAMED and not named_path(data).exists():
        return replace(_open_named(data, split, num_classes), bad_images=bad_images)
    folder = find_split(named_path(data), split)
    images = find_images(folder)
    labels = number_classes(list(images), num_classes, folder)
    source = [(file, labels[name]) for name, files in images.items() for file in files]
    dataset = ImageSet(source, [label for _, label in source], num_classes, str(folder))
    return Split(str(folder), dataset, tuple(sorted(labels, key=labels.__getitem__)), bad_images)


def check_same_classes(train: Split, val: Split) -> None:
    """Refuse two splits whose labels mean different things.

    Raises:
        DataError: their class names differ; the message says which.
    """
    differences = [
        f"only {here.name} has {some([name for name in here.class_names if name not in there.class_names])}"
        for here, there in ((train, val), (val, train))
        if set(here.class_names) - set(there.class_names)
    ]
    if differences:
        raise DataError(
            f"{train.name} and {val.name} have different classes: {'; '.join(differences)}. "
            "Give both the same class folders"
        )


def check_trained_on(split: Split, class_names: Sequence[str], num_classes: int, model: str) -> None:
    """Refuse images of other classes than a model was trained on.

    Args:
        split: to evaluate on, its labels already those of a network of ``num_classes``.
        class_names: of the training images; fewer than ``num_classes`` where folders were numbered by ImageNet.
        num_classes: of the model.
        model: what the message calls it.

    Raises:
        DataError: the classes differ.
    """
    strangers = [name for name in split.class_names if name not in set(class_names)]
    if strangers and len(class_names) == num_classes:
        raise DataError(
            f"{split.name} has the classes {some(strangers, 3)}, {model} was trained on {some(class_names, 3)}: "
            "give images of the same classes"
        )


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


def _open_shards(data: str, split: SplitName, num_classes: int) -> Split:
    """Tar files in the layout that timm reads."""
    name, _, root = data.partition("@")
    root = os.path.expanduser(root or name.partition("/")[2])
    found, parts = read_split(root, _SPLIT_SYNONYMS[split], data)
    title = f"{data} ({found})"
    return Split(title, ImageStream(Shards(root, parts), num_classes, title), ())


def _open_named(data: str, split: SplitName, num_classes: int) -> Split:
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
        return Split(title, ImageStream(opened, num_classes, title), ())
    class_names = _class_names(opened)
    if class_names and len(class_names) != num_classes:
        raise DataError(
            f"{title} has {counted(len(class_names), 'class')} ({some(class_names)}), the model {num_classes}: "
            f"give --num-classes {len(class_names)} (a new head, to be fine-tuned), "
            "or data with the model's classes"
        )
    labels = getattr(opened, "targets", None)
    source = getattr(opened, "reader", opened)  # past timm's own reading, which takes a neighbour in silence
    dataset = ImageSet(
        source, None if labels is None else [int(label) for label in labels], num_classes, title
    )
    return Split(title, dataset, class_names)


def _class_names(opened: Any) -> tuple[str, ...]:
    """In the order of their labels; torchvision's ImageNet has several names a class, of which the first."""
    if hasattr(opened, "classes"):
        return tuple(name if isinstance(name, str) else name[0] for name in opened.classes)
    indices: dict[str, int] = getattr(getattr(opened, "reader", None), "class_to_idx", {})
    return tuple(sorted(indices, key=indices.__getitem__))
