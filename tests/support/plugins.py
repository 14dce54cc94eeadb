"""Packages outside the project: installed from ``tests/plugins`` and used in other processes.

``plugin_folder("saq-greedy")`` installs a package by pip into a temporary folder, once per process. A test runs the
contract tests of its family over it (``run_tests``) and its commands (``run_saq``).
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "tests" / "plugins"
INSTALL = (
    "install --quiet --disable-pip-version-check --no-deps --no-index --no-build-isolation --target".split()
)

Done = subprocess.CompletedProcess[str]


@cache
def plugin_folder(package: str) -> Path:
    """The folder into which the package ``tests/plugins/PACKAGE`` is installed; skips without pip and setuptools."""
    for needed in ("pip", "setuptools"):
        try:
            version(needed)  # looking for the module itself makes setuptools warn where distutils is imported
        except PackageNotFoundError:
            pytest.skip(f"needs {needed} to install {package}: pip install 'saq[test]'")
    folder = Path(tempfile.mkdtemp(prefix=f"{package}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = folder / "source"  # a copy, since setuptools builds where the sources are
    shutil.copytree(PACKAGES / package, source)
    done = _run([*_python("pip"), *INSTALL, str(folder / "installed"), str(source)], (), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "installed"


def run_saq(*arguments: object, folders: tuple[Path, ...], cwd: Path = ROOT) -> Done:
    """Run ``saq ARGUMENTS`` where the packages in ``folders`` are installed."""
    return _run([*_python("saqcli"), *map(str, arguments)], folders, cwd)


def run_python(code: str, *, folders: tuple[Path, ...], cwd: Path = ROOT) -> Done:
    """Run a Python program where the packages in ``folders`` are installed."""
    return _run([sys.executable, "-c", code], folders, cwd)


def run_tests(*arguments: str, folders: tuple[Path, ...]) -> Done:
    """Run pytest, in one process, where the packages in ``folders`` are installed; paths start at the repository."""
    return _run([*_python("pytest"), "-n", "0", "-p", "no:cacheprovider", *arguments], folders, ROOT)


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", module]


def _run(command: list[str], folders: tuple[Path, ...], cwd: Path) -> Done:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    paths = os.pathsep.join(map(str, (*folders, ROOT)))
    return subprocess.run(
        command,
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "COLUMNS": "110"},
        capture_output=True,
        text=True,
        timeout=280,
    )
