"""Decoded images, kept as 8-bit pixels from one epoch to the next.

What is kept is the part of a network's preprocessing without random numbers: the resized and cropped evaluation view,
or the image scaled to the network's size for the augmentation ``cifar``. An image of exactly the network's size is the
same in both, and kept once. All subsets of a split share its cache. Random resized crops need the whole image, of any
size, so training with the augmentation ``imagenet`` reads its files in every epoch, and so do streams.

In memory the cache is filled while the first epoch reads the images, within a limit that is decided before. On disk it
is a file beside the run, written before the first epoch and mapped into memory:

header     one line of JSON, padded with spaces to 4,096 bytes: version, what the file holds, and the CRC-32 of the rest
pixels     8-bit, (images, channels, height, width)
labels     64-bit integers, little-endian; -1 for an image that cannot be read
whole      one byte for each image: whether it had the network's size

A file of another version, data set or preprocessing, or with another length or checksum, is made again.
"""

import json
import math
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from saqcli.data.images import LEFT_OUT, ImageSet, Unreadable
from saqcli.data.transforms import Augmentation, ImageTransform, fixed_transform
from saqcli.machine import free_memory
from saqcli.models.preprocessing import Preprocessing
from saqcli.serialization import json_text, make_folder, replacing

CacheKind = Literal["auto", "memory", "disk", "off"]
Decoded = tuple[
    Tensor, Tensor, Tensor
]  # pixels (N, C, H, W), labels (N,), whether each had the network's size (N,)

# Of the free memory, the most that is filled; the rest is left to the network, whose training needs more.
SHARES = {"auto": 1 / 4, "disk": 1 / 4, "memory": 3 / 4}
UNKNOWN_MEMORY = 2**32  # bytes taken as free where the system does not say
WHY_NOT_KEPT = "a stream, random resized crops, or too large for the free memory"
VERSION = 1
HEADER = 4096  # bytes
NOT_READ, UNREADABLE = -1, -2  # in the place of a slot


class Limit:
    """Bytes of memory that the images of a run may take, for all its splits together.

    Args:
        most: the limit.

    Attributes:
        taken: bytes reserved so far.
    """

    def __init__(self, most: float) -> None:
        self.most, self.taken = int(most), 0

    @classmethod
    def for_kind(cls, kind: CacheKind, processes: int) -> "Limit":
        """A share of the memory that is free now, divided among the processes of this machine."""
        free = free_memory()
        return cls(SHARES.get(kind, 0) * (UNKNOWN_MEMORY if free is None else free) / processes)

    def take(self, amount: int) -> bool:
        """Reserve ``amount`` bytes; False, and no change, if they exceed the limit."""
        if self.taken + amount > self.most:
            return False
        self.taken += amount
        return True


