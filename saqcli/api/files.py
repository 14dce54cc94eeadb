"""Quantized modules in files: ``save`` and ``load``."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saqcli._version import __version__
from saqcli.api.batches import Inputs, class_scores
from saqcli.api.info import ModelInfo, Quantization, attach, bits_of, class_of, quantization_of, unwrapped
from saqcli.api.models import load_model
from saqcli.api.networks import check_signature, copied, float_network, prepare
from saqcli.api.sources import EVALUATED, QUANTIZED, find_source, model_file
from saqcli.config import names_own_network
from saqcli.errors import BuilderError, ConfigError, ExportMismatch, SaqError
from saqcli.export.exact_form import ExactForm
from saqcli.export.model_metadata import JUNCTIONS_SINCE, ModelMetadata
from saqcli.export.operators import frozen_copy
from saqcli.export.restore import restored
from saqcli.export.safetensors import SafetensorsExporter, read_content, rebuild
from saqcli.machine import library_versions
from saqcli.models.load import build_architecture
from saqcli.models.own import is_class_name, own_network
from saqcli.models.preprocessing import Preprocessing
from saqcli.quant import convert
from saqcli.quant.calls import Call, tensors_in
from saqcli.serialization import named_path, replacing


def save(model: nn.Module, path: str | Path) -> None:
    """Write a quantized module to a safetensors file: packed codes, steps, metadata.

    The file is read back first, and gets its name once the module in it returns the same bits as ``model``. The file of
    a module of one's own names its class, and ``load`` needs such a module; so does that of a library's network which
    was changed after it was loaded.

    Args:
        model: from ``quantize_model`` or ``load``; not changed.
        path: of the file; its folder must exist.

    Raises:
        ConfigError: the module is not quantized, or ``path`` has another suffix.
        ExportMismatch: the module in the file differs, or returns no tensor to compare; nothing is written.
        CannotWrite: the disk is full, or the folder missing or read-only.
    """
    path, (inner, about, found) = named_path(str(path)), quantization_of(model)
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"`path={path}` does not end with .safetensors: give a file name like net.safetensors"
        )
    inner = copy.deepcopy(inner).cpu().eval()
    if about.build is not None and not _builds_again(inner, about, found):
        attach(inner, replace(about, name=class_of(inner), build=None))
    metadata, example = metadata_of(inner), found.example.to(torch.device("cpu"))
    with replacing(path) as temporary:
        SafetensorsExporter().export(inner, example.tensors[0], temporary, metadata)
        plain = copy.deepcopy(inner)
        convert.unwrap(plain)
        loaded = rebuild(plain, metadata, read_content(temporary).tensors, str(path))
        if not same_outputs(inner, loaded, example):
            raise ExportMismatch(
                f"the module in {path} returns other numbers than the one saved; no file was written"
            )


def _builds_again(model: nn.Module, about: ModelInfo, found: Quantization) -> bool:
    """Whether the network of the module's name is still the same: it may have been changed since it was loaded."""
    if names_own_network(str((about.build or {}).get("name"))):
        return True  # only the user builds it
    plain = copy.deepcopy(model)
    convert.unwrap(plain)
    try:
        again = build_architecture(about.build or {})
        again.load_state_dict(plain.state_dict())
    except (SaqError, RuntimeError):
        return False
    return same_outputs(plain, again, found.example.to(torch.device("cpu")))


def same_outputs(one: nn.Module, other: nn.Module, call: Call) -> bool:
    """Whether two modules in eval mode return the same bits for a call."""
    with torch.inference_mode():
        found, expected = tensors_in(call.run(one)), tensors_in(call.run(other))
    return bool(found) and len(found) == len(expected) and all(map(torch.equal, found, expected))


def load(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    builder: str | None = None,
    example: Any = None,
    inputs: Inputs | None = None,
    exact: bool = False,
) -> nn.Module:
    """The quantized module of a safetensors file or a finished run directory.

    ``saqcli.info`` tells its preprocessing, class names and bits.

    Args:
        path: ``model.safetensors``, or a run directory of ``saq quantize``.
        model: a float module like the one that was quantized, for the file of a module of one's own; not changed.
        builder: ``MODULE:NAME``, as ``load_model`` accepts it, for a file or run that was made from it; the module is
            imported only if it is named here.
        example: inputs of ``model``, where the file does not tell the size of its images.
        inputs: from ``example`` to the module's arguments, as in ``quantize_model``.
        exact: return the exact form, which ONNX files of style ``exact`` equal bit for bit.

    Returns:
        The module in eval mode on the CPU, bit-identical to the saved one.

    Raises:
        CorruptArtifact: the file is truncated, damaged, foreign, changed, or does not fit ``model``.
        BuilderError: the file needs ``model`` or ``builder``.
        ConfigError: there is no such file, or ``model`` is of another class.
    """
    file = _file_of(named_path(str(path)))
    content = read_content(file)
    _check_source(file, str(content.metadata.build.get("name")), model, builder)
    if model is None:
        own = None if builder is None else own_network(builder)
        loaded, metadata = restored(content, file, own)
        plain = build_architecture(metadata.build, own)
    else:
        metadata, tensors = content
        plain = copied(unwrapped(model)).cpu()
        loaded = rebuild(copy.deepcopy(plain), metadata, tensors, str(file))
    loaded = _described(loaded, plain, metadata, example, inputs, named=model is None)
    if not exact:
        return loaded
    check_signature(metadata.policy.model, quantization_of(loaded)[2].traced)
    return ExactForm(frozen_copy(loaded), torch.zeros(2, *metadata.preprocessing["input_size"])).eval()


