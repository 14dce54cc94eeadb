"""Quantized modules in files: ``save`` and ``load``."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saqcli._version import __version__
from saqcli.api.batches import class_scores
from saqcli.api.info import ModelInfo, Quantization, attach, bits_of, quantization_of, unwrapped
from saqcli.api.models import load_model
from saqcli.api.networks import copied, float_network, prepare
from saqcli.api.targets import EVALUATED, QUANTIZED, find_target, model_file
from saqcli.errors import ExportMismatch
from saqcli.export.exact_form import ExactForm
from saqcli.export.model_metadata import ModelMetadata
from saqcli.export.operators import frozen_copy
from saqcli.export.restore import restore
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.machine import library_versions
from saqcli.models.load import build_architecture
from saqcli.models.preprocessing import Preprocessing
from saqcli.quant import convert
from saqcli.quant.calls import tensors_in
from saqcli.serialization import replacing


def save(model: nn.Module, path: str | Path) -> None:
    """Write a quantized module to a safetensors file: packed codes, steps, metadata.

    The file is read back first, and gets its name once the module in it returns the same bits as ``model``. The file of
    a module of one's own names its class, and ``load`` needs such a module.

    Args:
        model: from ``quantize_model`` or ``load``; not changed.
        path: of the file; its folder must exist.

    Raises:
        ConfigError: the module is not quantized.
        ExportMismatch: the module in the file differs; nothing is written.
        CannotWrite: the disk is full, or the folder missing or read-only.
    """
    metadata, path = metadata_of(model), Path(path)
    quantized = quantization_of(model)[2]
    model = copy.deepcopy(unwrapped(model)).cpu().eval()
    example = quantized.example.to(torch.device("cpu"))
    with replacing(path) as temporary:
        SafetensorsExporter().export(model, example.tensors[0], temporary, metadata)
        plain = copy.deepcopy(model)
        convert.unwrap(plain)
        loaded = rebuild(plain, metadata, read_content(temporary).tensors, str(path))
        with torch.inference_mode():
            expected, found = tensors_in(example.run(model)), tensors_in(example.run(loaded))
        if not all(map(torch.equal, expected, found)):
            raise ExportMismatch(
                f"the module in {path} returns other numbers than the one saved; no file was written"
            )


def load(
    path: str | Path, *, model: nn.Module | None = None, example: Any = None, exact: bool = False
) -> nn.Module:
    """The quantized module of a safetensors file or a finished run directory.

    ``saqcli.info`` tells its preprocessing, class names and bits.

    Args:
        path: ``model.safetensors``, or a run directory of ``saq quantize``.
        model: a float module like the one that was quantized, for the file of a module of one's own; not changed.
        example: inputs of ``model``, where the file does not tell the size of its images.
        exact: return the exact form, which ONNX files of style ``exact`` equal bit for bit.

    Returns:
        The module in eval mode on the CPU, bit-identical to the saved one.

    Raises:
        CorruptArtifact: the file is truncated, damaged, foreign, changed, or does not fit ``model``.
        ConfigError: there is no such file, or it needs ``model``.
    """
    file = _file_of(Path(path))
    if model is None:
        loaded, metadata = restore(file)
        plain = build_architecture(metadata.build)
    else:
        metadata, tensors = read_content(file)
        plain = copied(unwrapped(model)).cpu()
        loaded = rebuild(copy.deepcopy(plain), metadata, tensors, str(file))
    loaded = _described(loaded, plain, metadata, example)
    if not exact:
        return loaded
    return ExactForm(frozen_copy(loaded), torch.zeros(2, *metadata.preprocessing["input_size"])).eval()


def opened(model: nn.Module | str | Path) -> nn.Module:
    """``model`` itself, or the module of a file, run directory or model name."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Path) or find_target(model, EVALUATED).kind != "model":
        return load(model)
    return load_model(model)


def _file_of(path: Path) -> Path:
    """The safetensors file ``path``, or that of a run directory."""
    target = find_target(str(path), QUANTIZED, "path")
    run = target.run
    return model_file(run) if run else target.path or path


def metadata_of(model: nn.Module) -> ModelMetadata:
    """The metadata of files of a quantized module.

    Raises:
        ConfigError: the module is not quantized.
    """
    model, about, found = quantization_of(model)
    shapes, scores = found.traced.inputs, class_scores(found.traced.outputs)
    image = shapes[0] if len(shapes) == 1 and len(shapes[0]) == 3 else None
    preprocessing = about.preprocessing or (None if image is None else as_given(image))
    build = about.build or {
        "name": about.name,
        "num_classes": 0 if scores is None else scores.shape[1],
        "in_chans": 0 if image is None else image[0],
        "kwargs": {},
    }
    return ModelMetadata(
        saq_version=__version__,
        versions=library_versions(),
        build=dict(build),
        preprocessing={} if preprocessing is None else preprocessing.to_dict(),
        policy=bits_of(model),
        scheme=found.scheme,
        signed=dict(found.signed),
        routed=found.traced.routed,
        products=dict(found.products),
        class_names=about.class_names,
        folders=dict(about.folders),
        class_order=about.class_order,
        exif_transpose=about.exif_transpose,
        source=about.source,
        source_sha256=about.source_sha256,
    )


def as_given(size: tuple[int, ...]) -> Preprocessing:
    """The preprocessing of images that are already what a module takes: nothing but the size (C, H, W) is known."""
    channels, height, width = size
    return Preprocessing((channels, height, width), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)


def _described(loaded: nn.Module, plain: nn.Module, metadata: ModelMetadata, example: Any) -> nn.Module:
    """``loaded`` with its information; ``plain`` is a float module like it, which is traced."""
    preprocessing = Preprocessing.from_dict(metadata.preprocessing) if metadata.preprocessing else None
    about = ModelInfo(
        metadata.policy.model,
        preprocessing,
        metadata.class_names,
        metadata.build,
        metadata.source,
        metadata.source_sha256,
        folders=metadata.folders,
        class_order=metadata.class_order,
        exif_transpose=metadata.exif_transpose,
    )
    attach(plain, about)
    ready = prepare(plain, None, example, None, None, inplace=True)
    network = float_network(ready.model, ready.example, quantize_attention=bool(metadata.products))
    found = Quantization(
        metadata.scheme,
        ready.example.first(),
        network.traced,
        network.costs,
        metadata.signed,
        metadata.products,
    )
    attach(loaded, replace(about, quantization=found))
    return loaded
