"""Set-up of every command: float model, data, the traced network and its costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from saqcli.config import DataSection, ModelSection, RunConfig
from saqcli.data.datasets import Split
from saqcli.data.splits import Images, open_named
from saqcli.errors import UnsupportedModel
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.restore import complete_class_names, rebuild_structure, trained_classes
from saqcli.models.load import LoadedModel, ModelSpec, load_model
from saqcli.models.own import OwnNetwork
from saqcli.models.preprocessing import Preprocessing
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert
from saqcli.quant.bits import BitConfig
from saqcli.quant.cost import CostModel, cost_model
from saqcli.quant.fold import make_plain
from saqcli.quant.tracer import Trace, trace
from saqcli.random_state import seed_everything
from saqcli.serialization import named_path
from saqcli.tasks.class_names import ORDERS
from saqcli.tasks.labels import Classes
from saqcli.units import counted


@dataclass(frozen=True)
class Network:
    """A float model with wrapped layers that still compute in floating point.

    Attributes:
        loaded: the model (wrapped in place) and its origin.
        traced: the traced forward pass.
        costs: costs of its layers.
        products: quantized products of activations, and the layers whose input bits they share.
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
        """The model's canonical name."""
        return self.loaded.name


def load_float(section: ModelSection, progress: Progress, *, new_head: bool = False) -> LoadedModel:
    """The float model of the configuration; defaults chosen for the user are noted.

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
            f"`model.new_head` changes nothing: {loaded.weights_source} has "
            f"{counted(loaded.num_classes, 'class')}, as requested, and its classifier is kept"
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
    with explain_unsupported(loaded.name):
        traced = trace(loaded.model, example)
    convert.leave_float(loaded.model, traced.idle)
    for parent, children in traced.routed.items():
        convert.route(loaded.model, [parent], children)
    followed = {product.name: product.follows for product in traced.products if product.follows}
    products = followed if quantize_attention else {}
    convert.add_products(loaded.model, products)
    costs = cost_model(traced, loaded.classifiers, products=quantize_attention)
    return Network(loaded, traced, costs, products)


@contextmanager
def explain_unsupported(name: str) -> Iterator[None]:
    """Add the model's name and a remedy to an ``UnsupportedModel`` raised in the context."""
    try:
        yield
    except UnsupportedModel as error:
        remedy = "use another `model.input_size` or correct `model.kwargs`"
        if "dtype" in str(error):
            remedy = "convert the whole network with .float(), since layers are quantized in float32"
        raise UnsupportedModel(f"{name}: {error}; {remedy}") from error


def classes_of(loaded: LoadedModel) -> Classes:
    """The classes of a float model: those listed in its checkpoint, unless its classifier is new."""
    return Classes.of(loaded.name, loaded.num_classes, loaded.class_names if loaded.trained else ())


def open_trained(
    section: DataSection,
    split: Literal["train", "val"],
    metadata: ModelMetadata,
    called: str,
    progress: Progress = SILENT,
) -> Split:
    """One split of the data, with the labels and the EXIF rotation that a quantized model was trained with."""
    section = with_trained_rotation(section, metadata, progress)
    return open_named(section, split, trained_classes(metadata, called), progress)


def with_trained_rotation(
    section: DataSection, metadata: ModelMetadata, progress: Progress = SILENT
) -> DataSection:
    """``section`` with the model's ``exif_transpose`` where the user gives none."""
    if section.exif_transpose is None:
        return section.model_copy(update={"exif_transpose": metadata.exif_transpose})
    if section.exif_transpose != metadata.exif_transpose:
        then = "with" if metadata.exif_transpose else "without"
        progress.note(f"the model was trained {then} `data.exif_transpose`; this command differs from that")
    return section


class Prepared(NamedTuple):
    """A network and its images."""

    network: Network
    images: Images


def load_seeded(config: RunConfig, progress: Progress) -> LoadedModel:
    """``load_float`` for a run, whose seed initializes a new classifier."""
    if config.model.new_head:
        seed_everything(config.run.seed)
    return load_float(config.model, progress)


def training_images(
    section: DataSection, loaded: LoadedModel, device: torch.device, seed: int, progress: Progress
) -> Images:
    """The training images for a search of the network ``loaded``."""
    return Images.training_only(section, classes_of(loaded), loaded.preprocessing, device, seed, progress)


def open_images(
    config: RunConfig, loaded: LoadedModel, device: torch.device, progress: Progress = SILENT
) -> Images:
    """The images for the network ``loaded``."""
    return Images.open(config, classes_of(loaded), loaded.preprocessing, device, progress)


def saved_model(
    state: dict[str, Any], own: OwnNetwork | None = None
) -> tuple[nn.Module, ModelMetadata, BitConfig]:
    """The model in the checkpoint of a run, its metadata, and the bits of its layers.

    Args:
        state: the checkpoint.
        own: the user's own network, if the run has one.

    Raises:
        SaqError: the model cannot be built by the installed libraries.
    """
    metadata = complete_class_names(ModelMetadata.model_validate_json(state["facts"]))
    model = rebuild_structure(metadata, own)
    model.load_state_dict(state["model"])
    return model, metadata, convert.active_bits(model, metadata.policy.model, metadata.policy.layers)


def open_run_images(config: RunConfig, metadata: ModelMetadata, device: torch.device) -> Images:
    """The images of a run, with the labels that it started with.

    The files that map folders to classes may be missing; if present, they must agree with the run.
    """
    preprocessing = Preprocessing.from_dict(metadata.preprocessing)
    gone = {
        name: None
        for name in ("class_order", "class_map")
        if (file := getattr(config.data, name)) not in (None, *ORDERS) and not named_path(file).is_file()
    }
    if gone and metadata.folders:
        config = config.model_copy(update={"data": config.data.model_copy(update=gone)})
    return Images.open(config, trained_classes(metadata, "the run"), preprocessing, device)
