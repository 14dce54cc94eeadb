"""Reading images: conversion to 8 bits, and handling of bad files.

A network's preprocessing starts from 8 bits per colour. Pillow clips values above 255 and truncates fractions, so that
TIFFs of 16 or 32 bits, or of floats, turn white or black. Here each image is scaled by its range:

===================  ==========================================================================================
declared bits        16-bit PNG, PGM and TIFF, 12-bit TIFF: white is the largest value of that many bits
32-bit integers      white is 255 if no value is larger, otherwise 65535
floats               white is 1 if no value is larger, otherwise 255
===================  ==========================================================================================

Ambiguous images are refused: negative or larger values, NaN, and an image whose largest value is above zero but below
a sixteenth of white. Such an image may be dark or have another range, and would turn black.

A data set of a million files contains a few that are truncated or not images. timm logs a warning and uses the next
image instead, so that an accuracy may silently count an image twice. Here the treatment is explicit: ``refuse`` raises
an error with the file's name; ``replace`` uses the next readable image, as is right for training; ``leave_out`` gives
the label ``LEFT_OUT``, which evaluation counts as neither right nor wrong.
"""

import os
import stat
import struct
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from saqcli.data.transforms import ImageTransform
from saqcli.errors import DataError
from saqcli.units import counted

DARKEST = 16  # the largest value of an image must be at least white / DARKEST
_ROUNDING = 1e-4  # relative amount by which a float may exceed white

_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339  # tags of TIFF
_WHITE_IS_ZERO, _SIGNED = 0, 2
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def to_mode(image: Image.Image, mode: str, *, exif_transpose: bool = False) -> Image.Image:
    """Convert an image with values of any range to colour ``mode``, RGB or L, with 8 bits.

    Args:
        image: an opened image, or one in memory.
        mode: Pillow's name of the mode.
        exif_transpose: rotate the image by its EXIF orientation. Pillow always rotates a TIFF.

    Raises:
        ValueError: the range of its values is ambiguous.
    """
    whites, inverted = _declared(image)
    deep = _is_deep(image)
    image.load()
    if exif_transpose:
        image = _turned(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _to_bytes(np.asarray(image), whites)
        image = Image.fromarray(255 - pixels if inverted else pixels)
    elif deep:
        _check_upper_half(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns if it is converted to RGB directly
    elif image.mode in ("La", "RGBa"):  # premultiplied alpha, which Pillow converts in two steps only
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _declared(image: Image.Image) -> tuple[tuple[int, ...], bool]:
    """The possible values of white in the file's format, and whether this value is black instead.

    Raises:
        ValueError: the image is a TIFF of signed 8-bit values, which Pillow misreads.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if signed and bits <= 8:
        raise ValueError("its values are signed 8-bit integers: save it unsigned")
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if signed and bits == 16:
        return (255, 2**15 - 1), inverted
    if sixteen and not signed:
        return (2**bits - 1,), inverted
    return ((1, 255) if image.mode == "F" else (255, 65535)), inverted


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits per colour, of which Pillow keeps the upper 8."""
    for tile in getattr(image, "tile", ()):
        codec, arguments = tile[0], tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if any(isinstance(each, str) and ";16" in each for each in arguments):
            return True
        if codec.startswith("ppm") and any(isinstance(each, int) and each > 255 for each in arguments):
            return True
    return False


def _to_bytes(
    pixels: "np.ndarray[Any, np.dtype[Any]]", whites: tuple[int, ...]
) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """Scale values to 8 bits, so that white, the first of ``whites`` that no value exceeds, becomes 255."""
    low, high = pixels.min().item(), pixels.max().item()
    whole = pixels.dtype.kind in "iu"
    spare = 0 if whole else _ROUNDING
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has values that are NaN or infinite")
    if low < -spare:
        raise ValueError(f"its smallest value is {low:g}, below black: save it with 0 as black")
    white = next((each for each in whites if high <= each * (1 + spare)), None)
    if white is None:
        raise ValueError(
            f"its largest value is {high:g}, so the value of white is unknown: save it with 8 bits"
        )
    if 0 < high * DARKEST < white:
        raise ValueError(
            f"its largest value is {high:g} of {white}, so it is dark or has another range: save it with 8 bits"
        )
    if whole:
        return (pixels >> max(0, white.bit_length() - 8)).astype(np.uint8)
    return np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8)


def _check_upper_half(image: Image.Image) -> None:
    """Refuse an image whose 16-bit colours are all in the lowest sixteenth of the range.

    Raises:
        ValueError: they are, so that their upper 8 bits show nothing.
    """
    bands = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name not in "AaX"]
    if max(int(np.asarray(band).max()) for band in bands) < 256 // DARKEST:
        raise ValueError(
            f"its 16-bit colours are below {65536 // DARKEST} of 65535, so it is dark or has another range: save it "
            "with 8 bits"
        )


