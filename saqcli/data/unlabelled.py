"""Images without labels, for calibration: any folder, a tar, or a list file.

A folder may be flat or nested; its folders mean nothing. A tar is read in place, member by member, so it must not be
compressed. A list file holds one path a line, relative to itself. Broken images are found when they are read, and
treated as those of any other data set.
"""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from saqcli.data.archives import EncodedImage
from saqcli.data.folders import IMAGE_EXTENSIONS, find_loose_images, is_image
from saqcli.errors import DataError
from saqcli.serialization import natural_key, printable, read_text

NO_LABEL = 0  # stands for the label, since batches have one; nothing is computed from it
LONGEST_LIST = 2**28  # bytes of a list file
GIVE = "give a folder of images, a tar, or a list file with one path a line"


@dataclass(frozen=True)
class LooseFiles:
    """Image files.

    Attributes:
        root: folder that the names are relative to.
        names: of the files, as they identify the images; absolute ones stay as they are.
    """

    root: str
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[str, int]:
        return os.path.join(self.root, self.names[index]), NO_LABEL

    def lines(self) -> Iterator[str]:
        """What identifies the images, a line for each."""
        for name in self.names:
            yield name.replace(os.sep, "/")


@dataclass(frozen=True)
class TarMembers:
    """Image files in a tar, read in place.

    Attributes:
        path: of the tar.
        names: of the members.
        places: offset of each in the tar, and its size, in bytes.
    """

    path: str
    names: tuple[str, ...]
    places: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int, /) -> tuple[EncodedImage, int]:
        start, size = self.places[index]
        with open(self.path, "rb") as file:  # opened for each, since processes must not share a position
            file.seek(start)
            content = file.read(size)
        return EncodedImage(content, f"{self.names[index]} in {self.path}"), NO_LABEL

    def lines(self) -> Iterator[str]:
        """What identifies the images, a line for each."""
        for name, (_, size) in zip(self.names, self.places, strict=True):
            yield f"{name}\0{size}"


Unlabelled = LooseFiles | TarMembers


def check_unlabelled(path: Path) -> None:
    """Check that ``path`` may hold images, without listing them.

    Raises:
        DataError: it does not exist, or is neither a folder, a tar, nor a text.
    """
    if path.is_dir():
        return
    if not path.exists():
        what = "is a broken link" if path.is_symlink() else "does not exist"
        raise DataError(f"`data.calibration={path}` {what}: {GIVE}")
    if not path.is_file():
        raise DataError(f"`data.calibration={path}` is neither a folder nor a file: {GIVE}")
    if is_image(path.name):
        raise DataError(f"`data.calibration={path}` is a single image: {GIVE}")


def find_unlabelled(path: Path, *, dead_images: bool = False) -> tuple[Unlabelled, tuple[str, ...]]:
    """The images of ``path`` in natural order, or in that of the list, and notes about what was ignored.

    Args:
        path: a folder, a tar, or a list file.
        dead_images: also take broken links, and listed files that do not exist, which are skipped when read.

    Raises:
        DataError: there are no images, or ``path`` cannot be read.
    """
    check_unlabelled(path)
    if path.is_dir():
        names, notes = find_loose_images(path, dead_images=dead_images)
        return LooseFiles(str(path), names), notes
    try:
        is_tar = tarfile.is_tarfile(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}): {GIVE}") from None
    if is_tar:
        return tar_members(path), ()
    return _listed(path, dead_images=dead_images), ()


def tar_members(path: Path) -> TarMembers:
    """The image files in a tar; links, hidden files and all others are ignored."""
    try:
        with tarfile.open(path, "r:") as archive:
            found = sorted(
                (
                    (member.name, member.offset_data, member.size)
                    for member in archive
                    if member.isreg()
                    and not member.issparse()
                    and is_image(member.name)
                    and is_shown(member.name)
                ),
                key=lambda each: natural_key(each[0]),
            )
    except (tarfile.TarError, OSError, EOFError) as error:
        if _is_compressed(path):
            raise DataError(
                f"{path} is compressed, and its images cannot be read in place: unpack it, or make it a plain tar"
            ) from None
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read ({reason}): replace the file") from None
    length = path.stat().st_size
    if found and max(start + size for _, start, size in found) > length:
        raise DataError(f"{path} is truncated: its images go beyond its {length:,} bytes; replace the file")
    if not found:
        raise DataError(f"{path} holds no image: give a tar with {', '.join(IMAGE_EXTENSIONS)} files")
    return TarMembers(
        str(path), tuple(name for name, _, _ in found), tuple((start, size) for _, start, size in found)
    )


def is_shown(name: str) -> bool:
    """Whether no part of the name of a member is hidden, as those that macOS adds to archives."""
    parts = name.removeprefix("./").split("/")
    return parts[0] != "__MACOSX" and not any(part.startswith(".") and part != ".." for part in parts)


def _is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def _listed(path: Path, *, dead_images: bool) -> LooseFiles:
    """The files that a list names; blank lines are ignored."""
    text = read_text(path, f"the list {path}", DataError, most=LONGEST_LIST)
    root, names = path.parent, []
    for number, line in enumerate(text.splitlines(), 1):
        name = line.strip()
        if not name:
            continue
        file = os.path.join(root, name)
        if "\0" in name or os.path.isdir(file) or not (dead_images or os.path.exists(file)):
            what = "a folder" if "\0" not in name and os.path.isdir(file) else "no file"
            raise DataError(
                f"{path} line {number} names {what}, {printable(name, 200)}: give one image a line, its path relative "
                f"to {root}"
            )
        names.append(name)
    if not names:
        raise DataError(f"{path} names no image: {GIVE}")
    return LooseFiles(str(root), tuple(names))
