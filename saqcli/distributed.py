"""Processes that work as one: joining those that torchrun started, and what the rest of the code sees of them.

Processes that work as one, as the rest of the code sees them: ranks of torch's default process group.

``torchrun`` starts them, ``io/distributed.py`` joins them. All ranks run the same code on their own share of the
images and hold the same weights after every step. Where nothing was joined there is one rank, and everything here
gives back what it is given.

A rank that fails closes its connections, upon which the others raise ``StoppedElsewhere``: its own message is the one
that says why.

Joining the processes that torchrun started, and leaving together.

NCCL connects GPUs, gloo CPUs. timm's helper is not used: with it, processes that torchrun has started again find the
addresses of those that have died (see ``meeting_point``).
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from saqcli.errors import ConfigError, SaqError, StoppedElsewhere, out_of_memory
from saqcli.machine import chosen_device
from saqcli.units import counted

BUCKET = 2**24  # numbers that are averaged at a time
LOST = ("connection", "closed by peer", "broken pipe", "socket", "timed out", "timeout", "gloo", "nccl")

T = TypeVar("T")


def count() -> int:
    """How many processes work as one."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Which of them this is, from 0 on."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the one that writes and prints."""
    return index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first rank; the others do not call it.

    Raises:
        SaqError: what ``make`` raised on the first rank; on the others ``StoppedElsewhere``.
    """
    if count() == 1:
        return make()
    import torch.distributed as dist

    box: list[Any] = [None, None]
    error: SaqError | None = None
    if first():
        try:
            box[0] = make()
        except SaqError as raised:
            error = raised
            box[1] = raised.exit_code
    with _connected():
        dist.broadcast_object_list(box, src=0)
    if error is not None:
        raise error
    if box[1] is not None:
        raise StoppedElsewhere(box[1])
    value: T = box[0]
    return value


def together(make: Callable[[], T]) -> T:
    """What ``make`` gives on every rank; it talks to no other rank.

    Raises:
        SaqError: what it raised, on the lowest rank where it did; on the others ``StoppedElsewhere``.
    """
    if count() == 1:
        return make()
    error, value = None, None
    try:
        value = make()
    except SaqError as raised:
        error = raised
    codes = gathered(None if error is None else error.exit_code)
    failed = [rank for rank, code in enumerate(codes) if code is not None]
    if error is not None and failed[0] == index():
        raise error
    if failed:
        raise StoppedElsewhere(codes[failed[0]] or 1)
    made: Any = value
    result: T = made
    return result


def agreed(error: SaqError) -> SaqError:
    """To be raised for ``error``, which all ranks have come to alike: the first one is to tell it."""
    return error if first() else StoppedElsewhere(error.exit_code)


def gathered(value: T) -> list[T]:
    """``value`` of every rank, in their order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    with _connected():
        dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is true on one rank at least."""
    return (count() > 1 and totals(float(flag))[0] > 0) or (count() == 1 and flag)


def totals(*values: float) -> list[float]:
    """Sums over the ranks, in double precision where the device has it."""
    if count() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    summed = torch.tensor(values, dtype=torch.float64, device=_device())
    with _connected():
        dist.all_reduce(summed)
    found: list[float] = summed.tolist()
    return found


def mean(value: float) -> float:
    """Mean over the ranks."""
    return totals(value)[0] / count()


def average(tensors: Iterable[Any]) -> None:
    """Replace tensors by their means over the ranks, in place; the same shapes and types on every rank.

    Gathered into buckets of ``BUCKET`` numbers by type and device, one all-reduce each. All ranks get the same bits.
    """
    if count() == 1:
        return
    import torch
    import torch.distributed as dist

    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
        with _connected():
            dist.all_reduce(flat)
        flat /= count()
        for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def share(items: Iterable[T]) -> Iterator[T]:
    """Every ``count()``-th of ``items``, from number ``index()`` on; what can be cut knows how (``part``)."""
    part = getattr(items, "part", None)
    if part is not None:
        cut: Iterator[T] = part(index(), count())
        return cut
    return islice(items, index(), None, count())


def interleaved(lists: Sequence[Sequence[T]]) -> list[T]:
    """The items that ``share`` dealt out, in their order again."""
    longest = max(map(len, lists))
    return [items[place] for place in range(longest) for items in lists if place < len(items)]


