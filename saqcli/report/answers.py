"""The answers of a quantized network beside those of the float one, in ``answers.json``: by class, and what changed."""

import base64
import io
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from saqcli._version import __version__
from saqcli.data.datasets import Split
from saqcli.data.images import ImageSet
from saqcli.errors import SaqError
from saqcli.runs.directory import RunDirectory
from saqcli.serialization import json_text, write_text

MOST_SHOWN, MOST_LOST = 24, 16  # images in the file, and those of them that the quantized network gets wrong
SIDE, QUALITY = 112, 78  # longest side in pixels, and JPEG quality
Count = Annotated[int, Field(ge=0)]


class ClassAnswers(BaseModel):
    """The images of a class: how many, and how many each network gets right."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    images: Count
    float_right: Count
    right: Count


class ChangedImage(BaseModel):
    """An image with another answer than before.

    Attributes:
        place: its index in the split.
        label: name of its class; None without labels.
        before: class by the float network.
        after: class by the quantized network.
        pixels: longest side of the image.
        jpeg: a small copy, in Base64.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    place: Count
    label: str | None
    before: str
    after: str
    pixels: Count
    jpeg: Annotated[str, Field(pattern="^[A-Za-z0-9+/]+=*$", max_length=40_000)]


class Answers(BaseModel):
    """The content of ``answers.json``.

    Attributes:
        schema_version: version of the file format.
        saq_version: version that wrote the file.
        images: that both networks answered.
        changed: with another answer of the quantized network.
        lost: of these, right before and wrong now; None without labels.
        won: of these, wrong before and right now; None without labels.
        classes: those with images, by index; empty without labels.
        shown: some of the changed images, the lost ones first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    images: Count
    changed: Count
    lost: Count | None
    won: Count | None
    classes: list[ClassAnswers]
    shown: Annotated[list[ChangedImage], Field(max_length=MOST_SHOWN)]


def write_answers(
    run: RunDirectory, split: Split, labels: Tensor, before: Tensor, after: Tensor, *, labelled: bool
) -> None:
    """Write ``answers.json``; nothing if the answers are not of the same images.

    Args:
        run: whose directory gets it.
        split: the images, in order.
        labels: of all images, (N,); those of unreadable ones are below 0.
        before: class by the float network for every readable image.
        after: class by the quantized network for the same.
        labelled: whether labels are classes; otherwise they only say what is readable.
    """
    places = (labels >= 0).nonzero().flatten()
    if not len(places) == len(before) == len(after):
        return
    labels = labels[places]
    was, now = before == labels, after == labels
    changed = before != after
    kept = Answers(
        saq_version=__version__,
        images=len(places),
        changed=int(changed.sum()),
        lost=int((was & ~now).sum()) if labelled else None,
        won=int((now & ~was).sum()) if labelled else None,
        classes=list(_by_class(split.class_names, labels, was, now)) if labelled else [],
        shown=list(_pictures(split, places, labels if labelled else None, before, after)),
    )
    write_text(run.answers_path, json_text(kept.model_dump(mode="json"), indent=1) + "\n")


def _by_class(names: Sequence[str], labels: Tensor, was: Tensor, now: Tensor) -> Iterator[ClassAnswers]:
    for index in sorted(set(labels.tolist())):
        of = labels == index
        yield ClassAnswers(
            name=_name(names, index),
            images=int(of.sum()),
            float_right=int(was[of].sum()),
            right=int(now[of].sum()),
        )


def _name(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) and names[index] else f"class {index}"


def _pictures(
    split: Split, places: Tensor, labels: Tensor | None, before: Tensor, after: Tensor
) -> Iterator[ChangedImage]:
    """Small copies of changed images; none of a stream, which has no random access."""
    if not isinstance(split.dataset, ImageSet):
        return
    images = replace(split.dataset, transform=None, unreadable="refuse")
    for at in _chosen(labels, before, after):
        with suppress(SaqError):  # the file was removed meanwhile
            image = images[int(places[at])][0]
            assert isinstance(image, Image.Image)
            yield ChangedImage(
                place=int(places[at]),
                label=None if labels is None else _name(split.class_names, int(labels[at])),
                before=_name(split.class_names, int(before[at])),
                after=_name(split.class_names, int(after[at])),
                pixels=max(image.size),
                jpeg=_jpeg(image),
            )


def _chosen(labels: Tensor | None, before: Tensor, after: Tensor) -> list[int]:
    """Indices of images to show: lost ones from as many classes as possible, then won ones, then the others."""
    changed = (before != after).nonzero().flatten().tolist()
    if labels is None:
        return _spread(changed, before)[:MOST_SHOWN]
    lost = [at for at in changed if before[at] == labels[at]]
    won = [at for at in changed if after[at] == labels[at]]
    rest = sorted(set(changed) - {*lost, *won})
    lost, won = _spread(lost, labels), _spread(won, labels)
    return [*lost[:MOST_LOST], *won, *rest, *lost[MOST_LOST:]][:MOST_SHOWN]


def _spread(indices: list[int], classes: Tensor) -> list[int]:
    """``indices`` in turns over the classes."""
    seen: dict[int, int] = {}
    turns = []
    for at in indices:
        turn = seen[int(classes[at])] = seen.get(int(classes[at]), 0) + 1
        turns.append((turn, at))
    return [at for _, at in sorted(turns)]


def _jpeg(image: Image.Image) -> str:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=QUALITY)
    return base64.b64encode(data.getvalue()).decode()
