"""The training and validation images of one network, and how they are fed to it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from saqcli import distributed
from saqcli.config import DataSection, RunConfig
from saqcli.data.batches import Loader
from saqcli.data.datasets import Split, check_fingerprint, check_same_classes, fingerprint, open_split
from saqcli.data.loaders import calibration_loader, check_shared, default_workers, make_loader
from saqcli.errors import ConfigError
from saqcli.machine import cores
from saqcli.models.preprocessing import Preprocessing, has_small_images
from saqcli.progress import SILENT, Progress
from saqcli.runs.directory import RunDirectory
from saqcli.tasks.labels import Classes

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Images:
    """Training and validation images for one network, and how they are fed to it."""

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
        """Both splits of the data; their classes must agree.

        Raises:
            ConfigError: no data was named.
            DataError: they cannot be used with this network.
        """
        notes: dict[str, None] = {}
        train, val = (_open(config.data, split, classes, notes) for split in ("train", "val"))
        check_same_classes(train, val)
        check_shared(train, config.data.batch_size)
        _tell(notes, progress)
        return cls(train, val, preprocessing, config.data, device, config.run.seed)

    @classmethod
    def training_alone(
        cls,
        section: DataSection,
        classes: Classes | int,
        preprocessing: Preprocessing,
        device: torch.device,
        seed: int,
        progress: Progress = SILENT,
    ) -> "Images":
        """The training split, in the place of the validation split too: for a search, which may not see that one.

        Raises:
            ConfigError: no data was named.
            DataError: it cannot be used with this network.
        """
        split = open_named(section, "train", classes, progress)
        check_shared(split, section.batch_size)
        return cls(split, split, preprocessing, section, device, seed)

    def fingerprints(self) -> dict[str, str]:
        """Which images these are: a line of text for ``train`` and for ``val``, to be kept by the run."""
        return {"train": fingerprint(self.train), "val": fingerprint(self.val)}

    def check_fingerprints(self, kept: Mapping[str, str], then: str = "the run started with") -> None:
        """Refuse to go on with other images; what is not in ``kept`` is not compared.

        Raises:
            DataError: these are not the images of which ``fingerprints`` gave ``kept``.
        """
        for name, split, called in (("train", self.train, "training"), ("val", self.val, "validation")):
            if name in kept:
                check_fingerprint(kept[name], split, called, then)

    def bind_to(self, run: RunDirectory, of: str = "") -> None:
        """Note in a run that it is made on these images, or check that it resumes with the same, on all ranks.

        Args:
            run: whose manifest holds their fingerprints.
            of: goes before the names of the splits, where a run has others beside its own.

        Raises:
            DataError: these are other images, or others than those of another rank.
        """
        known = distributed.from_first(lambda: run.manifest().images)
        names = (f"{of}train", f"{of}val")
        kept = {name.removeprefix(of): line for name, line in known.items() if name in names}
        if kept:
            distributed.together(lambda: self.check_fingerprints(kept))
            return
        now = self.fingerprints()
        mine = distributed.from_first(lambda: now)
        distributed.together(lambda: self.check_fingerprints(mine, then="the first process sees"))
        more = {} if of else {"class_order": self.train.class_order}
        run.note_images(known | {f"{of}{name}": line for name, line in now.items()}, **more)

    def training(self, limit: int | None = None, *, shared: bool = True) -> Loader:
        """Shuffled and augmented, ``limit`` images at most; call ``set_epoch`` before each pass.

        Each rank gets its share of every batch, or all of it where it is not ``shared``.
        """
        wanted = self.section.augmentation
        return make_loader(
            self.train,
            self.preprocessing,
            batch_size=self.section.batch_size,
            training=True,
            augmentation=("cifar" if has_small_images(self.preprocessing) else "imagenet")
            if wanted == "auto"
            else wanted,
            workers=workers_of(self.section, self.preprocessing),
            device=self.device,
            seed=self.seed,
            drop_last=limit is None and self.train.images >= self.section.batch_size,
            limit=limit,
            crop_scale=self.section.crop_scale,
            shared=shared,
        )

    def calibration(self) -> Loader:
        """A few training images, in their evaluation view."""
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
        """All validation images in order, or ``limit`` of them drawn evenly over the classes."""
        return validation_loader(self.val, self.preprocessing, self.section, self.device, self.seed, limit)


def open_named(
    section: DataSection,
    split: Literal["train", "val"],
    classes: Classes | int,
    progress: Progress = SILENT,
) -> Split:
    """One split of the data; what was decided for the user is noted."""
    notes: dict[str, None] = {}
    opened = _open(section, split, classes, notes)
    _tell(notes, progress)
    return opened


def _open(
    section: DataSection, split: Literal["train", "val"], classes: Classes | int, notes: dict[str, None]
) -> Split:
    opened = open_split(
        named_data(section),
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
            f"`data.workers={section.workers}` is more than the {cores()} cores that this process may use, and may "
            "be slower"
        ] = None
    return opened


def _tell(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress.note(note)


def named_data(section: DataSection) -> str:
    """The path of the data; to be asked early where much is done before images are opened.

    Raises:
        ConfigError: none was named.
    """
    if section.path is None:
        raise ConfigError(
            "no images were named: give `data.path=DIR` with train/ and val/, one folder per class in each"
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
    """Images of ``split`` in their evaluation view, in a fixed order."""
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
    """How many processes read images."""
    return default_workers(preprocessing) if section.workers is None else section.workers