def _turned(image: Image.Image) -> Image.Image:
    """The image rotated by its EXIF orientation; unchanged if that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow may raise anything on damaged metadata
        turn = None
    return image if turn is None else image.transpose(turn)


LEFT_OUT = -1  # the label of an unreadable image that must not be counted

Encoded = str | IO[bytes] | Image.Image
Unreadable = Literal["refuse", "replace", "leave_out"]

# Only these formats, whatever the file's suffix: Pillow passes some others to external programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# Exceptions that Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class Source(Protocol):
    """Labelled images with random access: a list, a torchvision data set, a timm reader."""

    def __len__(self) -> int:
        """Number of images."""

    def __getitem__(self, index: int, /) -> tuple[Encoded, int]:
        """An image, or its file, and its label."""


class Stream(Protocol):
    """Labelled images in sequence: timm's iterable data sets."""

    def __len__(self) -> int:
        """Approximate number of images."""

    def __iter__(self) -> Iterator[tuple[Encoded, int]]:
        """Each image once."""

    def set_epoch(self, count: int, /) -> None:
        """Set the epoch of the next pass, which determines its order."""

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Set the number of worker processes that share the stream."""


@dataclass(eq=False)
class ImageSet(Dataset[tuple[Tensor | Image.Image, int]]):
    """Labelled images with random access.

    Attributes:
        source: source of images and labels.
        labels: labels of all images, as the network numbers them; None if unknown before reading.
        num_classes: number of classes; labels must be smaller.
        name: name of the set in messages.
        transform: function from an image to a tensor (C, H, W); set by a loader.
        unreadable: treatment of an image that cannot be read.
        mode: Pillow's name of the network's colour mode, RGB or L.
        exif_transpose: rotate images by their EXIF orientation.
        relabel: label of the source to label of the network; None if they are equal.
    """

    source: Source
    labels: Sequence[int] | None
    num_classes: int
    name: str
    transform: ImageTransform | None = None
    unreadable: Unreadable = "refuse"
    mode: str = "RGB"
    exif_transpose: bool = False
    relabel: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor | Image.Image, int]:
        """The image at ``index`` and its label, or a replacement if it cannot be read.

        Raises:
            DataError: the image is unreadable under ``refuse``, no image is readable under ``replace``, or the label
                is outside [0, num_classes).
        """
        for step in range(len(self) if self.unreadable == "replace" else 1):
            place = (index + step) % len(self)
            item: Encoded | None = None
            try:
                item, label = self.source[place]
                image = decode(item, self.mode, exif_transpose=self.exif_transpose)
            except _DAMAGE as error:
                if self.unreadable == "refuse":
                    unnamed = f"image {place} of {self.name}"
                    what = item if isinstance(item, str) else getattr(item, "name", unnamed)
                    raise _unreadable(what, error) from error
                continue
            return self._transformed(image), check_label(label, self.num_classes, self.name, self.relabel)
        if self.unreadable == "replace":
            raise DataError(
                f"none of the {counted(len(self), 'image')} of {self.name} can be read: check the files"
            )
        return self._transformed(Image.new(self.mode, (32, 32))), LEFT_OUT

    def _transformed(self, image: Image.Image) -> Tensor | Image.Image:
        return image if self.transform is None else self.transform(image)

    def pick(self, indices: Sequence[int]) -> "ImageSet":
        """The set of the images at ``indices``, in that order."""
        labels = None if self.labels is None else [self.labels[index] for index in indices]
        return replace(self, source=_Picked(self.source, indices), labels=labels)

    def places(self) -> tuple[Source, Sequence[int]]:
        """The source from which the images were picked, and the place in it of each."""
        source: Source = self.source
        places: Sequence[int] = range(len(source))
        while isinstance(source, _Picked):
            places, source = [source.indices[place] for place in places], source.source
        return source, places


@dataclass(frozen=True)
class _Picked:
    """Some of the images of a source."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Encoded, int]:
        return self.source[self.indices[index]]


