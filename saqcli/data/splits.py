"""Training and validation images of a network, with their loaders."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from saqcli import distributed
from saqcli.config import DataSection, RunConfig
from saqcli.data.batches import Loader
from saqcli.data.cache import WHY_NOT_KEPT, ImageCache, Limit
from saqcli.data.datasets import Split, check_fingerprint, check_same_classes, fingerprint, open_split
from saqcli.data.images import ImageSet
from saqcli.data.loaders import (
    calibration_loader,
    check_shared,
    default_workers,
    make_loader,
    view_of,
)
from saqcli.data.transforms import Augmentation
from saqcli.errors import ConfigError
from saqcli.machine import cores
from saqcli.models.preprocessing import Preprocessing, has_small_images
from saqcli.progress import SILENT, Progress
from saqcli.runs.directory import RunDirectory
from saqcli.tasks.labels import Classes
from saqcli.units import counted, format_quantity

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Images:
    """Training and validation images of a network, with their loaders."""

    train: Split
    val: Split
    preprocessing: Preprocessing
    section: DataSection
    device: torch.device
    seed: int

    @classmethod
    def open(
        cls,
        config: RunConfig,
        classes: Classes | int,
        preprocessing: Preprocessing,
        device: torch.device,
        progress: Progress = SILENT,
    ) -> "Images":
        """Open both splits of the data; their classes must agree.

        Raises:
            ConfigError: ``data.path`` is not set.
            DataError: the splits cannot be used with this network.
        """
        notes: dict[str, None] = {}
        limit = Limit.for_kind(config.data.cache, distributed.count())
        train, val = (
            _open(config.data, split, classes, notes, progress, limit) for split in ("train", "val")
        )
        check_same_classes(train, val)
        check_shared(train, config.data.batch_size)
        _report(notes, progress)
        images = cls(train, val, preprocessing, config.data, device, config.run.seed)
        images._reserve(progress, train, val)
        return images

    @classmethod
    def training_only(
        cls,
        section: DataSection,
        classes: Classes | int,
        preprocessing: Preprocessing,
        device: torch.device,
        seed: int,
        progress: Progress = SILENT,
    ) -> "Images":
        """Open the training split, also in place of the validation split: for a search, which must not use the latter.

        Raises:
            ConfigError: ``data.path`` is not set.
            DataError: the split cannot be used with this network.
        """
        split = open_named(section, "train", classes, progress)
        check_shared(split, section.batch_size)
        images = cls(split, split, preprocessing, section, device, seed)
        images._reserve(progress, split)
        return images

    def _reserve(self, progress: Progress, *splits: Split) -> None:
        """Decide which images are kept in memory, and note it; those of a file are decided when it is opened."""
        if self.section.cache not in ("auto", "memory"):
            return
        kept = 0
        for split in splits:
            augmentation = self._augmentation if split is self.train else "none"
            if view_of(split, split.dataset, self.preprocessing, augmentation) is not None:
                kept += split.images
            elif self.section.cache == "memory":
                progress.note(f"`data.cache=memory`: {split.name} is read in every epoch ({WHY_NOT_KEPT})")
        if kept:
            size = format_quantity(kept * math.prod(self.preprocessing.input_size), "B")
            progress.note(f"{counted(kept, 'image')} stay in memory once they are read, {size}")

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of ``train`` and ``val``, which the run records."""
        return {"train": fingerprint(self.train), "val": fingerprint(self.val)}

    def check_fingerprints(
        self, recorded: Mapping[str, str], expected_by: str = "the run started with"
    ) -> None:
        """Check that the splits in ``recorded`` have the fingerprints that it holds.

        Raises:
            DataError: a split has another fingerprint.
        """
        for name, split, called in (("train", self.train, "training"), ("val", self.val, "validation")):
            if name in recorded:
                check_fingerprint(recorded[name], split, called, expected_by)

    def record_or_check(self, run: RunDirectory, prefix: str = "") -> None:
        """Record the images' fingerprints in a run's manifest, or compare them with those recorded, on all ranks.

        A cache on disk is kept in the run's folder from here on.

        Args:
            run: the run with the manifest.
            prefix: prefix of the splits' names in the manifest, for data other than the run's main data.

        Raises:
            DataError: the images differ from the recorded ones, or between ranks.
        """
        self.cache_in(run, prefix)
        known = distributed.from_first(lambda: run.manifest().images)
        names = (f"{prefix}train", f"{prefix}val")
        recorded = {name.removeprefix(prefix): line for name, line in known.items() if name in names}
        if recorded:
            distributed.together(lambda: self.check_fingerprints(recorded))
            return
        now = self.fingerprints()
        of_first = distributed.from_first(lambda: now)
        distributed.together(lambda: self.check_fingerprints(of_first, "the first process sees"))
        more = {} if prefix else {"class_order": self.train.class_order}
        run.note_images(known | {f"{prefix}{name}": line for name, line in now.items()}, **more)

    def cache_in(self, run: RunDirectory, prefix: str = "") -> None:
        """Keep a cache on disk in the run's folder from here on; see ``record_or_check``."""
        for split in (self.train, self.val):
            if split.cache is not None:
                split.cache.folder = run.path / "cache" / prefix.strip()

    def training(self, limit: int | None = None, *, shared: bool = True) -> Loader:
        """A loader of shuffled, augmented images, ``limit`` at most; call ``set_epoch`` before each pass.

        Each rank gets its slice of every batch, or the whole batch if not ``shared``.
        """
        return make_loader(
            self.train,
            self.preprocessing,
            batch_size=self.section.batch_size,
            training=True,
            augmentation=self._augmentation,
            workers=workers_of(self.section, self.preprocessing),
            device=self.device,
            seed=self.seed,
            drop_last=limit is None and self.train.images >= self.section.batch_size,
            limit=limit,
            crop_scale=self.section.crop_scale,
            shared=shared,
        )

    @property
    def _augmentation(self) -> Augmentation:
        """The augmentation of training images."""
        wanted = self.section.augmentation
        if wanted == "auto":
            return "cifar" if has_small_images(self.preprocessing) else "imagenet"
        return wanted

    def calibration(self) -> Loader:
        """A loader of a few training images in their evaluation view."""
        return calibration_loader(
            self.train,
            self.preprocessing,
            batch_size=CALIBRATION_BATCH,
            workers=workers_of(self.section, self.preprocessing),
            device=self.device,
            seed=self.seed,
            images=self.section.calibration_images,
        )

    def validation(self, limit: int | None = None) -> Loader:
        """A loader of all validation images in order, or of ``limit`` images drawn evenly over the classes."""
        return validation_loader(self.val, self.preprocessing, self.section, self.device, self.seed, limit)


