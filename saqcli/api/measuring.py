"""Measurements of any module: accuracy on labelled batches, and the instruments of ``saq analyze``."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from saqcli.analysis import INSTRUMENTS, AnalysisInput, Reading, Session, Settings, measure
from saqcli.api.batches import BatchReader, Inputs, class_labels, class_scores, labelled_images
from saqcli.api.files import opened
from saqcli.api.info import bits_of, info, quantization_of, unwrapped
from saqcli.errors import ConfigError, DataError, UnsupportedModel
from saqcli.progress import SILENT, Progress
from saqcli.quant.kernels.use import fused_on_cpu
from saqcli.quant.layer import in_eval_mode, quantized_layers, quantized_once
from saqcli.serialization import parse_object
from saqcli.tasks.classification import Meter, Score, unfit


def evaluate(
    model: nn.Module | str | Path,
    data: Iterable[Any],
    *,
    inputs: Inputs | None = None,
    progress: Progress = SILENT,
) -> Score:
    """Accuracy and loss of a module that returns class scores (N, classes), in eval mode.

    Args:
        model: float or quantized; or a model name, a safetensors file or a run directory. Its mode is restored.
        data: any iterable of batches with labels, integers (N,); images with a label below 0 are left out.
        inputs: from a batch to the module's arguments.
        progress: reports every batch.

    Returns:
        Top-1 and top-5 in percent, and the mean cross-entropy.

    Raises:
        DataError: no batches, or one whose labels are missing or no classes.
        UnsupportedModel: the module returns something else than class scores.
    """
    module, meter = unwrapped(opened(model)), Meter()
    reader = BatchReader(module, inputs)
    with (
        in_eval_mode(module),
        torch.no_grad(),
        fused_on_cpu(module),
        quantized_once(module),
        progress.task("evaluating", _length(data)) as task,
    ):
        for batch in data:
            meter.update(*_scores_and_labels(module, reader, batch))
            so_far = meter.score()
            task.advance(images=so_far.images, loss=so_far.loss, top1=so_far.top1)
    if not meter.images:
        raise DataError("the loader has no labelled images: give batches (images, labels)")
    return meter.score()


def analyze(
    model: nn.Module | str | Path,
    data: Iterable[Any],
    instruments: Iterable[str] = ("sharpness",),
    *,
    inputs: Inputs | None = None,
    settings: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> dict[str, Reading]:
    """Readings of instruments on a quantized module that returns class scores.

    Args:
        model: from ``quantize_model`` or ``load``, or the path of one; restored bit for bit.
        data: any iterable of labelled batches, which are held in memory; the module takes one tensor.
        instruments: names in ``saqcli.analysis.INSTRUMENTS``.
        inputs: from a batch to the module's argument.
        settings: of the instruments, such as ``{"rho": 0.1}``; see ``saqcli.analysis.Settings``. Those that one
            instrument alone has are under its name: ``{"sparsity": {"threshold": 0.1}}``.
        progress: reports all measurements.

    Returns:
        A reading for every instrument; ``to_dict`` of it gives plain values.

    Raises:
        ConfigError: the module is not quantized, or there is no such instrument or setting.
        DataError: a batch whose labels are missing or no classes.
        UnsupportedModel: the module does not map one tensor to class scores.
        PluginError: an instrument of another package failed or changed the module, which is restored.
    """
    module, about, found = quantization_of(opened(model))
    wanted = _settings_of(list(instruments), settings or {})
    reader = BatchReader(module, inputs)
    scores = class_scores(found.traced.outputs)
    if scores is None:
        raise UnsupportedModel(
            f"{about.name} returns no class scores (N, classes), which instruments measure"
        )
    pairs = [_image_and_labels(module, reader, batch, scores.shape[1]) for batch in data]
    batches = [(images, labels) for images, labels in pairs if len(labels)]
    if not batches:
        raise DataError("the loader has no labelled images: give at least one batch")
    layers = quantized_layers(module)
    ordered = {name: layers[name] for name in bits_of(module).layers}
    with in_eval_mode(module):
        subject = AnalysisInput(module, ordered, batches, found.scheme)
        return {name: measure(name, subject, each, Session(progress)) for name, each in wanted.items()}


def _settings_of(instruments: list[str], settings: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of every instrument: the shared ones, and its own, which are a mapping under its name."""
    chosen = {name: INSTRUMENTS.find(name) for name in instruments}
    own = {name: value for name, value in settings.items() if isinstance(value, Mapping)}
    for name in own:
        if name not in chosen:
            raise ConfigError(
                f"`settings={name}`: no such instrument is measured: choose it too, or remove this"
            )
    common = {name: value for name, value in settings.items() if name not in own}
    shared = parse_object(Settings, common, "`settings`", ConfigError)
    return {
        name: each.settings_with(shared, own.get(name, {}), name, "settings") for name, each in chosen.items()
    }


def _scores_and_labels(model: nn.Module, reader: BatchReader, batch: Any) -> tuple[Tensor, Tensor]:
    labels = reader.known_labels(batch)
    output = reader.call(batch).run(model)
    count = len(labels) if labels.dim() else 0
    if kind := unfit(output, count):
        raise UnsupportedModel(
            f"{info(model).name} returns a {kind} for {count} labels instead of class scores (N, classes): "
            "compute its score in a loop of your own"
        )
    return output, class_labels(labels, output.shape[1], count, skipped=True)


def _image_and_labels(
    model: nn.Module, reader: BatchReader, batch: Any, classes: int
) -> tuple[Tensor, Tensor]:
    call = reader.call(batch)
    if len(call.args) != 1 or not isinstance(call.args[0], Tensor):
        raise UnsupportedModel(
            f"{info(model).name} takes several inputs: instruments measure modules of one tensor"
        )
    return labelled_images(call.args[0], reader.known_labels(batch), classes)


def _length(data: Iterable[Any]) -> int:
    """Number of batches; 0 if unknown."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return 0
