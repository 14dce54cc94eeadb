"""The CPU, devices and library versions of this machine."""

import os
import platform
import re
from pathlib import Path

from saqcli._version import __version__


def cpu_name() -> str:
    """Such as ``AMD EPYC 7763 64-Core Processor``; the architecture if the model name is not available."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def cores() -> int:
    """Number of logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes of memory that this process may still take, within the limit of its control group; None if unknown."""
    try:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        most, used = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current"))
        return min(free, max(0, int(most) - int(used)))
    except (OSError, ValueError):  # no group, or one without a limit
        return free


def resolve_device(requested: str) -> str:
    """The device for the setting ``run.device``: ``auto`` is the GPU if there is one."""
    import torch

    if requested != "auto":
        return requested
    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Versions of saq, Python and the libraries that results depend on."""
    from importlib.metadata import version

    python = {"saq": __version__, "python": platform.python_version()}
    return python | library_versions() | {"onnxruntime": version("onnxruntime")}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that build the networks: layer names and structure may change between them."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "timm")}
