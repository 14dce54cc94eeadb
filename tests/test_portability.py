"""Nothing that only POSIX has is touched by an import, or by a run directory that is locked and read.

Windows lacks the modules and names below, macOS some of them. A process here loses them after the libraries are loaded,
which have their own ways for each system, and before any module of ours is.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BARE = """
import importlib, os, pkgutil, signal, sys

import matplotlib.pyplot, multiprocessing.resource_tracker, multiprocessing.shared_memory, numpy, onnx, onnx_ir
import onnxruntime, onnxscript, PIL.Image, pydantic, rich.console, scipy.optimize, sklearn.datasets, timm, torch
import torch._dynamo, torch.distributed, torch.onnx, torch.utils.data, torchvision, typer

for name in ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None  # importing it raises
KEPT = "SIGABRT SIGFPE SIGILL SIGINT SIGSEGV SIGTERM SIG_DFL SIG_IGN signal siginterrupt".split()
for name in dir(signal):
    if name.startswith(("SIG", "pthread", "sig", "alarm")) and name not in KEPT:
        delattr(signal, name)
UNIX = "fork forkpty geteuid getegid getgid getloadavg getuid killpg mkfifo nice pread pwrite register_at_fork"
for name in [*UNIX.split(), "sched_getaffinity", "setsid", "statvfs", "uname", "O_CLOEXEC", "O_DIRECTORY"]:
    if hasattr(os, name):
        delattr(os, name)
"""

LACKING = """
try:
    import fcntl
except ImportError as error:
    print(error.name)
"""

IMPORT_ALL = """
import saqcli
count = 0
for module in pkgutil.walk_packages(saqcli.__path__, "saqcli."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        count += 1
print(count)
"""

LOCK = """
from pathlib import Path
from saqcli.runs.locks import Lock

lock = Lock(Path())
print(lock.take(), lock.holder()[1])
lock.release()
print(Path(".lock").exists(), Lock(Path()).holder())
"""


def run(program: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", BARE + program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_no_posix_module_or_signal_is_needed(tmp_path: Path) -> None:
    files = [path for path in (ROOT / "saqcli").rglob("*.py") if path.name != "__init__.py"]
    lacking, imported, *locks = run(LACKING + IMPORT_ALL + LOCK, tmp_path)
    assert lacking == "fcntl"
    assert int(imported) >= len(files) - 1  # all but __main__.py
    assert locks == ["None True", "False (None, False)"]
