"""What every verb needs: device, float model, data, and the traced network with its costs."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.errors import ConfigError, UnsupportedModel
from saqcli.io.batches import Loader
from saqcli.io.data import Split, check_same_classes, open_split
from saqcli.io.fingerprints import check_fingerprint, fingerprint
from saqcli.io.loaders import calibration_loader, check_shared, default_workers, make_loader
from saqcli.io.models import LoadedModel, ModelSpec, load_model
from saqcli.io.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.plain import make_plain
from saqcli.quant.trace import Trace, trace
from saqcli.strict import named_path

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
        raise UnsupportedModel(
            f"{name}: {error}; give another --input-size or correct --model-kwargs"
        ) from error


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
        cls, config: RunConfig, num_classes: int, preprocessing: Preprocessing, device: torch.device
    ) -> "Images":
        """Both splits of ``--data``; their classes must agree.

        Raises:
            ConfigError: no data was named.
            DataError: they cannot be used with this network.
        """
        train, val = (open_named(config.data, split, num_classes) for split in ("train", "val"))
        check_same_classes(train, val)
        check_shared(train, config.data.batch_size)
        return cls(train, val, preprocessing, config.data, device, config.run.seed)

    @classmethod
    def training_alone(
        cls,
        section: DataSection,
        num_classes: int,
        preprocessing: Preprocessing,
        device: torch.device,
        seed: int,
    ) -> "Images":
        """The training split, in the place of the validation split too: for a search, which may not see that one.

        Raises:
            ConfigError: no data was named.
            DataError: it cannot be used with this network.
        """
        split = open_named(section, "train", num_classes)
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


def open_named(section: DataSection, split: Literal["train", "val"], num_classes: int) -> Split:
    """One split of ``--data``."""
    return open_split(named_data(section), split, num_classes=num_classes, bad_images=section.bad_images)


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
