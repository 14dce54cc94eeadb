"""Reading a quantized model back from a file: the network, its quantizers, its classes."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from saqcli.errors import ConfigError, CorruptArtifact, SaqError
from saqcli.export.model_metadata import ModelFacts, read_onnx_facts
from saqcli.export.safetensors import read_content, rebuild, restore_structure
from saqcli.machine import library_versions
from saqcli.models.load import LoadedModel, as_loaded, build_architecture
from saqcli.models.preprocessing import Preprocessing
from saqcli.models.rebuild import build_described, check_description
from saqcli.serialization import printable
from saqcli.tasks.labels import Classes, imagenet_names, library_order


def trained_classes(facts: ModelFacts, called: str) -> Classes:
    """The classes of a quantized model, and the labels that folders had in its training.

    Args:
        facts: of the model.
        called: what messages call it.
    """
    count, network = int(facts.build["num_classes"]), str(facts.build["name"])
    return Classes(count, library_order(network), facts.class_names, facts.folders, facts.class_order, called)


def with_names_of_logits(facts: ModelFacts) -> ModelFacts:
    """``facts`` of an earlier version, whose class names may be those of the folders trained on alone.

    Names of some of ImageNet's synsets become those of all; others that are too few are unknown.
    """
    names, count = facts.class_names, facts.build.get("num_classes")
    if not names or len(names) == count or type(count) is not int:
        return facts
    synsets = imagenet_names(count)
    index = {name: place for place, name in enumerate(synsets)}
    known = all(name in index for name in names)
    folders = {name: index[name] for name in names} if known else {}
    order = "imagenet" if known else ""
    return facts.model_copy(
        update={"class_names": synsets if known else (), "folders": folders, "class_order": order}
    )


def restore(path: Path) -> tuple[nn.Module, ModelFacts]:
    """The quantized model in a safetensors file, in eval mode on the CPU, and what the file says about it.

    Raises:
        CorruptArtifact: truncated, damaged, foreign, of a newer version, changed, or not of a network that can be built
            here; its message is one printable line.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    hint = ""
    try:
        facts, tensors = read_content(path)
        hint = _written_elsewhere(facts)
        model = rebuild(_float_model(path, facts, tensors), facts, tensors, str(path))
        return model, with_names_of_logits(facts)
    except SaqError as error:
        raise CorruptArtifact(printable(f"{error}") + printable(hint, 200)) from None


def rebuild_structure(facts: ModelFacts) -> nn.Module:
    """The network that ``facts`` describe, with its quantizers, whose tensors are still to be loaded."""
    model = build_architecture(facts.build)
    restore_structure(model, facts)
    return model


def open_described(path: Path) -> tuple[LoadedModel, ModelFacts]:
    """The network that a file describes, of random weights and without quantizers, and what the file says about it.

    Args:
        path: a ``.safetensors`` or ``.onnx`` file of ours.

    Raises:
        CorruptArtifact: damaged, foreign, or not of a network that can be built here.
    """
    if not path.is_file():
        raise ConfigError(f"there is no file {path}")
    try:
        if path.suffix == ".onnx":
            facts = read_onnx_facts(path)
            check_description(facts.build, facts.preprocessing)
            model = build_architecture(facts.build)
        else:
            facts, tensors = read_content(path)
            model = _float_model(path, facts, tensors)
    except SaqError as error:
        raise CorruptArtifact(printable(f"{error}")) from None
    preprocessing = Preprocessing.from_dict(facts.preprocessing)
    return as_loaded(model, facts.build, preprocessing, path.name), facts


def _float_model(path: Path, facts: ModelFacts, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network that ``facts`` describe, of random weights."""
    try:
        return build_described(facts.build, facts.preprocessing, tensors)
    except SaqError as error:
        raise CorruptArtifact(f"{path} describes a model that cannot be built: {error}") from None


def _written_elsewhere(facts: ModelFacts) -> str:
    """What to think of where a file does not fit: networks change with the libraries that they come from."""
    here = library_versions()
    others = [f"{name} {v}" for name, v in facts.versions.items() if here.get(name, v) != v]
    if not others:
        return ""
    return (
        f"; it was written with {', '.join(others)}, here is {', '.join(f'{n} {v}' for n, v in here.items())}"
    )
