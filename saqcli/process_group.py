"""Joining and leaving the process group of torchrun's processes.

GPUs use NCCL, CPUs gloo. timm's helper is not used: with it, processes restarted by torchrun find the addresses of
terminated ones (see ``shared_store``).
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from saqcli.distributed import count, together
from saqcli.errors import ConfigError
from saqcli.machine import resolve_device
from saqcli.random_state import deterministic
from saqcli.units import counted

CONNECT_TIMEOUT_S = 300.0
RETRY_TIMEOUT_S = 5.0


def started_by_torchrun() -> bool:
    """Whether there are several processes to join."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun has restarted these processes after a failure on this host."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_be_restarted() -> bool:
    """Whether torchrun restarts processes on several hosts; it does not report failures on other hosts."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def process_group(
    requested: str, check: Callable[[], None] = lambda: None, *, deterministically: bool = False
) -> Iterator[torch.device]:
    """Within the context the processes that torchrun started work as one; without torchrun nothing happens.

    Args:
        requested: device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``; with torchrun the index is that of the process.
        check: called first, by all processes once they are connected; one process reports its error.
        deterministically: whether to use deterministic kernels only.

    Yields:
        The device of this process.

    Raises:
        ConfigError: the device is not available, or the processes cannot connect.
        UnsupportedModel: an operation has no deterministic kernel.
    """
    with deterministic() if deterministically else nullcontext(), _joined(requested, check) as device:
        yield device


@contextmanager
def _joined(requested: str, check: Callable[[], None]) -> Iterator[torch.device]:
    """``process_group`` with any kernels."""
    if count() > 1 or not started_by_torchrun():
        together(check)
        yield pick_device(requested)
        return
    device = process_device(requested)
    try:
        store = shared_store()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the processes that torchrun started cannot connect: {reason}") from None
    try:
        together(check)
        yield device
    finally:
        dist.destroy_process_group()


def shared_store() -> Store:
    """A store shared by the processes of this attempt, and by none of an earlier one.

    torchrun's own store survives a restart together with the addresses in it, and hosts disagree on the number of
    restarts. Process 0 therefore opens a new store and publishes its port in torchrun's; the others try the published
    port until process 0 of this attempt answers.

    Raises:
        RuntimeError: the processes did not connect in time.
    """
    host, rank, count = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    known, _, _ = next(iter(rendezvous("env://")))
    end = time.monotonic() + CONNECT_TIMEOUT_S
    if rank == 0:
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        known.set("saq/port", str(own.port))
        for other in range(1, count):
            own.set(f"answer {other}", own.get(f"question {other}").decode())
        return own
    while time.monotonic() < end:
        with suppress(RuntimeError):
            port = int(known.get("saq/port"))
            own = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=RETRY_TIMEOUT_S))
            question = uuid4().hex
            own.set(f"question {rank}", question)
            if own.get(f"answer {rank}").decode() == question:
                own.set_timeout(timedelta(seconds=CONNECT_TIMEOUT_S))
                return own
        time.sleep(0.2)
    raise RuntimeError(f"process {rank} waited {CONNECT_TIMEOUT_S:.0f} s for process 0 on {host}")


def process_device(requested: str) -> torch.device:
    """The device of this process: of a host's GPUs, the one with the process's local index.

    Raises:
        ConfigError: there are fewer GPUs than processes, or the device is not available.
    """
    if not resolve_device(requested).startswith("cuda") or not torch.cuda.is_available():
        return pick_device(requested)
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"this host has {counted(there, 'GPU')}: give torchrun `nproc_per_node={there}` or less"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def pick_device(requested: str) -> torch.device:
    """The device for the setting ``run.device``: ``auto`` is the GPU if there is one.

    Raises:
        ConfigError: the device is not available.
    """
    requested = resolve_device(requested)
    if count() > 1 and requested.startswith("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(requested)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type == "meta":  # has no data
        raise ConfigError(f"`run.device={requested}` is not a device: give cpu, cuda or cuda:1, or omit it")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = torch.cuda.device_count() if device.type == "cuda" else None
        reason = "" if there is None else f" ({counted(there, 'CUDA device') if there else 'no CUDA device'})"
        raise ConfigError(
            f"`run.device={requested}` is not available{reason}: use `run.device=cpu` or omit it"
        ) from None
    return device
