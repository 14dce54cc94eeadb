"""Checkpoints that survive crashes and damage on disk.

    first line   saq-checkpoint VERSION SHA-256 LENGTH
    the rest     output of torch.save: tensors and plain values, read without unpickling code

A new checkpoint is written to a temporary file, flushed and renamed; the last valid one stays as
``NAME.previous.ckpt``. The hash is checked before reading. If the newest file is truncated or altered, or a crash fell
between the two renames, the previous one is used: only the work between the two is lost.
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
    """A checkpoint and its predecessor.

    Attributes:
        path: path of the newest checkpoint.
        previous: path of its predecessor.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.previous = path.with_suffix(f".previous{path.suffix}")
        self._good = False  # whether the file at ``path`` is known to be valid

    def exists(self) -> bool:
        """Whether there is a checkpoint to load."""
        return self.path.is_file() or self.previous.is_file()

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint by ``state``, which holds tensors and plain values only.

        Raises:
            CannotWrite: the disk is full, or the folder is read-only or missing; existing checkpoints stay valid.
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
        """The newest valid state, on the CPU, or None if there is no checkpoint.

        Args:
            note: receives a line if the newest is damaged and the previous one is used.

        Raises:
            RunDirectoryError: there are checkpoints, but none is valid.
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
                    f"{error} and there is no previous one: start again with `overwrite=True`"
                ) from None
            try:
                state = _read(self.previous)
            except RunDirectoryError as older:
                raise RunDirectoryError(f"{error}, and {older}: start again with `overwrite=True`") from None
            note(f"{error}: resuming from the previous one, {self.previous.name}")
            return state

    def remove(self) -> None:
        """Delete both files."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    """The state in the file at ``path``.

    Raises:
        RunDirectoryError: the file is missing, damaged, or of another version; the message gives no remedy.
    """
    try:
        with path.open("rb") as file:
            head, payload = file.readline(LONGEST_HEAD), file.read()
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read ({error.strerror})") from None
    words = head.split()
    if len(words) != 4 or words[0] != MAGIC or not head.endswith(b"\n"):
        raise RunDirectoryError(f"{path} is damaged (it does not begin like a saq checkpoint)")
    if words[1] != VERSION:
        raise RunDirectoryError(
            f"{path} was written by another version of saq (format {words[1].decode('latin-1')!r})"
        )
    if str(len(payload)).encode() != words[3]:
        raise RunDirectoryError(
            f"{path} is damaged (it has {len(payload):,} of {words[3].decode('latin-1')} bytes)"
        )
    if _digest(payload) != words[2]:
        raise RunDirectoryError(f"{path} is damaged (its hash does not match)")
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error of its own
        raise RunDirectoryError(f"{path} has content of an invalid type ({type(error).__name__})") from None
    return state


def _digest(payload: bytes | memoryview) -> bytes:
    return hashlib.sha256(payload).hexdigest().encode()
