"""Labelled images with random access, in the form that ``datasets`` numbers and loads."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from saqcli.errors import DataError

SYNONYMS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "test", "testing")}
LARGEST_IMAGE = 2**28  # bytes of one encoded image


class LabelledSource(Protocol):
    """The images of a form, with random access."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        """An encoded or decoded image, and the index of its class in ``Labelled.names``, or its number."""

    def lines(self) -> Iterator[str]:
        """What identifies the images, a line for each."""


@dataclass(frozen=True)
class Labelled:
    """The images of one split.

    Attributes:
        source: the images.
        labels: of all images: indices in ``names``, or the numbers of the data.
        names: names of the classes; empty if the labels are numbers.
        title: name in messages.
        in_order: whether ``names`` is the order of the data set; otherwise the network's rule numbers them.
        places: where class lists may stand, the nearest first.
        notes: what was ignored, one line each.
    """

    source: LabelledSource
    labels: Sequence[int]
    names: tuple[str, ...]
    title: str
    in_order: bool = False
    places: tuple[Path, ...] = ()
    notes: tuple[str, ...] = field(default=())


def names_of(split: str) -> tuple[str, ...]:
    """The names that a split may have, the best first: its synonyms, or the name alone."""
    return SYNONYMS.get(split, (split,))


def no_split(data: Path | str, split: str, there: Sequence[str]) -> DataError:
    """The error for a data set without a split."""
    found = f"has {', '.join(there)}" if there else "has no splits"
    return DataError(
        f"{data} {found}, and no {' or '.join(names_of(split))}: give other data, or `data.split`"
    )


def numbered(texts: Sequence[str], classes: Collection[str] = ()) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Labels and class names of texts, of which ``classes`` are further ones; without names if all are numbers."""
    every = {*texts, *classes}
    if every and all(text.isascii() and text.isdecimal() and len(text) < 10 for text in every):
        return tuple(map(int, texts)), ()
    places = {name: place for place, name in enumerate(sorted(every))}
    return tuple(places[text] for text in texts), tuple(places)
