"""Writing files so that a reader never sees half of one: beside, flushed to disk, renamed into place."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from saqcli.errors import CannotWrite, RunDirectoryError

UNFINISHED = ".unfinished-"  # how names begin of what is being written
_REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "its folder is not there",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, with its suffix; renamed to ``path`` if the context ends without an
    error. The folder must be there: one that somebody took away is not made again.

    Raises:
        CannotWrite: the folder is gone or cannot be written to, or the disk is full.
    """
    try:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f"{UNFINISHED}{path.stem}.", suffix=path.suffix
        )
        os.close(handle)
    except OSError as error:
        raise cannot_write(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        with suppress(OSError):  # the disk may be read-only by now
            temporary.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> CannotWrite:
    """The error that names ``path``, why it cannot be written, and what to do."""
    reason = error.strerror or str(error)
    other = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else path
    if other.parent != path.parent:  # what it is made of could not be written
        reason += f": {other}"
    remedy = _REMEDIES.get(error.errno or 0)
    return CannotWrite(f"{path} cannot be written ({reason})" + (f": {remedy}" if remedy else ""))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as one act."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def make_folder(path: Path) -> None:
    """Make a folder and those above it, where they are not there.

    Raises:
        RunDirectoryError: that is not allowed, or something else stands there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be made: {error.strerror}") from None


def check_can_write(path: Path) -> None:
    """Refuse a folder that ``make_folder`` could not make, or in which nothing could be written.

    Raises:
        CannotWrite: what stands in the way.
    """
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise CannotWrite(f"{path} cannot be made: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CannotWrite(f"{path} cannot be written: {there} is read-only")


def remove_unfinished(folder: Path) -> None:
    """Remove what ``replacing`` left in ``folder`` when its process was killed; nobody else may be writing there."""
    for path in folder.glob(f"{UNFINISHED}*"):
        path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    """So that the new name, too, outlives a loss of power; where a folder cannot be flushed, nothing happens."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
