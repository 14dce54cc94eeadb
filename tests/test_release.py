"""What is released: sdist and wheel, installed in an environment that has no other copy, run the demo.

By default the dependencies are those of this environment. With ``SAQ_RELEASE=1`` they are installed anew, which
downloads gigabytes.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import saqcli

ROOT = Path(__file__).resolve().parents[1]
ANEW = os.environ.get("SAQ_RELEASE") == "1"
BUILT = ("saqcli", "pyproject.toml", "README.md", "LICENSE")


def run(*command: str | Path, cwd: Path, timeout: int = 280) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, made from the sources, and the wheel, made from the sdist."""
    if (
        int(version("setuptools").partition(".")[0]) < 77
    ):  # not imported: it would replace distutils for other tests
        pytest.skip("setuptools 77 or later builds the package")
    source = tmp_path_factory.mktemp("source")
    for name in BUILT:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, source)
    made = tmp_path_factory.mktemp("dist")
    build = (
        "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    )
    run(sys.executable, "-c", build, "build_sdist", made, cwd=source)
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(unpacked := tmp_path_factory.mktemp("unpacked"), filter="data")
    run(sys.executable, "-c", build, "build_wheel", made, cwd=next(unpacked.iterdir()))
    return made


def test_wheel_has_every_file_of_the_package(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    files = [
        path for path in (ROOT / "saqcli").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    assert not [name for path in files if (name := path.relative_to(ROOT).as_posix()) not in held]
    assert not [name for name in held if not name.startswith(("saqcli/", "saq-"))]


def test_names_carry_the_version(dist: Path) -> None:
    own = saqcli.__version__
    assert {path.name for path in dist.iterdir()} == {f"saq-{own}.tar.gz", f"saq-{own}-py3-none-any.whl"}
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE)[1] == own  # type: ignore[index]


@pytest.fixture(scope="module")
def environment(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment whose only saq is that of the wheel."""
    made = tmp_path_factory.mktemp("clean") / "venv"
    run(sys.executable, "-m", "venv", made, cwd=dist)
    python = made / ("Scripts" if os.name == "nt" else "bin") / "python"
    (wheel,) = dist.glob("*.whl")
    if ANEW:
        run(python, "-m", "pip", "install", "-q", wheel, cwd=dist, timeout=1500)
    else:
        run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, cwd=dist)
        (site,) = made.glob("lib/python3*/site-packages")
        (site / "others.pth").write_text(sysconfig.get_paths()["purelib"], encoding="utf-8")
    yield made
    shutil.rmtree(made)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_installed_wheel_runs_the_demo(environment: Path, tmp_path: Path) -> None:
    binaries = environment / ("Scripts" if os.name == "nt" else "bin")
    where = run(binaries / "python", "-c", "import saqcli; print(saqcli.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(environment)
    assert saqcli.__version__ in run(binaries / "saq", "--version", cwd=tmp_path)
    said = run(binaries / "saq", "demo", cwd=tmp_path, timeout=1500)
    assert "ONNX equals PyTorch" in said
    assert (tmp_path / "runs/demo/quantized/artifacts/model.onnx").is_file()


def test_extras_name_what_the_site_needs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    named = {re.split(r"[\[<>=]", each)[0] for each in extras["docs"]}
    assert named == {"mkdocs-material", "mkdocstrings", "latex2mathml", "nbclient", "ipykernel"}
