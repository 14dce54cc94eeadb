"""Restoring a quantized model from a file, with quantizers and classes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from saqcli.errors import BuilderError, ConfigError, CorruptArtifact, SaqError
from saqcli.export.model_metadata import ModelMetadata, read_onnx_metadata
from saqcli.export.safetensors import Content, read_content, rebuild, restore_structure
from saqcli.machine import library_versions
from saqcli.models.load import LoadedModel, as_loaded, build_architecture
from saqcli.models.own import OwnNetwork, check_named
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import check_build_metadata, rebuild_from_metadata
from saqcli.serialization import printable
from saqcli.tasks.class_names import imagenet_names, library_order
from saqcli.tasks.labels import Classes


def trained_classes(metadata: ModelMetadata, called: str) -> Classes:
    """The classes of a quantized model, and the labels of folders during its training.

    Args:
        metadata: metadata of the model.
        called: name of the model in messages.
    """
    count, network = int(metadata.build["num_classes"]), str(metadata.build["name"])
    return Classes(
        count, library_order(network), metadata.class_names, metadata.folders, metadata.class_order, called
    )


def complete_class_names(metadata: ModelMetadata) -> ModelMetadata:
    """Complete the class names in metadata of earlier versions, which may have only those of the training folders.

    If they are ImageNet synsets, the names of all synsets are used; otherwise the class names are unknown.
    """
    names, count = metadata.class_names, metadata.build.get("num_classes")
    if not names or len(names) == count or type(count) is not int:
        return metadata
    synsets = imagenet_names(count)
    index = {name: place for place, name in enumerate(synsets)}
    known = all(name in index for name in names)
    folders = {name: index[name] for name in names} if known else {}
    order = "imagenet" if known else ""
    return metadata.model_copy(
        update={"class_names": synsets if known else (), "folders": folders, "class_order": order}
    )


def restore(path: Path, own: OwnNetwork | None = None) -> tuple[nn.Module, ModelMetadata]:
    """The quantized model in a safetensors file, in eval mode on the CPU, and its metadata.

    Args:
        path: of the file.
        own: the user's own network that the file was made from, if it was (``own_network``).

    Raises:
        BuilderError: the file needs a network that the user did not name, or this network fails.
        CorruptArtifact: the file is truncated, damaged, foreign, of a newer version, changed, or its network cannot be
            built here; the message is one printable line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        content = read_content(path)
    except SaqError as error:
        raise CorruptArtifact(printable(f"{error}")) from None
    return restored(content, path, own)


def restored(content: Content, path: Path, own: OwnNetwork | None = None) -> tuple[nn.Module, ModelMetadata]:
    """As ``restore``, from the content that was read from ``path``."""
    metadata, tensors = content
    try:
        model = rebuild(_float_model(path, metadata, tensors, own), metadata, tensors, str(path))
        return model, complete_class_names(metadata)
    except BuilderError:
        raise
    except SaqError as error:
        raise CorruptArtifact(printable(f"{error}") + printable(_version_hint(metadata), 200)) from None


def rebuild_structure(metadata: ModelMetadata, own: OwnNetwork | None = None) -> nn.Module:
    """The network described by ``metadata`` with its quantizers; its tensors are not loaded."""
    model = build_architecture(metadata.build, own)
    restore_structure(model, metadata)
    return model


def open_from_metadata(path: Path, own: OwnNetwork | None = None) -> tuple[LoadedModel, ModelMetadata]:
    """The network described in a file, with random weights and without quantizers, and its metadata.

    Args:
        path: a ``.safetensors`` or ``.onnx`` file written by saq.
        own: as in ``restore``.

    Raises:
        BuilderError: as in ``restore``.
        CorruptArtifact: the file is damaged or foreign, or its network cannot be built here.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        if path.suffix == ".onnx":
            metadata = read_onnx_metadata(path)
            check_build_metadata(metadata.build, metadata.preprocessing)
            check_named(metadata.build["name"], own, str(path))
            model = build_architecture(metadata.build, own)
        else:
            metadata, tensors = read_content(path)
            model = _float_model(path, metadata, tensors, own)
    except BuilderError:
        raise
    except SaqError as error:
        raise CorruptArtifact(printable(f"{error}")) from None
    preprocessing = Preprocessing.from_dict(metadata.preprocessing)
    return as_loaded(model, metadata.build, preprocessing, path.name, own), metadata


def _float_model(
    path: Path, metadata: ModelMetadata, tensors: Mapping[str, Tensor], own: OwnNetwork | None
) -> nn.Module:
    """The network that ``metadata`` describes, with random weights."""
    try:
        check_named(str(metadata.build.get("name")), own, str(path))
        return rebuild_from_metadata(metadata.build, metadata.preprocessing, tensors, own)
    except BuilderError:
        raise
    except SaqError as error:
        raise CorruptArtifact(f"{path} describes a model that cannot be built: {error}") from None


def _version_hint(metadata: ModelMetadata) -> str:
    """The differing library versions, as a hint when a file does not fit: networks change between versions."""
    here = library_versions()
    others = [f"{name} {v}" for name, v in metadata.versions.items() if here.get(name, v) != v]
    if not others:
        return ""
    return (
        f"; it was written with {', '.join(others)}, here is {', '.join(f'{n} {v}' for n, v in here.items())}"
    )
