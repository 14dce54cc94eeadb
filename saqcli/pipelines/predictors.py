"""Predictors: model names, runs and files as functions from images to logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from saqcli.api.targets import EVALUATED, find_target, named_file
from saqcli.config import ModelSection
from saqcli.errors import ConfigError, CorruptArtifact, SaqError
from saqcli.export.model_metadata import ModelMetadata, read_onnx_metadata
from saqcli.export.restore import complete_class_names, restore, trained_classes
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import check_build_metadata
from saqcli.pipelines.setup import classes_of, load_float, try_classifier
from saqcli.progress import Progress
from saqcli.serialization import printable
from saqcli.tasks.labels import Classes
from saqcli.units import counted
from saqcli.verify.runtime import onnx_session


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
    """

    predict: Callable[[Tensor], Tensor]
    name: str
    num_classes: int
    preprocessing: Preprocessing
    device: torch.device
    classes: Classes
    metadata: ModelMetadata | None = None


def open_target(target: str, section: ModelSection, device: torch.device, progress: Progress) -> Predictor:
    """The predictor of ``target``.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        device: device of PyTorch models; ONNX files run on the CPU.
        progress: receives notes.

    Raises:
        SaqError: unknown or damaged target.
    """
    path = named_file(find_target(target, EVALUATED), section)
    if path is not None:
        return open_onnx(path) if path.suffix == ".onnx" else open_safetensors(path, device)
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


def open_safetensors(path: Path, device: torch.device) -> Predictor:
    """The predictor of a ``.safetensors`` file of saq."""
    model, metadata = restore(path)
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

    return _from_metadata(predict, str(path), metadata, torch.device("cpu"))


def _from_metadata(
    predict: Callable[[Tensor], Tensor], name: str, metadata: ModelMetadata, device: torch.device
) -> Predictor:
    try:
        preprocessing = check_build_metadata(metadata.build, metadata.preprocessing)
    except SaqError as error:
        raise CorruptArtifact(f"{name} has invalid metadata: {printable(str(error))}") from None
    classes = trained_classes(metadata, name)
    return Predictor(predict, name, classes.count, preprocessing, device, classes, metadata)
