"""The images of a search: parts of the training split, so that the validation split stays unseen.

drawn       ``search.images`` of ``search.classes`` classes, all where nothing is said
divided     held out, and the rest to train on, each with its part of every class
scoring     the same few held-out images for every configuration, kept in memory
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

from torch import Tensor

from saqcli.algorithms.searchers import SearchImages
from saqcli.config import SearchSection
from saqcli.io.batches import Loader
from saqcli.io.data import divide, some_classes, subset
from saqcli.io.loaders import read_all
from saqcli.progress import Progress
from saqcli.workflows.setup import Images, validation_loader

Batch = tuple[Tensor, Tensor]


def search_images(images: Images, section: SearchSection, progress: Progress) -> SearchImages:
    """The parts of ``images.train`` that a search looks at.

    Raises:
        DataError: a stream, or too few images.
    """
    split = images.train
    if section.classes is not None:
        split = some_classes(split, section.classes, images.seed)
    if section.images is not None:
        split = subset(split, section.images, images.seed)
    held_out, training = divide(split, section.held_out, images.seed)
    plain = images.section.model_copy(update={"augmentation": "none"})
    scoring = validation_loader(
        held_out, images.preprocessing, images.section, images.device, images.seed, section.scoring_images
    )
    return SearchImages(
        training=replace(images, train=training).training(),
        held_out=replace(images, train=held_out, section=plain).training(),
        scoring=Kept(scoring, progress),
        whole=replace(images, train=split).training(),
    )


class Kept(Sequence[Batch]):
    """The batches of a loader, read once and kept; images that could not be read are left out."""

    def __init__(self, loader: Loader, progress: Progress) -> None:
        self._loader, self._progress = loader, progress
        self._batches: list[Batch] | None = None

    def __len__(self) -> int:
        return len(self._read())

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        return self._read()[index]

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._read())

    def _read(self) -> list[Batch]:
        if self._batches is None:
            self._batches = read_all(self._loader, self._progress, "evaluate")
        return self._batches
