"""Searches in processes of their own, that are stopped by signals."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from tests.digits import MODEL, float_options

STOPPED = (
    *("--searcher", "samq", "--set", "search.epochs=2", "--set", "search.options.samq.warmup=0"),
    *("--set", "search.options.samq.draws=3", "--set", "run.checkpoint_minutes=1e-6", "--budget", "w4a4"),
    *("--set", "search.images=128", "--set", "search.scoring_images=32"),
)


def network_options(digits: Path) -> list[object]:
    """Names the network, its weights and its images."""
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
    """Wait until the search is in its model (0) or controller (1) phase, then send the signal."""
    path = run / "checkpoints" / "search.pt"
    for _ in range(5000):
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        if path.is_file() and torch.load(path, weights_only=True)["search"]["position"][1] == phase:
            break
        time.sleep(0.05)
    process.send_signal(number)
    return finish(process, 128 + number)


def figures(run: Path) -> dict[str, Any]:
    """What ``search.json`` says, less what is another in every run."""
    found: dict[str, Any] = json.loads((run / "search.json").read_text())
    return {key: value for key, value in found.items() if key not in ("seconds", "run_dir", "artifacts")}