class Pixels:
    """The images of one size that were read so far: their pixels in segments, and the slot of each.

    Slots number the images over all segments. The memory of a segment is used only as it is filled.

    Args:
        images: images in the whole data set.
        shape: (C, H, W) of each.
    """

    def __init__(self, images: int, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self.labels = torch.full((images,), LEFT_OUT)
        self._whole = torch.full((images,), NOT_READ)  # slots that serve every view
        self._views: dict[Any, Tensor] = {}
        self._segments: list[tuple[int, Tensor]] = []  # first slot, pixels
        self._slots = self._room = 0  # slots in segments; images for which a segment is still to be made
        self._next = self._end = 0  # free slots of the segment that is being filled

    def reserve(self, images: int) -> None:
        """Make room for further ``images``."""
        self._room += images

    def slots(self, view: Any, places: Tensor) -> Tensor:
        """The slot of each image in a view; ``NOT_READ`` or ``UNREADABLE``, both negative, if it has none."""
        whole, own = self._whole[places], self._views.get(view)
        return whole if own is None else torch.where(whole == NOT_READ, own[places], whole)

    def put(self, view: Any, places: Tensor, decoded: Decoded) -> None:
        """Keep images that were read, in the room reserved for them."""
        pixels, labels, _ = decoded
        readable = labels != LEFT_OUT
        count = int(readable.sum())
        if count > self._end - self._next:
            size = max(self._room + self._end - self._next, count)
            self._room, self._next = 0, self._slots
            self._end = self._add(torch.empty((size, *self.shape), dtype=torch.uint8))
        if count:
            first, segment = next(each for each in reversed(self._segments) if each[0] <= self._next)
            segment[self._next - first : self._next - first + count] = pixels[readable]
        slots = torch.full_like(places, UNREADABLE)
        slots[readable] = torch.arange(self._next, self._next + count)
        self._next += count
        self._note(view, places, slots, decoded)

    def map(self, view: Any, places: Tensor, decoded: Decoded) -> None:
        """Use the pixels of ``decoded``, those of a file, without a copy."""
        slots = torch.arange(self._slots, self._slots + len(places))
        self._add(decoded[0])
        self._note(view, places, torch.where(decoded[1] == LEFT_OUT, UNREADABLE, slots), decoded)

    def _add(self, segment: Tensor) -> int:
        """Add a segment; the number of slots now."""
        self._segments.append((self._slots, segment))
        self._slots += len(segment)
        return self._slots

    def _note(self, view: Any, places: Tensor, slots: Tensor, decoded: Decoded) -> None:
        _, labels, whole = decoded
        whole = whole | (labels == LEFT_OUT)
        self.labels[places] = labels
        self._whole[places[whole]] = slots[whole]
        own = self._views.setdefault(view, torch.full_like(self._whole, NOT_READ))
        own[places[~whole]] = slots[~whole]

    def gather(self, slots: Tensor, blank: Tensor) -> Tensor:
        """The pixels in ``slots``, and ``blank`` for unreadable images: uint8 (N, C, H, W)."""
        if len(self._segments) == 1 and int(slots.min()) >= 0:
            return self._segments[0][1].index_select(0, slots)
        # Strides of a clone may differ, and with them the order of sums in convolutions.
        found = blank.new_empty((len(slots), *self.shape))
        found[:] = blank
        for first, segment in self._segments:
            here = ((slots >= first) & (slots < first + len(segment))).nonzero()[:, 0]
            found[here] = segment.index_select(0, slots[here] - first)
        return found


@dataclass
class Decoder(Dataset[tuple[Tensor, int, bool]]):
    """Reads images as a cache keeps them: pixels, label, and whether the image had the network's size.

    Attributes:
        images: the set; not transformed.
        transform: from an image to pixels, uint8 (C, H, W).
        size: (height, width) of the network.
    """

    images: ImageSet
    transform: ImageTransform
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, bool]:
        image, label = self.images[index]
        assert isinstance(image, Image.Image)
        return self.transform(image), label, (image.height, image.width) == self.size


Read = Callable[[Decoder], Iterable[Decoded]]  # all images of a decoder, in order, in batches


@dataclass(frozen=True)
class View:
    """The images of a loader in the cache of its data set.

    Attributes:
        decoder: reads an image by its place in the loader's set.
        places: place in the whole data set of each image of the loader.
        pixels: the images that were read.
        key: of the view in ``pixels``.
        prepare: maps the file of a cache on disk, and makes it if necessary; called before a pass.
        replace: whether the next readable image replaces an unreadable one.
    """

    decoder: Decoder
    places: Tensor
    pixels: Pixels
    key: Any
    prepare: Callable[[Read], None]
    replace: bool


