"""Joining the processes that torchrun started, and leaving together.

timm makes the process group and chooses this process's device (``cuda:LOCAL_RANK``; NCCL for GPUs, gloo for CPUs).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
    from timm.utils.distributed import init_distributed_device_so

    kind = pick_device(asked).type
    try:
        device = torch.device(init_distributed_device_so(kind)["device"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the processes that torchrun started do not find each other: {reason}") from None
    try:
        yield device
    finally:
        torch.distributed.destroy_process_group()


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
