"""Locks: one process at a time in a folder, also after a crash."""

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest

from saqcli.errors import RunDirectoryError
from saqcli.runs import locks
from saqcli.runs.locks import Lock


class Other:
    """Another process that takes and holds the lock of a folder."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self.process = context.Process(target=self._hold, args=(folder, theirs))
        self.process.start()
        assert ours.recv() == "held"

    @staticmethod
    def _hold(folder: Path, pipe: "multiprocessing.connection.Connection") -> None:
        lock = Lock(folder)
        lock.take()
        pipe.send("held")
        signal.pause()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def test_second_process_is_refused(tmp_path: Path) -> None:
    other = Other(tmp_path)
    try:
        with pytest.raises(RunDirectoryError, match=f"in use by process {other.process.pid} on") as refused:
            Lock(tmp_path).take()
        assert socket.gethostname() in str(refused.value)
    finally:
        other.kill()


def test_killed_process_releases_its_lock(tmp_path: Path) -> None:
    other = Other(tmp_path)
    other.kill()
    assert (tmp_path / locks.NAME).is_file()
    lock = Lock(tmp_path)

    killed = lock.take()

    assert killed is not None
    assert killed.pid == other.process.pid
    assert json.loads((tmp_path / locks.NAME).read_text())["pid"] == os.getpid()
    lock.release()
    assert not (tmp_path / locks.NAME).exists()


def test_released_lock_leaves_no_file(tmp_path: Path) -> None:
    lock = Lock(tmp_path)
    lock.take()
    lock.release()
    lock.release()

    assert not any(tmp_path.iterdir())
    other = Other(tmp_path)
    other.kill()


@pytest.mark.parametrize(
    ("host", "refused"),
    [(socket.gethostname(), False), ("elsewhere.example", True)],
    ids=["here", "elsewhere"],
)
def test_without_os_locks_dead_owner_is_replaced(
    host: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_lock", lambda handle: None)
    ended = multiprocessing.get_context("fork").Process(target=int)
    ended.start()
    ended.join()
    owner = {"pid": ended.pid, "host": host, "since": "2026-01-01T00:00:00+00:00"}
    (tmp_path / locks.NAME).write_text(json.dumps(owner))
    lock = Lock(tmp_path)

    if refused:
        with pytest.raises(RunDirectoryError, match=r"elsewhere\.example.* if it has ended, remove"):
            lock.take()
    else:
        lock.take()
        lock.release()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\x00", b"{}" * 600])
def test_malformed_lock_file_is_free(content: bytes, tmp_path: Path) -> None:
    (tmp_path / locks.NAME).write_bytes(content)

    Lock(tmp_path).take()


def test_unwritable_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        Lock(tmp_path / "missing").take()


def test_owner_is_visible_to_other_processes(tmp_path: Path) -> None:
    assert Lock(tmp_path).holder() == (None, False)
    other = Other(tmp_path)
    named, working = Lock(tmp_path).holder()
    assert (named and named.pid, working) == (other.process.pid, True)
    other.kill()

    named, working = Lock(tmp_path).holder()

    assert (named and named.pid, working) == (other.process.pid, False)
    assert (tmp_path / locks.NAME).is_file()


def test_inspecting_own_lock_keeps_it(tmp_path: Path) -> None:
    """Closing a second handle of the file would release the lock."""
    lock = Lock(tmp_path)
    lock.take()

    named, working = Lock(tmp_path).holder()

    assert (named and named.pid, working) == (os.getpid(), True)
    other = multiprocessing.get_context("fork").Process(target=_take_refused, args=(tmp_path,))
    other.start()
    other.join()
    assert other.exitcode == 0
    lock.release()
    assert Lock(tmp_path).holder() == (None, False)


def _take_refused(folder: Path) -> None:
    with pytest.raises(RunDirectoryError, match="in use by"):
        Lock(folder).take()
