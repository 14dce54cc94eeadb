"""Random states for checkpoints, seeds from (seed, epoch), and deterministic kernels.

On a CPU the same command with the same number of threads gives the same bits. Some GPU kernels add in the order in
which their threads finish; ``run.deterministic`` makes PyTorch use other kernels, or raise an error. Every setting
is restored at the end.
"""

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from saqcli.errors import UnsupportedModel

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read when CUDA starts
CUBLAS_CHOICES = (":4096:8", ":16:8")  # with which cuBLAS is deterministic
_REFUSED = re.compile(r"(\S+) does not have a deterministic implementation")


def random_state() -> dict[str, Any]:
    """The states of the generators of Python, NumPy and torch."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of the current device
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seeds_of(seed: int, epoch: int = 0, rank: int = 0) -> tuple[int, int, int]:
    """Seeds for Python, NumPy and torch.

    A ``SeedSequence`` mixes the three arguments, so that (1, 0) and (0, 1) give unrelated seeds.
    """
    state = np.random.SeedSequence((seed, epoch, rank)).generate_state(3, np.uint64)
    return int(state[0]), int(state[1]) % 2**32, int(state[2])


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices) from (seed, epoch, rank)."""
    for_python, for_numpy, for_torch = seeds_of(seed, epoch, rank)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the context PyTorch uses deterministic kernels only.

    Raises:
        UnsupportedModel: an operation has no deterministic kernel.
    """
    cudnn = torch.backends.cudnn
    before = (cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS))
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if before[2] not in CUBLAS_CHOICES:
        os.environ[CUBLAS] = CUBLAS_CHOICES[0]
    cudnn.deterministic, cudnn.benchmark = True, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        _explain(error)
        raise
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        cudnn.deterministic, cudnn.benchmark = before[:2]
        if before[2] is None:
            os.environ.pop(CUBLAS, None)
        else:
            os.environ[CUBLAS] = before[2]


def _explain(error: RuntimeError) -> None:
    """Raise an explanation if the error is about deterministic kernels; otherwise do nothing."""
    text = str(error)
    found = _REFUSED.search(text)
    if found:
        raise UnsupportedModel(
            f"`run.deterministic`: {found[1]} has no deterministic kernel on this device: remove "
            "`run.deterministic`, or try `run.device=cpu` or another network"
        ) from None
    if CUBLAS in text:
        raise UnsupportedModel(
            f"`run.deterministic`: CUDA was already in use without it: set {CUBLAS}={CUBLAS_CHOICES[0]} in the "
            "environment"
        ) from None


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the context PyTorch uses ``count`` threads; the earlier number is restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