class ImageCache:
    """The cache of one data set, for all subsets of it.

    Args:
        name: name of the file on disk.
        images: the whole data set.
        kind: ``auto`` and ``memory`` keep images in memory, ``disk`` in a file, ``off`` nothing.
        limit: of the memory; shared by the data sets of a run.
        fingerprint: identifies the images of a file.
        note: reports one line.

    Attributes:
        folder: of the file; without one, ``disk`` is ``auto``.
    """

    def __init__(
        self,
        name: str,
        images: ImageSet,
        kind: CacheKind,
        limit: Limit,
        fingerprint: Callable[[], str],
        note: Callable[[str], None],
    ) -> None:
        self._name, self._images, self._kind, self._limit = name, images, kind, limit
        self._fingerprint, self._note = fingerprint, note
        self.folder: Path | None = None
        self._pixels: dict[tuple[int, int, int], Pixels] = {}
        self._reserved: dict[Any, Tensor] = {}  # by view: whether there is room for each image
        self._mapped: set[Any] = set()

    def view(self, images: ImageSet, preprocessing: Preprocessing, augmentation: Augmentation) -> View | None:
        """The images of a loader in the cache; None if they must be read in every epoch.

        On disk is the whole data set; less than half of it is kept in memory.

        Args:
            images: the whole data set or a subset of it, in the network's colour mode.
            preprocessing: preprocessing of the network.
            augmentation: augmentation of the loader.
        """
        transform = fixed_transform(preprocessing, augmentation)
        source, found = images.places()
        if self._kind == "off" or transform is None or source is not self._images.source:
            return None
        key = ("cifar" if augmentation == "cifar" else "evaluation", preprocessing)
        shape, places = preprocessing.input_size, torch.as_tensor(found)
        pixels = self._pixels.setdefault(shape, Pixels(len(self._images), shape))
        on_disk = self._kind == "disk" and self.folder is not None and 2 * len(places) >= len(self._images)
        if not on_disk and not self._reserve(key, places, pixels):
            return None
        unreadable: Unreadable = "refuse" if images.unreadable == "refuse" else "leave_out"
        decoder = Decoder(replace(images, transform=None, unreadable=unreadable), transform, shape[1:])
        prepare = partial(self._map, decoder, pixels, key) if on_disk else _nothing
        return View(decoder, places, pixels, key, prepare, images.unreadable == "replace")

    def _reserve(self, key: Any, places: Tensor, pixels: Pixels) -> bool:
        """Make room for the images at ``places`` within the limit."""
        reserved = self._reserved.setdefault(key, torch.zeros(len(self._images), dtype=torch.bool))
        count = int((~reserved[places]).sum())
        if not self._limit.take(count * math.prod(pixels.shape)):
            return False
        reserved[places] = True
        pixels.reserve(count)
        return True

    def _map(self, decoder: Decoder, pixels: Pixels, key: Any, read: Read) -> None:
        """Add the file's images to ``pixels``; the file is made unless it is there and valid.

        Raises:
            DataError: an image cannot be read.
            CannotWrite: the disk is full or read-only.
        """
        if key in self._mapped:
            return
        assert self.folder is not None
        images = replace(self._images, mode=decoder.images.mode, unreadable=decoder.images.unreadable)
        everything, path = replace(decoder, images=images), self.folder / f"{self._name}-{key[0]}.pixels"
        header = {
            "format": "saq pixels",
            "version": VERSION,
            "images": self._fingerprint(),
            "shape": list(pixels.shape),
            "view": key[0],
            "preprocessing": asdict(key[1]),
            "mode": images.mode,
            "exif_transpose": images.exif_transpose,
            "unreadable": images.unreadable,
            "classes": images.num_classes,
            "relabel": zlib.crc32(json_text(sorted((images.relabel or {}).items())).encode()),
        }
        header = json.loads(json_text(header))
        count = len(images)
        if not path.is_file() or not _is_valid(path, header, count * (math.prod(pixels.shape) + 9)):
            if path.is_file():
                self._note(f"{path} is damaged or of other images: it is made again")
            make_folder(path.parent)
            _write(path, header, read(everything))
        pixels.map(key, torch.arange(count), _mapped(path, count, pixels.shape))
        self._mapped.add(key)


def _nothing(read: Read) -> None:
    """There is no file to prepare."""


def _write(path: Path, header: dict[str, Any], batches: Iterable[Decoded]) -> None:
    """Write a file of pixels; it appears under its name when it is complete."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        checksum, labels, whole = 0, [], []
        file.write(bytes(HEADER))
        for pixels, *rest in batches:
            content = pixels.numpy().tobytes()
            file.write(content)
            checksum = zlib.crc32(content, checksum)
            labels.append(rest[0].numpy().astype("<i8"))
            whole.append(rest[1].numpy().astype(np.uint8))
        for content in (np.concatenate(labels).tobytes(), np.concatenate(whole).tobytes()):
            file.write(content)
            checksum = zlib.crc32(content, checksum)
        file.seek(0)
        line = json_text(header | {"crc32": checksum}).encode().ljust(HEADER - 1) + b"\n"
        assert len(line) == HEADER, line
        file.write(line)


def _is_valid(path: Path, header: dict[str, Any], size: int) -> bool:
    """Whether a file has the header, ``size`` bytes after it, and their checksum."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(HEADER))
            if not isinstance(found, dict) or found != header | {"crc32": found.get("crc32")}:
                return False
            checksum = 0
            while content := file.read(2**24):
                checksum = zlib.crc32(content, checksum)
            return checksum == found["crc32"] and file.tell() == HEADER + size
    except (OSError, ValueError, RecursionError):
        return False


def _mapped(path: Path, images: int, shape: tuple[int, int, int]) -> Decoded:
    """The content of a valid file; its pixels stay on disk until they are used."""
    pixels = np.memmap(
        path, np.uint8, "c", HEADER, (images, *shape)
    )  # "c", as torch warns of read-only memory
    labels = np.fromfile(path, "<i8", images, offset=HEADER + pixels.size)
    whole = np.fromfile(path, np.bool_, images, offset=HEADER + pixels.size + labels.nbytes)
    return torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)), torch.from_numpy(whole)
