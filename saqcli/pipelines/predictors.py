"""Predictors: model names, runs and files as functions from images to logits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from saqcli.config import ModelSection
from saqcli.errors import ConfigError, CorruptArtifact, SaqError
from saqcli.export.exact_form import ExactForm
from saqcli.export.model_metadata import ModelMetadata, read_onnx_metadata
from saqcli.export.operators import frozen_copy
from saqcli.export.restore import complete_class_names, restore, trained_classes
from saqcli.models.own import Builder, OwnNetwork, check_named, own_network
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import check_build_metadata
from saqcli.pipelines.setup import classes_of, explain_unsupported, load_float
from saqcli.pipelines.targets import (
    EVALUATED,
    QUANTIZED,
    find_target,
    model_file,
    named_builder,
    named_file,
)
from saqcli.progress import Progress
from saqcli.quant.tracer import try_model
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


def open_target(
    target: str,
    section: ModelSection,
    device: torch.device,
    progress: Progress,
    builder: str | None = None,
) -> Predictor:
    """The predictor of ``target``.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        device: device of PyTorch models; ONNX files run on the CPU.
        progress: receives notes.
        builder: name of the user's own network that a run or file was made from.

    Raises:
        SaqError: unknown or damaged target.
    """
    found = find_target(target, EVALUATED)
    path, own = named_file(found, section), named_builder(found, builder)
    if path is not None:
        predictor = open_onnx(path) if path.suffix == ".onnx" else open_safetensors(path, device, own)
        if (
            own is not None and predictor.metadata is not None
        ):  # an ONNX file is not rebuilt, but must not contradict
            check_named(predictor.metadata.build["name"], own, str(path))
        return predictor
    loaded = load_float(section, progress)
    with explain_unsupported(loaded.name):
        try_model(loaded.model, torch.zeros(1, *loaded.preprocessing.input_size))
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


def load(path: str | Path, *, exact: bool = False, builder: str | Builder | None = None) -> nn.Module:
    """The quantized model of a safetensors file or a finished run directory.

    Args:
        path: ``model.safetensors``, or a run directory of ``saq quantize``.
        exact: return the exact form, which ONNX files of style ``exact`` equal bit for bit.
        builder: of a network of one's own: its name ``MODULE:NAME``, the function that builds it, or a float module.

    Returns:
        The model in eval mode on the CPU, bit-identical to the saved one. Its input is normalized images (N, C, H, W).

    Raises:
        SaqError: unknown or damaged path.
    """
    target = find_target(str(path), QUANTIZED, "path")
    run = target.run
    own = None if builder is None else own_network(builder)
    model, metadata = restore(model_file(run) if run else target.path or Path(path), own)
    if not exact:
        return model
    example = torch.zeros(2, *Preprocessing.from_dict(metadata.preprocessing).input_size)
    return ExactForm(frozen_copy(model), example).eval()
