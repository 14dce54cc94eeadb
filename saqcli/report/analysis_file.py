"""The file of a reading, ``INSTRUMENT.json``: what an instrument measured, of which model, on which images."""

import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from saqcli.serialization import json_text, printable
from saqcli.units import counted


class SubjectMetadata(BaseModel):
    """The model and the images of an analysis.

    Attributes:
        target: as given.
        model: canonical name of the network.
        sha256: hash of all tensors of the model.
        file_sha256: of the file that it was read from; None of a float model, and in files of earlier versions.
        latent_weights: whether its latent weights were available.
        split: ``train``, ``val``, or the name of another split of the data.
        images: number of images.
        images_sha256: hash of the images, their labels and batch sizes.
        seed: random seed of the draw of images.
        loss: mean cross-entropy on the images.
        top1: percent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    model: str
    sha256: str
    file_sha256: str | None = None
    latent_weights: bool
    split: str
    images: int
    images_sha256: str
    seed: int
    loss: float
    top1: float


class AnalysisFile(BaseModel):
    """``INSTRUMENT.json``: a reading with its model, images and settings.

    Attributes:
        schema_version: version of the format.
        saq_version: version of saq that wrote it.
        instrument: name in ``INSTRUMENTS``.
        finished: whether the measurement is complete.
        subject: the model and the images.
        settings: the settings that the reading depends on.
        reading: the reading.
        sha256: hash of the reading, which detects manual changes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    saq_version: str
    instrument: str
    finished: bool
    subject: SubjectMetadata
    settings: dict[str, Any]
    reading: dict[str, Any]
    sha256: str


def images_of(count: int, split: str) -> str:
    """The images of an analysis, for people.

    Example:
        >>> images_of(500, "train"), images_of(1, "val"), images_of(20, "holdout")
        ('500 training images', '1 validation image', '20 images of holdout')
    """
    kind = {"train": "training image", "val": "validation image"}.get(split)
    return counted(count, kind) if kind else f"{counted(count, 'image')} of {printable(split, 60)}"


def digest_of(tree: dict[str, Any]) -> str:
    """The hash of a reading, in hexadecimal."""
    return hashlib.sha256(json_text(tree, sort_keys=True).encode()).hexdigest()
