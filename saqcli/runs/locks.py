"""Locks that admit one process at a time to a run directory.

The file ``.lock`` names the owner (process, host, start time), and the owner holds an operating-system lock on it,
which ends with the process. A name without a lock belongs to a killed process: the lock is taken over. POSIX record
locks are used, since forked loader workers do not inherit them. On a file system without locks the name alone decides:
an ended process of this host is not an owner.
"""

import errno
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from saqcli.errors import RunDirectoryError
from saqcli.serialization import cannot_write, json_text

NAME = ".lock"
TRIES = 20
SECONDS_BETWEEN_TRIES = 0.05
_HELD = (errno.EACCES, errno.EAGAIN)


@dataclass(frozen=True)
class Owner:
    """The owner of a lock.

    Attributes:
        pid: process id.
        host: host name.
        since: start time, UTC.
    """

    pid: int
    host: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @property
    def gone(self) -> bool:
        """Whether the process ran on this host and has ended; False for other hosts, and on Windows."""
        if self.host != socket.gethostname() or os.name == "nt":  # os.kill would end the process there
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        return False


_OURS: dict[Path, Owner] = {}  # held by this process: opening and closing such a file would release its lock


class Lock:
    """The lock of a folder.

    Args:
        folder: existing folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._handle: int | None = None

    def take(self) -> Owner | None:
        """Acquire the lock.

        Returns:
            The last owner if it was killed: its name is left without a lock.

        Raises:
            RunDirectoryError: another process is the owner.
            CannotWrite: the folder cannot be written to.
        """
        for last in (number == TRIES for number in range(1, TRIES + 1)):
            try:
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError as error:
                raise cannot_write(self.path, error) from None
            locked = _lock(handle)
            before = _read(handle)
            if locked is False or (
                locked is None and before and before.pid != os.getpid() and not before.gone
            ):
                os.close(handle)
                if last or locked is None or (before and not before.gone):
                    raise RunDirectoryError(self.refusal(before, certain=locked is False))
                time.sleep(
                    SECONDS_BETWEEN_TRIES
                )  # another process is reading the owner or acquiring the lock
                continue
            if _same_file(handle, self.path):  # the last owner may have removed it in the meantime
                break
            os.close(handle)
        else:
            raise RunDirectoryError(f"{self.path} is repeatedly created and removed: use another `run_dir`")
        self._handle = handle
        owner = Owner(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(timespec="seconds"))
        _OURS[self.path.resolve()] = owner
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json_text(asdict(owner)).encode())
        except OSError as error:
            self.release()
            raise cannot_write(self.path, error) from None
        return before if before and before.pid != os.getpid() else None

    def holder(self) -> tuple[Owner | None, bool]:
        """The named owner, and whether it is running; changes nothing."""
        ours = _OURS.get(self.path.resolve())
        if ours and ours.pid == os.getpid() and self.path.is_file():
            return ours, True
        try:
            handle = os.open(self.path, os.O_RDONLY)
        except OSError:
            return None, False
        try:
            named, locked = _read(handle), _lock(handle, shared=True)
        finally:
            os.close(handle)
        return named, locked is False or (locked is None and named is not None and not named.gone)

    def release(self) -> None:
        """Release the lock; no effect if this process does not hold it."""
        if self._handle is None:
            return
        if _same_file(self._handle, self.path):
            with suppress(OSError):  # the disk may be read-only by now
                os.ftruncate(
                    self._handle, 0
                )  # an open file cannot be removed on Windows, but it can be without a name
                self.path.unlink(missing_ok=True)
        _OURS.pop(self.path.resolve(), None)
        os.close(self._handle)
        self._handle = None

    def refusal(self, owner: Owner | None, *, certain: bool = True) -> str:
        """The error message about ``owner``; ``certain`` if the operating system reports it as running."""
        who = f"in use by {owner}" if owner else "in use by another process"
        remedy = "wait for it or stop it" if certain else f"if it has ended, remove {self.path}"
        return f"{self.path.parent} is {who}: {remedy}, or use another folder"


def _lock(handle: int, *, shared: bool = False) -> bool | None:
    """Whether the operating system granted the lock, exclusive or ``shared``; None if it has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.lockf(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def _read(handle: int) -> Owner | None:
    """The named owner; None if there is none or it cannot be read."""
    try:
        os.lseek(handle, 0, os.SEEK_SET)
        named = json.loads(os.read(handle, 1000))
        return Owner(int(named["pid"]), str(named["host"]), str(named["since"]))
    except (ValueError, KeyError, TypeError):
        return None


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
