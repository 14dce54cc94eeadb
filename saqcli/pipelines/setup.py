"""Set-up of every command: float model, data, the traced network and its costs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from saqcli.api.models import open_float
from saqcli.config import DataSection, ModelSection, QuantizationSection, RunConfig
from saqcli.data.datasets import Split
from saqcli.data.splits import Images, open_named
from saqcli.errors import UnsupportedModel
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.restore import complete_class_names, rebuild_structure, trained_classes
from saqcli.models.load import LoadedModel, ModelSpec, OwnNetwork, Preprocessing
from saqcli.progress import SILENT, Progress
from saqcli.quant import convert, network
from saqcli.quant.bits import BitConfig
from saqcli.quant.tracer import try_model
from saqcli.random_state import seed_everything
from saqcli.searchers import SEARCHERS
from saqcli.serialization import named_path
from saqcli.target import target_of
from saqcli.tasks.class_names import ORDERS
from saqcli.tasks.classification import check_output
from saqcli.tasks.labels import Classes


@dataclass(frozen=True, kw_only=True)
class Network(network.Network):
    """A network that was loaded by its name.

    Attributes:
        loaded: the model (wrapped in place) and its origin.
    """

    loaded: LoadedModel


def load_float(section: ModelSection, progress: Progress, *, new_head: bool = False) -> LoadedModel:
    """The float model of the configuration; defaults chosen for the user are noted.

    With ``new_head`` a weight file may have another number of classes: the classifier then starts random.
    """
    loaded = open_float(
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
    if section.new_head and loaded.trained:
        loaded.notes.append(
            f"`model.new_head` changes nothing: {loaded.weights_source} has "
            f"{loaded.num_classes} class(es), as requested, and its classifier is kept"
        )
    for note in loaded.notes:
        progress.note(note)
    return loaded


def wrap_and_trace(
    loaded: LoadedModel, section: QuantizationSection | None = None, recorded: ModelMetadata | None = None
) -> Network:
    """Wrap the model in place and trace it with one random image of its input size.

    Args:
        loaded: the float model.
        section: says whether attention is quantized, for which target, and whether norms are folded; None for defaults.
        recorded: metadata of a quantized model, which say this in the place of ``section``.

    Raises:
        ConfigError: there is no such target.
        UnsupportedModel: it has nothing to quantize, or does not give class scores for such an image.
    """
    section = section or QuantizationSection()
    target, generator = target_of(section), torch.Generator().manual_seed(0)
    attention, folded = section.quantize_attention, section.short_steps is not None
    if recorded is not None:
        attention, folded = bool(recorded.products), bool(recorded.absorbed)
    example = torch.randn(1, *loaded.preprocessing.input_size, generator=generator)
    convert.wrap(loaded.model)
    with explain_unsupported(loaded.name):
        found = network.trace_network(
            loaded.model,
            example,
            loaded.name,
            loaded.classifiers,
            quantize_attention=attention,
            junctions=target.junctions if recorded is None else recorded.junctions or (),
            junction_bits=target.junction_bits,
            count_junctions=target.count_junctions,
            fold_norms=folded,
        )
        check_output(found.traced.outputs, 1)
    return Network(**vars(found), loaded=loaded)


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


def try_classifier(loaded: LoadedModel) -> None:
    """Run the float model on one empty image.

    Raises:
        UnsupportedModel: it fails, or returns no class scores.
    """
    with explain_unsupported(loaded.name):
        check_output(try_model(loaded.model, torch.zeros(1, *loaded.preprocessing.input_size)), 1)


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


def distills(config: RunConfig, loaded: LoadedModel) -> bool:
    """Whether fine-tuning learns from the float network ``loaded`` too: on request, or by QAT where that is trained."""
    wanted = config.training.distill
    return loaded.trained and config.training.method == "qat" if wanted is None else wanted


def training_images(
    section: DataSection, loaded: LoadedModel, device: torch.device, seed: int, progress: Progress
) -> Images:
    """The training images for a search of the network ``loaded``."""
    return Images.training_only(section, classes_of(loaded), loaded.preprocessing, device, seed, progress)


def images_of_search(
    config: RunConfig, loaded: LoadedModel, device: torch.device, progress: Progress
) -> Images:
    """The training images; the validation images too where a least top-1 is compared with the float network's."""
    if config.quantization.min_top1 is not None:
        return open_images(config, loaded, device, progress)
    return training_images(config.data, loaded, device, config.run.seed, progress)


def open_images(
    config: RunConfig, loaded: LoadedModel, device: torch.device, progress: Progress = SILENT
) -> Images:
    """The images for the network ``loaded``."""
    return Images.open(
        config, classes_of(loaded), loaded.preprocessing, device, progress, trains=needs_labels(config)
    )


def needs_labels(config: RunConfig) -> bool:
    """Whether a run needs labelled training images: to fine-tune, or to search on."""
    return bool(config.training.epochs) or searches_on_labels(config)


def searches_on_labels(config: RunConfig) -> bool:
    """Whether a run searches on labelled training images; a proxy brings its own.

    A searcher that needs no labels uses the images for calibration, if these are given and nothing is trained.

    Raises:
        ConfigError: there is no such searcher.
    """
    section = config.quantization
    if config.search.proxy is not None:
        return False
    if section.max_drop is not None or section.min_top1 is not None:
        return True
    if section.bops is None and section.size is None:
        return False
    entry = SEARCHERS.find(section.searcher)
    calibrated_alone = config.data.calibration is not None and not config.training.epochs
    unlabelled = not entry.uses_labels and (config.data.path is None or calibrated_alone)
    return (entry.uses_images and not unlabelled) or config.search.pareto > 0


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


def open_run_images(
    config: RunConfig, metadata: ModelMetadata, device: torch.device, progress: Progress = SILENT
) -> Images:
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
    classes, trains = trained_classes(metadata, "the run"), needs_labels(config)
    return Images.open(config, classes, preprocessing, device, progress, trains=trains)
