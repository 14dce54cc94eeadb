"""Searches interrupted by signals, in other processes or in this one."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saqcli.runs.checkpoints import CheckpointFile
from saqcli.runs.saving import SearchMemory
from tests.support.digits import MODEL, float_options

STOPPED = (
    *("--searcher", "samq", "--set", "search.epochs=2", "--set", "search.options.samq.warmup=0"),
    *("--set", "search.options.samq.draws=3", "--set", "run.checkpoint_minutes=1e-6", "--budget", "w4a4"),
    *(
        "--set",
        "search.images=128",
        "--set",
        "search.scoring_images=32",
        "--set",
        "data.calibration_images=64",
    ),
)


def network_options(digits: Path) -> list[object]:
    """Options for the network, its weights and its images."""
    return [MODEL, *float_options(digits), "--batch-size", 32, "--workers", 0]


def start(verb: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "saqcli", verb, *map(str, arguments), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: "subprocess.Popen[str]", code: int = 0) -> str:
    _, stderr = process.communicate(timeout=280)
    assert process.returncode == code, stderr
    return stderr


def stop_in_phase(process: "subprocess.Popen[str]", run: Path, phase: int, number: int) -> str:
    """Wait for the model (0) or controller (1) phase of the search, then send the signal."""
    path = run / "checkpoints" / "search.ckpt"
    for _ in range(5000):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        state = CheckpointFile(path).load()
        if state is not None and state["search"]["position"][1] == phase:
            break
        time.sleep(0.05)
    process.send_signal(number)
    return finish(process, 128 + number)


def stop_here(monkeypatch: pytest.MonkeyPatch, phase: int, number: int) -> None:
    """Raise the signal in the model (0) or controller (1) phase of the first search of this process."""
    offer = SearchMemory.offer
    sent: list[int] = []

    def stopping(self: SearchMemory, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        if not sent and state()["position"][1] == phase:
            sent.append(number)
            signal.raise_signal(number)
        offer(self, state, **when)

    monkeypatch.setattr(SearchMemory, "offer", stopping)


def stop_at(monkeypatch: pytest.MonkeyPatch, stage: str, position: list[int] | None) -> list[list[int]]:
    """Let the search of this process get the signal in a stage: at that epoch and step, or as soon as may be.

    Returns:
        Filled with the epochs and steps of the stage.
    """
    offer = SearchMemory.offer
    seen: list[list[int]] = []

    def stopping(self: SearchMemory, state: Callable[[], dict[str, Any]], **when: bool) -> None:
        if self._file is self.run.search_states[stage]:  # type: ignore[index]
            seen.append(state().get("position", []))
            if position is None or seen[-1] == position:
                signal.raise_signal(signal.SIGINT)
        offer(self, state, **when)

    monkeypatch.setattr(SearchMemory, "offer", stopping)
    return seen


def figures(run: Path) -> dict[str, Any]:
    """The content of ``search.json`` without what differs in every run."""
    found: dict[str, Any] = json.loads((run / "search.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "run_dir", "artifacts")}
