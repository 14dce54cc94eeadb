"""Freed memory is kept under glibc, unless the user or another allocator decides."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from saqcli.allocator import keep_freed_memory

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")

BLOCK, ROUNDS = 50_000_000, 10
FAULTS = f"""
import ctypes, resource
{{start}}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def write():
    block = libc.malloc({BLOCK})
    ctypes.memset(block, 1, {BLOCK})
    libc.free(block)

write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    write()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
COMMAND_LINE = """
import sys
from saqcli.cli import main
sys.argv = ["saq", "--version"]
try:
    main()
except SystemExit:
    pass
"""
OTHER_MALLOC = (
    "void *__libc_malloc(unsigned long);\nvoid *malloc(unsigned long n) { return __libc_malloc(n); }\n"
)


def faults_in(start: str, **environment: str) -> float:
    """Page faults of a process that runs ``start`` and then writes blocks, as a share of the pages of these blocks."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))
    }
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(start=start)],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1]) * os.sysconf("SC_PAGE_SIZE") / (ROUNDS * BLOCK)


def test_command_line_keeps_freed_memory() -> None:
    assert faults_in(COMMAND_LINE) < 0.01


def test_importing_changes_nothing() -> None:
    assert faults_in("import saqcli, saqcli.cli, saqcli.allocator") > 0.9


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "131072"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")],
)
def test_environment_of_the_user_wins(name: str, value: str) -> None:
    assert faults_in(COMMAND_LINE, **{name: value}) > 0.9


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_preloaded_allocator_is_left_alone(tmp_path: Path) -> None:
    source, library = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text(OTHER_MALLOC)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    assert faults_in(COMMAND_LINE, LD_PRELOAD=str(library)) > 0.9


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str | None) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", missing)
    monkeypatch.setattr("os.environ", {})

    assert not keep_freed_memory()
