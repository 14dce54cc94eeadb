"""What every verb needs: device, float model, data, and the traced network with its costs."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.batches import Loader
from saqcli.data.datasets import Split, check_fingerprint, check_same_classes, fingerprint, open_split
from saqcli.data.loaders import calibration_loader, check_shared, default_workers, make_loader
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.export.model_metadata import ModelFacts
from saqcli.machine import cores
from saqcli.models.load import LoadedModel, ModelSpec, load_model
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.fold import make_plain
from saqcli.quant.tracer import Trace, trace
from saqcli.serialization import named_path
from saqcli.tasks.labels import Classes, imagenet_names, library_order
from saqcli.units import counted

CALIBRATION_BATCH = 64
SMALL_IMAGES = 64  # pixels; up to here images are trained on whole, above on random crops


@dataclass(frozen=True)
class Network:
    """A float model turned into quantized layers that still compute in floating point.

    Attributes:
        loaded: the model (wrapped in place) and where it came from.
        traced: facts of one forward pass.
        costs: of its layers.
        products: of activations that are quantized, and the layers whose input bits they have.
    """

    loaded: LoadedModel
    traced: Trace
    costs: CostModel
    products: dict[str, str] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.loaded.model

    @property
    def name(self) -> str:
        """Its canonical name."""
        return self.loaded.name


def load_float(section: ModelSection, progress: Progress, *, new_head: bool = False) -> LoadedModel:
    """The float model that the configuration names; what was decided for the user is noted.

    With ``new_head`` a weight file may have another number of classes: the classifier then starts random.
    """
    loaded = load_model(
        ModelSpec(
            name=section.name,
            weights=named_path(section.weights) if section.weights else None,
            pretrained=section.pretrained,
            num_classes=section.num_classes,
            in_chans=section.in_chans,
            kwargs=section.kwargs,
            input_size=section.input_size,
            mean=section.mean,
            std=section.std,
            new_head=new_head or section.new_head,
            weights_key=section.weights_key,
        )
    )
    loaded.notes += [f"{loaded.name}: {note}" for note in make_plain(loaded.model)]
    if section.new_head and loaded.trained:
        loaded.notes.append(
            f"--new-head changes nothing: {loaded.weights_source} has {counted(loaded.num_classes, 'class')}, as asked "
            "for, and its classifier is kept"
        )
    for note in loaded.notes:
        progress.note(note)
    return loaded


def wrap_and_trace(loaded: LoadedModel, *, quantize_attention: bool = False) -> Network:
    """Wrap the model in place and trace it with one random image of its input size.

    With ``quantize_attention`` products of two activations are quantized, and counted, too.

    Raises:
        UnsupportedModel: it has nothing to quantize, or does not give class scores for such an image.
    """
    convert.wrap(loaded.model)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, *loaded.preprocessing.input_size, generator=generator)
    with answering(loaded.name):
        traced = trace(loaded.model, example)
    convert.leave_float(loaded.model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(loaded.model, [parent], children)
    followed = {product.name: product.follows for product in traced.products if product.follows}
    products = followed if quantize_attention else {}
    convert.follow(loaded.model, products)
    costs = cost_model(traced, loaded.classifiers, products=quantize_attention)
    return Network(loaded, traced, costs, products)


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Say whose forward pass does not give class scores, and what can be done about it."""
    try:
        yield
    except UnsupportedModel as error:
        remedy = "give another --input-size or correct --model-kwargs"
        if "dtype" in str(error):
            remedy = "convert the whole network with .float(), since layers are quantized in float32"
        raise UnsupportedModel(f"{name}: {error}; {remedy}") from error


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
        """Both splits of ``--data``; their classes must agree.

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
            augmentation=("cifar" if is_small(self.preprocessing) else "imagenet")
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


def classes_of(loaded: LoadedModel) -> Classes:
    """The classes of a float model: those that its checkpoint lists, unless its classifier is new."""
    return Classes.of(loaded.name, loaded.num_classes, loaded.class_names if loaded.trained else ())


def trained_classes(facts: ModelFacts, called: str) -> Classes:
    """The classes of a quantized model, and the labels that folders had in its training.

    Args:
        facts: of the model.
        called: what messages call it.
    """
    count, network = int(facts.build["num_classes"]), str(facts.build["name"])
    return Classes(count, library_order(network), facts.class_names, facts.folders, facts.class_order, called)


def with_names_of_logits(facts: ModelFacts) -> ModelFacts:
    """``facts`` of an earlier version, whose class names may be those of the folders trained on alone.

    Names of some of ImageNet's synsets become those of all; others that are too few are unknown.
    """
    names, count = facts.class_names, facts.build.get("num_classes")
    if not names or len(names) == count or type(count) is not int:
        return facts
    synsets = imagenet_names(count)
    index = {name: place for place, name in enumerate(synsets)}
    known = all(name in index for name in names)
    folders = {name: index[name] for name in names} if known else {}
    order = "imagenet" if known else ""
    return facts.model_copy(
        update={"class_names": synsets if known else (), "folders": folders, "class_order": order}
    )


def open_trained(
    section: DataSection,
    split: Literal["train", "val"],
    facts: ModelFacts,
    called: str,
    progress: Progress = SILENT,
) -> Split:
    """One split of ``--data`` with the labels that a quantized model was trained on, and turned as then."""
    return open_named(as_trained(section, facts, progress), split, trained_classes(facts, called), progress)


def as_trained(section: DataSection, facts: ModelFacts, progress: Progress = SILENT) -> DataSection:
    """``section``, in which the model decides on what the user leaves open."""
    if section.exif_transpose is None:
        return section.model_copy(update={"exif_transpose": facts.exif_transpose})
    if section.exif_transpose != facts.exif_transpose:
        then = "with" if facts.exif_transpose else "without"
        progress.note(f"the model was trained {then} --exif-transpose, and is now used otherwise")
    return section


def open_named(
    section: DataSection,
    split: Literal["train", "val"],
    classes: Classes | int,
    progress: Progress = SILENT,
) -> Split:
    """One split of ``--data``; what was decided for the user is noted."""
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
            f"--workers {section.workers} is more than the {cores()} cores that this process may use, and may be slower"
        ] = None
    return opened


def _tell(notes: Iterable[str], progress: Progress) -> None:
    for note in notes:
        progress.note(note)


def named_data(section: DataSection) -> str:
    """``--data``; to be asked early where much is done before images are opened.

    Raises:
        ConfigError: none was named.
    """
    if section.path is None:
        raise ConfigError(
            "no images were named: give --data DIR with train/ and val/, a folder a class in each"
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
        batch_size=section.eval_batch_size or (256 if is_small(preprocessing) else 64),
        training=False,
        workers=workers_of(section, preprocessing),
        device=device,
        seed=seed,
        limit=limit,
    )


def is_small(preprocessing: Preprocessing) -> bool:
    """Whether images are small enough to be trained on whole, and many at a time."""
    return max(preprocessing.input_size[1:]) <= SMALL_IMAGES


def workers_of(section: DataSection, preprocessing: Preprocessing) -> int:
    """How many processes read images."""
    return default_workers(preprocessing) if section.workers is None else section.workers
