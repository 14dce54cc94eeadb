"""Loaders: batches of a split, distributed over the ranks.

Several processes divide the images of a pass as follows:

training     a slice of every batch: rank r of N takes images r B / N to (r + 1) B / N of each batch of B, in the
             order of a single process. The batch size, and so the learning rate, do not depend on N.
evaluation   every N-th batch as a whole: no image is read or counted twice.

All randomness of an epoch follows from (seed, epoch, rank): ``Loader.set_epoch`` seeds the global generators, and
order and augmentation are drawn from them when iteration starts. A pass that fails raises an error of one line.
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
from saqcli.data.transforms import normalized
from saqcli.errors import DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.random_state import seed_everything, seeds_of


class TrainingSampler(Sampler[int]):
    """A rank's images of every whole batch of an epoch; a short last batch is dropped.

    Args:
        images: images in the split.
        batch: images of all ranks in one step; a multiple of ``count``.
        rank: rank of this process.
        count: number of processes.
        seed: seed of the run.

    Attributes:
        epoch: epoch of the next pass.
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


class EvaluationSampler(Sampler[int]):
    """The images of every ``count``-th batch of ``sampler``, starting with batch ``rank``."""

    def __init__(self, sampler: Iterable[int], batch: int, rank: int, count: int) -> None:
        self.sampler, self.batch, self.rank, self.count = sampler, batch, rank, count

    def __iter__(self) -> Iterator[int]:
        return (
            image for place, image in enumerate(self.sampler) if place // self.batch % self.count == self.rank
        )


def order_of(images: int, seed: int, epoch: int) -> list[int]:
    """The order of an epoch's images in a single process, drawn exactly as torch's loader and random sampler do."""
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

    Created by ``make_loader``. The label ``LEFT_OUT`` (-1) marks an image that could not be read.

    Attributes:
        name: name of the split in messages.
        images: images in one pass of this process; approximate for a stream, 0 if unknown.
    """

    def __init__(
        self,
        batches: Any,
        preprocessing: Preprocessing,
        *,
        name: str,
        device: torch.device,
        seed: int,
        limit: int | None,
    ) -> None:
        """``batches`` are torch's loader, or cached; images of 8 bits are normalized by ``preprocessing`` here.

        ``limit`` ends a pass after that many images.
        """
        self.name = name
        self._preprocessing = preprocessing
        self._batches = batches
        self._device = device
        self._seed = seed
        self._limit = limit
        self._inner: Any = getattr(batches, "loader", batches)  # the DataLoader whose batches are cached
        size: int = self._inner.batch_size
        available = len(self._inner.dataset) if self._streamed else len(self._inner.sampler)
        most = available if limit is None else min(available, limit)
        self._length = min(len(batches), -(-most // size))
        self.images = min(most, self._length * size)

    def __len__(self) -> int:
        """Batches in one pass; approximate for a stream, 0 if unknown."""
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass: seeds the global generators from (seed, epoch, rank)."""
        seed_everything(self._seed, epoch, distributed.index())
        if self._streamed:
            self._inner.dataset.source.set_epoch(epoch)
        elif isinstance(self._inner.batch_sampler.sampler, TrainingSampler):
            self._inner.batch_sampler.sampler.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass.

        Raises:
            DataError: an image cannot be read, a label is out of range, or a worker process died; the message is the
                same whether it happened in this process or in a worker.
        """
        left = self._limit
        handler = signal.getsignal(_CHILD_ENDED) if _CHILD_ENDED else None
        try:
            for images, labels in self._batches:
                _restore_handler(handler)
                if left is not None:
                    images, labels = images[:left], labels[:left]
                    left -= len(labels)
                images, labels = (each.to(self._device, non_blocking=True) for each in (images, labels))
                if images.dtype == torch.uint8:
                    images = normalized(images, self._preprocessing)
                yield images, labels
                if left == 0:
                    return
        except DataError as error:
            # Release the workers here: if the garbage collector ends them, torch needs five seconds for each.
            clear_frames(error.__traceback__)
            self._inner._iterator = None
            raise DataError(_without_traceback(error)) from None
        except (RuntimeError, OSError, EOFError) as error:
            if not (self._inner.num_workers and _is_worker_death(error)):
                raise
            raise DataError(
                f"the worker processes that read {self.name} died, most often because (shared) memory ran out: "
                "lower `data.workers` or `data.batch_size`, or use `data.workers=0`"
            ) from error

    def part(self, rank: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one rank in an evaluation pass: every ``count``-th batch, starting with batch ``rank``.

        For shards (wds/) these are as many consecutive batches. Images of other ranks are not read, except in hfids/
        and tfds/.
        """
        if self._streamed and isinstance(self._inner.dataset.source, Shards):
            self._inner.dataset.source.share = (rank, count)
            self._inner._iterator = None  # persistent workers keep the share with which they started
            yield from self
            return
        if self._streamed or count == 1:
            yield from islice(self, rank, None, count)
            return
        batches = self._inner.batch_sampler
        whole = batches.sampler
        batches.sampler = EvaluationSampler(whole, batches.batch_size, rank, count)
        try:
            yield from self
        finally:
            batches.sampler = whole

    @property
    def _streamed(self) -> bool:
        return isinstance(self._inner.dataset, torch.utils.data.IterableDataset)


def _restore_handler(handler: Any) -> None:
    """Remove torch's SIGCHLD handler, which raises anywhere in the program; torch also checks workers while waiting."""
    if _CHILD_ENDED and handler is not None and signal.getsignal(_CHILD_ENDED) is not handler:
        signal.signal(_CHILD_ENDED, handler)


def _is_worker_death(error: BaseException) -> bool:
    """Whether torch raised ``error`` because a worker died, possibly while it transferred a batch."""
    text = str(error)
    if isinstance(error, RuntimeError):
        return "exited unexpectedly" in text or "killed by signal" in text
    return not text.startswith("Caught ")  # torch's prefix of errors that a live worker reports


def _without_traceback(error: DataError) -> str:
    """The message of an error; an error from a worker contains its whole traceback, which ends with the message."""
    return str(error).strip().splitlines()[-1].removeprefix(f"{DataError.__module__}.{DataError.__name__}: ")
