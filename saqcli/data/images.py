"""Reading images: pixels of any range become 8 bits, and unreadable files are reported by name.

From whatever numbers an image holds to the 8 bits that a network's preprocessing starts from.

Pillow converts numbers above 255 by clipping and fractions by truncation, so that TIFFs of 16 or 32 bits, or of floats,
turn white or black. Here they are read by their range, each image by itself:

===================  ==========================================================================================
declared bits        16-bit PNG, PGM and TIFF, 12-bit TIFF: white is the largest number of that many bits
32-bit integers      white is 255 if nothing is above that, or else 65535
floats               white is 1 if nothing is above that, or else 255
===================  ==========================================================================================

What these leave open is refused: negative or larger numbers, NaN, and an image whose largest number is not zero and
below a sixteenth of white. It may be dark, or of another range, and would come out black.

Reading one image after another, when some cannot be read.

A data set of a million files has a few that are truncated or are no images at all. timm passes over them with
a logged warning and takes the neighbour instead, so that an accuracy may count one image twice and nobody
knows. Here it is said: ``refuse`` names the file; ``replace`` takes the next readable image, which is right
for training; ``leave_out`` gives the label ``LEFT_OUT``, which evaluation counts neither right nor wrong.
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

DARKEST = 16  # the largest number of an image is at least white over this
_ROUNDING = 1e-4  # by which a float may pass white, relative

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
    """The image in colour ``mode``, RGB or L, whatever numbers it holds.

    Args:
        image: open or in memory.
        mode: as Pillow names it.
        exif_transpose: turn it as its EXIF orientation says. Pillow turns a TIFF by itself.

    Raises:
        ValueError: nobody can tell what its numbers show.
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
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    elif image.mode in (
        "La",
        "RGBa",
    ):  # colours times transparency, from which Pillow goes one step at a time
        image = image.convert(image.mode.upper())
    elif image.mode == "LAB":
        image = image.convert("RGB")
    return image.convert(mode)


def _declared(image: Image.Image) -> tuple[tuple[int, ...], bool]:
    """The numbers that may be white by the file's own format; and whether black is that number instead.

    Raises:
        ValueError: a TIFF of signed 8-bit numbers, which Pillow reads as others.
    """
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0]
    signed = _SIGNED in tags.get(_SAMPLE_FORMAT, ())
    if signed and bits <= 8:
        raise ValueError("its numbers are signed 8-bit ones: save it unsigned")
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG"))
    inverted = tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    if signed and bits == 16:
        return (255, 2**15 - 1), inverted
    if sixteen and not signed:
        return (2**bits - 1,), inverted
    return ((1, 255) if image.mode == "F" else (255, 65535)), inverted


def _is_deep(image: Image.Image) -> bool:
    """Whether the file has 16 bits a colour, of which Pillow keeps the upper 8."""
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
    """Numbers as 8 bits, where the first of ``whites`` that nothing exceeds is 255."""
    low, high = pixels.min().item(), pixels.max().item()
    whole = pixels.dtype.kind in "iu"
    spare = 0 if whole else _ROUNDING
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("it has numbers that are NaN or infinite")
    if low < -spare:
        raise ValueError(f"its numbers reach down to {low:g}, below black: save it with 0 as black")
    white = next((each for each in whites if high <= each * (1 + spare)), None)
    if white is None:
        raise ValueError(
            f"its numbers reach {high:g}, so nobody can tell which one is white: save it with 8 bits"
        )
    if 0 < high * DARKEST < white:
        raise ValueError(
            f"its numbers reach {high:g} of {white}, so it is dark or has another range: save it with 8 bits"
        )
    if whole:
        return (pixels >> max(0, white.bit_length() - 8)).astype(np.uint8)
    return np.rint(np.clip(pixels / white, 0, 1) * 255).astype(np.uint8)


def _check_upper_half(image: Image.Image) -> None:
    """Refuse an image whose 16-bit colours are all in the lowest sixteenth, of which the upper 8 bits show nothing."""
    bands = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name not in "AaX"]
    if max(int(np.asarray(band).max()) for band in bands) < 256 // DARKEST:
        raise ValueError(
            f"its 16-bit colours are below {65536 // DARKEST} of 65535, so it is dark or has another range: save it "
            "with 8 bits"
        )


def _turned(image: Image.Image) -> Image.Image:
    """The image as its EXIF orientation says; as it is where that cannot be read."""
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # whatever Pillow raises on damaged metadata
        turn = None
    return image if turn is None else image.transpose(turn)


LEFT_OUT = -1  # the label of an image that could not be read and must not be counted

