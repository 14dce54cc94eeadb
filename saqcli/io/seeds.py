"""From the seed of a run to the seeds of everything random in an epoch."""

import random

import numpy as np
import torch


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
