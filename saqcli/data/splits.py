"""Training, validation and calibration images of a network, with their loaders.

Calibration images are training images, unless ``data.calibration`` gives others, which have no labels. Then a run needs
no training images, if nothing is trained, and without ``data.path`` no labels at all: its quantized network is compared
with the float one on images that are held out from calibration, or, if there are few, on the calibration images.
"""

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
from saqcli.data.datasets import (
    Split,
    check_fingerprint,
    check_same_classes,
    check_set_opens,
    divide,
    fingerprint,
    open_split,
    open_unlabelled,
)
from saqcli.data.forms.labelled import SYNONYMS
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
HELD_OUT_SHARE, MOST_HELD_OUT = 1 / 4, 512  # of unlabelled images, to compare with the float network on
FEWEST_TO_HOLD_OUT = 64  # unlabelled images

ScoredOn = Literal["validation", "held out", "calibration"]


@dataclass(frozen=True)
class Images:
    """Images of a network, with their loaders.

    Attributes:
        train: training images; those for calibration if nothing is trained.
        val: images that the network is scored on.
        preprocessing: of the network.
        section: the settings.
        device: of the batches.
        seed: of the run.
        unlabelled: all images of ``data.calibration``; None if training images serve for calibration.
        calibrating: those of them that serve for calibration; None for ``train``.
        trains: whether ``train`` has labels.
        scored_on: what ``val`` is: validation images with labels, or unlabelled images.
    """

    train: Split
    val: Split
    preprocessing: Preprocessing
    section: DataSection
    device: torch.device
    seed: int
    unlabelled: Split | None = None
    calibrating: Split | None = None
    trains: bool = True
    scored_on: ScoredOn = "validation"

    @classmethod
    def open(
        cls,
        config: RunConfig,
        classes: Classes | int,
        preprocessing: Preprocessing,
        device: torch.device,
        progress: Progress = SILENT,
        *,
        trains: bool = True,
    ) -> "Images":
        """Open both splits of the data, whose classes must agree, and the images for calibration.

        Args:
            config: of the run.
            classes: of the network.
            preprocessing: of the network.
            device: of the batches.
            progress: receives notes.
            trains: whether labelled training images are needed in addition to ``data.calibration``.

        Raises:
            ConfigError: neither ``data.path`` nor ``data.calibration`` is set, or ``data.split`` is the training split,
                which the run learns from.
            DataError: the splits cannot be used with this network.
        """
        if config.data.calibration is not None:
            return cls._open_unlabelled(config, classes, preprocessing, device, progress, trains=trains)
        notes: dict[str, None] = {}
        check_scored(config.data)
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
    def _open_unlabelled(
        cls,
        config: RunConfig,
        classes: Classes | int,
        preprocessing: Preprocessing,
        device: torch.device,
        progress: Progress,
        *,
        trains: bool,
    ) -> "Images":
        """The images of ``open`` with ``data.calibration``."""
        section, seed, notes = config.data, config.run.seed, dict[str, None]()
        limit = Limit.for_kind(section.cache, distributed.count())
        unlabelled = _open_calibration(section, classes, notes, progress, limit)
        if section.path is None:
            held_out, calibrating, scored_on = _hold_out(unlabelled, seed)
            train, val, kept = calibrating, held_out, list[Split]()
        else:
            calibrating, scored_on = unlabelled, "validation"
            val = _open(section, "val", classes, notes, progress, limit)
            train = replace(
                unlabelled,
                class_names=val.class_names,
                folders=val.folders,
                class_order=val.class_order,
            )
            kept = [val]
            if trains:
                check_scored(section)
                train = _open(section, "train", classes, notes, progress, limit)
                check_same_classes(train, val)
                check_shared(train, section.batch_size)
                kept.append(train)
        _report(notes, progress)
        trains = trains and section.path is not None
        images = cls(
            *(train, val, preprocessing, section, device, seed, unlabelled, calibrating, trains, scored_on)
        )
        images._reserve(progress, *kept)  # of unlabelled images, those that are used
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

        Without ``data.path``, the images of ``data.calibration`` are both.

        Raises:
            ConfigError: neither ``data.path`` nor ``data.calibration`` is set.
            DataError: the split cannot be used with this network.
        """
        if section.calibration is not None:
            notes: dict[str, None] = {}
            limit = Limit.for_kind(section.cache, distributed.count())
            unlabelled = _open_calibration(section, classes, notes, progress, limit)
            split, trains = unlabelled, section.path is not None
            if trains:
                split = _open(section, "train", classes, notes, progress, limit)
                check_shared(split, section.batch_size)
            _report(notes, progress)
            scored_on: ScoredOn = "validation" if trains else "calibration"
            images = cls(
                *(split, split, preprocessing, section, device, seed),
                *(unlabelled, unlabelled, trains, scored_on),
            )
            images._reserve(progress, *([split] if trains else []))
            return images
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

    @property
    def labelled(self) -> bool:
        """Whether ``val`` has labels, so that accuracy can be measured."""
        return self.scored_on == "validation"

    @property
    def splits(self) -> dict[str, Split]:
        """The data sets by their names in the run: ``train`` and ``val`` if they have labels, ``calibration``."""
        found = {"train": self.train} if self.trains else {}
        found |= {"val": self.val} if self.labelled else {}
        return found | ({"calibration": self.unlabelled} if self.unlabelled is not None else {})

    @property
    def data_of_scores(self) -> str:
        """The folder or file of ``val``, as it was given."""
        return str(self.section.path if self.labelled else self.section.calibration)

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of ``splits``, which the run records."""
        return {name: fingerprint(split) for name, split in self.splits.items()}

    def check_fingerprints(
        self, recorded: Mapping[str, str], expected_by: str = "the run started with"
    ) -> None:
        """Check that the splits in ``recorded`` have the fingerprints that it holds.

        Raises:
            DataError: a split has another fingerprint.
        """
        called = {"train": "training", "val": "validation", "calibration": "calibration"}
        for name, split in self.splits.items():
            if name in recorded:
                check_fingerprint(recorded[name], split, called[name], expected_by)

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
        names = [f"{prefix}{name}" for name in ("train", "val", "calibration")]
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
        for split in (self.train, self.val, self.unlabelled):
            if split is not None and split.cache is not None:
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
        """A loader of a few calibration images in their evaluation view."""
        return calibration_loader(
            self.train if self.calibrating is None else self.calibrating,
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


def scored_split(section: DataSection, split: str) -> str:
    """The name of a split in the data: ``data.split`` in the place of ``val``, if it is set."""
    return section.split if split == "val" and section.split is not None else split


def check_opens(section: DataSection) -> None:
    """Check that the images of ``data.path`` that accuracy is measured on are there, and can be opened.

    Raises:
        DataError: they are not.
    """
    check_set_opens(data_path(section), scored_split(section, "val"))


def check_scored(section: DataSection) -> None:
    """Check that a run that trains or calibrates on training images is scored on others.

    Raises:
        ConfigError: ``data.split`` is the training split.
    """
    if section.split is not None and section.split.lower() in SYNONYMS["train"]:
        raise ConfigError(
            f"`data.split={section.split}` would measure accuracy on the images that the run learns from: name another "
            "split, or leave it out"
        )


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
        scored_split(section, split),
        num_classes=classes,
        bad_images=section.bad_images,
        class_order=section.class_order,
        class_map=section.class_map,
        exif_transpose=bool(section.exif_transpose),
    )
    return _cached(opened, split, section, notes, progress, limit)


