"""Checkpoints that are truncated, altered, or interrupted while being written."""

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from saqcli.errors import RunDirectoryError
from saqcli.runs.checkpoints import CheckpointFile

MUTATIONS = 300


def state(number: int) -> dict[str, Any]:
    return {"number": number, "weights": torch.full((7,), float(number)), "text": "ü"}


def written(path: Path, count: int = 2) -> CheckpointFile:
    path.parent.mkdir(exist_ok=True)
    file = CheckpointFile(path)
    for number in range(count):
        file.save(state(number))
    return file


def test_newest_is_loaded_and_previous_kept(tmp_path: Path) -> None:
    file = written(tmp_path / "deep" / "last.ckpt", 3)

    loaded = CheckpointFile(file.path).load()

    assert loaded is not None
    assert loaded["number"] == 2
    assert loaded["text"] == "ü"
    assert torch.equal(loaded["weights"], state(2)["weights"])
    before = CheckpointFile(file.previous).load()
    assert before is not None
    assert before["number"] == 1
    assert sorted(path.name for path in file.path.parent.iterdir()) == ["last.ckpt", "last.previous.ckpt"]


def test_missing_checkpoint_loads_none(tmp_path: Path) -> None:
    assert CheckpointFile(tmp_path / "last.ckpt").load() is None


def test_damaged_checkpoint_falls_back(tmp_path: Path) -> None:
    file = written(tmp_path / "last.ckpt")
    raw, chance = file.path.read_bytes(), random.Random(0)
    for number in range(MUTATIONS):
        damaged = bytearray(raw)
        if number % 3 == 0:
            del damaged[chance.randrange(len(raw)) :]
        elif number % 3 == 1:
            damaged[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        else:
            damaged[chance.randrange(len(raw)) :] += chance.randbytes(chance.randrange(1, 50))
        if damaged == raw:
            continue
        file.path.write_bytes(damaged)
        notes: list[str] = []

        loaded = CheckpointFile(file.path).load(notes.append)

        assert loaded is not None, number
        assert loaded["number"] == 0, number
        assert len(notes) == 1
        assert "last.ckpt" in notes[0]
        assert "last.previous.ckpt" in notes[0]


def test_damaged_checkpoint_never_replaces_a_good_one(tmp_path: Path) -> None:
    written(tmp_path / "last.ckpt").path.write_bytes(b"")
    file = CheckpointFile(tmp_path / "last.ckpt")
    file.load()
    file.save(state(5))

    file.path.write_bytes(b"")
    loaded = CheckpointFile(file.path).load()

    assert loaded is not None
    assert loaded["number"] == 0


def test_single_damaged_checkpoint_gives_advice(tmp_path: Path) -> None:
    file = written(tmp_path / "last.ckpt", 1)
    file.path.write_bytes(file.path.read_bytes()[:-1])

    with pytest.raises(
        RunDirectoryError, match=r"last\.ckpt is damaged .* start again with `overwrite=True`"
    ):
        CheckpointFile(file.path).load()


def test_two_damaged_checkpoints_are_both_named(tmp_path: Path) -> None:
    file = written(tmp_path / "last.ckpt")
    for path in (file.path, file.previous):
        path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(
        RunDirectoryError, match=r"last\.ckpt is .*last\.previous\.ckpt is .*`overwrite=True`"
    ):
        CheckpointFile(file.path).load()


def test_newer_version_is_not_called_damaged(tmp_path: Path) -> None:
    file = written(tmp_path / "last.ckpt", 1)
    file.path.write_bytes(file.path.read_bytes().replace(b"saq-checkpoint 1", b"saq-checkpoint 2", 1))

    with pytest.raises(RunDirectoryError, match="another version of saq"):
        CheckpointFile(file.path).load()


class Malice:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def test_code_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    CheckpointFile(tmp_path / "last.ckpt").save({"number": Malice()})

    with pytest.raises(RunDirectoryError, match="has content of an invalid type"):
        CheckpointFile(tmp_path / "last.ckpt").load()

    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("stop_before", range(1, 4))
def test_crash_while_saving_is_recoverable(
    stop_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every rename, and at the flush before it."""
    file = written(tmp_path / "last.ckpt")
    acts = 0

    def crashing(act: Any) -> Any:
        def done(*arguments: Any) -> Any:
            nonlocal acts
            acts += 1
            if acts == stop_before:
                raise KeyboardInterrupt
            return act(*arguments)

        return done

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crashing(os.replace))
        patch.setattr(os, "fsync", crashing(os.fsync))
        with pytest.raises(KeyboardInterrupt):
            file.save(state(2))

    loaded = CheckpointFile(file.path).load()
    assert loaded is not None
    assert loaded["number"] == 1
