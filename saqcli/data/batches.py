"""Batches of a split, pass by pass, and the share of each rank.

Which images of a pass are this rank's, where several processes work as one.

training     a slice of every batch: rank r of N takes images r B / N to (r + 1) B / N of each batch of B, in the
             order that one process would read them in. The batch, and so the learning rate, do not depend on N.
evaluation   every N-th batch, whole: no image is read twice, and none is counted twice.

Batches of a split, pass by pass, and one clear line when a pass cannot be finished.

Everything random about an epoch follows from (seed, epoch, rank): ``Loader.set_epoch`` seeds the global generators, and
order and augmentation are drawn from them once iteration starts.
"""

import signal
from collections.abc import Iterable, Iterator
from itertools import islice
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from saqcli import distributed
from saqcli.data.archives import Shards
from saqcli.errors import DataError
from saqcli.random_state import seed_everything, seeds_of


class TrainingShare(Sampler[int]):
    """A rank's images of every whole batch of an epoch; the last batch is left out if it is short.

    Args:
        images: in the split.
        batch: images that all ranks take in a step; a multiple of ``count``.
        rank: of this process.
        count: of processes.
        seed: of the run.

    Attributes:
        epoch: that the next pass is of.
    """

    def __init__(self, images: int, batch: int, rank: int, count: int, seed: int) -> None:
        self.images, self.batch, self.rank, self.count, self.seed = images, batch, rank, count, seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        order, share = order_of(self.images, self.seed, self.epoch), self.batch // self.count
        for start in range(self.rank * share, self.images // self.batch * self.batch, self.batch):
            yield from order[start : start + share]

    def __len__(self) -> int:
        return self.images // self.batch * (self.batch // self.count)


class EvaluationShare(Sampler[int]):
    """The images of every ``count``-th batch, from number ``rank`` on, of those of ``sampler``."""

    def __init__(self, sampler: Iterable[int], batch: int, rank: int, count: int) -> None:
        self.sampler, self.batch, self.rank, self.count = sampler, batch, rank, count

    def __iter__(self) -> Iterator[int]:
        return (
            image for place, image in enumerate(self.sampler) if place // self.batch % self.count == self.rank
        )


def order_of(images: int, seed: int, epoch: int) -> list[int]:
    """The order in which one process reads an epoch's images: drawn as torch's loader and random sampler draw it."""
    generator = torch.Generator().manual_seed(seeds_of(seed, epoch, 0)[2])
    for_workers, for_order = (
        int(torch.empty((), dtype=torch.int64).random_(generator=generator)) for _ in range(2)
    )
    del for_workers  # the loader's draw comes first
    order: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(for_order)).tolist()
    return order


_CHILD_ENDED: int | None = getattr(signal, "SIGCHLD", None)


class Loader:
    """Batches of a split: normalized float32 images (N, C, H, W) and int64 labels (N), on the device.

    Made by ``make_loader``. A label of ``LEFT_OUT`` (-1) marks an image that could not be read.

    Attributes:
        name: of the split, for messages.
        images: in one pass of this process; of a stream, about, and 0 if unknown.
    """

    def __init__(
        self, batches: Any, *, name: str, device: torch.device, seed: int, limit: int | None
    ) -> None:
        """``batches`` is timm's loader; ``limit`` ends a pass after that many images."""
        self.name = name
        self._batches = batches
        self._device = device
        self._seed = seed
        self._limit = limit
        self._inner: Any = getattr(batches, "loader", batches)  # the DataLoader within timm's prefetcher
        size: int = self._inner.batch_size
        available = len(self._inner.dataset) if self._streamed else len(self._inner.sampler)
        most = available if limit is None else min(available, limit)
        self._length = min(len(batches), -(-most // size))
        self.images = min(most, self._length * size)

    def __len__(self) -> int:
        """Batches in one pass; of a stream, about, and 0 if unknown."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of ``epoch``: seeds the global generators from (seed, epoch, rank)."""
        seed_everything(self._seed, epoch, distributed.index())
        if self._streamed:
            self._inner.dataset.source.set_epoch(epoch)
        elif isinstance(self._inner.batch_sampler.sampler, TrainingShare):
            self._inner.batch_sampler.sampler.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass.

        Raises:
            DataError: an image that cannot be read, a label out of range, or worker processes that died; the
                same one line whether it happened in this process or in a worker.
        """
        left = self._limit
        handler = signal.getsignal(_CHILD_ENDED) if _CHILD_ENDED else None
        try:
            for images, labels in self._batches:
                _put_back(handler)
                if left is not None:
                    images, labels = images[:left], labels[:left]
                    left -= len(labels)
                yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
                if left == 0:
                    return
        except DataError as error:
            # Let go of the workers here: left to the garbage collector, each takes torch five seconds to end.
            clear_frames(error.__traceback__)
            self._inner._iterator = None
            raise DataError(_without_traceback(error)) from None
        except (RuntimeError, OSError, EOFError) as error:
            if not (self._inner.num_workers and _tells_of_death(error)):
                raise
            raise DataError(
                f"the processes that read {self.name} died, most often for lack of (shared) memory: "
                "lower `data.workers` or `data.batch_size`, or use `data.workers=0`"
            ) from error

    def part(self, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A rank's batches of a pass, of which each is that of one rank: every ``count``-th, from number ``rank`` on,
        or of shards as many in a row. The images of the others are not read, but for hfids/ and tfds/."""
        if self._streamed and isinstance(self._inner.dataset.source, Shards):
            self._inner.dataset.source.share = (rank, count)
            self._inner._iterator = None  # workers that live on hold the share that they began with
            yield from self
            return
        if self._streamed or count == 1:
            yield from islice(self, rank, None, count)
            return
        batches = self._inner.batch_sampler
        whole = batches.sampler
        batches.sampler = EvaluationShare(whole, batches.batch_size, rank, count)
        try:
            yield from self
        finally:
            batches.sampler = whole

    @property
    def _streamed(self) -> bool:
        return isinstance(self._inner.dataset, torch.utils.data.IterableDataset)


def _put_back(handler: Any) -> None:
    """Undo torch's handler, which raises wherever the program is when a worker dies; while it waits, torch asks."""
    if _CHILD_ENDED and handler is not None and signal.getsignal(_CHILD_ENDED) is not handler:
        signal.signal(_CHILD_ENDED, handler)


def _tells_of_death(error: BaseException) -> bool:
    """Whether this is what torch raises when a worker died, be it in the midst of handing over a batch."""
    told = str(error)
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in told or "killed by signal" in told
    return not told.startswith("Caught ")  # else a living worker met with it


def _without_traceback(error: DataError) -> str:
    """The message alone: a worker's error arrives as a traceback that ends in it."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
