"""Predictors: model names, runs and files as functions from images to logits."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from saqcli.api.sources import EVALUATED, find_source, named_builder, named_file
from saqcli.config import ModelSection
from saqcli.errors import ConfigError, CorruptArtifact, SaqError, UnsupportedModel, first_line, out_of_memory
from saqcli.export.model_metadata import ModelMetadata, read_onnx_metadata
from saqcli.export.restore import complete_class_names, restore, trained_classes
from saqcli.models.own import OwnNetwork, check_named
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import check_build_metadata
from saqcli.pipelines.setup import classes_of, load_float, try_classifier
from saqcli.progress import Progress
from saqcli.serialization import printable
from saqcli.tasks.labels import Classes
from saqcli.training.execution import Engine, Execution
from saqcli.units import counted
from saqcli.verify.runtime import onnx_session

MEMORY_FORMATS = ("auto", "contiguous", "channels_last")
LARGEST_CONTIGUOUS_SIDE = (
    64  # pixels; evaluations of smaller images are short, and repeat the figures of their runs
)


@dataclass(frozen=True)
class Predictor:
    """A model to evaluate.

    Attributes:
        predict: maps normalized images (N, C, H, W) to logits (N, classes).
        name: name in messages.
        num_classes: number of logits.
        preprocessing: preprocessing of its images.
        device: device of its images.
        metadata: metadata of the file; None for a float model.
        classes: classes of the logits.
        memory_format: of convolution weights; None in ONNX Runtime.
    """

    predict: Callable[[Tensor], Tensor]
    name: str
    num_classes: int
    preprocessing: Preprocessing
    device: torch.device
    classes: Classes
    metadata: ModelMetadata | None = None
    memory_format: Literal["contiguous", "channels_last"] | None = "contiguous"


def open_source(
    source: str,
    section: ModelSection,
    device: torch.device,
    progress: Progress,
    builder: str | None = None,
) -> Predictor:
    """The predictor of ``source``.

    Args:
        source: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        device: device of PyTorch models; ONNX files run on the CPU.
        progress: receives notes.
        builder: name of the user's own network that a run or file was made from.

    Raises:
        SaqError: unknown or damaged source.
    """
    found = find_source(source, EVALUATED)
    path, own = named_file(found, section), named_builder(found, builder)
    if path is not None:
        predictor = open_onnx(path) if path.suffix == ".onnx" else open_safetensors(path, device, own)
        if own is not None and predictor.metadata is not None:
            # An ONNX file is not rebuilt, but must not contradict.
            check_named(predictor.metadata.build["name"], own, str(path))
        return predictor
    loaded = load_float(section, progress)
    try_classifier(loaded)
    return Predictor(
        loaded.model.to(device),
        loaded.name,
        loaded.num_classes,
        loaded.preprocessing,
        device,
        classes_of(loaded),
    )


def open_safetensors(path: Path, device: torch.device, own: OwnNetwork | None = None) -> Predictor:
    """The predictor of a ``.safetensors`` file of saq, made from the user's network ``own`` if it was."""
    model, metadata = restore(path, own)
    return _from_metadata(model.to(device), str(path), metadata, device)


def open_onnx(path: Path, *, optimized: bool = True) -> Predictor:
    """A predictor in ONNX Runtime, with its default graph optimizations or none.

    Raises:
        CorruptArtifact: ONNX Runtime cannot load the file.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    metadata = complete_class_names(read_onnx_metadata(path))
    session, classes = onnx_session(path, optimized=optimized), metadata.build.get("num_classes")

    def predict(images: Tensor) -> Tensor:
        logits = session(images)
        if logits.shape != (len(images), classes):
            raise CorruptArtifact(
                f"{path} does not return logits of {classes} classes for {counted(len(images), 'image')}, as its "
                "metadata says: export it again"
            )
        return logits

    found = _from_metadata(predict, str(path), metadata, torch.device("cpu"))
    return replace(found, memory_format=None)


def check_memory_format(requested: str, source: str) -> None:
    """Check a memory format before anything is loaded.

    Raises:
        ConfigError: there is no such format, or it is requested for an ONNX file.
    """
    if requested not in MEMORY_FORMATS:
        raise ConfigError(
            f"`memory_format={requested}`: there is no such memory format, use {', '.join(MEMORY_FORMATS)}"
        )
    if requested != "auto" and Path(source).suffix == ".onnx":
        raise ConfigError(
            f"`memory_format={requested}` applies to PyTorch, and {source} runs in ONNX Runtime: remove it"
        )


def with_memory_format(predictor: Predictor, requested: str, progress: Progress) -> Predictor:
    """The predictor with its network in a memory format; images follow the first convolution's weights.

    A rule, not a timing, decides ``auto``, since the last bits of logits depend on it: channels_last on a CPU for
    images of more than 64 pixels.

    Args:
        predictor: changed in place, unless its network fails in that format.
        requested: ``auto``, ``contiguous`` or ``channels_last``.
        progress: receives a note if the network fails.

    Raises:
        UnsupportedModel: channels_last is requested, and the network fails in it.
    """
    network = predictor.predict
    if not isinstance(network, nn.Module):
        return predictor
    pays = (
        predictor.device.type == "cpu"
        and max(predictor.preprocessing.input_size[1:]) > LARGEST_CONTIGUOUS_SIDE
        and any(isinstance(module, nn.Conv2d | nn.ConvTranspose2d) for module in network.modules())
    )
    if requested == "contiguous" or (requested == "auto" and not pays):
        return predictor
    engine = Engine(network)
    engine.set(Execution(memory_format="channels_last"))
    if (problem := _problem(network.eval(), predictor)) is None:
        return replace(predictor, memory_format="channels_last")
    if requested == "channels_last":
        raise UnsupportedModel(
            f"{predictor.name} fails in channels_last ({problem}): remove `memory_format=channels_last`"
        )
    engine.restore()
    progress.note(f"{predictor.name} fails in channels_last, its tensors stay contiguous: {problem}")
    return predictor


@torch.no_grad()
def _problem(network: nn.Module, predictor: Predictor) -> str | None:
    """Why the network fails on two images, in one line, else None: it may view a tensor as only contiguous ones can."""
    try:
        network(torch.zeros(2, *predictor.preprocessing.input_size, device=predictor.device))
    except Exception as error:  # a network may raise anything
        if out_of_memory(error):
            raise
        return printable(first_line(error))
    return None


def _from_metadata(
    predict: Callable[[Tensor], Tensor], name: str, metadata: ModelMetadata, device: torch.device
) -> Predictor:
    try:
        preprocessing = check_build_metadata(metadata.build, metadata.preprocessing)
    except SaqError as error:
        raise CorruptArtifact(f"{name} has invalid metadata: {printable(str(error))}") from None
    classes = trained_classes(metadata, name)
    return Predictor(predict, name, classes.count, preprocessing, device, classes, metadata)
