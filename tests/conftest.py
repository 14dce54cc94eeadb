"""What every test may lean on: one seed, and the data and weights that lie beside the repository."""

import functools
import os
import sys
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a process a core: more threads would be in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the command line does; no test reaches the network

import pytest
import torch

# Files that take longest, for the processes to end at about the same time. The first learns the digits for all.
LONGEST = """
    test_story test_exporters test_searchers test_search test_search_parts test_analyze test_exact_form
    test_search_stopped test_quantize_stopped test_bench test_cli test_export test_onnx_qdq test_hazards test_published
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def operators_read_once() -> None:
    """PyTorch reads the source of 500 ONNX operators for every export: half of the time that a small network takes."""
    registration = sys.modules.get("torch.onnx._internal.exporter._registration")
    if registration is None or "onnxscript" not in sys.modules:
        return
    apis = registration.onnxscript_apis
    if not hasattr(apis.get_torchlib_ops, "cache_info"):
        apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


def shared_data() -> Path:
    """The folder of real data and weights, or a skip where it is not there."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip(f"needs real data and weights in {path}")
    return path


@pytest.fixture
def shared() -> Path:
    return shared_data()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with handwritten digits as ``images/`` and a network trained on them as ``float.safetensors``.

    One process makes it, and the others of a run wait for it.
    """
    from tests.digits import make

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits"
    made = folder / "made"
    try:
        folder.mkdir()
    except FileExistsError:
        for _ in range(2000):
            if made.exists():
                return folder
            time.sleep(0.1)
        folder = tmp_path_factory.mktemp("digits")  # its process has ended
    make(folder)
    made.touch()
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files are written that several tests of a module read."""
    return tmp_path_factory.mktemp("files")
