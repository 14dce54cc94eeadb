"""Feeding images to a network, reproducibly, through timm's loader.

Everything random about an epoch follows from (seed, epoch): ``Loader.set_epoch`` seeds the global generators,
and order and augmentation are drawn from them once iteration starts. The order does not depend on the number
of worker processes; the augmentation does, since each worker draws its own. Worker processes of a training
loader live for one epoch only (timm keeps them), because a process that lives on carries the state of its
generators along, and a resumed run would then differ from an uninterrupted one.
"""

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from traceback import clear_frames
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saqcli.errors import DataError
from saqcli.io.data import Split, sharded, subset
from saqcli.io.images import ImageSet, ImageStream, Unreadable
from saqcli.io.preprocessing import Preprocessing
from saqcli.io.transforms import CROP_SCALE, Augmentation, image_transform
from saqcli.progress import Progress

CALIBRATION_IMAGES = 512
LARGEST_SIDE_WITHOUT_WORKERS = (
    64  # pixels; up to here decoding costs less than handing over between processes
)
MOST_WORKERS = 8

_CHILD_ENDED: int | None = getattr(signal, "SIGCHLD", None)
_COLOR_MODES = {1: "L", 3: "RGB"}


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
        sampler = self._inner.sampler
        seed_everything(self._seed, epoch, getattr(sampler, "rank", 0))
        if hasattr(sampler, "set_epoch"):  # a distributed sampler, which shuffles from a seed of its own
            sampler.seed = self._seed
            sampler.set_epoch(epoch)
        if self._streamed:
            self._inner.dataset.source.set_epoch(epoch)

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

    @property
    def _streamed(self) -> bool:
        return isinstance(self._inner.dataset, torch.utils.data.IterableDataset)


def make_loader(
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    training: bool,
    augmentation: Augmentation = "none",
    workers: int,
    device: torch.device,
    seed: int,
    drop_last: bool = False,
    limit: int | None = None,
    crop_scale: tuple[float, float] = CROP_SCALE,
    distributed: bool = False,
) -> Loader:
    """A loader of ``split``: shuffled for training, in order otherwise.

    Args:
        split: left as it is.
        preprocessing: of the network.
        batch_size: images a batch, on this process.
        training: shuffle, and let the next image stand in for one that is skipped.
        augmentation: see ``image_transform``; ``none`` is the evaluation view, in training too.
        workers: processes that read; 0 reads in this one.
        device: where batches arrive. On CUDA they are normalized there.
        seed: of the order, the augmentation and the images that ``limit`` keeps.
        drop_last: leave out the last batch if it is short; of a stream (hfids/, tfds/), training always does.
        limit: at most this many images: a ``subset``, or the beginning of a stream.
        crop_scale: see ``image_transform``.
        distributed: share the images out among the processes of the default group; evaluation then sees a few
            twice, so that all have equally many.

    Raises:
        DataError: not one batch, or a network that reads neither grey nor colour images.
    """
    from timm.data import create_loader

    exact = isinstance(split.dataset, ImageSet) or sharded(split) is not None  # each image once, and how many
    if limit is not None and exact:
        split, limit = subset(split, limit, seed), None
    on_device = device.type == "cuda"
    dataset = _ready(split, preprocessing, training=training)
    if (shards := sharded(split)) is not None:
        dataset.source = replace(
            shards, batch_size=batch_size, shuffled=training, drop_last=drop_last, seed=seed
        )
    batches = create_loader(
        dataset,
        preprocessing.input_size,
        batch_size,
        is_training=training and shards is None,  # else timm drops the last batch of every worker
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=workers,
        distributed=distributed,
        pin_memory=on_device,
        device=device,
        use_prefetcher=on_device,
        persistent_workers=not training,
    )
    dataset.transform = image_transform(
        preprocessing, augmentation=augmentation, normalize=not on_device, crop_scale=crop_scale
    )
    if isinstance(dataset, ImageSet):
        # timm always drops the last batch in training; the batch sampler alone decides, and has not run yet.
        batches.batch_sampler.drop_last = drop_last
    else:
        dataset.source.set_loader_cfg(num_workers=workers)
    loader = Loader(batches, name=split.name, device=device, seed=seed, limit=limit)
    if len(loader) == 0 and exact:
        raise DataError(
            f"{split.name} has {split.images} images, not one batch of {batch_size}: "
            f"give --batch-size {max(1, split.images)} or less, or more data"
        )
    return loader


def _ready(split: Split, preprocessing: Preprocessing, *, training: bool) -> ImageSet | ImageStream:
    """A copy of the split's images, in the colours that the network reads."""
    channels = preprocessing.input_size[0]
    if channels not in _COLOR_MODES:
        raise DataError(
            f"{split.name} holds images, the model reads {channels} channels: "
            "give a model that reads 1 (grey) or 3 (colour)"
        )
    skipped: Unreadable = "replace" if training else "leave_out"
    unreadable = skipped if split.bad_images == "skip" else split.bad_images
    return replace(split.dataset, mode=_COLOR_MODES[channels], unreadable=unreadable)


def calibration_loader(
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    seed: int,
    images: int = CALIBRATION_IMAGES,
) -> Loader:
    """The same few images of ``split`` at every pass, in the same order, as evaluation sees them.

    An image that is to be skipped is replaced by the next one, so that no blank one is calibrated on.
    """
    return make_loader(
        split if split.bad_images == "refuse" else replace(split, bad_images="replace"),
        preprocessing,
        batch_size=batch_size,
        training=False,
        workers=workers,
        device=device,
        seed=seed,
        limit=images,
    )


def read_all(loader: Loader, progress: Progress, purpose: str) -> list[tuple[Tensor, Tensor]]:
    """The batches of one pass, to be kept in memory; images that could not be read are left out.

    Raises:
        DataError: not one could be read; it says that there is nothing to ``purpose``.
    """
    batches = []
    with progress.task("reading images", len(loader)) as task:
        for images, labels in loader:
            readable = labels >= 0
            if readable.any():
                batches.append((images[readable], labels[readable]))
            task.advance(images=len(labels))
    if not batches:
        raise DataError(f"not one image could be read: there is nothing to {purpose}")
    return batches


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed the global generators of Python, NumPy and torch (all devices) from (seed, epoch, rank).

    A ``SeedSequence`` mixes the three, so that (1, 0) and (0, 1) have nothing in common.
    """
    state = np.random.SeedSequence((seed, epoch, rank)).generate_state(3, np.uint64)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]) % 2**32)
    torch.manual_seed(int(state[2]))


def default_workers(preprocessing: Preprocessing) -> int:
    """Worker processes to read images with: none for small ones, otherwise up to eight, one a core."""
    if max(preprocessing.input_size[1:]) <= LARGEST_SIDE_WITHOUT_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


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
