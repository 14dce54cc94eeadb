"""The machine and the libraries that figures come from, as far as they tell."""

import os
import platform
import re
from pathlib import Path

from saqcli._version import __version__


def cpu_name() -> str:
    """Such as ``AMD EPYC 7763 64-Core Processor``; the architecture where the machine does not say more."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def cores() -> int:
    """Logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chosen_device(asked: str) -> str:
    """The device that a setting means: ``auto`` is the GPU where there is one."""
    import torch

    if asked != "auto":
        return asked
    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """Of saq, Python and the libraries that the numbers depend on."""
    from importlib.metadata import version

    python = {"saq": __version__, "python": platform.python_version()}
    return python | library_versions() | {"onnxruntime": version("onnxruntime")}


def library_versions() -> dict[str, str]:
    """Of the libraries that networks are made of: what they are called and how they are built may change."""
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchvision", "timm")}
