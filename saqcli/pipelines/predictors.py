"""Anything that can be evaluated, as a function from images to logits: a name, a run, a file."""

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
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import check_build_metadata
from saqcli.pipelines.setup import answering, classes_of, load_float
from saqcli.pipelines.targets import EVALUATED, QUANTIZED, find_target, model_file, named_file
from saqcli.progress import Progress
from saqcli.quant.tracer import try_model
from saqcli.serialization import printable
from saqcli.tasks.labels import Classes
from saqcli.units import counted
from saqcli.verify.runtime import onnx_session


@dataclass(frozen=True)
class Predictor:
    """Something to evaluate.

    Attributes:
        predict: normalized images (N, C, H, W) to logits (N, classes).
        name: what messages call it.
        num_classes: how many logits.
        preprocessing: of its images.
        device: where it wants its images.
        facts: what the file says about itself; None for a float model.
        classes: of the logits.
    """

    predict: Callable[[Tensor], Tensor]
    name: str
    num_classes: int
    preprocessing: Preprocessing
    device: torch.device
    classes: Classes
    facts: ModelMetadata | None = None


def open_target(target: str, section: ModelSection, device: torch.device, progress: Progress) -> Predictor:
    """The predictor that ``target`` names.

    Args:
        target: a run directory, a ``.safetensors`` or ``.onnx`` file, or a model name.
        section: further options of a model name.
        device: of PyTorch models; ONNX files run on the CPU.
        progress: for notes.

    Raises:
        SaqError: no such thing, or a damaged one.
    """
    path = named_file(find_target(target, EVALUATED), section)
    if path is not None:
        return open_onnx(path) if path.suffix == ".onnx" else open_safetensors(path, device)
    loaded = load_float(section, progress)
    with answering(loaded.name):
        try_model(loaded.model, torch.zeros(1, *loaded.preprocessing.input_size))
    return Predictor(
        loaded.model.to(device),
        loaded.name,
        loaded.num_classes,
        loaded.preprocessing,
        device,
        classes_of(loaded),
    )


def open_safetensors(path: Path, device: torch.device) -> Predictor:
    """A predictor from a file that ``saq quantize`` or ``saq export`` wrote."""
    model, facts = restore(path)
    return _described(model.to(device), str(path), facts, device)


def open_onnx(path: Path, *, optimized: bool = True) -> Predictor:
    """A predictor that runs in ONNX Runtime, at its default optimizations or at none.

    Raises:
        CorruptArtifact: ONNX Runtime does not take it.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    facts = complete_class_names(read_onnx_metadata(path))
    answer, classes = onnx_session(path, optimized=optimized), facts.build.get("num_classes")

    def predict(images: Tensor) -> Tensor:
        logits = answer(images)
        if logits.shape != (len(images), classes):
            raise CorruptArtifact(
                f"{path} does not turn {counted(len(images), 'image')} into logits of {classes} classes, as it says: "
                "export it again"
            )
        return logits

    return _described(predict, str(path), facts, torch.device("cpu"))


def _described(
    predict: Callable[[Tensor], Tensor], name: str, facts: ModelMetadata, device: torch.device
) -> Predictor:
    try:
        preprocessing = check_build_metadata(facts.build, facts.preprocessing)
    except SaqError as error:
        raise CorruptArtifact(f"{name} does not say what it expects: {printable(str(error))}") from None
    classes = trained_classes(facts, name)
    return Predictor(predict, name, classes.count, preprocessing, device, classes, facts)


def load(path: str | Path, *, exact: bool = False) -> nn.Module:
    """The quantized model in a safetensors file or a finished run directory, ready to be called.

    Args:
        path: ``model.safetensors``, or the directory that ``saq quantize`` left.
        exact: in its exact form, which ONNX files of style ``exact`` equal bit for bit.

    Returns:
        In eval mode on the CPU; bit-equal to the model that was saved. Its input is normalized images (N, C,
        H, W).

    Raises:
        SaqError: no such thing, or a damaged one.
    """
    target = find_target(str(path), QUANTIZED, "path")
    run = target.run
    model, facts = restore(model_file(run) if run else target.path or Path(path))
    if not exact:
        return model
    example = torch.zeros(2, *Preprocessing.from_dict(facts.preprocessing).input_size)
    return ExactForm(frozen_copy(model), example).eval()
