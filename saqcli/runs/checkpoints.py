"""Checkpoints that a crash at any moment and damage on the disk leave usable.

    first line   saq-checkpoint VERSION SHA-256 LENGTH
    the rest     what torch.save wrote: tensors and plain values, read without unpickling code

A new one is written beside, flushed and renamed into place; the good one before it stays as ``NAME.previous.pt``. What
is read is hashed first. Where the newest is cut short or altered, or a crash fell between the two renames, the one
before is used: nothing is lost but the work between the two.
"""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saqcli.errors import RunDirectoryError
from saqcli.serialization import replacing

MAGIC, VERSION = b"saq-checkpoint", b"1"
LONGEST_HEAD = 200  # bytes


class CheckpointFile:
    """One checkpoint and the one before it.

    Attributes:
        path: of the newest.
        previous: of the one before.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_suffix(f".previous{path.suffix}")
        self._good = False  # whether what stands at ``path`` is known to be whole

    def exists(self) -> bool:
        """Whether there is anything to load."""
        return self.path.is_file() or self.previous.is_file()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by ``state``, tensors and plain values only.

        Raises:
            CannotWrite: the disk is full, or the folder read-only or gone; what there is stays to be loaded.
        """
        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = buffer.getbuffer()
        head = b" ".join((MAGIC, VERSION, _digest(payload), str(len(payload)).encode())) + b"\n"
        with replacing(self.path) as temporary:
            with temporary.open("wb") as file:
                file.write(head)
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            if self._good and self.path.is_file():
                os.replace(self.path, self.previous)
        self._good = True

    def load(self, note: Callable[[str], None] = lambda _: None) -> dict[str, Any] | None:
        """The newest state that is whole, on the CPU, or None if there is none.

        Args:
            note: told when the newest is damaged and the one before is used.

        Raises:
            RunDirectoryError: there are checkpoints, and none of them is whole.
        """
        if not self.exists():
            return None
        self._good = False
        try:
            state = _read(self.path)
            self._good = True
            return state
        except RunDirectoryError as error:
            if not self.previous.is_file():
                raise RunDirectoryError(
                    f"{error} and there is none before it: start again with `overwrite=True`"
                ) from None
            try:
                state = _read(self.previous)
            except RunDirectoryError as older:
                raise RunDirectoryError(f"{error}, and {older}: start again with `overwrite=True`") from None
            note(f"{error}: continuing from the one before it, {self.previous.name}")
            return state

    def remove(self) -> None:
        """Leave none."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The state in the file at ``path``.

    Raises:
        RunDirectoryError: it is not there, damaged, or of another version; the message has no advice yet.
    """
    try:
        with path.open("rb") as file:
            head, payload = file.readline(LONGEST_HEAD), file.read()
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read ({error.strerror})") from None
    words = head.split()
    if len(words) != 4 or words[0] != MAGIC or not head.endswith(b"\n"):
        raise RunDirectoryError(f"{path} is damaged (it does not begin as a checkpoint of saq does)")
    if words[1] != VERSION:
        raise RunDirectoryError(
            f"{path} was written by another version of saq (format {words[1].decode('latin-1')!r})"
        )
    if str(len(payload)).encode() != words[3]:
        raise RunDirectoryError(
            f"{path} is damaged (it has {len(payload):,} bytes of {words[3].decode('latin-1')})"
        )
    if _digest(payload) != words[2]:
        raise RunDirectoryError(f"{path} is damaged (its hash is not what was written)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own
        raise RunDirectoryError(f"{path} holds what no checkpoint holds ({type(error).__name__})") from None
    return state


def _digest(payload: bytes | memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()