Encoded = str | IO[bytes] | Image.Image
Unreadable = Literal["refuse", "replace", "leave_out"]

# No others, whatever a file is called: some of Pillow's formats are programs that another program runs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

# What Pillow's decoders raise on damaged files.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


class Source(Protocol):
    """Images with their labels, in any order: a list, a torchvision data set, a timm reader."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int, /) -> tuple[Encoded, int]:
        """An image, or the file that holds it, and its label."""


class Stream(Protocol):
    """Images with their labels, one after another: timm's iterable data sets."""

    def __len__(self) -> int:
        """About how many there are."""

    def __iter__(self) -> Iterator[tuple[Encoded, int]]:
        """Each image once."""

    def set_epoch(self, count: int, /) -> None:
        """Choose the order of the next pass."""

    def set_loader_cfg(self, num_workers: int | None = None) -> None:
        """Tell how many worker processes share the stream."""


@dataclass(eq=False)
class ImageSet(Dataset[tuple[Tensor | Image.Image, int]]):
    """Labelled images with random access.

    Attributes:
        source: where they come from.
        labels: of all images, known without reading them, or None.
        num_classes: labels are below it.
        name: what messages call the set.
        transform: from the image to the tensor (C, H, W); a loader sets it.
        unreadable: what to do about an image that cannot be read.
        mode: Pillow's name of the colours that the network reads, RGB or L.
        exif_transpose: turn images as their EXIF orientation says.
        relabel: label of the source to label of the network; None where they are the same. ``labels`` are those of the
            network.
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
        """The image at ``index`` and its label, or what stands in for it if it cannot be read.

        Raises:
            DataError: an unreadable image under ``refuse``, no readable one under ``replace``, or a label
                outside [0, num_classes).
        """
        for step in range(len(self) if self.unreadable == "replace" else 1):
            place = (index + step) % len(self)
            item: Encoded | None = None
            try:
                item, label = self.source[place]
                image = decode(item, self.mode, exif_transpose=self.exif_transpose)
            except _DAMAGE as error:
                if self.unreadable == "refuse":
                    what = item if isinstance(item, str) else f"image {place} of {self.name}"
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
    """Labelled images that come one after another (wds/, hfids/, tfds/); attributes as in ``ImageSet``.

    The readers of hfids/ and tfds/ decide for themselves what happens to an image that cannot be read.
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
        """Each image; under ``replace`` the next readable one, or at the end the last, comes once more.

        Raises:
            DataError: as ``ImageSet`` does.
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
    """The image in colour ``mode``, whatever it was: grey, palette, CMYK, 16 or 32 bits, floats, animated.

    Transparency is dropped, of an animation the first frame is taken, and numbers beyond 8 bits are read by their range
    (see ``pixels.py``). Images of more pixels than Pillow deems safe (178,956,970) cannot be read.
    """
    if isinstance(item, Image.Image):
        return to_mode(item, mode, exif_transpose=exif_transpose)
    if isinstance(item, str) and not stat.S_ISREG(os.stat(item).st_mode):
        raise OSError("it is a pipe or a device")  # to open a pipe would wait for its other end
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata, and large images short of Pillow's limit
        with Image.open(item, formats=_FORMATS) as opened:
            return to_mode(opened, mode, exif_transpose=exif_transpose)


def check_label(label: int, num_classes: int, name: str, relabel: Mapping[int, int] | None = None) -> int:
    """``label`` as a plain integer, as ``relabel`` has it.

    Raises:
        DataError: it is outside [0, num_classes), or not in ``relabel``.
    """
    label = int(label)
    if relabel is not None:
        if label not in relabel:
            raise DataError(f"{name} has the label {label}, for which `data.class_map` has no line: add one")
        return relabel[label]
    if not 0 <= label < num_classes:
        raise DataError(
            f"{name} has the label {label}, the model classes 0 to {num_classes - 1}: give data with the model's "
            "labels, or `data.class_map=FILE` with a line `LABEL CLASS` each"
        )
    return label


def _unreadable(what: str, error: BaseException) -> DataError:
    reason = getattr(error, "strerror", None) or str(error).replace(repr(what), "")
    reason = " ".join(reason.split()).removesuffix(" file") or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "its kind of TIFF is none that Pillow reads" if _is_tiff(what) else "it is not an image"
    elif isinstance(error, FileNotFoundError):
        reason = "it is a link to nothing" if os.path.islink(what) else "it was there when the run started"
    return DataError(f"cannot read {what} ({reason}): replace or remove it, or use `data.bad_images=skip`")


def _is_tiff(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except (OSError, ValueError):
        return False
