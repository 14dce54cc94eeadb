"""Reproducible loaders, made with timm's loader, or from a cache of decoded images.

The order of an epoch does not depend on the number of worker processes; the augmentation does, since each worker has
its own generators. Neither depends on the cache. Worker processes of a training loader live for one epoch only (timm
keeps them): a persistent worker would keep the state of its generators, and a resumed run would differ from an
uninterrupted one.
"""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from saqcli import distributed
from saqcli.data.batches import Loader, TrainingSampler
from saqcli.data.cache import View
from saqcli.data.cached_batches import CachedBatches
from saqcli.data.datasets import Split, sharded, subset
from saqcli.data.images import ImageSet, ImageStream, Unreadable
from saqcli.data.transforms import CROP_SCALE, Augmentation, image_transform
from saqcli.data.workers import any_number_of_workers, prepare_workers
from saqcli.errors import ConfigError, DataError
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.units import counted

CALIBRATION_IMAGES = 512
LARGEST_SIDE_WITHOUT_WORKERS = 64  # pixels; decoding smaller images costs less than sending them to a process
MAX_WORKERS = 8

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
        split: data of the loader; not changed.
        preprocessing: preprocessing of the network.
        batch_size: images per batch, on all ranks together.
        training: shuffle, and replace a skipped image by the next one.
        augmentation: see ``image_transform``; ``none`` is the evaluation view, in training too.
        workers: number of worker processes; 0 reads in the main process.
        device: device of the batches. On CUDA they are also normalized there.
        seed: seed of the order, the augmentation and the images chosen by ``limit``.
        drop_last: drop the last batch if it is short; training on a stream (hfids/, tfds/) always does.
        limit: maximum number of images: a ``subset``, or the beginning of a stream.
        crop_scale: see ``image_transform``.
        shared: in training, give each rank its slice of every batch; if False, and in evaluation (see ``part``), every
            rank gets all images.

    Raises:
        DataError: there is not one batch, or the network reads neither grey nor colour images.
    """
    from timm.data import create_loader

    exact = isinstance(split.dataset, ImageSet) or sharded(split) is not None  # the number of images is known
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
    with any_number_of_workers():
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
            use_prefetcher=False,
            persistent_workers=not training,
        )
    prepare_workers(batches)
    dataset.transform = image_transform(
        preprocessing, augmentation=augmentation, normalize=not on_device, crop_scale=crop_scale
    )
    if isinstance(dataset, ImageSet):
        # timm always drops the last batch in training; only the batch sampler, which has not run yet, decides.
        batches.batch_sampler.drop_last = drop_last
        if divided:
            _distribute(batches.batch_sampler, split, batch_size, seed)
    else:
        dataset.source.set_loader_cfg(num_workers=workers)
    view = view_of(split, dataset, preprocessing, augmentation)
    if view is not None:
        batches = CachedBatches(batches, view, device, augmented=augmentation == "cifar")
    loader = Loader(batches, preprocessing, name=split.name, device=device, seed=seed, limit=limit)
    if len(loader) == 0 and exact:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, less than one batch of {batch_size}: "
            f"use `data.batch_size={max(1, split.images)}` or less, or more data"
        )
    return loader


def view_of(
    split: Split, images: ImageSet | ImageStream, preprocessing: Preprocessing, augmentation: Augmentation
) -> View | None:
    """The ``images`` of a split in its cache; None if they are read in every epoch."""
    if split.cache is None or isinstance(images, ImageStream):
        return None
    return split.cache.view(images, preprocessing, augmentation)


def _distribute(batches: Any, split: Split, batch_size: int, seed: int) -> None:
    """Make a batch sampler yield only this rank's slice of every batch."""
    batches.sampler = TrainingSampler(
        split.images, batch_size, distributed.index(), distributed.count(), seed
    )
    batches.batch_size, batches.drop_last = batch_size // distributed.count(), True


def check_shared(split: Split, batch_size: int) -> None:
    """Check that the ranks can share the batches of a split.

    Raises:
        ConfigError: the batch size is not a multiple of the number of ranks.
        DataError: there is less than one whole batch, or the split is a stream, which every process reads as a whole.
    """
    if distributed.count() == 1:
        return
    if batch_size % distributed.count():
        raise ConfigError(
            f"`data.batch_size={batch_size}` is the total of {counted(distributed.count(), 'process')} and cannot be "
            f"divided equally: give a multiple of {distributed.count()}"
        )
    if split.images < batch_size:
        raise DataError(
            f"{split.name} has {counted(split.images, 'image')}, less than one batch of {batch_size} to divide "
            f"among {counted(distributed.count(), 'process')}: use a smaller `data.batch_size`"
        )
    if isinstance(split.dataset, ImageStream) and sharded(split) is None:
        raise DataError(f"{split.name} cannot be divided among processes: give a folder, or shards (wds/)")


def _ready(split: Split, preprocessing: Preprocessing, *, training: bool) -> ImageSet | ImageStream:
    """A copy of the split's images, in the network's colour mode."""
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
    """A loader of a few images of ``split``, the same at every pass, in their evaluation view.

    A skipped image is replaced by the next one, so that no blank image is used for calibration.
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
    """Read the batches of one pass into memory, without unreadable images.

    Raises:
        DataError: no image is readable; the message says that there is nothing to ``purpose``.
    """
    batches = []
    with progress.task("reading images", len(loader)) as task:
        for images, labels in loader:
            readable = labels >= 0
            if readable.any():
                batches.append((images[readable], labels[readable]))
            task.advance(images=len(labels))
    if not batches:
        raise DataError(f"no image could be read: there is nothing to {purpose}")
    return batches


def default_workers(preprocessing: Preprocessing) -> int:
    """Default number of worker processes: none for small images, otherwise one per core, at most eight."""
    if max(preprocessing.input_size[1:]) <= LARGEST_SIDE_WITHOUT_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_WORKERS, cores)
