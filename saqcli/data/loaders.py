"""Feeding images to a network, reproducibly, through timm's loader.

The order of an epoch does not depend on the number of worker processes; the augmentation does, since each worker draws
its own. Worker processes of a training loader live for one epoch only (timm keeps them), because a process that lives
on carries the state of its generators along, and a resumed run would then differ from an uninterrupted one.
"""

import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saqcli import distributed
from saqcli.data.batches import Loader, TrainingShare
from saqcli.data.datasets import Split, sharded, subset
from saqcli.data.images import ImageSet, ImageStream, Unreadable
from saqcli.data.transforms import CROP_SCALE, Augmentation, image_transform
from saqcli.errors import ConfigError, DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.runs.interrupts import blocked_signals, outlive_one_signal
from saqcli.units import counted

CALIBRATION_IMAGES = 512
LARGEST_SIDE_WITHOUT_WORKERS = (
    64  # pixels; up to here decoding costs less than handing over between processes
)
MOST_WORKERS = 8

_COLOR_MODES = {1: "L", 3: "RGB"}


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
    shared: bool = True,
) -> Loader:
    """A loader of ``split``: shuffled for training, in order otherwise.

    Args:
        split: left as it is.
        preprocessing: of the network.
        batch_size: images a batch, on all ranks together.
        training: shuffle, and let the next image stand in for one that is skipped.
        augmentation: see ``image_transform``; ``none`` is the evaluation view, in training too.
        workers: processes that read; 0 reads in this one.
        device: where batches arrive. On CUDA they are normalized there.
        seed: of the order, the augmentation and the images that ``limit`` keeps.
        drop_last: leave out the last batch if it is short; of a stream (hfids/, tfds/), training always does.
        limit: at most this many images: a ``subset``, or the beginning of a stream.
        crop_scale: see ``image_transform``.
        shared: in training each rank gets its slice of every batch; otherwise, and in evaluation (see ``part``), all
            get everything.

    Raises:
        DataError: not one batch, or a network that reads neither grey nor colour images.
    """
    from timm.data import create_loader

    exact = isinstance(split.dataset, ImageSet) or sharded(split) is not None  # each image once, and how many
    if limit is not None and exact:
        split, limit = subset(split, limit, seed), None
    on_device = device.type == "cuda"
    dataset = _ready(split, preprocessing, training=training)
    divided = training and shared and distributed.count() > 1
    if divided:
        check_shared(split, batch_size)
    if (shards := sharded(split)) is not None:
        if divided:
            batch_size //= distributed.count()
        dataset.source = replace(
            shards,
            batch_size=batch_size,
            shuffled=training,
            drop_last=drop_last or divided,
            seed=seed,
            share=(distributed.index(), distributed.count()) if divided else (0, 1),
        )
    with warnings.catch_warnings():
        # That there are more workers than cores is noted where the option is read.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        batches = create_loader(
            dataset,
            preprocessing.input_size,
            batch_size,
            is_training=training and shards is None,  # else timm drops the last batch of every worker
            mean=preprocessing.mean,
            std=preprocessing.std,
            num_workers=workers,
            pin_memory=on_device,
            device=device,
            use_prefetcher=on_device,
            persistent_workers=not training,
        )
    batches_of = getattr(batches, "loader", batches)
    batches_of.worker_init_fn = partial(_begin_reading, batches_of.worker_init_fn)
    batches_of._get_iterator = partial(_start_readers, weakref.ref(batches_of))
    dataset.transform = image_transform(
        preprocessing, augmentation=augmentation, normalize=not on_device, crop_scale=crop_scale
    )
    if isinstance(dataset, ImageSet):
        # timm always drops the last batch in training; the batch sampler alone decides, and has not run yet.
        batches.batch_sampler.drop_last = drop_last
        if divided:
            _share_out(batches.batch_sampler, split, batch_size, seed)
    else:
        dataset.source.set_loader_cfg(num_workers=workers)
    loader = Loader(batches, name=split.name, device=device, seed=seed, limit=limit)
    if len(loader) == 0 and exact:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, not one batch of {batch_size}: "
            f"use `data.batch_size={max(1, split.images)}` or less, or more data"
        )
    return loader


def _share_out(batches: Any, split: Split, batch_size: int, seed: int) -> None:
    """Let a batch sampler give this rank's slice of every batch."""
    batches.sampler = TrainingShare(split.images, batch_size, distributed.index(), distributed.count(), seed)
    batches.batch_size, batches.drop_last = batch_size // distributed.count(), True


def _start_readers(batches: weakref.ref[Any]) -> Any:
    """What torch's loader does when a pass begins, with signals held back for the processes that it starts.

    By a weak reference: a loader that refers to itself is left to the garbage collector, which cannot end its readers.
    """
    loader: Any = batches()
    with blocked_signals() if loader.num_workers else nullcontext():
        return type(loader)._get_iterator(loader)


def _begin_reading(seeded: Callable[[int], None] | None, worker: int) -> None:
    """What a process that reads images does first."""
    outlive_one_signal()
    if seeded is not None:
        seeded(worker)


def check_shared(split: Split, batch_size: int) -> None:
    """Refuse batches that the ranks cannot share.

    Raises:
        ConfigError: their size is no multiple of the number of ranks.
        DataError: there is not one whole batch, or a stream that gives all images to every process.
    """
    if distributed.count() == 1:
        return
    if batch_size % distributed.count():
        raise ConfigError(
            f"`data.batch_size={batch_size}` is for all {counted(distributed.count(), 'process')} together and "
            f"cannot be shared equally: give a multiple of {distributed.count()}"
        )
    if split.images < batch_size:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, not one whole batch of {batch_size} to share "
            f"out among {counted(distributed.count(), 'process')}: use a smaller `data.batch_size`"
        )
    if isinstance(split.dataset, ImageStream) and sharded(split) is None:
        raise DataError(f"{split.name} cannot be shared out among processes: give a folder, or shards (wds/)")


def _ready(split: Split, preprocessing: Preprocessing, *, training: bool) -> ImageSet | ImageStream:
    """A copy of the split's images, in the colours that the network reads."""
    channels = preprocessing.input_size[0]
    if channels not in _COLOR_MODES:
        raise DataError(
            f"{split.name} holds images, the model reads {counted(channels, 'channel')}: "
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


def default_workers(preprocessing: Preprocessing) -> int:
    """Worker processes to read images with: none for small ones, otherwise up to eight, one a core."""
    if max(preprocessing.input_size[1:]) <= LARGEST_SIDE_WITHOUT_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)