def _open_calibration(
    section: DataSection,
    classes: Classes | int,
    notes: dict[str, None],
    progress: Progress,
    limit: Limit,
) -> Split:
    """The images of ``data.calibration``."""
    assert section.calibration is not None
    opened = open_unlabelled(
        section.calibration,
        Classes(classes) if isinstance(classes, int) else classes,
        bad_images=section.bad_images,
        exif_transpose=bool(section.exif_transpose),
    )
    return _cached(opened, "calibration", section, notes, progress, limit)


def _hold_out(unlabelled: Split, seed: int) -> tuple[Split, Split, ScoredOn]:
    """Images to compare networks on, images for calibration, and what the former are.

    They are a quarter of the images, at most ``MOST_HELD_OUT``; of few images, all serve for both.
    """
    if unlabelled.images < FEWEST_TO_HOLD_OUT:
        return unlabelled, unlabelled, "calibration"
    count = min(round(HELD_OUT_SHARE * unlabelled.images), MOST_HELD_OUT)
    held_out, rest = divide(unlabelled, count / unlabelled.images, seed)
    return held_out, rest, "held out"


def _cached(
    opened: Split,
    name: str,
    section: DataSection,
    notes: dict[str, None],
    progress: Progress,
    limit: Limit,
) -> Split:
    """``opened`` with a cache, and its notes among the ``notes``."""
    notes |= dict.fromkeys(opened.notes)
    if (section.workers or 0) > cores():
        notes[
            f"`data.workers={section.workers}` exceeds the {cores()} cores of this process and may be slower"
        ] = None
    if not isinstance(opened.dataset, ImageSet):
        return opened
    identity = partial(fingerprint, opened)
    cache = ImageCache(name, opened.dataset, section.cache, limit, identity, progress.note)
    return replace(opened, cache=cache)


def _report(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress.note(note)


def data_path(section: DataSection) -> str:
    """The path of the data; also an early check before long work.

    Raises:
        ConfigError: ``data.path`` is not set.
    """
    if section.path is None and section.calibration is not None:
        raise ConfigError(
            f"{section.calibration} holds images without labels, which measure no accuracy: use `data.path=DIR` with "
            "labelled ones"
        )
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
