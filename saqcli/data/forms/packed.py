"""A tar or zip of class folders, read in place: nothing is unpacked, and a name in it is only a name."""

import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from saqcli.data.archives import EncodedImage
from saqcli.data.folders import IMAGE_EXTENSIONS, is_image
from saqcli.data.forms.labelled import LARGEST_IMAGE, SYNONYMS, Labelled, names_of, no_split
from saqcli.data.unlabelled import is_shown, tar_members
from saqcli.errors import DataError
from saqcli.serialization import natural_key, printable, some
from saqcli.units import counted

SUFFIXES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
SPLITS = {name for names in SYNONYMS.values() for name in names}
_HEADER = struct.Struct("<4s5H3I2H")  # of a member of a zip


@dataclass(frozen=True)
class Archive:
    """An archive; ``whole`` if it holds one split only, whose class folders are at its top."""

    path: Path
    whole: bool = False


@dataclass(frozen=True)
class Place:
    """Where a member is: the offset of its bytes or, in a zip, of its header; their number, and that when unpacked.

    ``checksum`` is the CRC-32 of a zip's member; ``deflated`` whether it is compressed.
    """

    start: int
    size: int
    unpacked: int
    checksum: int | None = None
    deflated: bool = False


@dataclass(frozen=True)
class Members:
    """Image files in an archive.

    Attributes:
        path: of the archive.
        names: of the members.
        places: of each.
        labels: of each.
    """

    path: str
    names: tuple[str, ...]
    places: tuple[Place, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[EncodedImage, int]:
        place = self.places[index]
        with open(self.path, "rb") as file:  # opened for each, since processes must not share a position
            file.seek(place.start)
            zipped = place.checksum is not None
            content = _unzipped(file, place, self.names[index]) if zipped else file.read(place.size)
        return EncodedImage(content, f"{self.names[index]} in {self.path}"), self.labels[index]

    def lines(self) -> Iterator[str]:
        """What identifies the images, a line for each."""
        for name, place, label in zip(self.names, self.places, self.labels, strict=True):
            yield f"{name}\0{place.unpacked}\0{label}"


def _unzipped(file: IO[bytes], place: Place, name: str) -> bytes:
    """The content of the member ``name`` of a zip, whose header is next in ``file``.

    Raises:
        OSError: it is damaged.
    """
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or header[:4] != b"PK\3\4":
        raise OSError(f"{printable(name, 100)}: its place in the archive holds no file")
    *_, name_length, extra_length = _HEADER.unpack(header)
    file.seek(name_length + extra_length, os.SEEK_CUR)
    content = file.read(place.size)
    if place.deflated:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, place.unpacked + 1)
        except zlib.error:
            raise OSError(f"{printable(name, 100)}: its compressed content is damaged") from None
    if len(content) != place.unpacked or zlib.crc32(content) != place.checksum:
        raise OSError(f"{printable(name, 100)}: its size or checksum is not that of the archive")
    return content


def find_archive(data: Path, split: str) -> Archive | None:
    """The archive ``data``, or that of the split in the folder ``data``, which has no folder for it."""
    if data.is_file() and data.name.lower().endswith(SUFFIXES):
        return Archive(data)
    if data.is_dir() and not any((data / name).is_dir() for name in names_of(split)):
        for name in names_of(split):
            for suffix in SUFFIXES:
                if (path := data / f"{name}{suffix}").is_file():
                    return Archive(path, whole=True)
    return None


