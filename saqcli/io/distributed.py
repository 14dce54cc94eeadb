"""Joining the processes that torchrun started, and leaving together.

NCCL connects GPUs, gloo CPUs. timm's helper is not used: it joins without regard to how often torchrun has started the
processes again, and the second time they find the addresses of those that have died (PyTorch keeps its store).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from saqcli import ranks
from saqcli.errors import ConfigError
from saqcli.io.machine import chosen_device


def started_by_torchrun() -> bool:
    """Whether there are several processes to be joined."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun has started these processes again, after one of them failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


@contextmanager
def process_group(asked: str) -> Iterator[torch.device]:
    """Within the context the processes that torchrun started work as one; without torchrun nothing happens.

    Args:
        asked: device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``; with torchrun the number is that of the process.

    Yields:
        The device of this process.

    Raises:
        ConfigError: no such device here, or the processes do not find each other.
    """
    if ranks.count() > 1 or not started_by_torchrun():
        yield pick_device(asked)
        return
    device = own_device(pick_device(asked))
    try:
        store, rank, count = next(iter(rendezvous("env://")))
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"saq/{again}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=count
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the processes that torchrun started do not find each other: {reason}") from None
    try:
        yield device
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The one of that kind that belongs to this process: of a host's GPUs the one with its number there.

    Raises:
        ConfigError: there are fewer GPUs than processes.
    """
    if device.type != "cuda":
        return device
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ConfigError(f"this host has {there} GPUs: give torchrun --nproc-per-node {there} or less")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def pick_device(asked: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    asked = chosen_device(asked)
    if ranks.count() > 1 and asked.startswith("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {asked} is not to be had here: use cpu, or leave it away") from None
    return device
