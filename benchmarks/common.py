"""Shared by the benchmarks: options, timing in turns, facts of the machine, and results as JSON.

Scripts that take long write a result as soon as it is measured, so that an interrupted script resumes where it stopped.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # the profiler logs its start and end

import torch

from saqcli.machine import cpu_name, library_versions
from saqcli.serialization import json_text, write_text

Step = Callable[[], object]
# Instruction sets that decide how fast which precision is.
INSTRUCTIONS = re.compile(
    r"\b(avx2|avx512f|avx512_bf16|avx512_vnni|avx_vnni|amx_bf16|amx_int8|asimd|bf16|sve)\b"
)


def plain_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows ``description`` as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options for network and images."""
    made = plain_parser(description)
    made.add_argument("--model", default="saq/resnet20")
    made.add_argument("--weights")
    made.add_argument("--data")
    return made


def add_json(options: argparse.ArgumentParser) -> None:
    """The option ``--json``."""
    options.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def facts(benchmark: str) -> dict[str, Any]:
    """What a result depends on beside its settings: command, date, processor, threads, versions.

    ``load`` is the average of the last minute: this script's own threads, and other work on the machine. Of absolute
    paths the last part is kept.
    """
    arguments = [
        Path(text).name if Path(text).is_absolute() else shlex.quote(text)
        for text in sys.argv[1:]
        if text != "--json"
    ]
    return {
        "benchmark": benchmark,
        "command": " ".join(["python", f"benchmarks/{benchmark}.py", *arguments]),
        "commit": commit(),
        "date": datetime.now().date().isoformat(),
        "cpu": cpu_name(),
        "isa": instruction_sets(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        **library_versions(),
    }


def origin(wanted: argparse.Namespace) -> dict[str, Any]:
    """Network and circumstances, in every line of a script whose results are collected in ``results/``."""
    about = facts(Path(sys.argv[0]).stem)
    return {
        "model": wanted.model,
        **{name: about[name] for name in ("date", "commit", "cpu", "threads", "command")},
    }


def commit() -> str | None:
    """The commit that is checked out; None outside a repository."""
    asked = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def instruction_sets() -> list[str]:
    """Those of ``INSTRUCTIONS`` that this processor has, as far as Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return sorted(set(INSTRUCTIONS.findall(flags[1]))) if flags else []


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}


def show(wanted: argparse.Namespace, found: Any, text: str) -> None:
    """Print ``found`` as JSON if the options ask for it, else ``text``."""
    print(json_text(found) if wanted.json else text)


def add_timing(options: argparse.ArgumentParser) -> None:
    """The options of a script that times steps."""
    options.add_argument("--model", default="saq/resnet20")
    options.add_argument("--batch-size", type=int, default=128)
    options.add_argument("--side", type=int, help="pixels; the network's own by default")
    options.add_argument("--rounds", type=int, default=7, help="measurements of each variant")
    options.add_argument("--device", default="auto")
    options.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="processor time depends less on other work on the machine; on the CPU with one thread only",
    )


def in_turns(
    steps: Mapping[str, Step], rounds: int, clock: str = "wall", repeats: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds of every step in every round; all take turns, so that other work on the machine disturbs all of them.

    Args:
        steps: already warm.
        rounds: times that each is measured.
        clock: of ``CLOCKS``.
        repeats: how many successive steps are one measurement, of which the mean counts; 1 where it says nothing.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    now = CLOCKS[clock]
    for _ in range(rounds):
        for name, step in steps.items():
            count = (repeats or {}).get(name, 1)
            synchronize()
            start = now()
            for _ in range(count):
                step()
            synchronize()
            times[name].append((now() - start) / count)
    return times


def synchronize() -> None:
    """Wait for what runs on a GPU, if one was used: its kernels are only begun when a call returns."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_megabytes(step: Step, device: torch.device) -> float:
    """Most memory that a step holds above what was allocated before it, in MB (2**20 bytes), by torch's allocator."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    held = most = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most / 2**20


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line and print it; an incomplete last line, left by a crash or a full disk, is removed."""
    text = path.read_text() if path.is_file() else ""
    write_text(path, text[: text.rfind("\n") + 1] + json_text(line) + "\n")
    print(json_text(line), file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """All complete lines."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def known(path: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first line with all values of ``key``; None if there is none."""
    return next((line for line in read(path) if key.items() <= line.items()), None)


def spread(values: list[float], digits: int) -> str:
    """``mean +- deviation``."""
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"