def open_archive(found: Archive, split: str) -> Labelled:
    """The images of one split.

    Raises:
        DataError: the archive is damaged, compressed as a whole, or without class folders or such a split.
    """
    members = _zipped(found.path) if _is_zip(found.path) else _tarred(found.path)
    rows = [(tuple(part for part in name.split("/") if part != "."), name, place) for name, place in members]
    while (
        len({parts[0] for parts, _, _ in rows}) == 1
        and min(len(parts) for parts, _, _ in rows) > 2
        and (found.whole or rows[0][0][0].lower() not in {*SPLITS, split.lower()})
    ):  # a folder around all
        rows = [(parts[1:], name, place) for parts, name, place in rows]
    folders = {parts[0].lower(): parts[0] for parts, _, _ in rows if len(parts) > 1}
    chosen = next((folders[name.lower()] for name in names_of(split) if name.lower() in folders), None)
    if found.whole or (split == "val" and SPLITS.isdisjoint(folders)):
        inside, chosen = rows, None
    elif chosen is None:
        raise no_split(found.path, split, [f"{folder}/" for folder in list(folders.values())[:5]])
    else:
        inside = [(parts[1:], name, place) for parts, name, place in rows if parts[0] == chosen]
    loose = [name for parts, name, _ in inside if len(parts) < 2]
    labelled = [(parts[0], name, place) for parts, name, place in inside if len(parts) > 1]
    title = f"{found.path} ({chosen})" if chosen else str(found.path)
    if not labelled:
        raise DataError(
            f"{title} has {counted(len(loose), 'image')} and no class folders: pack a folder per class"
        )
    classes = sorted({folder for folder, _, _ in labelled}, key=natural_key)
    index = {name: place for place, name in enumerate(classes)}
    labels = tuple(index[folder] for folder, _, _ in labelled)
    source = Members(
        str(found.path), tuple(name for _, name, _ in labelled), tuple(p for _, _, p in labelled), labels
    )
    notes = (f"{title}: ignored: {counted(len(loose), 'image')} outside the class folders",) if loose else ()
    return Labelled(source, labels, tuple(classes), title, places=(found.path.parent,), notes=notes)


def _is_zip(path: Path) -> bool:
    """Whether a file begins as a zip; of one that is called so, also with other bytes before it.

    A tar whose last member is a zip ends as a zip.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            begin = file.read(4)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): restore the file") from None
    called_so = path.suffix.lower() == ".zip"
    return begin in (b"PK\3\4", b"PK\5\6") or (called_so and zipfile.is_zipfile(path))


def _tarred(path: Path) -> list[tuple[str, Place]]:
    """Names and places of the images in a tar."""
    found = tar_members(path)
    pairs = [
        (name, Place(start, size, size))
        for name, (start, size) in zip(found.names, found.places, strict=True)
    ]
    return _checked(pairs, path)


def _zipped(path: Path) -> list[tuple[str, Place]]:
    """Names and places of the images in a zip."""
    pairs, length = [], path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise DataError(f"{path} cannot be read ({reason}): replace the file") from None
    for info in infos:
        name = info.filename
        if info.is_dir() or not is_image(name) or not is_shown(name):
            continue
        if info.flag_bits & 1:
            raise DataError(f"{path} is encrypted ({printable(name, 100)}): pack it without a password")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(
                f"{path} compresses {printable(name, 100)} by method {info.compress_type}, which is not read in place: "
                "pack it by deflate, or without compression"
            )
        if info.header_offset < 0 or info.header_offset + info.compress_size > length:
            raise DataError(
                f"{path} is truncated: {printable(name, 100)} goes beyond its end; replace the file"
            )
        deflated = info.compress_type == zipfile.ZIP_DEFLATED
        place = Place(info.header_offset, info.compress_size, info.file_size, info.CRC, deflated)
        pairs.append((name, place))
    pairs.sort(key=lambda pair: natural_key(pair[0]))
    if not pairs:
        raise DataError(f"{path} holds no image: pack {', '.join(IMAGE_EXTENSIONS)} files")
    return _checked(pairs, path)


def _checked(pairs: list[tuple[str, Place]], path: Path) -> list[tuple[str, Place]]:
    """``pairs``, with names that stay inside, sizes that fit in memory, and no name twice.

    Raises:
        DataError: one of them does not.
    """
    for name, place in pairs:
        if name.startswith("/") or "\\" in name or "\0" in name or ".." in name.split("/"):
            raise DataError(
                f"{path} has {printable(name, 100)!r}, a name that leads out of it: pack plain relative names"
            )
        if max(place.size, place.unpacked) > LARGEST_IMAGE:
            raise DataError(
                f"{path} says that {printable(name, 100)} has {place.unpacked:,} bytes, more than any image: remove it"
            )
    counts = Counter(name for name, _ in pairs)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise DataError(f"{path} holds {some(twice, 2)} twice: pack every image once")
    return pairs