def _buckets(tensors: Iterable[Any]) -> Iterator[list[Any]]:
    kinds: dict[Any, list[Any]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for kind in kinds.values():
        bucket: list[Any] = []
        size = 0
        for tensor in kind:
            bucket.append(tensor)
            size += tensor.numel()
            if size >= BUCKET:
                yield bucket
                bucket, size = [], 0
        if bucket:
            yield bucket


def _device() -> str:
    """Where the group's tensors must be: NCCL knows GPUs only."""
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def _connected() -> Iterator[None]:
    """Turns a lost connection into the error that it means."""
    try:
        yield
    except RuntimeError as error:  # gloo has no class of its own; NCCL's is a RuntimeError
        if type(error) is RuntimeError and not any(words in str(error).lower() for words in LOST):
            raise
        if out_of_memory(error):
            raise
        raise StoppedElsewhere() from error


SECONDS_TO_MEET = 300.0
SECONDS_BETWEEN_TRIES = 5.0


def started_by_torchrun() -> bool:
    """Whether there are several processes to be joined."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def restarted() -> bool:
    """Whether torchrun has started these processes again, after one of this host has failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_be_restarted() -> bool:
    """Whether torchrun starts processes again on several hosts: where those of another one failed, it does not say."""
    several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
    return several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


@contextmanager
def process_group(asked: str, check: Callable[[], None] = lambda: None) -> Iterator[torch.device]:
    """Within the context the processes that torchrun started work as one; without torchrun nothing happens.

    Args:
        asked: device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``; with torchrun the number is that of the process.
        check: called first, by all processes once they have met; what it raises one of them tells.

    Yields:
        The device of this process.

    Raises:
        ConfigError: no such device here, or the processes do not find each other.
    """
    if count() > 1 or not started_by_torchrun():
        together(check)
        yield pick_device(asked)
        return
    device = own_device(asked)
    try:
        store = meeting_point()
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the processes that torchrun started do not find each other: {reason}") from None
    try:
        together(check)
        yield device
    finally:
        dist.destroy_process_group()


def meeting_point() -> Store:
    """A store that the processes of this attempt share, and none of an earlier one.

    torchrun's own store outlives a restart, and so do the addresses in it; how often it was restarted is not the same
    on all hosts. The first process therefore opens a store and leaves its port in torchrun's; the others try the port
    that they find there until somebody answers who is waiting for them.

    Raises:
        RuntimeError: they did not meet in time.
    """
    host, rank, count = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    known, _, _ = next(iter(rendezvous("env://")))
    end = time.monotonic() + SECONDS_TO_MEET
    if rank == 0:
        own = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        known.set("saq/port", str(own.port))
        for other in range(1, count):
            own.set(f"answer {other}", own.get(f"question {other}").decode())
        return own
    while time.monotonic() < end:
        with suppress(RuntimeError):
            port = int(known.get("saq/port"))
            own = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=SECONDS_BETWEEN_TRIES))
            question = uuid4().hex
            own.set(f"question {rank}", question)
            if own.get(f"answer {rank}").decode() == question:
                own.set_timeout(timedelta(seconds=SECONDS_TO_MEET))
                return own
        time.sleep(0.2)
    raise RuntimeError(f"process {rank} waited {SECONDS_TO_MEET:.0f} s for process 0 on {host}")


def own_device(asked: str) -> torch.device:
    """The device of that kind that belongs to this process: of a host's GPUs the one with its number there.

    Raises:
        ConfigError: there are fewer GPUs than processes, or no such device.
    """
    if not chosen_device(asked).startswith("cuda") or not torch.cuda.is_available():
        return pick_device(asked)
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise ConfigError(
            f"this host has {counted(there, 'GPU')}: give torchrun --nproc-per-node {there} or less"
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def pick_device(asked: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    asked = chosen_device(asked)
    if count() > 1 and asked.startswith("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    try:
        device = torch.device(asked)
    except (RuntimeError, ValueError):
        device = torch.device("meta")
    if device.type == "meta":  # which computes nothing
        raise ConfigError(f"--device {asked} is not a device: give cpu, cuda or cuda:1, or omit it")
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        there = torch.cuda.device_count() if device.type == "cuda" else None
        reason = "" if there is None else f" ({counted(there, 'CUDA device') if there else 'no CUDA device'})"
        raise ConfigError(f"--device {asked} is not available{reason}: use --device cpu or omit it") from None
    return device
