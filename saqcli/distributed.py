"""Collective operations on the ranks of torch's default process group.

``torchrun`` starts the processes, ``process_group.py`` joins them. All ranks run the same code on their own share of
the images and hold the same weights after every step. Without a process group there is one rank, and every function
here returns its argument.

A rank that fails closes its connections; the others then raise ``StoppedElsewhere``. The message of the failed rank
gives the reason.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from saqcli.errors import SaqError, StoppedElsewhere, out_of_memory

BUCKET = 2**24  # values per all-reduce
LOST = ("connection", "closed by peer", "broken pipe", "socket", "timed out", "timeout", "gloo", "nccl")

T = TypeVar("T")


def count() -> int:
    """Number of ranks."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def index() -> int:
    """Index of this rank, from 0."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def first() -> bool:
    """Whether this rank writes and prints."""
    return index() == 0


def from_first(make: Callable[[], T]) -> T:
    """The result of ``make`` on the first rank; the others do not call it.

    Raises:
        SaqError: the error of ``make`` on the first rank; ``StoppedElsewhere`` on the others.
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
    """The result of ``make`` on every rank; ``make`` must not communicate with other ranks.

    Raises:
        SaqError: the error of ``make`` on the lowest rank that failed; ``StoppedElsewhere`` on the others.
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


def reported_once(error: SaqError) -> SaqError:
    """The exception to raise for ``error``, which occurs on all ranks alike: only the first reports it."""
    return error if first() else StoppedElsewhere(error.exit_code)


def gathered(value: T) -> list[T]:
    """``value`` of every rank, in rank order."""
    if count() == 1:
        return [value]
    import torch.distributed as dist

    values: list[Any] = [None] * count()
    with _connected():
        dist.all_gather_object(values, value)
    return values


def any_of(flag: bool) -> bool:
    """Whether ``flag`` is true on at least one rank."""
    return (count() > 1 and totals(float(flag))[0] > 0) or (count() == 1 and flag)


def totals(*values: float) -> list[float]:
    """Sums over the ranks, in double precision if the device supports it."""
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

    Tensors are concatenated into buckets of ``BUCKET`` values by type and device, one all-reduce per bucket. All ranks
    get the same bits.
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
    """Every ``count()``-th of ``items``, from number ``index()``; items with a method ``part`` divide themselves."""
    part = getattr(items, "part", None)
    if part is not None:
        cut: Iterator[T] = part(index(), count())
        return cut
    return islice(items, index(), None, count())


def interleaved(lists: Sequence[Sequence[T]]) -> list[T]:
    """Inverse of ``share``: the items of all ranks in their original order."""
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
    """Device of the group's tensors: NCCL supports GPUs only."""
    import torch.distributed as dist

    return "cuda" if dist.get_backend() == "nccl" else "cpu"


@contextmanager
def _connected() -> Iterator[None]:
    """Raises ``StoppedElsewhere`` for a lost connection."""
    try:
        yield
    except RuntimeError as error:  # gloo has no exception class; NCCL's is a RuntimeError
        if type(error) is RuntimeError and not any(words in str(error).lower() for words in LOST):
            raise
        if out_of_memory(error):
            raise
        raise StoppedElsewhere() from error