@dataclass(eq=False)
class ImageStream(IterableDataset[tuple[Tensor | Image.Image, int]]):
    """Labelled images in sequence (wds/, hfids/, tfds/); attributes as in ``ImageSet``.

    The readers of hfids/ and tfds/ handle unreadable images themselves.
    """

    source: Stream
    num_classes: int
    name: str
    transform: ImageTransform | None = None
    unreadable: Unreadable = "refuse"
    mode: str = "RGB"
    exif_transpose: bool = False
    relabel: Mapping[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor | Image.Image, int]]:
        """All images; under ``replace`` the next readable image, or at the end the last one, is repeated.

        Raises:
            DataError: as in ``ImageSet``.
        """
        owed = 0
        image, label = None, LEFT_OUT
        for item, given in self.source:
            given = check_label(given, self.num_classes, self.name, self.relabel)
            try:
                image, label = decode(item, self.mode, exif_transpose=self.exif_transpose), given
            except _DAMAGE as error:
                if self.unreadable == "refuse":
                    raise _unreadable(getattr(item, "name", f"an image of {self.name}"), error) from error
                if self.unreadable == "replace":
                    owed += 1
                else:
                    yield self._transformed(Image.new(self.mode, (32, 32))), LEFT_OUT
                continue
            for _ in range(owed + 1):
                yield self._transformed(image), label
            owed = 0
        if owed and image is None:
            raise DataError(
                f"none of the {counted(owed, 'image')} of {self.name} can be read: check the files"
            )
        for _ in range(owed):
            assert image is not None
            yield self._transformed(image), label

    def _transformed(self, image: Image.Image) -> Tensor | Image.Image:
        return image if self.transform is None else self.transform(image)


def decode(item: Encoded, mode: str = "RGB", *, exif_transpose: bool = False) -> Image.Image:
    """Read any image (grey, palette, CMYK, 16 or 32 bits, floats, animated) in colour ``mode``.

    Transparency is dropped, the first frame of an animation is used, and values beyond 8 bits are scaled by their range
    (see ``to_mode``). Images of more pixels than Pillow deems safe (178,956,970) cannot be read.
    """
    if isinstance(item, Image.Image):
        return to_mode(item, mode, exif_transpose=exif_transpose)
    if isinstance(item, str) and not stat.S_ISREG(os.stat(item).st_mode):
        raise OSError("it is a pipe or a device")  # opening a pipe would block until it is written to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, and large images below Pillow's limit
        with Image.open(item, formats=_FORMATS) as opened:
            return to_mode(opened, mode, exif_transpose=exif_transpose)


def check_label(label: int, num_classes: int, name: str, relabel: Mapping[int, int] | None = None) -> int:
    """``label`` as a plain integer, mapped by ``relabel``.

    Raises:
        DataError: the label is outside [0, num_classes), or not in ``relabel``.
    """
    label = int(label)
    if relabel is not None:
        if label not in relabel:
            raise DataError(f"{name} has the label {label}, but `data.class_map` has no line for it: add one")
        return relabel[label]
    if not 0 <= label < num_classes:
        raise DataError(
            f"{name} has the label {label}, the model has classes 0 to {num_classes - 1}: give data with the model's "
            "labels, or `data.class_map=FILE` with lines `LABEL CLASS`"
        )
    return label


def _unreadable(what: str, error: BaseException) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).replace(repr(what), "")
    reason = " ".join(reason.split()).removesuffix(" file") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "Pillow cannot read this kind of TIFF" if _is_tiff(what) else "it is not an image"
    elif isinstance(error, FileNotFoundError):
        reason = "it is a broken link" if os.path.islink(what) else "it existed when the run started"
    return DataError(f"cannot read {what} ({reason}): replace or remove it, or use `data.bad_images=skip`")


def _is_tiff(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except (OSError, ValueError):
        return False
