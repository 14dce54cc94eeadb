"""Float modules by name, and images for them."""

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from saqcli.api.batches import device_of
from saqcli.api.info import ModelInfo, attach, info
from saqcli.api.messages import as_parameters
from saqcli.config import DataSection
from saqcli.data.splits import open_named, validation_loader
from saqcli.errors import ConfigError
from saqcli.models.load import LoadedModel, ModelSpec
from saqcli.models.load import load_model as load_named
from saqcli.progress import SILENT, Progress
from saqcli.quant.fold import make_plain
from saqcli.tasks.class_names import library_order
from saqcli.tasks.labels import Classes


def load_model(
    name: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    input_size: int | tuple[int, ...] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    new_head: bool = False,
    weights_key: str | None = None,
    progress: Progress = SILENT,
    **kwargs: Any,
) -> nn.Module:
    """A float network by name, in eval mode on the CPU; ``saqcli.info`` tells its preprocessing and classes.

    Args:
        name: ``resnet18`` (timm first, then torchvision), ``timm/NAME``, ``torchvision/NAME`` or ``saq/NAME``;
            ``NAME.TAG`` for weights other than the default. ``MODULE:NAME`` imports a network of your own.
        weights: a local file of weights, ``.safetensors``, ``.pth``, ``.pt`` or ``.th``; no code of it is run.
        pretrained: load published weights if no file is given; otherwise weights are random.
        num_classes: rows of the classifier; another number than that of the weights starts a new one.
        in_chans: channels of an image.
        input_size: one side, (H, W) or (C, H, W).
        mean: per channel, of pixels scaled to 0..1.
        std: per channel, of pixels scaled to 0..1.
        new_head: start with a random classifier if ``weights`` has another number of classes.
        weights_key: selects one of several sets of tensors in ``weights``.
        progress: receives a note on every choice that was made for you.
        kwargs: arguments of the library's builder.

    Raises:
        UnknownModel: there is no network of that name; similar ones are named.
        WeightsMismatch, UnsafeWeights, CorruptArtifact: the weights do not fit, would run code, or are damaged.
        SaqError: the published weights cannot be fetched.

    Example:
        >>> import saqcli as saq
        >>> net = saq.load_model("timm/resnet18", pretrained=False, num_classes=10)
        >>> saq.info(net).name
        'timm/resnet18'
    """
    spec = ModelSpec(
        name=name,
        weights=None if weights is None else Path(weights),
        pretrained=pretrained,
        num_classes=num_classes,
        in_chans=in_chans,
        kwargs=kwargs,
        input_size=input_size,
        mean=None if mean is None else tuple(mean),
        std=None if std is None else tuple(std),
        new_head=new_head,
        weights_key=weights_key,
    )
    loaded = open_float(spec)
    for note in loaded.notes:
        progress.note(as_parameters(note, inspect.signature(load_model).parameters))
    return loaded.model


def open_float(spec: ModelSpec) -> LoadedModel:
    """The float network of ``spec`` with plain float32 weights; its notes name every choice that was made."""
    loaded = load_named(spec)
    loaded.notes += [f"{loaded.name}: {note}" for note in make_plain(loaded.model)]
    attach(loaded.model, ModelInfo.of_loaded(loaded))
    return loaded


def load_images(
    model: nn.Module,
    path: str | Path,
    split: Literal["train", "val"] = "val",
    *,
    batch_size: int = 64,
    images: int | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """A loader of the images of a folder, preprocessed for ``model``, with its labels.

    Args:
        model: from ``load_model``, ``quantize_model`` or ``load``, whose preprocessing and class names are known.
        path: an ImageNet-style folder, with ``train/`` and ``val/`` and a folder per class in each; or a data set that
            ``data.path`` accepts.
        split: ``train`` or ``val``.
        batch_size: images of a batch.
        images: number of images, drawn evenly over the classes by ``seed``; None for all.
        workers: processes that read images; None for the number that suits the images.
        seed: random seed.

    Raises:
        ConfigError: the preprocessing of ``model`` is unknown, or there is no such split.
        DataError: the folder cannot be read with the classes of the model.
    """
    if split not in ("train", "val"):
        raise ConfigError(f"`split={split}` is not a split: give train or val")
    about = info(model)
    if about.preprocessing is None:
        raise ConfigError(
            f"the preprocessing of {about.name} is unknown: read the images with a loader of your own"
        )
    section = DataSection(path=str(path), eval_batch_size=batch_size, workers=workers)
    opened = open_named(section, split, classes_of(about))
    return validation_loader(opened, about.preprocessing, section, device_of(model), seed, images)


def classes_of(about: ModelInfo) -> Classes:
    """The classes of a module, and the labels of folders during its training."""
    count = int((about.build or {}).get("num_classes", len(about.class_names)))
    order = library_order(about.name)
    return Classes(count, order, about.class_names, dict(about.folders), about.class_order, about.name)