def _check_source(file: Path, name: str, model: nn.Module | None, builder: str | None) -> None:
    """Check that a module is given where ``file``, saved from ``name``, needs one, and that it is of that class.

    Raises:
        BuilderError: it is missing.
        ConfigError: it is of another class, or given twice.
    """
    if model is not None and builder is not None:
        raise ConfigError("`model` and `builder` both give the network: give one of them")
    if builder is not None or not is_class_name(name):
        return
    if model is None:
        importable = (
            f", or use `builder={name}` if that is importable and you trust it"
            if names_own_network(name)
            else ""
        )
        raise BuilderError(
            f"{file} was saved from a module of {name}, which no library builds: give `model`, a float module like "
            f"it{importable}"
        )
    kinds = [kind.__qualname__ for kind in type(unwrapped(model)).__mro__]
    called = name.partition(":")[2]
    if called[:1].isupper() and called not in kinds:
        raise ConfigError(
            f"{file} was saved from a module of {name}, and `model` is a {kinds[0]}: give a module of that class"
        )


def opened(model: nn.Module | str | Path) -> nn.Module:
    """``model`` itself, or the module of a file, run directory or model name."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, Path) or find_source(model, EVALUATED).kind != "model":
        return load(model)
    return load_model(model)


def _file_of(path: Path) -> Path:
    """The safetensors file ``path``, or that of a run directory."""
    source = find_source(str(path), QUANTIZED, "path")
    run = source.run
    return model_file(run) if run else source.path or path


def metadata_of(model: nn.Module) -> ModelMetadata:
    """The metadata of files of a quantized module.

    Raises:
        ConfigError: the module is not quantized.
    """
    model, about, found = quantization_of(model)
    shapes, scores = found.traced.inputs, class_scores(found.traced.outputs)
    image = shapes[0] if len(shapes) == 1 and len(shapes[0]) == 3 else None
    preprocessing = None if image is None else _preprocessing_of(about.preprocessing, image)
    classes = 0 if scores is None else scores.shape[1]
    named = (
        about.build is not None
        and about.build["num_classes"] == classes
        and about.build["in_chans"] == (image or (0,))[0]
    )
    build = (named and about.build) or {
        "name": about.name if about.build is None else class_of(model),
        "num_classes": classes,
        "in_chans": 0 if image is None else image[0],
        "kwargs": {},
    }
    return ModelMetadata(
        schema_version=1 if found.junctions is None else JUNCTIONS_SINCE,
        saq_version=__version__,
        versions=library_versions(),
        build=dict(build),
        preprocessing={} if preprocessing is None else preprocessing.to_dict(),
        policy=bits_of(model).model_copy(update={"model": build["name"]}),
        scheme=found.scheme,
        signed=dict(found.signed),
        routed=found.traced.routed,
        products=dict(found.products),
        junctions=found.junctions,
        absorbed=convert.absorbed_norms(model),
        class_names=about.class_names if len(about.class_names) == classes else (),
        folders=dict(about.folders) if named or about.build is None else {},
        class_order=about.class_order if named or about.build is None else "",
        exif_transpose=about.exif_transpose,
        source=about.source,
        source_sha256=about.source_sha256,
    )


def _preprocessing_of(known: Preprocessing | None, size: tuple[int, ...]) -> Preprocessing:
    """The preprocessing of images of ``size`` (C, H, W), the one that a module was traced with."""
    if known is None or known.input_size[0] != size[0]:
        return as_given(size)
    channels, height, width = size
    return replace(known, input_size=(channels, height, width))


def as_given(size: tuple[int, ...]) -> Preprocessing:
    """The preprocessing of images that are already what a module takes: nothing but the size (C, H, W) is known."""
    channels, height, width = size
    return Preprocessing((channels, height, width), (0.0,) * channels, (1.0,) * channels, "bilinear", 1.0)


def _described(
    loaded: nn.Module,
    plain: nn.Module,
    metadata: ModelMetadata,
    example: Any,
    inputs: Inputs | None,
    *,
    named: bool,
) -> nn.Module:
    """``loaded`` with its information; ``plain`` is a float module like it, which is traced.

    It is ``named`` if its name, not the caller, builds it.
    """
    preprocessing = Preprocessing.from_dict(metadata.preprocessing) if metadata.preprocessing else None
    about = ModelInfo(
        metadata.policy.model,
        preprocessing,
        metadata.class_names,
        metadata.build if named else None,
        metadata.source,
        metadata.source_sha256,
        folders=metadata.folders,
        class_order=metadata.class_order,
        exif_transpose=metadata.exif_transpose,
    )
    attach(plain, about)
    ready = prepare(plain, None, example, inputs, None, inplace=True)
    network = float_network(
        ready.model,
        ready.example,
        quantize_attention=bool(metadata.products),
        junctions=metadata.junctions,
        fold_norms=bool(metadata.absorbed),
    )
    found = Quantization(
        metadata.scheme,
        ready.example.first(),
        network.traced,
        network.costs,
        metadata.signed,
        metadata.products,
        arguments=ready.arguments,
        junctions=metadata.junctions,
    )
    attach(loaded, replace(about, quantization=found))
    return loaded
