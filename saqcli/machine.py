"""The CPU, devices and library versions of this machine."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
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


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets of the processor, as Linux names them on x86 (``avx2``, ``avx512_vnni``); empty if unknown."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    found = re.search(r"^flags\s*:\s*(\S.*)$", text, re.MULTILINE)
    return frozenset(found[1].split()) if found else frozenset()


def cores() -> int:
    """Number of logical processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes of memory that this process may still take, within the limits of its control groups; None if unknown."""
    try:
        fields = dict(line.split(":") for line in (proc / "meminfo").read_text("ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return None
    return min([free, *_left_in_groups(proc, groups)])


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Bytes up to the limit of each control group around this process; pages of files count as free.

    Source: Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
    """
    try:
        lines = (proc / "self" / "cgroup").read_text("utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controller, path = line.split(":", 2)
        if controller == "":
            root, names = groups, ("memory.max", "memory.current", "inactive_file")
        elif controller == "memory":
            root, names = (
                groups / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        most, used, cached = names
        group = root / path.lstrip("/")  # a container may see its own group as the root
        for folder in (group, *group.parents)[: len(group.parts) - len(root.parts) + 1]:
            with suppress(OSError, ValueError, KeyError):  # not there, or no limit
                limit, taken = (int((folder / name).read_text("ascii")) for name in (most, used))
                counts = dict(
                    each.split() for each in (folder / "memory.stat").read_text("ascii").splitlines()
                )
                yield max(0, limit - taken + int(counts[cached]))


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
