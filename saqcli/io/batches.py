"""Batches of a split, pass by pass, and one clear line when a pass cannot be finished.

Everything random about an epoch follows from (seed, epoch, rank): ``Loader.set_epoch`` seeds the global generators, and
order and augmentation are drawn from them once iteration starts.
"""

import signal
from collections.abc import Iterator
from itertools import islice
from traceback import clear_frames
from typing import Any

import torch
from torch import Tensor

from saqcli import ranks
from saqcli.errors import DataError
from saqcli.io.seeds import seed_everything
from saqcli.io.shards import Shards
from saqcli.io.shares import EvaluationShare, TrainingShare

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
        seed_everything(self._seed, epoch, ranks.index())
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
                f"the processes that read {self.name} died, most often for want of (shared) memory: "
                "lower --workers or --batch-size, or give --workers 0"
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
