"""Shared fixtures: the seed, and the data and weights stored beside the repository."""

import gc
import os
import signal
import time
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # one process per core: more threads would compete
    os.environ.setdefault("OMP_NUM_THREADS", "1")

os.environ.pop("SAQ_DATA", None)  # the user's
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # as the command line does; no test reaches the network

import pytest

from tests.support.image_folders import cifar_like, make_classes  # noqa: F401  (fixtures of all)
from tests.support.operators import read_once
from tests.support.trials import tried_once

# A shell makes background jobs ignore SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The slowest files first, so that workers end at about the same time. The second trains on the digits for all, while
# the first, which does not need them, runs.
LONGEST = """
    test_story test_search test_goldens test_joined_runs test_analyze test_recovery test_export test_bench test_killed
    test_page test_search_parts test_cli test_asga test_programs test_apot test_greedy test_gsam test_named_nodes
    test_sparsity test_plugins test_types test_rerun test_published test_files test_class_names test_execution
    test_exporters test_exact_form test_search_stopped test_quantize_stopped test_dry_run test_latency test_searchers
    test_paths test_portability test_attention test_hazards test_onnx_qdq test_tiny_zoo test_strange_files
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Freeze the imported objects, so that the garbage collector skips a million objects."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch  # here, since the xdist controller does not need torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def operators_read_once() -> None:
    if read_once():
        gc.freeze()  # the modules that an export imports
    tried_once()


def shared_data() -> Path:
    """The folder of real data and weights; skips the test if it is missing."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not (path / "data").is_dir():
        pytest.skip(f"needs real data and weights in {path}")
    return path


@pytest.fixture
def shared() -> Path:
    return shared_data()


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all worker processes of a test run."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with handwritten digits as ``images/`` and a network trained on them as ``float.safetensors``.

    Every sixth image is also in ``few/``.

    One process creates it, and the others wait for it.
    """
    from tests.support.digits import make

    folder = shared_folder(tmp_path_factory) / "digits"
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


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files shared by several tests and processes are written, each once and under its own name."""
    found = shared_folder(tmp_path_factory) / "files"
    found.mkdir(exist_ok=True)
    return found
