"""Random numbers: the state of all generators, for checkpoints, and the seeds that follow from (seed, epoch).

The state of all global random numbers, as values that a checkpoint can hold.

From the seed of a run to the seeds of everything random in an epoch.
"""

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch."""
    version, internal, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()  # of the device that computes
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` noted."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seeds_of(seed: int, epoch: int = 0, rank: int = 0) -> tuple[int, int, int]:
    """For Python, NumPy and torch.

    A ``SeedSequence`` mixes the three, so that (1, 0) and (0, 1) have nothing in common.
    """
    state = np.random.SeedSequence((seed, epoch, rank)).generate_state(3, np.uint64)
    return int(state[0]), int(state[1]) % 2**32, int(state[2])


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices) from (seed, epoch, rank)."""
    for_python, for_numpy, for_torch = seeds_of(seed, epoch, rank)
    random.seed(for_python)
    np.random.seed(for_numpy)
    torch.manual_seed(for_torch)
