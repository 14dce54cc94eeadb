"""The machine that timings were taken on, as far as it tells."""

import os
import platform
import re
from pathlib import Path


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
