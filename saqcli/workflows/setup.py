"""What every verb needs: device, float model, data, and the traced network with its costs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.errors import ConfigError
from saqcli.io.data import Split, check_same_classes, open_split
from saqcli.io.loaders import Loader, calibration_loader, default_workers, make_loader
from saqcli.io.models import LoadedModel, ModelSpec, load_model
from saqcli.io.preprocessing import Preprocessing
from saqcli.progress import Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig, LayerBits, parse_bits
from saqcli.quant.cost import Budget, CostModel, cost_model
from saqcli.quant.trace import Trace, trace
from saqcli.strict import parse_json
from saqcli.units import parse_quantity

UNIFORM_BUDGET = re.compile(r"w\d+a\d+", re.IGNORECASE)  # a budget given as what uniform bits cost
CALIBRATION_BATCH = 64
SMALL_IMAGES = 64  # pixels; up to here images are trained on whole, above on random crops


@dataclass(frozen=True)
class Network:
    """A float model turned into quantized layers that still compute in floating point.

    Attributes:
        loaded: the model (wrapped in place) and where it came from.
        traced: facts of one forward pass.
        costs: of its layers.
    """

    loaded: LoadedModel
    traced: Trace
    costs: CostModel

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.loaded.model

    @property
    def name(self) -> str:
        """Its canonical name."""
        return self.loaded.name


def pick_device(asked: str) -> torch.device:
    """``auto`` is the GPU where there is one.

    Raises:
        ConfigError: no such device here.
    """
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {asked} is not to be had here: use cpu, or leave it away") from None
    return device


def load_float(section: ModelSection, progress: Progress) -> LoadedModel:
    """The float model that the configuration names; what was decided for the user is noted."""
    loaded = load_model(
        ModelSpec(
            name=section.name,
            weights=Path(section.weights) if section.weights else None,
            pretrained=section.pretrained,
            num_classes=section.num_classes,
            in_chans=section.in_chans,
            kwargs=section.kwargs,
            input_size=section.input_size,
            mean=section.mean,
            std=section.std,
        )
    )
    for note in loaded.notes:
        progress.note(note)
    return loaded


def wrap_and_trace(loaded: LoadedModel) -> Network:
    """Wrap the model in place and trace it with one random image of its input size."""
    convert.wrap(loaded.model)
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, *loaded.preprocessing.input_size, generator=generator)
    traced = trace(loaded.model, example)
    convert.leave_float(loaded.model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(loaded.model, [parent], children)
    return Network(loaded, traced, cost_model(traced))


def read_policy(path: Path, network: Network) -> BitConfig:
    """A policy file, checked against the network.

    Raises:
        ConfigError: unreadable, of a foreign version, or with unknown keys.
        PolicyMismatch: made for another network.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--policy {path} cannot be read: {error}") from None
    policy = parse_json(BitConfig, text, str(path))
    names = [layer.name for layer in network.costs.layers]
    policy.check_fits(network.name, names)
    return policy.model_copy(update={"layers": {name: policy.layers[name] for name in names}})


def parse_budget(text: str, network: Network) -> Budget:
    """``34G``, or ``w4a4``: what uniform 4 bits cost in this network."""
    if UNIFORM_BUDGET.fullmatch(text.strip()):
        bits = parse_bits(text)
        return Budget(network.costs.bops(network.costs.uniform(network.name, bits)))
    return Budget(parse_quantity(text))


def explicit_policy(config: RunConfig, network: Network) -> BitConfig | None:
    """The configuration that ``--bits`` or ``--policy`` gives; None where a search must find it.

    Raises:
        ConfigError: more than one of bits, budget and policy, or none.
    """
    wanted = config.quantization
    given = [name for name in ("bits", "bops", "policy") if getattr(wanted, name) is not None]
    if len(given) != 1:
        asked = " and ".join(f"--{name}" for name in given) or "none of them"
        raise ConfigError(
            f"one of --bits, --bops and --policy says what to quantize to, and {asked} was given"
        )
    if wanted.policy is not None:
        return read_policy(Path(wanted.policy), network)
    if wanted.bits is not None:
        return network.costs.uniform(network.name, parse_bits(wanted.bits))
    return None


def float_policy(network: Network) -> BitConfig:
    """Every layer in floating point."""
    nothing = LayerBits(weight=None, activation=None)
    return BitConfig(model=network.name, layers={layer.name: nothing for layer in network.costs.layers})


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
        return cls(train, val, preprocessing, config.data, device, config.run.seed)

    def training(self, limit: int | None = None) -> Loader:
        """Shuffled and augmented, ``limit`` images at most; call ``set_epoch`` before each pass."""
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