def open_named(
    section: DataSection,
    split: Literal["train", "val"],
    classes: Classes | int,
    progress: Progress = SILENT,
) -> Split:
    """Open one split of the data; choices made for the user are noted on ``progress``."""
    notes: dict[str, None] = {}
    limit = Limit.for_kind(section.cache, distributed.count())
    opened = _open(section, split, classes, notes, progress, limit)
    _report(notes, progress)
    return opened


def _open(
    section: DataSection,
    split: Literal["train", "val"],
    classes: Classes | int,
    notes: dict[str, None],
    progress: Progress,
    limit: Limit,
) -> Split:
    opened = open_split(
        data_path(section),
        split,
        num_classes=classes,
        bad_images=section.bad_images,
        class_order=section.class_order,
        class_map=section.class_map,
        exif_transpose=bool(section.exif_transpose),
    )
    notes |= dict.fromkeys(opened.notes)
    if (section.workers or 0) > cores():
        notes[
            f"`data.workers={section.workers}` exceeds the {cores()} cores of this process and may be slower"
        ] = None
    if not isinstance(opened.dataset, ImageSet):
        return opened
    identity = partial(fingerprint, opened)
    cache = ImageCache(split, opened.dataset, section.cache, limit, identity, progress.note)
    return replace(opened, cache=cache)


def _report(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress.note(note)


def data_path(section: DataSection) -> str:
    """The path of the data; also an early check before long work.

    Raises:
        ConfigError: ``data.path`` is not set.
    """
    if section.path is None:
        raise ConfigError(
            "no images given: use `data.path=DIR` with train/ and val/, one folder per class in each"
        )
    return section.path


def validation_loader(
    split: Split,
    preprocessing: Preprocessing,
    section: DataSection,
    device: torch.device,
    seed: int = 0,
    limit: int | None = None,
) -> Loader:
    """A loader of ``split`` in its evaluation view, in a fixed order."""
    return make_loader(
        split,
        preprocessing,
        batch_size=section.eval_batch_size or (256 if has_small_images(preprocessing) else 64),
        training=False,
        workers=workers_of(section, preprocessing),
        device=device,
        seed=seed,
        limit=limit,
    )


def workers_of(section: DataSection, preprocessing: Preprocessing) -> int:
    """The number of worker processes that read images."""
    return default_workers(preprocessing) if section.workers is None else section.workers
